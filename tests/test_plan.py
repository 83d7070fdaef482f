"""The compiled plan: sides, shapes, first weights, and the parts that do not fit together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CLASSES, FACTS, NET, PLAIN, VIT, WIDE, batch, forward, plan_of, run_calls, spec_of
from torch import Tensor, nn
from toy_plugin import TinyNet

from kdx.checkpoint import load_weights, save_weights
from kdx.components import Network, Schedule
from kdx.config import load_mapping
from kdx.errors import CheckpointError, KdxError, PlanError
from kdx.modules import Learner, Teachers
from kdx.plan import Plan, make_plan
from kdx.plugins import discover
from kdx.randomness import seeded
from kdx.spec import ModelSpec, check
from kdx.types import DataFacts, StreamFacts

BIG = {"teachers": {"big": {**WIDE, "taps": {"mid": 3, "low": 1}}}}
KD = {**BIG, "losses": {"kd": {"use": "kd"}}}
HINT = {
    **BIG,
    "student": {"taps": {"mid": 3}},
    "align": {"mid": {"source": "student.mid", "like": "big.mid"}},
    "losses": {"hint": {"use": "mse", "inputs": {"student": "mid", "teacher": "big.mid"}}},
}
TINY = {"student": {"use": "tiny", "taps": {"map": "conv"}}}


def refusal(*layers: dict[str, Any], **rest: Any) -> str:
    with pytest.raises(KdxError) as caught:
        plan_of(*layers, **rest)
    return str(caught.value)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# --- what a plan is made of


def test_a_plain_plan_has_a_student_and_a_loss_and_no_teacher_side() -> None:
    plan = plan_of()
    assert [call.name for call in plan.calls] == ["student", "losses.ce"]
    assert plan.teacher_calls == ()
    assert plan.kept == ()
    assert plan.shapes["student.logits"] == (len(CLASSES),)
    assert plan.shapes["losses.ce"] == ()


def test_a_plain_plan_needs_no_installed_plugin() -> None:
    registry = discover(installed=False)
    plan = make_plan(check(load_mapping(PLAIN), registry), FACTS, batch())
    _, losses = forward(plan, batch())
    losses.total.backward()
    assert plan.student.network.net.fc.weight.grad is not None


def test_shapes_are_those_of_one_sample() -> None:
    shapes = plan_of(HINT, KD).shapes
    assert shapes["batch.image"] == (1, 28, 28)
    assert shapes["batch.label"] == ()
    assert shapes["student.mid"] == (24, 2, 2)
    assert shapes["big.mid"] == shapes["mid.out"] == (32, 2, 2)
    assert shapes["losses.hint"] == ()


def test_knobs_are_the_constants_and_schedules_by_their_place_in_the_config() -> None:
    plan = plan_of(KD, {"losses": {"kd": {"weight": {"use": "linear", "start": 1, "end": 0}}}})
    assert plan.knobs["losses.kd.temperature"] == 4.0
    assert isinstance(plan.knobs["losses.kd.weight"], Schedule)
    assert set(plan.knobs) == {"losses.ce.weight", "losses.kd.weight", "losses.kd.temperature"}


def test_two_instances_of_one_loss_have_their_own_knobs_and_terms() -> None:
    plan = plan_of(KD, {"losses": {"soft": {"use": "kd", "temperature": 20.0}}})
    _, losses = forward(plan, batch())
    values = run_calls(plan, batch())
    student, teacher = values["student.logits"].double(), values["big.logits"].double()
    for name, tau in (("kd", 4.0), ("soft", 20.0)):
        p = torch.softmax(teacher / tau, 1)
        expected = tau**2 * (p * (p.log() - torch.log_softmax(student / tau, 1))).sum(1)
        torch.testing.assert_close(losses.terms[name], expected.float(), rtol=1e-2, atol=1e-4)


def test_the_total_is_the_weighted_sum_of_the_means_of_the_terms() -> None:
    plan = plan_of(KD, {"losses": {"ce": {"weight": 0.25}, "kd": {"weight": 3}}})
    _, losses = forward(plan, batch())
    expected = 0.25 * losses.terms["ce"] + 3 * losses.terms["kd"].mean()
    torch.testing.assert_close(losses.total.detach(), expected)


# --- the two sides


def test_a_frozen_teacher_is_on_the_teacher_side_without_gradient_and_in_evaluation_mode() -> None:
    plan = plan_of(KD)
    teacher = plan.teachers["big"]
    assert [call.name for call in plan.teacher_calls] == ["big"]
    assert plan.kept == ("big.logits",)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert plan.student.training
    assert all(parameter.requires_grad for parameter in plan.student.parameters())


def test_a_target_over_teachers_is_on_the_teacher_side() -> None:
    targets = {"mean": {"use": "mean"}, "tau": {"use": "entropy_temperature", "inputs": {"logits": "mean.logits"}}}
    kd = {"use": "kd", "inputs": {"teacher": "mean.logits"}, "temperature": "tau"}
    plan = plan_of({"teachers": {"a": NET, "b": VIT}, "targets": targets, "losses": {"kd": kd}})
    assert [call.name for call in plan.teacher_calls] == ["a", "b", "mean", "tau"]
    assert plan.kept == ("mean.logits", "tau.out")


def test_a_target_that_reads_the_student_is_on_the_learner_side() -> None:
    own = {"targets": {"tau": {"use": "entropy_temperature", "inputs": {"logits": "student.logits"}}}}
    plan = plan_of(KD, own, {"losses": {"kd": {"temperature": "tau"}}})
    assert [call.name for call in plan.learner_calls] == ["student", "tau"]


def test_a_target_with_parameters_is_trained_with_the_student() -> None:
    learnt = {"targets": {"learnt": {"use": "learnt", "inputs": {"x": "big.logits"}}}}
    plan = plan_of(KD, learnt, {"losses": {"m": {"use": "masked", "inputs": {"logits": ["learnt.logits"]}}}})
    assert "learnt" in [call.name for call in plan.learner_calls]
    learner, losses = forward(plan, batch())
    losses.total.backward()
    assert learner.nodes["targets/learnt"].factor.grad is not None


def test_what_a_learnt_target_feeds_is_on_the_learner_side_too() -> None:
    chain = {
        "targets": {
            "learnt": {"use": "learnt", "inputs": {"x": "big.logits"}},
            "after": {"use": "pass", "inputs": {"x": "learnt.logits"}},
        },
        "losses": {"m": {"use": "masked", "inputs": {"logits": ["after"]}}},
    }
    assert [call.name for call in plan_of(KD, chain).learner_calls] == ["student", "learnt", "after"]


def test_a_trainable_teacher_is_a_peer_on_the_learner_side() -> None:
    plan = plan_of(KD, {"teachers": {"big": {"trainable": True}}})
    assert plan.teachers == {}
    assert [call.name for call in plan.learner_calls] == ["student", "big"]
    assert all(parameter.requires_grad for call in plan.learner_calls for parameter in call.module.parameters())


def test_teachers_and_learner_hold_every_module_once() -> None:
    plan = plan_of(HINT, KD)
    assert set(Teachers(plan).models) == {"model/big"}
    learner = Learner(plan)
    assert set(learner.models) == {"model/student"}
    assert set(learner.nodes) == {"align/mid", "losses/ce", "losses/hint", "losses/kd"}


def test_nothing_that_a_teacher_gives_carries_a_gradient() -> None:
    plan = plan_of(KD)
    kept = Teachers(plan)(batch(), {})
    assert set(kept) == {"big.logits"}
    assert not kept["big.logits"].requires_grad


def test_a_teacher_that_is_asked_for_an_early_stage_runs_no_further() -> None:
    def layers_run(ref: str) -> list[str]:
        hint = {"use": "mse", "inputs": {"student": "low", "teacher": ref}}
        plan = plan_of(BIG, {"align": {"low": {"source": "student.logits", "like": ref}}, "losses": {"hint": hint}})
        ran: list[str] = []
        net = plan.teachers["big"].network.net
        for name in ("layer1", "layer2", "layer3", "layer4", "fc"):
            net.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        Teachers(plan)(batch(), {})
        return ran

    assert layers_run("big.low") == ["layer1"]
    assert layers_run("big.mid") == ["layer1", "layer2", "layer3"]
    assert layers_run("big.embedding") == ["layer1", "layer2", "layer3", "layer4"]
    assert layers_run("big.logits") == ["layer1", "layer2", "layer3", "layer4", "fc"]


def test_an_early_stop_is_noted() -> None:
    hint = {"use": "mse", "inputs": {"student": "low", "teacher": "big.low"}}
    plan = plan_of(BIG, {"align": {"low": {"source": "student.logits", "like": "big.low"}}, "losses": {"hint": hint}})
    assert "teachers.big stops early: nothing after low is asked of it" in plan.notes


def test_an_aligner_says_what_it_does() -> None:
    assert "align.mid: map 24x2x2 -> conv1x1 24->32" in plan_of(HINT).notes


# --- first weights


def test_the_first_weights_of_a_student_depend_on_the_seed_alone() -> None:
    start = weights(plan_of().student)
    assert same(start, weights(plan_of().student))
    assert same(start, weights(plan_of(KD).student))
    assert same(start, weights(plan_of(HINT).student))
    assert same(start, weights(plan_of({"teachers": {"a": VIT, "b": NET}}, {"targets": {"m": {"use": "mean"}},
                "losses": {"kd": {"use": "kd", "inputs": {"teacher": "m.logits"}}}}).student))  # fmt: skip
    torch.manual_seed(123)
    torch.rand(7)
    assert same(start, weights(plan_of().student))
    assert not same(start, weights(plan_of({"seed": 1}).student))


def test_models_of_different_roles_start_differently() -> None:
    plan = plan_of({"teachers": {"a": NET, "b": NET}}, {"targets": {"m": {"use": "mean"}},
                   "losses": {"kd": {"use": "kd", "inputs": {"teacher": "m.logits"}}}})  # fmt: skip
    starts = [weights(tapped.network.net) for tapped in (plan.student, *plan.teachers.values())]
    assert len({tuple(start["fc.weight"].flatten().tolist()) for start in starts}) == 3


def test_the_first_weights_of_an_aligner_depend_on_its_name_and_the_seed_alone() -> None:
    def start(*layers: dict[str, Any], name: str = "align/mid") -> dict[str, Tensor]:
        return weights(Learner(plan_of(HINT, *layers)).nodes[name])

    more = {
        "align": {"other": {"source": "student.mid", "like": "big.mid"}},
        "losses": {"more": {"use": "mse", "inputs": {"student": "other", "teacher": "big.mid"}}},
    }
    assert same(start(), start(more))
    assert same(start(), start({"losses": {"ce": None}}))
    assert not same(start(more), start(more, name="align/other"))
    assert not same(start(), start({"seed": 1}))


# --- the shape probe


def test_building_a_plan_leaves_no_trace() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    plan = plan_of(TINY, {"losses": {"restless": {"use": "restless"}}})
    assert torch.equal(torch.get_rng_state(), state)
    norm = plan.student.network.net.norm
    assert norm.running_mean.tolist() == [0.0] * 4
    assert norm.running_var.tolist() == [1.0] * 4
    assert norm.num_batches_tracked.item() == 0
    learner = Learner(plan)
    assert all(parameter.grad is None for parameter in learner.parameters())
    loss = learner.nodes["losses/restless"]
    assert loss.count.item() == 0
    assert loss.bank.shape == (0, len(CLASSES))
    assert "bank" in loss.state_dict()


def test_the_generator_of_a_node_starts_from_the_seed_and_its_name() -> None:
    def draws(*layers: dict[str, Any], name: str = "restless") -> list[float]:
        plan = plan_of({"losses": {name: {"use": "restless"}}}, *layers)
        generator = next(call.module.given.generator for call in plan.loss_calls if call.name == f"losses.{name}")
        return torch.rand(4, generator=generator).tolist()

    expected = torch.rand(4, generator=seeded(0, "generator", "losses.restless")).tolist()
    assert draws() == draws(KD) == expected
    assert draws({"seed": 1}) != expected
    assert draws(name="other") != expected


class Normed(nn.Module):
    """A student whose head has batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Flatten()
        self.head = nn.Sequential(nn.BatchNorm1d(28 * 28), nn.Linear(28 * 28, len(CLASSES)))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


