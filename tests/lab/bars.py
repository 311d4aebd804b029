"""The simulator's goodput as an SVG document: a group of bars for each scenario, each relative to the best in it."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

LEFT, WIDTH, BAR, GAP = 150, 420, 14, 34
OURS = "prefix_aware"


def bars(rows: Sequence[Mapping[str, Any]]) -> str:
    """`rows` have workload, replicas, policy and goodput; the rows of one scenario are consecutive."""
    parts: list[str] = []
    y = 10
    for (workload, replicas), group in groupby(rows, key=lambda row: (row["workload"], row["replicas"])):
        found = list(group)
        best = max(row["goodput"] for row in found)
        y += GAP
        title = f"{workload}, {replicas} replicas: answered requests a second"
        parts.append(f'<text x="{LEFT}" y="{y - 6}" font-weight="bold">{escape(title)}</text>')
        for row in found:
            length = WIDTH * row["goodput"] / best
            colour = "#0a58ca" if row["policy"] == OURS else "#888"
            parts += [
                f'<text x="{LEFT - 8}" y="{y + BAR - 3}" text-anchor="end">{escape(row["policy"])}</text>',
                f'<rect x="{LEFT}" y="{y + 2}" width="{length:.1f}" height="{BAR - 4}" fill="{colour}"/>',
                f'<text x="{LEFT + length + 6:.1f}" y="{y + BAR - 3}">{row["goodput"]:.1f}</text>',
            ]
            y += BAR
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 80}" height="{y + 20}" '
            'font-family="sans-serif" font-size="12" role="img" aria-label="Goodput of routing policies">',
            '<rect width="100%" height="100%" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )
