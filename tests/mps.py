"""A stand-in for an Apple GPU, in a process of its own: `python tests/mps.py FOLDER`.

Tensors on the stand-in have values on the CPU, but a device of their own with a random generator of
its own. Every operator that the lessons use on such tensors is recorded, and float64 is refused.
`has_kernel` knows from PyTorch's table of operators which of them an Apple GPU has.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchgen
import yaml
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "apple"  # PyTorch's own mps needs macOS
GENERATOR = torch.Generator()
NETWORK = {
    "channels": 4,
    "multipliers": [1, 1, 1],
    "num_blocks": 1,
    "attention_resolutions": [],
    "num_groups": 2,
    "num_heads": 2,
    "dropout": 0.1,
}
FUNCTIONS = (
    Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
)


class Module(backend_registration._DummyBackendModule):
    """What torch.mps is for an Apple GPU."""

    def get_rng_state(self, device: object) -> torch.Tensor:
        return GENERATOR.get_state()

    def set_rng_state(self, state: torch.Tensor, device: object) -> None:
        GENERATOR.set_state(state)

    def manual_seed_all(self, seed: int) -> None:
        GENERATOR.manual_seed(seed)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class OnDevice(torch.Tensor):
    """A tensor on the stand-in; `inner` has its values, on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnDevice":
        assert inner.dtype not in (torch.float64, torch.complex128), "an Apple GPU has no float64"
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} without a Recorder")

    __torch_function__ = torch._C._disabled_torch_function_impl


class Recorder(TorchDispatchMode):
    """Runs operators on the stand-in, and records their names."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        here = OnDevice in types
        target = kwargs.get("device") and torch.device(kwargs["device"]).type
        if not here and target != NAME:
            return func(*args, **kwargs)
        self.seen.add(func.name().removeprefix("aten::"))
        if "copy" not in func.name() and "index" not in func.name():  # indices may be on the CPU
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            others = [x for x in tensors if x.ndim and not isinstance(x, OnDevice)]
            assert not (here and others), f"{func} mixes devices"
        if target == NAME:
            kwargs["device"] = torch.device("cpu")
        inner_args, inner_kwargs = tree_map(unwrap, args), tree_map(unwrap, kwargs)
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        with random_numbers() if is_random else contextlib.nullcontext():
            result = func(*inner_args, **inner_kwargs)
        if target not in (None, NAME):  # a copy to the CPU
            return result
        if func is torch.ops.aten.copy_.default and not isinstance(args[0], OnDevice):
            return args[0]
        result = tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, result)
        return return_and_correct_aliasing(func, args, kwargs, result) if here else result


def unwrap(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


@contextlib.contextmanager
def random_numbers() -> Iterator[None]:
    """Random numbers come from the stand-in's generator and leave the CPU's as it is."""
    state = torch.get_rng_state()
    torch.set_rng_state(GENERATOR.get_state())
    yield
    GENERATOR.set_state(torch.get_rng_state())
    torch.set_rng_state(state)


def has_kernel(name: str, table: dict[str, dict[str, Any]]) -> bool:
    """Whether an Apple GPU has this operator: its own kernel or its structured delegate's, or a
    composite one. A composite that calls the operator's `.out` needs a kernel for that."""
    entry = table.get(name)
    if entry is None:
        return False
    if delegate := entry.get("structured_delegate"):
        return has_kernel(delegate, table)
    dispatch = entry.get("dispatch", {"CompositeImplicitAutograd": name})
    keys = {key.strip() for group in dispatch for key in group.split(",")}
    if keys & {"MPS", "CompositeImplicitAutograd"}:
        return True
    out = f"{name}_out" if "." in name else f"{name}.out"
    explicit = any(key.startswith("CompositeExplicitAutograd") for key in keys)
    return explicit and (name.endswith("out") or out not in table or has_kernel(out, table))


def kernels() -> dict[str, dict[str, Any]]:
    """PyTorch's table of operators, by name and overload."""
    entries = yaml.load(FUNCTIONS.read_text(), yaml.CSafeLoader)
    return {entry["func"].split("(")[0]: entry for entry in entries}


