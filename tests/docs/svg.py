"""A picture drawn by hand as SVG: boxes, arrows, words. Lengths are in pixels; it is legible in light and dark mode."""

from collections.abc import Sequence
from html import escape

Point = tuple[float, float]

# The status page's colours, so that a picture and a screenshot of it go together.
_STYLE = """
svg { --ground: #f6f7f5; --card: #ffffff; --ink: #17211d; --soft: #55635c; --line: #b9c4be; --accent: #0f6d56;
  --mine: #e0efe9; --good: #2f9a6d; --wait: #d9a02b; --bad: #b3261e; --leave: #7b93b8;
  --wait-bg: #fbecc9; --bad-bg: #fbe4e1; }
@media (prefers-color-scheme: dark) {
  svg { --ground: #101513; --card: #19201d; --ink: #e6ece9; --soft: #9fb0a8; --line: #45534c; --accent: #5fd0ad;
    --mine: #1b3a30; --good: #3fae80; --wait: #c8952b; --bad: #ff9d94; --leave: #6d86ad;
    --wait-bg: #40310a; --bad-bg: #451a17; }
}
text { font: 14px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: var(--ink); }
.b { font-weight: 600; } .s { font-size: 12px; fill: var(--soft); } .h { font-size: 16px; font-weight: 600; }
.c { font-family: ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace; font-size: 12px; }
.a { fill: var(--accent); } .r { fill: var(--bad); } .n { font-size: 11px; font-weight: 700; fill: var(--card); }
.m { text-anchor: middle; } .e { text-anchor: end; }
.card { fill: var(--card); stroke: var(--line); } .mine { fill: var(--mine); stroke: var(--accent); }
.wait { fill: var(--wait-bg); stroke: var(--wait); } .bad { fill: var(--bad-bg); stroke: var(--bad); }
.line { fill: none; stroke: var(--soft); stroke-width: 1.4; }
.path { fill: none; stroke: var(--accent); stroke-width: 2; }
.fail { fill: none; stroke: var(--bad); stroke-width: 1.4; stroke-dasharray: 5 3; }
.f-line { fill: var(--soft); } .f-path { fill: var(--accent); } .f-fail { fill: var(--bad); }
.grid { stroke: var(--line); stroke-width: 1; } .g { fill: var(--good); }
.w { fill: var(--wait); } .l { fill: var(--leave); }
.o { fill: var(--accent); } .p { fill: var(--line); }
"""


class Picture:
    """Collects what is drawn; `document` is the whole of it. `says` is for those who do not see it."""

    def __init__(self, width: int, height: int, title: str, says: str) -> None:
        self.width, self.height, self.title, self.says = width, height, title, says
        self._parts: list[str] = []

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        self._parts.append(f'<text x="{x:g}" y="{y:g}" class="{kind}">{escape(words, quote=False)}</text>')

    def bar(self, x: float, y: float, width: float, height: float, kind: str, says: str = "") -> None:
        title = f"<title>{escape(says, quote=False)}</title>" if says else ""
        place = f'x="{x:.4g}" y="{y:.4g}" width="{width:.4g}" height="{height:.4g}"'
        self._parts.append(f'<rect {place} rx="3" class="{kind}">{title}</rect>')

    def box(self, x: float, y: float, width: float, height: float, lines: Sequence[str], kind: str = "card") -> None:
        """A box with its name in the first line, and soft small lines below, all centred."""
        self._parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="9" class="{kind}"/>')
        top = y + height / 2 - 9 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 18 * number, line, "m b" if number == 0 else "m s")

    def frame(self, x: float, y: float, width: float, height: float, name: str, kind: str = "card") -> None:
        """A box around others, its name at its top."""
        self._parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="12" class="{kind}"/>')
        self.text(x + 14, y + 22, name, "b")

    def number(self, x: float, y: float, number: int) -> None:
        self._parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="9.5" class="o"/>')
        self.text(x, y + 4, str(number), "m n")

    def line(self, start: Point, end: Point) -> None:
        ends = f'x1="{start[0]:.4g}" y1="{start[1]:.4g}" x2="{end[0]:.4g}" y2="{end[1]:.4g}"'
        self._parts.append(f'<line {ends} class="grid"/>')

    def arrow(self, points: Sequence[Point], kind: str = "line") -> None:
        """Straight pieces with round corners, and a head at the last point."""
        (x0, y0), *_ = points
        way = f"M{x0:g} {y0:g}"
        for before, corner, after in zip(points, points[1:], points[2:], strict=False):
            near, beyond = _towards(corner, before, 8), _towards(corner, after, 8)
            way += f"L{near[0]:.4g} {near[1]:.4g}Q{corner[0]:g} {corner[1]:g} {beyond[0]:.4g} {beyond[1]:.4g}"
        tip, base = points[-1], _towards(points[-1], points[-2], 8)
        way += f"L{base[0]:.4g} {base[1]:.4g}"
        across = ((tip[1] - base[1]) / 2, (base[0] - tip[0]) / 2)
        head = (tip, (base[0] + across[0], base[1] + across[1]), (base[0] - across[0], base[1] - across[1]))
        corners = " ".join(f"{x:.4g},{y:.4g}" for x, y in head)
        self._parts.append(f'<path d="{way}" class="{kind}"/><polygon points="{corners}" class="f-{kind}"/>')

    def document(self) -> str:
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
                f'viewBox="0 0 {self.width} {self.height}" role="img" aria-labelledby="title desc">',
                f'<title id="title">{escape(self.title, quote=False)}</title>',
                f'<desc id="desc">{escape(self.says, quote=False)}</desc>',
                f"<style>{_STYLE}</style>",
                f'<rect width="{self.width}" height="{self.height}" rx="14" fill="var(--ground)"/>',
                *self._parts,
                "</svg>\n",
            ]
        )


def _towards(start: Point, end: Point, length: float) -> Point:
    dx, dy = end[0] - start[0], end[1] - start[1]
    whole = max(1.0, (dx * dx + dy * dy) ** 0.5)
    return start[0] + dx / whole * length, start[1] + dy / whole * length
