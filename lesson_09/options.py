"""The flags of lesson 9's training, besides those of every training run."""

from dataclasses import dataclass

from common.options import TrainingOptions
from lesson_09.iddpm import Schedule, Variance
from lesson_09.timesteps import TimestepSampler


@dataclass
class IDDPMOptions(TrainingOptions):
    """The flags of Improved DDPM.

    Args:
        schedule: schedule of the forward variances [Nichol21 Section 3.2].
        variance: variance of the reverse steps, learned or fixed [Nichol21 Section 3.1].
        simple_weight: weight of L_simple in the loss.
        vlb_weight: λ, the weight of L_vlb. The two weights are (1, 0) for L_simple, (1, 0.001) for
            L_hybrid and (0, 1) for L_vlb.
        timestep_sampler: uniform; or loss_aware, importance sampling for L_vlb [Nichol21 Section
            3.3].
        num_steps: S, the number of steps of the samples at the end; all T unless given.
    """

    num_timesteps: int = 4000
    learning_rate: float = 1e-4
    num_warmup_steps: int = 0
    schedule: Schedule = "cosine"
    variance: Variance = "learned"
    simple_weight: float = 1.0
    vlb_weight: float = 1e-3
    timestep_sampler: TimestepSampler = "uniform"
    num_steps: int | None = None
