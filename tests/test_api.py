"""Facts of `kdx/api.py`: runs and components from Python."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_plugin import SmallNet, made_images
from small_run import DISTIL, PLAIN, config_of, quiet, run_in, write_config
from torch import Tensor, nn
from torch.utils.data import TensorDataset as TorchTensors

import kdx
from kdx.builtin.tensor_data import TensorDataset
from kdx.config import overlay
from kdx.runs import prepare

HANDED = config_of(overlay(DISTIL, {"student": None, "teachers": None, "data": None}), {"data": {"validation": 12}})
"""A config that leaves student, teacher and data to Python; the taps are named."""
HANDED["student"] = {"taps": {"mid": "second"}}
HANDED["teachers"] = {"wide": {"taps": {"mid": "second"}}}


def nets() -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return {"student": SmallNet(4, 0.0, 3), "wide": SmallNet(8, 0.5, 3)}


def splits() -> dict[str, Any]:
    return {"train": made_images(48, 1), "test": made_images(24, 2)}


@pytest.fixture(scope="module")
def handed(tmp_path_factory: pytest.TempPathFactory) -> tuple[kdx.RunResult, dict[str, nn.Module], dict[str, Any]]:
    """A finished run of modules and data, the modules, and their states before it."""
    models = nets()
    before = {name: copy.deepcopy(net.state_dict()) for name, net in models.items()}
    run = run_in(tmp_path_factory.mktemp("runs"), HANDED, models=models, data=splits())
    return run, models, before


def test_modules_that_were_handed_in_stay_as_they_are(handed: Any) -> None:
    run, models, before = handed
    student = run.student()
    for name, net in models.items():
        assert all(torch.equal(value, before[name][key]) for key, value in net.state_dict().items())
        assert net.training
        assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert student.net is not models["student"]
    assert not torch.equal(student.net.head.weight, models["student"].head.weight)


def test_the_trained_student_gives_the_numbers_of_the_run(handed: Any) -> None:
    run, _, _ = handed
    test = made_images(24, 2)
    with torch.no_grad():
        logits = run.student()(test["image"])
    assert run.metrics["accuracy"] == pytest.approx((logits.argmax(1) == test["label"]).float().mean().item())
    assert run.metrics["cross_entropy"] == pytest.approx(F.cross_entropy(logits, test["label"]).item(), rel=1e-5)
    assert isinstance(run.student().net, SmallNet)


def test_the_student_starts_with_the_weights_that_it_was_handed_in_with(tmp_path: Path) -> None:
    models = nets()
    frozen = {"train": {"lr": 0.0, "updates": 1}}
    run = run_in(tmp_path, HANDED, frozen, models=models, data=splits())
    kept = dict(run.student().net.named_parameters())
    assert all(torch.equal(value, kept[name]) for name, value in models["student"].named_parameters())


def test_another_module_is_another_run(handed: Any) -> None:
    run, models, _ = handed
    changed = copy.deepcopy(models["wide"])
    with torch.no_grad():
        changed.head.bias += 1

    def hash_of(networks: dict[str, nn.Module]) -> str:
        data = TensorDataset.from_tensors(**splits())
        return prepare(HANDED, quiet(networks=networks, data=data)).hash

    assert hash_of(models) == run.result.hash
    assert hash_of({**models, "wide": changed}) != run.result.hash


def test_a_file_a_mapping_and_overrides_of_both_kinds_give_one_run(tmp_path: Path) -> None:
    path = write_config(tmp_path / "small.yaml", PLAIN)
    out = str(tmp_path / "runs")
    found = [
        kdx.run(path, overrides=[f"out={out}", "train.lr=0.02"], quiet=True),
        kdx.run(str(path), overrides={"out": out, "train": {"lr": 0.02}}, quiet=True),
        kdx.run(PLAIN, overrides={"out": out, "train": {"lr": 0.02}}, quiet=True),
        kdx.run(overlay(PLAIN, {"out": out}), overrides="train.lr=0.02", quiet=True),
    ]
    assert len({run.folder for run in found}) == 1
    assert found[0].folder.name.startswith("small-")
    assert found[0].result.best == found[3].result.best


def test_interpolations_follow_overrides(tmp_path: Path) -> None:
    config = config_of(PLAIN, {"out": str(tmp_path), "train": {"updates": 1, "batch": "${seed}"}, "seed": 12})
    run = kdx.run(config, overrides={"seed": 9}, quiet=True)
    assert "batch: 9" in (run.folder / "config.yaml").read_text()
    assert config["train"]["batch"] == "${seed}", "the mapping itself stays as it is"


def test_an_override_removes_what_an_extended_file_brings(tmp_path: Path) -> None:
    base = write_config(tmp_path / "base.yaml", DISTIL)
    config = {"extends": str(base), "out": str(tmp_path), "train": {"updates": 1}}
    run = kdx.run(config, overrides={"losses": {"hint": None, "kd": None}}, quiet=True)
    assert run.result.teachers == {}


def test_data_may_be_tensors_torch_data_sets_or_a_dataset(tmp_path: Path) -> None:
    train, test = made_images(48, 1), made_images(24, 2)
    pairs = [TorchTensors(part["image"], part["label"]) for part in (train, test)]
    given = [
        {"train": train, "test": test},
        {"train": pairs[0], "test": pairs[1]},
        TensorDataset.from_tensors(train=train, test=test),
    ]
    found = [run_in(tmp_path, PLAIN, {"name": f"run{i}"}, data=data).metrics for i, data in enumerate(given)]
    assert found[1] == pytest.approx(found[0])
    assert found[2] == pytest.approx(found[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": 3}, "config: found a int, expected the path of a file or a mapping"),
        ({"config": PLAIN, "models": {"student": "resnet18"}}, r"models\['student'\]: found a str"),
        ({"config": PLAIN, "data": 3}, "data: found a int, expected a kdx.Dataset or a mapping of splits"),
        ({"config": PLAIN, "data": {"trian": {}}}, "data: 'trian' is no split or option; did you mean 'train'"),
        ({"config": PLAIN, "data": {"test": {}}}, "data: there is no split `train`"),
        ({"config": PLAIN, "overrides": ["train.lr"]}, "expected key=value"),
        ({"config": "none.yaml"}, r"cannot read config none\.yaml: No such file"),
    ],
)
def test_wrong_arguments_are_messages(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(kdx.KdxError, match=message):
        kdx.run(**arguments, quiet=True)


def test_metrics_are_those_of_the_test_split(handed: Any) -> None:
    run, _, _ = handed
    assert run.metrics == run.result.best.test != run.result.best.val


# --- make

FACTS = kdx.DataFacts(
    {"image": kdx.StreamFacts("image", (1, 8, 8), (0.5,), (0.3,)), "label": kdx.StreamFacts("label", ())},
    ("a", "b", "c"), 8,
)  # fmt: skip


def test_a_loss_is_called_with_tensors_and_its_knobs_have_defaults() -> None:
    student, teacher = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))

    def by_hand(tau: float) -> Tensor:
        return F.kl_div((student / tau).log_softmax(1), (teacher / tau).softmax(1), reduction="none").sum(1) * tau**2

    loss = kdx.make("losses", "kd")
    torch.testing.assert_close(loss(student=student, teacher=teacher), by_hand(4.0))
    torch.testing.assert_close(loss(student=student, teacher=teacher, temperature=torch.tensor(2.0)), by_hand(2.0))
    given = kdx.make("losses", "kd", temperature=3)
    torch.testing.assert_close(given(student=student, teacher=teacher), by_hand(3.0))


def test_options_reach_a_loss_that_is_made() -> None:
    logits, label = torch.zeros(2, 4), torch.tensor([0, -1])
    smooth = kdx.make("losses", "cross_entropy", label_smoothing=0.5)
    assert smooth(student=logits + torch.arange(4.0), label=label) > kdx.make("losses", "cross_entropy")(
        student=logits, label=torch.tensor([3, 3])
    )


def test_a_target_and_an_aligner_are_built_from_shapes() -> None:
    tau = kdx.make("targets", "entropy_temperature", shapes={"logits": (5,)})
    assert tau(logits=torch.zeros(3, 5)).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    aligner = kdx.make("aligners", "conv1x1", shapes={"source": (4, 8, 8), "like": (6, 4, 4)})
    assert aligner(source=torch.zeros(2, 4, 8, 8)).shape == (2, 6, 4, 4)
    assert len(list(aligner.parameters())) > 0


def test_every_other_kind_can_be_made() -> None:
    schedule = kdx.make("schedules", "linear", start=1.0, end=0.0)
    assert schedule.at(kdx.Clock(5, 1, 10)) == pytest.approx(0.5)
    network = kdx.make(
        "models", "timm", facts=FACTS, model="resnet18", args={"channels": [4, 4, 4, 4], "stem_width": 4}
    )
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 3)
    metric = kdx.make("metrics", "classification", facts=FACTS)
    metric.update(logits=torch.eye(3), label=torch.arange(3))
    assert metric.compute()["accuracy"] == 1.0
    assert isinstance(kdx.make("updaters", "plain"), kdx.Updater)
    assert len(kdx.make("datasets", "fashion_mnist").facts().classes) == 10


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("loses", "kd"), {}, "no kind of component is called 'loses'; did you mean 'losses'"),
        (("losses", "kdd"), {}, "make: no losses component is named 'kdd'"),
        (("losses", "kd"), {"temprature": 2.0}, "kd.temprature: unknown option"),
        (("losses", "kd"), {"temperature": 0.0}, "kd.temperature: found 0.0; it must be above 0"),
        (("losses", "kd"), {"temperature": "tau"}, "kd.temperature: found 'tau'; it must be a number"),
        (("targets", "entropy_temperature"), {}, r"entropy_temperature: it is built from the shapes .*'logits'"),
        (("models", "timm"), {"model": "resnet18"}, "give facts="),
        (("metrics", "classification"), {}, "give facts="),
        (("schedules", "linear"), {}, "linear.start: it is missing"),
    ],
)
def test_what_cannot_be_made_is_a_message(arguments: tuple[str, str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(kdx.KdxError, match=message):
        kdx.make(*arguments, **options)


def test_an_input_that_is_left_out_is_named() -> None:
    with pytest.raises(TypeError, match="kd is called without teacher"):
        kdx.make("losses", "kd")(student=torch.zeros(2, 3))
