"""The parts of an SVG diagram: words, arrows, images. Its background is opaque, so that it looks
the same on a light and on a dark page."""

from torch import Tensor


def svg(width: int, height: int, parts: list[str]) -> str:
    """The file: a white page, the head of an arrow, and the parts."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    head += f'width="{width}" height="{height}" font-family="serif" font-size="15">'
    arrow = '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
    arrow += 'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#333"/></marker></defs>'
    page = '<rect width="100%" height="100%" rx="6" fill="#fff"/>'
    return "\n".join([head, arrow, page, *parts, "</svg>\n"])


def text(x: float, y: float, words: str, size: int = 15, anchor: str = "middle") -> str:
    """Words, in which _{...} is a subscript."""
    shift = f'<tspan dy="4" font-size="{round(0.7 * size)}">'
    words = words.replace("_{", shift).replace("}", '</tspan><tspan dy="-4">\u200b</tspan>')
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}">{words}</text>'


def line(path: str, dashed: bool = False, arrow: bool = True) -> str:
    style = ' stroke-dasharray="5 4"' if dashed else ""
    head = ' marker-end="url(#head)"' if arrow else ""
    return f'<path d="{path}" fill="none" stroke="#333" stroke-width="1.4"{style}{head}/>'


def pixels(x: float, y: float, size: float, image: Tensor) -> list[str]:
    """An image (H, W) in [-1, 1], one square for each pixel."""
    side, parts = size / len(image), []
    for row, values in enumerate(image.tolist()):
        for column, value in enumerate(values):
            grey = 17 * round(15 * min(max((value + 1) / 2, 0), 1))
            at = (
                f'x="{x + side * column:g}" y="{y + side * row:g}" fill="rgb({grey},{grey},{grey})"'
            )
            parts.append(f'<rect {at} width="{side:g}" height="{side:g}"/>')
    return parts
