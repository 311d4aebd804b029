"""replica/options.py: flags, environment, defaults, and what is refused."""

import re
from pathlib import Path

import pytest

from replica.media import MediaPolicy
from replica.options import (
    SECRETS_FILE,
    Options,
    OptionsError,
    lease_folder,
    models_dir,
    read,
    read_secret,
    shared_folder,
    with_secrets,
)


def test_flag_environment_default() -> None:
    """A flag overrides the environment, which overrides the default."""
    environ = {"MODEL": "tiny-llava", "REPLICA_PORT": "9000", "GPUS_PER_REPLICA": "2"}
    told = read(["--port", "9001"], environ)
    assert (told.model, told.port, told.gpus, told.host) == ("tiny-llava", 9001, 2, "127.0.0.1")


def test_secrets_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secrets"
    file.write_text('{"HF_TOKEN": "hush", "LAB_FLAGS": "--a b"}')
    environ = {SECRETS_FILE: str(file), "HF_TOKEN": "", "HOME": "/root"}
    assert with_secrets(environ) == {**environ, "HF_TOKEN": "hush", "LAB_FLAGS": "--a b"}
    assert with_secrets({"HOME": "/root"}) == {"HOME": "/root"}
    for text in ("", "[]", '{"A": 1}', "hush"):
        file.write_text(text)
        with pytest.raises(OptionsError, match="is no JSON object of variables") as error:
            with_secrets(environ)
        assert "hush" not in str(error.value)
    with pytest.raises(OptionsError, match="No such file"):
        with_secrets({SECRETS_FILE: str(tmp_path / "none")})


def test_empty_variables_count_as_unset() -> None:
    told = read([], dict.fromkeys(["MODEL", "REPLICA_PORT", "GPUS_PER_REPLICA", "LEASE_WAIT", "LEASE_DIR"], ""))
    assert told == Options(models_dir=told.models_dir)


def test_sglang_flags() -> None:
    """Flags after -- go to SGLang, after those of SGLANG_ARGS."""
    told = read(["--model", "x/y", "--", "--log-level", "debug"], {"SGLANG_ARGS": "--chat-template 'a b' --tp-size 2"})
    assert told.sglang_args == ("--chat-template", "a b", "--tp-size", "2", "--log-level", "debug")


@pytest.mark.parametrize(
    ("arguments", "environ", "says"),
    [
        (["--port", "70000"], {}, "--port 70000"),
        (["--port", "http"], {}, "--port http"),
        (["--gpus", "0"], {}, "--gpus 0"),
        ([], {"GPUS_PER_REPLICA": "-1"}, "--gpus -1"),
        ([], {"REPLICA_DEVICE": "tpu"}, "REPLICA_DEVICE=tpu"),
        ([], {"LEASE_WAIT": "long"}, "LEASE_WAIT=long"),
        ([], {"LEASE_WAIT": "inf"}, "LEASE_WAIT=inf"),
        ([], {"SGLANG_ARGS": "--a 'b"}, "SGLANG_ARGS"),
        ([], {"HF_TOKEN_FILE": "/nowhere/token"}, "HF_TOKEN_FILE=/nowhere/token cannot be read"),
        ([], {"SGLANG_API_KEY_FILE": "/nowhere/key"}, "SGLANG_API_KEY_FILE=/nowhere/key cannot be read"),
        ([], {"SGLANG_API_KEY_FILE": "/dev/null"}, "is empty"),
        ([], {"SGLANG_PLATFORM": "other"}, "SGLANG_PLATFORM=other keeps SGLang from loading groundserve's plug-in"),
        ([], {"ALLOW_PRIVATE_MEDIA": "maybe"}, "ALLOW_PRIVATE_MEDIA=maybe"),
        (["--allowed-local-media-path", "/nowhere"], {}, "ALLOWED_LOCAL_MEDIA_PATH=/nowhere: this is not a folder"),
    ],
)
def test_a_bad_value_is_refused_by_name(arguments: list[str], environ: dict[str, str], says: str) -> None:
    with pytest.raises(OptionsError) as refusal:
        read(arguments, environ)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_token_comes_from_the_variable_or_its_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("hf_fromfile\n")
    assert read([], {"HF_TOKEN_FILE": str(file)}).hf_token == "hf_fromfile"
    assert read([], {"HF_TOKEN_FILE": str(file), "HF_TOKEN": "hf_direct"}).hf_token == "hf_direct"
    file.write_bytes(b"\xef\xbb\xbfhf_fromwindows\r\n")
    assert read([], {"HF_TOKEN_FILE": str(file)}).hf_token == "hf_fromwindows"
    file.write_text("")
    assert read([], {"HF_TOKEN_FILE": str(file)}).hf_token is None


def test_the_token_is_not_in_what_is_printed() -> None:
    assert "hf_secret" not in repr(read([], {"HF_TOKEN": "hf_secret"}))


def test_a_secret_of_several_words_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("two words\n")
    with pytest.raises(OptionsError, match="one word"):
        read_secret(file, "SGLANG_API_KEY_FILE")


def test_models_lie_where_models_dir_says_else_in_the_checkout(tmp_path: Path) -> None:
    assert models_dir({"MODELS_DIR": str(tmp_path)}) == tmp_path
    assert models_dir({}) == Path(__file__).resolve().parents[2] / ".models"


def test_allowed_media(tmp_path: Path) -> None:
    """Allowed media come from flags or the environment."""
    flags = ["--allowed-media-domains", "a.example,b.example", "--allowed-local-media-path", str(tmp_path)]
    wanted = MediaPolicy(frozenset({"a.example", "b.example"}), tmp_path.resolve(), True)
    assert read([*flags, "--allow-private-media"], {}).media == wanted
    environ = {"ALLOWED_MEDIA_DOMAINS": "a.example b.example", "ALLOWED_LOCAL_MEDIA_PATH": str(tmp_path)}
    assert read([], {**environ, "ALLOW_PRIVATE_MEDIA": "1"}).media == wanted
    assert read([], {}).media == MediaPolicy()


def test_leases_lie_in_the_folder_that_root_has_made_for_all(tmp_path: Path) -> None:
    made = tmp_path / "groundserve"
    assert lease_folder(made) == shared_folder() / "groundserve-leases"
    made.mkdir()
    assert lease_folder(made) == made


@pytest.mark.parametrize(
    ("variables", "flags", "says"),
    [
        ({"GPU_SHARE": "maybe"}, [], "GPU_SHARE=maybe: use yes or no"),
        ({"GPU_SLICE": "-1"}, [], "GPU_SLICE=-1: use a number of seconds"),
        ({"GPU_SHARE": "yes"}, ["--", "--lora-paths", "a=b"], "--lora-paths: LoRA and a GPU that is shared"),
        ({}, ["--gpu-share", "--exec", "--", "vllm"], "--gpu-share is for SGLang alone"),
    ],
)
def test_what_cannot_share_is_refused(variables: dict[str, str], flags: list[str], says: str) -> None:
    with pytest.raises(OptionsError, match=re.escape(says)):
        read(flags, variables)


def test_sharing_is_off_unless_it_is_asked_for() -> None:
    assert not read([], {}).gpu_share
    assert read([], {"GPU_SHARE": "yes"}).gpu_share
    assert read(["--gpu-share", "--", "--dp-size", "1"], {}).gpu_share
