"""The networks of this shape that others published, and their names for the layers of `unet.py`.

    python -m common.import_weights FILE

makes such a file a checkpoint of this lesson. Each table below has our name of a layer, in the
order in which an image passes through the network, and theirs. {level} counts the levels as they
run, {depth} from the full image; {number} counts the blocks of a level.
"""

from typing import Any

from common.errors import UserError
from common.lessons import Published
from common.network_checks import height_and_width
from lesson_05.unet import UNet

__all__ = ["DIFFUSERS", "PUBLISHED", "SAMPLE", "UNet"]

# The order of the rows of SelfAttention.qkv.
QKV = "three heads c"

# huggingface/diffusers, UNet2DModel.
DIFFUSERS = {
    "time.0": "time_embedding.linear_1",
    "time.2": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "down.residual": "down_blocks.{level}.resnets.{number}",
    "down.attention": "down_blocks.{level}.attentions.{number}",
    "down": "down_blocks.{level}.downsamplers.0.conv",
    "middle.0.residual": "mid_block.resnets.0",
    "middle.0.attention": "mid_block.attentions.0",
    "middle.1.residual": "mid_block.resnets.1",
    "up.residual": "up_blocks.{level}.resnets.{number}",
    "up.attention": "up_blocks.{level}.attentions.{number}",
    "up": "up_blocks.{level}.upsamplers.0.conv",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
    "residual.norm1": "norm1",
    "residual.conv1": "conv1",
    "residual.time": "time_emb_proj",
    "residual.norm2": "norm2",
    "residual.conv2": "conv2",
    "residual.shortcut": "conv_shortcut",
    "attention.norm": "group_norm",
    "attention.qkv": "to_q to_k to_v",
    "attention.out": "to_out.0",
}
# The same in files of 2022, google/ddpm-* among them.
DIFFUSERS_2022 = DIFFUSERS | {"attention.qkv": "query key value", "attention.out": "proj_attn"}

# ermongroup/ddim, models/diffusion.py, and pesser/pytorch_diffusion. Its attention layers are 1x1
# convolutions; up.0 is the level of the full image, as down.0 is.
ERMONGROUP = {
    "time.0": "temb.dense.0",
    "time.2": "temb.dense.1",
    "conv_in": "conv_in",
    "down.residual": "down.{depth}.block.{number}",
    "down.attention": "down.{depth}.attn.{number}",
    "down": "down.{depth}.downsample.conv",
    "middle.0.residual": "mid.block_1",
    "middle.0.attention": "mid.attn_1",
    "middle.1.residual": "mid.block_2",
    "up.residual": "up.{depth}.block.{number}",
    "up.attention": "up.{depth}.attn.{number}",
    "up": "up.{depth}.upsample.conv",
    "norm_out": "norm_out",
    "conv_out": "conv_out",
    "residual.norm1": "norm1",
    "residual.conv1": "conv1",
    "residual.time": "temb_proj",
    "residual.norm2": "norm2",
    "residual.conv2": "conv2",
    "residual.shortcut": "nin_shortcut",
    "attention.norm": "norm",
    "attention.qkv": "q k v",
    "attention.out": "proj_out",
}

# Ho20's settings: 1000 steps, β from 0.0001 to 0.02, the same for every data set.
PROCESS = {"num_timesteps": 1000, "beta_1": 1e-4, "beta_T": 0.02}
CIFAR10 = {"image_channels": 3, "image_size": 32, "multipliers": [1, 2, 2, 2]}
CELEBA = {"image_channels": 3, "image_size": 64, "multipliers": [1, 2, 2, 2, 4]}
PHOTOS = {"image_channels": 3, "image_size": 256, "multipliers": [1, 1, 2, 2, 4, 4], "dropout": 0.0}