def test_the_probe_of_a_borrowed_part_leaves_no_trace_in_its_owner() -> None:
    reused = {"use": "reused", "inputs": {"features": "student.flat"}, "borrows": {"head": "student.head"}}
    student = {"use": "module", "taps": {"flat": "body"}, "model": None, "args": None}
    net = Normed()
    plan_of({"student": student, "losses": {"reused": reused}}, networks={"student": net})
    assert net.head[0].num_batches_tracked.item() == 0
    assert not net.head[0].running_mean.any()


# --- parts that do not fit


def test_unequal_shapes_are_refused_with_both_and_the_advice_to_align() -> None:
    hint = {"use": "mse", "inputs": {"student": "student.mid", "teacher": "big.mid"}}
    message = refusal(HINT, {"losses": {"hint": hint}})
    assert message == (
        "losses.hint: mse needs equal shapes but got student.mid [24, 2, 2], big.mid [32, 2, 2]; "
        "put an aligner between them"
    )


def test_different_numbers_of_classes_are_refused_with_another_advice() -> None:
    message = refusal(KD, {"teachers": {"big": {"num_classes": 7}}})
    assert message == (
        "losses.kd: kd needs equal shapes but got student.logits [3], teacher.logits [7]; "
        "the models tell different numbers of classes apart"
    )


