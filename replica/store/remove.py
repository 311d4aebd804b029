"""Removes models from this machine: none that a service uses or a process fetches, and nothing that lies elsewhere."""

import contextlib
import functools
import os
import shutil
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from replica import lock_file
from replica.presets import PRESETS
from replica.store.cache import Cache
from replica.store.errors import StoreError
from replica.store.progress import gigabytes


def remove(
    names: Sequence[str],
    cache: Cache,
    embedded: Path,
    used: Mapping[str, Collection[str]],
    say: Callable[[str], None],
) -> None:
    """Removes these models, each with the others that it needs, and says how much disk space that frees.

    `embedded` is the folder of the embedded models. `used` has, by service, the words of its file that may name a
    model. Raises StoreError, and then removes nothing, for a model that is not here, is used, or is being fetched.
    """
    here = {repo: cache.of_repo(repo) for repo in cache.repos()}
    here |= {name: embedded / name for name, one in PRESETS.items() if one.is_embedded and (embedded / name).is_dir()}
    folders: dict[str, Path] = {}
    for name in names:
        first, *parts = _meant(name)
        if first not in here:
            there = f"here are {', '.join(here)}" if here else "no model is"
            raise StoreError(f"{name} is not here: {there}")
        if users := _users(first, cache, used):
            raise StoreError(
                f"{name} is used by {', '.join(users)}: take that down first (groundserve down {' '.join(users)}), "
                "or say --force"
            )
        folders[first] = here[first]
        for part in parts:
            if part in here and (users := _users(part, cache, used)):
                say(f"{part} is used by {', '.join(users)}, and stays")
            elif part in here:
                folders[part] = here[part]
    with contextlib.ExitStack() as stack:
        _reserve(folders, cache, stack)
        freed = [_delete(name, folder, say) for name, folder in folders.items()]
    if len(freed) > 1:
        say(f"{gigabytes(sum(freed))} are free now")


def _meant(name: str) -> list[str]:
    """The models that a name stands for, the one itself first."""
    for preset in PRESETS.values():
        if name in (preset.name, preset.model):
            return [*preset.hub_parts] or [preset.name]
    return [name]


def _users(name: str, cache: Cache, used: Mapping[str, Collection[str]]) -> list[str]:
    """The services that name this model, one that it is a part of, or its folder."""
    folder = cache.of_repo(name).name
    return [
        service
        for service, words in used.items()
        if any(name in _meant(word) or folder in word.split("/") for word in words)
    ]


def _reserve(folders: Mapping[str, Path], cache: Cache, stack: contextlib.ExitStack) -> None:
    """Keeps others from writing these models until the stack is left. Raises StoreError if one does that now."""
    locks: set[Path] = set()
    for name, folder in folders.items():
        is_of_hub = folder.parent == cache.folder
        said = f"{name} is being {'fetched' if is_of_hub else 'made'} right now: wait for it, or end that"
        if folder.is_symlink():
            raise StoreError(f"{folder} is a link: remove it, and what it leads to, by hand")
        lock = cache.lock(name) if is_of_hub else folder.parent / ".lock"  # of all embedded models
        try:
            if lock not in locks:
                stack.enter_context(lock_file.held(lock, functools.partial(_refuse, said)))
                locks.add(lock)
            if is_of_hub and any(map(_is_locked, (cache.folder / ".locks" / folder.name).glob("*.lock"))):
                _refuse(said)  # the hub's own client has a lock for each file
        except OSError as error:
            raise _failed(folder, error) from None


def _refuse(why: str) -> None:
    raise StoreError(why)


def _is_locked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return lock_file.is_locked(descriptor)
    finally:
        os.close(descriptor)


def _delete(name: str, folder: Path, say: Callable[[str], None]) -> int:
    """How many bytes that frees."""
    size = _size(folder)
    try:
        for part in ("refs", "snapshots"):  # first: what is left if this breaks off does not look like a model
            if (folder / part).is_dir() and not (folder / part).is_symlink():
                shutil.rmtree(folder / part)
        shutil.rmtree(folder)
    except OSError as error:
        raise _failed(folder, error) from None
    say(f"{name} is removed: {gigabytes(size)}")
    return size


def _size(folder: Path) -> int:
    """The bytes of its files that have no other name, on this disk or behind a link."""
    found = (Path(where, file).lstat() for where, _, files in os.walk(folder) for file in files)
    return sum(one.st_size for one in found if stat.S_ISREG(one.st_mode) and one.st_nlink == 1)


def _failed(folder: Path, error: OSError) -> StoreError:
    return StoreError(f"{error.filename or folder} cannot be removed: {error.strerror or error}")
