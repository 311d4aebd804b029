"""What a relay has counted since it last told: taken out of its tallies, and added to the coordinator's."""

from typing import Any

from balancer.observe.tally import Histogram, InterTokenHistogram, MemberTally, Tallies
from balancer.workers.messages import record_fields, record_of

_HISTOGRAMS = ("ttft", "inter_token", "duration", "connect", "misjudged")
_SUMS = ("prompt_tokens", "completion_tokens", "cached_tokens", "predicted_tokens", "whole_tokens")
_TOTALS = ("continued", "bytes_in", "bytes_out", "routed")
_BY_NAME = ("errors", "retries", "not_continued")


def take_out(tallies: Tallies) -> dict[str, Any]:
    """Leaves the tallies empty, and without the replicas' names that had nothing to tell."""
    members = {}
    for name, tally in (*tallies.members.items(), ("", tallies.nobody)):
        if counted := _taken_of_member(tally):
            members[name] = counted
    said: dict[str, Any] = {
        "members": members,
        "keys": [
            [name, dict(key.requests), key.prompt_tokens, key.completion_tokens] for name, key in tallies.keys.items()
        ],
        "recent": [record_fields(record) for record in tallies.recent],
        "queue_wait": _taken(tallies.queue_wait),
        "loop_lag": _taken(tallies.loop_lag),
    }
    for name in _BY_NAME:
        said[name] = dict(getattr(tallies, name))
        getattr(tallies, name).clear()
    for name in _TOTALS:
        said[name] = getattr(tallies, name)
        setattr(tallies, name, 0)
    tallies.keys.clear()
    tallies.recent.clear()
    return said


def add(tallies: Tallies, said: dict[str, Any]) -> None:
    """Adds what another process has taken out of its own."""
    for name, counted in said["members"].items():
        _add_to_member(tallies.members.get(name, tallies.nobody), counted)
    for name, requests, prompt, completion in said["keys"]:
        key = tallies.keys[name]
        for status, count in requests.items():
            key.requests[status] += count
        key.prompt_tokens += prompt
        key.completion_tokens += completion
    tallies.recent.extend(map(record_of, said["recent"]))
    _add(tallies.queue_wait, said["queue_wait"])
    _add(tallies.loop_lag, said["loop_lag"])
    for name in _BY_NAME:
        counts = getattr(tallies, name)
        for code, count in said[name].items():
            counts[code] += count
    for name in _TOTALS:
        setattr(tallies, name, getattr(tallies, name) + said[name])


def _taken_of_member(tally: MemberTally) -> list[Any] | None:
    histograms = [_taken(getattr(tally, name)) for name in _HISTOGRAMS]
    if not any(histograms) and not tally.requests:
        return None
    requests = [[path, status, count] for (path, status), count in tally.requests.items()]
    tally.requests.clear()
    sums = [getattr(tally, name) for name in _SUMS]
    for name in _SUMS:
        setattr(tally, name, 0)
    return [requests, histograms, sums]


def _add_to_member(tally: MemberTally, counted: list[Any]) -> None:
    requests, histograms, sums = counted
    for path, status, count in requests:
        tally.requests[path, status] += count
    for name, values in zip(_HISTOGRAMS, histograms, strict=True):
        _add(getattr(tally, name), values)
    for name, value in zip(_SUMS, sums, strict=True):
        setattr(tally, name, getattr(tally, name) + value)


def _taken(histogram: Histogram) -> list[Any] | None:
    together = 0
    if isinstance(histogram, InterTokenHistogram):
        together, histogram.together = histogram.together, 0
    if not together and not any(histogram.counts):
        return None
    counts, histogram.counts = histogram.counts, [0] * len(histogram.counts)
    total, histogram.total = histogram.total, 0.0
    return [counts, total, together]


def _add(histogram: Histogram, counted: list[Any] | None) -> None:
    if counted is None:
        return
    counts, total, together = counted
    histogram.counts = [a + b for a, b in zip(histogram.counts, counts, strict=True)]
    histogram.total += total
    if isinstance(histogram, InterTokenHistogram):
        histogram.together += together
