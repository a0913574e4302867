"""A few shapes of SVG in the colours of a light or a dark page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

Point = tuple[float, float]

# What shapes are filled with and drawn in, on a page of each kind.
THEMES = {
    "light": {
        "ink": "#1f2933",
        "soft": "#52606d",
        "line": "#7b8794",
        "plain": "#f1f4f7",
        "trained": "#d9f2e6",
        "frozen": "#dcebfb",
        "given": "#fbeed5",
        "gradient": "#c2410c",
        "a": "#2f7ec7",
        "b": "#2f9e6e",
        "c": "#c98a15",
        "d": "#8a5cc2",
        "e": "#c2506b",
        "f": "#4a9aa5",
    },
    "dark": {
        "ink": "#e6e9ef",
        "soft": "#aeb6c4",
        "line": "#8591a3",
        "plain": "#2c313c",
        "trained": "#1d4436",
        "frozen": "#1e3b57",
        "given": "#4d3d1c",
        "gradient": "#fb923c",
        "a": "#5aa5ea",
        "b": "#4cc592",
        "c": "#e5ae48",
        "d": "#b08be6",
        "e": "#e97f97",
        "f": "#6cc3cf",
    },
}


@dataclass
class Drawing:
    """Shapes on a transparent ground.

    Attributes:
        width, height: units; text is about 15 of them high.
        title: what the drawing shows, for those who hear it.
        colors: by the names of `THEMES`.
    """

    width: int
    height: int
    title: str
    colors: dict[str, str]
    shapes: list[str] = field(default_factory=list)

    def text(
        self, at: Point, words: str, size: int = 15, color: str = "ink", anchor: str = "middle", bold: bool = False
    ) -> None:
        """One line whose base is at `at`."""
        weight = ' font-weight="600"' if bold else ""
        self.shapes.append(
            f'<text x="{_n(at[0])}" y="{_n(at[1])}" font-size="{size}" fill="{self.colors[color]}" '
            f'text-anchor="{anchor}"{weight}>{escape(words)}</text>'
        )

    def rect(self, at: Point, size: Point, fill: str | None = None, line: str | None = None, corner: float = 2) -> None:
        """A rectangle; `fill` and `line` are names of colours."""
        inside = self.colors[fill] if fill else "none"
        border = f' stroke="{self.colors[line]}" stroke-width="1.5"' if line else ""
        self.shapes.append(
            f'<rect x="{_n(at[0])}" y="{_n(at[1])}" width="{_n(size[0])}" height="{_n(size[1])}" rx="{_n(corner)}" '
            f'fill="{inside}"{border}/>'
        )

    def box(self, at: Point, size: Point, title: str, lines: Sequence[str] = (), fill: str = "plain") -> None:
        """A rectangle with a title and smaller lines, in its middle."""
        self.rect(at, size, fill, "line", 8)
        middle = at[0] + size[0] / 2
        top = at[1] + (size[1] - 19 * len(lines)) / 2 + 5
        self.text((middle, top), title, bold=True)
        for index, words in enumerate(lines, 1):
            self.text((middle, top + 19 * index), words, 13, "soft")

    def line(self, points: Sequence[Point], color: str = "line", width: float = 2, dashed: bool = False) -> None:
        """Straight lines from point to point."""
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self.shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{self.colors[color]}" stroke-width="{_n(width)}"{dashes}/>'
        )

    def arrow(self, points: Sequence[Point], color: str = "line") -> None:
        """Lines with a head at their end."""
        (x0, y0), (x1, y1) = points[-2:]
        angle = math.atan2(y1 - y0, x1 - x0)
        back = (x1 - 8 * math.cos(angle), y1 - 8 * math.sin(angle))
        self.line([*points[:-1], back], color)
        sides = [(x1 - 11 * math.cos(angle + turn), y1 - 11 * math.sin(angle + turn)) for turn in (-0.45, 0.45)]
        path = " ".join(f"{_n(x)},{_n(y)}" for x, y in [(x1, y1), *sides])
        self.shapes.append(f'<polygon points="{path}" fill="{self.colors[color]}"/>')

    def dot(self, at: Point, radius: float, fill: str | None = None, line: str | None = None) -> None:
        """A circle."""
        inside = self.colors[fill] if fill else "none"
        border = f' stroke="{self.colors[line]}" stroke-width="1.5"' if line else ""
        self.shapes.append(f'<circle cx="{_n(at[0])}" cy="{_n(at[1])}" r="{_n(radius)}" fill="{inside}"{border}/>')

    def svg(self) -> str:
        """The file."""
        body = "\n".join(self.shapes)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" font-family="system-ui, sans-serif">\n'
            f"<title>{escape(self.title)}</title>\n{body}\n</svg>\n"
        )


def _n(value: float) -> str:
    """A number in few digits, the same on every machine."""
    return f"{value:.1f}".removesuffix(".0")
