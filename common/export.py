"""Write the U-Net of lesson 5 or 9 for other libraries: a diffusers folder, or ONNX.

    python -m common.export CHECKPOINT FOLDER

makes a folder from which diffusers draws without these lessons:

    DDIMPipeline.from_pretrained(FOLDER)(num_inference_steps=50)    # as lesson_06/sample_ddim.py
    UNet2DModel.from_pretrained(FOLDER)(xt, t - 1).sample           # it counts times from 0
"""

import argparse
import inspect
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from common.errors import UserError, one_line
from common.files import expand, make_folder, replacing, write_atomically
from common.import_weights import their_names
from common.lessons import load, published
from common.network_checks import feature_map_sizes, height_and_width

import safetensors.torch
import torch
from einops import rearrange
from torch import Tensor, nn

INDEX = {
    "_class_name": "DDIMPipeline",
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}


def export(checkpoint: str, folder: str) -> None:
    """Write a checkpoint as a diffusers folder: model_index.json, config.json,
    scheduler_config.json and the averaged weights.

    Differs: diffusers cannot draw by DDIM with a network that also predicts a variance, so that
    half of the output of lesson 9's networks is left out.

    Raises:
        UserError: UNet2DModel has no such network, or the folder is not empty.
    """
    _, model, content = load(checkpoint)
    module = published().get(content.lesson)
    if module is None:
        raise UserError(
            f"{checkpoint} is of {content.lesson}: only the unconditional networks of "
            f"{' and '.join(published())} can be exported"
        )
    call = inspect.signature(module.UNet).bind(**content.config["network"])
    call.apply_defaults()
    config = unet_config(model, call.arguments, module)
    scheduler = scheduler_config(content.config)
    target = expand(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists: name another folder")
    make_folder(target, "FOLDER")
    with replacing(target / "diffusion_pytorch_model.safetensors") as temporary:
        weights = diffusers_weights(model, call.arguments, module)
        safetensors.torch.save_file(weights, temporary, {"format": "pt"})
    files = {"config": config, "scheduler_config": scheduler, "model_index": INDEX}
    for name, values in files.items():
        write_atomically(target / f"{name}.json", json.dumps(values, indent=2).encode())
    print(f"{target}: DDIMPipeline.from_pretrained({str(target.resolve())!r})")


def unet_config(model: nn.Module, arguments: dict[str, Any], module: ModuleType) -> dict[str, Any]:
    """The arguments of UNet2DModel for the network that ours builds from these arguments."""
    height, width = height_and_width(arguments["image_size"])
    channels, multiple = arguments["image_channels"], 2 ** (len(arguments["multipliers"]) - 1)
    multipliers, heads = arguments["multipliers"], arguments["num_heads"]
    if height % multiple or width % multiple:
        raise UserError(
            f"UNet2DModel does not pad: {height}x{width} images cannot be halved "
            f"{len(multipliers) - 1} times"
        )
    if arguments.get("time_scale", 1.0) != 1:
        raise UserError("UNet2DModel has no time_scale: this network cannot be exported")
    weights = model.state_dict().items()
    widths = {weight.shape[1] for name, weight in weights if name.endswith("qkv.weight")}
    if heads > 1 and len(widths) > 1:
        raise UserError(
            f"UNet2DModel has heads of one width: {heads} heads of layers with "
            f"{', '.join(map(str, sorted(widths)))} channels cannot be exported"
        )
    sizes = feature_map_sizes([height, width], len(multipliers))
    has_attention = [size in arguments["attention_resolutions"] for size in sizes]
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": [arguments["channels"] * multiplier for multiplier in multipliers],
        "layers_per_block": arguments["num_blocks"],
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in has_attention],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in has_attention[::-1]],
        "attention_head_dim": None if heads == 1 else min(widths) // heads,
        "norm_num_groups": arguments["num_groups"],
        "attn_norm_num_groups": arguments["num_groups"],
        "dropout": arguments["dropout"],
        **module.DIFFUSERS_CONFIG,
    }
    if not arguments.get("scale_shift_norm", True):
        config["resnet_time_scale_shift"] = "default"
    return config


def scheduler_config(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of diffusers' scheduler for the process in a checkpoint's config. clip_sample
    is off, as in sample_ddim.py; for DDPM, sample_mnist.py has it on."""
    T, prediction = config["num_timesteps"], config.get("prediction", "eps")
    if prediction == "mean":
        raise UserError("diffusers has no networks that predict the mean: it cannot be exported")
    cosine = config.get("schedule") == "cosine"
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": T,
        "beta_schedule": "squaredcos_cap_v2" if cosine else "linear",
        "beta_start": config.get("beta_1", 1e-4) * 1000 / T,
        "beta_end": config.get("beta_T", 0.02) * 1000 / T,
        "variance_type": "fixed_large" if config["variance"] == "beta" else "fixed_small",
        "prediction_type": {"eps": "epsilon", "x0": "sample"}[prediction],
        "clip_sample": False,
    }


def diffusers_weights(
    model: nn.Module, arguments: dict[str, Any], module: ModuleType
) -> dict[str, Tensor]:
    """The weights under the names of UNet2DModel, which keeps q, k and v apart."""
    names, result = their_names(model, module.DIFFUSERS), {}
    for ours, weight in model.state_dict().items():
        if len(names[ours]) == 3:
            rows = f"({module.QKV}) ... -> (three heads c) ..."
            weight = rearrange(weight, rows, three=3, heads=arguments["num_heads"])
        if ours.startswith("conv_out."):
            weight = weight[: arguments["image_channels"]]  # without the variance
        for theirs, part in zip(names[ours], weight.chunk(len(names[ours])), strict=True):
            result[theirs] = part.contiguous()
    return result


def export_onnx(model: nn.Module, image_shape: tuple[int, int, int], path: Path) -> None:
    """Write a network (`_, model, content = common.lessons.load(FILE)`) for images of
    content.image_shape as ONNX: out = model(xt, t), with inputs xt float32 (B, C, H, W) and t int64
    (B,), 1 <= t <= T, for any B. It needs `pip install -e '.[onnx]'`."""
    example = torch.zeros(2, *image_shape), torch.tensor([1, 2])  # PyTorch takes B = 1 for fixed
    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(
        model,
        example,
        path,
        input_names=["xt", "t"],
        output_names=["out"],
        dynamic_shapes=(batch, batch),
        dynamo=True,
        verbose=False,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m common.export", description="Write a checkpoint as a diffusers folder."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file of lesson 5 or 9")
    parser.add_argument("folder", metavar="FOLDER", help="a new folder")
    try:
        export(**vars(parser.parse_args(argv)))
    except (UserError, OSError) as error:
        parser.exit(2, f"error: {one_line(error)}\n")


if __name__ == "__main__":
    main()
