"""Files of variables, as `sky serve` reads them: with python-dotenv 1.2."""

from pathlib import Path

import pytest

from balancer.errors import ConfigError
from balancer.operate.commands.variables import of_file, pair
from balancer.spec.service_file import parse


def read(folder: Path, text: str | bytes) -> dict[str, str]:
    path = folder / "envs"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return of_file("--env-file", path)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ('A={"a": 1, "b": ["c"]}', '{"a": 1, "b": ["c"]}'),
        (r"A=C:\models\new", r"C:\models\new"),
        (r"A='C:\models\new'", r"C:\models\new"),
        (r'A="C:\\models"', r"C:\models"),
        (r'A="two\nlines"', "two\nlines"),
        (r"A='two\nlines'", r"two\nlines"),
        ('A="first\nsecond"', "first\nsecond"),
        ("A='-----BEGIN KEY-----\nabc\n-----END KEY-----\n'", "-----BEGIN KEY-----\nabc\n-----END KEY-----\n"),
        ("export A=x", "x"),
        ("  export   A = x  ", "x"),
        ("A=x # said", "x"),
        ("A=x#y", "x#y"),
        ("A='x # y' # said", "x # y"),
        ("A=", ""),
        ("A=''", ""),
        ("A=a b  c", "a b  c"),
        ("A=it's", "it's"),
        ("A=--flag=1 --other='x y'", "--flag=1 --other='x y'"),
        ("A=$HOME/x", "$HOME/x"),
        ("B=y\nA=x${B}z", "xyz"),
        ("A=${NOT_SET_ANYWHERE:-x}", "x"),
        ("A=1\nA=2", "2"),
        ("# A=0\n\nA=ä€😀", "ä€😀"),
        ("A=postgres://u:p%40@h/db?x=1&y=2", "postgres://u:p%40@h/db?x=1&y=2"),
    ],
)
def test_values_are_as_they_are_written(tmp_path: Path, line: str, value: str) -> None:
    assert read(tmp_path, line)["A"] == value
    assert read(tmp_path, b"\xef\xbb\xbf" + f"FIRST=1\n{line}\nLAST=2\n".replace("\n", "\r\n").encode()) == {
        "FIRST": "1",
        "LAST": "2",
        "A": value,
        **({"B": "y"} if "B=y" in line else {}),
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A=1\n\n\nB='x", ":4: no closing quotation, or no NAME=VALUE"),
        ("A=1\nsome words here", ":2: no closing quotation, or no NAME=VALUE"),
        ("a-b=1", ": write NAME=VALUE, the name being letters, digits and underscores"),
        ("NOT_SET_ANYWHERE", " NOT_SET_ANYWHERE: write NOT_SET_ANYWHERE=VALUE, or set NOT_SET_ANYWHERE"),
        (b"A=\xe4", ":1: not UTF-8 text"),
        (b"A=" + b"x" * 300_000, ": larger than 256 KiB"),
    ],
)
def test_lines_that_are_no_variables(tmp_path: Path, text: str | bytes, said: str) -> None:
    """A line that is not a variable is refused with its line number, and is not shown."""
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, text)
    assert f"--env-file {tmp_path / 'envs'}{said}" in str(raised.value)
    assert "words" not in str(raised.value)


def test_a_name_alone_is_taken_from_our_own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_OURS", "x y")
    assert read(tmp_path, "OF_OURS\n") == {"OF_OURS": "x y"}
    assert pair("OF_OURS", "--env") == ("OF_OURS", "x y")


@pytest.mark.parametrize("text", ["ä=1", "1A=x", "=x", "a b=x"])
def test_a_name_is_letters_digits_and_underscores(text: str) -> None:
    with pytest.raises(ConfigError, match="letters, digits and underscores"):
        pair(text, "--env")


@pytest.mark.parametrize(("value", "said"), [("a\0b", "contains a NUL"), ("x" * 140_000, "is longer than 128 KiB")])
def test_a_value_that_no_process_can_have_is_refused(value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"x.yaml:2: envs.A {said}"):
        parse("service: {}\nenvs: {A: }", source="x.yaml", envs={"A": value})
    with pytest.raises(ConfigError, match=f"x.yaml:2: secrets.A {said}"):
        parse("service: {}\nsecrets: {A: }", source="x.yaml", secrets={"A": value})
