"""The parts of an SVG diagram: words with subscripts, arrows, boxes, images.

No plotting library is used, so the files are the same everywhere. The background is opaque, so a
diagram looks the same on a light and on a dark page.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

INK, GREY, PALE, PAPER = "#1f2328", "#57606a", "#c4c9cf", "#f6f8fa"
BLUE, RED, ORANGE = "#0a58ca", "#c0182b", "#b76100"  # in a chain: blue is q, red is p
FILLS = ("#9dbde6", "#d3b0df", "#b9d19e")  # of boxes
Drawings = dict[str, Callable[[], str]]  # file name -> the function that draws it


def save(drawings: Drawings, folder: Path) -> None:
    for name, draw in drawings.items():
        (folder / name).write_text(draw(), encoding="utf-8", newline="\n")
        print(f"{folder}/{name}")


def page(width: int, height: int, parts: Iterable[str]) -> str:
    """The whole file: the heads of arrows in each colour, a white background and the parts."""
    size, body = f'width="{width}" height="{height}"', "\n".join(parts)
    form = 'viewBox="0 0 10 10" refX="9" refY="5" markerUnits="userSpaceOnUse" orient="auto"'
    heads = "".join(
        f'<marker id="head{colour}" {form} markerWidth="11" markerHeight="11">'
        f'<path d="M0 1L10 5L0 9z" fill="#{colour}"/></marker>'
        for colour in sorted(set(re.findall(r"url\(#head(\w+)\)", body)))
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {size}
 font-family="DejaVu Sans, Verdana, sans-serif">
<defs>{heads}</defs>
<rect {size} rx="8" fill="#ffffff"/>
{body}
</svg>
"""


def text(
    x: float, y: float, words: str, colour: str = INK, size: int = 14, anchor: str = "middle"
) -> str:
    """Words, in which _{...} is a subscript."""
    low = rf'<tspan dy="4" font-size="{round(0.75 * size)}">\1</tspan><tspan dy="-4">\2</tspan>'
    words = re.sub(r"_\{(.*?)\}(.*?)(?=_\{|$)", low, words)
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}" font-size="{size}">{words}</text>'


def line(
    path: str, colour: str = INK, *, dashed: bool = False, head: bool = True, width: float = 1.8
) -> str:
    """A line along an SVG path, with the head of an arrow at its end."""
    style = f'stroke="{colour}" stroke-width="{width}"'
    style += ' stroke-dasharray="6 4"' if dashed else ""
    style += f' marker-end="url(#head{colour[1:]})"' if head else ""
    return f'<path d="{path}" fill="none" {style}/>'


def arrow(
    x1: float, y1: float, x2: float, y2: float, colour: str = GREY, *, dashed: bool = False
) -> str:
    return line(f"M{x1:g} {y1:g}L{x2:g} {y2:g}", colour, dashed=dashed)


def through(points: Iterable[tuple[float, float]]) -> str:
    """The path from point to point."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def box(
    x: float, y: float, width: float, height: float, *words: str, edge: str = INK, fill: str = PAPER
) -> str:
    """A box around lines of words."""
    first = y + height / 2 + 5 - 10 * (len(words) - 1)
    shape = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" '
    shape += f'fill="{fill}" stroke="{edge}" stroke-width="1.5"/>'
    return shape + "".join(text(x + width / 2, first + 20 * k, w) for k, w in enumerate(words))


def circle(x: float, y: float, radius: float, words: str, colour: str = INK) -> str:
    shape = f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" '
    shape += f'fill="{PAPER}" stroke="{colour}" stroke-width="1.5"/>'
    return shape + text(x, y + 5, words, colour, 16)


def pixels(x: float, y: float, size: float, image: Tensor) -> str:
    """An image (H, W) in [-1, 1], one square for each pixel."""
    side, squares = size / len(image), []
    for row, values in enumerate(image.tolist()):
        for column, value in enumerate(values):
            grey = 17 * round(15 * min(max((value + 1) / 2, 0), 1))
            at = f'x="{x + side * column:g}" y="{y + side * row:g}" width="{side:g}"'
            squares.append(f'<rect {at} height="{side:g}" fill="rgb({grey},{grey},{grey})"/>')
    return f'<g shape-rendering="crispEdges">{"".join(squares)}</g>'
