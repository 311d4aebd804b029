"""What the lab's images run in place of SGLang: a simulated replica, told by the flags of `python -m replica`."""

import os
import signal
import sys
from pathlib import Path

from tests.lab import process


def main(arguments: list[str]) -> None:
    """Only the port counts of them; LAB_FLAGS, of the service file, has the simulated replica's own."""
    port = arguments[arguments.index("--port") + 1]
    flags = ["--host", "0.0.0.0", "--port", port, "--drain-plugin", *os.environ.get("LAB_FLAGS", "").split()]
    if key := os.environ.get("SGLANG_API_KEY_FILE"):
        flags += ["--api-key", Path(key).read_text().strip()]
    if "--node-rank" in arguments and arguments[arguments.index("--node-rank") + 1] != "0":
        signal.pause()  # the other nodes' SGLang serves nobody; SIGTERM ends it
    print(f"replica: GPU 0 (L4, GPU-{os.uname().nodename}): leased", flush=True)
    sys.argv[1:] = flags
    process.main()


if __name__ == "__main__":
    main(sys.argv[1:])
