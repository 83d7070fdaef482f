"""Filling a cache: on first need, further after a stop, by one process of several, and refused where it cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

import filelock
import pytest
import torch
from small_run import CASCADE, DISTIL, PLUGIN, Command, config_of, lines_of, prepared, quiet, weights_of, write_config
from torch import Tensor, nn

from kdx.api import run
from kdx.builtin.tensor_data import TensorDataset
from kdx.cache import open_store
from kdx.config import load_mapping
from kdx.errors import ConfigError, DataError
from kdx.fanout import groups, side_by_side
from kdx.plugins import discover
from kdx.result import Result
from kdx.runs import Prepared, carry_out, fill_caches, prepare
from kdx.runtime import Runtime
from kdx.stopping import Stopped

FIXED = {"data": {"flip": False}}
CACHED = {"teachers": {"wide": {"cache": True}}}
LOGITS = {"losses": {"hint": None}, "align": None}


class Tired(nn.Module):
    """Answers so many batches, and then no more."""

    left: ClassVar[int] = 10**6
    seen: ClassVar[list[int]] = []

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 3)

    def forward(self, images: Tensor) -> Tensor:
        if Tired.left == 0:
            raise RuntimeError("no more")
        Tired.left -= 1
        Tired.seen.append(len(images))
        return self.head(images.flatten(1))


def tired_run(out: Path, views: int = 3, **options: Any) -> Prepared:
    torch.manual_seed(0)
    how = quiet(networks={"wide": Tired()}, **options)
    found = prepared(DISTIL, LOGITS, CACHED, {"data": {"views": views}, "out": str(out)}, options=how)
    carry_out(found, how)
    return found


def test_views_that_were_stored_before_a_stop_are_not_computed_again(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Tired, "left", 10**6)
    Tired.seen.clear()
    whole = tired_run(tmp_path / "whole")
    everything = len(Tired.seen)
    monkeypatch.setattr(Tired, "left", everything - 9)
    with pytest.raises(RuntimeError, match="no more"):
        tired_run(tmp_path / "stopped")
    folder = next(path for path in (tmp_path / "stopped" / "cache").iterdir() if path.is_dir())
    assert open_store(folder) is None
    finished = len((folder / "blocks.jsonl").read_text().splitlines())
    assert 0 < finished < 3
    monkeypatch.setattr(Tired, "left", 10**6)
    Tired.seen.clear()
    again = tired_run(tmp_path / "stopped")
    assert len(Tired.seen) < everything
    mine, own = weights_of(whole.folder), weights_of(again.folder)
    assert all(torch.equal(mine[name], own[name]) for name in mine)


def test_a_cache_of_fewer_views_leaves_just_the_others_to_the_teacher(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Tired, "left", 10**6)
    counts = []
    for out, views in (("alone", 3), ("alone", 3), ("grown", 2), ("grown", 3)):
        Tired.seen.clear()
        last = tired_run(tmp_path / out, views)
        counts.append(Tired.seen.count(12))
        shutil.rmtree(last.folder)
    filling = [counts[0] - counts[1], counts[3] - counts[1]]
    assert filling == [10, 4]  # 3 batches for each view of 36 samples, and one from which the form is learnt
    (one,) = (path for path in (tmp_path / "alone" / "cache").glob("*/logits.bin"))
    assert one.read_bytes() in [path.read_bytes() for path in (tmp_path / "grown" / "cache").glob("*/logits.bin")]


def test_every_batch_of_a_filling_has_the_size_of_training(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(Tired, "left", 10**6)
    Tired.seen.clear()
    how = quiet(networks={"wide": Tired()})
    layers = (DISTIL, LOGITS, FIXED, CACHED, {"train": {"batch": 16, "accumulate": 2}, "out": str(tmp_path)})
    carry_out(prepared(*layers, options=how), how)
    assert Tired.seen.count(8) >= 5  # 36 samples, the last batch filled up


def test_an_altered_cache_is_found_before_training(tmp_path: Path) -> None:
    found = prepared(DISTIL, FIXED, CACHED, {"out": str(tmp_path)})
    carry_out(found, quiet())
    path = found.caches["wide"].folder / "mid.bin"
    content = bytearray(path.read_bytes())
    content[77] ^= 4
    path.write_bytes(content)
    other = prepared(DISTIL, FIXED, CACHED, {"out": str(tmp_path), "train": {"lr": 0.01}})
    with pytest.raises(DataError, match=r"mid.bin is altered: .*; delete the folder to fill it anew"):
        carry_out(other, quiet())


def test_two_processes_fill_one_cache_once(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", DISTIL, CACHED, {"data": {"views": 4}, "out": str(tmp_path)})
    commands = []
    for lr in (0.1, 0.01):
        folder = tmp_path / f"at {lr}"
        folder.mkdir()
        commands.append(Command("run", str(config), f"train.lr={lr}", folder=folder))
    assert [command.wait() for command in commands] == [0, 0]
    caches = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert len(caches) == 1
    assert open_store(caches[0], verify=True) is not None
    for lr in (0.1, 0.01):
        layers = (DISTIL, {"data": {"views": 4}, "train": {"lr": lr}})
        live = prepared(*layers, {"out": str(tmp_path / "live")})
        carry_out(live, quiet())
        mine, own = (weights_of(one / live.folder.name) for one in (tmp_path, tmp_path / "live"))
        assert all(torch.equal(mine[name], own[name]) for name in mine)


def test_a_run_that_waits_for_a_filling_can_be_stopped(tmp_path: Path) -> None:
    found = prepared(DISTIL, LOGITS, CACHED, FIXED, {"out": str(tmp_path)})
    folder = found.caches["wide"].folder
    folder.parent.mkdir(parents=True)
    with (
        filelock.FileLock(folder.parent / f".{folder.name}.lock", is_singleton=False),
        pytest.raises(Stopped, match=rf"{folder}: stopped while another process fills it"),
    ):
        fill_caches(found, quiet(stop=lambda: True), Runtime(found.spec.runtime))


def test_a_wish_to_stop_ends_a_filling_after_the_batch_and_what_is_stored_is_kept(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Tired, "left", 10**6)
    Tired.seen.clear()
    whole = tired_run(tmp_path / "whole")
    everything = len(Tired.seen)
    Tired.seen.clear()
    message = "^wide: stopped while the cache was filled, what is stored is kept; start it again to go on$"
    with pytest.raises(Stopped, match=message):  # in the second view, of batches of 12 as the first has
        tired_run(tmp_path / "stopped", stop=lambda: Tired.seen.count(12) >= 6)
    assert Tired.seen.count(12) == 6
    (folder,) = (path for path in (tmp_path / "stopped" / "cache").iterdir() if path.is_dir())
    assert (folder / "blocks.jsonl").read_text().count("\n") == 1
    Tired.seen.clear()
    again = tired_run(tmp_path / "stopped")
    assert len(Tired.seen) < everything
    mine, own = weights_of(whole.folder), weights_of(again.folder)
    assert all(torch.equal(mine[name], own[name]) for name in mine)


def test_workers_fill_the_same_cache(tmp_path: Path) -> None:
    contents = []
    for workers in (0, 1):
        where = {"runtime": {"workers": workers}, "out": str(tmp_path / str(workers))}
        found = prepared(DISTIL, CACHED, {"data": {"views": 2}}, where)
        carry_out(found, quiet())
        contents.append((found.caches["wide"].folder / "logits.bin").read_bytes())
    assert contents[0] == contents[1]


def test_a_teacher_on_a_view_has_a_cache_of_that_view(tmp_path: Path) -> None:
    on_view = {"losses": {"kd": {"inputs": {"student": "student@turned.logits", "teacher": "wide@turned.logits"}}}}
    data = {"data": {"views": {"turned": {"flip": True}}, "flip": False}}
    layers = (DISTIL, LOGITS, on_view, data)
    with pytest.raises(ConfigError, match=r"teachers.wide.cache: image@turned is augmented anew in each epoch"):
        prepared(*layers, CACHED)
    several = {"data": {"views": {"count": 2}}}
    live = prepared(*layers, several, {"out": str(tmp_path / "live")})
    cached = prepared(*layers, several, CACHED, {"out": str(tmp_path / "cached")})
    assert cached.caches.keys() == {"wide@turned"}
    for one in (live, cached):
        carry_out(one, quiet())
    mine, own = weights_of(live.folder), weights_of(cached.folder)
    assert all(torch.equal(mine[name], own[name]) for name in mine)


def test_a_teacher_whose_input_is_a_view_has_a_cache_for_each_augmentation_of_that_view() -> None:
    on_view = {"teachers": {"wide": {"input": "image@moved"}}}
    views = [{"count": 2, "moved": {"augment": {"shift": {"pixels": pixels}}}} for pixels in (1, 2)]
    images = {"image": torch.rand(24, 1, 8, 8), "label": torch.arange(24) % 3}
    student = {"student": {"input": "image"}, "data": {"use": "tensors", "validation": 0, "flip": None}}
    how = quiet(data=TensorDataset.from_tensors(images))
    parts = [
        prepared(DISTIL, LOGITS, CACHED, student, on_view, {"data": {"views": view}}, options=how).caches["wide"].parts
        for view in views
    ]
    assert [name for name in parts[0] if parts[0][name] != parts[1][name]] == ["augmentation"]


def test_answers_for_mixed_images_are_refused(tmp_path: Path) -> None:
    images = torch.rand(12, 1, 8, 8)
    data = TensorDataset.from_tensors(train={"image": images, "label": torch.arange(12) % 3}, classes=["a", "b", "c"])
    on_view = {"losses": {"kd": {"inputs": {"student": "student@mixed.logits", "teacher": "wide@mixed.logits"}}}}
    views = {"data": {"use": "tensors", "validation": 0, "views": {"count": 4, "mixed": {"augment": {"mixup": {}}}}}}
    config = config_of(DISTIL, LOGITS, on_view, views, CACHED, {"out": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"teachers.wide.cache: image@mixed is mixed from several samples"):
        run(config, data=data, quiet=True)


def own_registry(*layers: Any) -> Prepared:
    """A run with plugins of its own, beside which others can train."""
    return prepare(load_mapping(config_of(*layers)), quiet(), registry=discover([str(PLUGIN)]))


def test_runs_side_by_side_read_their_caches_with_the_numbers_that_each_has_alone(tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"losses": {"kd": {"temperature": 8}}},
        {"losses": {"hint": None}, "align": None},
        {"teachers": {"wide": {"cache": {"dtype": "float16"}}}},
        {"teachers": {"wide": {"cache": None}}, "train": {"lr": 0.01}},
    ]
    layers = (CASCADE, {"baseline": False}, CACHED, {"data": {"views": 2}})
    together, alone = (
        [own_registry(*layers, variant, {"out": str(tmp_path / name)}) for variant in variants]
        for name in ("together", "alone")
    )
    assert groups(together) == [[*range(len(variants))]]
    found: list[Any] = [None] * len(variants)

    def ended(place: int, what: Result | Exception) -> None:
        found[place] = what

    side_by_side(together, quiet(), ended)
    for one, other, result in zip(together, alone, found, strict=True):
        assert isinstance(result, Result), result
        carry_out(other, quiet())
        assert lines_of(one.folder) == lines_of(other.folder)
        mine, own = weights_of(one.folder), weights_of(other.folder)
        assert all(torch.equal(mine[name], own[name]) for name in mine)


def test_a_borrowed_part_of_a_cached_teacher_is_built(tmp_path: Path) -> None:
    reuse = {"losses": {"hint": None, "reuse": {"use": "reuse"}}, "align": None}
    live = prepared(DISTIL, FIXED, reuse, {"out": str(tmp_path / "live")})
    cached = prepared(DISTIL, FIXED, reuse, CACHED, {"out": str(tmp_path / "cached")})
    for one in (live, cached):
        carry_out(one, quiet())
    mine, own = weights_of(live.folder), weights_of(cached.folder)
    assert all(torch.equal(mine[name], own[name]) for name in mine)
