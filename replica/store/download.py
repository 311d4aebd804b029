"""Downloads one file over HTTP: resumed where it broke off, even by another process, and verified before it is used.

huggingface_hub's own download starts each file from scratch in a new process, and checks only its size.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import requests

from replica.store.cache import File, pieces
from replica.store.errors import StoreError

TIMEOUT = (10, 30)  # seconds to connect, and between two pieces
PATIENCE = 6  # attempts in a row without progress before giving up
MAX_PAUSE = 20.0  # seconds between two attempts
_PIECE = 64 << 10  # bytes read at once; an incomplete piece is discarded
_FINAL = (401, 403, 404, 410, 451)  # status codes that a retry does not change


class _NothingNew(Exception):
    """An attempt that ended early; the message says how."""


def download(
    url: str, headers: Mapping[str, str], file: File, blob: Path, came: Callable[[int], None], pause: float = 1.0
) -> None:
    """Downloads `file` to `blob`. Calls `came` with the number of bytes received, negative if some had to be discarded.

    Received bytes stay in a file beside `blob`, which is renamed once it is complete and its hash is right. `pause` is
    the wait after the first failure, in seconds; it doubles with each further one. Raises StoreError, and OSError for
    disk errors.
    """
    partial = blob.with_name(f"{blob.name}.groundserve.incomplete")
    was_wrong = False
    failures = 0
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        reason = ""
        try:
            _fetch(url, headers, file, partial, came)
        except (_NothingNew, requests.exceptions.RequestException) as failure:
            reason = str(failure)
        if partial.exists() and partial.stat().st_size == file.size:
            if _is_right(partial, file):
                partial.replace(blob)
                return
            _drop(partial, came)
            if was_wrong:
                raise StoreError(
                    f"{file.path}: what comes is not what the hub lists (its hash is another), twice in a row: a "
                    "proxy or mirror in between may change it"
                )
            was_wrong = True
            continue
        after = partial.stat().st_size if partial.exists() else 0
        failures = 0 if after > before else failures + 1
        if failures == PATIENCE:
            raise StoreError(
                f"{file.path} cannot be fetched: {reason}; what came is kept, and the next pull goes on there"
            )
        time.sleep(min(pause * 2**failures, MAX_PAUSE) if failures else 0)


def _fetch(url: str, headers: Mapping[str, str], file: File, partial: Path, came: Callable[[int], None]) -> None:
    have = partial.stat().st_size if partial.exists() else 0
    if have > file.size:
        _drop(partial, came)
        have = 0
    if have == file.size and have:
        return
    fields = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(url, headers=fields, stream=True, timeout=TIMEOUT) as answer:
        if answer.status_code in _FINAL:
            raise StoreError(f"{file.path}: the hub answers {answer.status_code} {answer.reason}")
        if answer.status_code == 416:
            _drop(partial, came)
            raise _NothingNew("the hub does not go on where it broke off")
        if answer.status_code not in (200, 206):
            raise _NothingNew(f"the hub answers {answer.status_code} {answer.reason}")
        if have and answer.status_code == 200:
            _drop(partial, came)
        with partial.open("ab") as out:
            for piece in answer.iter_content(_PIECE):
                out.write(piece)
                came(len(piece))


def _is_right(path: Path, file: File) -> bool:
    hasher = file.hasher()
    for piece in pieces(path):
        hasher.update(piece)
    return hasher.hexdigest() == file.etag


def _drop(partial: Path, came: Callable[[int], None]) -> None:
    came(-partial.stat().st_size)
    partial.unlink()
