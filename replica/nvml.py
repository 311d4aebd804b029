"""The free memory of a GPU, from the driver's own library: nvidia-smi takes too long to call during a swap."""

import ctypes
from functools import cache
from typing import Any


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def free_memory(uuid: str) -> int | None:
    """In bytes; None if there is no such GPU, or no driver to ask."""
    library = _library()
    device = ctypes.c_void_p()
    memory = _Memory()
    if library is None or library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device)) != 0:
        return None
    return memory.free if library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) == 0 else None


@cache
def _library() -> Any:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    return library if library.nvmlInit_v2() == 0 else None
