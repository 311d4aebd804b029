"""Suites and SDKs of others, run in their own environments against the endpoint; what each check of theirs found."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.clients import loopback
from tests.clients.outcome import Outcome

PROGRAMS = Path(__file__).with_name("programs")
PATIENCE = 300.0  # seconds for one suite
# Formats that llm-comply knows, and the endpoint has: what each is asked at.
FORMATS = {"openai-chat": "/v1", "anthropic": "/v1", "open-responses": "/v1"}


def python_sdks(url: str, model: str, python: Path) -> Iterator[Outcome]:
    yield from _lines([str(python / "python"), str(PROGRAMS / "sdks.py"), url, model], "SDKs of Python")


def node_sdks(url: str, model: str, node: Path) -> Iterator[Outcome]:
    script = node / "sdks.mjs"  # imports are looked for beside it
    script.write_text((PROGRAMS / "sdks.mjs").read_text())
    yield from _lines(["node", str(script), url, model], "SDKs of Node")


def llm_comply(url: str, model: str, python: Path) -> Iterator[Outcome]:
    for format, path in FORMATS.items():
        suite = f"llm-comply {format}"
        said = _said(
            [
                *(str(python / "llm-comply"), "-u", url + path, "-m", model, "-k", "none"),
                *("--format", format, "--json", "--timeout", "60"),
            ]
        )
        try:
            results = json.loads(said[said.index("{") :])["results"]
        except (ValueError, KeyError):
            yield Outcome(suite, "report", said[-400:] or "it said nothing")
            continue
        for one in results:
            if one["status"] != "skipped":  # it asks that only of models of certain names
                yield Outcome(suite, one["id"], "; ".join(map(str, one.get("errors") or [])))


def compatcanary(url: str, model: str, node: Path) -> Iterator[Outcome]:
    said = _said(
        [
            *(str(node / "node_modules/.bin/compatcanary"), "scan", "--base-url", f"{url}/v1", "--model", model),
            *("--format", "json", "--timeout", "120"),
        ],
        {"OPENAI_API_KEY": "none"},
    )
    try:
        results = json.loads(said[said.index("{") :])["results"]
    except (ValueError, KeyError):
        yield Outcome("compatcanary", "report", said[-400:] or "it said nothing")
        return
    for one in results:
        yield Outcome("compatcanary", one["id"], "" if one["status"] == "pass" else str(one.get("summary", "")))


def _lines(command: list[str], suite: str) -> Iterator[Outcome]:
    """The checks of one of PROGRAMS."""
    said = _said(command)
    told = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    if not told:
        yield Outcome(suite, "report", said[-400:] or "it said nothing")
    for one in told:
        yield Outcome(one["suite"], one["check"], one["problem"])


def _said(command: list[str], more: Mapping[str, str] | None = None) -> str:
    """The program's output, less that of an environment meant for others; what it said so far if it takes too long."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    environ = {**keep, **loopback.ENVIRON, **(more or {})}
    try:
        done = subprocess.run(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return (late.stdout or b"").decode(errors="replace")
    return done.stdout or done.stderr
