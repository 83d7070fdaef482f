"""Makers of networks: what they build for which data, and what they refuse."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CLASSES, FACTS, NET, batch, plan_of, run_calls
from torch import Tensor, nn

from kdx.builtin.models import Onnx, PrepareImage, Timm, Torchvision
from kdx.components import Model, Network
from kdx.errors import ConfigError, KdxError
from kdx.types import DataFacts, StreamFacts

COLOUR = DataFacts(
    streams={"image": StreamFacts("image", (3, 28, 28), (0.1, 0.2, 0.3), (0.5, 0.25, 0.125))}, classes=CLASSES
)


def made(kind: type[Model], facts: DataFacts = FACTS, **options: Any) -> Network:
    torch.manual_seed(0)
    return kind(kind.Config(**options), facts, ("image",)).build().eval()  # type: ignore[call-arg]


def skeleton(kind: type[Model], facts: DataFacts = FACTS, **options: Any) -> Network:
    return kind(kind.Config(**options), facts, ("image",)).skeleton().eval()  # type: ignore[call-arg]


def refusal(kind: type[Model], facts: DataFacts = FACTS, **options: Any) -> str:
    with pytest.raises(KdxError) as caught:
        made(kind, facts, **options)
    return str(caught.value)


def numbers(prepare: nn.Module) -> tuple[list[float], list[float]]:
    assert isinstance(prepare, PrepareImage)
    return prepare.mean.flatten().tolist(), prepare.std.flatten().tolist()


# --- the input side


def test_images_are_normalised_channel_by_channel() -> None:
    prepare = PrepareImage(2, None, (0.5, 0.25), (0.5, 0.25))
    image = torch.tensor([1.0, 0.5]).reshape(1, 2, 1, 1)
    assert prepare(image).flatten().tolist() == [1.0, 1.0]


def test_grey_images_are_repeated_for_a_net_with_three_channels() -> None:
    out = PrepareImage(3, None, (0.0,) * 3, (1.0,) * 3)(batch()["image"])
    assert out.shape == (4, 3, 28, 28)
    assert torch.equal(out[:, 0], out[:, 2])


def test_colour_images_are_averaged_for_a_net_with_one_channel() -> None:
    image = torch.tensor([0.0, 0.3, 0.6]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(PrepareImage(1, None, (0.0,), (1.0,))(image), torch.full((1, 1, 1, 1), 0.3))


def test_images_are_resized_only_where_their_size_differs() -> None:
    image = batch()["image"]
    assert PrepareImage(1, (12, 14), (0.0,), (1.0,))(image).shape == (4, 1, 12, 14)
    assert torch.equal(PrepareImage(1, (28, 28), (0.0,), (1.0,))(image), image)
    assert torch.equal(PrepareImage(1, None, (0.0,), (1.0,))(image), image)


# --- timm


def test_a_net_of_timm_has_the_classes_and_channels_of_the_data() -> None:
    network = made(Timm, COLOUR, model="resnet18", args=NET["args"])
    assert network.net.fc.out_features == 3
    assert network.net.conv1.in_channels == 3
    mean, std = numbers(network.prepare)
    assert mean == pytest.approx([0.1, 0.2, 0.3])
    assert std == pytest.approx([0.5, 0.25, 0.125])
    assert network(torch.rand(2, 3, 28, 28)).shape == (2, 3)


def test_the_config_may_say_how_many_classes_there_are() -> None:
    assert made(Timm, model="resnet18", args=NET["args"], num_classes=7).net.fc.out_features == 7


def test_arguments_reach_the_constructor() -> None:
    network = made(Timm, model="resnet18", args={**NET["args"], "in_chans": 3})
    assert network.net.conv1.in_channels == 3
    assert len(numbers(network.prepare)[0]) == 3
    assert network(batch()["image"]).shape == (4, 3)


def test_a_pretrained_net_keeps_its_own_size_and_statistics() -> None:
    network = skeleton(Timm, model="vit_tiny_patch16_224", pretrained=True, args={"embed_dim": 32, "depth": 1,
                       "num_heads": 2})  # fmt: skip
    assert network.prepare.size == (224, 224)
    assert numbers(network.prepare) == ([0.5] * 3, [0.5] * 3)
    assert network.prepare(batch()["image"]).shape == (4, 3, 224, 224)


def test_arguments_change_the_input_of_a_pretrained_net_too() -> None:
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32, "in_chans": 1}
    network = skeleton(Timm, model="vit_tiny_patch16_224", pretrained=True, args=small)
    assert network.prepare.size == (32, 32)
    assert numbers(network.prepare) == ([0.5], [0.5])
    assert network(batch()["image"]).shape == (4, 3)


def test_a_net_may_be_given_another_size() -> None:
    assert made(Timm, model="resnet18", args=NET["args"], size=14).prepare.size == (14, 14)


def test_a_class_of_timm_takes_what_its_names_fix() -> None:
    args = {"img_size": 28, "patch_size": 7, "num_blocks": 2, "embed_dim": 24}
    net = made(Timm, model="mlp_mixer.MlpMixer", args=args).net
    assert net.stem.proj.kernel_size == (7, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "mlp_mixr.MlpMixer"}, "model: timm.models has no module 'mlp_mixr'; did you mean 'mlp_mixer'"),
        ({"model": "mlp_mixer.Mixer"}, "model: timm.models.mlp_mixer has no network 'Mixer'"),
        ({"model": "os.System"}, "model: timm.models has no module 'os'"),
        ({"model": "resnt18"}, "model: timm has no model 'resnt18'; did you mean resnet18, "),
        ({"model": "zzz"}, "model: timm has no model 'zzz'; it has "),
        ({"model": "resnet18.nope"}, "model: no resnet18.nope: Invalid pretrained tag (nope) for resnet18"),
        ({"model": "resnet18", "args": {"layrs": [1]}}, "args: resnet18 refuses {'layrs': [1]}: ResNet.__init__() got"),
    ],
)
def test_a_net_that_timm_cannot_make_is_refused(options: dict[str, Any], message: str) -> None:
    assert refusal(Timm, **options).startswith(message)


# --- torchvision


def test_a_net_of_torchvision_has_the_classes_of_the_data_and_takes_grey_images() -> None:
    network = made(Torchvision, model="squeezenet1_1", size=64)
    assert network(batch()["image"]).shape == (4, 3)
    assert numbers(network.prepare)[0] == pytest.approx([0.3] * 3)


def test_published_weights_bring_their_own_size_and_statistics() -> None:
    network = skeleton(Torchvision, model="mobilenet_v3_small", weights="DEFAULT")
    assert network.prepare.size == (224, 224)
    assert numbers(network.prepare)[0] == pytest.approx([0.485, 0.456, 0.406])
    assert network.net.classifier[-1].out_features == 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "resnt18"}, "model: torchvision has no model 'resnt18'; did you mean resnet18, "),
        ({"model": "resnet18", "weights": "IMAGENET1K_V9"},
         "weights: resnet18 has no 'IMAGENET1K_V9'; did you mean 'IMAGENET1K_V1'?"),
        ({"model": "resnet18", "args": {"layrs": 3}}, "args: resnet18 refuses its options: ResNet.__init__() got"),
    ],
)  # fmt: skip
def test_a_net_that_torchvision_cannot_make_is_refused(options: dict[str, Any], message: str) -> None:
    assert refusal(Torchvision, **options).startswith(message)


def test_a_net_of_torchvision_teaches_in_a_plan() -> None:
    teacher = {"use": "torchvision", "model": "squeezenet1_1", "size": 64, "taps": {"mid": "features.5"}}
    plan = plan_of({"teachers": {"squeeze": teacher}, "losses": {"kd": {"use": "kd"}}})
    assert plan.shapes["squeeze.logits"] == (3,)


# --- ONNX


class Plain(nn.Module):
    """A net small enough to be exported in a moment."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, stride=2)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(images)).mean((2, 3)))


