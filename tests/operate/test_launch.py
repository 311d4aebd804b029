import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from balancer.operate.recipe.launch import PORT_MARK, Launch, hidden, masked, read, understand
from balancer.operate.recipe.script import Misread

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
        "sglang serve a/b",
        "sglang serve a/b --port 8000 --host 0.0.0.0",
        "sglang serve --model-type llm a/b --port ${GROUNDSERVE_PORT:-8000}",
        "sglang serve --model a/b --model-type=auto",
        ".venv/bin/sglang serve a/b",
        "uv run sglang serve a/b",
        "uv run --frozen --with sglang python -m sglang.launch_server --model-path a/b",
        "uv run -m sglang.launch_server --model-path a/b",
        "exec env A=1 B=2 python3 -u -m sglang.launch_server --model-path a/b",
        "env sglang serve a/b",
        "sglang \\\n  serve \\\n  a/b # comment \\\n",
        "# if this were a script | with pipes\n\nsglang serve a/b",
        "sglang serve a/\\\nb",
        "export M=a/b N\nsglang serve $M",
        "apt-get update && sudo apt-get install -y x\nuv pip install sglang[all]\npython -m pip list\nsglang serve a/b",
        "sglang serve a/x --model-path=a/b",
        "sglang serve --model-pa a/b --por 8000",
        'ulimit -n 65536; nvidia-smi; echo "it\'s * [here] {a,b}"; sglang serve a/b',
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
        "sglang serve a/b 2>&1 | tee log",
        "sglang serve a/b || echo failed",
        "sglang serve --config all.yaml",
        "sglang serve a/b --model-type diffusion",
        "sglang serve --help",
        "sglang serve a/b --port",
        "sglang serve a/b --tp many",
        "sglang serve a/b --x *.json",
        "sglang serve a/b --x {1,2}",
        "sglang serve a/b --x ~nobody/x",
        "sglang serve a/b --x $1",
        "sglang serve a/b --x $'a'",
        "sglang serve a/b --x ${Y%y}",
        "sglang serve a/b --x \\$Y",
        "sglang serve a/b <<END\nEND",
        "numactl --cpunodebind=0 sglang serve a/b",
        "env -u A sglang serve a/b",
        "uv run --env-file .env sglang serve a/b",
        "uv run --directory x sglang serve a/b",
        "python -X dev -m sglang.launch_server --model-path a/b",
        "python prepare.py && sglang serve a/b",
        "mkdir -p models; sglang serve a/b",
        "huggingface-cli download a/b && sglang serve a/b",
        "source .env && sglang serve a/b",
        "set -a; . .env; sglang serve a/b",
        "cd; sglang serve a/b",
        "cd - && sglang serve a/b",
        "cd x || exit; sglang serve a/b",
        "export -n A; sglang serve a/b",
        "PATH+=:x sglang serve a/b",
        "[ -d x ] && sglang serve a/b",
        "sglang serve a/b; ;",
        "python -m replica a/b",
        "python -m replica --model a/b --gpu-kinds L4",
    ],
)
def test_what_needs_a_shell_or_is_no_server_is_left_to_bash(script: str) -> None:
    assert understand(script, {"Y": "y"}) is None


def test_script_that_changes_folder() -> None:
    """A script starts its server in the folder that it changes to."""
    launch = understand("cd /models && cd $SUB\nsglang serve ./llama; cd /elsewhere", {"SUB": "a b", "X": ""})
    assert launch is None, "two words are no folder"
    launch = understand('cd /models && cd "$SUB/.."\nsglang serve ./llama; cd /elsewhere', {"SUB": "a b"})
    assert launch is not None
    assert (launch.folder, launch.model) == ("/models/a b/..", "./llama")


def test_what_a_script_exports_and_what_it_keeps_to_itself() -> None:
    script = "A=1\nB=2\nexport B C=3\nHOME=/x\nD=4 E=~/y env F=6 sglang serve a/$A"
    launch = understand(script, {"HOME": "/root"})
    assert launch is not None
    assert launch.envs == {"B": "2", "C": "3", "HOME": "/x", "D": "4", "E": "/x/y", "F": "6"}
    assert launch.model == "a/1"


def test_a_replicas_own_port_stands_wherever_the_script_puts_it() -> None:
    launch = understand("export L=log-$P\nsglang serve a/b --port $P --x http://h:$P/y", {"P": PORT_MARK})
    assert launch is not None
    placed = launch.at_port(20500)
    assert (placed.flags, placed.envs) == (("--x", "http://h:20500/y"), {"L": "log-20500"})


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("sglang serve a/b | tee log", "it has a | in it"),
        ("if true; then sglang serve a/b; fi", "it has `if` in it"),
        ("./prepare --token hush; sglang serve a/b", "`./prepare` may have to run too"),
        ("sglang serve a/b --x $UNKNOWN", "$UNKNOWN has no value before the script runs"),
        ("sglang serve $(cat model)", "it has `$(` in it"),
        ("sglang serve", "it does not say which model to serve"),
        ("sglang serve a/b\nsglang serve a/b", "it starts two servers"),
    ],
)
def test_what_stands_in_the_way_is_said_without_secrets(script: str, why: str) -> None:
    with pytest.raises(Misread) as obstacle:
        read(script, {})
    assert str(obstacle.value) == why


