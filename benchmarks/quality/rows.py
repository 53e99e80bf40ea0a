"""The rows of the scoreboard: the shipped checkpoints, and how each is sampled."""

from typing import NamedTuple

from benchmarks.quality.samples import PlanOptions, Sampler
from lesson_09.iddpm import Variance


class Row(NamedTuple):
    """A shipped checkpoint, and how it is sampled."""

    network: str
    checkpoint: str
    sampler: Sampler
    num_steps: int | None = None
    guidance: float = 1.0
    eta: float = 0.0
    sigma_hat: bool = False
    variance: Variance | None = None

    @property
    def method(self) -> str:
        """The sampler in words."""
        if self.sampler == "ddim":
            noise = "σ̂" if self.sigma_hat else f"η = {self.eta:g}"
            return f"DDIM, {noise}" + (f", guidance {self.guidance:g}" * (self.guidance != 1))
        steps = "strides" if (self.num_steps or 1000) < 1000 else "all steps"
        return f"{steps}, {NOISE[self.variance]}" if self.variance else steps


NOISE = {"beta": "β", "beta_tilde": "β̃", "learned": "learned variance"}
DPM = "lesson_02/pretrained/mnist.safetensors"
DDPM = "lesson_05/pretrained/mnist.safetensors"
CLASSES = "lesson_05/class_conditional/pretrained/mnist.safetensors"
TEXT = "lesson_06/pretrained/text_to_image.safetensors"
HYBRID = "lesson_09/pretrained/mnist.safetensors"
VLB = "lesson_09/pretrained/vlb.safetensors"
STEPS = (100, 50, 25, 10)
ETAS: dict[str, tuple[float, bool]] = {  # the end of a row's name: η, and whether σ̂
    "": (0.0, False),
    "_eta_0.5": (0.5, False),
    "_eta_1": (1.0, False),
    "_sigma_hat": (1.0, True),
}


def ddim(network: str, checkpoint: str, num_steps: int = 50, guidance: float = 1.0) -> Row:
    return Row(network, checkpoint, "ddim", num_steps, guidance)


def strided(network: str, checkpoint: str, num_steps: int, variance: Variance) -> Row:
    return Row(network, checkpoint, "strided", num_steps, variance=variance)


FEW = (10,)  # a long step with β̃ is a step of DDIM with η = 1, and one with β is about σ̂
FIXED: tuple[Variance, ...] = ("beta_tilde", "beta")
ROWS = {
    "dpm": Row("DPM", DPM, "ddpm"),
    "ddpm": Row("DDPM", DDPM, "ddpm", variance="beta"),
    **{f"ddpm_{S}_{v}": strided("DDPM", DDPM, S, v) for v in FIXED for S in FEW},
    **{
        f"ddim_{S}{end}": ddim("DDPM", DDPM, S)._replace(eta=eta, sigma_hat=sigma_hat)
        for end, (eta, sigma_hat) in ETAS.items()
        for S in STEPS
    },
    "classes": ddim("DDPM with labels", CLASSES),
    "classes_guided": ddim("DDPM with labels", CLASSES, guidance=2.0),
    "text": ddim("DDPM with prompts", TEXT),
    "text_guided": ddim("DDPM with prompts", TEXT, guidance=2.0),
    "hybrid_1000": strided("IDDPM, L_hybrid", HYBRID, 1000, "learned"),
    **{f"hybrid_{S}": strided("IDDPM, L_hybrid", HYBRID, S, "learned") for S in STEPS},
    **{f"hybrid_{S}_{v}": strided("IDDPM, L_hybrid", HYBRID, S, v) for v in FIXED for S in FEW},
    "vlb_25": strided("IDDPM, L_vlb", VLB, 25, "learned"),
}
REAL = "real"


def plan_options(row: Row) -> PlanOptions:
    options = PlanOptions(sampler=row.sampler, num_steps=row.num_steps, guidance=row.guidance)
    options.eta, options.sigma_hat, options.variance = row.eta, row.sigma_hat, row.variance
    return options


# Rows whose first ten samples are shown.
STRIPS = [REAL, "dpm", "ddpm", "ddim_50", "ddim_10", "ddim_10_eta_1", "classes"]
STRIPS += ["classes_guided", "text", "text_guided", "hybrid_50", "vlb_25"]


def is_in_readme(name: str) -> bool:
    """Whether the README shows the row. Other η and other variances of lesson 9's network are in
    the tables of their lessons' READMEs."""
    row = ROWS[name]
    return row.eta == 0 and (row.checkpoint != HYBRID or row.variance == "learned")
