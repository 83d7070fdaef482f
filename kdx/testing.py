"""Checks for authors of plugins: each tries a component as the engine would, and fails with what is wrong with it.

    from kdx.testing import check_loss

    def test_my_loss_keeps_the_contract():
        check_loss(MyLoss, shapes={"student": (8, 4, 4), "teacher": (8, 4, 4)}, zero_at_equality=True, margin=0.5)

A class is made with the given options (knobs among them); an instance is taken as it is. Shapes are those of one
sample. Failures are AssertionErrors that name the component. `tiny_run` is a whole run with a plugin of yours.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdx.bench import LOSSES, Bench
from kdx.components import OPTIONAL, Aligner, Loss, Model, Network, Node, Schedule, Target
from kdx.halves import check_halves
from kdx.held_graph import check_released
from kdx.randomness import random_state, same_random_state
from kdx.tiny import tiny_run
from kdx.trial import (
    FACTS,
    Trial,
    Values,
    check_config,
    check_gaps,
    copies,
    describe,
    hidden_parameters,
    make_config,
    reindexed,
    require,
    same_values,
    tensors_in,
)
from kdx.types import Clock, DataFacts, Shape, StreamFacts
from kdx.updater import Updater

__all__ = ["check_aligner", "check_loss", "check_model", "check_schedule", "check_target", "check_updater", "tiny_run"]

_IMAGES = DataFacts(
    streams={"image": StreamFacts("image", (3, 32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))},
    classes=FACTS.classes,
    size=FACTS.size,
)


def check_loss(
    loss: type[Loss] | Loss,
    /,
    *,
    shapes: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    modules: Mapping[str, nn.Module | Sequence[nn.Module]] | None = None,
    zero_at_equality: bool = False,
    order_matters: bool = False,
    batch: int = 11,
    **options: Any,
) -> None:
    """Check that a loss keeps its contract.

    shapes: input -> shape of one sample (a list of shapes for `Many`); logits, labels and indices need none.
    tensors: inputs that cannot be made up, batch axis first; modules: what the loss borrows.
    zero_at_equality: whether a perfect student has the value 0: inputs of one `same_shape` group, or else `student` and
        `teacher`, are then tried equal.
    order_matters: whether the value depends on the order of the samples, as with neighbours or random masks.
    """
    trial = Trial(loss, shapes or {}, tensors or {}, modules or {}, options, batch)
    _check_node(trial, order_matters=order_matters)
    _check_gradients(trial, trial.inputs())
    for born in (torch.bfloat16, torch.float16):
        _check_gradients(trial, trial.inputs(born=born))
    _check_gradients(trial, trial.inputs(logit_scale=1e4), "for logits of size 1e4 ")
    if trial.label_inputs():
        unlabelled = torch.full((trial.batch,), -1)
        _check_gradients(trial, trial.inputs() | dict.fromkeys(trial.label_inputs(), unlabelled), "without any label ")
    if zero_at_equality:
        equal = _equal_inputs(trial)
        value = trial.run(trial.fresh(), equal)["out"].detach()
        scale = trial.run(trial.fresh(), trial.inputs())["out"].detach().abs().max().clamp(min=1e-6)
        off = (value.abs().max() / scale).item()
        require(off < 1e-4, trial.who, f"the value for a perfect student is {value.tolist()}, expected 0")
        _check_gradients(trial, equal, "for a perfect student ")


def check_target(
    target: type[Target] | Target,
    /,
    *,
    shapes: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    modules: Mapping[str, nn.Module | Sequence[nn.Module]] | None = None,
    order_matters: bool = False,
    batch: int = 11,
    **options: Any,
) -> None:
    """Check that a target keeps its contract; the arguments are those of `check_loss`."""
    trial = Trial(target, shapes or {}, tensors or {}, modules or {}, options, batch)
    _check_node(trial, order_matters=order_matters)
    _check_parameters(trial, trial.inputs())
    for born in (torch.bfloat16, torch.float16):
        _finite(trial, trial.run(trial.fresh(), trial.inputs(born=born)), f"for inputs born as {born} ")
    _finite(trial, trial.run(trial.fresh(), trial.inputs(logit_scale=1e4)), "for logits of size 1e4 ")


def check_aligner(
    aligner: type[Aligner] | Aligner, /, *, source: Shape, like: Shape, batch: int = 11, **options: Any
) -> None:
    """Check that an aligner brings [B, *source] to [B, *like], in float32, in half precision and under autocast."""
    trial = Trial(aligner, {"source": source, "like": like}, {}, {}, options, batch)
    _check_node(trial, order_matters=False)
    _check_parameters(trial, trial.inputs())
    inputs = trial.inputs()
    inputs["source"].requires_grad_()
    out = trial.run(trial.fresh(), inputs)["out"]
    require(tuple(out.shape) == (batch, *like), trial.who, f"gave {list(out.shape)}, expected {[batch, *like]}")
    require(out.requires_grad, trial.who, "its result has no graph, so the student would learn nothing through it")
    out.square().sum().backward()  # type: ignore[no-untyped-call]
    gradient = inputs["source"].grad
    reached = gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())
    require(reached, trial.who, f"no finite gradient reaches its source; found {gradient}")
    half = trial.fresh().to(torch.bfloat16)(inputs["source"].detach().to(torch.bfloat16))
    require(
        half.dtype == torch.bfloat16, trial.who, f"gave {half.dtype} in bfloat16, expected the precision of its source"
    )
    with torch.autocast("cpu", torch.bfloat16):
        _finite(trial, {"out": trial.fresh()(inputs["source"].detach())}, "under autocast ")
    one = trial.fresh().eval()(inputs["source"].detach()[:1])
    require(tuple(one.shape) == (1, *like), trial.who, f"gave {list(one.shape)} for one sample, expected {[1, *like]}")


def check_model(
    model: type[Model], /, *, facts: DataFacts | None = None, streams: tuple[str, ...] = ("image",), **options: Any
) -> None:
    """Check that a model builds a network that takes raw streams, gives a batch of outputs, and can be trained.

    Without `facts`, the data are RGB images of 32x32 and five classes.
    """
    who = describe(model)
    check_config(model, who)
    facts = facts or _IMAGES
    maker = model(make_config(model, options, who), facts, streams)
    first, again = _build_network(maker, who), _build_network(maker, who)
    require(tuple(first.streams) == streams, who, f"reads the streams {first.streams}, expected {streams}")
    for name, tensor in first.state_dict().items():
        require(torch.equal(tensor, again.state_dict()[name]), who, f"{name} differs though the seed was the same")
    generator = torch.Generator().manual_seed(0)
    batch = [torch.rand(4, *facts.streams[stream].shape, generator=generator) for stream in streams]
    before, state = [stream.clone() for stream in batch], random_state()
    outputs = _named_outputs(first.eval()(*batch), who)
    require(same_random_state(state, random_state()), who, "forward in eval mode used the global random generator")
    require(all(map(torch.equal, before, batch)), who, "forward changed a stream in place")
    for name, output in outputs.items():
        require(output.shape[:1] == (4,), who, f"{name} is {list(output.shape)}, expected the batch axis (4) first")
        require(bool(output.isfinite().all()), who, f"{name} is not finite")
    logits = outputs.get("logits")
    if logits is not None and facts.classes:
        wanted = (4, len(facts.classes))
        require(tuple(logits.shape) == wanted, who, f"logits are {list(logits.shape)}, expected {list(wanted)}")
    fewer = _named_outputs(first(*[stream[:2] for stream in batch]), who)
    for name, output in outputs.items():
        same = torch.allclose(fewer[name], output[:2], rtol=1e-3, atol=1e-4)
        require(same, who, f"{name} of a sample depends on the rest of its batch in eval mode")
    with torch.random.fork_rng(devices=[]):
        trained = copy.deepcopy(first).train()
        squares = [output.square().mean() for output in _named_outputs(trained(*batch), who).values()]
        torch.stack(squares).sum().backward()  # type: ignore[no-untyped-call]
    unreached = [name for name, weight in trained.named_parameters() if weight.requires_grad and weight.grad is None]
    require(not unreached, who, f"no gradient reaches the parameters {unreached}")


def check_schedule(schedule: type[Schedule] | Schedule, /, **options: Any) -> None:
    """Check that a schedule gives a finite float at each update, and the same one in whatever order it is asked."""
    kind = schedule if isinstance(schedule, type) else type(schedule)
    who = describe(kind)
    check_config(kind, who)
    made = kind(make_config(kind, options, who)) if isinstance(schedule, type) else schedule
    clocks = [Clock(step, 4, 40) for step in range(41)]
    state = random_state()
    values = [made.at(clock) for clock in clocks]
    backwards = [made.at(clock) for clock in reversed(clocks)]
    require(same_random_state(state, random_state()), who, "at() used a global random generator")
    for clock, value in zip(clocks, values, strict=True):
        found = f"at() gave {value!r} at update {clock.step}"
        require(isinstance(value, float) and math.isfinite(value), who, f"{found}, expected a finite float")
    require(
        values == backwards[::-1], who, "at() is no pure function of the clock: asked backwards, it gave other values"
    )
    for way, duplicate in copies(made, who):
        require([duplicate.at(clock) for clock in clocks] == values, who, f"a copy by {way} gives other values")


def check_updater(updater: type[Updater], /, *, optimizer: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Check that an updater changes what is trained, goes on after a resume to the bit, and works with one loss too.

    It is tried on three losses, `ce` (which is `cross_entropy`), `kd` and `hint`, with sgd or with the optimizer that
    `{use: ...}` names.
    """
    who = describe(updater)
    check_config(updater, who)
    config = make_config(updater, options, who)
    optimizer = optimizer or {"use": "sgd", "momentum": 0.9}
    before = Bench(updater, config, optimizer=optimizer)
    state, start = random_state(), before.weights()
    for bench in (before, again := Bench(updater, config, optimizer=optimizer)):
        for _ in range(5):
            shown = bench.update()
    require(same_random_state(state, random_state()), who, "used a global random generator; use given.generator")
    for name, value in shown.items():
        good = isinstance(value, Tensor) and value.ndim == 0
        require(good, who, f"shows {value!r} as {name}, expected a 0-d tensor")
    found = before.weights()
    for name, value in found.items():
        require(bool(value.isfinite().all()), who, f"{name} is not finite after five updates")
    require(same_values(found, again.weights(), exact=True), who, "two equal trainings gave two results")
    still = [name for name in start if name.startswith("learner.") and torch.equal(start[name], found[name])]
    require(not still, who, f"the weights {still} never change")
    resumed = Bench(updater, config, optimizer=optimizer)
    resumed.go_on(before)
    for bench in (before, resumed):
        for _ in range(5):
            bench.update()
    same = same_values(before.weights(), resumed.weights(), exact=True)
    require(same, who, "its state_dict does not hold all of its state: a resumed training goes on differently")
    alone = Bench(updater, config, losses=[*LOSSES][:1], optimizer=optimizer)
    alone.update()
    finite = all(bool(value.isfinite().all()) for value in alone.weights().values())
    require(finite, who, "weights are not finite after an update with one loss")


