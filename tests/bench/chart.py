"""A plot of the figures as SVG, drawn by hand: dots on a logarithmic axis, the rounds' range as a line."""

import math
from collections.abc import Mapping
from html import escape

from tests.bench.figures import Figure, Figures
from tests.bench.peers import OURS

ROW, LEFT, WIDTH, GAP, TOP = 30, 130, 340, 60, 62
PANELS = (
    ("cpu_per_request_us", "CPU µs per small request"),
    ("cpu_per_event_us", "CPU µs per relayed event"),
)


def chart(rows: Mapping[str, Figures]) -> str:
    """The SVG document; a figure that failed is said in words, so that its dot is not missed."""
    height = TOP + ROW * len(rows) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + 2 * WIDTH + GAP + 40}" height="{height}" '
        'font-family="sans-serif" font-size="13" role="img" aria-label="CPU cost of relaying">',
        f'<rect width="100%" height="{height}" fill="white"/>',
    ]
    for index, name in enumerate(rows):
        weight = "bold" if name == OURS else "normal"
        y = TOP + ROW * index + ROW / 2
        parts.append(
            f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end" font-weight="{weight}">{escape(name)}</text>'
        )
    for number, (column, title) in enumerate(PANELS):
        found = {name: getattr(row, column) for name, row in rows.items()}
        parts += panel(LEFT + number * (WIDTH + GAP), title, found)
    return "\n".join([*parts, "</svg>\n"])


def panel(left: int, title: str, found: Mapping[str, Figure]) -> list[str]:
    known = [figure for figure in found.values() if figure.value]
    low = 10 ** math.floor(math.log10(min((figure.low for figure in known), default=1)))
    high = 10 ** math.ceil(math.log10(max((figure.high for figure in known), default=10)))
    decades = max(1, round(math.log10(high / low)))
    bottom = TOP + ROW * len(found)

    def x(value: float) -> float:
        return left + WIDTH * math.log10(value / low) / decades

    parts = [f'<text x="{left}" y="{TOP - 38}" font-weight="bold">{title}</text>']
    for tick in range(decades + 1):
        at = x(low * 10**tick)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP - 8}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{at:.1f}" y="{TOP - 14}" text-anchor="middle" fill="#555">{low * 10**tick:g}</text>')
    for index, (name, figure) in enumerate(found.items()):
        y = TOP + ROW * index + ROW / 2
        if not figure.value:
            parts.append(f'<text x="{left + 6}" y="{y + 4}" fill="#b00">failed</text>')
            continue
        colour = "#0a58ca" if name == OURS else "#555"
        ends = f'x1="{x(figure.low):.1f}" x2="{x(figure.high):.1f}"'
        parts.append(f'<line {ends} y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<circle cx="{x(figure.value):.1f}" cy="{y}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{x(figure.value) + 9:.1f}" y="{y - 4}" fill="{colour}">{figure.value:.0f}</text>')
    return parts
