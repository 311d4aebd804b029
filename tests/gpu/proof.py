"""The steps' common ground: where files lie, what was said, and a replica of Llama-2-7b's shape."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.bench.stats import median, quantile
from tests.gpu import serving, shapes
from tests.gpu.serving import Process

START = 240.0  # seconds a replica may take
ROW = "| tokens/s | TTFT p50 ms | TTFT p99 ms | gap p50 ms | gap p99 ms | errors |"


class Proof:
    """One run of the proof. `flags` go to each SGLang; no round of a comparison begins later than `until` seconds;
    stages of a workload at rates are `speed` times shorter."""

    def __init__(
        self,
        out: Path,
        models: Path,
        work: Path,
        *,
        flags: Sequence[str] = (),
        rounds: int = 3,
        until: float = 330,
        speed: float = 1,
    ) -> None:
        self.out, self.models, self.work = out, models, work
        self.flags, self.rounds, self.until, self.speed = tuple(flags), rounds, until, speed
        self.lines: list[str] = []
        self.figures: dict[str, Any] = {}
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began

    def say(self, line: str = "") -> None:
        print(f"[{self.seconds:6.1f}] {line}", flush=True)
        self.lines.append(line)

    def write(self) -> None:
        (self.out / "REPORT.md").write_text("\n".join(self.lines) + "\n")
        (self.out / "report.json").write_text(json.dumps(self.figures, indent=1))

    def replica(self, name: str, model: str, flags: Sequence[str] = (), **environ: str) -> Process:
        return serving.replica(name, model, self.work, [*self.flags, *flags], **environ)

    def llama(self) -> str:
        """The folder of Llama-2-7b's shape."""
        return self._shape("llama-2-7b", shapes.LLAMA_2_7B)

    def llama_3(self) -> str:
        """The folder of Llama-3-8B's shape."""
        return self._shape("llama-3-8b", shapes.LLAMA_3_8B)

    def _shape(self, name: str, shape: Mapping[str, object]) -> str:
        folder = self.work / name
        if not (folder / "config.json").exists():
            shapes.llama(self.models / "smollm2-135m", folder, shape)
        return str(folder)

    def keep(self, name: str, figures: dict[str, Any]) -> None:
        """Adds a load's figures to the report, without its gaps and texts and with the first of its errors."""
        self.figures.setdefault(name, []).append(
            {k: figures[k] for k in ("seconds", "completion_tokens", "prompt_tokens", "cached_tokens", "ttft")}
            | {"errors": figures["errors"][:5], "error_count": len(figures["errors"])}
        )


def chat(url: str, model: str, content: Any, **more: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, **more}
    answer = httpx.post(url + "/v1/chat/completions", json=body, timeout=60, trust_env=False)
    answer.raise_for_status()
    return dict(answer.json())


def row(name: str, figures: dict[str, Any]) -> str:
    """A line under ROW, which has a first column of its own. Times of nothing at all are shown as none."""
    ttft, gaps = figures["ttft"] or [0.0], figures["gaps"] or [0.0]
    return (
        f"| {name} | {figures['completion_tokens'] / figures['seconds']:,.0f} | {1e3 * median(ttft):.1f} |"
        f" {1e3 * quantile(ttft, 0.99):.1f} | {1e3 * median(gaps):.2f} | {1e3 * quantile(gaps, 0.99):.2f} |"
        f" {len(figures['errors'])} |"
    )
