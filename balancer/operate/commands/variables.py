"""Variables as the command line gives them: NAME=VALUE, NAME alone, and files of such lines."""

import io
import os
import re
from pathlib import Path

from balancer.errors import ConfigError
from balancer.spec import text_file

_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]*")


def pair(text: str, flag: str) -> tuple[str, str]:
    """The name and value of NAME=VALUE; of NAME alone, the value that it has in our own environment."""
    name, has_value, value = text.partition("=")
    return name, _value(name, value if has_value else None, flag)


def of_file(flag: str, path: Path) -> dict[str, str]:
    """What a file of variables holds, as `sky serve` reads it: by python-dotenv, its ${NAME} filled in.

    Raises ConfigError for a line that python-dotenv would pass over.
    """
    # Few commands are given such a file; the others start without it.
    from dotenv import dotenv_values
    from dotenv.parser import parse_stream

    text = text_file.read(path, f"{flag} {path}", "a file of NAME=VALUE lines")
    for statement in parse_stream(io.StringIO(text)):
        if statement.error:
            said = statement.original.string
            line = statement.original.line + said[: len(said) - len(said.lstrip())].count("\n")
            raise ConfigError(f"{flag} {path}:{line}: no closing quotation, or no NAME=VALUE: mend this line")
    values = dotenv_values(stream=io.StringIO(text))
    return {name: _value(name, value, f"{flag} {path}") for name, value in values.items()}


def _value(name: str, value: str | None, flag: str) -> str:
    if not _NAME.fullmatch(name):
        # Not shown: without a name the text may be the secret itself.
        raise ConfigError(f"{flag}: write NAME=VALUE, the name being letters, digits and underscores")
    if value is None and (value := os.environ.get(name)) is None:
        raise ConfigError(f"{flag} {name}: write {name}=VALUE, or set {name} in the environment")
    return value
