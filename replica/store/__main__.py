"""python -m replica.store: pull, list, remove, export and import models. `groundserve pull` and the like run it."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from replica import models, presets
from replica.options import OptionsError, models_dir, token
from replica.store import archive
from replica.store.cache import Cache, Manifest
from replica.store.errors import StoreError
from replica.store.progress import gigabytes
from replica.store.pull import pull
from replica.store.remove import remove


def main(arguments: Sequence[str], environ: Mapping[str, str]) -> None:
    options = _parser().parse_args(arguments)
    cache = Cache.of(environ)
    match options.command:
        case "pull":
            for name in options.models or [environ.get("MODEL") or "llava-v1.6-vicuna-7b"]:
                _pull(name, options.revision, cache, environ)
        case "list":
            _list(cache, models_dir(environ))
        case "remove":
            used = json.load(sys.stdin) if options.used else {}
            remove(options.models, cache, models_dir(environ), used, _say)
        case "export":
            # Two models may have a part in common, such as a tokenizer.
            repos = dict.fromkeys(repo for name in options.models for repo in _parts(name))
            whole = [_whole(repo, cache) for repo in repos]
            size = archive.write(whole, cache, options.file)
            print(f"{options.file}: {gigabytes(size)}, {', '.join(one.repo for one in whole)}")
        case _:
            archive.read(options.file, cache, lambda line: print(line, flush=True))


def _pull(name: str, revision: str, cache: Cache, environ: Mapping[str, str]) -> None:
    preset = presets.resolve(name)
    if preset.is_embedded:
        print(f"{preset.name} is here: {models.ensure(preset.name, models_dir(environ))}")
        return
    if not preset.hub_parts:
        raise StoreError(f"{name} is a folder of this machine: there is nothing to fetch")
    for repo, with_weights in preset.hub_parts.items():
        version = revision if repo == preset.model else "main"
        manifest = pull(repo, cache, token(environ), _say, version, with_weights)
        if manifest is None:
            raise StoreError(
                f"the hub cannot be asked, and what is here of {repo} did not come by pull: check the network"
            )
        print(
            f"{repo} is here: {gigabytes(manifest.size)} in {len(manifest.files)} files, commit {manifest.commit[:12]}"
        )


def _list(cache: Cache, embedded: Path) -> None:
    rows = [("MODEL", "SIZE", "STATE")]
    for preset in presets.PRESETS.values():
        if preset.is_embedded and (embedded / preset.name).is_dir():
            size = sum(path.stat().st_size for path in (embedded / preset.name).rglob("*") if path.is_file())
            rows.append((preset.name, gigabytes(size), "here"))
    for repo in cache.repos():
        manifest = cache.noted(repo)
        state = "fetched by another program"
        if manifest:
            missing = cache.missing(manifest)
            state = f"{len(missing)} of {len(manifest.files)} files are missing: pull it" if missing else "here"
        rows.append((repo, gigabytes(cache.bytes_of(repo)), state))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    for row in rows:
        print(f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]}")


def _parts(name: str) -> list[str]:
    parts = list(presets.resolve(name).hub_parts)
    if not parts:
        raise StoreError(f"{name} does not come from the hub: copy its folder instead")
    return parts


def _whole(repo: str, cache: Cache) -> Manifest:
    manifest = cache.noted(repo)
    if manifest is None or cache.missing(manifest):
        raise StoreError(f"{repo} is not here whole: pull it first")
    return manifest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m replica.store", description="The models on this machine.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    one = commands.add_parser("pull", help="fetch models, or go on with what broke off")
    one.add_argument("models", nargs="*", metavar="MODEL", help="preset or Hugging Face id (default: MODEL)")
    one.add_argument("--revision", default="main", metavar="R", help="branch, tag or commit (main)")
    commands.add_parser("list", help="show which are here")
    one = commands.add_parser("remove", help="remove models, each with the others that it needs")
    one.add_argument("models", nargs="+", metavar="MODEL", help="as listed, or a preset")
    one.add_argument(
        "--used", action="store_true", help="spare those that services use: a JSON object on standard input, by service"
    )
    one = commands.add_parser("export", help="write models into one file")
    one.add_argument("models", nargs="+", metavar="MODEL")
    one.add_argument("file", type=Path, metavar="FILE.tar")
    one = commands.add_parser("import", help="take in the models of such a file")
    one.add_argument("file", type=Path, metavar="FILE.tar")
    return parser


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:], os.environ)
    except (StoreError, presets.ModelError, OptionsError, models.MakingError) as error:
        sys.exit(f"groundserve: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