def test_a_student_with_another_number_of_classes_than_the_data_is_refused() -> None:
    message = refusal({"student": {"num_classes": 5}})
    assert message == "student: its logits have shape [5], but the data has 3 classes"


def test_an_aligner_that_does_not_give_the_shape_of_like_is_refused() -> None:
    message = refusal(HINT, {"align": {"mid": {"use": "stubborn", "source": "student.mid", "like": "big.mid"}}})
    assert message.startswith("align.mid (stubborn, plugin toy_plugin.py): gives [24, 2, 2], expected the shape of li")
    assert message.endswith("[32, 2, 2]")


@pytest.mark.parametrize("knob", ["temperature", "weight"])
def test_a_knob_that_is_read_from_a_node_is_one_number_per_sample_at_most(knob: str) -> None:
    vector = {"targets": {"vector": {"use": "pass", "inputs": {"x": "big.logits"}}}}
    message = refusal(KD, vector, {"losses": {"kd": {knob: "vector"}}})
    assert message == f"losses.kd.{knob}: vector.out has shape [3] per sample; a knob is one number"


def test_a_knob_may_be_one_number_per_sample() -> None:
    tau = {"targets": {"tau": {"use": "entropy_temperature"}}}
    plan = plan_of(KD, tau, {"losses": {"kd": {"temperature": "tau", "weight": "tau"}}})
    _, losses = forward(plan, batch())
    values = run_calls(plan, batch())
    expected = losses.terms["ce"] + (values["tau.out"] * losses.terms["kd"]).mean()
    torch.testing.assert_close(losses.total.detach(), expected)
    assert losses.knobs["losses.kd.temperature"].shape == (4,)


