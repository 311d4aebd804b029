"""Tables of docs/benchmarks.md as bars: what relaying costs, and what routing by prefix brings."""

import re
from collections.abc import Sequence
from pathlib import Path

from tests.docs.svg import Picture

PAGE = Path(__file__).parents[2] / "docs/benchmarks.md"
OURS = ("groundserve", "compiled", "prefix_aware")
WIDE, ROW = 210, 26


def table(column: str) -> list[dict[str, str]]:
    """The rows of the page's table that has this column, by column; the same name again has a 2 behind it."""
    lines = PAGE.read_text().splitlines()
    (head,) = [at for at, line in enumerate(lines) if line.startswith("|") and column in _cells(line)]
    names: list[str] = []
    for name in _cells(lines[head]):
        names.append(f"{name} 2" if name in names else name)
    rows = []
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(names, _cells(line), strict=True)))
    return rows


def _cells(line: str) -> list[str]:
    return [cell.strip().strip("*") for cell in line.strip().strip("|").split("|")]


def bars(title: str, note: str, rows: Sequence[dict[str, str]], columns: Sequence[tuple[str, str]]) -> str:
    """A group of bars for each column: (name in the table, words above), the length from 0."""
    names = 32 + 7.6 * max(len(next(iter(cells.values()))) for cells in rows)
    pitch = WIDE + 90
    width = round(20 + names + pitch * len(columns))
    p = Picture(width, 108 + ROW * len(rows), title, "; ".join(", ".join(row.values()) for row in rows) + ".")
    p.text(22, 38, title, "h")
    p.text(width - 20, 38, note, "s e")
    for row, cells in enumerate(rows):
        name = next(iter(cells.values()))
        p.text(20 + names - 12, 100 + ROW * row + 14, name, "e b" if name in OURS else "e")
    for number, (column, words) in enumerate(columns):
        left = 20 + names + pitch * number
        p.text(left, 80, words, "s")
        largest = max(_number(cells[column]) for cells in rows)
        for row, cells in enumerate(rows):
            value, name = _number(cells[column]), next(iter(cells.values()))
            y, length = 100 + ROW * row, WIDE * value / largest
            p.bar(left, y, length, ROW - 8, "o" if name in OURS else "p")
            p.text(left + length + 8, y + 14, cells[column], "b" if name in OURS else "")
    return p.document()


def _number(cell: str) -> float:
    found = re.match(r"[\d.,]+", cell)
    if found is None:
        raise ValueError(f"docs/benchmarks.md: {cell!r} begins with no number")
    return float(found[0].replace(",", ""))


def relay() -> str:
    columns = (("CPU µs per request", "CPU µs per small request"), ("CPU µs per event", "CPU µs per streamed event"))
    return bars("What relaying costs", "less is better · make bench", table("CPU µs per event"), columns)


def simulated() -> str:
    columns = (
        ("new prompt for all", "a new prompt that all share"),
        ("images", "questions on images"),
        ("chat", "conversations"),
    )
    rows = table("new prompt for all")
    return bars("Requests a second on eight replicas", "more is better · make simulate", rows, columns)


def routing() -> str:
    columns = (
        ("text: seconds", "text: seconds for all requests"),
        ("behind an image: seconds", "the same behind an image: seconds"),
    )
    rows = table("text: seconds")
    return bars("What routing by prefix brings", "less is better · make bench-routing", rows, columns)
