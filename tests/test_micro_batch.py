"""Facts of `kdx/micro_batch.py` and `kdx/memory.py`: what fits into memory, and what is said where it does not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import DISTIL, PLAIN, STATEFUL, Seen, config_of, prepared, quiet, run_in, session_of
from torch import Tensor, nn

from kdx.config import load_mapping
from kdx.errors import ConfigError, KdxError
from kdx.fanout import groups
from kdx.loop import Session
from kdx.memory import parts
from kdx.micro_batch import fit, sees_the_batch
from kdx.ranges import parts_for
from kdx.result import read_result
from kdx.runs import Stopped, carry_out, prepare
from kdx.spec import full_config

AUTO = {"train": {"micro_batch": "auto"}}
NO_NORM = {"student": {"norm": False}}


class Small(nn.Module):
    """An identity that has memory for so many samples only."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return x


def limit(session: Session, samples: int) -> Session:
    """Let the student take so many samples at once; evaluation is free."""
    net = session.learner.student.network.net
    small = Small(samples)
    net.head.register_forward_pre_hook(lambda module, inputs: small(*inputs) if module.training else None)
    return session


def test_a_batch_is_halved_until_it_fits() -> None:
    session = limit(session_of(DISTIL, NO_NORM, AUTO), 4)
    lines = fit(session, None)
    assert session.accumulate == 4, "12 in 4 parts of 3, after 1 and 2 parts"
    assert lines == ("train.micro_batch: 3 samples at once, 4 times for an update",)
    assert len(Seen(session).steps) == 6


def test_what_fits_is_left_as_it_is_and_nothing_is_said() -> None:
    session = session_of(DISTIL, AUTO)
    assert fit(session, None) == ()
    assert session.accumulate == 1


def test_the_tries_leave_no_trace() -> None:
    session, clean = limit(session_of(STATEFUL, AUTO, {"train": {"accumulate": 1}}), 3), session_of(STATEFUL)
    random = torch.get_rng_state()
    fit(session, None)
    assert torch.equal(random, torch.get_rng_state())
    own, wanted = session.learner.state_dict(), clean.learner.state_dict()
    assert all(torch.equal(own[name], wanted[name]) for name in wanted)
    assert all(weight.grad is None for weight in session.learner.parameters())
    assert session.learner.training
    assert not session.runtime.optimizer.state


def test_the_numbers_of_a_split_batch_are_those_of_the_whole() -> None:
    whole, split = session_of(DISTIL, NO_NORM), limit(session_of(DISTIL, NO_NORM, AUTO), 3)
    fit(split, None)
    for mine, own in zip(Seen(whole).steps, Seen(split).steps, strict=True):
        torch.testing.assert_close(own.terms["total"], mine.terms["total"], rtol=1e-4, atol=1e-6)


def test_losses_that_compare_samples_and_batch_norm_are_told_of() -> None:
    relation = {"losses": {"rkd": {"use": "rkd", "inputs": {"student": "student.logits", "teacher": "wide.logits"}}}}
    session = limit(session_of(DISTIL, relation, AUTO), 6)
    assert sees_the_batch(session) == ["losses.rkd", "batch norm"]
    assert fit(session, None)[1] == "train.micro_batch: losses.rkd, batch norm see one micro-batch, not the whole batch"
    assert sees_the_batch(session_of(DISTIL, NO_NORM)) == []


def test_where_not_one_sample_fits_it_says_what_takes_the_memory() -> None:
    session = limit(session_of(DISTIL, AUTO), 0)
    with pytest.raises(KdxError, match=r"cpu: out of memory in update 1 \(CUDA out of memory\); found models") as found:
        fit(session, None)
    assert session.accumulate == 12
    assert "teachers.wide 2.972 kB" in str(found.value)


def test_an_update_that_does_not_fit_says_what_to_lower() -> None:
    session = limit(session_of(DISTIL, {"train": {"ema": 0.9}}), 11)
    with pytest.raises(KdxError, match="out of memory in update 1") as found:
        Seen(session)
    text = str(found.value)
    assert "gradients" in text
    assert "the optimizer" in text
    assert "the activations of 12 samples" in text
    assert "train.micro_batch (now 12 samples at once; auto tries what fits)" in text
    assert text.endswith("train.ema: null")


