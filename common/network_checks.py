"""Checks of the settings of a U-Net, for lessons 5 and 9."""

from collections.abc import Sequence

from common.errors import UserError, check_at_least


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """(H, W) of an image_size, which is both, or one number for square images."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width


def feature_map_sizes(image_size: int | Sequence[int], num_levels: int) -> list[int]:
    """The longer side of the feature maps at each level, from the padded image down."""
    height, width = height_and_width(image_size)
    longer, shorter, multiple = max(height, width), min(height, width), 2 ** (num_levels - 1)
    if num_levels < 1 or shorter < multiple:
        raise UserError(
            f"a {height}x{width} image cannot be halved {num_levels - 1} times: "
            f"give network.multipliers at most {max(shorter, 1).bit_length()} levels"
        )
    padded = longer + -longer % multiple
    return [padded // 2**level for level in range(num_levels)]


def fit_attention(resolutions: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """attention_resolutions for feature maps of these sizes. If none of them has one of the
    resolutions, each resolution is replaced by the next smaller size, or by the smallest."""
    if not resolutions or set(resolutions) & set(sizes):
        return list(resolutions)
    return sorted({max((s for s in sizes if s <= r), default=min(sizes)) for r in resolutions})


def check_unet(
    widths: Sequence[int],
    sizes: Sequence[int],
    num_blocks: int,
    attention_resolutions: Sequence[int],
    num_heads: int,
    dropout: float,
    num_groups: int,
) -> None:
    """Refuse a U-Net that cannot be built."""
    counts = {"num_blocks": num_blocks, "num_heads": num_heads, "num_groups": num_groups}
    check_at_least(1, **{f"network.{name}": value for name, value in counts.items()})
    for width in widths:
        if width < 1 or width % num_groups:
            raise UserError(
                f"{width} channels cannot be divided into {num_groups} groups: "
                "change network.channels, network.multipliers or network.num_groups"
            )
        if width % num_heads:
            raise UserError(f"{width} channels cannot be divided among {num_heads} attention heads")
    if widths[0] % 2:
        raise UserError(
            f"network.channels is {widths[0]}: it must be even, for the sines and cosines of t"
        )
    if not 0 <= dropout < 1:
        raise UserError(f"network.dropout is {dropout}: it must be at least 0 and below 1")
    if attention_resolutions and not set(attention_resolutions) & set(sizes):
        raise UserError(
            f"network.attention_resolutions {list(attention_resolutions)}: this network has "
            f"feature maps of size {', '.join(map(str, sizes))}; name some of these, or []"
        )
