"""Stop strings across the seam: found, and nothing of one passed on."""

from hypothesis import given
from hypothesis import strategies as st

from balancer.relay.continuation.stops import Seam, stop_strings


def through(seam: Seam, pieces: list[str]) -> str:
    return "".join([seam.pass_on(piece) for piece in pieces]) + seam.rest()


def test_one_that_began_before_the_seam_ends_the_answer() -> None:
    seam = Seam(("STOP",), "that was it. ST")
    assert through(seam, ["O", "P and more"]) == ""
    assert seam.matched == "STOP"


def test_what_only_began_like_one_is_passed_on_late() -> None:
    seam = Seam(("STOP",), "that was it. ST")
    assert [seam.pass_on(piece) for piece in ("O", "UT", " now")] == ["", "OUT", " now"]
    assert seam.matched is None


def test_one_that_is_to_be_kept_is_passed_on_whole() -> None:
    seam = Seam(("STOP",), "ST", keeps_stop=True)
    assert through(seam, ["OP!"]) == "OP"


def test_what_is_held_at_the_end_is_passed_on() -> None:
    assert through(Seam(("STOP",), "ST"), ["O"]) == "O"


def test_without_stop_strings_nothing_is_held() -> None:
    assert through(Seam((), "ST"), ["OP"]) == "OP"


letters = st.text("ab", max_size=6)


@given(st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), letters, st.lists(letters, max_size=6))
def test_the_answer_ends_where_one_stands_across_the_seam(stops: list[str], before: str, pieces: list[str]) -> None:
    seam = Seam(tuple(stops), before)
    got, after = through(seam, pieces), "".join(pieces)
    whole = before + after
    across = any(
        whole.startswith(stop, at) and at + len(stop) > len(before) for stop in stops for at in range(len(before))
    )
    assert (seam.matched is not None) == across
    assert got == ("" if across else after)


def test_stop_strings_are_one_or_some() -> None:
    assert stop_strings("a") == ("a",)
    assert stop_strings(["a", "", 7, "b"]) == ("a", "b")
    assert stop_strings(None) == ()
