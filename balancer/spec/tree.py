"""YAML as a tree of nodes and its values. Documents beyond the limits below are refused with one line."""

from collections.abc import Callable
from typing import Any, NoReturn

import yaml
from yaml.reader import ReaderError

from balancer.errors import ConfigError

KeyPath = tuple[str | int, ...]

# About twenty times what the largest service files need.
_MAX_DEPTH = 50
_MAX_NODES = 10_000
# Characters of a key or value that a message quotes.
_MAX_QUOTE = 120


def value_of(text: str, source: str) -> Any:
    """The value of a short YAML text. Raises ConfigError for invalid YAML."""
    return read(text, source)[1]


def read(
    text: str, source: str, look_at: Callable[[yaml.Node, KeyPath], None] | None = None
) -> tuple[yaml.Node | None, Any]:
    """The tree of a YAML text, after `look_at` has seen it, and its value. Raises ConfigError."""
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        if look_at is not None:
            look_at(node, ())
        return node, loader.construct_document(node)
    except yaml.MarkedYAMLError as failure:
        mark = failure.problem_mark or failure.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError(f"{where}: not valid YAML: {_one_line(failure.problem or failure.context)}") from None
    except ReaderError as failure:
        line = text.count("\n", 0, failure.position) + 1
        raise ConfigError(f"{source}:{line}: not valid YAML: {_one_line(failure.reason)}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as failure:
        # PyYAML lets Python's own errors through for impossible numbers, dates and \\U escapes.
        line = loader.current_line if loader else 1
        raise ConfigError(f"{source}:{line}: not valid YAML: {_one_line(failure)}") from None


class _Loader(yaml.SafeLoader):
    """Refuses trees beyond the limits. An alias counts each time it is used."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[int, int] = {}
        self._depth = 0
        self._total = 0
        self._constructing: yaml.Node | None = None

    @property
    def current_line(self) -> int:
        """The line that is being read, or whose value is being constructed."""
        mark = self._constructing.start_mark if self._constructing else self.get_mark()
        return int(mark.line) + 1

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        before = self._total
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            self._refuse(event, f"it is nested more than {_MAX_DEPTH} deep")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                self._refuse(event, f"the alias *{shown(str(event.anchor))} refers to a value that contains it")
            self._total += self._sizes[id(node)]
        else:
            self._total += 1
            self._sizes[id(node)] = self._total - before
        if self._total > _MAX_NODES:
            self._refuse(event, f"it holds more than {_MAX_NODES:,} values, aliases counted")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        self._constructing = node
        return super().construct_object(node, deep)

    @staticmethod
    def _refuse(event: yaml.Event, why: str) -> NoReturn:
        raise yaml.MarkedYAMLError(problem=why, problem_mark=event.start_mark)  # type: ignore[arg-type]


def shown(text: str) -> str:
    """The text, cut to what a message quotes."""
    return text if len(text) <= _MAX_QUOTE else f"{text[: _MAX_QUOTE - 3]}..."


def _one_line(what: object) -> str:
    return shown(" ".join(str(what).split()))
