"""replica/sharing.py and nvml.py: how SGLang is told its share of the card."""

import pytest

from replica.nvml import free_memory
from replica.sharing import ShareError, obstacle, share_gib, with_share

CARD = 80 * 1024


@pytest.mark.parametrize("said", [["--mem-fraction-static", "0.5"], ["--mem-fraction-static=0.5"]])
def test_a_share_of_the_card_becomes_one_of_what_is_free(said: list[str]) -> None:
    made = with_share([*said, "--x", "y"], CARD, CARD // 2 + 8 * 1024 + 512)
    assert made == ["--x", "y", "--mem-fraction-static", "0.833"]
    assert with_share(said, CARD, CARD + 512)[-1] == "0.500"  # nobody else is there
    assert share_gib(said, CARD) == 40


def test_the_last_of_several_counts_as_it_does_for_sglang() -> None:
    flags = ["--mem-fraction-static", "0.9", "--mem-fraction-static", "0.25"]
    assert with_share(flags, CARD, CARD + 512) == ["--mem-fraction-static", "0.250"]


@pytest.mark.parametrize("flags", [[], ["--mem-fraction-static", "most"], ["--mem-fraction-static", "1.5"]])
def test_a_replica_that_does_not_say_its_share_is_told_how(flags: list[str]) -> None:
    with pytest.raises(ShareError, match="has to say how much of it is its own"):
        with_share(flags, CARD, CARD)


def test_a_share_that_is_not_free_is_refused_with_the_numbers() -> None:
    with pytest.raises(ShareError, match=r"0\.6 is 48\.0 of the card's 80\.0 GiB, and 40\.0 GiB are free"):
        with_share(["--mem-fraction-static", "0.6"], CARD, 40 * 1024)
    with pytest.raises(ShareError, match="does not say how much memory"):
        with_share(["--mem-fraction-static", "0.6"], 0, 0)


@pytest.mark.parametrize(
    ("flags", "is_one"),
    [
        (["--dp-size", "2"], True),
        (["--dp-size=1", "--pp", "1"], False),
        (["--speculative-algorithm", "EAGLE"], True),
        (["--enable-hierarchical-cache"], True),
        (["--disaggregation-mode", "null", "--weight-cache-mode=off"], False),
        (["--model-path", "--enable-loran"], False),
    ],
)
def test_untried_flags(flags: list[str], is_one: bool) -> None:
    """Parts of sglang that were not tried with turns stand in the way."""
    assert bool(obstacle(flags)) is is_one


def test_without_a_driver_nobody_knows_how_much_is_free() -> None:
    assert free_memory("GPU-none") is None
