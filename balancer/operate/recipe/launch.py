"""Finds the SGLang command in a `run:` script, if starting SGLang is all that the script does.

SkyServe runs `run:` with bash on a machine of its own. Here a script that only starts SGLang becomes
a replica (`python -m replica`, which leases GPUs and knows this machine); bash runs any other script unchanged.
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from balancer.operate.recipe.script import Misread, Word, commands

# Marks the name of a variable in the place of a flag's value; the replica's plug-in for SGLang puts the value there.
VARIABLE_MARK = "@env:"

# Placeholder for the port: each replica has its own, which `at_port` fills in.
PORT_MARK = "${GROUNDSERVE_PORT}"

# Commands that make no difference to a server that `python -m replica` starts.
_WITHOUT_EFFECT = {"echo", "printf", "nvidia-smi", "true", ":", "date", "pwd", "ls", "hostname"}
# Commands that set up what groundserve provides itself: a note names them, and they are not run.
_INSTALLERS = {"pip", "pip3", "conda", "mamba", "apt", "apt-get", "ulimit", "sleep"}
_LOGINS = (("huggingface-cli", "login"), ("hf", "auth"), ("uv", "pip"), ("uv", "sync"), ("uv", "venv"))
_ACTIVATES = re.compile(r"(.*/)?(activate|conda\.sh|\.?(bashrc|bash_profile|profile))")
_SECRET_FLAG = re.compile(r"--(.*-)?(key|keys|password|passphrase|secret|token)")
_PYTHON = re.compile(r"(.*/)?python(3(\.\d+)?)?")
_SGLANG = re.compile(r"(.*/)?sglang")
# Python flags that make no difference to a server, and `uv run` flags (without and with a value) that only choose its
# environment, which groundserve provides itself.
_OF_PYTHON = {"-u", "-B", "-s", "-P"}
_OF_UV = {"--active", "--frozen", "--locked", "--no-sync", "--isolated", "--no-project", "--offline", "--all-extras"}
_OF_UV |= {"--no-dev", "--exact", "-q", "--quiet", "-v", "--verbose"}
_OF_UV_WITH_VALUE = {"--with", "--python", "-p", "--project", "--extra", "--group", "--index-url", "--index"}
# SGLang flags that groundserve sets itself.
_OURS = {
    "--model-path": "model",
    "--model": "model",
    "--host": "host",
    "--port": "port",
    "--gpus": "gpus",
    "--tp": "gpus",
    "--tp-size": "gpus",
    "--tensor-parallel-size": "gpus",
}
# Sizes that, like the tensor parallel size, multiply the number of GPUs that a server takes.
_SIZES = {
    **dict.fromkeys(("--dp", "--dp-size", "--data-parallel-size"), "dp"),
    **dict.fromkeys(("--pp", "--pp-size", "--pipeline-parallel-size"), "pp"),
}
# With this flag, data parallel ranks share the GPUs of the tensor parallel group.
_SHARED = "--enable-dp-attention"
# With one of these flags SGLang serves nothing.
_NOT_OURS = {"--help", "-h", "--version"}


@dataclass(frozen=True, slots=True)
class Launch:
    """How a script starts its server: SGLang's model and its other flags, without host and port."""

    model: str
    flags: tuple[str, ...]
    # GPUs that one server takes, according to its parallel sizes or --gpus; None if the script does not say.
    gpus: int | None
    # Environment variables that the script sets for the server, on top of the service's envs.
    envs: Mapping[str, str]
    # Commands of the script that are not run, with keys and tokens replaced by ***.
    left_out: tuple[str, ...]
    # The folder that the script changes to first, relative to the one it is started in.
    folder: str = ""

    def at_port(self, port: int | str) -> "Launch":
        """The launch for a replica on this port, filled in where the script uses the port outside --port."""

        def filled(text: str) -> str:
            return text.replace(PORT_MARK, str(port))

        envs = {name: filled(value) for name, value in self.envs.items()}
        return replace(self, model=filled(self.model), flags=tuple(map(filled, self.flags)), envs=envs)


def understand(script: str, variables: Mapping[str, str]) -> Launch | None:
    """The only SGLang command of a bash script, variables filled in; None if the script does anything else."""
    try:
        return read(script, variables)
    except Misread:
        return None


