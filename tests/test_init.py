"""Looking at a folder of images and writing a config for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from kdx.builtin.image_folder import ImageFolder
from kdx.config import load
from kdx.data import SplitOptions, make_splits
from kdx.errors import ConfigError, DataError
from kdx.init import FolderFacts, scan, write_config
from kdx.runs import prepare


def save(path: Path, shape: tuple[int, ...], value: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "leaves of 'oak' & ash"
    for i in range(12):
        save(root / "train" / "oak" / f"{i}.png", (40, 60, 3), 20 * i)
    for i in range(8):
        save(root / "train" / "ash: old" / f"{i}.png", (50 + i, 50 + i))
    save(root / "test" / "oak" / "0.png", (100, 90, 3))
    return root


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def test_a_scan_finds_classes_counts_splits_colour_and_sizes(folder: Path) -> None:
    facts = scan(folder)
    assert facts.counts == {"train": {"ash: old": 8, "oak": 12}, "test": {"oak": 1}}
    assert facts.classes == ("ash: old", "oak")
    assert facts.channels == 3
    assert facts.sides == (40, 40, 90)
    assert facts.unreadable == {}


def test_a_folder_of_grey_images_has_one_channel(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / name / "0.png", (8, 8))
    assert scan(tmp_path).channels == 1


def test_unreadable_files_are_found_with_the_reason_and_not_counted(folder: Path) -> None:
    cut = folder / "train" / "oak" / "3.png"
    cut.write_bytes(cut.read_bytes()[:60])
    (folder / "test" / "oak" / "1.jpg").write_text("nothing")
    facts = scan(folder)
    assert facts.counts["train"]["oak"] == 11
    assert sorted(file.name for file in facts.unreadable) == ["1.jpg", "3.png"]
    assert "UnidentifiedImageError" in facts.unreadable[folder / "test" / "oak" / "1.jpg"]
    text = (write_config(facts, folder.parent / "kdx.yaml").parent / "data.yaml").read_text()
    assert "# - train/oak/3.png: " in text
    assert "a run stops at them" in text


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png", (8, 8))
    with pytest.raises(DataError, match="found only the class a; expected two or more"):
        scan(tmp_path)


def test_a_class_that_cannot_be_read_at_all_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png", (8, 8))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.png").write_text("nothing")
    with pytest.raises(DataError, match="no image of the class b can be read"):
        scan(tmp_path)


def test_the_config_states_what_was_found_and_runs_on_it(folder: Path) -> None:
    path = write_config(scan(folder), folder.parent / "out" / "kdx.yaml")
    text = (path.parent / "data.yaml").read_text()
    assert "# - train, 20 images by class: ash: old 8, oak 12\n" in text
    assert "# - test, 1 images by class: oak 1\n" in text
    assert "# - the images have colour; their shorter sides are 40 to 90 pixels, 40 in the middle" in text
    data = read(path.parent / "data.yaml")["data"]
    assert data["use"] == "image_folder"
    assert data["path"] == str(folder)
    assert (data["size"], data["channels"], data["validation"]) == (32, 3, 0.1)
    options = ImageFolder.Config(data["path"], data["size"], str(data["channels"]), data["augment"])
    assert len(make_splits(ImageFolder(options), SplitOptions()).train) == 18


def test_kdx_understands_the_files_that_it_writes(folder: Path) -> None:
    config = load(write_config(scan(folder), folder.parent / "kdx.yaml"))
    prepared = prepare({**config, "plugins": ["kdx_plugins.logit"], "installed_plugins": False})
    assert prepared.dataset.facts().classes == ("ash: old", "oak")
    assert set(prepared.spec.losses) == {"ce", "kd"}
    teacher = prepared.needs["teacher"]
    assert set(teacher.spec.losses) == {"ce"}
    assert teacher.spec.student.options.model == "resnet18"


def facts(count: int, side: int, splits: tuple[str, ...] = ("train",)) -> FolderFacts:
    counts = {split: {"a": count - 1, "b": 1} for split in splits}
    return FolderFacts(Path("/images"), counts, 3, (side, side, side), {})


@pytest.mark.parametrize(
    ("count", "side", "size", "teacher", "student"),
    [
        (60000, 28, 32, "resnet18", "resnet18"),
        (900, 300, 224, "resnet18", "mobilenetv3_small_050"),
        (50000, 100, 96, "resnet50", "mobilenetv3_small_100"),
    ],
)
def test_networks_and_size_follow_the_images(
    tmp_path: Path, count: int, side: int, size: int, teacher: str, student: str
) -> None:
    path = write_config(facts(count, side), tmp_path / "kdx.yaml")
    assert read(tmp_path / "data.yaml")["data"]["size"] == size
    assert read(tmp_path / "teacher.yaml")["student"]["model"] == teacher
    assert read(path)["student"]["model"] == student


def test_validation_is_held_out_only_where_there_is_no_folder_for_it(tmp_path: Path) -> None:
    write_config(facts(100, 64, ("train", "val", "test")), tmp_path / "kdx.yaml")
    assert "validation" not in read(tmp_path / "data.yaml")["data"]
    assert "no folder `test`" not in (tmp_path / "data.yaml").read_text()


@pytest.mark.parametrize("name", ["kdx.yaml", "teacher.yaml", "data.yaml"])
def test_no_file_is_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"{name} is there already and would be lost"):
        write_config(facts(100, 64), tmp_path / "kdx.yaml")
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_name_that_kdx_needs_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="this name is needed for another of the files"):
        write_config(facts(100, 64), tmp_path / "teacher.yaml")
