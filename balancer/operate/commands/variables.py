"""Variables from the command line: NAME=VALUE, NAME alone, and files of such lines."""

import io
import os
import re
from pathlib import Path

from balancer.errors import ConfigError
from balancer.spec import text_file

_NAME = re.compile("[A-Za-z_][A-Za-z0-9_]*")


def pair(text: str, flag: str) -> tuple[str, str]:
    """The name and value of NAME=VALUE; for NAME alone, its value in our own environment."""
    name, has_value, value = text.partition("=")
    return name, _value(name, value if has_value else None, flag)


def of_file(flag: str, path: Path) -> dict[str, str]:
    """The variables in a file, read as `sky serve` does: by python-dotenv, with ${NAME} filled in.

    Raises ConfigError for a line that python-dotenv would skip.
    """
    # Imported here, because few commands need it, and the others start faster without it.
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
        # The text is not shown: without a valid name it may be the secret itself.
        raise ConfigError(f"{flag}: write NAME=VALUE, the name being letters, digits and underscores")
    if value is None and (value := os.environ.get(name)) is None:
        raise ConfigError(f"{flag} {name}: write {name}=VALUE, or set {name} in the environment")
    return value
