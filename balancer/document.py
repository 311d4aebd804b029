"""A YAML file that knows on which line each of its keys stands, so that every complaint can say where."""

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

KeyPath = tuple[str | int, ...]
Model = TypeVar("Model", bound=BaseModel)

# SkyServe's own pattern: $NAME and ${NAME}, nothing else.
_VARIABLE = re.compile(r"\$\{?\b([a-zA-Z_][a-zA-Z0-9_]*)\b\}?")

# Where pydantic speaks of Python, to people who write YAML.
_WORDS = dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "should be keys with their values")


@dataclass(frozen=True, slots=True)
class NoMeaning:
    """Marks a model's key that is known and has no effect here: a file that uses it gets a warning."""

    why: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Marks a model's key that is known and would be wrong to ignore: a file that uses it is refused."""

    why: str


class Document:
    """One YAML mapping. `source` is the file's name in messages, `data` what it holds."""

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self._lines: dict[KeyPath, int] = {}
        try:
            node = yaml.compose(text, yaml.SafeLoader)
            self._note_lines(node, ())
            data = yaml.safe_load(text)
        except yaml.MarkedYAMLError as failure:
            mark = failure.problem_mark or failure.context_mark
            where = f"{source}:{mark.line + 1}" if mark else source
            raise ConfigError(f"{where}: not valid YAML: {failure.problem or failure.context}") from None
        except (yaml.YAMLError, ValueError) as failure:
            raise ConfigError(f"{source}: not valid YAML: {' '.join(str(failure).split())}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"{source}: a service YAML is a mapping with a `service:` section")
        self.data: dict[str, Any] = data

    def fault(self, path: KeyPath, what: str) -> ConfigError:
        """The error to raise: one line with the file, a line number, and the key."""
        return ConfigError(self.remark(path, what))

    def remark(self, path: KeyPath, what: str) -> str:
        return f"{self._where(path)}: {_dotted(path)} {what}"

    def validated(self, model: type[Model], values: object, under: KeyPath = ()) -> Model:
        """`values`, which stand at `under` in the file, as a model; raises ConfigError for the first fault.

        A value is quoted as the file has it, before variables are filled in, so that no secret is shown.
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
        nearest = get_close_matches(str(path[-1]), known, n=1, cutoff=0.0)
        return self.fault(path, f"is unknown; the nearest known key is '{nearest[0]}'")

    def marked(self, model: BaseModel, under: KeyPath = ()) -> Iterator[str]:
        """A warning for each used key without meaning here; raises ConfigError at one that is refused."""
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

    def _note_lines(self, node: yaml.Node | None, path: KeyPath) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                at = (*path, key.value)
                line = key.start_mark.line + 1
                if at in self._lines and key.value != "<<":
                    raise ConfigError(f"{self.source}:{line}: {_dotted(at)} is there twice: keep one")
                self._lines[at] = line
                self._note_lines(value, at)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                self._lines[*path, index] = value.start_mark.line + 1
                self._note_lines(value, (*path, index))

    def _where(self, path: KeyPath) -> str:
        for length in range(len(path), 0, -1):
            if line := self._lines.get(path[:length]):
                return f"{self.source}:{line}"
        return self.source

    def _existing(self, path: KeyPath) -> KeyPath:
        """The part of `path` that the file has: pydantic adds parts of its own for unions and short forms."""
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
        return "" if isinstance(value, list | dict) else f" (it is {value!r})"


def fill_in(value: Any, variables: Mapping[str, str]) -> Any:
    """`value` with $NAME and ${NAME} replaced in all its strings and keys; unknown names stay as they are."""
    if isinstance(value, str):
        return _VARIABLE.sub(lambda match: variables.get(match[1], match[0]), value)
    if isinstance(value, list):
        return [fill_in(part, variables) for part in value]
    if isinstance(value, dict):
        return {fill_in(key, variables): fill_in(part, variables) for key, part in value.items()}
    return value


def _dotted(path: KeyPath) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or "the file"


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
