"""Facts of `kdx/student.py`: the file that a run leaves gives the student that was evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from small_plugin import SmallNet, made_images
from small_run import DISTIL, PLAIN, PLUGIN, STATEFUL, config_of, run_in
from torch import Tensor

import kdx
from kdx.api import RunResult
from kdx.student import load_student, read_header

ARGS = {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8], "stem_width": 4}
TIMM = config_of(
    PLAIN,
    {
        "name": "timm",
        "data": {"use": "tensors"},
        "student": {"use": "timm", "model": "resnet18", "args": ARGS},
        "train": {"ema": 0.9},
    },
)


def as_bytes(count: int, seed: int) -> dict[str, Tensor]:
    found = made_images(count, seed)
    return {**found, "image": (F.interpolate(found["image"], 16) * 255).byte()}


TEST = as_bytes(24, 2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    data = {"train": as_bytes(48, 1), "test": TEST}
    return run_in(tmp_path_factory.mktemp("runs"), TIMM, data=data)


@pytest.mark.parametrize("by_file", [False, True])
def test_a_loaded_student_gives_the_numbers_that_the_run_reported(finished: RunResult, by_file: bool) -> None:
    student = load_student(finished.folder / "student.safetensors" if by_file else finished.folder)
    assert not student.training
    with torch.no_grad():
        logits = student(TEST["image"].float() / 255)
    accuracy = (logits.argmax(1) == TEST["label"]).float().mean().item()
    assert finished.metrics["accuracy"] == pytest.approx(accuracy, abs=1e-7)
    cross_entropy = F.cross_entropy(logits, TEST["label"]).item()
    assert finished.metrics["cross_entropy"] == pytest.approx(cross_entropy, rel=1e-5)


def test_a_student_comes_back_wherever_its_file_was_moved(finished: RunResult, tmp_path: Path) -> None:
    shutil.copy(finished.folder / "student.safetensors", tmp_path / "mine.safetensors")
    images = TEST["image"].float() / 255
    with torch.no_grad():
        assert torch.equal(load_student(tmp_path / "mine.safetensors")(images), finished.student()(images))


def test_the_keys_are_those_of_the_timm_net(finished: RunResult) -> None:
    net = timm.create_model("resnet18", in_chans=1, num_classes=3, **ARGS)
    tensors = safetensors.torch.load_file(finished.folder / "student.safetensors")
    assert list(tensors.keys()) == list(net.state_dict().keys()) or set(tensors) == set(net.state_dict())
    net.load_state_dict(tensors)


def test_the_header_tells_what_builds_the_net_and_names_no_folder(finished: RunResult) -> None:
    about = read_header(finished.folder / "student.safetensors")
    assert about["model"] == ["timm", {"model": "resnet18", "pretrained": False, "num_classes": None, "size": None,
                                       "args": ARGS}]  # fmt: skip
    assert about["streams"] == ["image"]
    assert about["facts"]["classes"] == ["0", "1", "2"]
    assert about["run"] == finished.folder.name
    assert str(Path(__file__).parent) not in json.dumps(about)


def test_a_student_of_a_plugin_file_needs_that_file_and_says_so(tmp_path: Path) -> None:
    found = run_in(tmp_path, PLAIN)
    with pytest.raises(kdx.PluginError, match=r"no models component is named 'small'.*\n.*used small_plugin\.py"):
        load_student(found.folder)
    images = made_images(5, 3)["image"]
    with torch.no_grad():
        one = load_student(found.folder, plugins=[PLUGIN])(images)
        assert torch.equal(one, found.student()(images))
        fresh = SmallNet(4, 0.0, 3)
        assert torch.equal(one, load_student(found.folder, net=fresh)(images))


def test_an_averaged_student_is_the_one_that_is_kept(tmp_path: Path) -> None:
    found = run_in(tmp_path, STATEFUL)
    test = made_images(24, 2)
    with torch.no_grad():
        loss = F.cross_entropy(found.student()(test["image"]), test["label"])
    assert found.metrics["cross_entropy"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_student_with_a_borrowed_classifier_comes_back_whole(tmp_path: Path) -> None:
    found = run_in(tmp_path, DISTIL, {"losses": {"reuse": {"use": "reuse"}}})
    test = made_images(24, 2)
    student = load_student(found.folder, plugins=[PLUGIN])
    with torch.no_grad():
        logits = student(test["image"])
    assert found.metrics["cross_entropy"] == pytest.approx(F.cross_entropy(logits, test["label"]).item(), rel=1e-5)
    names = safetensors.torch.load_file(found.folder / "student.safetensors").keys()
    assert {name.partition(".")[0] for name in names} == {"student", "node", "parts"}
    assert found.result.size is not None
    assert found.result.size.parameters == sum(parameter.numel() for parameter in student.parameters())


def test_a_module_that_was_handed_in_must_be_handed_in_again(tmp_path: Path) -> None:
    found = run_in(tmp_path, PLAIN, {"student": None}, models={"student": SmallNet(4, 0.0, 3)})
    with pytest.raises(kdx.CheckpointError, match=r"its net was handed in from Python; give one .* as net="):
        load_student(found.folder)
    with pytest.raises(kdx.CheckpointError, match=r"has shape \[4, 1, 3, 3\], expected \[5, 1, 3, 3\]"):
        load_student(found.folder, net=SmallNet(5, 0.0, 3))
    assert torch.equal(
        load_student(found.folder, net=SmallNet(4, 0.0, 3)).net.state_dict()["first.0.weight"],
        found.student().net.state_dict()["first.0.weight"],
    )


def test_a_folder_without_a_student_is_named(tmp_path: Path) -> None:
    with pytest.raises(kdx.CheckpointError, match=r"there is no student .*a run that has finished leaves one"):
        load_student(tmp_path)


def header(folder: Path, about: Any) -> Path:
    text = {} if about is None else {"kdx": about if isinstance(about, str) else json.dumps(about)}
    safetensors.torch.save_file({"x": torch.zeros(1)}, folder / "a.safetensors", metadata=text)
    return folder / "a.safetensors"


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (None, "is no student that kdx wrote: KeyError"),
        ("{torn", "is no student that kdx wrote: JSONDecodeError"),
        ([1], "its header is no mapping"),
        ({"model": ["timm", {}]}, "its header lacks 'facts'"),
        ({"model": 3, "streams": ["image"], "facts": {"streams": {}, "classes": []}}, "its header lacks"),
    ],
)
def test_a_header_that_kdx_did_not_write_is_refused(tmp_path: Path, about: Any, message: str) -> None:
    with pytest.raises(kdx.CheckpointError, match=message):
        load_student(header(tmp_path, about))


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(kdx.CheckpointError, match=r"a\.safetensors is no student that kdx wrote"):
        load_student(tmp_path / "a.safetensors")


def test_weights_that_were_torn_are_refused(finished: RunResult, tmp_path: Path) -> None:
    content = (finished.folder / "student.safetensors").read_bytes()
    (tmp_path / "student.safetensors").write_bytes(content[:-100])
    with pytest.raises(kdx.CheckpointError, match=r"student\.safetensors"):
        load_student(tmp_path)