PIECES = st.sampled_from(
    [
        *(
            "a",
            "--f",
            "b=c",
            " ",
            "  ",
            "\t",
            "#",
            "' '",
            "'x y'",
            '"x  y"',
            '""',
            "''",
            "$A",
            "${A}",
            '"$A"',
            '"${A} z"',
            "$B",
        ),
        *(
            "${B}",
            '"$B"',
            "$E",
            '"$E"',
            "${E:-d}",
            "${B:-d}",
            "${NO:-x y}",
            '"${NO:-x y}"',
            "\\ ",
            "\\n",
            "\\'",
            '\\"',
            "\\\n",
        ),
        *(
            "\n",
            ";",
            "&&",
            "~",
            "~/m",
            ":~",
            "=",
            "{",
            "}",
            ",",
            "[",
            "*",
            "?",
            "'#'",
            '"\\\\"',
            '"\\""',
            '"a\\n"',
            "é",
            ":",
            "/",
            ".",
            "!",
            "%",
            "@",
        ),
    ]
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(PIECES, max_size=7),
    around=st.sampled_from(["{} --flag <>", 'V=<>\n{} --flag "$V"', "export V=<> && {} --flag $V", "{} --flag=<> $A"]),
)
def test_what_is_understood_is_what_bash_makes_of_it(tmp_path: Path, pieces: list[str], around: str) -> None:
    """Random words around a flag, given to bash with a program in SGLang's place that says what it got."""
    variables = {"A": "one", "B": " two  three", "E": "", "HOME": "/home/x"}
    script = around.replace("{}", "sglang serve --model-path m").replace("<>", "".join(pieces))
    try:
        launch = read(script, variables)
    except Misread:
        return
    (program := tmp_path / "sglang").write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    program.chmod(0o755)
    done = subprocess.run(
        ["/bin/bash", "-c", script],
        env={**variables, "PATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    got = done.stdout.decode().split("\0")[:-1]
    assert got[:3] == ["serve", "--model-path", "m"]
    assert launch.flags == tuple(got[3:]), script


def test_secrets_among_flags_are_masked() -> None:
    flags = ["--api-key", "hush", "--admin-api-key=hush", "--hf-token", "hush", "--tokenizer-path", "t"]
    assert masked(flags) == ["--api-key", "***", "--admin-api-key=***", "--hf-token", "***", "--tokenizer-path", "t"]


def test_keys_are_in_no_command_line() -> None:
    flags, variables = hidden(["--api-key", "--odd", "--admin-api-key=hush", "--tokenizer-path", "t"])
    names = [f"GROUNDSERVE_SECRET_{number}" for number in (1, 2)]
    assert flags == ["--api-key", f"@env:{names[0]}", f"--admin-api-key=@env:{names[1]}", "--tokenizer-path", "t"]
    assert variables == dict(zip(names, ("--odd", "hush"), strict=True))


@pytest.mark.parametrize(
    ("flags", "gpus", "more"),
    [
        ("--tp 4", 4, ""),
        ("--tp 2 --dp 2", 4, "--dp 2 --tp-size 2"),
        ("--tp-size=2 --dp-size=2", 4, "--dp-size=2 --tp-size 2"),
        ("--tp 2 --pp-size 2", 4, "--pp-size 2 --tp-size 2"),
        ("--dp-size 2", 2, "--dp-size 2 --tp-size 1"),
        ("--tp 2 --dp 2 --pipeline-parallel-size 3", 12, "--dp 2 --pipeline-parallel-size 3 --tp-size 2"),
        ("--tp 8 --dp 8 --enable-dp-attention", 8, "--dp 8 --enable-dp-attention"),
        ("--dp 1", None, "--dp 1"),
        ("", None, ""),
    ],
)
def test_gpus_of_all_parallel_sizes_are_counted(flags: str, gpus: int | None, more: str) -> None:
    launch = understand(f"sglang serve a/b {flags}", {})
    assert launch is not None
    assert (launch.gpus, " ".join(launch.flags)) == (gpus, more)


@pytest.mark.parametrize("size", ["0", "two", "-1", "--port", ""])
def test_a_parallel_size_that_is_none_is_left_to_bash(size: str) -> None:
    assert understand(f"sglang serve a/b --dp {size}", {}) is None


@pytest.mark.parametrize("braces", ["{a,b}", "{1..3}", "{,}", '{"a",b}', "{$A,b}"])
@pytest.mark.parametrize("script", ["export V=<> && sglang serve m --flag $V", "sglang serve m --flag <>"])
def test_braces_are_left_to_bash(script: str, braces: str) -> None:
    """Braces that bash expands to several words are left to bash."""
    assert understand(script.replace("<>", braces), {"A": "one"}) is None
