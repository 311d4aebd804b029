"""How one check of one suite ended."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """problem: what failed, in a line; empty if nothing did."""

    suite: str
    check: str
    problem: str = ""
