"""A cache is of one teacher on one data set: whatever changes what the teacher would say makes another one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_plugin import SmallNet, made_images
from small_run import CASCADE, DISTIL, prepared, quiet, run_in, weights_of

from kdx.api import RunResult
from kdx.builtin.tensor_data import TensorDataset
from kdx.checkpoint import save_weights
from kdx.config import overlay
from kdx.errors import DataError
from kdx.result import read_result, write_result
from kdx.runs import Stopped, carry_out, fill_caches
from kdx.runtime import Runtime

CACHED = {"cache": True}
PIXEL = (17, 0, 3, 5)
CHANGES = {
    "an option of an augmentation": "the augmentation, its seed or the number of views is another",
    "a weight": "the weights are others",
    "a pixel": "the data are others",
}


def pictures(changed: str = "") -> TensorDataset:
    """Images that are shifted at random, by more where that is changed, or with another value in one place."""
    train = made_images(48, 1)
    if changed == "a pixel":
        train["image"][PIXEL] += 1 / 256
    shift = {"pixels": 2 if changed == "an option of an augmentation" else 1}
    return TensorDataset.from_tensors(
        train=train, test=made_images(24, 2), classes=["left", "right", "both"], augment={"shift": shift}
    )


def teacher(folder: Path, changed: str = "") -> dict[str, Any]:
    """A teacher from a file of weights, of which one is another where that is changed."""
    torch.manual_seed(3)
    state = SmallNet(8, 0.0, 3).state_dict()
    if changed == "a weight":
        weight = state["head.weight"]
        weight[1, 4] = torch.nextafter(weight[1, 4], torch.tensor(9.0))
    path = folder / f"teacher {changed}.safetensors"
    safetensors.torch.save_file(state, path)
    return {"wide": {"checkpoint": str(path)}}


def run_of(tmp_path: Path, name: str, cache: Any, changed: str = "", **layer: Any) -> RunResult:
    """A run whose teacher sees two views of each sample, in a folder of runs of this name."""
    teachers = overlay(teacher(tmp_path, changed), {"wide": {"cache": cache}})
    config = {"data": {"use": "tensors", "views": 2}, "teachers": teachers}
    return run_in(tmp_path / name, DISTIL, config, layer, data=pictures(changed))


def contents(folder: Path) -> dict[str, bytes]:
    """The answers in all caches of a folder of runs."""
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in (folder / "cache").glob("*/*.bin")}


def times(folder: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in sorted((folder / "cache").glob("*/*"))]


def same_student(one: RunResult, other: RunResult) -> bool:
    mine, own = weights_of(one.folder), weights_of(other.folder)
    return all(torch.equal(mine[name], own[name]) for name in mine)


def test_other_orders_of_the_samples_read_the_same_cache(tmp_path: Path) -> None:
    fixed = {"data": {"use": "halves", "flip": False, "views": None}}
    layers = (DISTIL, {"teachers": teacher(tmp_path)}, fixed)
    run_in(tmp_path / "cached", *layers, {"teachers": {"wide": CACHED}})
    before = times(tmp_path / "cached")
    cached = run_in(tmp_path / "cached", *layers, {"teachers": {"wide": CACHED}, "seed": 1})
    live = run_in(tmp_path / "live", *layers, {"seed": 1})
    assert same_student(live, cached)
    assert times(tmp_path / "cached") == before


@pytest.mark.parametrize("updates", [2, 4], ids=["in the first view", "in the second view"])
def test_a_run_that_was_stopped_within_an_epoch_goes_on_from_the_same_cache(tmp_path: Path, updates: int) -> None:
    layers = (DISTIL, {"teachers": teacher(tmp_path)}, {"data": {"views": 2}})
    whole = prepared(*layers, {"out": str(tmp_path / "whole")})
    carry_out(whole, quiet())
    found = prepared(*layers, {"teachers": {"wide": CACHED}, "out": str(tmp_path / "stopped")})
    fill_caches(found, quiet(), Runtime(found.spec.runtime))
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) >= updates

    how = quiet(stop=stop)
    with pytest.raises(Stopped, match=f"stopped after update {updates} of 6"):
        carry_out(found, how)
    before = times(tmp_path / "stopped")
    carry_out(found, quiet())
    assert times(tmp_path / "stopped") == before
    mine, own = weights_of(whole.folder), weights_of(found.folder)
    assert all(torch.equal(mine[name], own[name]) for name in mine)


def test_a_cache_of_a_run_that_was_trained_anew_to_other_weights_is_refused_by_name(tmp_path: Path) -> None:
    fixed = {"data": {"flip": False}, "baseline": False, "losses": {"hint": None}, "align": None}
    layers = (CASCADE, fixed, {"teachers": {"wide": CACHED}, "out": str(tmp_path)})
    first = prepared(*layers)
    carry_out(first, quiet())
    trained = first.needs["wide"].folder
    net = SmallNet(8, 0.0, 3)
    net.load_state_dict(weights_of(trained))
    with torch.no_grad():
        net.head.bias[0] += 0.25
    result = read_result(trained)
    write_result(trained, replace(result, student=save_weights(net, trained / "student.safetensors")))
    cache = first.caches["wide"].folder
    message = (
        f"teachers.wide.cache: {cache} holds answers of other weights than {trained} has now, for that was trained"
    )
    with pytest.raises(DataError, match=message):
        carry_out(prepared(*layers, {"train": {"lr": 0.01}}), quiet())
    shutil.rmtree(cache)
    carry_out(prepared(*layers, {"train": {"lr": 0.01}}), quiet())
    assert json.loads((cache / "weights.json").read_text())[trained.name] == read_result(trained).student


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs, and the cache of one."""
    folder = tmp_path_factory.mktemp("filled")
    run_of(folder, "cached", True)
    return folder


@pytest.mark.parametrize("changed", [*CHANGES])
def test_a_change_of_one_thing_makes_another_cache_and_the_student_of_the_live_teacher(
    filled: Path, tmp_path: Path, changed: str
) -> None:
    shutil.copytree(filled / "cached" / "cache", tmp_path / "cached" / "cache")
    before = contents(tmp_path / "cached")
    cached, live = run_of(tmp_path, "cached", True, changed), run_of(tmp_path, "live", None, changed)
    after = contents(tmp_path / "cached")
    assert len(after) == 2 * len(before)
    assert all(after[name] == content for name, content in before.items())
    assert not {after[name] for name in after.keys() - before.keys()} <= {*before.values()}
    assert same_student(cached, live)


@pytest.mark.parametrize("changed", [*CHANGES])
def test_a_named_cache_is_refused_after_a_change_of_one_thing(filled: Path, tmp_path: Path, changed: str) -> None:
    (folder,) = {path.parent for path in (filled / "cached" / "cache").glob("*/meta.json")}
    message = f"teachers.wide.cache: {folder} is not of this teacher on this data: {CHANGES[changed]} .found .*expected"
    with pytest.raises(DataError, match=message):
        run_of(tmp_path, "named", str(folder), changed)


def test_a_named_cache_of_the_very_same_is_read(filled: Path, tmp_path: Path) -> None:
    (folder,) = {path.parent for path in (filled / "cached" / "cache").glob("*/meta.json")}
    assert same_student(run_of(tmp_path, "named", str(folder)), run_of(filled, "cached", True))
