"""What make client-test makes of what came out, and the page that it is held to."""

import re

from tests.clients import agents, install, page, proxies
from tests.clients.known import KNOWN, judge
from tests.clients.outcome import Outcome

GOOD, BAD = Outcome("suite", "one"), Outcome("suite", "two", "it broke")


def test_a_failure_that_nobody_knows_fails_the_run() -> None:
    assert judge([GOOD, BAD], {}).unexpected == (BAD,)
    assert judge([GOOD, BAD], {("suite", "two"): "SGLang"}).is_good


def test_a_known_failure_that_passes_or_is_gone_fails_it_too() -> None:
    known = {("suite", "one"): "SGLang", ("suite", "three"): "SGLang", ("another", "one"): "SGLang"}
    verdict = judge([GOOD], known)
    assert (verdict.mended, verdict.gone) == ((GOOD,), (("suite", "three"),))
    assert not verdict.is_good


def test_the_table_counts_checks_and_says_why_some_fail() -> None:
    made = page.table([GOOD, BAD], {("suite", "two"): "It has no such field"}, {"suite": "1.2"})
    assert "| suite | 1.2 | 2 | 1 |" in made
    assert "- It has no such field (suite: two)." in made


def test_the_page_has_counts_of_every_suite_and_every_reason() -> None:
    written = page.written()
    counts = dict(re.findall(r"^\| ([^|]+) \|[^|]*\| \d+ \| (\d+) \|$", written, re.MULTILINE))
    assert {*install.versions(), *proxies.PROXIES, "HTTP/1.1"} == set(counts)
    assert [reason for reason in KNOWN.values() if f"- {reason} (" not in written] == []
    assert [version for version in install.versions().values() if f"| {version} |" not in written] == []


def test_each_agent_has_a_recipe() -> None:
    recipes = agents.recipes(page.PAGE.read_text())
    for name in agents.TOOLS:
        files, command = recipes[name]
        assert agents.PROMPT in command
        assert agents.URL in "".join([command, *files.values()])
