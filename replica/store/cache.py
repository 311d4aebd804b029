"""Reads and writes the folder in which Hugging Face's programs, and SGLang, keep models. Its layout:

    models--ORG--NAME/blobs/ETAG              a file's bytes; ETAG is their hash
    models--ORG--NAME/snapshots/COMMIT/FILE   a link to a blob
    models--ORG--NAME/refs/REVISION           the commit of a branch or tag when it was last fetched

https://huggingface.co/docs/huggingface_hub/guides/manage-cache describes it. Beside those folders lies a manifest of
ours: the list of the model's files.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from replica.store.errors import StoreError
from replica.store.progress import gigabytes

_MANIFEST = "groundserve.json"
_RESERVE = 1 << 30  # bytes of disk space to keep free
_READ = 1 << 20  # bytes read at once
_HARMLESS = re.compile(r"[^/\\\0]*")  # leads nowhere but to the name itself


@dataclass(frozen=True, slots=True)
class File:
    """One file of a model. `etag` is the hub's name for its content: SHA-256, or git's SHA-1 for small files."""

    path: str
    size: int  # bytes
    etag: str

    def hasher(self) -> "hashlib._Hash":
        """A hash object: once it has taken all bytes of the file, its `hexdigest` must equal `etag`."""
        if len(self.etag) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)  # git's hash of a file's content


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of one version of a model. Raises StoreError for a path that leads outside the cache."""

    repo: str
    revision: str
    commit: str
    files: tuple[File, ...]

    def __post_init__(self) -> None:
        names = [self.commit, *(file.etag for file in self.files)]  # one name each
        paths = [self.repo, self.revision, *(file.path for file in self.files)]
        names += [name for path in paths for name in path.split("/")]
        if any(not name or name in (".", "..") or not _HARMLESS.fullmatch(name) for name in names):
            raise StoreError(f"{self.repo!r}: the list of its files names one outside its folder")

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`. Raises StoreError for other data."""
        try:
            files = tuple(File(str(f["path"]), int(f["size"]), str(f["etag"])) for f in data["files"])
            return cls(str(data["repo"]), str(data["revision"]), str(data["commit"]), files)
        except (KeyError, TypeError, ValueError):
            raise StoreError("the list of a model's files is broken") from None


class Cache:
    """All models in one such folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self:
        """The cache that SGLang uses with these environment variables."""
        if named := environ.get("HF_HUB_CACHE"):
            return cls(Path(named).expanduser())
        home = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
        return cls(Path(home).expanduser() / "hub")

    @property
    def is_writable(self) -> bool:
        """May this process keep models there?"""
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        return os.access(there, os.W_OK)

    def of_repo(self, repo: str) -> Path:
        return self.folder / ("models--" + repo.replace("/", "--"))

    def blob(self, repo: str, file: File) -> Path:
        return self.of_repo(repo) / "blobs" / file.etag

    def lock(self, repo: str) -> Path:
        """The lock file that a process holds while it writes this model."""
        return self.folder / ".locks" / f"groundserve--{repo.replace('/', '--')}.lock"

    def missing(self, manifest: Manifest) -> list[File]:
        """The files that are missing or incomplete, judged by size: their bytes were verified when they arrived."""
        return [file for file in manifest.files if not self._is_here(manifest.repo, file)]

    def _is_here(self, repo: str, file: File) -> bool:
        try:
            return self.blob(repo, file).stat().st_size == file.size
        except OSError:
            return False

    def check_room(self, what: str, size: int) -> None:
        """Raises StoreError unless the disk has room for that many more bytes of `what`, and some to spare."""
        folder = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(folder).free - _RESERVE
        if size > free:
            raise StoreError(
                f"{what} takes {gigabytes(size)} more, and the disk of {self.folder} has "
                f"{gigabytes(max(free, 0))} to spare: make room, or set HF_HOME to a folder on a larger disk"
            )

    def place(self, manifest: Manifest) -> None:
        """Links a version's files, which must all be here, to where SGLang looks for them. Raises OSError."""
        folder = self.of_repo(manifest.repo)
        for file in manifest.files:
            link = folder / "snapshots" / manifest.commit / file.path
            link.parent.mkdir(parents=True, exist_ok=True)
            target = os.path.relpath(self.blob(manifest.repo, file), link.parent)
            fresh = link.with_name(f".{link.name}.groundserve")
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(target)
            fresh.replace(link)
        ref = folder / "refs" / manifest.revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(manifest.commit)

    def note(self, manifest: Manifest) -> None:
        """Saves the list of this model's files, before the first byte arrives. Raises OSError."""
        folder = self.of_repo(manifest.repo)
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        fresh = folder / f"{_MANIFEST}.new"
        fresh.write_text(json.dumps(manifest.to_json()))
        fresh.replace(folder / _MANIFEST)

    def noted(self, repo: str) -> Manifest | None:
        """The list that was saved last; None if there is none, or it cannot be read."""
        try:
            return Manifest.from_json(json.loads((self.of_repo(repo) / _MANIFEST).read_text()))
        except (OSError, ValueError, StoreError):
            return None

    def repos(self) -> list[str]:
        """The names of the models of which anything is here."""
        names = (path.name.removeprefix("models--") for path in self.folder.glob("models--*") if path.is_dir())
        return sorted(name.replace("--", "/", 1) for name in names)

    def bytes_of(self, repo: str) -> int:
        """The disk space that it takes, including partly fetched files, in bytes."""
        return sum(path.stat().st_size for path in (self.of_repo(repo) / "blobs").glob("*") if path.is_file())


def pieces(path: Path) -> Iterator[bytes]:
    """A file's bytes, piece by piece."""
    with path.open("rb") as source:
        while piece := source.read(_READ):
            yield piece
