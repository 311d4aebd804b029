"""SGLang's own load generator, which loads no plug-in, runs from the CPU environment and through the balancer."""

import os
import re
import subprocess
import sys
from pathlib import Path

MODEL = "smollm2-135m"


def bench_serving(*flags: str, folder: Path) -> str:
    """What it prints; it leaves its results in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", "sglang.bench_serving", *flags],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_measures_the_endpoint(endpoint: str, models: str, tmp_path: Path) -> None:
    asked = ("--backend", "sglang-oai-chat", "--base-url", endpoint, "--model", MODEL)
    workload = ("--dataset-name", "random-ids", "--random-input-len", "16", "--random-output-len", "4")
    tokenizer = ("--tokenizer", f"{models}/{MODEL}")
    said = bench_serving(*asked, *workload, *tokenizer, "--num-prompts", "2", folder=tmp_path)
    assert re.search(r"Successful requests: +2\b", said), said
