"""The drawing of lesson 6: which image depends on which, as an SVG.

The card has its own light background, so that it can be read on a light and on a dark page.
"""

import math
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT = 760, 530
INK, GREY, BLUE, RED, PALE = "#1f2328", "#6e7781", "#0550ae", "#b42318", "#c4c9cf"
NODES = [130 + 125 * k for k in range(5)]  # the x of x_0 ... x_4
RADIUS = 20


class Point(NamedTuple):
    x: float
    y: float


def save_graphs(path: Path) -> None:
    path.write_text(graphs(), encoding="utf-8")


def graphs() -> str:
    """Three rows: DDPM's chain, DDIM's process given x0, and sampling that skips times."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img" font-family="Helvetica, Arial, sans-serif">',
        "<title>The chain of DDPM, the process of DDIM, and sampling that skips times</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="#ffffff" stroke="{PALE}"/>',
        "<defs>",
        *[marker(color) for color in (GREY, BLUE, RED)],
        "</defs>",
        *chain(105),
        *non_markovian(315),
        *skipping(485),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def chain(y: float) -> list[str]:
    parts = heading(y - 70, "DDPM", "a Markov chain: each image depends on the one before it")
    for k in range(4):
        parts.append(arc(NODES[k], NODES[k + 1], y, 20, GREY))
        parts.append(arc(NODES[k + 1], NODES[k], y, -20, BLUE))
    middle = (NODES[1] + NODES[2]) / 2
    parts += [text(middle, y - 34, "p(x|t-1| | x|t|)", BLUE)]
    parts += [text(middle, y + 44, "q(x|t| | x|t-1|)", GREY)]
    return parts + nodes(y, range(5))


def non_markovian(y: float) -> list[str]:
    parts = heading(y - 122, "DDIM, defined", "each step depends on x|0| too: non-Markovian")
    for k in range(4, 1, -1):
        parts.append(arc(NODES[k], NODES[k - 1], y, 0, BLUE))
        parts.append(arc(NODES[0], NODES[k - 1], y, -22 * (k - 1), RED))
    parts.append(arc(NODES[0], NODES[4], y, -98, RED))
    parts.append(text((NODES[2] + NODES[3]) / 2, y + 40, "q|σ|(x|s| | x|t|, x|0|)", BLUE))
    parts.append(text(NODES[3] + 62, y - 78, "q(x|4| | x|0|)", RED))
    return parts + nodes(y, range(5))


def skipping(y: float) -> list[str]:
    parts = heading(y - 92, "DDIM, sampled", "x̂|0|, the estimate, replaces x|0|; times are skipped")
    for later, earlier in ((4, 2), (2, 0)):
        parts.append(arc(NODES[later], NODES[earlier], y, -36, BLUE))
        words = "√ᾱ|s| x̂|0| + k ε̂ + σz" if earlier else "x̂|0|"
        parts.append(text((NODES[later] + NODES[earlier]) / 2, y - 50, words, BLUE))
    return parts + nodes(y, (0, 2, 4))


def heading(y: float, name: str, rest: str) -> list[str]:
    bold = f'<tspan font-size="17" font-weight="bold">{name}</tspan>'
    words = subscripts(f"\u2003{rest}", 15)
    return [f'<text x="30" y="{y:g}" font-size="15" fill="{INK}">{bold}{words}</text>']


def nodes(y: float, used: range | tuple[int, ...]) -> list[str]:
    """x_0 ... x_4, those that are not used pale; from the clean image to noise."""
    parts = []
    for k, x in enumerate(NODES):
        color = INK if k in used else PALE
        parts.append(
            f'<circle cx="{x}" cy="{y:g}" r="{RADIUS}" fill="#ffffff" stroke="{color}" '
            f'stroke-width="1.6"/>'
        )
        parts.append(text(x, y + 5, f"x|{k}|", color, 16))
    parts.append(text(NODES[0] - 62, y + 5, "image", GREY))
    parts.append(text(NODES[4] + 62, y + 5, "noise", GREY))
    return parts


def arc(start: float, end: float, y: float, bend: float, color: str) -> str:
    """An arrow between two nodes, by a quadratic curve whose middle is bend below their line."""
    middle = Point((start + end) / 2, y + 2 * bend)
    first, last = rim(Point(start, y), middle), rim(Point(end, y), middle)
    return (
        f'<path d="M{first.x:.1f} {first.y:.1f} Q{middle.x:.1f} {middle.y:.1f} '
        f'{last.x:.1f} {last.y:.1f}" fill="none" stroke="{color}" stroke-width="1.6" '
        f'marker-end="url(#{head(color)})"/>'
    )


def rim(centre: Point, towards: Point) -> Point:
    """The point on the circle of a node, and a little outside, in the direction of another."""
    dx, dy = towards.x - centre.x, towards.y - centre.y
    scale = (RADIUS + 3) / math.hypot(dx, dy)
    return Point(centre.x + scale * dx, centre.y + scale * dy)


def marker(color: str) -> str:
    return (
        f'<marker id="{head(color)}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" '
        f'markerHeight="8" orient="auto"><path d="M0 1 10 5 0 9z" fill="{color}"/></marker>'
    )


def head(color: str) -> str:
    return f"head-{color[1:]}"


def text(x: float, y: float, words: str, color: str, size: int = 14) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="middle">'
        f"{subscripts(words, size)}</text>"
    )


def subscripts(words: str, size: int) -> str:
    """x|t| with the t lowered; a bar between spaces is a bar."""
    parts = words.replace(" | ", " \\ ").split("|")
    for k in range(1, len(parts), 2):
        small = f'<tspan dy="4" font-size="{size - 4}">{parts[k]}</tspan>'
        parts[k] = small + '<tspan dy="-4">\u200b</tspan>'
    return "".join(parts).replace(" \\ ", " | ")
