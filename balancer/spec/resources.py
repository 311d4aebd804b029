"""What one replica requests of the machine: SkyPilot's `resources:` in all its forms."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from balancer.spec.document import Document
from balancer.spec.schema import Resources
from balancer.spec.tree import KeyPath

# The name of a GPU type, or how much memory any type has to have, as in "24GB+" and "nvidia:80GB".
_KIND = re.compile(r"[a-z0-9](?:[\w. -]*\w)?|(?:\w+:)?[0-9]+[gt]b?\+?", re.IGNORECASE)

_Read = Callable[[KeyPath, Resources, Document], float | None]


@dataclass(frozen=True, slots=True)
class Needs:
    """The requests of all alternatives in `resources:` together."""

    # Acceptable GPU types, each with how many GPUs of it one replica takes; empty: no GPU requested.
    accelerators: Mapping[str, int]
    # GB of 1024 MB, and cores; None: the file does not say.
    memory: float | None
    cpus: float | None
    # The port that the file expects a replica to listen on.
    port: int | None
    # For people: requests that could not be checked.
    warnings: tuple[str, ...]


def needs(top: Resources, port: int | None, document: Document) -> Needs:
    """`port` is the port that the file gives elsewhere; `ports` may then list others as well.

    Raises ConfigError, with the line, for an invalid amount.
    """
    alternatives = _alternatives(top, document)
    accelerators: dict[str, int] = {}
    for under, each in alternatives:
        accelerators |= _accelerators(under, each.accelerators, document)
    if port is None:
        port = next(filter(None, (_port(under, each.ports, document) for under, each in alternatives)), None)
    return Needs(
        accelerators=MappingProxyType(accelerators),
        memory=_minimum(alternatives, _memory, document),
        cpus=_minimum(alternatives, _cpus, document),
        port=port,
        warnings=tuple(_unclear(alternatives, document)),
    )


def _accelerators(under: KeyPath, value: Any, document: Document) -> dict[str, int]:
    """From any of SkyServe's forms: "L4", "L4:2", {L4: 2, A10G: 1}, ["L4:1", "A100:1"], "24GB+:1"."""
    path: KeyPath = (*under, "accelerators")
    if value is None:
        return {}
    items = [value] if isinstance(value, str) else value
    if isinstance(items, dict):
        items = [key if count is None else f"{key}:{count}" for key, count in items.items()]
    if not isinstance(items, list | set) or not all(isinstance(item, str) and item.strip() for item in items):
        raise document.fault(path, "should be like 'L4:1' or {L4: 1, A100: 1}")
    found: dict[str, int] = {}
    for item in items:
        parts = re.fullmatch(r"(.+?)(?::([^:]*[^:+Bb]))?", item.strip())
        kind, count = (parts[1], parts[2]) if parts else (item, None)
        if not re.fullmatch(r"[1-9][0-9]{0,3}(\.0+)?", count or "1"):
            raise document.fault(path, f"asks for {count} of {kind}: a replica takes whole GPUs")
        if not _KIND.fullmatch(kind):
            raise document.fault(path, f"has {item!r}: write a type and how many, like 'L4:1', or {{L4: 1, A100: 1}}")
        found[kind] = int(float(count or "1"))
    return found


def _alternatives(top: Resources, document: Document) -> list[tuple[KeyPath, Resources]]:
    """`resources:` itself and each of its any_of: and ordered:, with their places in the file."""
    found: list[tuple[KeyPath, Resources]] = [(("resources",), top)]
    for key, alternatives in (("any_of", top.any_of), ("ordered", top.ordered)):
        for index, each in enumerate(alternatives):
            if each.any_of or each.ordered:
                raise document.fault(("resources", key, index), "has alternatives of its own: list them side by side")
            found.append((("resources", key, index), each))
    return found


def _minimum(alternatives: list[tuple[KeyPath, Resources]], read: _Read, document: Document) -> float | None:
    """The lowest amount among the alternatives; an alternative without one takes it from `resources:` itself."""
    top, *others = (read(under, each, document) for under, each in alternatives)
    amounts = [top if amount is None else amount for amount in others] or [top]
    return min((amount for amount in amounts if amount is not None), default=None) if None not in amounts else None


def _cpus(under: KeyPath, resources: Resources, document: Document) -> float | None:
    if resources.cpus is None:
        return None
    if (cores := _positive(str(resources.cpus).removesuffix("+"))) is None:
        raise document.fault((*under, "cpus"), f"should be a number, or like '4+' (it is {resources.cpus!r})")
    return cores


def _memory(under: KeyPath, resources: Resources, document: Document) -> float | None:
    """GB, from any of SkyPilot's forms: 16, "16+", "16GB", "512MB+", "16Gi"; "4x" means 4 GB for each of `cpus`."""
    if resources.memory is None:
        return None
    text = str(resources.memory).strip().lower()
    if text.endswith("x") and (each := _positive(text[:-1])) is not None:
        cores = _cpus(under, resources, document)
        return None if cores is None else each * cores
    parts = re.fullmatch(r"(.+?)(?:([kmgtp])(?:b|i|ib))?\+?", text)
    if parts is None or (size := _positive(parts[1])) is None:
        what = "should be a number, or like '4+', '16GB' or '512MB'"
        raise document.fault((*under, "memory"), f"{what} (it is {resources.memory!r})")
    return size * 1024.0 ** ("kmgtp".index(parts[2]) - 2) if parts[2] else size


def _unclear(alternatives: list[tuple[KeyPath, Resources]], document: Document) -> Iterator[str]:
    """A warning for each amount that is too vague to be checked."""
    for under, each in alternatives:
        if str(each.memory).endswith("x") and each.cpus is None:
            yield document.remark((*under, "memory"), "is per core, but cpus is not given, so it is not checked")


def _positive(text: str) -> float | None:
    """The positive finite number in `text`, else None."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 < number < math.inf else None


def _port(under: KeyPath, value: Any, document: Document) -> int | None:
    """SkyServe takes one port per service, in any of these forms: 8000, "8000", [8000]."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not values:
        return None
    if len(values) > 1 or not re.fullmatch("[0-9]{1,5}", str(values[0])) or not 1 <= int(values[0]) <= 65535:
        raise document.fault((*under, "ports"), "should be the one port that a replica listens on, like 8000")
    return int(values[0])