def _check_node(trial: Trial, *, order_matters: bool) -> None:
    """What holds for every node."""
    who = trial.who
    hidden = hidden_parameters(trial.prototype)
    require(
        not hidden, who, f"holds weights in {hidden}, where torch does not see them; use nn.ModuleList or nn.Parameter"
    )
    inputs = trial.inputs()
    before = {name: [tensor.clone() for tensor in tensors_in(value)] for name, value in inputs.items()}
    state = random_state()
    values = trial.run(trial.fresh(), inputs)
    require(
        same_random_state(state, random_state()), who, "forward used a global random generator; use given.generator"
    )
    for name, value in inputs.items():
        same = all(map(torch.equal, before[name], tensors_in(value)))
        require(same, who, f"forward changed its input {name!r} in place")
    _check_shapes(trial, values)
    _finite(trial, values, "")
    require(same_values(values, trial.run(trial.fresh(), inputs), exact=True), who, "two equal calls gave two results")
    check_released(trial)
    if vars(trial.component).get("separable", False) and not order_matters:
        check_halves(trial)
    for way, duplicate in copies(trial.prototype, who):
        require(
            same_values(values, trial.run(duplicate, inputs), exact=True),
            who,
            f"a copy by {way} gives another result",
        )
    other = trial.build(1)
    other.load_state_dict(trial.prototype.state_dict())
    other.given.generator.set_state(trial.prototype.given.generator.get_state())
    same = same_values(values, trial.run(other, inputs), exact=True)
    require(
        same, who, "its state_dict does not hold all of its state: loaded into another instance, the result differs"
    )
    if trial.knobs:
        try:
            same = same_values(values, trial.run(trial.fresh(), inputs, knobs_per_sample=True), exact=False)
        except AssertionError as error:
            raise AssertionError(f"{who}: knobs given per sample fail, use kdx.per_sample: {error}") from error
        require(same, who, f"equal knobs {sorted(trial.knobs)} given per sample change the result; use kdx.per_sample")
    optional = [name for name, spec in trial.component.inputs.items() if spec is OPTIONAL]
    if optional:
        _finite(trial, trial.run(trial.fresh(), {**inputs, **dict.fromkeys(optional)}), f"without {optional} ")
    if trial.component.gaps:
        check_gaps(trial, inputs, values)
    if not order_matters:
        order = torch.arange(trial.batch).roll(1)
        moved = trial.run(trial.fresh(), reindexed(inputs, order))
        expected = {name: value[order] if value.ndim else value for name, value in values.items()}
        same = same_values(expected, moved, exact=False)
        require(same, who, "samples in another order give other values; if that is meant, say order_matters=True")