# The variances are those with which the authors sampled: β on CIFAR-10 and CelebA, β̃ at 256x256
# (hojonathanho/diffusion, scripts/; ermongroup/ddim, configs/). Shapes cannot tell CelebA-HQ,
# churches, bedrooms and cats apart.
PUBLISHED = {
    "ddpm-cifar10-32": Published(
        [DIFFUSERS, DIFFUSERS_2022, ERMONGROUP],
        "cifar10",
        {**PROCESS, "variance": "beta", "network": CIFAR10},
    ),
    "ddim-celeba-64": Published(
        [ERMONGROUP], "celeba", {**PROCESS, "variance": "beta", "network": CELEBA}
    ),
    "ddpm-256": Published(
        [DIFFUSERS, DIFFUSERS_2022, ERMONGROUP],
        "photos of 256x256",
        {**PROCESS, "variance": "beta_tilde", "network": PHOTOS},
    ),
}
# The command that samples them, in the root of the repository.
SAMPLE = ["lesson_06/sample_ddim.py", "--num_steps", "50"]

# What this network is in the words of UNet2DModel's config.json.
DIFFUSERS_CONFIG = {
    "norm_eps": 1e-6,
    "freq_shift": 1,  # frequencies 10000^(-i/(dim/2 - 1)): down to 1/10000
    "flip_sin_to_cos": False,  # sines first
    "downsample_padding": 0,  # right and below only
    "resnet_time_scale_shift": "default",
}
# Other settings of UNet2DModel, which the lessons' networks do not have.
ALWAYS = {
    "_class_name": "UNet2DModel",
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "mid_block_scale_factor": 1,
    "time_embedding_type": "positional",
    "downsample_type": "conv",
    "upsample_type": "conv",
    "add_attention": True,
    "class_embed_type": None,
}
VARIANCES = {"fixed_large": "beta", "fixed_small": "beta_tilde"}


def missing(shapes: dict[str, Any]) -> list[str]:
    """What a known network with weights of these shapes needs and this lesson's does not have."""
    needs = {
        "labels, as it is class-conditional": "class_embedding.weight" in shapes,
        "prompts, as it makes images of texts": any(".attn2." in name for name in shapes),
    }
    return [need for need, needed in needs.items() if needed]


def from_diffusers(unet: dict[str, Any], scheduler: dict[str, Any], source: str) -> Published:
    """The network and the process that a Hub folder's config.json and scheduler_config.json
    describe. What they leave out, as those of 2022 do, is as in Ho20.

    Raises:
        UserError: the lesson's network or process cannot be like that. It begins with `source`.
    """
    needed = {**DIFFUSERS_CONFIG, **ALWAYS, "out_channels": unet["in_channels"]}
    if unet.get("attn_norm_num_groups") is not None:
        needed["attn_norm_num_groups"] = unet["norm_num_groups"]
    check_settings(unet, needed, source)
    needed = {"beta_schedule": "linear", "prediction_type": "epsilon", "trained_betas": None}
    check_settings(scheduler, needed, f"{source}'s scheduler")
    widths, types = unet["block_out_channels"], unet["down_block_types"]
    size, T = unet["sample_size"], scheduler.get("num_train_timesteps", 1000)
    longer = max(height_and_width(size))
    variance = scheduler.get("variance_type", "fixed_small")
    if variance not in VARIANCES:
        raise UserError(f"{source}'s scheduler has variance_type {variance}, not {[*VARIANCES]}")
    network = {
        "image_channels": unet["in_channels"],
        "image_size": size,
        "channels": widths[0],
        "multipliers": [width // widths[0] for width in widths],
        "num_blocks": min(unet["layers_per_block"], 20),  # a file must not build for hours
        "attention_resolutions": [
            longer // 2**level for level, kind in enumerate(types) if kind == "AttnDownBlock2D"
        ],
        "dropout": unet.get("dropout", 0.0),
        "num_groups": unet.get("norm_num_groups", 32),
    }
    config = {
        "num_timesteps": T,
        "beta_1": scheduler.get("beta_start", 1e-4) * T / 1000,
        "beta_T": scheduler.get("beta_end", 0.02) * T / 1000,
        "variance": VARIANCES[variance],
        "network": network,
    }
    return Published([DIFFUSERS, DIFFUSERS_2022], "images", config)


def check_settings(found: dict[str, Any], needed: dict[str, Any], source: str) -> None:
    for name, value in needed.items():
        if found.get(name, value) != value:
            raise UserError(f"{source} has {name} {found[name]}: this lesson has {value}")