def export(net: nn.Module, path: Path, shape: tuple[int, ...], *, dynamic: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (torch.rand(shape),), path, dynamo=True, verbose=False,
            dynamic_shapes=[{0: torch.export.Dim("batch")}] if dynamic else None,
        )  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plain, Path]:
    torch.manual_seed(3)
    net = Plain().eval()
    path = tmp_path_factory.mktemp("onnx") / "plain.onnx"
    export(net, path, (2, 1, 28, 28), dynamic=True)
    return net, path


def test_an_onnx_teacher_gives_what_the_net_gave_that_it_was_exported_from(exported: tuple[Plain, Path]) -> None:
    net, path = exported
    teacher = {"use": "onnx", "path": str(path)}
    plan = plan_of({"teachers": {"onnx": teacher}, "losses": {"kd": {"use": "kd"}}})
    images = batch(5)["image"]
    with torch.no_grad():
        expected = net((images - 0.3) / 0.25)
    torch.testing.assert_close(run_calls(plan, batch(5))["onnx.logits"], expected, rtol=1e-4, atol=1e-5)


def test_an_onnx_teacher_may_bring_its_own_statistics(exported: tuple[Plain, Path]) -> None:
    net, path = exported
    network = made(Onnx, path=str(path), mean=[0.0], std=[1.0])
    images = batch()["image"]
    with torch.no_grad():
        torch.testing.assert_close(network(images), net(images), rtol=1e-4, atol=1e-5)


def test_images_are_resized_to_what_the_onnx_file_expects(exported: tuple[Plain, Path]) -> None:
    network = made(Onnx, path=str(exported[1]))
    assert network.prepare.size == (28, 28)
    assert network(torch.rand(2, 1, 40, 50)).shape == (2, 3)


def test_an_onnx_file_for_one_image_at_a_time_takes_a_batch(tmp_path: Path) -> None:
    torch.manual_seed(4)
    net = Plain(channels=3).eval()
    export(net, tmp_path / "one.onnx", (1, 3, 28, 28), dynamic=False)
    network = made(Onnx, path=str(tmp_path / "one.onnx"), mean=[0.0], std=[1.0])
    images = batch()["image"]
    with torch.no_grad():
        torch.testing.assert_close(network(images), net(images.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_an_onnx_net_cannot_be_the_student(exported: tuple[Plain, Path]) -> None:
    with pytest.raises(KdxError, match="student: onnx has no parameters that could be trained"):
        plan_of({"student": None}, {"student": {"use": "onnx", "path": str(exported[1])}})


def test_an_onnx_net_offers_logits_only(exported: tuple[Plain, Path]) -> None:
    kd = {"kd": {"use": "kd", "inputs": {"teacher": "onnx.embedding"}}}
    with pytest.raises(KdxError, match="onnx has no 'embedding'; it has: logits"):
        plan_of({"teachers": {"onnx": {"use": "onnx", "path": str(exported[1])}}, "losses": kd})


def test_a_file_that_is_not_there_or_not_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("words")
    assert refusal(Onnx, path=str(tmp_path / "gone.onnx")) == f"path: there is no file {tmp_path / 'gone.onnx'}"
    message = refusal(Onnx, path=str(tmp_path / "text.onnx"))
    assert message.startswith(f"path: {tmp_path / 'text.onnx'} is no ONNX file that onnxruntime can run: ")


def test_refusals_of_options_are_config_errors() -> None:
    with pytest.raises(ConfigError):
        made(Timm, model="resnt18")
