"""Matches GPU names of NVIDIA's driver ("NVIDIA GeForce RTX 4090") against SkyPilot's (RTX4090). Pure."""

import re

# Words of a name that do not distinguish products.
_NOISE = {"NVIDIA", "TESLA", "GEFORCE", "GENERATION", "EDITION", "GPU", "MEGA", "NVLINK"}
# Words that do: with one of them, the same name means another product.
_DISTINCTIVE = {"ADA", "D", "LAPTOP", "MAX", "PRO", "SFF", "SUPER", "TI", "TITAN"}
_SHORT = {
    "WK": "WORKSTATION",
    "SE": "SERVER",
    "SXM2": "SXM",
    "SXM3": "SXM",
    "SXM4": "SXM",
    "SXM5": "SXM",
    "SXM6": "SXM",
}
_SIZE = re.compile(r"(\d+)GB?")
# "24GB+", "nvidia:80GB": any GPU with that much memory.
_ANY_OF_SIZE = re.compile(r"(?:NVIDIA:)?(\d+)(G|T)B?(\+?)", re.IGNORECASE)


def is_of_kind(name: str, kind: str, memory: int = 0) -> bool:
    """Is a GPU what SkyPilot calls `kind`: L4, A100-80GB, RTX6000-Ada, 24GB+?

    `name` is the driver's, `memory` its memory in MiB, 0 if unknown. A kind without a size matches any size; with a
    size, the GPU's name or memory must match it.
    """
    words, sizes = _read(name)
    if any_of_size := _ANY_OF_SIZE.fullmatch(kind.strip()):
        gigabytes = int(any_of_size[1]) * (1024 if any_of_size[2] in "tT" else 1)
        is_more = bool(any_of_size[3]) and (
            memory >= _minimum(gigabytes) or (not memory and max(sizes, default=0) >= gigabytes)
        )
        return is_more or _has(gigabytes, sizes, memory)
    wanted, wanted_sizes = _read(kind)
    if not wanted or not wanted <= words | ({"SXM"} if not words & {"PCIE", "NVL"} else set()):
        return False
    if (words & _DISTINCTIVE) - wanted - ({"MAX"} if "PRO" in wanted else set()):
        return False
    return all(_has(size, sizes, memory) or not (sizes or memory) for size in wanted_sizes)


def _read(name: str) -> tuple[set[str], set[int]]:
    """The words of a name, with "RTX4080SUPER" split like "RTX 4080 SUPER", and the sizes in GB among them."""
    text = re.sub(r"(RTX|GTX|PRO)(?=[A-Z]*\d|PRO)", r"\1 ", name.upper())
    text = re.sub(r"(?<=\d)(?=(?:TI|SUPER|ADA|D|SFF)(?![A-Z]*\d))", " ", text).replace("TISUPER", "TI SUPER")
    words = {_SHORT.get(word, word) for word in re.findall(r"[A-Z0-9]+", text.replace("MAXQ", "MAX Q"))} - _NOISE
    sizes = {int(found[1]) for word in words if (found := _SIZE.fullmatch(word))}
    return {word for word in words if not _SIZE.fullmatch(word)}, sizes


def _has(gigabytes: int, sizes: set[int], memory: int) -> bool:
    return gigabytes in sizes or _minimum(gigabytes) <= memory <= gigabytes * 1024 * 1.03


def _minimum(gigabytes: int) -> float:
    """The lowest figure in MiB that the driver reports for a GPU of so many GB: a T4's 16 GB are 15,360."""
    return gigabytes * 1024 * 0.9
