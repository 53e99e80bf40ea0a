"""The weights of our U-Nets as diffusers names them."""


def diffusers_name(ours: str) -> str:
    """The name in diffusers' UNet2DModel, with two blocks a level, of a weight of our network."""
    head, _, rest = ours.partition(".")
    if head in ("conv_in", "conv_out"):
        return ours
    if head == "norm_out":
        return f"conv_norm_out.{rest}"
    if head == "time":
        return f"time_embedding.linear_{1 if rest[0] == '0' else 2}.{rest[2:]}"
    index, _, rest = rest.partition(".")
    level, number = divmod(int(index), 3 if head == "down" else 4)
    prefix = f"{head}_blocks.{level}"
    if head == "middle":
        number, prefix = int(index), "mid_block"
    if rest.startswith("residual."):
        rest = rest.removeprefix("residual.").replace("shortcut", "conv_shortcut")
        return f"{prefix}.resnets.{number}.{rest.replace('time', 'time_emb_proj')}"
    if rest.startswith("attention."):
        rest = rest.removeprefix("attention.").replace("norm", "group_norm")
        return f"{prefix}.attentions.{number}.{rest.replace('out.', 'to_out.0.')}"
    return f"{prefix}.{'down' if head == 'down' else 'up'}samplers.0.conv.{rest}"
