"""Samples that lack a modality: who is told, and what is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from builders import FACTS, NET, WIDE, batch, forward, plan_of, run_calls
from kdx_plugins.ensemble import ConfidenceMean, EntropyMean, Mean, entropy_weights
from kdx_plugins.logit import soft_targets
from kdx_plugins.relation import similarity_preserving
from kdx_plugins.teacher_terms import WeightedDivergences
from kdx_plugins.teacher_weights import AccuracyWeighted, ConfidenceWeights, LearnedMean
from torch import Tensor, nn

import kdx
from kdx.builtin.spoken_digits import SpokenDigits
from kdx.calls import NodeCall
from kdx.modules import Knobs, Teachers
from kdx.plugins import discover
from kdx.presence import ALWAYS, Presence, every, over_present, some, without, written
from kdx.testing import check_target
from kdx.types import Batch, Clock, StreamFacts

HEARD = replace(
    FACTS,
    streams={
        **FACTS.streams,
        "heard": StreamFacts("image", (1, 28, 28), (0.3,), (0.25,), present="heard_present"),
        "heard_present": StreamFacts("mask", ()),
    },
)
EAR = {**WIDE, "input": "heard"}
EYE = {**NET, "input": "image"}
STUDENT: dict[str, Any] = {"student": {"input": "image"}}


def heard(*present: bool, seed: int = 0) -> Batch:
    """A batch with sound for some of its samples, and zeros for the others."""
    found, mask = batch(len(present), seed), torch.tensor(present)
    sound = torch.rand(len(present), 1, 28, 28, generator=torch.Generator().manual_seed(seed + 7))
    return {**found, "heard": torch.where(mask.reshape(-1, 1, 1, 1), sound, 0.0), "heard_present": mask}


def plan(*layers: Mapping[str, Any], facts: kdx.DataFacts = HEARD, **more: Any) -> kdx.Plan:
    return plan_of(STUDENT, *layers, facts=facts, sample=heard(True, False), **more)


def loss(use: str, **inputs: Any) -> dict[str, Any]:
    return {"losses": {"ce": None, use: {"use": use, "inputs": inputs}}}


def mask_of(*names: str) -> Presence:
    return frozenset({frozenset(names)})


def test_formulas_are_kept_short() -> None:
    a, b = mask_of("a"), mask_of("b")
    assert every([a, b]) == mask_of("a", "b")
    assert every([]) == every([ALWAYS, ALWAYS]) == ALWAYS
    assert some([a, ALWAYS]) == ALWAYS
    assert some([a, every([a, b])]) == a
    assert without(every([a, b]), ["a"]) == b
    assert without(a, ["a"]) == ALWAYS
    assert written(some([a, b])) == "a or b"


@pytest.mark.parametrize("use", ["kd", "sp"])
def test_a_term_is_that_of_the_present_samples_alone(use: str) -> None:
    fields = "logits" if use == "kd" else "depth_100"
    made = plan({"teachers": {"ear": EAR}}, loss(use, student=f"student.{fields}", teacher=f"ear.{fields}"))
    made.student.eval()
    given = heard(True, False, True, True)
    values = run_calls(made, given)
    rows = given["heard_present"]
    ours, theirs = values[f"student.{fields}"][rows], values[f"ear.{fields}"][rows]
    slow = soft_targets(ours, theirs, torch.tensor(4.0)) if use == "kd" else similarity_preserving(ours, theirs)
    torch.testing.assert_close(values[f"losses.{use}"].mean(), slow.mean())
    assert values[f"losses.{use}"][1] == 0


@pytest.mark.parametrize("use", ["kd", "sp", "rkd"])
def test_absent_rows_have_a_gradient_of_exactly_zero(use: str) -> None:
    field = "logits" if use == "kd" else "embedding"
    made = plan({"teachers": {"ear": EAR}}, loss(use, student=f"student.{field}", teacher=f"ear.{field}"))
    call = made.loss_calls[0]
    values = run_calls(made, heard(True, False, True, True))
    ours = values[f"student.{field}"].detach().requires_grad_()
    values[f"student.{field}"] = ours
    call.run(values)
    values[call.name].mean().backward()
    assert ours.grad is not None
    assert not ours.grad[1].any()
    assert all(ours.grad[row].any() for row in (0, 2, 3))


def test_what_an_absent_sample_holds_changes_nothing() -> None:
    made = plan({"teachers": {"ear": EAR}}, loss("kd", teacher="ear.logits"))
    given = heard(True, False, True, True)
    other = {**given, "heard": given["heard"].clone()}
    other["heard"][1] = torch.rand(1, 28, 28)
    assert torch.equal(forward(made, given)[1].total, forward(made, other)[1].total)


def test_a_nan_of_a_teacher_that_hears_nothing_is_no_bad_answer() -> None:
    class Fragile(nn.Module):
        def forward(self, sound: Tensor) -> Tensor:
            flat = sound.flatten(1)
            return (flat / flat.norm(dim=1, keepdim=True))[:, :3]  # 0 / 0 in silence

    made = plan(
        {"teachers": {"ear": {"use": "module", "input": "heard"}}},
        loss("kd", teacher="ear.logits"),
        networks={"ear": Fragile()},
    )
    knobs = Knobs(made, torch.device("cpu")).at(Clock(0, 1, 1))
    teachers = Teachers(made)
    kept = teachers(heard(True, False, True), knobs)
    assert teachers.marks is not None
    assert all(trace.isfinite().all() for traces in teachers.marks.traces for trace in traces)
    assert kept["ear.logits"][1].tolist() == [0, 0, 0]
    assert forward(made, heard(True, False, True))[1].total.isfinite()


@pytest.mark.parametrize("use", ["kd", "sp", "fitnet"])
def test_a_batch_in_which_nobody_is_heard_has_a_zero_term_with_a_graph(use: str) -> None:
    field = {"kd": "logits"}.get(use, "depth_50")
    made = plan({"teachers": {"ear": EAR}}, loss(use, student=f"student.{field}", teacher=f"ear.{field}"))
    learner, losses = forward(made, heard(False, False, False, False))
    assert losses.total.item() == 0
    losses.total.backward()
    gradients = [weight.grad for weight in learner.nodes.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    reached = [weight.grad for weight in learner.student.parameters() if weight.grad is not None]
    assert reached
    assert not any(gradient.any() for gradient in reached)


def test_losses_that_do_not_read_the_absent_modality_see_every_sample() -> None:
    made = plan(
        {"teachers": {"ear": EAR, "eye": EYE}, "losses": {"kd": {"use": "kd", "inputs": {"teacher": "ear.logits"}}}}
    )
    ce, kd = made.loss_calls
    assert (ce.presence, kd.presence) == (ALWAYS, mask_of("batch.heard_present"))
    assert "losses.kd is over the samples with batch.heard_present" in made.notes


def test_the_student_s_own_modality_may_be_absent() -> None:
    made = plan_of({"student": {"input": "heard"}}, facts=HEARD, sample=heard(True, True))
    given = heard(True, False, True)
    made.student.eval()
    values = run_calls(made, given)
    slow = torch.nn.functional.cross_entropy(values["student.logits"][[0, 2]], given["label"][[0, 2]])
    torch.testing.assert_close(values["losses.ce"], slow)


def test_a_net_that_reads_the_mask_has_no_gaps() -> None:
    class Fusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(28 * 28, 3)

        def forward(self, image: Tensor, sound: Tensor, present: Tensor) -> Tensor:
            found: Tensor = self.head((image + sound * present.reshape(-1, 1, 1, 1)).flatten(1))
            return found

    streams = {"student": {"use": "module", "input": ["image", "heard", "heard_present"]}}
    made = plan_of(streams, facts=HEARD, sample=heard(True, True), networks={"student": Fusion()})
    assert made.loss_calls[0].presence == ALWAYS


def test_data_without_gaps_make_the_plan_that_they_made_before() -> None:
    whole = replace(HEARD, streams={**HEARD.streams, "heard": replace(HEARD.streams["heard"], present="")})
    made = plan({"teachers": {"ear": EAR}}, loss("kd", teacher="ear.logits"), facts=whole)
    assert all(call.presence == ALWAYS for call in made.calls)
    assert not any("over the samples" in note for note in made.notes)


def test_views_of_a_stream_share_its_mask() -> None:
    views = {"heard@loud": HEARD.streams["heard"], "image@loud": HEARD.streams["image"]}
    facts = replace(HEARD, streams={**HEARD.streams, **views})
    sample = heard(True, False)
    sample |= {"heard@loud": sample["heard"], "image@loud": sample["image"]}
    made = plan_of(
        STUDENT,
        {"teachers": {"ear": EAR}, "data": {"views": {"loud": {}}}},
        loss("kd", teacher="ear@loud.logits"),
        facts=facts,
        sample=sample,
    )
    assert made.loss_calls[0].presence == mask_of("batch.heard_present")


def two(use: str, **options: Any) -> kdx.Plan:
    """A student that learns from an ensemble of one who listens and one who sees."""
    ensemble = {"teachers": {"ear": EAR, "eye": EYE}, "targets": {"both": {"use": use, **options}}}
    return plan(ensemble, loss("kd", teacher="both.logits"))


@pytest.mark.parametrize("use", ["mean", "confidence_mean", "ebkd", "ca_mkd", "accuracy_weighted"])
def test_an_ensemble_leaves_an_absent_teacher_out_sample_by_sample(use: str) -> None:
    made = two(use)
    assert made.loss_calls[0].presence == ALWAYS  # the one that sees is always there
    given = heard(True, False, True)
    knobs = Knobs(made, torch.device("cpu")).at(Clock(0, 1, 1))
    values = Teachers(made).answers(given, knobs)
    alone, mixed = values["eye.logits"].log_softmax(1), values["both.logits"].log_softmax(1)
    tau = 1.0 if use in ("mean", "confidence_mean", "accuracy_weighted") else 4.0
    torch.testing.assert_close(
        (values["both.logits"] / tau).log_softmax(1)[1], (values["eye.logits"] / tau).log_softmax(1)[1]
    )
    assert not torch.allclose(mixed[0], alone[0])
    full = Teachers(two(use)).answers(heard(True, True, True), knobs)
    torch.testing.assert_close(values["both.logits"][[0, 2]], full["both.logits"][[0, 2]])


def test_an_ensemble_of_absent_teachers_alone_is_absent() -> None:
    ears = {"teachers": {"ear": EAR, "other": {**EAR, "taps": {}}}, "targets": {"both": {"use": "mean"}}}
    made = plan(ears, loss("kd", teacher="both.logits"))
    assert made.loss_calls[0].presence == mask_of("batch.heard_present")
    assert forward(made, heard(False, False))[1].total.item() == 0
    assert forward(made, heard(True, False))[1].total.item() > 0


def test_a_target_that_knows_nothing_of_gaps_is_absent_where_any_teacher_is() -> None:
    made = plan(
        {
            "teachers": {"ear": EAR},
            "targets": {"tau": {"use": "entropy_temperature", "inputs": {"logits": "ear.logits"}}},
        },
        {"losses": {"kd": {"use": "kd", "inputs": {"teacher": "ear.logits"}, "temperature": "tau"}}},
    )
    (target,) = [call for call in made.calls if call.name == "tau"]
    assert isinstance(target, NodeCall)
    assert target.presence == mask_of("batch.heard_present")
    assert made.loss_calls[1].presence == mask_of("batch.heard_present")


LOGITS = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(3)]
SOME = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).bool()
LABEL = torch.tensor([0, 1, 2, 0])
TAU = torch.tensor(2.0, dtype=torch.float64)


def ensembles() -> list[tuple[kdx.Target, dict[str, Any]]]:
    given = kdx.Given({"logits": [(3,)] * 3, "label": ()})
    sharp = torch.tensor(3.0, dtype=torch.float64)
    return [
        (Mean(Mean.Config(), given), {}),
        (Mean(Mean.Config(of="logits", weights=[1, 2, 3]), given), {}),
        (ConfidenceMean(ConfidenceMean.Config(), given), {"sharpness": sharp}),
        (EntropyMean(EntropyMean.Config(), given), {}),
        (ConfidenceWeights(ConfidenceWeights.Config(), given), {"label": LABEL}),
        (AccuracyWeighted(AccuracyWeighted.Config(), given), {"label": LABEL, "sharpness": sharp}),
        (LearnedMean(LearnedMean.Config(), given), {}),
    ]


@pytest.mark.parametrize("number", range(7))
def test_absent_logits_reach_neither_the_mixture_nor_the_weights(number: int) -> None:
    node, more = ensembles()[number]
    found = node(logits=LOGITS, temperature=TAU, present=SOME, **more)
    other = [torch.where(SOME[:, k, None] | (torch.arange(4) == 3)[:, None], z, 9.0 * k) for k, z in enumerate(LOGITS)]
    again = node(logits=other, temperature=TAU, present=SOME, **more)
    for name, value in found.items():
        torch.testing.assert_close(value, again[name], rtol=0, atol=1e-12)
        assert value.isfinite().all()
    alone = LOGITS[1][2]
    torch.testing.assert_close((found["logits"][2] / TAU).softmax(0), (alone / TAU).softmax(0))
    if "weights" in found:
        torch.testing.assert_close(found["weights"][:3].sum(1), torch.ones(3, dtype=found["weights"].dtype))
        assert not found["weights"][:3][~SOME[:3]].any()


@pytest.mark.parametrize("number", range(7))
def test_a_mask_of_nothing_but_ones_changes_no_ensemble(number: int) -> None:
    node, more = ensembles()[number]
    ones = torch.ones(4, 3, dtype=torch.bool)
    masked = node(logits=LOGITS, temperature=TAU, present=ones, **more)
    for name, value in node(logits=LOGITS, temperature=TAU, **more).items():
        torch.testing.assert_close(masked[name], value, rtol=0, atol=1e-6)


def test_weights_of_some_are_those_of_an_ensemble_of_them() -> None:
    pair = torch.tensor([[True, True, False]])
    errors = torch.tensor([[0.3, 1.2, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(kdx.confidence_weights(errors, pair)[:, :2], kdx.confidence_weights(errors[:, :2]))
    one = [z[:1] for z in LOGITS]
    torch.testing.assert_close(entropy_weights(one, pair)[:, :2], entropy_weights(one[:2]))


def test_learned_weights_get_no_gradient_from_what_is_absent() -> None:
    node = ensembles()[6][0]
    alone = torch.tensor([[False, True, False]] * 4)
    mixture = node(logits=LOGITS, temperature=TAU, present=alone)["mixture"]
    torch.nn.functional.cross_entropy(mixture, LABEL).backward()
    assert isinstance(node, LearnedMean)
    assert node.scores.grad is not None
    torch.testing.assert_close(node.scores.grad, torch.zeros(3))


def test_a_teacher_without_weight_speaks_where_no_other_does() -> None:
    node = Mean(Mean.Config(weights=[1.0, 0.0]), kdx.Given({"logits": [(3,)] * 2}))
    found = node(logits=LOGITS[:2], temperature=TAU, present=torch.tensor([[True, True], [False, True]] * 2))["logits"]
    torch.testing.assert_close((found[1] / TAU).softmax(0), (LOGITS[1][1] / TAU).softmax(0))
    torch.testing.assert_close((found[0] / TAU).softmax(0), (LOGITS[0][0] / TAU).softmax(0))


def test_weighted_divergences_leave_an_absent_teacher_out() -> None:
    node = WeightedDivergences(
        WeightedDivergences.Config(), kdx.Given({"student": (3,), "teacher": [(3,)] * 2, "weights": (2,)})
    )
    weights = torch.full((4, 2), 0.5, dtype=torch.float64)
    present = torch.tensor([[True, False]] * 4)
    value = node(LOGITS[2], LOGITS[:2], weights, TAU, present=present)
    torch.testing.assert_close(value, soft_targets(LOGITS[2], LOGITS[0], TAU) / 2)


def test_accuracies_count_the_samples_that_a_teacher_hears() -> None:
    node = ensembles()[5][0]
    assert isinstance(node, AccuracyWeighted)
    right = [torch.nn.functional.one_hot(LABEL, 3).double()] * 3
    node.calibrate(logits=right, label=LABEL, present=SOME)
    assert node.seen.tolist() == node.right.tolist() == [2, 2, 2]


def test_a_per_sample_weight_keeps_its_samples() -> None:
    made = plan({"teachers": {"ear": EAR}}, loss("sp", student="student.embedding", teacher="ear.embedding"))
    found = run_calls(made, heard(False, True, True, True))["losses.sp"]
    assert found.shape == (4,)
    assert found[0] == 0
    assert all(found[1:] > 0)


def test_only_present_samples_are_seen_before_training() -> None:
    class Counter(kdx.Loss):
        name = "counter"
        inputs = {"student": "student.logits"}
        seen = 0

        def calibrate(self, **tensors: Any) -> None:
            self.seen += len(tensors["student"])

        def forward(self, student: Tensor) -> Tensor:
            return student.square().mean(1)

    node = Counter(Counter.Config(), kdx.Given({"student": (3,)}))
    call = NodeCall(
        "losses.x", "losses", "losses.x", node, {"student": "s"}, ("losses.x",), presence=mask_of("batch.m")
    )
    values = {"s": torch.rand(3, 3), "batch.m": torch.tensor([True, False, True])}
    arguments = call.seen(values)
    assert arguments is not None
    node.calibrate(**arguments)
    assert node.seen == 2
    assert call.seen({**values, "batch.m": torch.zeros(3, dtype=torch.bool)}) is None


def test_one_sample_alone_is_no_comparison() -> None:
    made = plan({"teachers": {"ear": EAR}}, loss("rkd", student="student.embedding", teacher="ear.embedding"))
    (call,) = made.loss_calls
    assert isinstance(call.module, kdx.Loss)
    student = torch.rand(3, 4, requires_grad=True)
    inputs = {"student": student, "teacher": torch.rand(3, 4)}
    present = torch.tensor([False, True, False])
    value = over_present(call.module, inputs, present, by_mask=False)
    assert value.item() == 0
    assert value.requires_grad


def test_a_target_for_the_whole_batch_is_refused_where_samples_are_absent(tmp_path: Any) -> None:
    plugin = tmp_path / "whole.py"
    plugin.write_text(
        "import kdx\n\n\nclass Spread(kdx.Target):\n    name = 'spread_of_batch'\n"
        "    inputs = {'logits': 'teacher.logits'}\n\n"
        "    def forward(self, logits):\n        return 1 + logits.std()\n\n\n"
        "@kdx.hookimpl\ndef kdx_targets():\n    return [Spread]\n"
    )
    with pytest.raises(kdx.PlanError, match=r"targets.tau \(spread_of_batch.*one number for the whole batch, but some"):
        plan(
            {"teachers": {"ear": EAR}, "targets": {"tau": {"use": "spread_of_batch"}}},
            {"losses": {"kd": {"use": "kd", "inputs": {"teacher": "ear.logits"}, "temperature": "tau"}}},
            plugins=discover([str(plugin)]),
        )


def test_spoken_digits_lose_a_share_of_their_training_clips() -> None:
    data = SpokenDigits(SpokenDigits.Config(silent=0.3, mel={}))
    whole = SpokenDigits(SpokenDigits.Config(mel={}))
    split = data.splits["train"]
    assert split.present is not None
    assert (~split.present).sum() == round(0.3 * len(split))
    streams = data.facts().streams
    assert {name for name in streams if streams[name].present} == {"audio", "mel"}
    assert "audio_present" not in whole.facts().streams
    taken = data.train().fetch(range(20))
    assert not taken["audio"][~taken["audio_present"]].any()
    assert torch.equal(
        taken["audio"][taken["audio_present"]], whole.train().fetch(range(20))["audio"][taken["audio_present"]]
    )
    test = data.test()
    assert test is not None
    assert test.fetch(range(50))["audio_present"].all()
    other = SpokenDigits(SpokenDigits.Config(silent=0.3, silent_seed=1))
    prints = {one.fingerprint() for one in (data, whole, other, SpokenDigits(SpokenDigits.Config(silent=0.2)))}
    assert len(prints) == 4
    with pytest.raises(kdx.ConfigError, match=r"data.silent: found 1.0, expected a share from 0 and below 1"):
        SpokenDigits(SpokenDigits.Config(silent=1.0))


def test_an_absent_teacher_does_not_stand_in_for_a_bad_one() -> None:
    class Broken(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            found: Tensor = image.flatten(1)[:, :3] / 0.0
            return found

    ears = {name: {"use": "module", "input": "heard"} for name in ("ear", "broken")}
    made = plan(
        {"teachers": {**ears, "eye": EYE, "broken": {"use": "module", "input": "image"}}, "on_bad_teacher": "drop"},
        {"losses": {"kd": {"use": "aver"}}},
        networks={"ear": nn.Sequential(nn.Flatten(), nn.Linear(784, 3)), "broken": Broken()},
    )
    values = Teachers(made).answers(heard(True, False), Knobs(made, torch.device("cpu")).at(Clock(0, 1, 1)))
    ear, eye, broken = (values[f"{name}.logits"] for name in ("ear", "eye", "broken"))
    torch.testing.assert_close(broken[0], (ear[0] + eye[0]) / 2)
    torch.testing.assert_close(broken[1], eye[1])
    assert not ear[1].any()


class Deaf(kdx.Target):
    """Says that it copes with gaps, and does not look."""

    name = "deaf"
    inputs = {"logits": kdx.Many("*.logits")}
    gaps = "logits"

    def forward(self, logits: list[Tensor], present: Tensor | None = None) -> Tensor:
        return torch.stack(logits).mean(0)


class Halved(Deaf):
    """Gives another number for a mask of ones."""

    name = "halved"

    def forward(self, logits: list[Tensor], present: Tensor | None = None) -> Tensor:
        mean = torch.stack(logits).mean(0)
        return mean if present is None else mean / 2


class Nowhere(Deaf):
    """Copes with gaps of an input that it does not have."""

    name = "nowhere"
    gaps = "features"


def test_a_node_that_makes_use_of_what_is_absent_is_found_out() -> None:
    with pytest.raises(AssertionError, match="what is absent of 'logits' changes the result"):
        check_target(Deaf)
    with pytest.raises(AssertionError, match="`present` changes the result though nothing is absent"):
        check_target(Halved)
    with pytest.raises(AssertionError, match="gaps names 'features', expected one of its inputs of any number of refs"):
        check_target(Nowhere)
