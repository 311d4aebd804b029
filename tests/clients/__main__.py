"""make client-test: agents, SDKs and suites of others against the endpoint. Exits with 1 if what they find has changed.

--write puts the counts on docs/agents.md; --only runs some suites, and holds the page to nothing.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.bench.install import Unavailable
from tests.clients import agents, http1, install, open_webui, page, proxies, suites
from tests.clients.known import KNOWN, judge
from tests.clients.outcome import Outcome
from tests.clients.stage import stage


@dataclass(frozen=True)
class Asked:
    """The endpoint and its model, a folder for files, and where the clients of Node and Python are installed."""

    url: str
    model: str
    folder: Path
    node: Path
    python: Path


def main() -> int:
    told = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    told.add_argument("--write", action="store_true", help="put the counts on docs/agents.md")
    told.add_argument("--only", nargs="+", choices=RUNS, metavar="RUN", help=f"some of {', '.join(RUNS)}")
    told.add_argument("--at", nargs=2, metavar=("URL", "MODEL"), help="an endpoint with the player that runs already")
    flags = told.parse_args()
    wanted = flags.only or list(RUNS)
    cache = install.cache_folder()
    try:
        node, python = install.node(cache), install.python(cache)
    except Unavailable as missing:
        sys.exit(f"client-test: {missing}")
    with tempfile.TemporaryDirectory(prefix="client-test-") as folder:
        if flags.at:
            outcomes = list(_all(wanted, Asked(*flags.at, Path(folder), node, python)))
        else:
            print("starting SGLang and the balancer", flush=True)
            with stage(Path(folder)) as running:
                outcomes = list(_all(wanted, Asked(running.url, running.model, Path(folder), node, python)))
    return _tell(outcomes, flags.write, is_whole=wanted == list(RUNS))


def _all(wanted: list[str], asked: Asked) -> Iterable[Outcome]:
    for name in wanted:
        begin = time.monotonic()
        found = list(RUNS[name](asked))
        passed = sum(not one.problem for one in found)
        print(f"{name}: {passed} of {len(found)} checks pass ({time.monotonic() - begin:.0f} s)", flush=True)
        yield from found


def _tell(outcomes: list[Outcome], is_written: bool, is_whole: bool) -> int:
    verdict = judge(outcomes, KNOWN)
    for one in verdict.unexpected:
        print(f"FAILED {one.suite}: {one.check}: {one.problem}")
    for one in verdict.mended:
        print(f"PASSES NOW {one.suite}: {one.check}: take it out of tests/clients/known.py")
    for suite, check in verdict.gone:
        print(f"GONE {suite}: {check}: tests/clients/known.py has it, and the suite does not")
    made = page.table(outcomes, KNOWN, install.versions())
    if is_written and is_whole and verdict.is_good:
        page.write(made)
    is_stale = is_whole and page.written() != made
    if is_stale:
        print("docs/agents.md has other counts: make client-test ARGS=--write")
    return 0 if verdict.is_good and not is_stale else 1


RUNS: dict[str, Callable[[Asked], Iterable[Outcome]]] = {
    "proxies": lambda asked: proxies.run(asked.folder, install.cache_folder()),
    "http1": lambda asked: http1.run(asked.url),
    "python": lambda asked: suites.python_sdks(asked.url, asked.model, asked.python),
    "node": lambda asked: suites.node_sdks(asked.url, asked.model, asked.node),
    "llm-comply": lambda asked: suites.llm_comply(asked.url, asked.model, asked.python),
    "compatcanary": lambda asked: suites.compatcanary(asked.url, asked.model, asked.node),
    "open-webui": lambda asked: open_webui.run(asked.url, asked.model),
    "agents": lambda asked: agents.run(asked.url, asked.model, asked.node, asked.folder),
}

if __name__ == "__main__":
    sys.exit(main())
