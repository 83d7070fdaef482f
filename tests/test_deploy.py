"""Facts of `kdx/deploy.py`: a loss may change what is evaluated, averaged, kept and loaded again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small_plugin import SmallNet, made_images
from small_run import DISTIL, PLUGIN, Seen, config_of, quiet, run_in, session_of, weights_of
from torch import Tensor, nn
from toy_plugin import TinyNet

import kdx
from kdx.builtin.images import FashionMnist
from kdx.components import Network
from kdx.config import load_mapping
from kdx.deploy import Extended
from kdx.loop import make_session
from kdx.runs import Stopped, build_plan, carry_out, prepare
from kdx.runtime import Runtime
from kdx.student import load_student
from kdx.taps import Tap
from kdx.tiny import tiny_run

ANSWERS = Path(__file__).parent / "answer_plugin.py"
REUSE = config_of(
    DISTIL, {"name": "reuse", "losses": {"kd": None, "hint": None, "ce": None, "reuse": {"use": "reuse"}}}
)
"""A student whose answer is that of the teacher's classifier on its projected features."""
OWN = config_of(
    DISTIL,
    {
        "name": "own",
        "plugins": [str(PLUGIN), str(ANSWERS)],
        "teachers": None,
        "align": None,
        "losses": {"kd": None, "hint": None, "ce": None},
        "student": {"taps": {"early": "first"}},
    },
)
TEST = made_images(24, 2)


def logits_of(network: Network) -> Tensor:
    with torch.no_grad():
        return network(TEST["image"])


def cross_entropy(logits: Tensor) -> float:
    return nn.functional.cross_entropy(logits, TEST["label"]).item()


def run_own(folder: Path, **loss: Any) -> kdx.RunResult:
    return run_in(folder, OWN, {"losses": {"own": loss}})


# --- what is deployed


def test_the_answer_is_the_teachers_when_the_projected_features_are_the_teachers() -> None:
    session = session_of(REUSE, {"teachers": {"wide": {"width": 4}}})
    teacher = session.plan.teachers["wide"].network
    session.plan.student.network.net.load_state_dict(teacher.net.state_dict())
    session.learner.eval()
    projector = session.learner.nodes["losses/reuse"].projector
    with torch.no_grad():
        projector.weight.copy_(torch.eye(4)[:, :, None, None])
        projector.bias.zero_()
    torch.testing.assert_close(logits_of(session.student), logits_of(teacher))


def test_the_deployed_student_shares_its_weights_with_what_is_trained() -> None:
    session = session_of(REUSE)
    Seen(session)
    session.learner.eval()
    net, node = session.plan.student.network.net, session.learner.nodes["losses/reuse"]
    features = net.second(net.first(TEST["image"]))
    expected = session.plan.teachers["wide"].network.net.head(node.projector(features).mean((2, 3)))
    torch.testing.assert_close(logits_of(session.deployed), expected)


def test_a_borrowed_part_of_the_student_is_the_one_that_is_trained() -> None:
    losses = {"own": {"use": "blend"}, "ce": {"use": "cross_entropy"}}
    found = prepare(load_mapping(config_of(OWN, {"losses": losses})), quiet())
    plan = build_plan(found, quiet(), trained=True)
    session = make_session(found.spec, plan, found.dataset, found.splits, Runtime(found.spec.runtime))
    before = copy.deepcopy(session.deployed.parts["head"].weight)
    Seen(session)
    assert session.deployed.parts["head"] is plan.student.network.net.head
    assert not torch.equal(session.deployed.parts["head"].weight, before)


@pytest.mark.parametrize(("use", "moves"), [("blend", False), ("trained_blend", True)])
def test_what_is_deployed_has_a_part_that_only_a_loss_which_trains_it_has_changed(use: str, moves: bool) -> None:
    found = prepare(load_mapping(config_of(OWN, {"losses": {"own": {"use": use}}})), quiet())
    plan = build_plan(found, quiet(), trained=True)
    session = make_session(found.spec, plan, found.dataset, found.splits, Runtime(found.spec.runtime))
    head = session.plan.student.network.net.head
    before = copy.deepcopy(head.weight)
    Seen(session)
    session.learner.eval()
    assert session.deployed.parts["head"] is head
    assert torch.equal(head.weight, before) is not moves
    assert logits_of(session.deployed).isfinite().all()


