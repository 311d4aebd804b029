"""Reads flags and environment into frozen Options."""

import argparse
import contextlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from replica import sharing
from replica.media import DOMAINS, LOCAL_PATH, PRIVATE, MediaPolicy

# How groundserve hands secrets to a replica in a container (balancer/operate/engines/compose/engine.py).
SECRETS_FILE = "GROUNDSERVE_SECRETS_FILE"

_ROOT = Path(__file__).resolve().parent.parent

_EPILOG = """\
environment: MODEL, REPLICA_HOST, REPLICA_PORT, REPLICA_DEVICE, GPUS_PER_REPLICA stand in for the flags;
  GPU_KINDS     stands in for --gpu-kinds
  LEASE_DIR     folder of GPU leases, shared by all replicas of the machine (/run/lock/groundserve where root has
                made it, else groundserve-leases in /run/lock or, where not everyone may write to that, in /tmp)
  LEASE_WAIT    seconds to wait for a free GPU, or for its turn on a shared one (60)
  GPU_SHARE     yes stands in for --gpu-share
  GPU_SLICE     minimum seconds of a turn on a shared GPU while others wait (2)
  MODELS_DIR    folder of the embedded models (.models of a checkout, else ~/.cache/groundserve/models)
  HF_TOKEN      Hugging Face token for gated models; or HF_TOKEN_FILE, a file that contains it
  SGLANG_ARGS   flags for SGLang, placed before those after --
  ALLOWED_MEDIA_DOMAINS, ALLOWED_LOCAL_MEDIA_PATH, ALLOW_PRIVATE_MEDIA=1   as the flags
  SGLANG_API_KEY_FILE   file with the API key that SGLang requires of its clients
"""


class OptionsError(Exception):
    """A flag or variable has an invalid value; the message names it."""


@dataclass(frozen=True)
class Options:
    """The options of one replica. Times are in seconds; model None: LLaVA on a GPU, SmolLM2 on a CPU."""

    model: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    gpus: int = 1
    gpu_kinds: tuple[str, ...] = ()
    lease_dir: Path = field(default_factory=lambda: lease_folder())
    lease_wait: float = 60.0
    models_dir: Path = _ROOT / ".models"
    hf_token: str | None = field(default=None, repr=False)
    api_key_file: Path | None = None
    sglang_args: tuple[str, ...] = ()
    media: MediaPolicy = field(default_factory=MediaPolicy)
    # Take turns on the GPUs with other replicas that share.
    gpu_share: bool = False
    dry_run: bool = False
    list_gpus: bool = False
    weigh: bool = False
    # A command that runs with the lease instead of SGLang; empty: SGLang.
    command: tuple[str, ...] = ()


def read(arguments: Sequence[str], environ: Mapping[str, str]) -> Options:
    """Flags override the environment, which overrides defaults. Raises OptionsError; an unknown flag exits with 2."""
    given = list(arguments)
    more: list[str] = []
    if "--" in given:
        split = given.index("--")
        given, more = given[:split], given[split + 1 :]
    flags = _parser().parse_args(given)

    def pick(flag: str | None, variable: str, default: str) -> str:
        return flag if flag is not None else environ.get(variable) or default

    device = pick(flags.device, "REPLICA_DEVICE", "auto")
    if device not in ("auto", "cuda", "cpu"):
        raise OptionsError(f"REPLICA_DEVICE={device}: use auto, cuda or cpu")
    try:
        sglang_args = (*shlex.split(environ.get("SGLANG_ARGS", "")), *([] if flags.exec else more))
    except ValueError as error:
        raise OptionsError(f"SGLANG_ARGS cannot be split into flags: {error}") from None
    if flags.exec and not more:
        raise OptionsError("--exec runs the command that follows --, and there is none: --exec -- COMMAND")
    if environ.get("SGLANG_PLATFORM"):
        raise OptionsError(
            f"SGLANG_PLATFORM={environ['SGLANG_PLATFORM']} keeps SGLang from loading groundserve's plug-in: unset it"
        )
    try:
        allowed = MediaPolicy.read(
            {
                DOMAINS: pick(flags.allowed_media_domains, DOMAINS, ""),
                LOCAL_PATH: pick(flags.allowed_local_media_path, LOCAL_PATH, ""),
                PRIVATE: pick("1" if flags.allow_private_media else None, PRIVATE, "0"),
            }
        )
    except ValueError as error:
        raise OptionsError(str(error)) from None
    gpu_share = pick("yes" if flags.gpu_share else None, "GPU_SHARE", "no").lower()
    if gpu_share not in ("yes", "no"):
        raise OptionsError(f"GPU_SHARE={gpu_share}: use yes or no")
    if gpu_share == "yes" and flags.exec:
        raise OptionsError("--gpu-share is for SGLang alone: what --exec starts cannot give its memory back")
    if gpu_share == "yes" and (obstacle := sharing.obstacle(sglang_args)):
        raise OptionsError(f"--gpu-share does not go with {obstacle}")
    _seconds(environ.get("GPU_SLICE") or "2", "GPU_SLICE")
    key_file = environ.get("SGLANG_API_KEY_FILE")
    if key_file and not read_secret(Path(key_file), "SGLANG_API_KEY_FILE"):
        raise OptionsError(f"SGLANG_API_KEY_FILE={key_file} is empty: an empty key would let everyone in")
    return Options(
        model=pick(flags.model, "MODEL", "") or None,
        host=pick(flags.host, "REPLICA_HOST", Options.host),
        port=_whole(pick(flags.port, "REPLICA_PORT", str(Options.port)), "--port", 1, 65535),
        device=device,
        gpus=_whole(pick(flags.gpus, "GPUS_PER_REPLICA", "1"), "--gpus", 1, 64),
        gpu_kinds=tuple(kind.strip() for kind in pick(flags.gpu_kinds, "GPU_KINDS", "").split(",") if kind.strip()),
        lease_dir=Path(environ["LEASE_DIR"]) if environ.get("LEASE_DIR") else Options().lease_dir,
        lease_wait=_seconds(environ.get("LEASE_WAIT") or "60", "LEASE_WAIT"),
        models_dir=models_dir(environ),
        hf_token=token(environ),
        api_key_file=Path(key_file).resolve() if key_file else None,
        sglang_args=sglang_args,
        media=allowed,
        gpu_share=gpu_share == "yes",
        dry_run=flags.dry_run,
        list_gpus=flags.list_gpus,
        weigh=flags.weigh,
        command=tuple(more) if flags.exec else (),
    )


