"""The models that a replica knows by name, and the meaning of any other name or folder."""

import difflib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class ModelError(Exception):
    """The model cannot be served as asked; the message says why and what to do."""


@dataclass(frozen=True)
class Preset:
    """A model and how SGLang serves it.

    model: Hugging Face id or folder; None for an embedded model, which lies in the models folder under `name`.
    served_name: the model name in requests. flags, gpu_flags, cpu_flags: added to SGLang's, always or on one of these.
    overrides: changes to the model's config.json, with {folder} for the model's folder. gpu_gib, cpu_gib: minimum
    memory for serving, in GiB; 0 if unknown. tokenizer, tower: other models on the hub whose tokenizer, or whose
    weights, this one needs as well.
    """

    name: str
    model: str | None
    served_name: str
    flags: tuple[str, ...] = ()
    gpu_flags: tuple[str, ...] = ()
    cpu_flags: tuple[str, ...] = ()
    overrides: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    gpu_gib: float = 0.0
    cpu_gib: float = 0.0
    tokenizer: str | None = None
    tower: str | None = None

    @property
    def is_embedded(self) -> bool:
        return self.model is None

    @property
    def hub_parts(self) -> dict[str, bool]:
        """The models on the hub that it is made of, and whether the weights of each are wanted; none for a folder."""
        if self.model is None or not _HUB_ID.fullmatch(self.model):
            return {}
        return {self.model: True} | {name: name == self.tower for name in (self.tokenizer, self.tower) if name}


# Prefill graphs for so many tokens. SGLang 0.5.23 would capture 50, of up to 4,096, though above some 500 a pass takes
# the GPU longer than the CPU needs to launch it: a start on an H200 takes a tenth less, and nothing is slower after it
# (`python3 -m tests.gpu --only cold --out FOLDER`).
PREFILL_SIZES = (16, 32, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512)
PREFILL_GRAPHS = ("--cuda-graph-bs-prefill", *map(str, PREFILL_SIZES))

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="llava-v1.6-vicuna-7b",
            model="liuhaotian/llava-v1.6-vicuna-7b",
            served_name="liuhaotian/llava-v1.6-vicuna-7b",
            # The checkpoint has neither a tokenizer that transformers can load nor a chat template.
            flags=("--tokenizer-path", "llava-hf/llava-1.5-7b-hf", "--chat-template", "vicuna_v1.1"),
            gpu_gib=18,
            cpu_gib=18,
            tokenizer="llava-hf/llava-1.5-7b-hf",
            tower="openai/clip-vit-large-patch14-336",
        ),
        Preset(
            name="llama-2-7b-chat",
            model="meta-llama/Llama-2-7b-chat-hf",
            served_name="meta-llama/Llama-2-7b-chat-hf",
            gpu_flags=PREFILL_GRAPHS,
            gated=True,
            gpu_gib=16,
            cpu_gib=16,
        ),
        Preset(
            name="smollm2-135m",
            model=None,
            served_name="smollm2-135m",
            cpu_flags=("--context-length", "4096"),
            gpu_gib=2,
            cpu_gib=3.3,
        ),
        # A real LLaVA pipeline with toy eyes: it distinguishes plain colours and nothing else.
        Preset(
            name="tiny-llava",
            model=None,
            served_name="tiny-llava",
            cpu_flags=("--context-length", "4096"),
            overrides={"mm_vision_tower": "{folder}/clip-vision-tower"},
            gpu_gib=2,
            cpu_gib=3.3,
        ),
    )
}


def resolve(model: str) -> Preset:
    """What `--model` means: a preset's name or its Hugging Face id, a folder, or any other Hugging Face id.

    Raises ModelError.
    """
    for preset in PRESETS.values():
        if model in (preset.name, preset.model):
            return preset
    # As a string first: Path raises for names that are too long and for homes of unknown users.
    folder = Path(os.path.expanduser(model))  # noqa: PTH111
    if os.path.isdir(folder):  # noqa: PTH112
        if not (folder / "config.json").is_file():
            raise ModelError(f"{model} is no model folder: it has no config.json")
        weights = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".bin"))
        need = weights / 2**30 + 1.5
        path = str(folder.resolve())
        return Preset(folder.name, path, folder.name, overrides=_overrides(folder), gpu_gib=need, cpu_gib=need)
    if model.startswith((".", "/", "~")):
        raise ModelError(f"there is no folder {model}: give a model's folder, a Hugging Face id, or one of {_names()}")
    if not _HUB_ID.fullmatch(model):
        near = difflib.get_close_matches(model.lower(), PRESETS, n=1, cutoff=0.4)
        meant = f"did you mean {near[0]}? There" if near else "there"
        raise ModelError(
            f"unknown model {model}: {meant} are {_names()}; or give a folder, or a Hugging Face id (org/name)"
        )
    return Preset(model.rpartition("/")[2], model, model)


def _overrides(folder: Path) -> dict[str, str]:
    """Overrides for a folder's config.json: SGLang needs the absolute path of a vision tower inside the folder."""
    try:
        tower = json.loads((folder / "config.json").read_text()).get("mm_vision_tower", "")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{folder}: its config.json cannot be read: {error}") from None
    lies_inside = tower and not Path(tower).is_absolute() and (folder / tower).is_dir()
    return {"mm_vision_tower": f"{{folder}}/{tower}"} if lies_inside else {}


def _names() -> str:
    return ", ".join(PRESETS)
