"""Teachers of some samples and of some classes: what they say together, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import FACTS, NET, batch, run_calls, spec_of
from golden_inputs import normal, number
from hypothesis import given, settings
from hypothesis import strategies as st
from kdx_plugins.logit import soft_targets
from kdx_plugins.specialists import (
    ClassSubset,
    Route,
    SubsetDivergence,
    conditional_divergence,
    confidence,
    labelled_weights,
)
from torch import Tensor

import kdx
from kdx.plan import make_plan
from kdx.testing import check_loss, check_target, tiny_run

REFS = ["birds.logits", "cars.logits", "fish.logits"]
THREE = [normal(seed, 4, 5) for seed in range(3)]
CLASSES = {"birds": [3, 0], "cars": [1, 2, 4]}
PARTS = [normal(3, 4, 2), normal(4, 4, 3)]
STUDENT = normal(5, 4, 5)
ONE, FOUR = number(1.0), number(4.0)
FIVE_CLASSES = kdx.DataFacts(streams={}, classes=("a", "b", "c", "d", "e"))


def route(count: int = 3, classes: int = 5, by: kdx.Shape = (), **options: Any) -> Any:
    shapes = {"logits": [(classes,)] * count, "by": by}
    refs = {"logits": REFS[:count], "by": "batch.teacher"}
    return Route(Route.Config(**options), kdx.Given(shapes, FIVE_CLASSES, refs=refs))


def subset(
    classes: dict[str, list[int]] | None = None,
    shapes: Any = ((2,), (3,)),
    student: kdx.Shape | None = None,
    **options: Any,
) -> Any:
    config = ClassSubset.Config(classes=CLASSES if classes is None else classes, **options)
    given = {"logits": list(shapes)} | ({} if student is None else {"student": student})
    return ClassSubset(config, kdx.Given(given, FIVE_CLASSES, refs={"logits": REFS[: len(shapes)]}))


def divergence(shares: kdx.Shape | None = None, classes: dict[str, list[int]] | None = None) -> Any:
    shapes: dict[str, Any] = {"student": (5,), "teachers": [(2,), (3,)]}
    shapes |= {} if shares is None else {"shares": shares}
    refs = {"teachers": REFS[:2]}
    return SubsetDivergence(SubsetDivergence.Config(classes or CLASSES), kdx.Given(shapes, FIVE_CLASSES, refs=refs))


def test_each_sample_is_answered_by_the_teacher_that_it_names() -> None:
    out = route()(THREE, torch.tensor([2, 0, 1, 1]), ONE)
    for b, k in enumerate([2, 0, 1, 1]):
        assert torch.equal(out["logits"][b], THREE[k][b])
    assert out["weights"].tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 1, 0]]


def test_a_table_routes_by_class_whatever_its_order() -> None:
    label = torch.tensor([4, 1, 0, 3])
    for table in (
        {"birds": [0, 3], "cars": [1], "fish": [4, 2]},
        {"fish": [2, 4], "birds": [3, 0], "cars": [1]},
    ):
        out = route(table=table)(THREE, label, ONE)
        for b, k in enumerate([2, 1, 0, 0]):
            assert torch.equal(out["logits"][b], THREE[k][b])


def test_a_sample_that_names_no_teacher_gets_the_mixture_of_all() -> None:
    out = route()(THREE, torch.tensor([-1, 0, 1, -1]), FOUR)
    mixture = torch.stack([(z / 4).softmax(1) for z in THREE]).mean(0)
    for b in (0, 3):
        torch.testing.assert_close((out["logits"][b] / 4).softmax(0), mixture[b])
        torch.testing.assert_close(out["weights"][b], torch.full((3,), 1 / 3, dtype=torch.float64))
    assert torch.equal(out["logits"][1], THREE[0][1])


@settings(deadline=None)
@given(order=st.permutations(range(3)))
def test_other_orders_of_routed_teachers_only_renumber_them(order: list[int]) -> None:
    by = torch.tensor([2, 0, -1, 1])
    renumbered = torch.tensor([order.index(int(k)) if k >= 0 else -1 for k in by])
    out, turned = route()(THREE, by, ONE), route()([THREE[k] for k in order], renumbered, ONE)
    torch.testing.assert_close(turned["logits"], out["logits"])
    torch.testing.assert_close(turned["weights"], out["weights"][:, order])


@pytest.mark.parametrize("wrong", [3, -2])
def test_a_number_that_names_no_teacher_is_refused(wrong: int) -> None:
    by = torch.tensor([0, wrong, 1, 2])
    with pytest.raises(kdx.DataError, match=f"by: found {wrong}, expected the number of a teacher, 0 to 2, or -1"):
        route().calibrate(logits=THREE, by=by)
    with pytest.raises(
        RuntimeError, match="route: a number names no teacher, expected the number of a teacher, 0 to 2"
    ):
        route()(THREE, by, ONE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": {"birds": [0, 1], "cars": [2, 3]}}, r"expected each class from 0 to 4 once, for there are 5"),
        ({"table": {"birds": [0, 1, 2], "cars": [2, 3, 4]}}, r"table: found \{'birds': \[0, 1, 2\]"),
        ({"table": {"dogs": [0, 1, 2, 3, 4]}}, r"table.dogs: there is no such teacher, only birds, cars, fish"),
        ({"by": (2,)}, r"by: found \[2\] for one sample, expected one whole number"),
    ],
)
def test_routes_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(kdx.PlanError, match=message):
        route(**options)


def test_teachers_of_different_classes_cannot_be_routed_between() -> None:
    with pytest.raises(kdx.PlanError, match=r"logits: found \[4\], \[5\] for one sample"):
        Route(Route.Config(), kdx.Given({"logits": [(4,), (5,)], "by": ()}))


def test_the_union_is_the_law_of_total_probability() -> None:
    out = subset()(PARTS, None, None, FOUR, ONE)
    expected = torch.zeros(4, 5, dtype=torch.float64)
    for k, classes in enumerate(CLASSES.values()):
        expected[:, classes] = out["weights"][:, k, None] * PARTS[k].softmax(1)
    torch.testing.assert_close(out["logits"].exp(), expected)
    torch.testing.assert_close(expected.sum(1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(out["weights"], (4 * torch.stack([confidence(z) for z in PARTS], 1)).softmax(1))


def test_the_classes_are_matched_by_the_names_of_teachers_not_by_their_order() -> None:
    turned = {"cars": CLASSES["cars"], "birds": CLASSES["birds"]}
    torch.testing.assert_close(subset(turned)(PARTS, None, None, FOUR, ONE), subset()(PARTS, None, None, FOUR, ONE))


def test_classes_that_two_teachers_know_are_mixed() -> None:
    known = {"birds": [0, 1, 2], "cars": [2, 3, 4]}
    parts = [normal(6, 4, 3), normal(7, 4, 3)]
    out = subset(known, ((3,), (3,)))(parts, None, None, ONE, ONE)
    first, second = (out["weights"][:, k, None] * parts[k].softmax(1) for k in (0, 1))
    torch.testing.assert_close(out["logits"].exp()[:, 2], first[:, 2] + second[:, 0])


def test_a_teacher_that_is_not_named_knows_all_classes() -> None:
    """Then the union is the mixture that a plain ensemble makes."""
    out = subset({}, ((5,), (5,), (5,)))(THREE, None, None, number(0.0), FOUR)
    torch.testing.assert_close((out["logits"] / 4).softmax(1), torch.stack([(z / 4).softmax(1) for z in THREE]).mean(0))


def test_a_surer_teacher_gets_more_of_a_sample_and_none_depends_on_added_numbers() -> None:
    sure, even = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.1, 0.0]])
    node = subset()
    weights = node([even, sure], None, None, torch.tensor(4.0), torch.tensor(1.0))["weights"]
    assert weights[0, 1] > 0.95
    shifted = node([even + 50, sure - 50], None, None, torch.tensor(4.0), torch.tensor(1.0))["weights"]
    torch.testing.assert_close(shifted, weights)


def test_with_the_rule_energy_equal_sets_are_one_softmax_of_all_logits() -> None:
    known = {"birds": [4, 1], "cars": [0, 2]}
    parts = [normal(8, 4, 2), normal(9, 4, 2)]
    config = ClassSubset.Config(known, "energy")
    facts = kdx.DataFacts(streams={}, classes=("a", "b", "c", "d"))
    known["birds"][0] = 3
    node = ClassSubset(config, kdx.Given({"logits": [(2,), (2,)]}, facts, refs={"logits": REFS[:2]}))
    out = node(parts, None, None, ONE, ONE)["logits"].exp()
    torch.testing.assert_close(out[:, [3, 1, 0, 2]], torch.cat(parts, 1).softmax(1))


def test_a_label_gives_a_sample_to_the_teachers_that_know_its_class() -> None:
    out = subset()(PARTS, torch.tensor([3, 2, -1, 0]), None, FOUR, ONE)
    assert out["weights"][[0, 1, 3]].tolist() == [[1, 0], [0, 1], [1, 0]]
    torch.testing.assert_close(out["weights"][2], subset()(PARTS, None, None, FOUR, ONE)["weights"][2])
    assert out["logits"].isfinite().all()
    torch.testing.assert_close(out["logits"][1, CLASSES["cars"]].exp(), PARTS[1][1].softmax(0))


def test_teachers_that_all_know_a_class_share_it_by_their_weights() -> None:
    knows = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    weights = torch.tensor([[0.5, 0.3, 0.2]])
    shared = labelled_weights(weights, torch.tensor([1]), knows)
    torch.testing.assert_close(shared, torch.tensor([[0.625, 0.375, 0.0]]))


@settings(deadline=None)
@given(order=st.permutations(range(3)), rule=st.sampled_from(["confidence", "energy"]))
def test_the_order_of_teachers_of_some_classes_changes_only_that_of_the_weights(order: list[int], rule: str) -> None:
    known = {"birds": [0, 1], "cars": [2, 3], "fish": [3, 4]}
    parts = [normal(seed, 4, 2) for seed in range(3)]
    out = subset(known, [(2,)] * 3, rule=rule)(parts, None, None, FOUR, FOUR)
    turned_node = ClassSubset(
        ClassSubset.Config(known, rule),
        kdx.Given({"logits": [(2,)] * 3}, FIVE_CLASSES, refs={"logits": [REFS[k] for k in order]}),
    )
    turned = turned_node([parts[k] for k in order], None, None, FOUR, FOUR)
    torch.testing.assert_close(turned["logits"], out["logits"])
    torch.testing.assert_close(turned["weights"], out["weights"][:, order])


def test_the_conditional_divergence_compares_renormalised_probabilities() -> None:
    classes = torch.tensor([1, 2, 4])
    q = STUDENT.softmax(1)[:, classes]
    q = q / q.sum(1, keepdim=True)
    p = PARTS[1].softmax(1)
    expected = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(conditional_divergence(STUDENT, PARTS[1], classes, ONE), expected)
    student = STUDENT.clone().requires_grad_()
    conditional_divergence(student, PARTS[1], classes, FOUR).sum().backward()
    assert student.grad is not None
    assert student.grad[:, [0, 3]].abs().max() == 0


def test_kd_on_the_union_is_the_conditional_divergences_plus_that_of_the_shares() -> None:
    """The chain rule of the divergence, to the last digit."""
    union = subset()(PARTS, None, None, FOUR, ONE)
    whole = soft_targets(STUDENT, union["logits"], ONE)
    within = divergence((2,))(STUDENT, PARTS, union["weights"], ONE)
    q = torch.stack([STUDENT.softmax(1)[:, classes].sum(1) for classes in CLASSES.values()], 1)
    between = (union["weights"] * (union["weights"] / q).log()).sum(1)
    torch.testing.assert_close(whole, within + between, rtol=0, atol=1e-9)


def test_with_the_rule_student_its_own_mass_falls_to_each_teacher_and_only_conditionals_are_learnt() -> None:
    union = subset(student=(5,), rule="student")
    shares = torch.stack([STUDENT.softmax(1)[:, classes].sum(1) for classes in CLASSES.values()], 1)
    found = union(PARTS, None, STUDENT, ONE, ONE)
    torch.testing.assert_close(found["weights"], shares)
    torch.testing.assert_close(union(PARTS, None, STUDENT, FOUR, ONE)["weights"], (4 * shares.log()).softmax(1))
    gradients = []
    for way in ("whole", "within"):
        student = STUDENT.clone().requires_grad_()
        out = union(PARTS, None, student, ONE, ONE)
        assert not out["logits"].requires_grad
        value = (
            soft_targets(student, out["logits"], ONE)
            if way == "whole"
            else divergence((2,))(student, PARTS, out["weights"], ONE)
        )
        gradients.append(torch.autograd.grad(value.sum(), student)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("student", "rule"), [((5,), "confidence"), (None, "student")])
def test_the_student_is_named_for_its_own_rule_alone(student: kdx.Shape | None, rule: str) -> None:
    with pytest.raises(kdx.ConfigError, match=f"rule: found '{rule}', but the input `student` is named for the rule"):
        subset(student=student, rule=rule)


def test_a_student_of_other_classes_is_refused() -> None:
    with pytest.raises(kdx.PlanError, match=r"student: found \[4\] for one sample, expected \[5\]"):
        subset(student=(4,), rule="student")


def test_without_shares_the_divergences_are_averaged_over_the_teachers() -> None:
    even = torch.full((4, 2), 0.5, dtype=torch.float64)
    torch.testing.assert_close(divergence()(STUDENT, PARTS, None, FOUR), divergence((2,))(STUDENT, PARTS, even, FOUR))


def test_a_student_with_the_teachers_proportions_is_perfect_whatever_falls_to_each() -> None:
    student = torch.zeros(4, 5, dtype=torch.float64)
    for k, classes in enumerate(CLASSES.values()):
        student[:, classes] = PARTS[k] + 7 * k
    assert divergence()(student, PARTS, None, FOUR).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("classes", "shapes", "message"),
    [
        ({"birds": [0, 1], "cars": [2, 3]}, [(2,), (2,)], r"no teacher knows 4 \(e\), so nothing can be said"),
        ({"birds": [0, 1], "cars": [2, 3, 5]}, [(2,), (3,)], r"classes.cars: found \[2, 3, 5\], expected different"),
        ({"birds": [0, 0], "cars": [1, 2, 3]}, [(2,), (3,)], r"classes.birds: found \[0, 0\], expected different"),
        (
            {"birds": [0, 1], "cars": [2, 3, 4]},
            [(5,), (3,)],
            r"classes.birds: found 2 classes for logits of shape \[5\]",
        ),
        ({"birds": [0], "cars": [1, 2, 3, 4]}, [(1,), (4,)], r"classes.birds: found 1 classes .* two or more"),
        ({"dogs": [0, 1]}, [(5,), (5,)], r"classes.dogs: there is no such teacher, only birds, cars"),
    ],
)
def test_unions_that_cannot_be_are_refused(classes: dict[str, list[int]], shapes: Any, message: str) -> None:
    with pytest.raises(kdx.PlanError, match=message):
        subset(classes, shapes)


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(kdx.ConfigError, match="rule: found 'entropy', expected one of confidence, energy, student"):
        subset(rule="entropy")


def test_shares_must_be_one_for_each_teacher() -> None:
    with pytest.raises(kdx.PlanError, match=r"shares: found \[3\] for one sample, expected one for each of 2 teachers"):
        divergence((3,))


def test_the_components_keep_the_contract() -> None:
    by = torch.tensor([0, 1, 2, -1, 0, 1])
    check_target(Route, tensors={"by": by})
    check_target(Route, tensors={"by": by}, table={"0": [0, 1], "1": [2], "2": [3, 4]}, temperature=4.0)
    known = {"0": [0, 1], "1": [2, 3, 4]}
    check_target(ClassSubset, shapes={"logits": [(2,), (3,)]}, classes=known)
    check_target(ClassSubset, shapes={"logits": [(2,), (3,)]}, classes=known, rule="energy", temperature=2.0)
    labels = {"label": torch.tensor([0, 1, 2, -1, 4, 3])}
    check_target(ClassSubset, shapes={"logits": [(2,), (3,)]}, classes=known, tensors=labels)
    named = {"logits": [(2,), (3,)], "student": (5,)}
    check_target(ClassSubset, shapes=named, classes=known, rule="student", sharpness=1.0)
    check_loss(SubsetDivergence, shapes={"teachers": [(2,), (3,)]}, classes=known)
    check_loss(SubsetDivergence, shapes={"teachers": [(2,), (3,)], "shares": (2,)}, classes=known, temperature=1.0)


def test_a_teacher_that_learnt_some_classes_has_outputs_for_these_alone_and_is_known_by_its_name() -> None:
    known = {"high": [2, 1], "low": [0, 1]}
    nets = {"low": NET, "high": NET}
    classes = {"low": ("cat", "dog"), "high": ("emu", "dog")}
    union = {"union": {"use": "class_subset", "classes": known}}
    losses = {"kd": {"use": "kd", "inputs": {"teacher": "union.logits"}}}
    plan = make_plan(spec_of({"teachers": nets, "targets": union, "losses": losses}), FACTS, batch(), classes=classes)
    assert plan.shapes["low.logits"] == plan.shapes["high.logits"] == (2,)
    assert plan.shapes["student.logits"] == plan.shapes["union.logits"] == (3,)
    assert not plan.knows_classes("low")
    values = run_calls(plan, batch())
    low, high = (values[f"{name}.logits"].softmax(1) for name in ("low", "high"))
    weights = values["union.weights"]
    expected = torch.stack(
        [weights[:, 0] * low[:, 0], weights[:, 0] * low[:, 1] + weights[:, 1] * high[:, 1], weights[:, 1] * high[:, 0]],
        1,
    )
    torch.testing.assert_close(values["union.logits"].exp(), expected)


def test_a_teacher_of_as_many_other_classes_is_not_taken_for_one_of_the_same() -> None:
    config = {"teachers": {"low": NET, "high": NET}, "losses": {"kd": {"use": "aver"}}}
    plan = make_plan(spec_of(config), FACTS, batch(), classes={"low": ("gnu", "hen", "ibis"), "high": FACTS.classes})
    assert plan.shapes["low.logits"] == plan.shapes["high.logits"] == (3,)
    assert [plan.knows_classes(name) for name in ("low", "high", "student")] == [False, True, True]


def half(folder: Path, classes: list[int]) -> str:
    """The config of a small net that knows some of the shipped classes."""
    path = folder / f"teacher_{classes[0]}.yaml"
    path.write_text(
        f"name: half_{classes[0]}\n"
        f"data: {{use: fashion_mnist, classes: {classes}, labelled: 100, unlabelled: drop, validation: 50}}\n"
        "student: {use: timm, model: resnet18, args: {layers: [1, 1, 1, 1], channels: [4, 4, 8, 8], stem_width: 8}}\n"
        "losses: {ce: {use: cross_entropy}}\n"
        "train: {updates: 2, batch: 32}\n"
    )
    return str(path)


@pytest.mark.slow
def test_a_student_of_all_classes_learns_from_runs_on_some_of_them(tmp_path: Path) -> None:
    known = {"low": [0, 1, 2, 3, 4], "high": [9, 8, 7, 6, 5]}
    found = tiny_run(
        tmp_path / "runs",
        data={"use": "fashion_mnist", "validation": 50},
        teachers={"teacher": None, **{name: {"run": half(tmp_path, own)} for name, own in known.items()}},
        targets={"union": {"use": "class_subset", "classes": known}},
        losses={
            "kd": {"use": "kd", "inputs": {"teacher": "union.logits"}},
            "within": {"use": "subset_kd", "classes": known, "inputs": {"shares": "union.weights"}},
        },
    )
    assert len(found.result.classes) == 10
    assert set(found.result.teachers) == set(known)
    assert 0 <= found.result.targets["union"].test["accuracy"] <= 1
    for name, own in known.items():
        needed = next(tmp_path.glob(f"runs/half_{own[0]}-*/config.yaml"))
        assert yaml.safe_load(needed.read_text())["data"]["classes"] == own, name


@pytest.mark.slow
def test_the_data_may_name_the_teacher_of_each_sample(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> dict[str, Tensor]:
        return {
            "image": torch.rand(count, 1, 28, 28, generator=generator),
            "label": torch.arange(count) % 3,
            "teacher": torch.arange(count) % 2,
        }

    args = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}
    net = {"use": "timm", "model": "resnet18", "input": "image", "args": args}
    config = {
        "out": str(tmp_path),
        "data": {"use": "tensors"},
        "student": net,
        "teachers": {"a": net, "b": net},
        "targets": {"one": {"use": "route"}},
        "losses": {"kd": {"use": "kd", "inputs": {"teacher": "one.logits"}}},
        "train": {"updates": 2, "batch": 16},
        "baseline": False,
    }
    found = kdx.run(config, data={"train": split(48), "val": split(12), "test": split(12)}, quiet=True)
    assert found.result.last.step == 2
