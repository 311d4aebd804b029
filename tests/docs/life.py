"""A request's life, with all the points where it may end or go to another replica: as the relay's own table has it."""

from balancer import errors
from balancer.errors import ServeError
from balancer.fleet.outcome import Outcome
from balancer.relay.failover import BROKEN_OFF, PERHAPS_TAKEN, UNTAKEN, final_error
from balancer.spec.settings import Settings
from tests.docs.svg import Picture

SETTINGS = Settings()
LEFT, WIDE, HIGH, STEP, TOP = 132, 236, 46, 74, 62
# How an answer can end that has begun.
BEGUN = (Outcome.BROKEN, Outcome.STALLED, Outcome.STUCK, Outcome.AWAY)
# What an outcome is called on the picture.
CALLED = {
    Outcome.REFUSED: "nothing listens there",
    Outcome.UNREACHED: f"no connection in {SETTINGS.connect_timeout:g} s",
    Outcome.UNKNOWN: "its name leads nowhere",
    Outcome.BUSY: "it says 503: full",
    Outcome.LOST: "it died before the first byte",
    Outcome.SILENT: f"silent for {SETTINGS.first_byte_timeout:g} s",
    Outcome.MANGLED: "its answer is not HTTP",
    Outcome.BROKEN: "it died amid the answer",
    Outcome.STALLED: f"no sign of life for {SETTINGS.idle_timeout:g} s",
    Outcome.AWAY: f"no turn on its GPU for {SETTINGS.start_wait:g} s",
    Outcome.STUCK: f"alive, yet silent for {SETTINGS.first_byte_timeout:g} s",
}
STAGES: tuple[tuple[str, str, tuple[ServeError | Outcome, ...]], ...] = (
    (
        "the head arrives",
        "path, key and limits are checked",
        (
            errors.bad_request(""),
            errors.unauthorized(),
            errors.foreign_page(""),
            errors.not_found(""),
            errors.head_too_large(1),
        ),
    ),
    (
        "the body arrives",
        "kept until a replica has it",
        (errors.request_timeout("", 1), errors.body_too_large(1), errors.buffers_full()),
    ),
    (
        "it waits for a place",
        "only where all replicas are full",
        (errors.queue_full(1, 1), errors.queue_timeout(1, 1), errors.no_replica()),
    ),
    ("the policy chooses", "a place at that replica is taken", ()),
    ("a connection", "an idle one, or a new one", (Outcome.REFUSED, Outcome.UNREACHED, Outcome.UNKNOWN)),
    (
        "the request is sent",
        "and the first byte awaited",
        (Outcome.BUSY, Outcome.LOST, Outcome.SILENT, Outcome.MANGLED),
    ),
    ("the answer is relayed", "each event as it comes", BEGUN),
    ("its end", "the place is given back", ()),
)


def goes_on(outcome: Outcome) -> str:
    """Who of those it happens to may go to another replica."""
    if outcome in BROKEN_OFF:
        return "a stream continues elsewhere"
    return "goes elsewhere" if outcome in UNTAKEN else "goes elsewhere once" if outcome in PERHAPS_TAKEN else ""


def picture() -> str:
    drawn = {end for _, _, ends in STAGES for end in ends if isinstance(end, Outcome)}
    if missing := set(Outcome) - drawn - {Outcome.ANSWERED}:
        raise ValueError(f"tests/docs/life.py does not draw {missing}")
    p = Picture(
        990,
        TOP + STEP * len(STAGES) + 26,
        "The life of a request",
        "From its head to the end of its answer. A request that no replica has seen goes to another replica; one that "
        "a replica may have seen is sent once more if that does no harm, and a broken stream continues at another one. "
        "Where neither can be, the client gets an error, or an error event.",
    )
    p.text(22, 38, "The life of a request", "h")
    for number, (name, says, ends) in enumerate(STAGES):
        top = TOP + STEP * number
        if number:
            p.arrow(((LEFT + WIDE / 2, top - STEP + HIGH), (LEFT + WIDE / 2, top)), "path")
        p.box(LEFT, top, WIDE, HIGH, (name, says), "mine" if number in (3, len(STAGES) - 1) else "card")
        if ends:
            p.arrow(((LEFT + WIDE, top + HIGH / 2), (LEFT + WIDE + 34, top + HIGH / 2)), "fail")
        pitch = 17
        first = top + HIGH / 2 + 4 - pitch * (len(ends) - 1) / 2
        for line, end in enumerate(ends):
            y = first + pitch * line
            if isinstance(end, ServeError):
                p.text(LEFT + WIDE + 46, y, f"{end.status} {end.code}", "c r")
                continue
            p.text(LEFT + WIDE + 46, y, CALLED[end], "s")
            p.text(LEFT + WIDE + 232, y, goes_on(end), "s a")
            error = final_error(end, SETTINGS, 1)
            is_begun = end in BEGUN
            words = f"error event {error.code}" if is_begun else f"{error.status} {error.code}"
            p.text(LEFT + WIDE + 430, y, words, "c r")
    waiting, connecting, sending = (TOP + STEP * n + HIGH / 2 for n in (2, 4, 5))
    p.arrow(((LEFT, sending), (84, sending), (84, waiting), (LEFT, waiting)), "path")
    p.arrow(((LEFT, connecting), (84, connecting), (84, waiting), (LEFT, waiting)), "path")
    for number, word in enumerate(("to a", "replica", "not tried", "yet")):
        p.text(76, (waiting + sending) / 2 - 20 + 15 * number, word, "s e")
    p.text(LEFT + WIDE + 430, TOP + STEP * 4 - 18, "if nothing is left:", "s")
    p.text(LEFT + WIDE + 46, TOP + STEP * 7 + 20, "A client that leaves ends it at any point,", "s")
    p.text(LEFT + WIDE + 46, TOP + STEP * 7 + 36, "and frees the replica at once.", "s")
    return p.document()
