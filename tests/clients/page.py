"""The part of docs/agents.md that a run writes and later runs are held to: how many checks of each suite pass."""

import textwrap
from collections.abc import Iterable
from pathlib import Path

from tests.clients.outcome import Outcome

PAGE = Path(__file__).parents[2] / "docs/agents.md"
BEGIN, END = "<!-- written by make client-test -->\n", "<!-- end -->\n"


def table(outcomes: Iterable[Outcome], known: dict[tuple[str, str], str], versions: dict[str, str]) -> str:
    """A row for each suite, and what fails at SGLang itself below."""
    by_suite: dict[str, list[Outcome]] = {}
    for one in outcomes:
        by_suite.setdefault(one.suite, []).append(one)
    lines = ["| suite | version | checks | pass |", "|---|---|---|---|"]
    for suite, found in by_suite.items():
        passed = sum(not one.problem for one in found)
        lines.append(f"| {suite} | {versions.get(suite, '')} | {len(found)} | {passed} |")
    if known:
        lines += ["", "What fails, fails at SGLang 0.5.23 without a balancer too:", ""]
        reasons: dict[str, dict[str, list[str]]] = {}
        for (suite, check), why in known.items():
            reasons.setdefault(why, {}).setdefault(suite, []).append(check)
        for why, suites in reasons.items():
            named = "; ".join(f"{suite}: {', '.join(checks)}" for suite, checks in suites.items())
            lines += _wrapped(f"- {why} ({named}).")
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 128, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def written() -> str:
    """What stands on the page."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0]


def write(text: str) -> None:
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + begin + text + END + rest.partition(END)[2])