def _check_shapes(trial: Trial, values: Values) -> None:
    for name, value in values.items():
        found = list(value.shape)
        if issubclass(trial.component, Loss):
            fits = value.ndim == 0 or found == [trial.batch]
            require(fits, trial.who, f"gave {found}, expected 0-d or one value per sample [{trial.batch}]")
            require(value.dtype == torch.float32, trial.who, f"gave {value.dtype} for float32 inputs")
        else:
            fits = value.ndim == 0 or found[0] == trial.batch
            require(fits, trial.who, f"{name} is {found}, expected 0-d or the batch axis ({trial.batch}) first")


def _check_gradients(trial: Trial, inputs: dict[str, Any], when: str = "") -> None:
    """A loss gives a finite gradient to the student's side and to its parameters, and none to teachers."""
    leaves = {
        name: [tensor.detach().requires_grad_() for tensor in tensors_in(value) if tensor.is_floating_point()]
        for name, value in inputs.items()
    }
    tracked = {
        name: leaves[name] if isinstance(value, list) else leaves[name][0] if leaves[name] else value
        for name, value in inputs.items()
    }
    node = trial.fresh()
    values = trial.run(node, tracked)
    _finite(trial, values, when)
    require(values["out"].requires_grad, trial.who, f"{when}its value has no graph, so nothing would learn from it")
    values["out"].sum().backward()  # type: ignore[no-untyped-call]
    frozen = trial.frozen_inputs()
    for name, tensors in leaves.items():
        gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
        require(finite, trial.who, f"{when}the gradient of {name!r} is not finite")
        leak = name in frozen and any(bool(gradient.any()) for gradient in gradients)
        require(not leak, trial.who, f"a gradient reaches {name!r}, which belongs to a teacher; detach it")
    learners = [name for name in leaves if leaves[name] and name not in frozen]
    reached = any(tensor.grad is not None for name in learners for tensor in leaves[name])
    require(reached or not learners, trial.who, f"{when}no gradient reaches any of {learners}")
    _check_reached(trial, node, when)