def lease_folder(made: Path = Path("/run/lock/groundserve")) -> Path:
    """The folder that root has created for a group, if it exists, even for users who may not write to it.

    Otherwise one that all users share. A separate folder for users outside the group would lease the same GPUs twice.
    """
    return made if made.is_dir() else shared_folder() / "groundserve-leases"


def shared_folder(candidates: Sequence[str] = ("/run/lock", "/tmp")) -> Path:
    """A folder that all users of the machine can write to; not TMPDIR, which may be a user's own.

    /run/lock comes first: nothing cleans it up while the machine runs, and no service has a private one.
    """
    for path in candidates:
        with contextlib.suppress(OSError):
            if Path(path).stat().st_mode & 0o1777 == 0o1777:
                return Path(path)
    return Path(candidates[-1])


def models_dir(environ: Mapping[str, str]) -> Path:
    """The folder of the embedded models: MODELS_DIR, else in the checkout of this code, else the user's cache."""
    if environ.get("MODELS_DIR"):
        return Path(environ["MODELS_DIR"]).expanduser().resolve()
    if (_ROOT / "pyproject.toml").is_file():
        return _ROOT / ".models"
    try:
        return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "groundserve/models"
    except RuntimeError:
        raise OptionsError("this user has no home folder: set HOME, or MODELS_DIR to a folder for models") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m replica",
        description="Leases GPUs, where there are any, then becomes the SGLang server of one model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="PRESET|HF_ID|PATH", help="what to serve (LLaVA on a GPU, SmolLM2 on a CPU)")
    parser.add_argument("--port", help="port to serve on (8000)")
    parser.add_argument("--host", help="address to serve on (127.0.0.1)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), help="auto: a GPU if the machine has one")
    parser.add_argument("--gpus", metavar="N", help="GPUs for this replica, as tensor parallel ranks (1)")
    parser.add_argument(
        "--gpu-kinds", metavar="KINDS", help="lease GPUs of these kinds if the machine has any: L4,A100-80GB (any)"
    )
    parser.add_argument(
        "--allowed-media-domains",
        metavar="HOSTS",
        help="the only hosts to fetch images, videos and sounds from, separated by commas (all)",
    )
    parser.add_argument(
        "--allowed-local-media-path",
        metavar="FOLDER",
        help="a folder whose files requests may use as images, videos and sounds (none)",
    )
    parser.add_argument(
        "--allow-private-media",
        action="store_true",
        help="also fetch them from addresses outside the public Internet",
    )
    parser.add_argument(
        "--gpu-share", action="store_true", help="take turns on the GPUs with other replicas that have this flag"
    )
    parser.add_argument("--dry-run", action="store_true", help="print lease and command, and start nothing")
    parser.add_argument(
        "--exec", action="store_true", help="lease GPUs, then become the command after -- instead of SGLang"
    )
    parser.add_argument(
        "--list-gpus", action="store_true", help="print the machine's GPUs and who leases them, as JSON"
    )
    parser.add_argument(
        "--weigh", action="store_true", help="print how much memory the model's weights and cache take, as JSON"
    )
    parser.usage = "%(prog)s [flags] [-- SGLANG_FLAGS...]\n       %(prog)s [flags] --exec -- COMMAND..."
    return parser


def _whole(text: str, name: str, minimum: int, maximum: int) -> int:
    if not text.isdecimal() or not minimum <= int(text) <= maximum:
        raise OptionsError(f"{name} {text}: use a whole number from {minimum} to {maximum}")
    return int(text)


def _seconds(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise OptionsError(f"{name}={text}: use a number of seconds")
    return value


def token(environ: Mapping[str, str]) -> str | None:
    """The Hugging Face token from a variable or a file. Raises OptionsError."""
    if environ.get("HF_TOKEN"):
        return environ["HF_TOKEN"]
    if environ.get("HF_TOKEN_FILE"):
        # Compose mounts an empty file for a secret that is not given.
        return read_secret(Path(environ["HF_TOKEN_FILE"]), "HF_TOKEN_FILE") or None
    return None


def with_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` with the variables in the file that it names, a JSON object; in a container, others can read its own.

    Raises OptionsError.
    """
    if not (path := environ.get(SECRETS_FILE)):
        return dict(environ)
    try:
        found = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise OptionsError(f"{SECRETS_FILE}={path} cannot be read: {error.strerror}") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise OptionsError(f"{SECRETS_FILE}={path} is no JSON object of variables")
    return {**environ, **found}


def read_secret(path: Path, name: str) -> str:
    """The one word in a secret's file; empty if the file is empty. Raises OptionsError that names `name`."""
    try:
        # Windows editors write a byte order mark first.
        secret = path.read_text("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionsError(f"{name}={path} cannot be read: {getattr(error, 'strerror', 'it is not text')}") from None
    if len(secret.split()) > 1:
        raise OptionsError(f"{name}={path}: the file should contain one word, the secret")
    return secret
