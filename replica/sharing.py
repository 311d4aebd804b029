"""Checks and adapts SGLang's flags for a replica that shares its GPUs. Pure."""

from collections.abc import Sequence

FRACTION = "--mem-fraction-static"
# The variable that tells a replica that shares, after exec, how many bytes of each GPU are its own while it is awake.
SHARE = "REPLICA_SHARE"
_GIB = 1024  # MiB
# MiB that SGLang's process takes of a GPU before it measures how much is free.
_CONTEXT = 512
# Maximum share of the free memory that SGLang may take for weights and KV cache; a forward pass needs the rest.
_MOST = 0.97

# Features of SGLang with memory or processes of their own, with which dozing has not been tried.
_UNTRIED = {
    "LoRA": ("--enable-lora", "--lora-paths"),
    "a cache in host memory": ("--enable-hierarchical-cache", "--enable-lmcache", "--hicache-storage-backend"),
    "speculative decoding": ("--speculative-algorithm", "--speculative-algo", "--speculative-draft-model-path"),
    "data parallel ranks": ("--dp", "--dp-size", "--data-parallel-size", "--enable-dp-attention"),
    "pipeline parallel ranks": ("--pp", "--pp-size", "--pipeline-parallel-size"),
    "several nodes": ("--nnodes",),
    "a prefill or decode part alone": ("--disaggregation-mode",),
    "several tokenizers": ("--tokenizer-worker-num",),
    "weights shared by a daemon": ("--weight-cache-mode",),
    "gRPC": ("--grpc-mode", "--smg-grpc-mode", "--grpc-port"),
}


class ShareError(Exception):
    """The replica cannot share its GPUs like this; the message says why and what to do."""


def obstacle(flags: Sequence[str]) -> str:
    """Why a replica with these flags of SGLang cannot share its GPUs; empty if it can."""
    given = [flag.partition("=")[0] for flag in flags]
    for what, names in _UNTRIED.items():
        for name in names:
            if name in given and _value(flags, name) not in ("1", "off", "null"):
                return f"{name}: {what} and a GPU that is shared have not been tried together"
    return ""


def with_share(flags: Sequence[str], total: int, free: int) -> list[str]:
    """The flags, with --mem-fraction-static converted from a share of the card to one of the memory that is free now.

    SGLang means the latter by it. `total`, `free`: the minimum over its GPUs, in MiB. Raises ShareError if the flag
    gives no valid share of the card, or that share is not free.
    """
    said = _value(flags, FRACTION)
    try:
        share = float(said or "")
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise ShareError(
            f"a replica that shares its GPU has to say how much of it is its own while it is awake, by {FRACTION} (the "
            "share of the card for weights and KV cache): groundserve check A.yaml B.yaml says how much fits"
        )
    if not total:
        raise ShareError("the driver does not say how much memory this GPU has, so that it cannot be shared")
    fraction = share * total / max(1, free - _CONTEXT)
    if fraction > _MOST:
        raise ShareError(
            f"{FRACTION} {said} is {share * total / _GIB:.1f} of the card's {total / _GIB:.1f} GiB, and "
            f"{free / _GIB:.1f} GiB are free: lower it, or let fewer replicas share the GPU"
        )
    return _with_value(flags, FRACTION, f"{fraction:.3f}")


def room_gib(share: float) -> float:
    """GiB that have to be free for SGLang to start with a share of so many GiB; 0 if the share is unknown."""
    return share / _MOST + _CONTEXT / _GIB if share else 0.0


def share_gib(flags: Sequence[str], total: int) -> float:
    """GiB that these flags grant weights and KV cache on a card of `total` MiB; 0 if they do not say."""
    try:
        return float(_value(flags, FRACTION) or "0") * total / _GIB
    except ValueError:
        return 0.0


def _value(flags: Sequence[str], name: str) -> str | None:
    """The flag's value, None if it is not given; if it is given several times, the last one counts."""
    found = None
    for at, flag in enumerate(flags):
        before, has_value, value = flag.partition("=")
        if before == name:
            found = value if has_value else "".join(flags[at + 1 : at + 2])
    return found


def _with_value(flags: Sequence[str], name: str, value: str) -> list[str]:
    made: list[str] = []
    skip = False
    for flag in flags:
        before, has_value, _ = flag.partition("=")
        if before == name:
            skip = not has_value
        elif skip:
            skip = False
        else:
            made.append(flag)
    return [*made, name, value]
