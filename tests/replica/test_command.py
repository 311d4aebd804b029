"""replica/command.py: settings, preset and lease to argv and environment."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from replica.command import build, masked, visible
from replica.gpu import Gpu
from replica.media import MediaPolicy
from replica.options import Options
from replica.presets import PREFILL_SIZES, PRESETS, resolve

GPUS = (Gpu(2, "GPU-c", "NVIDIA L4", 23034, 0), Gpu(3, "GPU-d", "NVIDIA L4", 23034, 0))
TOLD = Options(port=8123, models_dir=Path("/models"))


def value(argv: tuple[str, ...], flag: str) -> str:
    return argv[argv.index(flag) + 1]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("gpus", [(), GPUS[:1], GPUS], ids=["cpu", "one gpu", "two gpus"])
def test_every_preset_says_model_name_address_seed_and_reports(name: str, gpus: tuple[Gpu, ...]) -> None:
    argv = build(TOLD, PRESETS[name], gpus, seed=7, environ={}).argv
    assert argv[:3] == (sys.executable, "-m", "sglang.launch_server")
    assert value(argv, "--model-path") == (PRESETS[name].model or f"/models/{name}")
    assert value(argv, "--served-model-name") == PRESETS[name].served_name
    assert (value(argv, "--host"), value(argv, "--port")) == ("127.0.0.1", "8123")
    assert value(argv, "--random-seed") == "7"
    assert {"--enable-metrics", "--enable-cache-report"} < set(argv)
    assert "--max-queued-requests" not in argv  # a full streaming request would be a 200 with an error inside


def test_cpu_flags() -> None:
    """A CPU replica runs with torch's own attention and one thread."""
    command = build(TOLD, PRESETS["smollm2-135m"], (), seed=1, environ={})
    assert value(command.argv, "--device") == "cpu"
    assert value(command.argv, "--attention-backend") == "torch_native"
    assert value(command.argv, "--context-length") == "4096"
    assert "--sleep-on-idle" in command.argv
    assert command.environ["SGLANG_USE_CPU_ENGINE"] == "1"
    assert command.environ["OMP_NUM_THREADS"] == "1"
    assert command.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert command.environ["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_of_embedded_models(dtype: str) -> None:
    """Only the embedded models take the number type that the CPU multiplies fastest."""
    small = build(TOLD, PRESETS["tiny-llava"], (), seed=1, environ={}, cpu_dtype=dtype).argv
    assert value(small, "--dtype") == dtype
    assert "--dtype" not in build(TOLD, PRESETS["llama-2-7b-chat"], (), seed=1, environ={}, cpu_dtype=dtype).argv
    assert "--dtype" not in build(TOLD, PRESETS["tiny-llava"], GPUS[:1], seed=1, environ={}, cpu_dtype=dtype).argv


def test_a_leased_gpu_is_given_by_its_index_in_bus_order() -> None:
    command = build(TOLD, PRESETS["llama-2-7b-chat"], GPUS[:1], seed=1, environ={})
    assert command.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert command.environ["CUDA_VISIBLE_DEVICES"] == "2"
    assert "SGLANG_USE_CPU_ENGINE" not in command.environ
    meant_for_another = build(
        TOLD, PRESETS["llama-2-7b-chat"], GPUS[:1], seed=1, environ={"SGLANG_USE_CPU_ENGINE": "1"}
    )
    assert meant_for_another.environ["SGLANG_USE_CPU_ENGINE"] == "0"
    assert "HF_HUB_OFFLINE" not in command.environ
    assert not {"--device", "--tp-size", "--context-length"} & set(command.argv)


def test_a_gpu_whose_index_may_be_wrong_is_given_by_its_uuid() -> None:
    uncertain = [replace(gpu, has_cuda_index=False) for gpu in GPUS]
    assert visible(uncertain[:1])["CUDA_VISIBLE_DEVICES"] == GPUS[0].uuid
    assert visible(uncertain)["CUDA_VISIBLE_DEVICES"] == "2,3"  # SGLang takes nothing else for several


def test_several_gpus_are_one_tensor_parallel_group() -> None:
    command = build(TOLD, PRESETS["llama-2-7b-chat"], GPUS, seed=1, environ={})
    assert command.environ["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert value(command.argv, "--tp-size") == "2"


def test_prefill_graphs_of_a_preset_are_for_gpus() -> None:
    """Fewer than SGLang would capture, so that a start takes less; a person's own sizes come last and win."""
    preset = PRESETS["llama-2-7b-chat"]
    argv = build(TOLD, preset, GPUS, seed=1, environ={}).argv
    sizes = argv[argv.index("--cuda-graph-bs-prefill") + 1 : argv.index("--tp-size")]
    assert [int(size) for size in sizes] == list(PREFILL_SIZES)
    assert "--cuda-graph-bs-prefill" not in build(TOLD, preset, (), seed=1, environ={}).argv
    told = Options(models_dir=Path("/models"), sglang_args=("--cuda-graph-bs-prefill", "64"))
    assert build(told, preset, GPUS[:1], seed=1, environ={}).argv[-2:] == told.sglang_args


def test_without_flashinfer_cuda_runs_on_triton() -> None:
    argv = build(TOLD, PRESETS["llama-2-7b-chat"], GPUS[:1], seed=1, environ={}, has_flashinfer=False).argv
    assert value(argv, "--attention-backend") == "triton"
    assert value(argv, "--sampling-backend") == "pytorch"


def test_the_vision_tower_is_named_by_the_path_it_has_now() -> None:
    argv = build(TOLD, PRESETS["tiny-llava"], (), seed=1, environ={}).argv
    overrides = json.loads(value(argv, "--json-model-override-args"))
    assert overrides == {"mm_vision_tower": "/models/tiny-llava/clip-vision-tower"}


def test_what_the_user_gives_comes_last_and_wins() -> None:
    told = Options(sglang_args=("--context-length", "2048"))
    argv = build(told, PRESETS["smollm2-135m"], (), seed=1, environ={}).argv
    assert argv[-2:] == ("--context-length", "2048")


def test_variables_that_are_set_already_are_left_alone() -> None:
    environ = {"OMP_NUM_THREADS": "4", "SGLANG_TIMEOUT_KEEP_ALIVE": "5", "SGLANG_HEALTH_CHECK_TIMEOUT": "9"}
    made = build(TOLD, PRESETS["smollm2-135m"], (), seed=1, environ=environ).environ
    assert not set(environ) & set(made)


def test_token_and_key_file() -> None:
    """The token goes into the environment, and the path of the key file into argv."""
    told = Options(hf_token="hf_secret", api_key_file=Path("/run/secrets/key"))
    command = build(told, resolve("a/b"), (), seed=1, environ={})
    assert command.environ["HF_TOKEN"] == "hf_secret"
    assert value(command.argv, "--api-key") == "@file:/run/secrets/key"
    assert "hf_secret" not in str(command)
    assert "hf_secret" not in repr(command)


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--api-key", "k1", "--port", "1"], ["--api-key", "***", "--port", "1"]),
        (["--api-key=k1"], ["--api-key=***"]),
        (["--admin-api-key", "k1"], ["--admin-api-key", "***"]),
        (["--ssl-keyfile-password", "p"], ["--ssl-keyfile-password", "***"]),
        (["--api-key", "@file:/run/key"], ["--api-key", "@file:/run/key"]),
        (["--max-total-tokens", "5", "--tokenizer-path", "t"], ["--max-total-tokens", "5", "--tokenizer-path", "t"]),
        (["--ssl-keyfile", "/k.pem"], ["--ssl-keyfile", "/k.pem"]),
    ],
)
def test_secrets_are_masked_where_a_command_is_shown(argv: list[str], shown: list[str]) -> None:
    assert masked(argv) == shown


