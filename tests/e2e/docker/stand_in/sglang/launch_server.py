"""python -m sglang.launch_server, as python -m replica starts it: becomes the lab's replica on the same port.

LAB_FLAGS: more flags for the lab's replica (tests/lab/process.py has them all).
"""

import argparse
import os
import shlex
import sys

parser = argparse.ArgumentParser()
for flag in ("--host", "--port", "--random-seed"):
    parser.add_argument(flag, required=True)
parser.add_argument("--tp-size", default="1")
given, _ = parser.parse_known_args()

print(f"lab: GPUs {os.environ['CUDA_VISIBLE_DEVICES']}; tensor parallel size {given.tp_size}", flush=True)
command = [sys.executable, "-m", "tests.lab.replica", "--drain-plugin"]
command += ["--host", given.host, "--port", given.port, "--random-seed", given.random_seed]
# SGLang has it from its environment, where python -m replica put it.
command += ["--keep-alive", os.environ["SGLANG_TIMEOUT_KEEP_ALIVE"]]
os.execv(sys.executable, [*command, *shlex.split(os.environ.get("LAB_FLAGS", ""))])
