"""Stop strings across the seam: found, and nothing of one passed on."""

from hypothesis import given
from hypothesis import strategies as st

from balancer.relay.continuation.stops import Seam, stop_strings


def through(seam: Seam, pieces: list[str]) -> str:
    return "".join([seam.pass_on(piece) for piece in pieces]) + seam.rest()


def test_across() -> None:
    """A stop string that began before the seam ends the answer."""
    seam = Seam(("STOP",), "that was it. ST")
    assert through(seam, ["O", "P and more"]) == ""
    assert seam.matched == "STOP"


def test_false_start() -> None:
    """What only began like a stop string is passed on late."""
    seam = Seam(("STOP",), "that was it. ST")
    assert [seam.pass_on(piece) for piece in ("O", "UT", " now")] == ["", "OUT", " now"]
    assert seam.matched is None


def test_kept() -> None:
    """A stop string that is to be kept is passed on whole."""
    seam = Seam(("STOP",), "ST", keeps_stop=True)
    assert through(seam, ["OP!"]) == "OP"


def test_held_at_end() -> None:
    """What is held back at the end is passed on."""
    assert through(Seam(("STOP",), "ST"), ["O"]) == "O"


def test_none() -> None:
    """Without stop strings nothing is held back."""
    assert through(Seam((), "ST"), ["OP"]) == "OP"


letters = st.text("ab", max_size=6)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), letters, st.lists(letters, max_size=6))
def test_any(stops: list[str], before: str, pieces: list[str]) -> None:
    """Of any texts and stop strings, the answer ends exactly where one stands across the seam."""
    seam = Seam(tuple(stops), before)
    got, after = through(seam, pieces), "".join(pieces)
    whole = before + after
    across = any(
        whole.startswith(stop, at) and at + len(stop) > len(before) for stop in stops for at in range(len(before))
    )
    assert (seam.matched is not None) == across
    assert got == ("" if across else after)


def test_stop_strings() -> None:
    """A request has one stop string, or a list."""
    assert stop_strings("a") == ("a",)
    assert stop_strings(["a", "", 7, "b"]) == ("a", "b")
    assert stop_strings(None) == ()