def test_plug_ins_and_warnings_of_the_environment() -> None:
    """An environment that chooses plug-ins, or turns warnings into errors, changes nothing."""
    environ = {"SGLANG_PLUGINS": "theirs", "PYTHONWARNINGS": "error"}
    made = build(TOLD, PRESETS["smollm2-135m"], (), seed=1, environ=environ).environ
    assert made["SGLANG_PLUGINS"] == "theirs,groundserve"
    assert made["PYTHONWARNINGS"] == "ignore::UserWarning"


def test_what_media_are_allowed_is_told_to_the_plug_in(tmp_path: Path) -> None:
    told = Options(media=MediaPolicy(frozenset({"b.example", "a.example"}), tmp_path, True))
    made = build(told, PRESETS["tiny-llava"], (), seed=1, environ={})
    assert made.environ["ALLOWED_MEDIA_DOMAINS"] == "a.example b.example"
    assert made.environ["ALLOWED_LOCAL_MEDIA_PATH"] == str(tmp_path)
    assert made.environ["ALLOW_PRIVATE_MEDIA"] == "1"
    nothing = build(TOLD, PRESETS["tiny-llava"], (), seed=1, environ={}).environ
    assert (nothing["ALLOWED_LOCAL_MEDIA_PATH"], nothing["ALLOW_PRIVATE_MEDIA"]) == ("", "0")


