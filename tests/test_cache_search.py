"""Caches that hold more than a run reads are found and read, and what they lack alone is filled."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_plugin import SmallNet
from small_run import CASCADE, DISTIL, PLAIN, TEACHER, config_of, prepared, quiet, run_in, weights_of, write_config

from kdx.cache import BLOCKS, META, read_meta
from kdx.cache_search import INDEX, opened
from kdx.checkpoint import save_weights
from kdx.cli import main
from kdx.errors import DataError
from kdx.runs import Options, Prepared, carry_out, fill_caches
from kdx.runtime import Runtime
from kdx.stopping import Stopped

FIXED = {"data": {"flip": False}}
CACHED = {"teachers": {"wide": {"cache": True}}}
HINT = config_of(DISTIL, FIXED, CACHED)
"""A student that reads logits and a map of its teacher."""
LOGITS = config_of(HINT, {"losses": {"hint": None}, "align": None})
"""One that reads logits alone."""


def filled(out: Path, *layers: Any) -> Prepared:
    """A run that is ready to train, with its caches."""
    found = prepared(*layers, {"out": str(out)})
    fill_caches(found, quiet(), Runtime(found.spec.runtime))
    return found


def held(out: Path) -> dict[str, list[str]]:
    """The caches in a folder of runs, with their fields."""
    metas = {path.parent.name: read_meta(path.parent) for path in (out / "cache").glob("*/meta.json")}
    return {name: sorted(meta.fields) for name, meta in metas.items() if meta is not None}


def answers(run: Prepared, view: int = 0) -> dict[str, torch.Tensor]:
    """What a run reads for each of its training samples in a view, by field."""
    (stored,) = opened(run.caches, run.splits, verify=True).values()
    rows = stored.rows(run.splits.train.positions, view)
    named = {file: rows[name] for file, name in stored.streams.items()}
    return {name: stored.field(name).decode(name, named) for name in stored.fields}


def assert_as_alone(tmp_path: Path, run: Prepared, *layers: Any, views: int = 1) -> None:
    """The answers that a run finds are those of a cache that was filled for it."""
    alone = filled(tmp_path / "alone", *layers)
    assert [*alone.caches] == [*run.caches]
    for view in range(views):
        mine, own = answers(run, view), answers(alone, view)
        assert mine.keys() == own.keys()
        assert all(torch.equal(mine[name], own[name]) for name in own)


def test_a_run_that_reads_fewer_fields_reads_the_cache_of_more(tmp_path: Path) -> None:
    filled(tmp_path, HINT)
    before = held(tmp_path)
    assert_as_alone(tmp_path, filled(tmp_path, LOGITS), LOGITS)
    assert held(tmp_path) == before
    assert [*before.values()] == [["logits", "mid"]]


def test_a_run_that_reads_one_more_field_fills_just_that_one(tmp_path: Path) -> None:
    filled(tmp_path, LOGITS)
    assert_as_alone(tmp_path, filled(tmp_path, HINT), HINT)
    assert sorted(held(tmp_path).values()) == [["logits"], ["mid"]]


def test_a_field_is_added_to_a_cache_of_the_highest_logits(tmp_path: Path) -> None:
    top = {"teachers": {"wide": {"cache": {"top": 2}}}}
    filled(tmp_path, LOGITS, top)
    assert_as_alone(tmp_path, filled(tmp_path, HINT, top), HINT, top)
    assert sorted(held(tmp_path).values()) == [["logits"], ["mid"]]


def test_a_student_of_fields_from_two_caches_is_that_of_the_live_teacher(tmp_path: Path) -> None:
    filled(tmp_path, LOGITS)
    cached, live = run_in(tmp_path, HINT), run_in(tmp_path / "live", HINT, {"teachers": {"wide": {"cache": None}}})
    mine, own = weights_of(cached.folder), weights_of(live.folder)
    assert all(torch.equal(mine[name], own[name]) for name in mine)
    plan = (cached.folder / "plan.txt").read_text()
    assert all(str(tmp_path / "cache" / name) in plan for name in held(tmp_path))


def test_a_run_with_fewer_views_reads_the_first_ones_of_a_cache_of_more(tmp_path: Path) -> None:
    several, two = ({"data": {"flip": True, "views": count}} for count in (4, 2))
    filled(tmp_path, LOGITS, several)
    before = held(tmp_path)
    assert_as_alone(tmp_path, filled(tmp_path, LOGITS, two), LOGITS, two, views=2)
    assert held(tmp_path) == before
    filled(tmp_path, LOGITS, {"data": {"flip": True, "views": 5}})
    assert len(held(tmp_path)) == 2


def test_a_run_with_more_views_fills_just_those_that_are_missing(tmp_path: Path) -> None:
    few, many = ({"data": {"views": views}} for views in (2, 5))
    before = filled(tmp_path / "few", DISTIL, CACHED, few)
    (own,) = before.caches.values()
    content = {path.name: path.read_bytes() for path in own.folder.iterdir()}
    told = io.StringIO()
    how = Options(console=Console(file=told, width=1000))
    found = prepared(DISTIL, CACHED, many, {"out": str(tmp_path / "few")})
    runtime = Runtime(found.spec.runtime)
    fill_caches(found, how, runtime)
    assert f"wide: 2 views of 5 copied from {own.folder}" in told.getvalue()
    assert len(held(tmp_path / "few")) == 2
    assert_as_alone(tmp_path, found, DISTIL, CACHED, many, views=5)
    assert {path.name: path.read_bytes() for path in own.folder.iterdir()} == content


def test_a_run_on_fewer_samples_and_more_views_copies_their_rows(tmp_path: Path) -> None:
    some = {"data": {"views": 4, "validation": 24}}
    filled(tmp_path / "some", DISTIL, CACHED, {"data": {"views": 2}})
    found = filled(tmp_path / "some", DISTIL, CACHED, some)
    assert_as_alone(tmp_path, found, DISTIL, CACHED, some, views=4)


def test_altered_views_are_not_copied(tmp_path: Path) -> None:
    (own,) = filled(tmp_path / "some", DISTIL, CACHED, {"data": {"views": 2}}).caches.values()
    path = own.folder / "logits.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    found = filled(tmp_path / "some", DISTIL, CACHED, {"data": {"views": 3}})
    assert_as_alone(tmp_path, found, DISTIL, CACHED, {"data": {"views": 3}}, views=3)


def test_copying_views_can_be_stopped_and_goes_on(tmp_path: Path) -> None:
    filled(tmp_path / "some", DISTIL, CACHED, {"data": {"views": 2}})
    found = prepared(DISTIL, CACHED, {"data": {"views": 3}}, {"out": str(tmp_path / "some")})
    for looks in (1, 2):  # after one view is copied, then after both
        asked = iter([False] * looks)
        with pytest.raises(Stopped, match="wide: stopped while the cache was filled"):
            fill_caches(found, quiet(stop=lambda asked=asked: next(asked, True)), Runtime(found.spec.runtime))
    (own,) = found.caches.values()
    assert (own.folder / BLOCKS).read_text().count("\n") == 2
    fill_caches(found, quiet(), Runtime(found.spec.runtime))
    assert_as_alone(tmp_path, found, DISTIL, CACHED, {"data": {"views": 3}}, views=3)


def test_a_stop_in_the_middle_of_a_view_keeps_the_blocks_that_are_copied(tmp_path: Path) -> None:
    many = {"data": {"size": 1200}}  # three blocks of a view
    filled(tmp_path, LOGITS, CACHED, many, {"data": {"views": 2, "flip": True}})
    found = prepared(LOGITS, CACHED, many, {"data": {"views": 3, "flip": True}, "out": str(tmp_path)})
    asked = iter([False] * 2)
    with pytest.raises(Stopped, match="wide: stopped while the cache was filled"):
        fill_caches(found, quiet(stop=lambda: next(asked, True)), Runtime(found.spec.runtime))
    (own,) = found.caches.values()
    assert (own.folder / BLOCKS).read_text().count("\n") == 2


def test_a_run_on_some_of_the_samples_reads_the_cache_of_all(tmp_path: Path) -> None:
    filled(tmp_path, LOGITS, {"data": {"validation": 6}})
    before = held(tmp_path)
    assert_as_alone(tmp_path, filled(tmp_path, LOGITS), LOGITS)
    assert held(tmp_path) == before
    filled(tmp_path, LOGITS, {"data": {"validation": 0}})  # more samples than there are
    assert len(held(tmp_path)) == 2


def test_fields_of_caches_with_other_samples_and_views_are_joined(tmp_path: Path) -> None:
    more, fewer = ({"data": {"flip": True, "views": count, "validation": size}} for count, size in ((3, 6), (2, 12)))
    filled(tmp_path, LOGITS, more)
    assert_as_alone(tmp_path, filled(tmp_path, HINT, fewer), HINT, fewer, views=2)
    assert sorted(held(tmp_path).values()) == [["logits"], ["mid"]]


def test_a_cache_that_does_not_say_its_samples_serves_these_alone(tmp_path: Path) -> None:
    filled(tmp_path, HINT, {"data": {"validation": 6}})
    (index,) = (tmp_path / "cache").glob(f"*/{INDEX}")
    index.unlink()
    before = held(tmp_path)
    filled(tmp_path, LOGITS, {"data": {"validation": 6}})
    assert held(tmp_path) == before
    filled(tmp_path, LOGITS)
    assert len(held(tmp_path)) == 2


def test_a_list_of_samples_that_is_not_of_the_cache_is_not_believed(tmp_path: Path) -> None:
    filled(tmp_path / "more", LOGITS, {"data": {"validation": 0}})
    filled(tmp_path, LOGITS, {"data": {"validation": 6}})
    (other,), (index,) = (folder.glob(f"cache/*/{INDEX}") for folder in (tmp_path / "more", tmp_path))
    shutil.copy(other, index)
    filled(tmp_path, LOGITS)
    assert len(held(tmp_path)) == 2


@pytest.mark.parametrize(
    "layer",
    [
        {"teachers": {"wide": {"taps": {"mid": "first"}}}},
        {"teachers": {"wide": {"cache": {"dtype": "float16"}}}},
        {"teachers": {"wide": {"width": 6}}},
        {"seed": 1},
        {"data": {"size": 60}},
        {"data": {"flip": True, "views": 2}},
    ],
)
def test_a_cache_of_something_else_is_not_read(tmp_path: Path, layer: dict[str, Any]) -> None:
    filled(tmp_path, HINT)
    only_map = {"losses": {"kd": None}}
    filled(tmp_path, HINT, only_map, layer)
    assert len(held(tmp_path)) == 2


def test_a_trained_teacher_is_known_by_any_name_and_one_with_first_weights_by_its_own(tmp_path: Path) -> None:
    trained = config_of(CASCADE, FIXED, {"baseline": False, "losses": {"hint": None}, "align": None, "teachers": None})
    run = {"run": config_of(TEACHER, FIXED), "cache": True}
    for name in ("wide", "other"):
        found = prepared(trained, {"teachers": {name: run}}, {"out": str(tmp_path / "trained")})
        carry_out(found, quiet())
    assert len(held(tmp_path / "trained")) == 1
    kd = {"losses": {"kd": {"use": "kd"}}}
    for name in ("wide", "other"):
        filled(tmp_path / "first", PLAIN, FIXED, kd, {"teachers": {name: {"use": "small", "width": 8, "cache": True}}})
    assert len(held(tmp_path / "first")) == 2


def test_a_run_of_another_name_that_has_come_to_other_weights_is_not_taken_for_the_same(tmp_path: Path) -> None:
    layers = (CASCADE, FIXED, {"baseline": False, "losses": {"hint": None}, "align": None, "teachers": None})
    one, other = (
        prepared(*layers, {"teachers": {"wide": {"run": config_of(TEACHER, FIXED, {"name": name}), "cache": True}}},
                 {"out": str(tmp_path)})
        for name in ("first", "second")
    )  # fmt: skip
    carry_out(one, quiet())
    trained = other.needs["wide"]
    carry_out(trained, quiet())
    assert opened(other.caches, other.splits, verify=False).keys() == {"wide"}
    net = SmallNet(8, 0.0, 3)
    net.load_state_dict(weights_of(trained.folder))
    with torch.no_grad():
        net.head.bias[0] += 0.25
    save_weights(net, trained.folder / "student.safetensors")
    with pytest.raises(DataError, match=rf"holds answers of other weights than {trained.folder} has now"):
        opened(other.caches, other.splits, verify=False)


def test_kdx_cache_says_which_caches_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path, LOGITS)
    (first,) = held(tmp_path)
    path = write_config(tmp_path / "config.yaml", HINT, {"out": str(tmp_path)})
    assert main(["cache", str(path)]) == 0
    shown = capsys.readouterr()
    (second,) = held(tmp_path).keys() - {first}
    assert f"wide: {tmp_path / 'cache' / first}: 432 B, 36 samples" in shown.out
    assert f"wide: {tmp_path / 'cache' / second}: 18.43 kB, 36 samples" in shown.out
    assert "for mid of 36 samples, views: 1" in shown.err


def test_a_filling_that_was_begun_goes_on_though_others_hold_a_part(tmp_path: Path) -> None:
    whole = filled(tmp_path / "whole", HINT)
    begun = tmp_path / "cache" / whole.caches["wide"].folder.name
    shutil.copytree(whole.caches["wide"].folder, begun)
    (begun / "blocks.jsonl").unlink()
    filled(tmp_path, LOGITS)
    assert_as_alone(tmp_path, filled(tmp_path, HINT), HINT)
    assert sorted(held(tmp_path).values()) == [["logits"], ["logits", "mid"]]


def test_damaged_caches_of_others_are_left_alone_and_an_altered_row_of_a_larger_one_is_named(tmp_path: Path) -> None:
    folder = filled(tmp_path, HINT).caches["wide"].folder
    nonsense = tmp_path / "cache" / "wide-000000000000"
    nonsense.mkdir()
    (nonsense / META).write_text("{")
    for name in ("mid", "logits"):
        path = folder / f"{name}.bin"
        content = bytearray(path.read_bytes())
        content[40] ^= 1
        path.write_bytes(content)
        run = filled(tmp_path, LOGITS)
        if name == "mid":  # which it does not read
            answers(run)
            continue
        with pytest.raises(DataError, match=r"logits.bin is altered"):
            answers(run)


def test_a_larger_cache_can_be_named(tmp_path: Path) -> None:
    more = {"data": {"flip": True, "views": 3, "validation": 6}}
    folder = filled(tmp_path, HINT, more).caches["wide"].folder
    two = {"data": {"flip": True, "views": 2}}
    named = prepared(LOGITS, two, {"teachers": {"wide": {"cache": str(folder)}}, "out": str(tmp_path)})
    assert_as_alone(tmp_path, named, LOGITS, two, views=2)
    smaller = prepared(LOGITS, {"data": {"flip": True, "views": 3, "validation": 0}},
                       {"teachers": {"wide": {"cache": str(folder)}}, "out": str(tmp_path)})  # fmt: skip
    with pytest.raises(DataError, match=r"teachers.wide.cache: .* is not of .* the training samples are others"):
        opened(smaller.caches, smaller.splits, verify=False)