def test_a_term_with_more_than_one_value_per_sample_is_refused() -> None:
    message = refusal({"losses": {"wide": {"use": "wide"}}})
    assert message.startswith("losses.wide (wide, plugin toy_plugin.py): its term has shape [3] per sample; expected ")


def test_an_output_that_a_node_declares_and_does_not_give_is_refused() -> None:
    half = {"targets": {"half": {"use": "half", "inputs": {"x": "big.logits"}}}}
    message = refusal(KD, half, {"losses": {"kd": {"inputs": {"teacher": "half.logits"}}}})
    assert message == "targets.half: its forward gave no 'weights', which it declares"


def test_a_node_that_fails_is_named_with_what_it_was_given() -> None:
    reused = {"use": "reused", "inputs": {"features": "student.mid"}, "borrows": {"head": "big.classifier"}}
    message = refusal(HINT, {"losses": {"reused": reused}})
    assert message.startswith(
        "losses.reused (reused, plugin toy_plugin.py) does not run on student.mid [24, 2, 2], batch.label []: "
    )


def test_a_node_that_cannot_be_built_is_named_with_its_shapes() -> None:
    message = refusal(KD, {"losses": {"at": {"use": "at", "inputs": {"student": "student.logits", "teacher":
                      "big.mid"}}}})  # fmt: skip
    assert message.startswith("losses.at: ")