def test_sglang_without_the_plug_in() -> None:
    """An SGLang that did not load the plug-in does not know one of the flags."""
    assert "--with-groundserve-plugin" in build(TOLD, PRESETS["smollm2-135m"], (), seed=1, environ={}).argv


def test_parsers_are_chosen_by_the_model_where_sglang_can() -> None:
    """For tool calls and reasoning; a person's own choice comes after ours, and so wins."""
    told = Options(models_dir=Path("/models"), sglang_args=("--tool-call-parser", "hermes"))
    argv = build(told, PRESETS["llama-2-7b-chat"], GPUS[:1], seed=1, environ={}).argv
    assert value(argv, "--reasoning-parser") == "auto"
    assert [argv[i + 1] for i, flag in enumerate(argv) if flag == "--tool-call-parser"] == ["auto", "hermes"]
    old = build(told, PRESETS["llama-2-7b-chat"], GPUS[:1], seed=1, environ={}, parsers=None).argv
    assert "auto" not in old
    qwen = build(TOLD, resolve("Qwen/Qwen2.5-7B-Instruct"), GPUS[:1], seed=1, environ={}, parsers=("qwen", "auto"))
    assert value(qwen.argv, "--tool-call-parser") == "qwen"
    assert "auto" not in build(told, PRESETS["smollm2-135m"], (), seed=1, environ={}).argv


def test_context_length_that_memory_limits() -> None:
    """Where the memory sets the limit it is said, and a person's own comes last."""
    told = Options(models_dir=Path("/models"), sglang_args=("--context-length", "512"))
    argv = build(told, PRESETS["llama-2-7b-chat"], GPUS[:1], seed=1, environ={}, context=9000).argv
    assert [argv[i + 1] for i, flag in enumerate(argv) if flag == "--context-length"] == ["9000", "512"]
    assert "--context-length" not in build(TOLD, PRESETS["llama-2-7b-chat"], GPUS[:1], seed=1, environ={}).argv


def test_sharing_flags() -> None:
    """A replica that shares its GPU can give its memory back, and keeps no core busy."""
    shares = {"--enable-memory-saver", "--enable-weights-cpu-backup", "--sleep-on-idle"}
    told = Options(gpu_share=True)
    assert shares <= set(build(told, PRESETS["smollm2-135m"], GPUS[:1], seed=1, environ={}).argv)
    assert not shares & set(build(TOLD, PRESETS["smollm2-135m"], GPUS[:1], seed=1, environ={}).argv)
    # A CPU has nothing to save, and sleeps in any case.
    assert shares & set(build(told, PRESETS["smollm2-135m"], (), seed=1, environ={}).argv) == {"--sleep-on-idle"}
