"""Models in one file, for machines without a network: a tar of manifests and blobs, without links or paths."""

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

from replica.store.cache import Cache, File, Manifest
from replica.store.errors import StoreError

_MANIFESTS = "manifests.json"
_MAX_MANIFEST = 16 << 20  # bytes; longer than any list of a model's files
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def write(manifests: list[Manifest], cache: Cache, path: Path) -> int:
    """Writes these models, which must be complete here; the size of the file in bytes. Raises StoreError."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        with tarfile.open(fresh, "w", format=tarfile.PAX_FORMAT) as archive:
            _add(archive, _MANIFESTS, json.dumps([one.to_json() for one in manifests]).encode())
            for manifest in manifests:
                for file in {file.etag: file for file in manifest.files}.values():
                    archive.add(cache.blob(manifest.repo, file).resolve(), f"{manifest.repo}/{file.etag}")
        fresh.replace(path)
        return path.stat().st_size
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        fresh.unlink(missing_ok=True)


def read(path: Path, cache: Cache, say: Callable[[str], None]) -> list[Manifest]:
    """Imports the models of such a file into the cache and verifies each file by its hash. Raises StoreError."""
    try:
        with tarfile.open(path, "r|") as archive:
            manifests = _manifests(archive, path)
            waiting = {(m.repo, file.etag): file for m in manifests for file in m.files}
            missing = {(m.repo, file.etag): file.size for m in manifests for file in cache.missing(m)}
            cache.check_room(str(path), sum(missing.values()))
            while member := archive.next():
                repo, _, etag = member.name.rpartition("/")
                file = waiting.pop((repo, etag), None)
                source = archive.extractfile(member) if member.isfile() else None
                if file is None or source is None or not _ETAG.fullmatch(etag):
                    raise StoreError(
                        f"{path} holds {member.name!r}, which is no part of its models: it was not written by export"
                    )
                _take(source, file, cache.blob(repo, file), path)
        if waiting:
            raise StoreError(f"{path} breaks off: {len(waiting)} files are not in it; copy it once more")
        for manifest in manifests:
            cache.note(manifest)
            cache.place(manifest)
            say(f"{manifest.repo} is here")
    except (tarfile.TarError, EOFError):
        raise StoreError(f"{path} is no archive that export wrote, or it breaks off: copy it once more") from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename not in (None, str(path)) else ""
        raise StoreError(f"{path} cannot be taken in: {where}{error.strerror or error}") from None
    return manifests


def _manifests(archive: tarfile.TarFile, path: Path) -> list[Manifest]:
    first = archive.next()
    source = archive.extractfile(first) if first and first.name == _MANIFESTS and first.size < _MAX_MANIFEST else None
    try:
        data = json.loads(source.read()) if source else None
    except ValueError:
        data = None
    if not isinstance(data, list):
        raise StoreError(f"{path} is no archive that export wrote")
    return [Manifest.from_json(one) for one in data]


def _take(source: "io.BufferedIOBase | object", file: File, blob: Path, path: Path) -> None:
    blob.parent.mkdir(parents=True, exist_ok=True)
    fresh = blob.with_name(f"{blob.name}.importing")
    hasher, size = file.hasher(), 0
    try:
        with fresh.open("wb") as out:
            while piece := source.read(1 << 20):  # type: ignore[union-attr]
                hasher.update(piece)
                out.write(piece)
                size += len(piece)
        if size != file.size or hasher.hexdigest() != file.etag:
            raise StoreError(f"{path}: {file.path} in it is damaged: copy it once more")
        fresh.replace(blob)
    finally:
        fresh.unlink(missing_ok=True)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
