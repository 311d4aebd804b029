"""Fetches a model to this machine, only once for all processes, after a check of access and of disk space."""

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from replica import lock_file
from replica.store import hub
from replica.store.cache import Cache, File, Manifest
from replica.store.download import download
from replica.store.errors import StoreError
from replica.store.progress import Progress, gigabytes

_AT_ONCE = 4  # files


def pull(
    repo: str,
    cache: Cache,
    token: str | None,
    say: Callable[[str], None],
    revision: str = "main",
    with_weights: bool = True,
) -> Manifest | None:
    """The model's files, all here afterwards. None if the hub cannot be reached and part of the model is here.

    If several processes need the same model, one fetches it and the others wait. Raises StoreError.
    """
    try:
        with lock_file.held(
            cache.lock(repo), lambda: say(f"{repo} is being fetched by another process: waiting for it")
        ):
            return _pull(repo, cache, token, say, revision, with_weights)
    except OSError as error:
        raise StoreError(f"{repo} cannot be kept in {cache.folder}: {error.strerror or error}") from None


def _pull(
    repo: str, cache: Cache, token: str | None, say: Callable[[str], None], revision: str, with_weights: bool
) -> Manifest | None:
    before = cache.noted(repo)
    try:
        manifest, licence = hub.look_up(repo, revision, token, with_weights)
    except OSError as error:
        if before and before.revision == revision and not cache.missing(before):
            say(f"the hub cannot be asked ({error}): {repo} is taken as it was fetched")
            return before
        if (cache.of_repo(repo) / "snapshots").is_dir():
            say(f"the hub cannot be asked ({error}): {repo} is taken as it lies in {cache.folder}")
            return None
        raise StoreError(f"the hub cannot be asked for {repo} ({error}): check the network, and HF_ENDPOINT") from None
    if before and before.commit == manifest.commit and set(before.files) > set(manifest.files):
        manifest = before  # an earlier pull included the weights
    missing = cache.missing(manifest)
    if missing:
        here = manifest.size - sum(file.size for file in missing)
        partial = sum(_partly(cache.blob(repo, file)) for file in missing)
        cache.check_room(manifest.repo, manifest.size - here - partial)
        cache.note(manifest)
        terms = f", licence: {licence}" if licence else ""
        say(f"fetching {repo}: {gigabytes(manifest.size - here - partial)} in {len(missing)} files{terms}")
        progress = Progress(repo, manifest.size, here + partial, say)
        try:
            _download_all(manifest, missing, cache, token, progress)
        finally:
            progress.end()
    cache.note(manifest)
    cache.place(manifest)
    return manifest


def _download_all(manifest: Manifest, missing: list[File], cache: Cache, token: str | None, progress: Progress) -> None:
    def one(file: File) -> None:
        url, headers = hub.address_of(manifest.repo, manifest.commit, file, token)
        download(url, headers, file, cache.blob(manifest.repo, file), progress.came)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        # Files with equal content share one blob.
        waiting = [pool.submit(one, file) for file in {file.etag: file for file in missing}.values()]
        try:
            for future in waiting:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _partly(blob: Path) -> int:
    with contextlib.suppress(OSError):
        return blob.with_name(f"{blob.name}.groundserve.incomplete").stat().st_size
    return 0