def read(script: str, variables: Mapping[str, str]) -> Launch:
    """Like `understand`, but raises Misread, whose message names the obstacle."""
    variables, exported = dict(variables), set(variables)
    exports: dict[str, str] = {}
    left_out: list[str] = []
    folder = ""
    found: Launch | None = None
    for command in commands(script):
        assigned, rest = _assignments(command, variables)
        if not rest:
            variables |= assigned
            exports |= {name: value for name, value in assigned.items() if name in exported}
        elif rest[0].source == "export":
            for word in rest[1:]:
                name, value = _exported(word, variables)
                exported.add(name)
                if value is not None:
                    exports[name] = variables[name] = value
        elif (what := _around(rest)) is _Around.FOLDER:
            folder = folder if found else _joined(folder, rest, variables)
        elif what is _Around.LEFT_OUT:
            left_out.append(_shown(rest))
        elif what is _Around.SERVER:
            server, given = _server([field for word in rest for field in word.fields(variables)])
            if server is None:
                raise Misread(f"`{rest[0].source}` may have to run too")
            if found is not None:
                raise Misread("it starts two servers")
            found = _launch(*server, {**exports, **assigned, **given}, variables)
    if found is None:
        raise Misread("it starts no SGLang")
    return replace(found, left_out=tuple(left_out), folder=folder)


class _Around(Enum):
    """What a command means for the server: possibly the server, its folder, a command to leave out, or nothing."""

    SERVER = auto()
    FOLDER = auto()
    LEFT_OUT = auto()
    NOTHING = auto()


def _around(command: list[Word]) -> _Around:
    first, second = command[0].source, command[1].source if len(command) > 1 else ""
    if first == "cd":
        return _Around.FOLDER
    if first == "set":
        if any(word.source in ("-a", "allexport") or re.match("-[a-z]*a", word.source) for word in command):
            raise Misread("it has `set -a` in it")
        return _Around.NOTHING
    if first in _WITHOUT_EFFECT or (first == "conda" and second in ("activate", "deactivate")):
        return _Around.NOTHING
    if first in ("source", ".") and _ACTIVATES.fullmatch(second.strip("'\"")):
        return _Around.NOTHING
    if first == "sudo":
        first = second
    is_pip = bool(_PYTHON.fullmatch(first)) and [word.source for word in command[1:3]] == ["-m", "pip"]
    if first in _INSTALLERS or (first, second) in _LOGINS or is_pip:
        return _Around.LEFT_OUT
    return _Around.SERVER


def _exported(word: Word, variables: Mapping[str, str]) -> tuple[str, str | None]:
    """The name and value of one word after `export`; the value is None if the variable has none."""
    if name := word.assigned:
        word.refuse_braces()
        return name, word.text(variables)[len(name) + 1 :]
    if not re.fullmatch(r"[A-Za-z_]\w*", word.source):
        raise Misread("it has an `export` with more than names and values in it")
    return word.source, variables.get(word.source)


def _assignments(command: list[Word], variables: Mapping[str, str]) -> tuple[dict[str, str], list[Word]]:
    """The NAME=VALUE words that a command begins with, and the rest of the command."""
    assigned: dict[str, str] = {}
    rest = list(command)
    while rest and (name := rest[0].assigned):
        assigned[name] = rest.pop(0).text({**variables, **assigned})[len(name) + 1 :]
    return assigned, rest


def _joined(folder: str, command: list[Word], variables: Mapping[str, str]) -> str:
    """The current folder after this `cd`."""
    where = [field for word in command[1:] for field in word.fields(variables)]
    if where[:1] == ["--"]:
        where = where[1:]
    if len(where) != 1 or where[0].startswith("-") or not where[0]:
        raise Misread("it has a `cd` with more or less than a folder in it")
    return os.path.join(folder, where[0])  # noqa: PTH118 - Recipe.workdir resolves ".."


def _server(words: list[str]) -> tuple[tuple[str, list[str]] | None, dict[str, str]]:
    """The program that a command starts ("sglang" or "replica") with its arguments, and the variables `env` sets."""
    given: dict[str, str] = {}
    while words and words[0] in ("exec", "nohup", "command", "env", "uv"):
        wrapper, *words = words
        if wrapper == "env":
            while words and (found := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0], re.DOTALL)):
                given[found[1]] = found[2]
                words = words[1:]
        elif wrapper == "uv":
            words = _without_uv(words)
    if len(words) > 1 and _SGLANG.fullmatch(words[0]) and words[1] == "serve":
        return ("sglang", _of_serve(words[2:])), given
    if words and _PYTHON.fullmatch(words[0]):
        rest = words[1:]
        while rest and rest[0] in _OF_PYTHON:
            rest = rest[1:]
        for module, program in (("sglang.launch_server", "sglang"), ("replica", "replica")):
            if rest[:2] == ["-m", module]:
                return (program, rest[2:]), given
    return None, given


