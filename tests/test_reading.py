"""What no part of a run reads is not made for its batches."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from kdx.builtin.images import FashionMnist
from kdx.builtin.spoken_digits import SpokenDigits
from kdx.config import load_mapping
from kdx.feed import streams_read
from kdx.loop import make_session
from kdx.randomness import Randomness
from kdx.runs import Options, Prepared, build_plan, prepare
from kdx.runtime import Runtime
from kdx.views import with_views

NET = {"use": "timm", "model": "resnet10t", "args": {"layers": [1] * 4, "channels": [8] * 4, "stem_width": 8}}
DATA = {"use": "spoken_digits", "mel": {"bins": 16, "hop": 0.02}, "mfcc": {"bins": 16, "hop": 0.02}}


def digits(**options: Any) -> SpokenDigits:
    return SpokenDigits(SpokenDigits.Config(mel=DATA["mel"], mfcc=DATA["mfcc"], **options))  # type: ignore[arg-type]


def run_of(folder: Path, **config: Any) -> Prepared:
    losses = {"ce": {"use": "cross_entropy"}}
    whole = {"data": DATA, "student": {**NET, "input": "image"}, "losses": losses, "train": {"epochs": 1}}
    whole |= {"out": str(folder), "baseline": False}
    return prepare(load_mapping({**whole, **config}), Options(quiet=True))


def given(prepared: Prepared) -> set[str]:
    """The streams of a training batch."""
    plan = build_plan(prepared, Options(quiet=True), trained=False)
    runtime = Runtime(prepared.spec.runtime)
    return set(make_session(prepared.spec, plan, prepared.dataset, prepared.splits, runtime).feed.at(0))


@pytest.mark.parametrize(
    ("read", "made"),
    [(("image",), set()), (("mel",), {"mel"}), (("mfcc_mask", "label"), {"mfcc"}), (("mel", "mfcc"), {"mel", "mfcc"})],
)
def test_spectrograms_that_nothing_reads_are_not_computed(read: Iterable[str], made: set[str]) -> None:
    data = digits().reading(read)
    batch = data.on_device(data.train().fetch([0, 1]), None)
    assert set(batch) & {"mel", "mfcc"} == made
    assert {"image", "audio", "label"} <= set(batch)
    assert {"mel", "mfcc"} <= set(data.facts().streams)


def test_what_is_made_does_not_depend_on_what_is_left_out() -> None:
    whole = digits(augment={"gain": {}, "delay": {"share": 0.1}, "spec_augment": {}})
    batch = {**whole.train().fetch([0, 1, 2]), "index": torch.arange(3)}
    drawn = [data.on_device(dict(batch), Randomness(0, 0, batch["index"])) for data in (whole, whole.reading(["mel"]))]
    assert "mfcc" not in drawn[1]
    for name in drawn[1]:
        assert torch.equal(drawn[0][name], drawn[1][name])


def test_views_leave_out_what_nothing_reads() -> None:
    data = with_views(digits(), {"loud": {"augment": {"gain": {}}}}).reading(["image", "mel@loud"])
    index = torch.arange(2)
    batch = data.on_device({**data.train().fetch([0, 1]), "index": index}, Randomness(0, 0, index))
    assert {name.partition("@")[0] for name in batch} & {"mel", "mfcc"} == {"mel"}
    assert "mel@loud" in batch


def test_batches_of_a_run_hold_the_spectrograms_that_its_models_and_nodes_read(tmp_path: Path) -> None:
    assert not given(run_of(tmp_path)) & {"mel", "mfcc"}
    ear = {**NET, "input": "mel"}
    kd = {"use": "kd", "inputs": {"teacher": "ear.logits"}}
    taught = run_of(tmp_path, teachers={"ear": ear}, losses={"kd": kd})
    assert given(taught) & {"mel", "mfcc"} == {"mel"}


def test_metrics_and_models_are_among_the_readers(tmp_path: Path) -> None:
    plan = build_plan(run_of(tmp_path), Options(quiet=True), trained=False)
    assert streams_read(plan) == {"image", "label"}


def test_a_feed_for_several_runs_gives_what_any_of_them_reads(tmp_path: Path) -> None:
    prepared = run_of(tmp_path)
    plan = build_plan(prepared, Options(quiet=True), trained=False)
    feed = make_session(prepared.spec, plan, prepared.dataset, prepared.splits, Runtime(prepared.spec.runtime)).feed
    feed.read_also({"mfcc"})
    assert {"image", "mfcc"} <= set(feed.at(0))
    assert "mel" not in feed.at(1)


def test_data_without_sound_gives_all_that_it_has() -> None:
    data = FashionMnist(FashionMnist.Config())
    assert data.reading(["label"]) is data
