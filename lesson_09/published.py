"""The networks of this shape that OpenAI published, and their names for the layers of `unet.py`.

    python -m common.import_weights FILE

makes such a file a checkpoint of this lesson. Each table below has our name of a layer, in the
order in which an image passes through the network, and theirs.
"""

from typing import Any

from common.lessons import Published
from lesson_09.unet import UNet

__all__ = ["DIFFUSERS", "PUBLISHED", "SAMPLE", "UNet"]

# The order of the rows of SelfAttention.qkv: q, k and v of the first head, then of the next.
QKV = "heads three c"

# openai/improved-diffusion, UNetModel. {layer} counts the layers on the way down, blocks and
# downsampling, from 1; {block} counts the blocks on the way up, from 0. Upsampling is the {last}
# member of the block before it.
OPENAI = {
    "time.0": "time_embed.0",
    "time.2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "down.residual": "input_blocks.{layer}.0",
    "down.attention": "input_blocks.{layer}.1",
    "down": "input_blocks.{layer}.0.op",
    "middle.0.residual": "middle_block.0",
    "middle.0.attention": "middle_block.1",
    "middle.1.residual": "middle_block.2",
    "up.residual": "output_blocks.{block}.0",
    "up.attention": "output_blocks.{block}.1",
    "up": "output_blocks.{block}.{last}.conv",
    "norm_out": "out.0",
    "conv_out": "out.2",
    "residual.norm1": "in_layers.0",
    "residual.conv1": "in_layers.2",
    "residual.time": "emb_layers.1",
    "residual.norm2": "out_layers.0",
    "residual.conv2": "out_layers.3",
    "residual.shortcut": "skip_connection",
    "attention.norm": "norm",
    "attention.qkv": "qkv",
    "attention.out": "proj_out",
}
# huggingface/diffusers, UNet2DModel, for `python -m common.export`: lesson 5's table once more.
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
DIFFUSERS_CONFIG = {
    "norm_eps": 1e-5,
    "freq_shift": 0,  # frequencies 10000^(-i/(dim/2))
    "flip_sin_to_cos": True,  # cosines first
    "downsample_padding": 1,  # on all sides
    "resnet_time_scale_shift": "scale_shift",
}

HYBRID = {"variance": "learned", "simple_weight": 1.0, "vlb_weight": 1e-3}
COSINE = {"num_timesteps": 4000, "schedule": "cosine", **HYBRID}
LINEAR = {"num_timesteps": 1000, "schedule": "linear", **HYBRID}
# The flags of the authors' README. Their networks of 4000 steps are told t · 1000/4000
# (--rescale_timesteps, on by default); those of LSUN have 1000 steps and are told t.
CIFAR10 = {"image_size": 32, "time_scale": 0.25}
IMAGENET = {"image_size": 64, "multipliers": [1, 2, 3, 4], "time_scale": 0.25, "dropout": 0.0}
LSUN = {
    "image_size": 256,
    "multipliers": [1, 1, 2, 2, 4, 4],
    "num_blocks": 2,
    "attention_resolutions": [16],
    "num_heads": 1,
    "scale_shift_norm": False,
    "dropout": 0.0,
}
COLOUR = {"image_channels": 3, "learned_variance": True}
# The networks trained with L_vlb have the same shapes as those trained with L_hybrid.
PUBLISHED = {
    "iddpm-cifar10": Published([OPENAI], "cifar10", {**COSINE, "network": COLOUR | CIFAR10}),
    "iddpm-imagenet64": Published([OPENAI], "imagenet64", {**COSINE, "network": COLOUR | IMAGENET}),
    "iddpm-lsun-bedroom": Published([OPENAI], "lsun", {**LINEAR, "network": COLOUR | LSUN}),
}
# The command that samples them, in the root of the repository.
SAMPLE = ["lesson_09/sample_mnist.py", "--num_steps", "100"]


def missing(shapes: dict[str, Any]) -> list[str]:
    """What a known network with weights of these shapes needs and this lesson's does not have."""
    if "time_embed.0.weight" not in shapes:
        return []
    channels = shapes.get("input_blocks.0.0.weight", (0, 3))[1]
    needs = {
        "labels, as it is class-conditional": "label_emb.weight" in shapes,
        "a small image to enlarge, as it is an upsampler": channels == 6,
        "residual blocks that resize, as it is from guided-diffusion": not any(
            ".op." in name for name in shapes
        ),
        "a label as output, as it is a classifier": not any(
            name.startswith("output_blocks.") for name in shapes
        ),
    }
    return [need for need, needed in needs.items() if needed]
