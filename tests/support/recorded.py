"""Records of requests that nobody sent."""

from typing import Any

from balancer.observe.record import Record


def recorded(
    method: str = "GET", path: str = "/", received_at: float = 0.0, *, id: str = "an-id", **fields: Any
) -> Record:
    """A request's record, with these of its fields."""
    record = Record(id, method, path, received_at)
    for name, value in fields.items():
        assert hasattr(record, name), name
        setattr(record, name, value)
    return record