def test_a_run_that_reads_no_student_is_refused() -> None:
    lonely = {"losses": {"ce": None, "m": {"use": "masked", "inputs": {"logits": ["big.logits"]}}}}
    assert refusal(BIG, lonely) == "losses: none of them reads the student, so nothing would be learnt"


def test_a_student_that_cannot_be_trained_is_refused() -> None:
    frozen = TinyNet(1, 4, 3).requires_grad_(False)
    message = refusal({"student": {"use": "module", "model": None, "args": None}}, networks={"student": frozen})
    assert message == "student: module has no parameters that could be trained"


def test_a_borrowed_part_that_is_not_there_is_refused() -> None:
    message = refusal(BIG, {"losses": {"r": {"use": "reused", "borrows": {"head": "big.neck"}}}})
    assert message == "losses.r.borrows.head: ResNet has no part 'neck'"


# --- models and their streams

TWO = DataFacts(
    streams={
        "image": FACTS.streams["image"],
        "depth": StreamFacts("image", (1, 28, 28)),
        "label": StreamFacts("label", ()),
    },
    classes=CLASSES,
)


def both() -> dict[str, Tensor]:
    return {**batch(), "depth": batch(seed=1)["image"]}


def test_a_model_reads_the_only_stream_that_is_no_label() -> None:
    assert plan_of().calls[0].reads == ("batch.image",)


def test_a_model_must_say_which_stream_it_reads_where_there_are_several() -> None:
    message = refusal(facts=TWO, sample=both())
    assert message == "student.input: the data has image, depth; say which of them the model reads"


def test_a_model_reads_the_stream_that_it_names() -> None:
    plan = plan_of({"student": {"input": "depth"}}, facts=TWO, sample=both())
    assert plan.calls[0].reads == ("batch.depth",)


@pytest.mark.parametrize("use", [{"use": "tiny"}, NET, {"use": "torchvision", "model": "resnet18"}])
def test_a_stream_that_the_data_does_not_have_is_refused(use: dict[str, Any]) -> None:
    message = refusal({"student": None}, {"student": {**use, "input": "imgae"}})
    assert message == "student.input: the data has no stream 'imgae'; did you mean 'image'? (streams: image, label)"


@pytest.mark.parametrize("value", [3, [], [1], {"image": 1}])
def test_an_input_that_is_no_name_is_refused(value: Any) -> None:
    message = refusal({"student": {"input": value}})
    assert message.startswith(f"student.input: found {value!r}, expected the name of a stream or a list of them")