def setup() -> None:
    """Make the device, and let --device mps mean it."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
    torch.__future__.set_swap_module_params_on_conversion(True)
    tensor = torch.tensor  # which copies to a device past every recorder

    def on_device(data: object, *, device: object = None, **options: Any) -> torch.Tensor:
        return tensor(data, **options).to(device or "cpu")

    torch.tensor = on_device
    from common import device

    pick = device.pick_device
    device.pick_device = lambda name="auto": torch.device(NAME, 0) if name == "mps" else pick(name)


def lessons(folder: Path) -> None:
    """Train, resume, sample and measure every lesson on the device, with tiny networks."""
    from common import cli
    from common.checkpoint import saved
    from common.data import load_images
    from lesson_02 import parzen, swiss_roll
    from lesson_05.class_conditional import train_mnist as with_labels
    from lesson_05.options import ConditionalOptions
    from lesson_06 import laboratory, sample_ddim
    from lesson_06 import train_mnist as with_prompts
    from lesson_09 import evaluate, quality
    from lesson_09 import train_mnist as improved
    from lesson_09.options import IDDPMOptions

    import helpers_02
    import matplotlib.figure
    from helpers import TINY_RUN, train

    matplotlib.figure.Figure.savefig = lambda *_, **__: None  # slow, and not what is tested
    where = ["--device", "mps", "--output_dir", str(folder / "pictures")]
    tiny = {**TINY_RUN, "device": "mps", "num_timesteps": 6, "log_every": 9}
    five = {"beta_T": 1e-3}  # so few times need smaller betas
    whole = {**tiny, **five, "preview_every": 2, "accumulate": 2}
    few = {**tiny, "num_training_steps": 2, "num_warmup_steps": 2}

    def run(script: Any, trained: Path | None, *words: object) -> None:
        checkpoint = ["--model_checkpoint", str(saved(trained)[-1])] if trained else []
        cli.run(script.main, [*where, *checkpoint, *map(str, words)])

    train(folder / "whole", NETWORK, **whole)
    train(folder / "no_previews", NETWORK, **whole | {"preview_every": 4})
    train(folder / "parts", NETWORK, **whole | {"num_training_steps": 2})
    train(folder / "parts", NETWORK, **whole, resume="latest")
    helpers_02.train(folder / "02", **few, learned_beta=True, accumulate=2)
    with_labels.main(ConditionalOptions(**few, **five, output_dir=str(folder / "labels")), NETWORK)
    options = with_prompts.Options(**few, **five, output_dir=str(folder / "prompts"), num_steps=3)
    with_prompts.main(options, NETWORK, {"dim": 16, "num_layers": 1, "num_heads": 2})
    improved_options = IDDPMOptions(
        **few, output_dir=str(folder / "09"), timestep_sampler="loss_aware", num_steps=4
    )
    improved.main(improved_options, NETWORK)

    samples = ["--num_samples", 2]
    run(sample_ddim, folder / "prompts", "--guidance", 2, "--eta", 1, "--num_steps", 3, *samples)
    data = ["--steps", 3, "--dataset", "digits"]
    run(laboratory, folder / "no_previews", "--figure", "reconstruction", *data, *samples)
    run(laboratory, folder / "no_previews", "--figure", "interpolation", *data, *samples)
    run(evaluate, folder / "09", "--num_images", 2, "--num_terms", 4)
    run(parzen, folder / "02", *samples, "--num_validation", 2, "--num_images", 2)
    sizes = ["--num_points", 9, "--num_bound_points", 9, "--batch_size", 9]
    run(swiss_roll, None, "--num_training_steps", 2, "--num_timesteps", 4, *sizes)
    digits = load_images("digits")
    classifier = quality.train_classifier(digits, 2, torch.device(NAME, 0))
    quality.features(classifier, digits.test[:2])


def main(folder: Path) -> None:
    """Write what was recorded, and the largest difference of two masks, into FOLDER."""
    setup()
    recorder = Recorder()
    with recorder:
        lessons(folder)
        difference = masks_differ()
    result = {"seen": sorted(recorder.seen), "masks": difference}
    (folder / "recorded.json").write_text(json.dumps(result))


def masks_differ() -> float:
    """How far a recomputation's dropout masks are from those of the forward pass: 0 if equal."""
    from common.distributed import Microbatches

    model = Microbatches(torch.nn.Dropout(0.5), 4)
    x = torch.randn(8, 50).to(torch.device(NAME, 0)).requires_grad_()
    y = model(x)
    torch.rand(3, device=x.device)  # the training goes on before the backward pass
    y.sum().backward()
    assert x.grad is not None
    return (y - x.grad * x).abs().max().item()  # y = mask * x


if __name__ == "__main__":
    main(Path(sys.argv[1]))
