"""How much memory of a GPU is free, from the driver's own library: nvidia-smi takes too long to ask amid a swap."""

import ctypes
from functools import cache
from typing import Any


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def free_memory(uuid: str) -> int | None:
    """Bytes; None where there is no such GPU or no driver that tells."""
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
