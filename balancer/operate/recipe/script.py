"""Parses the part of bash that suffices for `run:` scripts that start one server: exactly, or not at all.

It knows sequences of simple commands, quotes, $NAME, ${NAME} and ${NAME:-text}, line continuations and comments.
Anything else (pipes, redirections, conditions, substitutions, patterns) is left to bash and raises Misread.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_REFERENCE = re.compile(r"\$(?:(?P<plain>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)(?::-(?P<default>[^}$`\"'\\]*))?\})")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=")
_PATTERN = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{[^}]*(?:,|\.\.)")
_SPECIAL = "|&;()<>"
# First words that make a command more than a simple one, or that change how bash goes on.
_COMPOUND = {
    "if",
    "for",
    "while",
    "until",
    "case",
    "select",
    "function",
    "{",
    "[[",
    "!",
    "time",
    "coproc",
    "trap",
    "eval",
}
_COMPOUND |= {"alias", "unset", "shift", "return", "exit", "shopt"}


class Misread(Exception):
    """The script holds more than this parser reads. The message tells the user what."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a word: `text`, or the variable `name`, with `text` as the default if it is unset or empty."""

    text: str | None
    is_quoted: bool
    name: str = ""

    def value(self, variables: Mapping[str, str]) -> str:
        if not self.name:
            return self.text or ""
        # Bash uses the text after :- for an empty variable too.
        found = variables.get(self.name)
        value = self.text if self.text is not None and not found else found
        if value is None:
            raise Misread(f"${self.name} has no value before the script runs")
        return value


@dataclass(frozen=True, slots=True)
class Word:
    """One word of a command; `source` is how the script spells it."""

    source: str
    parts: tuple[Part, ...]

    @property
    def assigned(self) -> str:
        """The name, if the word is NAME=VALUE; otherwise empty."""
        first = self.parts[0] if self.parts else None
        found = None if first is None or first.is_quoted or first.name else _ASSIGNMENT.match(first.text or "")
        return found[1] if found else ""

    def text(self, variables: Mapping[str, str]) -> str:
        """Its value in an assignment, where bash neither splits words nor expands patterns. Raises Misread."""
        first, *others = self.parts
        said = first.value(variables)
        if found := re.match(r"\w+=(?=~)", said):
            said = found[0] + _home(said[found.end() :], self, variables)
        if ":~" in said or any("~" in (part.text or "") for part in others if not part.is_quoted and not part.name):
            raise Misread(f"`{self.source}` has a ~ that only bash can replace")
        return said + "".join(part.value(variables) for part in others)

    def refuse_braces(self) -> None:
        """Raises Misread for {a,b}, which bash expands to several words, even in an assignment that is an argument."""
        plain = "".join("" if part.is_quoted or part.name else part.text or "" for part in self.parts)
        if _BRACES.search(plain):
            raise Misread(f"`{self.source}` has braces that bash replaces")

    def fields(self, variables: Mapping[str, str]) -> list[str]:
        """The words that it expands to: unquoted variables are split, possibly into none. Raises Misread."""
        self.refuse_braces()
        fields: list[str] = []
        field: str | None = None
        for place, part in enumerate(self.parts):
            value = part.value(variables)
            if part.is_quoted:
                field = (field or "") + value
                continue
            if _PATTERN.search(value):
                raise Misread(f"`{self.source}` has a pattern that bash replaces")
            if not part.name:
                if place == 0 and value.startswith("~"):
                    value = _home(value, self, variables)
                field = (field or "") + value
                continue
            first, *others = re.split("[ \t\n]+", value)
            if first:
                field = (field or "") + first
            for other in others:
                if field is not None:
                    fields.append(field)
                field = other or None
        return fields if field is None else [*fields, field]


