"""Which of a machine's GPUs a replica should get. Pure, so that a lease and a preview choose the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from replica.gpu import Gpu
from replica.kinds import is_of_kind

# If a model's memory is unknown, a GPU counts as free when this share of its memory is.
_FREE_SHARE = 0.8


@dataclass(frozen=True)
class Want:
    """The GPUs that a replica needs.

    kinds: SkyPilot's names, such as L4 or A100-80GB; empty: any. gib: memory in GiB that serving takes on each GPU;
    0: unknown.
    """

    count: int
    kinds: tuple[str, ...] = ()
    gib: float = 0.0

    def is_met_by(self, gpu: Gpu) -> bool:
        """Is it of a wanted kind?"""
        return not self.kinds or any(is_of_kind(gpu.name, kind, gpu.memory_total) for kind in self.kinds)


def usable(gpus: Sequence[Gpu], want: Want) -> list[Gpu]:
    """The GPUs that may be leased: not partitioned, not failed, and of a wanted kind if the machine has any of it."""
    well = [gpu for gpu in gpus if not gpu.mig and not gpu.problem]
    return [gpu for gpu in well if want.is_met_by(gpu)] or well


def groups(gpus: Sequence[Gpu], want: Want) -> list[list[Gpu]]:
    """The groups that may be leased: neighbouring GPUs, or any GPUs if failed ones break up every such group."""
    whole = [gpu for gpu in gpus if not gpu.mig]
    may = usable(gpus, want)
    aligned = [group for group in _chunks(whole, want.count) if all(gpu in may for gpu in group)]
    return aligned or _chunks(may, want.count)


def best_first(groups: Sequence[list[Gpu]], want: Want, failed_at: Mapping[Gpu, float]) -> list[list[Gpu]]:
    """Sorted: of one kind first, then with enough free memory, then without a recent failed start, then by index.

    `failed_at` is the time of the last failed start on each GPU, 0 if there was none.
    """

    def cost(group: list[Gpu]) -> tuple[bool, bool, float, int]:
        is_mixed = len({gpu.name for gpu in group}) > 1
        is_short = any(gpu.memory_free < _need(gpu, want) for gpu in group)
        return is_mixed, is_short, max(failed_at[gpu] for gpu in group), group[0].index

    return sorted(groups, key=cost)


def _need(gpu: Gpu, want: Want) -> float:
    """MiB that should be free on it; 0 if the driver does not report its memory."""
    return min(gpu.memory_total, want.gib * 1024 or _FREE_SHARE * gpu.memory_total)


def _chunks(gpus: Sequence[Gpu], count: int) -> list[list[Gpu]]:
    return [list(gpus[start : start + count]) for start in range(0, len(gpus) - count + 1, count)]