def test_an_average_is_taken_of_all_that_is_deployed() -> None:
    session = session_of(REUSE, {"train": {"ema": 0.5, "updates": 2}})
    assert session.average is not None
    node = session.learner.nodes["losses/reuse"]
    start = copy.deepcopy(node.projector.weight)
    seen: list[Tensor] = []
    node.register_forward_pre_hook(lambda *_: seen.append(node.projector.weight.detach().clone()))
    Seen(session)
    one, two = seen[1], node.projector.weight
    first = start.lerp(one, 1 - 2 / 11)  # the decay rises: (1 + n) / (10 + n) for update n
    expected = first.lerp(two, 1 - 3 / 12)
    averaged = session.average.model
    torch.testing.assert_close(averaged.node.projector.weight, expected)
    session.learner.eval()
    assert not torch.equal(logits_of(session.student), logits_of(session.deployed))
    head = session.plan.teachers["wide"].network.net.head
    torch.testing.assert_close(averaged.parts["head"].weight, head.weight)


def test_a_tap_that_the_net_changes_in_place_is_answered_from_as_it_was() -> None:
    class Node(kdx.Loss):
        name = "node"

        def answer(self, **tensors: Any) -> Tensor:
            return torch.cat([x.mean((2, 3)) for x in tensors["maps"]], 1)

    net = TinyNet(1, 4, 3).eval()
    taps = {"pre": Tap("norm"), "act": Tap("act")}
    node = Node(Node.Config(), kdx.Given())
    found = logits_of(Extended(Network(net), node, {"maps": ["pre", "act"]}, taps, {}))
    pre = net.norm(net.conv(TEST["image"]))
    torch.testing.assert_close(found, torch.cat([pre.mean((2, 3)), pre.relu().mean((2, 3))], 1))


def test_the_plan_says_what_is_deployed(tmp_path: Path) -> None:
    found = run_in(tmp_path, REUSE, {"train": {"updates": 1}})
    text = (found.folder / "plan.txt").read_text()
    assert "losses.reuse changes what is deployed: it answers from student, head\n" in text


# --- runs and files


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_loaded_simkd_student_has_the_accuracy_that_the_run_found(tmp_path: Path, ema: float | None) -> None:
    found = tiny_run(tmp_path, losses={"ce": None, "simkd": {"use": "simkd"}}, train={"ema": ema, "updates": 3})
    source = FashionMnist(FashionMnist.Config()).test()
    assert source is not None
    images = source.fetch(range(40, 80))  # those of a tiny run
    for student in (load_student(found.folder), found.student()):
        with torch.no_grad():
            logits = student(images["image"].float() / 255)
        assert (logits.argmax(1) == images["label"]).float().mean().item() == pytest.approx(
            found.metrics["accuracy"], abs=1e-7
        )
        loss = nn.functional.cross_entropy(logits, images["label"]).item()
        assert loss == pytest.approx(found.metrics["cross_entropy"], rel=1e-5)


def test_an_answer_may_read_several_tensors_and_a_part_of_the_student(tmp_path: Path) -> None:
    found = run_own(tmp_path, use="blend", inputs={"features": ["student.mid", "student.early"]})
    student = found.student()
    assert found.metrics["cross_entropy"] == pytest.approx(cross_entropy(logits_of(student)), rel=1e-5)
    assert student.fields == {"features": ["mid", "early"]}
    assert not torch.equal(student.node.shares, torch.full((2,), 0.5))


def test_a_part_of_a_teacher_that_was_handed_in_must_be_handed_in_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = SmallNet(8, 0.0, 3)
    found = run_in(tmp_path, REUSE, {"teachers": {"wide": None}}, {"teachers": {"wide": {"taps": {"mid": "second"}}}},
                   models={"wide": wide})  # fmt: skip
    assert found.metrics["cross_entropy"] == pytest.approx(cross_entropy(logits_of(found.student())), rel=1e-5)
    with pytest.raises(kdx.CheckpointError, match=r"its teacher wide was handed in .* as net=\{'wide': \.\.\.\}"):
        load_student(found.folder, plugins=[PLUGIN])
    again = load_student(found.folder, {"wide": SmallNet(8, 0.0, 3)}, plugins=[PLUGIN])
    assert torch.equal(logits_of(again), logits_of(found.student()))


