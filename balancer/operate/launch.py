"""The SGLang command inside a `run:` script: found, understood, and left alone when there is more to it.

SkyServe runs `run:` with bash on a machine of its own. Here a script that only starts SGLang becomes
a replica (`python -m replica`, which leases GPUs and knows this machine); every other is run as it is.
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Commands around the server that have nothing left to do once `python -m replica` starts it.
_PREPARATION = {"source", ".", "conda", "set", "echo", "nvidia-smi", "ulimit", "cd", "true"}
_SEPARATORS = {"&&", ";"}
_REFERENCE = re.compile(r"\$(?:\{(\w+)(?::-([^}]*))?\}|(\w+))")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_SECRET_FLAG = re.compile(r"--(.*-)?(key|keys|password|passphrase|secret|token)")
_PYTHON = re.compile(r"python(3(\.\d+)?)?")


@dataclass(frozen=True, slots=True)
class Launch:
    """How a script starts its server: SGLang's model and its other flags, without host and port."""

    model: str
    flags: tuple[str, ...]
    # GPUs that one server takes, by its tensor parallel size or --gpus; None: the script does not say.
    gpus: int | None
    # What the script sets for it, on top of the service's envs.
    envs: Mapping[str, str]
    # Commands of the script that are not run, with keys and tokens replaced by ***.
    left_out: tuple[str, ...]


def understand(script: str, variables: Mapping[str, str]) -> Launch | None:
    """The one SGLang command of a bash script, variables filled in; None when there is more to the script."""
    variables = dict(variables)
    exports: dict[str, str] = {}
    left_out: list[str] = []
    found: Launch | None = None
    commands = _commands(script)
    if commands is None:
        return None
    for command in commands:
        words = _filled(command, variables)
        if words is None:
            return None
        if words[:1] == ["export"]:
            words = words[1:]
        assigned, words = _assignments(words)
        if not words:
            exports |= assigned
            variables |= assigned
            continue
        server = _server(words)
        if server is not None:
            if found is not None:
                return None
            found = _launch(*server, exports | assigned)
            if found is None:
                return None
        elif words[0] not in _PREPARATION:
            left_out.append(" ".join(masked(command)))
    if found is None:
        return None
    return Launch(found.model, found.flags, found.gpus, found.envs, tuple(left_out))


def _commands(script: str) -> list[list[str]] | None:
    """The script as simple commands, each a list of words; None when it needs a real shell."""
    commands: list[list[str]] = []
    for line in script.replace("\\\n", " ").splitlines():
        # In single quotes a shell fills nothing in; after splitting that can no longer be seen.
        if "`" in line or "$(" in line or re.search(r"'[^']*\$[^']*'", line):
            return None
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:
            return None
        command: list[str] = []
        for word in [*words, ";"]:
            if word in _SEPARATORS:
                if command:
                    commands.append(command)
                command = []
            elif re.fullmatch(r"[();<>|&]+", word) or (
                not command and word in ("if", "for", "while", "until", "case", "function", "{", "!", "trap")
            ):
                return None
            else:
                command.append(word)
    return commands


def _filled(words: list[str], variables: Mapping[str, str]) -> list[str] | None:
    """The words with variables filled in; None when one has no value, which only a shell could know."""
    filled = []
    for word in words:
        unknown = False

        def value(match: re.Match[str]) -> str:
            nonlocal unknown
            text = variables.get(match[1] or match[3], match[2])
            unknown = unknown or text is None
            return text or ""

        text = _REFERENCE.sub(value, word)
        if unknown or "$" in text:
            return None
        # A variable that stands alone may hold several words, or none.
        filled.extend(text.split() if _REFERENCE.fullmatch(word) else [text])
    return filled


def _assignments(words: list[str]) -> tuple[dict[str, str], list[str]]:
    assigned: dict[str, str] = {}
    while words and (match := _ASSIGNMENT.fullmatch(words[0])):
        assigned[match[1]] = match[2]
        words = words[1:]
    return assigned, words


def _server(words: list[str]) -> tuple[str, list[str]] | None:
    """Which program a command starts, "sglang" or "replica", and its arguments."""
    while words and words[0] in ("exec", "nohup"):
        words = words[1:]
    if words[:2] == ["sglang", "serve"]:
        return "sglang", words[2:]
    if words and _PYTHON.fullmatch(words[0].rpartition("/")[2]):
        rest = [word for word in words[1:] if word != "-u"]
        if rest[:2] == ["-m", "sglang.launch_server"]:
            return "sglang", rest[2:]
        if rest[:2] == ["-m", "replica"]:
            return "replica", rest[2:]
    return None


def _launch(program: str, arguments: list[str], envs: Mapping[str, str]) -> Launch | None:
    own, marker, flags = arguments, "", []
    if program == "replica" and "--" in arguments:
        cut = arguments.index("--")
        own, marker, flags = arguments[:cut], "--", arguments[cut + 1 :]
    taken: dict[str, str] = {}
    rest: list[str] = []
    names = {
        "--model-path": "model",
        "--model": "model",
        "--host": "host",
        "--port": "port",
        "--gpus": "gpus",
        "--tp": "gpus",
        "--tp-size": "gpus",
        "--tensor-parallel-size": "gpus",
    }
    words = iter(own)
    for word in words:
        flag, has_value, value = word.partition("=")
        if flag in names:
            taken[names[flag]] = value if has_value else next(words, "")
        else:
            rest.append(word)
    model = taken.get("model") or envs.get("MODEL", "")
    if not model or (program == "replica" and (rest or (marker and not flags))):
        return None
    gpus = int(taken["gpus"]) if taken.get("gpus", "").isdecimal() else None
    return Launch(model, tuple(flags or rest), gpus, envs, ())


def masked(flags: Sequence[str]) -> list[str]:
    """The flags with the values of keys and tokens replaced by ***, for printing."""
    shown: list[str] = []
    hide_next = False
    for flag in flags:
        name, has_value, _ = flag.partition("=")
        is_secret = _SECRET_FLAG.fullmatch(name) is not None
        shown.append("***" if hide_next else f"{name}=***" if is_secret and has_value else flag)
        hide_next = is_secret and not has_value
    return shown
