"""Draw gradients.svg: what the two terms of L_hybrid train."""

from common import cli
from common.files import output_folder
from common.options import ScriptOptions
from common.svg import BLUE, GREY, RED, Drawings, arrow, box, line, page, save, text


def main(options: ScriptOptions = ScriptOptions()) -> None:
    """Draw gradients.svg."""
    save(DRAWINGS, output_folder(options.output_dir, "lesson_09"))


def gradients() -> str:
    """The forward pass of L_hybrid in grey, and the gradient of each term in colour."""
    parts = [
        text(430, 34, "Which term of L_{hybrid} trains what", size=17),
        box(20, 165, 90, 60, "x_{t},  t"),
        box(160, 140, 130, 110, "shared", "layers"),
        box(360, 85, 70, 50, "ε̂"),
        box(360, 265, 70, 50, "v"),
        box(520, 175, 120, 50, "mean μ"),
        box(520, 265, 120, 50, "variance σ²"),
        box(710, 75, 135, 70, "L_{simple}", "|ε − ε̂|²", edge=BLUE),
        box(710, 195, 135, 90, "λ L_{vlb}", "KL to the", "true posterior", edge=RED),
        arrow(110, 195, 160, 195),
        arrow(290, 178, 360, 122),
        arrow(290, 212, 360, 278),
        arrow(430, 102, 710, 102),
        arrow(430, 124, 520, 188),
        arrow(430, 280, 520, 280),
        arrow(640, 200, 710, 220),
        arrow(640, 280, 710, 256),
        arrow(580, 352, 580, 315),
        text(580, 370, "log β̃_{t} and log β_{t}", GREY),
        # The gradients run backwards, beside the arrows of the forward pass.
        arrow(710, 118, 430, 118, BLUE, dashed=True),
        arrow(360, 102, 290, 158, BLUE, dashed=True),
        arrow(710, 274, 640, 298, RED, dashed=True),
        arrow(520, 298, 430, 298, RED, dashed=True),
        arrow(360, 298, 290, 232, RED, dashed=True),
        # The cut between ε̂ and the mean.
        line("M462 172L490 140", RED, head=False, width=5),
        text(512, 143, "stop-gradient:", RED, 13, "start"),
        text(512, 160, "eps_hat.detach()", RED, 13, "start"),
    ]
    legend = {"forward": GREY, "gradient of L_{simple}": BLUE, "gradient of λ L_{vlb}": RED}
    for k, (words, colour) in enumerate(legend.items()):
        parts.append(arrow(30, 330 + 22 * k, 70, 330 + 22 * k, colour, dashed=colour != GREY))
        parts.append(text(78, 335 + 22 * k, words, colour, 13, "start"))
    return page(865, 400, parts)


DRAWINGS: Drawings = {"gradients.svg": gradients}


if __name__ == "__main__":
    cli.run(main)
