"""A YAML document that remembers the line of each key, so that every error message can name it."""

import re
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from balancer.errors import ConfigError
from balancer.spec.tree import KeyPath, read, shown

Model = TypeVar("Model", bound=BaseModel)

# The maximum number of characters that variables may add.
_MAX_FILLED = 128 << 10
# NUL, and lone surrogates: half a character can be neither printed nor encoded.
_IMPOSSIBLE = re.compile("[\0\ud800-\udfff]")

# SkyServe's own pattern: $NAME and ${NAME}, and nothing else.
_VARIABLE = re.compile(r"\$\{?\b([a-zA-Z_][a-zA-Z0-9_]*)\b\}?")

# Messages for people who write YAML, in place of pydantic's, which speak of Python.
_WORDS = dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "should be keys with their values")


@dataclass(frozen=True, slots=True)
class NoMeaning:
    """Marks a key that is known but has no effect here: a file that uses it gets a warning."""

    why: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Marks a key that is known but must not be ignored: a file that uses it is refused."""

    why: str


class Document:
    """One YAML mapping. `source` is the file's name in messages, `data` its content.

    All keys are text. Raises ConfigError, with file and line, for invalid YAML and documents beyond tree.py's limits.
    """

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self._lines: dict[KeyPath, int] = {}
        node, data = read(text, source, self._note_lines)
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{source}: a service YAML is a mapping with a `service:` section")
        self.data: dict[str, Any] = data

    def fault(self, path: KeyPath, what: str) -> ConfigError:
        """The error to raise: one line with file, line number and key."""
        return ConfigError(self.remark(path, what))

    def remark(self, path: KeyPath, what: str) -> str:
        return f"{self._where(path)}: {_dotted(path)} {what}"

    def validated(self, model: type[Model], values: object, under: KeyPath = ()) -> Model:
        """`values`, found at `under` in the file, as a model. Raises ConfigError for the first fault.

        Values are quoted as the file has them, before variables are filled in, so that no secret is shown.
        """
        try:
            return model.model_validate(values)
        except ValidationError as failure:
            faults = failure.errors(include_url=False, include_input=False)
        unknown = next((fault for fault in faults if fault["type"] == "extra_forbidden"), None)
        if unknown is not None:
            section = _model_at(model, unknown["loc"][:-1])
            raise self.unknown_key((*under, *unknown["loc"]), _keys(section))
        first = faults[0]
        path = self._existing((*under, *first["loc"]))
        if first["type"] == "missing":
            raise self.fault(path, f"lacks '{first['loc'][-1]}'")
        message = _WORDS.get(first["type"]) or first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        raise self.fault(path, f"{message}{self._quoted(path)}")

    def unknown_key(self, path: KeyPath, known: Collection[str]) -> ConfigError:
        nearest = get_close_matches(shown(str(path[-1])), known, n=1, cutoff=0.0)
        return self.fault(path, f"is unknown; the nearest known key is '{nearest[0]}'")

    def marked(self, model: BaseModel, under: KeyPath = ()) -> Iterator[str]:
        """A warning for each key in use that has no effect here. Raises ConfigError at a key that is refused."""
        for name, field in type(model).model_fields.items():
            if name not in model.model_fields_set:
                continue
            path = (*under, field.alias or name)
            for mark in field.metadata:
                if isinstance(mark, Refused):
                    raise self.fault(path, f"cannot be used here: {mark.why}")
                if isinstance(mark, NoMeaning):
                    yield self.remark(path, f"has no effect here: {mark.why}")
            value = getattr(model, name)
            if isinstance(value, BaseModel):
                yield from self.marked(value, path)
            elif isinstance(value, list):
                for index, part in enumerate(value):
                    if isinstance(part, BaseModel):
                        yield from self.marked(part, (*path, index))

    def _note_lines(self, node: yaml.Node, path: KeyPath) -> None:
        line = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                    raise ConfigError(f"{self.source}:{line}: {_dotted(path)} {_key_fault(key)}")
                at = (*path, key.value)
                if at in self._lines and key.value != "<<":
                    raise ConfigError(f"{self.source}:{line}: {_dotted(at)} is given twice: keep one")
                self._lines[at] = line
                self._check_text(key, path)
                self._note_lines(value, at)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self._lines[*path, index] = value.start_mark.line + 1
                self._note_lines(value, (*path, index))
        else:
            self._check_text(node, path)

    def _check_text(self, node: yaml.Node, path: KeyPath) -> None:
        """Raises ConfigError for text that no file name, command or variable can hold."""
        if _IMPOSSIBLE.search(node.value):
            line = node.start_mark.line + 1
            raise ConfigError(f"{self.source}:{line}: {_dotted(path)} contains a NUL or half a character: remove it")

    def _where(self, path: KeyPath) -> str:
        for length in range(len(path), 0, -1):
            if line := self._lines.get(path[:length]):
                return f"{self.source}:{line}"
        return self.source

    def _existing(self, path: KeyPath) -> KeyPath:
        """The part of `path` that exists in the file: pydantic adds parts of its own for unions and short forms."""
        found: KeyPath = ()
        for part in path:
            if (*found, part) in self._lines:
                found = (*found, part)
        return found

    def _quoted(self, path: KeyPath) -> str:
        if {"envs", "secrets", "headers"} & set(path):
            return ""
        value: Any = self.data
        for part in path:
            value = value[part]
        return "" if isinstance(value, list | dict) else f" (it is {shown(repr(value))})"


def fill_in(value: Any, variables: Mapping[str, str]) -> Any:
    """`value` with $NAME and ${NAME} replaced in all its strings and keys; unknown names stay as they are.

    Raises ValueError where two keys become the same, or where variables add more than _MAX_FILLED characters.
    """
    room = _MAX_FILLED

    def text_of(match: re.Match[str]) -> str:
        nonlocal room
        text = variables.get(match[1], match[0])
        room -= len(text)
        if room < 0:
            raise ValueError(f"becomes longer than {_MAX_FILLED:,} characters once variables are filled in")
        return text

    def filled(part: Any) -> Any:
        if isinstance(part, str):
            return _VARIABLE.sub(text_of, part)
        if isinstance(part, list):
            return [filled(each) for each in part]
        if isinstance(part, dict):
            result = {filled(key): filled(each) for key, each in part.items()}
            if len(result) < len(part):
                raise ValueError("has the same key twice once variables are filled in")
            return result
        return part

    return filled(value)


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{_plain(part)}" for part in path)[1:] or "the file"


def _plain(key: str) -> str:
    """A key for a message: one short line without terminal control characters."""
    return shown(key if key.isprintable() else repr(key))


def _key_fault(node: yaml.Node) -> str:
    """What is wrong with a key that is not text."""
    if isinstance(node, yaml.ScalarNode):
        word = shown(node.value) or "nothing at all"
        return f"has {word} for a key, which is not text: put it in quotes"
    return "has a list or a mapping for a key: if this is {{ a template }}, fill it in first; else write a word"


def _keys(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _model_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel]:
    """The model of the section at `path`."""
    for part in path:
        fields: Mapping[str, FieldInfo] = {f.alias or name: f for name, f in model.model_fields.items()}
        if isinstance(part, str) and part in fields:
            model = next(iter(_models_in(fields[part].annotation)), model)
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)
