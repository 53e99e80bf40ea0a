"""Networks for other libraries: diffusers folders, and ONNX."""

from dataclasses import replace

from common import export, import_weights, lessons
from common.checkpoint import Checkpoint, load, save
from common.errors import UserError
from lesson_05 import published as five
from lesson_06.ddim import ddim_sample
from lesson_09 import published as nine

import official
import pytest
import torch
from helpers import ROOT

SHIPPED = {
    lesson: ROOT / f"{lesson}/pretrained/mnist.safetensors" for lesson in ("lesson_05", "lesson_09")
}


@pytest.mark.parametrize("lesson", SHIPPED)
def test_diffusers_draws_the_same_images_from_an_exported_folder(lesson, tmp_path):
    """Its network and its DDIM pipeline, with the shipped weights and the same start."""
    from diffusers import DDIMPipeline, UNet2DModel

    file, folder = str(SHIPPED[lesson]), str(tmp_path / "folder")
    export.main([file, folder])
    process, model, content = lessons.load(file)
    xt, t = torch.randn(4, *content.image_shape), torch.tensor([1, 20, 500, 1000])
    network = UNet2DModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(xt, t)[:, : xt.shape[1]]
        assert (network(xt, t - 1).sample - expected).abs().max() < 1e-5 < expected.std()
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        batch_size=2,
        num_inference_steps=5,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    x_T = torch.randn(2, *content.image_shape, generator=torch.Generator().manual_seed(3))
    ours = ddim_sample(model, process, x_T, 5).clamp(-1, 1) / 2 + 0.5
    assert (torch.from_numpy(theirs).permute(0, 3, 1, 2) - ours).abs().max() < 1e-3 < ours.std()


def checkpoint(path, module, lesson, **changes):
    """A checkpoint of a small network with random weights."""
    model = official.network(module, **changes)
    (known,) = module.PUBLISHED.values()
    config = {**known.config, "network": {**known.config["network"], **changes}}
    tensors = {f"ema.{name}": weight for name, weight in model.state_dict().items()}
    save(path, Checkpoint(lesson, config, "cifar10", 0, tensors))
    return model


@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize("size", [16, [12, 16]])
def test_an_exported_folder_can_be_imported(size, tmp_path):
    file, back = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    changes = {"multipliers": [1, 2, 2], "attention_resolutions": [4], "image_size": size}
    model = checkpoint(file, five, "lesson_05", **changes)
    export.main([str(file), str(tmp_path / "folder")])
    weights = str(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    import_weights.main([weights, "--out", str(back)])
    one, other = lessons.load(str(file)), lessons.load(str(back))
    assert one[2].image_shape == other[2].image_shape
    for name, weight in model.state_dict().items():
        assert torch.equal(other[1].state_dict()[name], weight)
    assert torch.equal(one[0].alpha_bar, other[0].alpha_bar)
    assert torch.equal(one[0].log_var, other[0].log_var)


@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize("scale_shift_norm", [True, False])
def test_heads_keep_their_rows(scale_shift_norm, tmp_path):
    """Lesson 9 has q, k and v of one head after the other, diffusers all q, then k, then v."""
    from diffusers import UNet2DModel

    file, folder = tmp_path / "a.safetensors", str(tmp_path / "folder")
    changes = {"time_scale": 1.0, "scale_shift_norm": scale_shift_norm, "image_size": [8, 16]}
    model = checkpoint(file, nine, "lesson_09", **changes).eval()
    export.main([str(file), folder])
    xt, t = torch.randn(2, 3, 8, 16), torch.tensor([1, 900])
    network = UNet2DModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model(xt, t)[:, :3]
        error = (network(xt, t - 1).sample - expected).abs().max()
    assert error < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("prediction", "theirs"), [("eps", "epsilon"), ("x0", "sample")])
def test_diffusers_is_told_what_the_network_predicts(prediction, theirs):
    config = {"num_timesteps": 1000, "variance": "beta", "prediction": prediction}
    assert export.scheduler_config(config)["prediction_type"] == theirs
    with pytest.raises(UserError, match="predict the mean"):
        export.scheduler_config({**config, "prediction": "mean"})


@pytest.mark.usefixtures("small_networks")
def test_a_network_that_predicts_the_mean_is_refused_before_anything_is_written(tmp_path, capsys):
    file, folder = tmp_path / "a.safetensors", tmp_path / "folder"
    checkpoint(file, five, "lesson_05", attention_resolutions=[8])
    content = load(file)
    save(file, replace(content, config={**content.config, "prediction": "mean"}))
    with pytest.raises(SystemExit) as stopped:
        export.main([str(file), str(folder)])
    assert stopped.value.code == 2
    assert "predict the mean" in capsys.readouterr().err
    assert not folder.exists()


REFUSED = {
    "UNet2DModel has no time_scale": {},
    "15x15 images cannot be halved 1 times": {"image_size": 15, "time_scale": 1.0},
    "heads of one width: 2 heads of layers with 8, 16 channels": {
        "attention_resolutions": [16, 8],
        "time_scale": 1.0,
    },
}


@pytest.mark.usefixtures("small_networks")
@pytest.mark.parametrize("words", REFUSED)
def test_networks_that_diffusers_cannot_express_are_refused(words, tmp_path, capsys):
    file, folder = tmp_path / "a.safetensors", tmp_path / "folder"
    checkpoint(file, nine, "lesson_09", **REFUSED[words])
    with pytest.raises(SystemExit) as stopped:
        export.main([str(file), str(folder)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not folder.exists()


def test_mistakes_of_the_command_line(tmp_path, capsys):
    text = str(ROOT / "lesson_06/pretrained/text_to_image.safetensors")
    (tmp_path / "mine").write_text("mine")
    cases = {
        "only the unconditional networks of lesson_05 and lesson_09": [text, str(tmp_path / "new")],
        "exists: name another folder": [str(SHIPPED["lesson_05"]), str(tmp_path)],
        "mine exists": [str(SHIPPED["lesson_05"]), str(tmp_path / "mine")],
        "cannot be read": ["missing.safetensors", str(tmp_path / "new")],
    }
    for words, arguments in cases.items():
        with pytest.raises(SystemExit) as stopped:
            export.main(arguments)
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("small_networks")
def test_an_exported_network_agrees_with_pytorch(tmp_path):
    """For another number of images than it was exported with."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install -e '.[onnx]'")
    pytest.importorskip("onnxscript", reason="pip install -e '.[onnx]'")
    model = official.network(nine).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    export.export_onnx(model, (3, 16, 16), tmp_path / "unet.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "unet.onnx")
    xt, t = torch.randn(3, 3, 16, 16), torch.tensor([1, 3, 900])
    (out,) = session.run(["out"], {"xt": xt.numpy(), "t": t.numpy()})
    with torch.no_grad():
        expected = model(xt, t)
    assert (torch.from_numpy(out) - expected).abs().max() < 1e-5 < expected.std()
