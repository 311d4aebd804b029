"""What fails at SGLang itself, asked directly as well as through the balancer, and why.

A check that is not here and fails, or is here and passes, fails the run: so each line stays true.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from tests.clients.outcome import Outcome

_REASONS = {
    "A message has no `refusal`": {
        "llm-comply openai-chat": (
            *("chat-basic-response", "chat-system-prompt", "chat-multi-turn", "chat-tool-calling"),
        ),
    },
    "A chat that names no model is answered": {"llm-comply openai-chat": ("chat-error-handling",)},
    "`usage` and blocks of content have not all fields that Anthropic's schema wants": {
        "llm-comply anthropic": ("anth-basic-response", "anth-system-prompt", "anth-multi-turn", "anth-tool-calling"),
    },
    "A response has not all fields that the schema wants, such as `completed_at`": {
        "llm-comply open-responses": (
            *("basic-response", "system-prompt", "multi-turn", "tool-calling", "streaming-response"),
            *("streaming-usage", "assistant-phase", "response-output-phase-schema"),
        ),
    },
    "The model that is asked has no eyes": {
        "llm-comply openai-chat": ("chat-image-input",),
        "llm-comply anthropic": ("anth-image-input",),
        "llm-comply open-responses": ("image-input",),
    },
}
# (suite, check): why.
KNOWN = {
    (suite, check): why for why, suites in _REASONS.items() for suite, checks in suites.items() for check in checks
}


@dataclass(frozen=True)
class Verdict:
    """unexpected: failed and should not; mended: passed and should not; gone: known, and not among the checks."""

    unexpected: tuple[Outcome, ...]
    mended: tuple[Outcome, ...]
    gone: tuple[tuple[str, str], ...]

    @property
    def is_good(self) -> bool:
        return not (self.unexpected or self.mended or self.gone)


def judge(outcomes: Iterable[Outcome], known: dict[tuple[str, str], str]) -> Verdict:
    """Compares what came out with what is known, for the suites that were run."""
    all = list(outcomes)
    suites = {one.suite for one in all}
    ran = {(one.suite, one.check) for one in all}
    return Verdict(
        tuple(one for one in all if one.problem and (one.suite, one.check) not in known),
        tuple(one for one in all if not one.problem and (one.suite, one.check) in known),
        tuple(one for one in known if one[0] in suites and one not in ran),
    )