def _without_uv(words: list[str]) -> list[str]:
    """The command that `uv run` runs; empty if that is unclear."""
    if words[:1] != ["run"]:
        return []
    words = words[1:]
    while words and words[0].startswith("-"):
        flag, has_value, _ = words[0].partition("=")
        if flag in ("-m", "--module"):
            return ["python", "-m", *words[1:]]
        if flag == "--":
            return words[1:]
        if flag in _OF_UV:
            words = words[1:]
        elif flag in _OF_UV_WITH_VALUE:
            words = words[1 if has_value else 2 :]
        else:
            return []
    return words


def _of_serve(arguments: list[str]) -> list[str]:
    """The arguments that `sglang serve` passes on to the server.

    A model given first becomes --model-path; --model-type is for `serve` alone.
    """
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, has_value, value = word.partition("=")
        if flag != "--model-type":
            rest.append(word)
        elif (value if has_value else next(words, "")) not in ("auto", "llm"):
            raise Misread("it serves another --model-type than llm")
    return ["--model-path", *rest] if rest and not rest[0].startswith("-") else rest


def _launch(program: str, arguments: list[str], envs: Mapping[str, str], variables: Mapping[str, str]) -> Launch:
    own, flags = arguments, []
    has_marker = program == "replica" and "--" in arguments
    if has_marker:
        cut = arguments.index("--")
        own, flags = arguments[:cut], arguments[cut + 1 :]
    taken: dict[str, str] = {}
    rest: list[str] = []
    words = iter(own)
    for word in words:
        flag, has_value, value = word.partition("=")
        if flag in _NOT_OURS:
            raise Misread(f"SGLang is started with {flag}")
        if name := _ours(flag):
            taken[name] = value if has_value else next(words, "")
            if not taken[name]:
                raise Misread(f"{flag} has no value")
        else:
            rest.append(word)
    if program == "replica" and (rest or (has_marker and not flags)):
        raise Misread("it gives `python -m replica` more than model, host, port and GPUs")
    model = taken.get("model") or ({**variables, **envs}.get("MODEL", "") if program == "replica" else "")
    if not model:
        raise Misread("it does not say which model to serve")
    tensor = _size(taken["gpus"]) if "gpus" in taken else None
    if program == "replica":
        return Launch(model, tuple(flags), tensor, envs, ())
    return Launch(model, *_parallel(rest, tensor), envs, ())


def _parallel(flags: list[str], tensor: int | None) -> tuple[tuple[str, ...], int | None]:
    """The flags, and how many GPUs they need in total; adds --tp-size if tensor parallelism is only part of that."""
    sizes: dict[str, int] = {}
    for at, flag in enumerate(flags):
        name, has_value, value = flag.partition("=")
        if known := _SIZES.get(name):
            sizes[known] = _size(value if has_value else "".join(flags[at + 1 : at + 2]))
    if _SHARED in flags:
        sizes.pop("dp", None)
    others = math.prod(sizes.values())
    if others == 1:
        return tuple(flags), tensor
    return (*flags, "--tp-size", str(tensor or 1)), (tensor or 1) * others


def _size(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise Misread(f"{text} is not a number of GPUs")
    return int(text)


def _ours(flag: str) -> str:
    """Which setting of groundserve's this flag gives, if any; like argparse, accepts abbreviated long flags."""
    if flag in _OURS:
        return _OURS[flag]
    meant = {name for known, name in _OURS.items() if len(flag) > 4 and known.startswith(flag) and flag != "--model-"}
    return meant.pop() if len(meant) == 1 else ""


def _shown(command: list[Word]) -> str:
    return " ".join(masked([word.source for word in command]))


def masked(flags: Sequence[str]) -> list[str]:
    """The flags with the values of keys and tokens replaced by ***, for printing."""
    return _with_secrets_as(flags, lambda _: "***")


def hidden(flags: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The flags without keys and tokens, and the variables that have them, for a command line that others can read."""
    variables: dict[str, str] = {}

    def moved(value: str) -> str:
        name = f"GROUNDSERVE_SECRET_{len(variables) + 1}"
        variables[name] = value
        return f"{VARIABLE_MARK}{name}"

    return _with_secrets_as(flags, moved), variables


def _with_secrets_as(flags: Sequence[str], put: Callable[[str], str]) -> list[str]:
    """The flags, with the value of each that carries a secret replaced by what `put` makes of it."""
    made: list[str] = []
    is_next = False
    for flag in flags:
        name, has_value, value = flag.partition("=")
        is_secret = _SECRET_FLAG.fullmatch(name) is not None
        if is_next:
            made.append(put(flag))
        else:
            made.append(f"{name}={put(value)}" if is_secret and has_value else flag)
        is_next = is_secret and not has_value and not is_next
    return made
