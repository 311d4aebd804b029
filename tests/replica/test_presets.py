"""replica/presets.py: what a model's name means."""

import json
from pathlib import Path

import pytest

from replica.presets import PRESETS, ModelError, resolve


@pytest.mark.parametrize("name", PRESETS)
def test_preset_by_name_or_id(name: str) -> None:
    """A preset is found by its name and by its Hugging Face id."""
    preset = PRESETS[name]
    assert resolve(name) is preset
    if preset.model is not None:
        assert resolve(preset.model) is preset
        assert preset.served_name == preset.model


def test_the_llava_preset_serves_with_the_flags_of_its_authors() -> None:
    flags = " ".join(resolve("liuhaotian/llava-v1.6-vicuna-7b").flags)
    assert "--tokenizer-path llava-hf/llava-1.5-7b-hf" in flags
    assert "--chat-template vicuna_v1.1" in flags


def test_only_llama_2_is_gated() -> None:
    assert [preset.name for preset in PRESETS.values() if preset.gated] == ["llama-2-7b-chat"]


def test_model_folder(tmp_path: Path) -> None:
    """A folder with a config.json is a model that needs memory for its weights."""
    (tmp_path / "config.json").write_text(json.dumps({}))
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.truncate(3 * 2**30)
    preset = resolve(str(tmp_path))
    assert preset.model == str(tmp_path)
    assert preset.served_name == tmp_path.name
    assert preset.cpu_gib == pytest.approx(4.5)


def test_vision_tower_in_a_folder(tmp_path: Path) -> None:
    """SGLang gets the absolute path of a vision tower inside the model's folder."""
    (tmp_path / "eyes").mkdir()
    for tower, overrides in (("eyes", {"mm_vision_tower": "{folder}/eyes"}), ("openai/clip", {}), (str(tmp_path), {})):
        (tmp_path / "config.json").write_text(json.dumps({"mm_vision_tower": tower}))
        assert resolve(str(tmp_path)).overrides == overrides


@pytest.mark.parametrize("config", ["{", "[]"])
def test_a_folder_with_a_broken_config_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=r"its config\.json cannot be read"):
        resolve(str(tmp_path))


def test_any_other_hugging_face_id_is_served_under_its_own_name() -> None:
    preset = resolve("Qwen/Qwen2.5-0.5B-Instruct")
    assert (preset.model, preset.served_name) == ("Qwen/Qwen2.5-0.5B-Instruct",) * 2
    assert not preset.is_embedded


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("smollm", "did you mean smollm2-135m?"),
        ("Llama-2", "did you mean llama-2-7b-chat?"),
        ("xyz", "unknown model xyz: there are llava-v1.6-vicuna-7b, llama-2-7b-chat"),
        ("./no-such-folder", "there is no folder ./no-such-folder"),
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("two words/model", "unknown model two words/model"),
    ],
)
def test_an_unknown_model_gets_one_line_that_helps(model: str, says: str) -> None:
    with pytest.raises(ModelError) as refusal:
        resolve(model)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(str(tmp_path))
