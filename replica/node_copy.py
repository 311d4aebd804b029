"""A model copied from a shared file system to the disk of this node, once for all replicas here, under a lock."""

import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from replica.lock_file import held
from replica.store.cache import Cache

# Bytes of the disk that a copy must leave free.
_SPARE = 1 << 30
_WHOLE = ".groundserve-whole"


@dataclass(frozen=True)
class Copied:
    """Command and variables that use the copy, or those from before if there is none."""

    argv: tuple[str, ...]
    envs: Mapping[str, str] = field(repr=False)


def on_this_node(argv: Sequence[str], envs: Mapping[str, str], folder: str, say: Callable[[str], None]) -> Copied:
    """Copies the model that the command names with --model: a folder, or what the hub's cache has of it.

    What cannot be copied is read from where it is, and `say` is told why.
    """
    argv = tuple(argv)
    here = Path(os.path.expandvars(os.path.expanduser(folder)))  # noqa: PTH111 - the folder may hold both
    at = argv.index("--model") + 1 if "--model" in argv else len(argv)
    if at >= len(argv):
        return Copied(argv, envs)
    model = argv[at]
    is_folder = Path(model).is_absolute()
    source = Path(model) if is_folder else Cache.of({**os.environ, **envs}).of_repo(model)
    if not source.is_dir():
        return Copied(argv, envs)
    try:
        copy = _copied(source, here, "" if is_folder else "hub", say)
    except OSError as error:
        say(f"{model} is read from {source}: {error.filename or here}: {error.strerror}")
        return Copied(argv, envs)
    if copy is None:
        return Copied(argv, envs)
    if is_folder:
        return Copied((*argv[:at], str(copy), *argv[at + 1 :]), envs)
    return Copied(argv, {**envs, "HF_HUB_CACHE": str(copy.parent)})


def _copied(source: Path, folder: Path, within: str, say: Callable[[str], None]) -> Path | None:
    """The copy, made now if there is none of this very state of `source`. What lies `within` keeps its links."""
    here = folder / within
    for one in (folder, here):
        one.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = one.stat()
        if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            say(f"{source} is not copied: others may write to {one}, and could give this replica another model")
            return None
    # A folder may itself be one of the hub's cache, whose links lead out of it.
    follows = not within
    size, digest = _state(source, follows)
    # The hub's cache is found by the name of the repository, so that has to stay; its copies lie side by side.
    copy = here / digest / source.name
    with held(here / f"{digest}.lock", lambda: say(f"fetching {source.name}: another replica copies it to {here}")):
        if (copy.parent / _WHOLE).exists():
            return copy
        free = shutil.disk_usage(here).free
        if free < size + _SPARE:
            say(f"{source} is not copied: it has {size >> 20} MiB, and {here} has {free >> 20} MiB free")
            return None
        say(f"fetching {source.name}: {size >> 20} MiB from {source} to {copy}")
        shutil.rmtree(copy.parent, ignore_errors=True)
        copy.parent.mkdir(mode=0o700)
        shutil.copytree(source, copy, symlinks=not follows)
        (copy.parent / _WHOLE).touch()
    return copy


def _state(source: Path, follows: bool) -> tuple[int, str]:
    """Bytes of the files below the folder, and a digest of where it is, what is in it, and when that was changed."""
    size, digest = 0, hashlib.sha256(os.fsencode(source.resolve()))
    for root, folders, files in os.walk(source):
        folders.sort()
        for name in sorted(files):
            path = Path(root, name)
            found = path.stat() if follows else path.lstat()
            size += found.st_size if stat.S_ISREG(found.st_mode) else 0
            told = f"{path.relative_to(source)}\0{found.st_size}\0{found.st_mtime_ns}\0"
            digest.update(told.encode("utf-8", "surrogateescape"))
    return size, digest.hexdigest()[:16]