def test_a_part_of_a_teacher_that_reads_another_stream_comes_back(tmp_path: Path) -> None:
    def split(count: int, seed: int) -> dict[str, Tensor]:
        found = made_images(count, seed)
        image = nn.functional.interpolate(found["image"], 16)
        return {"image": image, "depth": torch.cat([image, 1 - image], 1), "label": found["label"]}

    def net(width: int, stream: str) -> dict[str, Any]:
        args = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, width], "stem_width": 4, "output_stride": 8}
        return {"use": "timm", "model": "resnet18", "input": stream, "args": args}

    config = {
        "name": "streams", "student": net(8, "image"), "teachers": {"deep": net(12, "depth")}, "baseline": False,
        "losses": {"simkd": {"use": "simkd"}}, "train": {"updates": 2, "batch": 12}, "out": str(tmp_path),
        "runtime": {"precision": "fp32"},
    }  # fmt: skip
    found = kdx.run(config, data={"train": split(36, 1), "test": split(24, 2)}, quiet=True)
    student = load_student(found.folder)
    assert student.streams == ("image",)
    with torch.no_grad():
        logits = student(split(24, 2)["image"])
    assert found.metrics["cross_entropy"] == pytest.approx(cross_entropy(logits), rel=1e-5)


def test_a_stopped_run_goes_on_to_the_same_student(tmp_path: Path) -> None:
    config = config_of(REUSE, {"train": {"ema": 0.9}})
    straight = run_in(tmp_path / "straight", config)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= 2

    found = prepare(load_mapping({**config, "out": str(tmp_path / "stopped")}), quiet())
    with pytest.raises(Stopped):
        carry_out(found, quiet(stop=stop))
    carry_out(found, quiet())
    one, two = weights_of(straight.folder), weights_of(found.folder)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_deployed_student_can_be_exported(tmp_path: Path) -> None:
    student = run_in(tmp_path, REUSE, {"train": {"updates": 1}}).student()
    exported = torch.export.export(student, (TEST["image"],)).module()
    torch.testing.assert_close(exported(TEST["image"]), logits_of(student))


# --- what is refused


def test_two_losses_that_answer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(kdx.PlanError, match=r"^losses: losses\.reuse and losses\.again both change what is deployed"):
        run_in(tmp_path, REUSE, {"losses": {"again": {"use": "reuse"}}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ref", ["wide.mid", "mid"])
def test_an_answer_that_needs_more_than_the_student_is_refused(tmp_path: Path, ref: str) -> None:
    with pytest.raises(
        kdx.PlanError, match=r"^losses\.reuse\.inputs\.student: found .*; what is deployed reads the st"
    ):
        run_in(tmp_path, REUSE, {"losses": {"reuse": {"inputs": {"student": ref}}, "ce": {"use": "cross_entropy"}}})


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("silent", r"^losses\.own \(silent, plugin .*\): its answer does not run: AssertionError: silent names no"),
        ("unknown_part", r"`answers` names 'tail', which is in neither `inputs` nor `borrows`"),
        ("features_only", r"its answer gives \[4\] for a sample, but the data has 3 classes"),
    ],
)  # fmt: skip
def test_an_answer_that_gives_no_logits_is_refused(tmp_path: Path, use: str, message: str) -> None:
    with pytest.raises(kdx.PlanError, match=message):
        run_own(tmp_path, use=use)
    assert not list(tmp_path.iterdir())


def test_a_classifier_for_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(kdx.PlanError, match=r"its answer gives \[5\] for a sample, but the data has 3 classes"):
        run_in(tmp_path, REUSE, {"teachers": {"wide": {"classes": 5}}})


def test_a_timm_teacher_without_a_mean_before_its_classifier_is_refused_before_training(tmp_path: Path) -> None:
    args = {"img_size": 28, "patch_size": 7, "embed_dim": 8, "depth": 1, "num_heads": 1}
    vit = {"use": "timm", "model": "vit_tiny_patch16_224", "args": args}
    with pytest.raises(kdx.PlanError, match=r"simkd projects maps \[C, H, W\], but .* teacher \[17, 8\]"):
        tiny_run(tmp_path, teachers={"teacher": None, "vit": vit}, losses={"ce": None, "simkd": {"use": "simkd"}})
