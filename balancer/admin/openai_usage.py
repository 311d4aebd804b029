"""What was used, in the shape of OpenAI's usage API: pages of buckets of time, each with its sums. Pure."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from balancer.errors import ConfigError

WIDTHS = {"1d": ("day", 86400), "1h": ("hour", 3600)}  # ours for each of OpenAI's, and its seconds
GROUPS = {"model": "model", "api_key_id": "key"}
# Buckets in a page: by default, and at most; OpenAI's own.
PAGES = {"1d": (7, 31), "1h": (24, 168)}
EPOCH = "1970-01-01T00:00Z"


@dataclass(frozen=True, slots=True)
class Asked:
    """What one request wants: from `start` to `end` (seconds since 1970), whole buckets, in groups of those names."""

    start: int
    end: int
    width: str
    groups: tuple[str, ...]
    limit: int

    @classmethod
    def of(
        cls, start: int, end: int, width: str, groups: Iterable[str], limit: int | None, page: str | None
    ) -> "Asked":
        """Raises ConfigError for what cannot be asked."""
        if width not in WIDTHS:
            raise ConfigError(f"bucket_width: there is {' and '.join(WIDTHS)}")
        named = tuple(dict.fromkeys(name for text in groups for name in text.split(",") if name))
        if unknown := [name for name in named if name not in GROUPS]:
            raise ConfigError(f"group_by: there is {' and '.join(GROUPS)}, not {unknown[0][:40]!r}")
        if page is not None and not (page.isdecimal() and len(page) < 12):
            raise ConfigError("page: give the next_page of the page before")
        usual, most = PAGES[width]
        seconds = WIDTHS[width][1]
        first = int(page) if page is not None else start
        return cls(first // seconds * seconds, end, width, named, min(limit or usual, most))

    @property
    def by(self) -> tuple[str, ...]:
        """What our own figures are to be summed by."""
        return (WIDTHS[self.width][0], *(GROUPS[name] for name in self.groups))

    @property
    def until(self) -> int:
        """The end of the page, and of its last bucket, in seconds since 1970."""
        seconds = WIDTHS[self.width][1]
        buckets = min(math.ceil((self.end - self.start) / seconds), self.limit)
        return self.start + buckets * seconds


def page(rows: Iterable[Mapping[str, Any]], asked: Asked) -> dict[str, Any]:
    """One page of `rows`, which are summed by `asked.by`. Buckets without use are empty, as OpenAI's are."""
    name, seconds = WIDTHS[asked.width]
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        begin = int(datetime.fromisoformat(row[name] + EPOCH[len(row[name]) :]).timestamp())
        found.setdefault(begin, []).append(_result(row, asked.groups))
    buckets = [
        {"object": "bucket", "start_time": begin, "end_time": begin + seconds, "results": found.get(begin, [])}
        for begin in range(asked.start, asked.until, seconds)
    ]
    has_more = asked.until < asked.end
    next_page = str(asked.until) if has_more else None
    return {"object": "page", "data": buckets, "has_more": has_more, "next_page": next_page}


def _result(row: Mapping[str, Any], groups: tuple[str, ...]) -> dict[str, Any]:
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": row["prompt_tokens"],
        "output_tokens": row["completion_tokens"],
        "input_cached_tokens": row["cached_tokens"],
        "num_model_requests": row["requests"],
        "model": row["model"] if "model" in groups else None,
        "api_key_id": row["key"] if "api_key_id" in groups else None,
        "project_id": None,
        "user_id": None,
        "batch": None,
    }
