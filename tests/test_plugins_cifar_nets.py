"""The nets of the CIFAR-100 benchmark: sizes, stages, taps, and the configs that use them."""

from __future__ import annotations

from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
from kdx_plugins.cifar_nets import NETS, Cifar, shuffled

import kdx
from kdx.config import load
from kdx.runs import Options, build_plan, carry_out, prepare
from kdx.taps import Tapped
from kdx.testing import check_model

PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "resnet50": 23_705_252,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg11": 9_277_284,
    "vgg13": 9_462_180,
    "vgg16": 14_774_436,
    "vgg19": 20_086_692,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
}
STAGES = {
    "resnet20": [(16, 32), (32, 16), (64, 8)],
    "resnet8x4": [(64, 32), (128, 16), (256, 8)],
    "resnet50": [(256, 32), (512, 16), (1024, 8), (2048, 4)],
    "wrn_16_2": [(32, 32), (64, 16), (128, 8)],
    "vgg8": [(128, 16), (256, 8), (512, 4), (512, 4)],
    "mobilenetv2": [(12, 16), (16, 8), (48, 4), (160, 2)],
    "shufflenetv1": [(240, 16), (480, 8), (960, 4)],
    "shufflenetv2": [(116, 16), (232, 8), (464, 4)],
}
CONFIGS = Path(__file__).parents[1] / "configs" / "cifar"
PAIRS = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "base")
SHIPPED = "data.use=fashion_mnist"


def network(model: str, channels: int = 3, size: int = 32) -> kdx.Network:
    images = kdx.StreamFacts("image", (channels, size, size), (0.5,) * channels, (0.25,) * channels)
    facts = kdx.DataFacts({"image": images}, classes=tuple("abcde"), size=8)
    torch.manual_seed(0)
    return Cifar(Cifar.Config(model), facts, ("image",)).build().eval()


def test_there_is_a_number_for_every_net() -> None:
    assert set(PARAMETERS) == set(NETS)


@pytest.mark.parametrize("model", PARAMETERS)
def test_a_net_has_the_parameters_of_its_definition(model: str) -> None:
    with torch.device("meta"):
        net = NETS[model](3, 100)
    assert sum(weight.numel() for weight in net.parameters()) == PARAMETERS[model]


@pytest.mark.parametrize(
    "model",
    [
        "resnet8",
        "wrn_16_2",
        "vgg8",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenetv2", "shufflenetv1", "shufflenetv2")),
    ],
)
def test_nets_keep_the_contract(model: str) -> None:
    config = make_dataclass("Config", [("model", str, model)], frozen=True)
    check_model(type("Preset", (Cifar,), {"Config": config}))


