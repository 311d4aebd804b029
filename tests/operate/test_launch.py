import pytest

from balancer.operate.launch import Launch, masked, understand

SEED_LLAVA = """
conda activate sglang
echo 'Starting sglang openai api server...'
export PATH=$PATH:/sbin/
python -m sglang.launch_server --model-path $MODEL_NAME \\
  --tokenizer-path $TOKENIZER_NAME \\
  --chat-template vicuna_v1.1 \\
  --host 0.0.0.0 --port 8000
"""


def test_a_script_like_the_seeds_is_understood() -> None:
    variables = {"MODEL_NAME": "a/llava", "TOKENIZER_NAME": "b/tok", "PATH": "/bin"}
    assert understand(SEED_LLAVA, variables) == Launch(
        model="a/llava",
        flags=("--tokenizer-path", "b/tok", "--chat-template", "vicuna_v1.1"),
        gpus=None,
        envs={"PATH": "/bin:/sbin/"},
        left_out=(),
    )


@pytest.mark.parametrize(
    "script",
    [
        "python -m sglang.launch_server --model-path a/b",
        "python3 -u -m sglang.launch_server --model a/b --port 1 --host h",
        "exec /opt/venv/bin/python3.11 -m sglang.launch_server --model-path=a/b --port=1",
        "nohup sglang serve --model-path a/b",
        "python -m replica --model a/b --port 8000",
        "set -e; source venv/bin/activate && python -m sglang.launch_server --model-path 'a/b'",
        "python -m sglang.launch_server --model-path ${M:-a/b} # comment",
        "M=a/b\npython -m sglang.launch_server --model-path $M",
        "MODEL=a/b python -m replica",
        'python -m sglang.launch_server --model-path "a/b" $NOTHING',
    ],
)
def test_every_way_to_start_one_server(script: str) -> None:
    launch = understand(script, {"NOTHING": ""})
    assert launch is not None
    assert (launch.model, launch.flags, launch.gpus) == ("a/b", (), None)


@pytest.mark.parametrize("flag", ["--tp 4", "--tp-size=4", "--tensor-parallel-size $N"])
def test_tensor_parallel_size_says_how_many_gpus(flag: str) -> None:
    launch = understand(f"sglang serve --model-path a/b {flag} --x", {"N": "4"})
    assert launch is not None
    assert (launch.gpus, launch.flags) == (4, ("--x",))


def test_flags_after_the_marker_are_sglangs() -> None:
    launch = understand("python -m replica --model m --gpus 2 -- --mem-fraction-static 0.8 --port 9", {})
    assert launch is not None
    assert (launch.model, launch.gpus, launch.flags) == ("m", 2, ("--mem-fraction-static", "0.8", "--port", "9"))


def test_a_variable_that_holds_several_flags_is_several_flags() -> None:
    launch = understand("sglang serve --model-path a/b $MORE", {"MORE": "--x 1 --y"})
    assert launch is not None
    assert launch.flags == ("--x", "1", "--y")


def test_a_variable_of_the_server_alone() -> None:
    launch = understand("CUDA_VISIBLE_DEVICES=1 sglang serve --model-path a/b", {})
    assert launch is not None
    assert launch.envs == {"CUDA_VISIBLE_DEVICES": "1"}


def test_other_commands_are_named() -> None:
    launch = understand("pip list\nhuggingface-cli login --token $T && sglang serve --model-path a/b", {"T": "hush"})
    assert launch is not None
    assert launch.left_out == ("pip list", "huggingface-cli login --token ***")


@pytest.mark.parametrize(
    "script",
    [
        "",
        "python -m http.server 8000",
        "sglang serve",
        "python -m sglang.launch_server --model-path $UNKNOWN",
        "python -m sglang.launch_server --model-path $(cat model)",
        "python -m sglang.launch_server --model-path `cat model`",
        "sglang serve --model-path a/b | tee log",
        "sglang serve --model-path a/b > log 2>&1",
        "sglang serve --model-path a/b &",
        "(sglang serve --model-path a/b)",
        "if true; then sglang serve --model-path a/b; fi",
        "sglang serve --model-path a/b --x 'no end",
        "sglang serve --model-path a/b\nsglang serve --model-path a/b --port 2",
        "sglang serve --model-path a/b --x '$Y'",
        "python -m replica --model a/b --device cpu",
        "trap 'echo x' EXIT; sglang serve --model-path a/b",
    ],
)
def test_what_needs_a_shell_or_is_no_server_is_left_to_bash(script: str) -> None:
    assert understand(script, {"Y": "y"}) is None


def test_secrets_among_flags_are_masked() -> None:
    flags = ["--api-key", "hush", "--admin-api-key=hush", "--hf-token", "hush", "--tokenizer-path", "t"]
    assert masked(flags) == ["--api-key", "***", "--admin-api-key=***", "--hf-token", "***", "--tokenizer-path", "t"]
