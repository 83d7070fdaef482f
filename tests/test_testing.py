"""The checks for plugin authors: right components pass, and each way to be wrong is told by name."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx
from kdx.builtin.aligners import Auto
from kdx.builtin.losses import CrossEntropy
from kdx.builtin.schedules import Constant, Linear
from kdx.testing import check_aligner, check_loss, check_model, check_schedule, check_target

SHAPES: dict[str, kdx.Shape] = {"student": (6,), "teacher": (6,)}


class Good(kdx.Loss):
    """Squared difference over a projection, per sample; wrong losses below differ from it in one thing."""

    name = "good"
    inputs = {"student": kdx.REQUIRED, "teacher": kdx.REQUIRED}
    knobs = {"scale": kdx.Knob(1.0, above=0.0)}

    @dataclass(frozen=True)
    class Config:
        power: float = 2.0

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.head = nn.Linear(given.shape("student")[0], given.shape("teacher")[0])

    def forward(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        return (self.head(student) - teacher.detach()).abs().pow(self.config.power).mean(1) * scale


class GoodOptional(kdx.Loss):
    """Squared difference, over the samples that a mask names."""

    name = "good_optional"
    inputs = {"student": "student.logits", "teacher": "teacher.logits", "mask": kdx.OPTIONAL}

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        values = (student - teacher.detach()).square().mean(1)
        return values if mask is None else values * mask


class GoodStateful(kdx.Loss):
    """The distance from a random anchor and a counted one, both kept as state."""

    name = "good_stateful"
    inputs = {"student": kdx.REQUIRED}

    def __init__(self, config: GoodStateful.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.anchor: Tensor
        self.register_buffer("anchor", torch.randn(given.shape("student")))

    def forward(self, student: Tensor) -> Tensor:
        noise = torch.rand(student.shape[0], 1, generator=self.given.generator)
        value = (student - self.anchor - noise).square().mean()
        with torch.no_grad():
            self.anchor.add_(1.0)
        return value


def test_right_losses_pass() -> None:
    check_loss(Good, shapes=SHAPES)
    check_loss(Good, shapes=SHAPES, power=1.5, scale=3.0)
    check_loss(Good(Good.Config(power=3.0), kdx.Given(shapes=SHAPES)))
    check_loss(MeanWithKnob, shapes=SHAPES)
    check_loss(GoodOptional, zero_at_equality=True)
    check_loss(GoodOptional, tensors={"mask": torch.tensor([1.0, 0.0, 1.0])})
    check_loss(GoodStateful, shapes={"student": (4,)}, order_matters=True)
    check_loss(CrossEntropy)


class InPlace(Good):
    name = "in_place"

    def forward(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        teacher.mul_(2)
        return super().forward(student, teacher, scale)


class GlobalRandom(Good):
    name = "global_random"

    def forward(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        return super().forward(student, teacher, scale) + torch.rand(())


class GlobalNumpy(Good):
    name = "global_numpy"

    def forward(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        return super().forward(student, teacher, scale) + float(np.random.rand())


class GlobalPython(Good):
    name = "global_python"

    def forward(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        return super().forward(student, teacher, scale) + random.random()


class WrongShape(Good):
    name = "wrong_shape"

    def forward(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        return (self.head(student) - teacher.detach()).square() * kdx.per_sample(scale, student)


class NotPerSampleKnob(Good):
    name = "knob_shape"

    def forward(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        return ((self.head(student) - teacher.detach()).square() * scale).mean(1)


class MeanWithKnob(Good):
    name = "mean_with_knob"

    def forward(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        return super().forward(student, teacher, scale).sum() / len(student)


class SummedKnob(Good):
    name = "summed_knob"

    def forward(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        return super().forward(student, teacher, scale.sum())


class LeakToTeacher(Good):
    name = "leak"

    def forward(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        return (self.head(student) - teacher).square().mean(1) * scale


class NoGraph(Good):
    name = "no_graph"

    def forward(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        return super().forward(student, teacher, scale).detach()


class HiddenWeights(Good):
    name = "hidden"

    def __init__(self, config: Good.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.heads = [nn.Linear(6, 6)]


class UnusedWeights(Good):
    name = "unused"

    def __init__(self, config: Good.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.spare = nn.Linear(6, 6)


class UnsavedState(Good):
    name = "unsaved"

    def __init__(self, config: Good.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.offset = torch.randn(6)

    def forward(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        return super().forward(student + self.offset, teacher, scale)


class Unpicklable(Good):
    name = "unpicklable"

    def __init__(self, config: Good.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.square = lambda x: x * x


class OrderDependent(Good):
    name = "order"

    def forward(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        return super().forward(student, teacher, scale) * torch.arange(len(student))


class Double(Good):
    name = "double"

    def forward(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        return super().forward(student, teacher, scale).double()


class GradientNan(Good):
    name = "gradient_nan"

    def forward(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        return super().forward(student, teacher, scale) + (student - student.detach()).square().sum(1).sqrt()


CHANGING = iter(range(1000))


class Changing(Good):
    name = "changing"

    def forward(self, student: Tensor, teacher: Tensor, scale: Tensor) -> Tensor:
        return super().forward(student, teacher, scale) + next(CHANGING)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (InPlace, "forward changed its input 'teacher' in place"),
        (GlobalRandom, "used a global random generator; use given.generator"),
        (GlobalNumpy, "used a global random generator"),
        (GlobalPython, "used a global random generator"),
        (WrongShape, r"gave \[11, 6\], expected 0-d or one value per sample \[11\]"),
        (NotPerSampleKnob, "knobs given per sample fail, use kdx.per_sample"),
        (SummedKnob, r"equal knobs \['scale'\] given per sample change the result; use kdx.per_sample"),
        (LeakToTeacher, "a gradient reaches 'teacher', which belongs to a teacher; detach it"),
        (NoGraph, "its value has no graph"),
        (HiddenWeights, r"holds weights in \['heads'\], where torch does not see them"),
        (UnusedWeights, "no gradient reaches its parameter spare.weight"),
        (UnsavedState, "its state_dict does not hold all of its state"),
        (Unpicklable, "it cannot be copied by pickle"),
        (OrderDependent, "samples in another order give other values; if that is meant, say order_matters=True"),
        (Double, "gave torch.float64 for float32 inputs"),
        (GradientNan, "the gradient of 'student' is not finite"),
        (Changing, "two equal calls gave two results"),
    ],
)
def test_a_wrong_loss_is_told_what_is_wrong(loss: type[kdx.Loss], message: str) -> None:
    with pytest.raises(AssertionError, match=rf"^{loss.name} \(.*\.{loss.__name__}\): .*{message}"):
        check_loss(loss, shapes=SHAPES)


class NaiveSoftmax(kdx.Loss):
    name = "naive"
    inputs = {"student": "student.logits", "teacher": "teacher.logits"}

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        p = student.exp() / student.exp().sum(1, keepdim=True)
        return -(teacher.detach().softmax(1) * p.log()).sum(1)


class NeedsLabels(kdx.Loss):
    name = "needs_labels"
    inputs = {"student": "student.logits", "label": "batch.label"}

    def forward(self, student: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(student, label, ignore_index=-1)


class NeedsMask(GoodOptional):
    name = "needs_mask"

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        values = super().forward(student, teacher, mask)
        return values * (values.new_tensor(float("nan")) if mask is None else 1.0)


def test_overflow_missing_labels_and_missing_options_are_found() -> None:
    with pytest.raises(AssertionError, match=r"^naive .*: for logits of size 1e4 its value is not finite"):
        check_loss(NaiveSoftmax)
    with pytest.raises(AssertionError, match=r"^needs_labels .*: without any label its value is not finite"):
        check_loss(NeedsLabels)
    with pytest.raises(AssertionError, match=r"^needs_mask .*: without \['mask'\] its value is not finite"):
        check_loss(NeedsMask, tensors={"mask": torch.ones(4)})


def test_a_value_at_equality_is_found() -> None:
    with pytest.raises(AssertionError, match=r"^good .*: the value for a perfect student is .*, expected 0"):
        check_loss(Good, shapes=SHAPES, zero_at_equality=True)
    with pytest.raises(AssertionError, match="needs a `same_shape` group, or inputs `student` and `teacher`"):
        check_loss(CrossEntropy, zero_at_equality=True)


def declared(**changes: Any) -> type[kdx.Loss]:
    """The loss `Good` with other declarations."""
    return type("Declared", (Good,), {"name": "declared", **changes})


@dataclass(frozen=True)
class Clash:
    scale: float = 1.0


@dataclass(frozen=True)
class Unfillable:
    where: complex = 1j


@dataclass
class Thawed:
    power: float = 2.0


def takes_more(self: Any, student: Tensor, teacher: Tensor, scale: Tensor, label: Tensor) -> Tensor:
    return student.mean(1)


def takes_anything(self: Any, student: Tensor, teacher: Tensor, scale: Tensor, **rest: Tensor) -> Tensor:
    return student.mean(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "`name` is empty"),
        ({"forward": takes_more}, r"forward takes \['label'\], which are in none of inputs, knobs and borrows"),
        ({"forward": takes_anything}, r"forward takes \*\*rest.*, expected named parameters only"),
        ({"knobs": {}}, r"forward takes \['scale'\], which are in none"),
        ({"inputs": {**Good.inputs, "mask": kdx.OPTIONAL}}, r"it declares \['mask'\], which forward does not take"),
        ({"knobs": {"scale": kdx.Knob(0.0, above=0.0)}}, "the default of the knob scale must be above 0"),
        ({"trains": ("head",)}, r"it trains \['head'\], which are not in borrows"),
        ({"Config": Clash}, "the name 'scale' in its options is taken by its knobs"),
        ({"knobs": {"weight": kdx.Knob(1.0)}}, "the name 'weight' in its knobs is taken by the engine"),
        ({"Config": Unfillable}, "a config file cannot fill its Config"),
        ({"Config": Thawed}, r"Config must be a dataclass\(frozen=True\)"),
    ],
)
def test_declarations_that_do_not_fit_are_found(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_loss(declared(**changes), shapes=SHAPES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: check_loss(Good, shapes=SHAPES, powre=2.0),
            r"it has no options \['powre'\]; its Config has \['power'\]",
        ),
        (lambda: check_loss(Good, shapes=SHAPES, scale=-1.0), "the knob scale = -1.0 must be above 0"),
        (lambda: check_loss(Good), "shapes: say the shape of one sample of the input 'student'"),
        (lambda: check_loss(Good, shapes={"student": [(6,)], "teacher": (6,)}), r"shapes\['student'\]: .* one shape"),
        (
            lambda: check_loss(Good(Good.Config(), kdx.Given(shapes=SHAPES)), power=2.0),
            r"options \['power'\] go with a class, not with an instance",
        ),
    ],
)
def test_a_check_that_is_called_wrongly_says_so(call: Callable[[], None], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        call()


def test_the_checks_leave_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    check_loss(Good, shapes=SHAPES)
    check_model(TinyModel)
    assert torch.equal(before, torch.get_rng_state())


class GoodTarget(kdx.Target):
    name = "good_target"
    inputs = {"logits": kdx.Many("*.logits")}
    outputs = ("logits", "spread")

    def forward(self, logits: list[Tensor]) -> dict[str, Tensor]:
        stacked = torch.stack(logits)
        return {"logits": stacked.mean(0), "spread": stacked.std(0).mean(1)}


class WrongFields(GoodTarget):
    name = "wrong_fields"

    def forward(self, logits: list[Tensor]) -> dict[str, Tensor]:
        return {"logits": logits[0]}


class NoBatchAxis(GoodTarget):
    name = "no_batch"

    def forward(self, logits: list[Tensor]) -> dict[str, Tensor]:
        return {"logits": logits[0], "spread": logits[0].std(0)}


class ChangesAList(GoodTarget):
    name = "changes_a_list"

    def forward(self, logits: list[Tensor]) -> dict[str, Tensor]:
        logits[0].add_(1)
        return super().forward(logits)


class Overflows(GoodTarget):
    name = "overflows"

    def forward(self, logits: list[Tensor]) -> dict[str, Tensor]:
        return {"logits": logits[0].exp(), "spread": logits[0].mean(1)}


def test_targets_are_checked_field_by_field() -> None:
    check_target(GoodTarget)
    with pytest.raises(AssertionError, match=r"forward gave \['logits'\], but declares outputs \['logits', 'spread'\]"):
        check_target(WrongFields)
    with pytest.raises(AssertionError, match=r"spread is \[5\], expected 0-d or the batch axis \(11\) first"):
        check_target(NoBatchAxis)
    with pytest.raises(AssertionError, match="forward changed its input 'logits' in place"):
        check_target(ChangesAList)
    with pytest.raises(AssertionError, match="for logits of size 1e4 logits is not finite"):
        check_target(Overflows)


class Mapped(kdx.Aligner):
    name = "mapped"

    def __init__(self, config: Mapped.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        self.head = nn.Linear(given.shape("source")[0], given.shape("like")[0])

    def forward(self, source: Tensor) -> Tensor:
        aligned: Tensor = self.head(source)
        return aligned


class TakesLike(Mapped):
    name = "takes_like"

    def forward(self, source: Tensor, like: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(source)


class WrongSize(Mapped):
    name = "wrong_size"

    def forward(self, source: Tensor) -> Tensor:
        return super().forward(source)[:, :-1]


class CutsTheGraph(Mapped):
    name = "cuts"

    def forward(self, source: Tensor) -> Tensor:
        return super().forward(source.detach())


class Upcasts(Mapped):
    name = "upcasts"

    def forward(self, source: Tensor) -> Tensor:
        return super().forward(source).float()


def test_aligners_are_checked_for_shape_graph_and_precision() -> None:
    check_aligner(Mapped, source=(4,), like=(5,))
    check_aligner(Auto, source=(4, 3, 3), like=(10, 5))
    with pytest.raises(AssertionError, match=r"forward takes \['like'\]"):
        check_aligner(TakesLike, source=(4,), like=(5,))
    with pytest.raises(AssertionError, match=r"gave \[11, 4\], expected \[11, 5\]"):
        check_aligner(WrongSize, source=(4,), like=(5,))
    with pytest.raises(AssertionError, match="no finite gradient reaches its source"):
        check_aligner(CutsTheGraph, source=(4,), like=(5,))
    with pytest.raises(AssertionError, match=r"gave torch.float32 in bfloat16"):
        check_aligner(Upcasts, source=(4,), like=(5,))


class TinyModel(kdx.Model):
    name = "tiny"

    def build(self) -> kdx.Network:
        return kdx.Network(self.net(), self.streams)

    def net(self) -> nn.Module:
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, len(self.facts.classes)))


class NotANetwork(TinyModel):
    name = "not_a_network"

    def build(self) -> Any:
        return self.net()


class TooFewClasses(TinyModel):
    name = "too_few"

    def net(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))


class MixesSamples(TinyModel):
    name = "mixes"

    def net(self) -> nn.Module:
        return nn.Sequential(super().net(), nn.BatchNorm1d(5, track_running_stats=False))


class UnusedPart(TinyModel):
    name = "unused_part"

    def net(self) -> nn.Module:
        net = super().net()
        net[0].spare = nn.Linear(2, 2)  # type: ignore[index]
        return net


class OwnSeed(TinyModel):
    name = "own_seed"
    made = iter(range(100))

    def net(self) -> nn.Module:
        torch.manual_seed(next(OwnSeed.made))
        return super().net()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (NotANetwork, r"build\(\) gave a Sequential, expected a kdx.Network"),
        (TooFewClasses, r"logits are \[4, 2\], expected \[4, 5\]"),
        (MixesSamples, "logits of a sample depends on the rest of its batch in eval mode"),
        (UnusedPart, r"no gradient reaches the parameters \['net.0.spare.weight', 'net.0.spare.bias'\]"),
        (OwnSeed, "net.2.weight differs though the seed was the same"),
    ],
)
def test_a_wrong_model_is_told_what_is_wrong(model: type[kdx.Model], message: str) -> None:
    check_model(TinyModel)
    with pytest.raises(AssertionError, match=message):
        check_model(model)


class Remembers(kdx.Schedule):
    name = "remembers"
    calls = 0

    def at(self, clock: kdx.Clock) -> float:
        self.calls += 1
        return float(self.calls)


class GivesTensor(kdx.Schedule):
    name = "gives_tensor"

    def at(self, clock: kdx.Clock) -> Any:
        return torch.tensor(1.0)


class Diverges(kdx.Schedule):
    name = "diverges"

    def at(self, clock: kdx.Clock) -> float:
        return float("inf") if clock.step == 40 else 1.0


class Rolls(kdx.Schedule):
    name = "rolls"

    def at(self, clock: kdx.Clock) -> float:
        return random.random()


def test_schedules_are_checked_for_purity() -> None:
    check_schedule(Constant, value=2.0, warmup=3)
    check_schedule(Linear(Linear.Config(start=1.0, end=0.0)))
    with pytest.raises(AssertionError, match="no pure function of the clock"):
        check_schedule(Remembers)
    with pytest.raises(AssertionError, match=r"at\(\) gave tensor\(1.\) at update 0, expected a finite float"):
        check_schedule(GivesTensor)
    with pytest.raises(AssertionError, match=r"at\(\) gave inf at update 40"):
        check_schedule(Diverges)
    with pytest.raises(AssertionError, match="used a global random generator"):
        check_schedule(Rolls)
