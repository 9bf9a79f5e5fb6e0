"""Line plots as SVG that a script here writes: small text files, in the colours of the page's light or dark theme."""

from collections.abc import Sequence

COLORS = ("0072b2", "d55e00", "009e73", "cc79a7", "8a6d00", "56b4e9", "7b3294")
ON_DARK = ("3a9bdc", "f0883e", "2fbf94", "e39ac3", "d9b83a", "9ad4f5", "b58ad6")
DASHES = ("", "", "", "7 3", "7 3", "2 3", "2 3")
STYLE = """  svg { background: #fbfcfd }
  text { font: 12px system-ui, sans-serif; fill: #24292f } .title { font-weight: 600 }
  .back { fill: #fbfcfd } .panel { fill: #ffffff; stroke: #8c959f } .tick { stroke: #8c959f }
  .area { fill: #c5ccd3 } .line { fill: none; stroke-width: 2 }
"""
STYLE_ON_DARK = """    svg { background: #16191d } text { fill: #e6edf3 } .area { fill: #4a525b }
    .back { fill: #16191d } .panel { fill: #1e2329; stroke: #8b949e } .tick { stroke: #8b949e }
"""


def _strokes(colors: Sequence[str], indent: str) -> str:
    rules = [f"{indent}.c{number} {{ stroke: #{color} }}\n" for number, color in enumerate(colors, 1)]
    return "".join(rules)


class Picture:
    """Its parts, from back to front."""

    def __init__(self, width: int, height: int, label: str):
        dashes = [f"  .c{n} {{ stroke-dasharray: {dash} }}\n" for n, dash in enumerate(DASHES, 1) if dash]
        dark = f"  @media (prefers-color-scheme: dark) {{\n{STYLE_ON_DARK}{_strokes(ON_DARK, '    ')}  }}\n"
        style = STYLE + _strokes(COLORS, "  ") + "".join(dashes) + dark
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        )
        self.parts = [head, f"<style>\n{style}</style>", f'<rect class="back" width="{width}" height="{height}"/>']

    def add(self, part: str) -> None:
        self.parts.append(part)

    def words(self, words: str, x: float, y: float, anchor: str = "start", rest: str = "") -> None:
        self.add(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{rest}>{words}</text>')

    def key(self, entries: Sequence[tuple[str, str]], x: float, y: float) -> None:
        """What each line is: its class and a name, side by side."""
        for which, name in entries:
            if which == "area":
                self.add(f'<rect class="area" x="{x:g}" y="{y - 10:g}" width="26" height="12"/>')
            else:
                self.add(f'<path class="line {which}" d="M{x:g} {y - 4:g}h26"/>')
            self.words(name, x + 32, y)
            x += 176

    def text(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


class Panel:
    """A plot in a picture: where it lies, x, y, width and height, and the ranges of both axes."""

    def __init__(
        self,
        picture: Picture,
        box: tuple[float, float, float, float],
        x_range: tuple[float, float],
        y_range: tuple[float, float],
    ):
        self.picture, self.box, self.x_range, self.y_range = picture, box, x_range, y_range

    def x(self, value: float) -> float:
        left, _, width, _ = self.box
        low, high = self.x_range
        return left + width * (value - low) / (high - low)

    def y(self, value: float) -> float:
        _, top, _, height = self.box
        low, high = self.y_range
        return top + height * (high - value) / (high - low)

    def frame(self, title: str) -> None:
        left, top, width, height = self.box
        self.picture.add(f'<rect class="panel" x="{left:g}" y="{top:g}" width="{width:g}" height="{height:g}"/>')
        self.picture.words(title, left + width / 2, top - 8, "middle", ' class="title"')

    def x_ticks(self, ticks: dict[float, str], label: str) -> None:
        left, top, width, height = self.box
        for value, words in ticks.items():
            self.picture.add(f'<path class="tick" d="M{self.x(value):.1f} {top + height:g}v4"/>')
            self.picture.words(words, round(self.x(value), 1), top + height + 17, "middle")
        if label:
            self.picture.words(label, left + width / 2, top + height + 34, "middle")

    def y_ticks(self, ticks: dict[float, str], label: str) -> None:
        left, top, _, height = self.box
        for value, words in ticks.items():
            self.picture.add(f'<path class="tick" d="M{left:g} {self.y(value):.1f}h-4"/>')
            if words:
                self.picture.words(words, left - 7, round(self.y(value) + 4, 1), "end")
        if label:
            x, y = left - 44, top + height / 2
            self.picture.words(label, x, y, "middle", f' transform="rotate(-90 {x:g} {y:g})"')

    def _path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in zip(xs, ys, strict=True))

    def area(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        """Filled down to 0."""
        left, right, ground = self.x(xs[0]), self.x(xs[-1]), self.y(0)
        self.picture.add(
            f'<path class="area" d="M{left:.1f} {ground:.1f}L{self._path(xs, ys)}L{right:.1f} {ground:.1f}z"/>'
        )

    def line(self, xs: Sequence[float], ys: Sequence[float], number: int) -> None:
        self.picture.add(f'<path class="line c{number}" d="M{self._path(xs, ys)}"/>')
