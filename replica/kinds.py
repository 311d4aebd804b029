"""GPUs by SkyPilot's names: is what NVIDIA's driver calls "NVIDIA GeForce RTX 4090" an RTX4090? Pure."""

import re

# Words of a name that tell no two products apart.
_NOISE = {"NVIDIA", "TESLA", "GEFORCE", "GENERATION", "EDITION", "GPU", "MEGA", "NVLINK"}
# Words that make another product of one that is called the same without them.
_TELLING = {"ADA", "D", "LAPTOP", "MAX", "PRO", "SFF", "SUPER", "TI", "TITAN"}
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

    `name` is the driver's, `memory` is how much it has in MiB, 0 where nobody knows. A kind without a size is of any
    size; one with a size is that size by the name or by the memory.
    """
    words, sizes = _read(name)
    if any_of_size := _ANY_OF_SIZE.fullmatch(kind.strip()):
        gigabytes = int(any_of_size[1]) * (1024 if any_of_size[2] in "tT" else 1)
        is_more = bool(any_of_size[3]) and (
            memory >= _least(gigabytes) or (not memory and max(sizes, default=0) >= gigabytes)
        )
        return is_more or _has(gigabytes, sizes, memory)
    wanted, wanted_sizes = _read(kind)
    if not wanted or not wanted <= words | ({"SXM"} if not words & {"PCIE", "NVL"} else set()):
        return False
    if (words & _TELLING) - wanted - ({"MAX"} if "PRO" in wanted else set()):
        return False
    return all(_has(size, sizes, memory) or not (sizes or memory) for size in wanted_sizes)


def _read(name: str) -> tuple[set[str], set[int]]:
    """Its words, with "RTX4080SUPER" taken apart as in "RTX 4080 SUPER", and the sizes among them in GB."""
    text = re.sub(r"(RTX|GTX|PRO)(?=[A-Z]*\d|PRO)", r"\1 ", name.upper())
    text = re.sub(r"(?<=\d)(?=(?:TI|SUPER|ADA|D|SFF)(?![A-Z]*\d))", " ", text).replace("TISUPER", "TI SUPER")
    words = {_SHORT.get(word, word) for word in re.findall(r"[A-Z0-9]+", text.replace("MAXQ", "MAX Q"))} - _NOISE
    sizes = {int(found[1]) for word in words if (found := _SIZE.fullmatch(word))}
    return {word for word in words if not _SIZE.fullmatch(word)}, sizes


def _has(gigabytes: int, sizes: set[int], memory: int) -> bool:
    return gigabytes in sizes or _least(gigabytes) <= memory <= gigabytes * 1024 * 1.03


def _least(gigabytes: int) -> float:
    """MiB that the driver tells of so many GB: a T4's 16 are 15,360."""
    return gigabytes * 1024 * 0.9
