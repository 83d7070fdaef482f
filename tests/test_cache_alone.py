"""Teachers without a net: their answers are read from a cache, also from one that another program's file made."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from small_run import CASCADE, DISTIL, PLAIN, config_of, prepared, quiet, run_in, weights_of, write_config

from kdx.api import RunResult
from kdx.builtin.models import Stored
from kdx.cache_key import Wanted
from kdx.cache_search import opened
from kdx.cli import main
from kdx.errors import DataError, KdxError, PlanError
from kdx.result import read_result
from kdx.runs import Prepared, carry_out
from kdx.types import DataFacts

FIXED = {"data": {"flip": False}}
LOGITS = {"losses": {"kd": {"use": "kd", "inputs": {"teacher": "wide.logits"}}}, "name": "alone"}


def alone(folder: Path, *layers: Any) -> dict[str, Any]:
    """A student of a teacher that is the cache in a folder."""
    return config_of(PLAIN, FIXED, LOGITS, {"teachers": {"wide": {"cache": str(folder)}}}, *layers)


def filled(out: Path, *layers: Any) -> Prepared:
    found = prepared(PLAIN, FIXED, LOGITS, {"teachers": {"wide": {"use": "small", "width": 8, "cache": True}}},
                     {"out": str(out)}, *layers)  # fmt: skip
    carry_out(found, quiet())
    return found


def weights_equal(one: Path, other: Path) -> bool:
    mine, own = weights_of(one), weights_of(other)
    return all(torch.equal(mine[name], own[name]) for name in mine)


def test_a_student_learns_from_stored_answers_with_no_teacher_at_hand(tmp_path: Path) -> None:
    taught = filled(tmp_path / "a")
    kept = tmp_path / "kept"
    shutil.move(taught.caches["wide"].folder, kept)
    found = run_in(tmp_path / "b", alone(kept))
    assert weights_equal(found.folder, taught.folder)
    result = read_result(found.folder)
    assert result.teachers["wide"].test == {}
    assert result.agreement == {}
    assert (found.folder / "report.html").is_file()


def test_a_teacher_that_is_a_cache_has_no_net_to_build() -> None:
    with pytest.raises(PlanError, match="it has no net, and its cache is not there; expected cache: FOLDER"):
        Stored(Stored.Config(), DataFacts(streams={}), ()).build()


def test_the_content_of_such_a_cache_counts_in_the_hash(tmp_path: Path) -> None:
    one, other = filled(tmp_path / "a"), filled(tmp_path / "b", {"seed": 1})
    hashes = [prepared(alone(run.caches["wide"].folder)).hash for run in (one, other)]
    assert hashes[0] != hashes[1]


def test_such_a_teacher_cannot_give_what_is_not_stored(tmp_path: Path) -> None:
    taught = filled(tmp_path / "a")
    folder = taught.caches["wide"].folder
    hint = {"losses": {"hint": {"use": "mse", "inputs": {"student": "student.logits", "teacher": "wide.embedding"}}}}
    with pytest.raises(DataError, match=r"teachers.wide.cache: .* holds no 'embedding' of the teacher; .*logits"):
        run_in(tmp_path / "b", alone(folder, hint))


def test_a_target_that_looks_at_training_samples_reads_the_stored_answers(tmp_path: Path) -> None:
    centred = {
        "targets": {"calm": {"use": "centred"}},
        "losses": {"kd": {"inputs": {"teacher": "calm.logits"}}},
    }
    taught = filled(tmp_path / "a", centred)
    found = run_in(tmp_path / "b", alone(taught.caches["wide"].folder, centred))
    assert weights_equal(found.folder, taught.folder)


def test_with_views_a_target_that_calibrates_needs_the_teacher(tmp_path: Path) -> None:
    centred = {
        "targets": {"calm": {"use": "centred"}},
        "losses": {"kd": {"inputs": {"teacher": "calm.logits"}}},
        "data": {"flip": True, "views": 2},
    }
    taught = filled(tmp_path / "a", centred)
    with pytest.raises(KdxError, match=r"teachers.wide: it answers from .* alone, which holds no answers for samples"):
        run_in(tmp_path / "b", alone(taught.caches["wide"].folder, centred))


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        ({"data": {"size": 60}}, "the data are others"),
        ({"data": {"validation": 6}}, "the training samples are others"),
        ({"data": {"flip": True, "views": 2}}, "the augmentation, its seed or the number of views is another"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_name(tmp_path: Path, layer: dict[str, Any], what: str) -> None:
    folder = filled(tmp_path / "a").caches["wide"].folder
    with pytest.raises(DataError, match=f"teachers.wide.cache: {folder} is not of this teacher on this data: {what}"):
        run_in(tmp_path / "b", alone(folder, layer))


def test_answers_for_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    two, turned = ({"data": {"classes": classes}} for classes in ([0, 2], [2, 0]))
    folder = filled(tmp_path / "a", two).caches["wide"].folder
    found = prepared(alone(folder, two))
    assert opened(found.caches, found.splits, verify=True).keys() == {"wide"}
    with pytest.raises(DataError, match=r'the classes, or their order, are others .found .*"left", "both"'):
        run_in(tmp_path / "b", alone(folder, turned))


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        ({"seed": 1}, "the weights are others"),
        ({"teachers": {"wide": {"width": 4}}}, "the model or its options are others"),
        ({"runtime": {"precision": "bf16"}}, "the teacher computed in another precision"),
    ],
)
def test_a_named_cache_must_be_of_the_teacher_at_hand(tmp_path: Path, layer: dict[str, Any], what: str) -> None:
    folder = filled(tmp_path / "a").caches["wide"].folder
    teacher = {"teachers": {"wide": {"use": "small", "width": 8, "cache": str(folder)}}}
    run_in(tmp_path / "same", config_of(PLAIN, FIXED, LOGITS, teacher))
    with pytest.raises(DataError, match=what):
        run_in(tmp_path / "b", config_of(PLAIN, FIXED, LOGITS, teacher, layer))


def test_a_cache_that_is_not_there_is_named_before_anything_trains(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"teachers.wide.cache: there is no complete cache in .*nowhere"):
        run_in(tmp_path, alone(tmp_path / "nowhere"))


def imported(tmp_path: Path, *words: str, layer: dict[str, Any] | None = None) -> int:
    path = write_config(tmp_path / "config.yaml", alone(tmp_path / "theirs", {"out": str(tmp_path)}, layer or {}))
    return main(["cache", str(path), "--import", *words, "--quiet"])


def theirs(size: int = 48) -> torch.Tensor:
    return 3 * torch.randn(size, 3, generator=torch.Generator().manual_seed(5))


def trained(tmp_path: Path) -> RunResult:
    return run_in(tmp_path, alone(tmp_path / "theirs"))


def test_answers_of_another_program_are_read_from_npy_and_safetensors_alike(tmp_path: Path) -> None:
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    logits = theirs()
    made: list[RunResult] = []
    for kind in ("npy", "indexed", "safetensors"):
        folder = tmp_path / kind
        folder.mkdir()
        if kind == "safetensors":
            safetensors.torch.save_file({"logits": logits[order], "index": order}, folder / "x.safetensors")
            words = [str(folder / "x.safetensors")]
        elif kind == "indexed":
            np.save(folder / "x.npy", logits[order].numpy())
            np.save(folder / "i.npy", order.numpy())
            words = [str(folder / "x.npy"), "--index", str(folder / "i.npy")]
        else:
            np.save(folder / "x.npy", logits.numpy())
            words = [str(folder / "x.npy")]
        assert imported(folder, *words) == 0
        made.append(trained(folder))
    assert weights_equal(made[0].folder, made[1].folder)
    assert weights_equal(made[0].folder, made[2].folder)


def test_half_precision_of_another_program_stays_so_on_the_disk(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", theirs().half().numpy())
    assert imported(tmp_path, str(tmp_path / "x.npy")) == 0
    samples = len(prepared(alone(tmp_path / "theirs")).splits.train)
    assert (tmp_path / "theirs" / "logits.bin").stat().st_size == samples * 3 * 2
    assert read_result(trained(tmp_path).folder).last.step == 6


def test_fixed_answers_for_augmented_samples_are_read_where_that_is_asked_for(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", theirs().numpy())
    once = {
        "teachers": {"wide": {"cache": {"path": str(tmp_path / "theirs"), "one_view": True}}},
        "data": {"flip": True},
    }
    assert imported(tmp_path, str(tmp_path / "x.npy"), layer=once) == 0
    assert read_result(run_in(tmp_path, alone(tmp_path / "theirs", once)).folder).last.step == 6
    with pytest.raises(KdxError, match="augmented anew in each epoch"):
        run_in(tmp_path, alone(tmp_path / "theirs", {"data": {"flip": True}}))


def write_wrong(path: Path, kind: str) -> list[str]:
    """A file that does not fit, and the words of the command that names it."""
    logits, index = theirs(), np.arange(48)
    if kind == "text":
        path.with_suffix(".npy").write_text("no numbers")
    elif kind == "objects":
        np.save(path.with_suffix(".npy"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    elif kind == "csv":
        path.with_suffix(".csv").write_text("1,2")
        return [str(path.with_suffix(".csv"))]
    elif kind == "short":
        np.save(path.with_suffix(".npy"), logits[:40].numpy())
    elif kind == "nan":
        logits[7, 1] = torch.nan
        np.save(path.with_suffix(".npy"), logits.numpy())
    elif kind == "integers":
        np.save(path.with_suffix(".npy"), logits.long().numpy())
    else:
        index = {"twice": np.minimum(index, 46), "outside": index + 1, "floats": index / 2, "few": index[:30],
                 "answers": logits.numpy()}[kind]  # fmt: skip
        np.save(path.with_suffix(".npy"), logits[: len(index)].numpy())
        np.save(path.with_name("i.npy"), index)
        return [str(path.with_suffix(".npy")), "--index", str(path.with_name("i.npy"))]
    return [str(path.with_suffix(".npy"))]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("text", "is no readable .npy file"),
        ("objects", "is no readable .npy file"),
        ("csv", "expected .npy or .safetensors"),
        ("short", "logits has 40 rows, expected 48"),
        ("nan", "row 7 of logits holds nan or inf"),
        ("integers", "expected floats"),
        ("twice", "names 1 sample more than once"),
        ("outside", "the index goes from 1 to 48, expected 0 to 47"),
        ("floats", "expected whole numbers"),
        ("few", "it has no row for"),
        ("answers", "found an index of torch.float32 [48, 3], expected whole numbers [N]"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    tmp_path: Path, kind: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert imported(tmp_path, *write_wrong(tmp_path / "x", kind)) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(DataError, match="no complete cache"):
        trained(tmp_path)


def test_answers_are_imported_for_a_teacher_without_a_net_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "x.npy", theirs().numpy())
    path = write_config(tmp_path / "config.yaml", DISTIL, FIXED, {"teachers": {"wide": {"cache": True}}})
    assert main(["cache", str(path), "--import", str(tmp_path / "x.npy")]) == 2
    assert "expected a teacher that is a cache alone" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("--index", "i.npy"), ("--teacher", "theirs")])
def test_what_says_how_to_import_is_refused_where_nothing_is_imported(
    words: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "config.yaml", alone(tmp_path / "theirs"))
    assert main(["cache", str(path), *words]) == 2
    assert capsys.readouterr().err.startswith(f"{words[0]}: found it without --import, expected --import FILE as well")


def test_kdx_cache_trains_the_teacher_says_the_size_and_fills(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_config(Path("config.yaml"), CASCADE, FIXED, {"teachers": {"wide": {"cache": True, "run": FIXED}}})
    assert main(["cache", str(path)]) == 0
    shown = capsys.readouterr()
    found = prepared(CASCADE, FIXED, {"teachers": {"wide": {"cache": True, "run": FIXED}}})
    one: Wanted = found.caches["wide"]
    assert "wide: 18.86 kB for logits, mid of 36 samples, views: 1" in shown.err
    assert f"wide: {one.folder}: 18.86 kB, 36 samples" in shown.out
    assert found.needs["wide"].folder.is_dir()
    assert not found.folder.exists()
    before = os.stat(one.folder / "logits.bin").st_mtime_ns
    assert main(["cache", str(path), "--quiet"]) == 0
    assert os.stat(one.folder / "logits.bin").st_mtime_ns == before


def test_kdx_cache_says_where_no_cache_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(tmp_path / "config.yaml", DISTIL)
    assert main(["cache", str(path)]) == 2
    assert "teachers: none in" in capsys.readouterr().err