def commands(script: str) -> list[list[Word]]:
    """The script as a list of simple commands. Raises Misread."""
    found: list[list[Word]] = [[]]
    at = 0
    is_begun = False  # the last command ended in &&, so another has to follow
    while at < len(script):
        letter = script[at]
        if script.startswith("\\\n", at):
            at += 2
        elif letter in " \t\r":
            at += 1
        elif letter == "#":
            at = _end_of_line(script, at)
        elif letter == "\n":
            at += 1
            found.append([])
        elif letter == ";" or script.startswith("&&", at):
            if not found[-1]:
                raise Misread(f"a command is missing before {letter}")
            is_begun = letter == "&"
            at += 2 if is_begun else 1
            found.append([])
        elif letter in _SPECIAL:
            raise Misread(f"it has a {letter} in it")
        else:
            word, at = _word(script, at)
            if not found[-1] and word.source in _COMPOUND:
                raise Misread(f"it has `{word.source}` in it")
            found[-1].append(word)
            is_begun = False
    if is_begun:
        raise Misread("a command is missing after &&")
    return [command for command in found if command]


def _word(script: str, at: int) -> tuple[Word, int]:
    """The word that begins at `at`, and where it ends."""
    start = at
    parts: list[Part] = []
    plain = ""

    def close() -> None:
        nonlocal plain
        if plain:
            parts.append(Part(plain, is_quoted=False))
        plain = ""

    while at < len(script) and script[at] not in " \t\r\n" + _SPECIAL:
        letter = script[at]
        if letter == "\\":
            if at + 1 == len(script):
                raise Misread("it ends in a backslash")
            if script[at + 1] != "\n":
                close()
                parts.append(Part(_without_dollar(script[at + 1]), is_quoted=True))
            at += 2
        elif letter == "'":
            end = script.find("'", at + 1)
            if end < 0:
                raise Misread("a quote has no end")
            close()
            parts.append(Part(_without_dollar(script[at + 1 : end]), is_quoted=True))
            at = end + 1
        elif letter == '"':
            close()
            quoted, at = _quoted(script, at + 1)
            parts += quoted
        elif letter in "$`":
            close()
            part, at = _reference(script, at, is_quoted=False)
            parts.append(part)
        else:
            plain += letter
            at += 1
    close()
    return Word(script[start:at], tuple(parts)), at


def _quoted(script: str, at: int) -> tuple[list[Part], int]:
    """The parts of the double-quoted text from `at` on, and the position after the closing quote."""
    parts = [Part("", is_quoted=True)]
    text = ""
    while at < len(script):
        letter = script[at]
        if letter == '"':
            return [*parts, Part(text, is_quoted=True)], at + 1
        if letter == "\\" and script[at + 1 : at + 2] in ("\\", '"', "`", "\n"):
            text += script[at + 1].replace("\n", "")
            at += 2
        elif letter in "$`" or script.startswith("\\$", at):
            parts.append(Part(text, is_quoted=True))
            text = ""
            part, at = _reference(script, at, is_quoted=True)
            parts.append(part)
        else:
            text += letter
            at += 1
    raise Misread("a quote has no end")


def _reference(script: str, at: int, is_quoted: bool) -> tuple[Part, int]:
    found = _REFERENCE.match(script, at)
    if found is None:
        raise Misread(f"it has `{script[at : at + 2]}` in it")
    return Part(found["default"], is_quoted, found["plain"] or found["braced"]), found.end()


def _without_dollar(text: str) -> str:
    # A later reader, SGLang or a shell, may expand the $ itself, so only bash may pass this text on.
    if "$" in text:
        raise Misread("it has a $ that bash leaves as it is")
    return text


def _home(value: str, word: Word, variables: Mapping[str, str]) -> str:
    """`value` with its leading ~ expanded; a word, or the value that it assigns, begins with `value`."""
    home = variables.get("HOME")
    if home is None or not (value.startswith("~/") or (value == "~" and len(word.parts) == 1)):
        raise Misread(f"`{word.source}` has a ~ that only bash can replace")
    return home + value[1:]


def _end_of_line(script: str, at: int) -> int:
    end = script.find("\n", at)
    return len(script) if end < 0 else end
