"""Several views of a sample: what they share, what they cost, and how one model is called on each."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_plugin import Halves, made_images
from small_run import DISTIL, Seen, config_of, folders, prepared, quiet, run_in, session_of, weights_of
from torch import Tensor

import kdx
from kdx.builtin.augment import Rotate
from kdx.builtin.images import FashionMnist
from kdx.builtin.tensor_data import TensorDataset
from kdx.calls import ModelCall
from kdx.config import load_mapping, overlay
from kdx.randomness import Randomness
from kdx.runs import Stopped, build_plan, carry_out, family, prepare
from kdx.student import load_student
from kdx.tiny import tiny_run
from kdx.views import Viewed, with_views

VIEWED = config_of(
    DISTIL,
    {
        "name": "viewed",
        "data": {"views": {"still": {"flip": False}}},
        "losses": {
            "still": {"use": "kd", "inputs": {"student": "student@still.logits", "teacher": "wide@still.logits"}},
            "hint": None,
        },
    },
)
"""A student and a teacher that see each image as it is, and turned over at random."""


def fashion(augment: Mapping[str, Any], **views: Mapping[str, Any]) -> Viewed:
    made = with_views(FashionMnist(FashionMnist.Config(augment=dict(augment))), views)
    assert isinstance(made, Viewed)
    return made


def drawn(dataset: kdx.Dataset, count: int = 16) -> kdx.Batch:
    batch = {**dataset.train().fetch(range(count)), "index": torch.arange(count)}
    return dataset.on_device(batch, Randomness(0, 0, batch["index"]))


def message_of(*layers: Mapping[str, Any], data: Any = None) -> str:
    with pytest.raises(kdx.KdxError) as caught:
        prepare(load_mapping(config_of(VIEWED, *layers)), quiet(data=data))
    return str(caught.value)


# --- batches


def test_training_batches_hold_each_view_of_each_image() -> None:
    dataset = fashion({"flip": {}}, strong={"augment": {"erase": {"probability": 1.0}}}, as_it_is={"augment": {}})
    batch = drawn(dataset)
    assert set(batch) == {"image", "label", "index", "image@strong", "image@as_it_is"}
    raw = dataset.train().fetch(range(16))["image"].float() / 255
    assert torch.equal(batch["image@as_it_is"], raw)
    assert not torch.equal(batch["image@strong"], raw)
    assert {"image@strong", "image@as_it_is", "image"} <= set(dataset.facts().streams)


def test_views_agree_where_their_augmentations_do() -> None:
    common = {"flip": {}, "crop": {}}
    batch = drawn(fashion(common, same={}, covered={"augment": {**common, "erase": {"probability": 1.0, "side": 0.2}}}))
    assert torch.equal(batch["image@same"], batch["image"])
    differs = batch["image@covered"] != batch["image"]
    assert differs.flatten(1).any(1).sum() > 8
    assert differs.float().mean() < 0.05  # all but the rectangle is the same crop of the same flip


def test_evaluation_does_not_pay_for_views() -> None:
    batch = {**(dataset := fashion({"flip": {}}, strong={"augment": {"erase": {}}})).train().fetch(range(4))}
    seen = dataset.on_device(batch, None)
    assert seen["image@strong"] is seen["image"]


def test_a_view_reads_the_images_only_once() -> None:
    dataset = fashion({}, strong={"augment": {"flip": {}}})
    source, view = dataset._source, dataset._views["strong"]
    assert view.train() is source.train()
    drawn(dataset)
    assert view.facts() is source.facts()


def test_a_view_that_nothing_reads_is_not_made() -> None:
    found = prepared(VIEWED, {"data": {"views": {"unread": {"flip": True}}}})
    assert found.reached.views == ("still",)
    assert "data.views.unread" in found.reached.unused
    assert set(found.sample) == {"image", "label", "index", "image@still"}
    plain = prepared(VIEWED, {"losses": {"still": None}})
    assert not isinstance(plain.dataset, Viewed)
    assert set(plain.sample) == {"image", "label", "index"}


@pytest.mark.parametrize(
    "layer",
    [
        {"losses": {"still": {"inputs": {"student": "student.logits", "teacher": "*@still.logits"}}}},
        {"losses": {"still": {"inputs": {"student": "student.logits", "teacher": "teacher@still.logits"}}}},
        {"losses": {"still": {"inputs": {"student": "student.logits", "teacher": "wide.logits"}}},
         "teachers": {"wide": {"input": "image@still"}}},
    ],
)  # fmt: skip
def test_whatever_reads_a_view_keeps_it(layer: Mapping[str, Any]) -> None:
    if "*" in str(layer):
        layer = overlay(layer, {"losses": {"still": None}, "targets": {"both": {
            "use": "mean", "inputs": {"logits": ["*@still.logits", "wide.logits"]}}}})  # fmt: skip
        layer = overlay(layer, {"losses": {"kd": {"inputs": {"teacher": "both.logits"}}}})
    found = prepared(VIEWED, layer)
    assert found.reached.views == ("still",)
    session = session_of(VIEWED, layer)
    Seen(session)


def test_views_that_mix_alike_are_equal_and_leave_the_main_images_alone() -> None:
    both: Mapping[str, Any] = {"augment": {"crop": {}, "flip": {}, "mixup": {}}}
    batch = drawn(fashion({"flip": {}}, mixed=both, again=both, unmixed={"augment": {"crop": {}, "flip": {}}}))
    assert torch.equal(batch["image@mixed"], batch["image@again"])
    assert torch.equal(batch["image"], drawn(fashion({"flip": {}}, other={}))["image"])
    image, partner = batch["image@unmixed"], batch["image@unmixed"].roll(1, 0)
    ratio = Randomness(0, 0, torch.arange(16)).uniform("mixup", 1, 1, 1)
    torch.testing.assert_close(batch["image@mixed"], ratio * image + (1 - ratio) * partner)


# --- models on views


def test_the_student_on_two_views_is_one_student() -> None:
    session = session_of(VIEWED)
    one, two = (session.learner.models[f"model/{name}"] for name in ("student", "student@still"))
    assert one.network is two.network
    parameters = [*session.learner.models.parameters()]
    assert len(parameters) == len([*one.parameters()])
    groups = [parameter for group in session.runtime.optimizer.param_groups for parameter in group["params"]]
    assert len(groups) == len({id(parameter) for parameter in groups}) == len([*session.learner.parameters()])
    state = session.learner.state_dict()
    pairs = [(key, key.replace("model/student.", "model/student@still.")) for key in state if "model/student." in key]
    assert pairs
    assert all(state[a].data_ptr() == state[b].data_ptr() for a, b in pairs)


def test_each_view_of_the_student_sees_its_own_images_with_the_same_weights() -> None:
    session = session_of(VIEWED)
    plan = session.plan
    batch = session.dataset.on_device(session.splits.train.fetch(range(12)), Randomness(0, 0, torch.arange(12)))
    session.learner.eval()
    net = plan.student.network
    for call in plan.calls:
        if call.name in ("student", "student@still"):
            stream = "image" + call.name.removeprefix("student")
            assert call.reads == (f"batch.{stream}",)
            values: dict[str, Any] = {f"batch.{name}": value for name, value in batch.items()}
            call.run(values)
            torch.testing.assert_close(values[f"{call.name}.logits"], net.net(batch[stream]))
    assert not torch.equal(batch["image"], batch["image@still"])


def test_a_student_that_is_read_on_a_view_alone_is_trained_and_deployed() -> None:
    session = session_of(VIEWED, {"losses": {"ce": None, "kd": None}})
    assert "model/student" not in session.learner.models
    before = copy.deepcopy(session.deployed.net.head.weight)
    seen = Seen(session)
    assert not torch.equal(session.deployed.net.head.weight, before)
    assert 0 <= seen.evals[-1].metrics["accuracy"] <= 1


def test_a_run_with_views_ends_with_a_student_that_loads_and_a_plain_one_beside_it(tmp_path: Path) -> None:
    still = {"use": "cross_entropy", "inputs": {"student": "student@still.logits"}}
    found = run_in(tmp_path, VIEWED, {"baseline": True, "losses": {"own": still}})
    assert folders(tmp_path) == ["plain", "viewed"]
    assert list(found.result.teachers) == ["wide"]
    test = made_images(24, 2)
    with torch.no_grad():
        logits = found.student()(test["image"])
    assert found.metrics["cross_entropy"] == pytest.approx(F.cross_entropy(logits, test["label"]).item(), rel=1e-5)
    assert set(weights_of(found.folder)) == set(found.student().net.state_dict())
    (plain,) = [one for one, _ in family(prepared(VIEWED, {"baseline": True, "losses": {"own": still}}), quiet())
                if one.spec.root.name == "plain"]  # fmt: skip
    assert set(plain.spec.losses) == {"ce", "own"}  # what needs the teacher on a view went with it
    assert plain.reached.views == ("still",)


def test_a_teacher_that_is_read_on_a_view_alone_has_a_row_in_the_result(tmp_path: Path) -> None:
    found = run_in(tmp_path, VIEWED, {"losses": {"kd": None}})
    assert found.result.teachers["wide"].test["accuracy"] >= 0


def test_the_config_that_a_run_keeps_is_the_same_run(tmp_path: Path) -> None:
    found = run_in(tmp_path, VIEWED, {"train": {"updates": 1}})
    kept = load_mapping({"extends": str(found.folder / "config.yaml")})
    assert prepare(kept, quiet()).folder.name == found.folder.name


def test_a_stopped_run_with_views_goes_on_to_the_same_student(tmp_path: Path) -> None:
    straight = run_in(tmp_path / "straight", VIEWED)
    found = prepared(VIEWED, {"out": str(tmp_path / "stopped")})
    with pytest.raises(Stopped):
        carry_out(found, quiet(stop=iter([False, False] + [True] * 9).__next__))
    carry_out(found, quiet())
    one, two = weights_of(straight.folder), weights_of(found.folder)
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- identity


def test_the_hash_follows_the_options_of_views_that_are_read() -> None:
    def digest(views: Mapping[str, Any], *layers: Mapping[str, Any]) -> str:
        return prepared(VIEWED, {"data": {"views": views}}, *layers).hash

    first = digest({"still": {"flip": False}})
    assert digest({"still": {"flip": False}}) == first
    assert digest({"still": {"flip": True}}) != first
    assert digest({"still": {"flip": False}, "unread": {"flip": True}}) == first
    unread = {"losses": {"still": None}}
    assert digest({"still": {"flip": False}}, unread) == digest({"still": {"flip": True}}, unread) != first


# --- data from Python


def tensors(augment: Mapping[str, Any] | None = None) -> TensorDataset:
    found = {name: {**made_images(count, seed)} for name, count, seed in (("train", 48, 1), ("test", 24, 2))}
    return TensorDataset.from_tensors(**found, augment=augment)


HANDED = {
    "data": {"use": "tensors", "views": {"still": None, "strong": {"augment": {"erase": {"probability": 1.0}}}}},
    "losses": {"still": {"inputs": {"student": "student@strong.logits", "teacher": "wide@strong.logits"}}},
}


def test_data_that_is_handed_over_has_views_too(tmp_path: Path) -> None:
    found = prepare(load_mapping(config_of(VIEWED, HANDED)), quiet(data=tensors()))
    batch = found.dataset.on_device(found.splits.train.fetch(range(8)), Randomness(0, 0, torch.arange(8)))
    assert torch.equal(batch["image"], found.splits.train.fetch(range(8))["image"])
    assert not torch.equal(batch["image@strong"], batch["image"])
    result = run_in(tmp_path, VIEWED, HANDED, data=tensors())
    assert load_student(result.folder, plugins=result._plugins).streams == ("image",)


def test_a_view_of_data_that_is_handed_over_keeps_the_options_that_it_does_not_name() -> None:
    layer = overlay(HANDED, {"data": {"views": {"strong": {"augment": None}}}})
    found = prepare(load_mapping(config_of(VIEWED, layer)), quiet(data=tensors({"flip": {"probability": 1.0}})))
    batch = found.dataset.on_device(found.splits.train.fetch(range(8)), Randomness(0, 0, torch.arange(8)))
    assert torch.equal(batch["image@strong"], batch["image"])
    assert not torch.equal(batch["image"], found.splits.train.fetch(range(8))["image"])


def test_how_handed_over_data_is_augmented_decides_the_run() -> None:
    hashes = {
        prepare(load_mapping(config_of(VIEWED, HANDED)), quiet(data=tensors(augment))).hash
        for augment in (None, {"flip": {}}, {"shift": {}})
    }
    assert len(hashes) == 3


def test_a_data_set_of_ones_own_without_such_an_option_is_refused() -> None:
    found = message_of(HANDED, data=Halves(Halves.Config()))
    assert found == "data.views.strong.augment: Halves has no such option; views may differ in: flip"


# --- what is refused


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"losses": {"still": {"inputs": {"student": "student@stil.logits"}}}},
         "losses.still.inputs.student: the data has no view 'stil'; did you mean 'still'?"),
        ({"losses": {"still": {"inputs": {"student": "batch.image@stil"}}}},
         "losses.still.inputs.student: the data has no stream 'image@stil'; did you mean 'image@still'?"),
        ({"data": {"views": {"still": {"flap": False}}}},
         "data.views.still.flap: halves (plugin small_plugin.py) has no such option; did you mean 'flip'?"),
        ({"data": {"views": {"still": {"size": 12}}}},
         "data.views.still.size: it acts when a sample is read, so all its views share it; views may differ in: flip"),
        ({"data": {"views": {"still": {"use": "fashion_mnist"}}}}, "data.views.still.use: a view is of the same data"),
        ({"data": {"views": {"a-b": {}}}}, "data.views.a-b: 'a-b' cannot be part of a ref"),
        ({"data": {"views": ["still"]}}, "data.views: found ['still'], expected a whole number from 1, or names"),
        ({"data": {"use": "fashion_mnist", "views": {"still": {"flip": None, "augment": {"flp": {}}}}}},
         "data.views.still: data.augment.flp: unknown augmentation; did you mean 'flip'?"),
    ],
)  # fmt: skip
def test_a_view_that_means_nothing_is_refused(layer: Mapping[str, Any], message: str) -> None:
    assert message_of(layer).startswith(message)


# --- methods on views


def test_a_turn_by_90_degrees_moves_whole_pixels() -> None:
    images = torch.rand(3, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    random = Randomness(0, 0, torch.arange(3))
    for degrees, quarters in ((0, 0), (90, 1), (180, 2), (270, 3), (-90, 3), (360, 0)):
        assert torch.equal(Rotate(degrees)(images, random), torch.rot90(images, quarters, (2, 3)))
    assert torch.equal(Rotate(180)(images[..., :3], random), images[..., :3].flip(2, 3))


@pytest.mark.parametrize("degrees", [90.0, 180.0, -90.0])
def test_any_angle_turns_the_same_way_as_quarters_do(degrees: float) -> None:
    images = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    random = Randomness(0, 0, torch.arange(2))
    nearly = Rotate(degrees + 1e-4)(images, random)
    torch.testing.assert_close(nearly, Rotate(degrees)(images, random), rtol=0, atol=1e-3)


def test_a_turn_keeps_lengths_in_images_that_are_not_square() -> None:
    images = torch.zeros(1, 1, 9, 15)
    images[0, 0, 4, 7 + 3] = 1  # three pixels right of the middle
    turned = Rotate(90.0)(images, Randomness(0, 0, torch.arange(1)))
    assert turned[0, 0].argmax() == (4 - 3) * 15 + 7  # three pixels above it
    assert turned.sum() == pytest.approx(1, abs=1e-5)


def test_a_turn_beyond_a_full_one_is_refused() -> None:
    with pytest.raises(ValueError, match="degrees: found 400, expected -360 to 360"):
        Rotate(400)


def test_multi_level_distillation_sees_two_views_in_a_run(tmp_path: Path) -> None:
    strong = {"strong": {"augment": {"crop": {}, "erase": {}, "brightness_contrast": {}}}}
    inputs = {"student_strong": "student@strong.logits", "teacher_strong": "teacher@strong.logits"}
    found = tiny_run(
        tmp_path, data={"views": strong}, losses={"mlkd": {"use": "mlkd", "inputs": inputs}}, train={"updates": 2}
    )
    text = (found.folder / "plan.txt").read_text()
    assert "student@strong" in text
    assert "reads batch.image@strong" in text


def test_the_config_of_multi_level_distillation_has_a_plan() -> None:
    config = load_mapping({"extends": str(Path(__file__).parent.parent / "configs" / "methods" / "mlkd.yaml")})
    found = prepare(overlay(config, {"baseline": False}), quiet())
    plan = build_plan(found, quiet(), trained=False)
    assert {"student", "student@strong", "cnn", "cnn@strong"} <= {call.name for call in plan.calls}
    batch: Mapping[str, Tensor] = found.dataset.on_device(
        found.splits.train.fetch(range(8)), Randomness(0, 0, torch.arange(8))
    )
    assert batch["image@strong"].shape == batch["image"].shape


def test_function_matching_shows_student_and_teacher_exactly_the_same_mixed_images() -> None:
    config = load_mapping({"extends": str(Path(__file__).parent.parent / "configs" / "methods" / "funmatch.yaml")})
    found = prepare(config, quiet())
    assert found.plain is not None
    assert set(found.plain.spec.losses) == {"ce"}
    plan = build_plan(found, quiet(), trained=False)
    calls = {call.name: call for call in plan.calls}
    assert calls["student@mixed"].reads == calls["cnn@mixed"].reads == ("batch.image@mixed",)
    assert not {"student", "cnn"} & set(calls)
    index = torch.arange(8)
    batch = found.dataset.on_device(found.splits.train.fetch(range(8)), Randomness(0, 0, index))
    values: dict[str, Any] = {f"batch.{name}": value for name, value in batch.items()}
    shown: list[Tensor] = []
    for name in ("cnn@mixed", "student@mixed"):
        call = calls[name]
        assert isinstance(call, ModelCall)
        call.module.register_forward_pre_hook(lambda _, given: shown.append(given[0]["image"].clone()))
        call.run(values)
    assert len(shown) == 2
    assert torch.equal(shown[0], shown[1])
    assert torch.equal(shown[0], batch["image@mixed"])
    assert not torch.equal(shown[0], batch["image"])
