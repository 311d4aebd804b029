"""What the fair queue promises, whatever comes and goes: nothing is lost, nobody is starved, all get their share."""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from balancer.routing.fair_queue import FairQueue

Entry = tuple[Hashable, int]  # whose it is, and the how manieth

KEYS = st.sampled_from("abcdef")
SHARES = st.sampled_from([0.25, 0.5, 0.7, 1.0, 1.0, 1.5, 3.0])


def taken(queue: FairQueue[Entry]) -> Entry:
    entry = queue.first()
    assert entry is not None
    queue.take(entry)
    return entry


class Machine(RuleBasedStateMachine):
    """The queue beside plain lists."""

    @initialize(shares=st.fixed_dictionaries(dict.fromkeys("abcdef", SHARES)))
    def begin(self, shares: dict[str, float]) -> None:
        self.queue: FairQueue[Entry] = FairQueue()
        self.shares = shares
        self.lines: defaultdict[Hashable, list[Entry]] = defaultdict(list)
        self.again: list[tuple[float, int, Entry]] = []
        self.made = 0

    def made_for(self, key: str) -> Entry:
        self.made += 1
        return key, self.made

    def round_of(self, key: str, place: int) -> int:
        return math.floor((place - 1) / self.shares[key])

    @rule(key=KEYS)
    def push(self, key: str) -> None:
        entry = self.made_for(key)
        self.queue.push(entry, key, self.shares[key])
        self.lines[key].append(entry)

    @rule(key=KEYS, arrived=st.floats(0, 9))
    def push_again(self, key: str, arrived: float) -> None:
        entry = self.made_for(key)
        self.queue.push_again(entry, arrived)
        self.again.append((arrived, self.made, entry))

    @precondition(lambda self: any(self.lines.values()))
    @rule()
    def take_in_turn(self) -> None:
        first = self.queue.first()
        assert first == self.queue.first(), "to look at it changes nothing"
        key, _ = taken(self.queue)
        assert first == self.lines[key].pop(0), "in a key, who came first goes first"

    @precondition(lambda self: self.again)
    @rule()
    def take_again(self) -> None:
        entry = self.queue.again()[0]
        self.queue.take(entry)
        assert entry == min(self.again)[2]
        self.again.remove(min(self.again))

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        waiting = [entry for line in self.lines.values() for entry in line] + [entry for _, _, entry in self.again]
        entry = data.draw(st.sampled_from(waiting)) if waiting else ("nobody", 0)
        self.queue.remove(entry)
        self.queue.remove(entry)
        for line in self.lines.values():
            line[:] = [other for other in line if other != entry]
        self.again = [again for again in self.again if again[2] != entry]

    @rule(key=st.one_of(KEYS, st.none()))
    def give_way(self, key: str | None) -> None:
        rounds = {k: self.round_of(k, len(line)) for k, line in self.lines.items() if line}
        given = self.queue.give_way(key, self.shares[key] if key else 1.0)
        most = max(rounds.values(), default=-1)
        if (key is not None and most <= self.round_of(key, len(self.lines[key]) + 1)) or most < 0:
            assert given is None, "nobody has more than that one would"
        else:
            assert given is not None
            assert rounds[str(given[0])] == most
            assert given == self.lines[given[0]].pop(), "the place that would have been served last"

    @invariant()
    def nothing_is_lost(self) -> None:
        waiting = [entry for line in self.lines.values() for entry in line] + [entry for _, _, entry in self.again]
        assert sorted(self.queue, key=str) == sorted(waiting, key=str)
        assert self.queue.size == len(waiting)
        assert (self.queue.first() is None) == (not any(self.lines.values())), "who waits has his turn"
        assert self.queue.again() == [entry for _, _, entry in sorted(self.again)]
        assert all(self.queue.depth(key) == len(line) for key, line in self.lines.items())

    @invariant()
    def nothing_is_kept_of_those_who_left(self) -> None:
        queue = self.queue
        assert len(queue._lines) == sum(map(bool, self.lines.values()))
        assert sum(queue._rounds) == sum(map(len, self.lines.values()))
        assert sorted(map(id, (line for ends in queue._ends for line in ends))) == sorted(
            map(id, queue._lines.values())
        )