class Fused(nn.Module):
    """Reads two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(28 * 28, len(CLASSES))

    def forward(self, image: Tensor, depth: Tensor) -> Tensor:
        return self.head((image - depth).flatten(1))


def test_a_model_may_read_several_streams_in_the_order_of_the_config() -> None:
    student = {"student": {"use": "module", "input": ["image", "depth"], "model": None, "args": None}}
    net = Fused()
    plan = plan_of(student, facts=TWO, sample=both(), networks={"student": net})
    values = run_calls(plan, both())
    torch.testing.assert_close(values["student.logits"], net(both()["image"], both()["depth"]))


def test_a_module_of_the_user_stands_in_for_a_section() -> None:
    net = TinyNet(1, 4, 3)
    plan = plan_of(
        {"student": {"use": "module", "model": None, "args": None}}, KD, {"teachers": {"big": None}},
        {"teachers": {"big": NET}}, networks={"student": net},
    )  # fmt: skip
    assert plan.student.network.net is net


def test_a_module_that_was_not_handed_in_is_refused() -> None:
    message = refusal({"student": {"use": "module", "model": None, "args": None}})
    assert message.startswith("student: `module` stands for a network handed to kdx.run(models={...}), and none was")


def test_a_model_that_builds_no_network_is_refused_with_its_plugin(tmp_path: Path) -> None:
    text = (
        "import kdx, torch\nclass Bare(kdx.Model):\n    name = 'bare'\n"
        "    def build(self):\n        return torch.nn.Linear(2, 2)\n"
        "@kdx.hookimpl\ndef kdx_models():\n    return [Bare]\n"
    )
    (tmp_path / "bare.py").write_text(text)
    registry = discover([str(tmp_path / "bare.py")])
    message = refusal({"student": None}, {"student": {"use": "bare"}}, plugins=registry)
    assert message == "student: bare (plugin bare.py) built a Linear, expected a kdx.Network"


def test_a_model_that_cannot_take_the_data_is_named_with_what_it_was_given() -> None:
    message = refusal({"student": None}, {"student": VIT}, {"student": {"args": {"img_size": 56}}})
    assert message.startswith(
        "student does not run on batch.image [1, 28, 28]: AssertionError: Input height (28) doesn"
    )


# --- weights from files


def loading(path: Path) -> Callable[[ModelSpec, Network], None]:
    def ready(spec: ModelSpec, network: Network) -> None:
        if spec.engine.checkpoint is not None:
            load_weights(network.net, path, f"{spec.where}.checkpoint")

    return ready


def loaded(path: Path) -> Plan:
    spec = spec_of(KD, {"teachers": {"big": {"checkpoint": str(path)}}})
    return make_plan(spec, FACTS, batch(), ready=loading(path))


@pytest.fixture
def teacher_file(tmp_path: Path) -> Iterator[Path]:
    save_weights(plan_of(KD, {"seed": 9}).teachers["big"].network.net, tmp_path / "big.safetensors")
    return tmp_path / "big.safetensors"


def test_a_teacher_has_the_weights_of_its_checkpoint(teacher_file: Path, tmp_path: Path) -> None:
    expected = weights(plan_of(KD, {"seed": 9}).teachers["big"].network.net)
    assert same(weights(loaded(teacher_file).teachers["big"].network.net), expected)
    torch.save({"state_dict": expected}, tmp_path / "big.pt")
    assert same(weights(loaded(tmp_path / "big.pt").teachers["big"].network.net), expected)


def test_a_checkpoint_with_other_names_is_refused(teacher_file: Path, tmp_path: Path) -> None:
    other = weights(plan_of(KD).teachers["big"].network.net)
    other["fcc.weight"] = other.pop("fc.weight")
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"^teachers.big.checkpoint: .*other.pt does not fit ResNet: 1 missing, "
                       r"1 unknown; 'fcc.weight' is unknown; did you mean 'fc.weight'\?"):  # fmt: skip
        loaded(tmp_path / "other.pt")


def test_a_checkpoint_with_other_shapes_is_refused(tmp_path: Path) -> None:
    other = weights(plan_of(KD).teachers["big"].network.net)
    other["fc.weight"] = torch.zeros(9, 64)
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(
        CheckpointError, match=r"teachers.big.checkpoint: .*fc.weight has shape \[9, 64\], expected \[3"
    ):
        loaded(tmp_path / "other.pt")


def test_nothing_is_loaded_into_a_plan_that_is_only_shown() -> None:
    plan_of(KD, {"teachers": {"big": {"checkpoint": "nowhere.pt", "pretrained": True}}})


def test_a_refused_plan_is_a_plan_error() -> None:
    with pytest.raises(PlanError):
        plan_of({"losses": {"wide": {"use": "wide"}}})