def _check_parameters(trial: Trial, inputs: dict[str, Any]) -> None:
    node = trial.fresh()
    if any(weight.requires_grad for weight in node.parameters()):
        values = trial.run(node, inputs)
        torch.stack([value.square().sum() for value in values.values()]).sum().backward()  # type: ignore[no-untyped-call]
        _check_reached(trial, node, "")


def _check_reached(trial: Trial, node: Node, when: str) -> None:
    for name, weight in node.named_parameters():
        if weight.requires_grad:
            require(weight.grad is not None, trial.who, f"{when}no gradient reaches its parameter {name}")
            finite = weight.grad is None or bool(weight.grad.isfinite().all())
            require(finite, trial.who, f"{when}the gradient of its parameter {name} is not finite")


def _equal_inputs(trial: Trial) -> dict[str, Any]:
    groups: Sequence[tuple[str, ...]] = trial.component.same_shape or (("student", "teacher"),)
    inputs = trial.inputs()
    for first, *others in groups:
        for name in others:
            known = first in inputs and name in inputs
            require(known, trial.who, "zero_at_equality needs a `same_shape` group, or inputs `student` and `teacher`")
            inputs[name] = copy.deepcopy(inputs[first])
    return inputs


def _finite(trial: Trial, values: Values, when: str) -> None:
    for name, value in values.items():
        what = "its value" if name == "out" else name
        require(
            bool(value.isfinite().all()),
            trial.who,
            f"{when}{what} is not finite: {value.detach().flatten()[:4].tolist()}",
        )


def _build_network(maker: Model, who: str) -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = maker.build()
    require(isinstance(network, Network), who, f"build() gave a {type(network).__name__}, expected a kdx.Network")
    return network


def _named_outputs(found: Any, who: str) -> dict[str, Tensor]:
    outputs = {"logits": found} if isinstance(found, Tensor) else found
    good = isinstance(outputs, Mapping) and all(isinstance(value, Tensor) for value in outputs.values())
    require(good, who, f"the network gave a {type(found).__name__}, expected a tensor or a dict of tensors")
    return dict(outputs)