@pytest.mark.parametrize("model", STAGES)
def test_stages_have_the_shapes_of_the_benchmark(model: str) -> None:
    net = network(model).net
    with torch.no_grad():
        features, maps = net.forward_intermediates(torch.rand(1, 3, 32, 32))
    assert [(one.shape[1], one.shape[2]) for one in maps] == STAGES[model]
    assert [(info["num_chs"], 32 // info["reduction"]) for info in net.feature_info] == STAGES[model]
    assert features.shape[1] == net.get_classifier().in_features


@pytest.mark.parametrize("model", STAGES)
def test_stages_are_what_their_modules_give_and_the_head_ends_the_pass(model: str) -> None:
    net = network(model, channels=1, size=28).net
    images = torch.rand(2, 1, 28, 28)
    seen: dict[str, torch.Tensor] = {}
    for info in net.feature_info:
        name = info["module"]
        net.get_submodule(name).register_forward_hook(lambda *call, name=name: seen.__setitem__(name, call[2]))
    with torch.no_grad():
        features, maps = net.forward_intermediates(images, indices=[0, 2])
        torch.testing.assert_close(net.forward_head(features), net(images))
        early = net.forward_intermediates(images, indices=[0, 2], intermediates_only=True, stop_early=True)
        torch.testing.assert_close(net.forward_features(images), features)
    assert net.forward_head(features).shape == (2, 5)
    for ours, theirs, name in zip(maps, early, ("stages.0", "stages.2"), strict=True):
        assert torch.equal(ours, seen[name])
        assert torch.equal(ours, theirs)


def test_a_pass_that_wants_early_stages_does_not_run_later_ones() -> None:
    net = network("vgg8").net
    net.stages[2].register_forward_hook(lambda *call: pytest.fail("a later stage ran"))
    assert len(net.forward_intermediates(torch.rand(2, 3, 32, 32), [1], intermediates_only=True, stop_early=True)) == 1


def test_relative_depths_name_the_stages_that_the_benchmark_takes() -> None:
    for model, middle in (("resnet8", 1), ("vgg8", 1), ("mobilenetv2", 1), ("wrn_16_2", 1)):
        wanted = ("depth_25", "depth_50", "depth_100", "embedding", "features", "logits")
        tapped = Tapped(network(model), wanted, {}, "student")
        last = len(network(model).net.stages) - 1
        assert tapped.stages_meant == {"depth_25": "0", "depth_50": str(middle), "depth_100": str(last)}
        found = tapped({"image": torch.rand(2, 3, 32, 32)})
        torch.testing.assert_close(found["embedding"], found["features"].mean((2, 3)))
        torch.testing.assert_close(found["logits"], tapped.network.net.classifier(found["embedding"]))


def test_other_layouts_than_maps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^output_fmt: found 'NLC'"):
        network("resnet8").net.forward_intermediates(torch.rand(2, 3, 32, 32), output_fmt="NLC")


def test_shuffling_takes_one_channel_of_each_group_in_turn() -> None:
    channels = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert shuffled(channels, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]


def test_what_no_net_can_be_built_for_is_refused() -> None:
    with pytest.raises(kdx.ConfigError, match=r"^model: found 'resnet56x'; did you mean resnet56"):
        network("resnet56x")
    facts = kdx.DataFacts({"image": kdx.StreamFacts("image", (3, 32, 32))})
    with pytest.raises(kdx.PlanError, match="the data has 0 classes"):
        Cifar(Cifar.Config("resnet8"), facts, ("image",)).build()
    with pytest.raises(kdx.PlanError, match=r"^input: found left, right"):
        Cifar(Cifar.Config("resnet8"), facts, ("left", "right")).build()


def test_the_thirteen_pairs_follow_the_recipe() -> None:
    assert len(PAIRS) == 13
    for pair in PAIRS:
        config = load(CONFIGS / f"{pair}.yaml")
        student = config["student"]["model"]
        assert pair == f"{Path(config['teachers']['teacher']['run']['extends']).stem}_{student}"
        assert config["data"]["dataset"] == "CIFAR100"
        assert config["losses"] == {
            "ce": {"use": "cross_entropy", "weight": 0.1},
            "kd": {"use": "kd", "temperature": 4, "weight": 0.9},
        }
        start = 0.01 if student.startswith(("mobile", "shuffle")) else 0.05
        assert config["train"]["lr"] == {"use": "step", "start": start, "at": [150, 180, 210], "factor": 0.1}


def test_one_override_takes_a_pair_and_its_teacher_to_other_data() -> None:
    prepared = prepare(load(CONFIGS / "resnet56_resnet20.yaml", [SHIPPED]))
    teacher = prepared.needs["teacher"].spec
    assert teacher.data.entry.component.name == prepared.spec.data.entry.component.name == "fashion_mnist"
    assert teacher.student.options.model == "resnet56"
    assert teacher.train.epochs == 240


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS)
def test_each_pair_has_a_plan(pair: str) -> None:
    prepared = prepare(load(CONFIGS / f"{pair}.yaml", [SHIPPED, "baseline=false"]))
    plan = build_plan(prepared, Options(), trained=False)
    assert [call.name for call in plan.loss_calls] == ["losses.ce", "losses.kd"]
    assert not plan.unused


@pytest.mark.slow
def test_a_pair_and_its_teacher_run_on_the_shipped_images(tmp_path: Path) -> None:
    short = ("train.epochs=0.001", "train.batch=4")  # two updates
    teacher = [f"teachers.teacher.run.{option}" for option in short]
    data = ["data.validation=0", "data.classes=[0,1]"]  # a fifth of the images to evaluate
    overrides = [SHIPPED, *short, *teacher, *data, "baseline=false", f"out={tmp_path}"]
    prepared = prepare(load(CONFIGS / "resnet56_resnet20.yaml", overrides))
    result = carry_out(prepared, Options(quiet=True))
    assert result.status == "finished"
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} >= {"resnet56", "resnet56_resnet20"}