TestFairQueue = Machine.TestCase
TestFairQueue.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


@settings(deadline=None)
@given(
    shares=st.lists(SHARES, min_size=2, max_size=6),
    before=st.integers(0, 40),
    during=st.integers(1, 200),
)
def test_who_all_wait_are_served_in_proportion_to_their_shares(shares: list[float], before: int, during: int) -> None:
    """Over any stretch: by no more than a turn, and what one request is for each."""
    queue: FairQueue[Entry] = FairQueue()
    for number in range(300):
        for key, share in enumerate(shares):
            queue.push((key, number), key, share)
    for _ in range(before):
        taken(queue)
    served = Counter(taken(queue)[0] for _ in range(during))
    for one, its in enumerate(shares):
        for other, others in enumerate(shares):
            assert abs(served[one] / its - served[other] / others) <= 1 + 1 / its + 1 / others


@settings(deadline=None)
@given(
    waiting=st.lists(st.tuples(KEYS, st.booleans()), max_size=60),
    shares=st.one_of(st.fixed_dictionaries(dict.fromkeys("abcdef", SHARES)), st.just(dict.fromkeys("abcdef", 1.0))),
    key=KEYS,
)
def test_nobody_waits_for_more_than_he_was_told(
    waiting: list[tuple[str, bool]], shares: dict[str, float], key: str
) -> None:
    queue: FairQueue[Entry] = FairQueue()
    for number, (whose, takes) in enumerate(waiting):
        queue.push((whose, number), whose, shares[whose])
        if takes:
            taken(queue)
    said = queue.position(key, shares[key])
    own = (key, -1)
    queue.push(own, key, shares[key])
    order = [taken(queue) for _ in range(queue.size)]
    assert order.index(own) + 1 <= said
    if set(shares.values()) == {1.0}:
        assert said <= order.index(own) + len(shares), "nor for much less: by a turn of the others at most"


@settings(deadline=None)
@given(keys=st.integers(1, 30), hog=st.integers(2, 1000))
def test_one_turn_of_the_others(keys: int, hog: int) -> None:
    """A request waits for one turn of each other key, however many requests these have."""
    queue: FairQueue[Entry] = FairQueue()
    for number in range(hog):
        for key in range(keys):
            queue.push((key, number), key)
    queue.push(("one", 0), "one")
    assert queue.position("two") == keys + 2
    assert next(n for n in range(1, queue.size + 1) if taken(queue)[0] == "one") <= keys + 1


@settings(deadline=None)
@given(keys=st.integers(0, 30), share=SHARES)
def test_new_keys_delay_nobody_for_ever(keys: int, share: float) -> None:
    """A key that had a turn gets its next one although new keys never end.

    With each place that is given another key comes: they go behind whom they find.
    """
    queue: FairQueue[Entry] = FairQueue()
    for key in range(keys):
        queue.push((key, 0), key)
    for number in range(2):
        queue.push(("one", number), "one", share)
    rounds = math.ceil(1 / share) + 1
    served = 0
    for step in range((keys + 1) * 2**rounds):
        queue.push((f"new {step}", 0), f"new {step}")
        served += taken(queue)[0] == "one"
    assert served == 2


def test_key_that_fills_the_queue() -> None:
    """A single key may fill the queue, and gives way to others place by place."""
    queue: FairQueue[Entry] = FairQueue()
    for number in range(10):
        queue.push(("hog", number), "hog")
    assert queue.give_way("hog") is None, "to itself it gives nothing"
    for number in range(5):
        assert queue.give_way("other") == ("hog", 9 - number)
        queue.push(("other", number), "other")
    assert queue.give_way("other") is None, "who has as much has his share"
    assert queue.give_way("third") in (("hog", 4), ("other", 4))
    assert queue.give_way(None) is not None, "who had his turn before is let in by whoever has most"
