"""How much of a GPU each of the services that share it may use, so that all of them fit. Pure.

The services take turns, and the weights of all of them stay on the card. What is left is the KV cache of the service
whose turn it is, so its size is the same for all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from balancer.operate.columns import aligned

# GiB that a replica's process takes on each GPU besides weights and KV cache, asleep or awake; measured 1.7.
CONTEXT = 2.0
# GiB of working memory for the service whose turn it is, and GiB that the driver reserves on each card.
WORK = 2.0
_DRIVER = 0.6
# A KV cache smaller than this, in GiB, is of no use.
LEAST_POOL = 1.0
_ROUNDED = 0.1  # GiB by which a share that is in force may exceed what is left for it


@dataclass(frozen=True, slots=True)
class Share:
    """What a service needs on each GPU: GiB of weights (None if unknown), KV cache bytes per token (0 if unknown).

    `given`: the share of the card that it has already, for weights and KV cache; 0 if it is yet to get one. `model`:
    what to pull if its weights are not here; empty if it cannot be pulled. `problem`: what else keeps them unknown.
    """

    name: str
    weights: float | None
    kv: int = 0
    given: float = 0.0
    model: str = ""
    problem: str = ""

    def pool(self, card: float) -> float:
        """GiB of KV cache that it has already."""
        return self.given * card - (self.weights or 0.0)


@dataclass(frozen=True, slots=True)
class Row:
    """What a service gets: GiB of KV cache, and its --mem-fraction-static. `problem` says why it does not fit."""

    name: str
    weights: float | None
    pool: float = 0.0
    fraction: float = 0.0
    tokens: int = 0
    problem: str = ""


def plan(card: float, shares: Sequence[Share]) -> list[Row]:
    """A row for each service on a shared GPU of `card` GiB. Earlier services get their place first.

    Of one that has its share already, and whose weights are unknown, all of the share may be weights.
    """
    shares = [replace(s, weights=s.given * card) if s.weights is None and s.given else s for s in shares]
    usable = card - _DRIVER - WORK
    there: list[Share] = []
    rows: dict[str, Row] = {}
    for share in shares:
        if share.weights is None:
            fetch = f"groundserve pull {share.model}, or " if share.model else ""
            said = f"nobody knows how large its weights are: {fetch}say --mem-fraction-static in its file"
            rows[share.name] = Row(share.name, None, problem=share.problem or said)
            continue
        left = usable - _resident([*there, share])
        if left >= LEAST_POOL:
            there.append(share)
            continue
        takes = share.weights + CONTEXT + LEAST_POOL
        beside = f" beside {', '.join(other.name for other in there)}" if there else ""
        said = f"it takes {takes:.1f} GiB at the least, and {usable - _resident(there):.1f} GiB are left{beside}"
        rows[share.name] = Row(share.name, share.weights, problem=said)
    pool = usable - _resident(there)
    too_large = [share for share in there if share.given and share.pool(card) > pool + _ROUNDED]
    for share in there:
        assert share.weights is not None
        if share.given:
            rows[share.name] = Row(share.name, share.weights, share.pool(card), share.given)
            continue
        if too_large:
            has = ", ".join(f"{one.name} has {one.pool(card):.1f}" for one in too_large)
            said = f"{max(pool, 0.0):.1f} GiB would be left for each KV cache, and {has}"
            rows[share.name] = Row(share.name, share.weights, problem=said)
            continue
        tokens = int(pool * 2**30 / share.kv) if share.kv else 0
        # Rounded down, because any excess would be another service's memory.
        fraction = int((share.weights + pool) / card * 1000) / 1000
        rows[share.name] = Row(share.name, share.weights, pool, fraction, tokens)
    return [rows[share.name] for share in shares]


def _resident(shares: Sequence[Share]) -> float:
    return sum((share.weights or 0.0) + CONTEXT for share in shares)


def shown(card: str, rows: Sequence[Row]) -> list[str]:
    """The plan as a table, and a line for each service that does not fit."""
    lines = [f"{card}, shared by turns:"]
    head = ("SERVICE", "WEIGHTS", "KV CACHE", "--mem-fraction-static")
    cells: list[tuple[str, ...]] = []
    for row in rows:
        weights = "?" if row.weights is None else f"{row.weights:.1f} GiB"
        if row.problem:
            cells.append((row.name, weights, "-", "?" if row.weights is None else "does not fit"))
        else:
            tokens = f" ({row.tokens:,} tokens)" if row.tokens else ""
            cells.append((row.name, weights, f"{row.pool:.1f} GiB{tokens}", f"{row.fraction:.3f}"))
    return [
        *lines,
        *(f"  {line}" for line in aligned(head, cells)),
        *(f"{row.name}: {row.problem}" for row in rows if row.problem),
    ]
