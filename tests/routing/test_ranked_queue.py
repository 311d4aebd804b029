"""Bulk requests leave the queue while no other waits, and give way when it is full."""

from balancer.routing.ranked_queue import Bulk, RankedQueue


def filled(**lines: int) -> RankedQueue[str]:
    """Lines by key, with that many entries each; a key that begins with `bulk` is one."""
    queue = RankedQueue[str]()
    for key, count in lines.items():
        for number in range(count):
            queue.push(f"{key}{number}", Bulk(key) if key.startswith("bulk") else key)
    return queue


def order(queue: RankedQueue[str]) -> list[str]:
    left = []
    while (entry := queue.first()) is not None:
        queue.take(entry)
        left.append(entry)
    assert queue.size == 0
    return left


def test_bulk_leaves_after_all_others_and_in_turn() -> None:
    assert order(filled(bulka=2, bulkb=1, a=2, b=1)) == ["a0", "b0", "a1", "bulka0", "bulkb0", "bulka1"]


def test_bulk_alone_is_served_at_once() -> None:
    queue = filled(bulk=3)
    assert queue.first() == "bulk0"
    queue.push("a0", "a")
    assert queue.first() == "a0", "but goes behind whoever comes"


def test_positions_count_those_that_leave_before() -> None:
    queue = filled(bulka=3, a=2)
    assert queue.position("new") == 2
    assert queue.position(Bulk("new")) == 2 + 2
    assert (queue.depth("a"), queue.depth("bulka"), queue.size) == (2, 3, 5)
    assert sorted(queue) == ["a0", "a1", "bulka0", "bulka1", "bulka2"]


def test_when_it_is_full_bulk_gives_way_first() -> None:
    queue = filled(bulka=2, a=3)
    assert queue.give_way("b") == "bulka1"
    assert queue.give_way(None) == "bulka0", "to one that had a turn before, too"
    assert queue.give_way(Bulk("bulkb")) is None, "bulk pushes nobody else out"
    assert queue.give_way("b") == "a2", "then the longest line does"
    assert queue.give_way(Bulk("c")) is None


def test_one_that_had_a_turn_goes_first_whosever_it_is() -> None:
    queue = filled(bulk=1, a=1)
    queue.push_again("again", 1.0)
    assert queue.again() == ["again"]
    queue.remove("again")
    queue.remove("bulk0")
    queue.remove("nobody")
    assert order(queue) == ["a0"]
