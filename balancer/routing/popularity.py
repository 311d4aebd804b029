"""How often prefixes are used, and how much each member's cache is worth: the cost of a copy depends on both."""

from collections.abc import Sequence

from balancer.fleet.member import Member

# Uses are counted over one to two periods. In a period, this many times as much prompt arrives as all pools hold, so
# that what fits the pools is used a few times.
TURNOVERS = 4
# The maximum number of blocks counted in a period, 12 MB of memory; if there are more, the period is over.
MOST_COUNTED = 131_072
# A prefix used this many times as often as what its copy would push out pays the full price for the copy; one that is
# used more pays less. With 1, chat on eight replicas does a hundredth less; with 4 nothing changes.
LASTING = 2.0
_FIRST_MARK = 4


class Popularity:
    """Counts uses of prefixes in blocks of prompt; old uses drop out.

    A prefix is counted at its 4th, 16th, 64th, ... block and at its last one; the blocks between count as the next of
    these does.
    """

    def __init__(self) -> None:
        self._uses: dict[int, int] = {}
        self._uses_before: dict[int, int] = {}
        self.worth: dict[Member, float] = {}  # how often a block of its cache was used, on average
        self._worth_now: dict[Member, float] = {}  # the part of it from this period
        self._seen = 0  # blocks of prompt in this period
        self.period = 0.0  # blocks of prompt that end it

    def note(self, member: Member, blocks: Sequence[int], matched: int, deepest: int, capacity: int) -> bool:
        """A prompt goes to `member`, which has `matched` blocks of it in a pool for `capacity` blocks.

        `deepest` is the longest match at any member. Returns True when a period is over: then call `begin`.
        """
        uses, mark = self._uses, _FIRST_MARK
        while mark < deepest:
            block = blocks[mark - 1]
            uses[block] = uses.get(block, 0) + 1
            mark *= _FIRST_MARK
        if deepest:
            block = blocks[deepest - 1]
            uses[block] = uses.get(block, 0) + 1
        if matched:
            share = matched / capacity
            self.worth[member] = self.worth.get(member, 0.0) + share
            self._worth_now[member] = self._worth_now.get(member, 0.0) + share
        self._seen += len(blocks)
        return self._seen > self.period or len(uses) > MOST_COUNTED

    def begin(self, pools: int) -> None:
        """Begins a new period, unless the pools have grown meanwhile; `pools` is how many blocks all of them hold."""
        self.period = TURNOVERS * float(pools)
        if self._seen > self.period or len(self._uses) > MOST_COUNTED:
            self._uses_before, self._uses = self._uses, {}
            self.worth, self._worth_now = self._worth_now, {}
            self._seen = 0

    def price(self, member: Member, rarity: float) -> float:
        """What it costs to copy blocks of this `rarity` to a member, from 0 to 1.

        1 if they are used about as often as what they would push out, and next to nothing if they are used much more.
        """
        price = LASTING * rarity * (1.0 + self.worth.get(member, 0.0))
        return price if price < 1.0 else 1.0

    def rarity(self, blocks: Sequence[int], begin: int, end: int) -> float:
        """The mean of 1 / (1 + uses) over these blocks, of which there is at least one."""
        uses, before = self._uses, self._uses_before
        total, done, mark = 0.0, begin, _FIRST_MARK
        while done < end:
            mark = min(mark, end)
            if mark > done:
                block = blocks[mark - 1]
                total += (mark - done) / (1 + uses.get(block, 0) + before.get(block, 0))
                done = mark
            mark *= _FIRST_MARK
        return total / (end - begin)

    def forget(self, member: Member) -> None:
        self.worth.pop(member, None)
        self._worth_now.pop(member, None)