def test_an_evaluation_that_does_not_fit_names_its_batch() -> None:
    session = session_of(PLAIN)
    small = Small(8)
    session.student.net.head.register_forward_pre_hook(
        lambda module, inputs: None if module.training else small(*inputs)
    )
    with pytest.raises(
        KdxError, match=r"out of memory in evaluation 3 .* expected less: runtime.eval_batch \(now 256\)"
    ):
        Seen(session)


def test_another_error_is_left_alone() -> None:
    session = session_of(PLAIN)

    def hook(module: nn.Module, inputs: Any) -> None:
        raise RuntimeError("shapes do not fit")

    session.learner.student.network.net.head.register_forward_pre_hook(hook)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        Seen(session)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        fit(session_with(hook), None)


def session_with(hook: Any) -> Session:
    session = session_of(PLAIN, AUTO)
    session.learner.student.network.net.head.register_forward_pre_hook(hook)
    return session


def test_the_parts_of_memory_are_those_of_the_run() -> None:
    session = session_of(DISTIL)
    found = parts(session)
    trained = sum(weight.nbytes for weight in session.learner.parameters())
    assert found["gradients"] == trained
    assert found["the optimizer"] == 2 * trained
    assert found["teachers.wide"] == sum(
        value.nbytes for net in [session.plan.teachers["wide"]] for value in (*net.parameters(), *net.buffers())
    )
    Seen(session)
    assert parts(session)["the optimizer"] == trained, "momentum, now that it is there"


@pytest.mark.parametrize(("micro", "count"), [(12, 1), (100, 1), (6, 2), (5, 3), (1, 12)])
def test_a_number_of_samples_implies_the_parts(micro: int, count: int) -> None:
    assert parts_for(12, micro) == count
    spec = prepared(PLAIN, {"train": {"micro_batch": micro}}).spec
    assert spec.train.accumulate == count
    assert prepared(full_config(spec)).spec.train == spec.train


def test_a_number_of_samples_is_hashed_as_the_parts_that_it_implies() -> None:
    assert prepared(PLAIN, {"train": {"micro_batch": 6}}).hash == prepared(PLAIN, {"train": {"accumulate": 2}}).hash
    assert prepared(PLAIN, {"train": {"micro_batch": 12}}).hash == prepared(PLAIN).hash
    assert prepared(PLAIN, AUTO).hash != prepared(PLAIN).hash


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "all"])
def test_another_value_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=f"train.micro_batch: found {value!r}, expected a whole number from 1, auto"):
        prepared(PLAIN, {"train": {"micro_batch": value}})


def test_two_ways_to_say_it_must_agree() -> None:
    with pytest.raises(ConfigError, match=r"train.accumulate: found 2 beside train.micro_batch \(4\)"):
        prepared(PLAIN, {"train": {"micro_batch": 4, "accumulate": 2}})
    assert prepared(PLAIN, {"train": {"micro_batch": 6, "accumulate": 2}}).spec.train.accumulate == 2


def test_runs_that_find_out_what_fits_do_so_alone() -> None:
    assert groups([prepared(PLAIN), prepared(DISTIL)]) == [[0, 1]]
    assert groups([prepared(PLAIN, AUTO), prepared(DISTIL, AUTO)]) == [[0], [1]]


TIGHT = """
import kdx, torch

class Tight(kdx.Loss):
    name = "tight"
    inputs = {"student": "student.logits"}

    def forward(self, student):
        if torch.is_grad_enabled() and len(student) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried")
        return student.square().mean(1)

@kdx.hookimpl
def kdx_losses():
    return [Tight]
"""


def test_a_run_says_what_it_took_and_goes_on_with_it(tmp_path: Path) -> None:
    path = tmp_path / "tight.py"
    path.write_text(TIGHT)
    own = {"plugins": [*PLAIN["plugins"], str(path)], "losses": {"tight": {"use": "tight"}}}
    layers: list[Mapping[str, Any]] = [PLAIN, own, AUTO]
    whole = run_in(tmp_path / "whole", *layers)
    about = json.loads((whole.folder / "environment.json").read_text())
    assert about["micro_batch"][0] == "train.micro_batch: 6 samples at once, 2 times for an update"
    ready = prepare(load_mapping(config_of(*layers, {"out": str(tmp_path / "parts")})), quiet())
    asked = iter(range(100))
    with pytest.raises(Stopped):
        carry_out(ready, quiet(stop=lambda: next(asked) >= 2))
    assert carry_out(ready, quiet()).last == read_result(whole.folder).last
