"""Facts of `kdx/identity.py`: what changes the hash of a run, and what does not."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_run import DISTIL, PLAIN, PLUGIN, TEACHER, config_of, prepared, quiet, registry
from torch import nn

from kdx.builtin.torchvision_images import TorchvisionDataset
from kdx.checkpoint import save_weights
from kdx.config import load_mapping
from kdx.errors import CheckpointError
from kdx.identity import environment, file_digest, network_digest, used_plugins
from kdx.plan import build_model
from kdx.runs import prepare

BASE = config_of(
    DISTIL,
    {
        "teachers": {"idle": {"use": "small", "width": 3}},
        "losses": {"kd": {"inputs": {"teacher": "wide.logits"}}},
    },
)


def hash_of(*layers: Mapping[str, Any]) -> str:
    return prepared(*layers).hash


@pytest.fixture(scope="module")
def base() -> str:
    return hash_of(BASE)


def test_a_hash_is_twelve_hex_digits_and_always_the_same(base: str) -> None:
    assert len(base) == 12
    assert int(base, 16) >= 0
    assert hash_of(BASE) == base


@pytest.mark.parametrize(
    "layer",
    [
        {"name": "another"},
        {"out": "elsewhere"},
        {"baseline": True},
        {"runtime": {"workers": 2}},
        {"runtime": {"threads": 1, "eval_batch": 7, "channels_last": True}},
        {"runtime": {"device": "auto"}},
        {"train": {"save": 5}},
        {"teachers": {"idle": None}},
        {"teachers": {"idle": {"width": 5}}},
        {"student": {"taps": {"unread": "first"}}},
        {"targets": {"unread": {"use": "doubt", "inputs": {"logits": "idle.logits"}}}},
        {"losses": {"ce": {"label_smoothing": 0.0}}},
        {"data": {"labelled": None}},
    ],
    ids=str,
)
def test_what_cannot_change_the_result_does_not_change_the_hash(base: str, layer: dict[str, Any]) -> None:
    assert hash_of(BASE, layer) == base


@pytest.mark.parametrize(
    "layer",
    [
        {"seed": 1},
        {"data": {"labelled": 20}},
        {"data": {"validation": 9}},
        {"data": {"split_seed": 1}},
        {"data": {"classes": [0, 1]}},
        {"data": {"size": 45}},
        {"data": {"flip": False}},
        {"student": {"width": 5}},
        {"student": {"taps": {"mid": "first"}}},
        {"teachers": {"wide": {"width": 9}}},
        {"align": {"mid": {"norm": True}}},
        {"align": {"mid": {"lr_scale": 2.0}}},
        {"losses": {"ce": {"label_smoothing": 0.1}}},
        {"losses": {"kd": {"temperature": 3.0}}},
        {"losses": {"kd": {"weight": {"end": 0.5}}}},
        {"losses": {"hint": None}},
        {"losses": {"hint": {"inputs": {"student": "student.mid", "teacher": "student.mid"}}}},
        {"metrics": {"classification": {"bins": 5}}},
        {"train": {"lr": 0.06}},
        {"train": {"lr": {"use": "cosine", "peak": 0.05}}},
        {"train": {"updates": 7}},
        {"train": {"batch": 6}},
        {"train": {"accumulate": 2}},
        {"train": {"optimizer": {"use": "adamw"}}},
        {"train": {"optimizer": {"use": "sgd", "momentum": 0.8}}},
        {"train": {"weight_decay": 0.1}},
        {"train": {"decay_vectors": True}},
        {"train": {"clip": 1.0}},
        {"train": {"ema": 0.9}},
        {"train": {"evaluate": 2}},
        {"train": {"monitor": "macro_f1"}},
        {"runtime": {"precision": "bf16"}},
    ],
    ids=str,
)
def test_what_can_change_the_result_changes_the_hash(base: str, layer: dict[str, Any]) -> None:
    assert hash_of(BASE, layer) != base


def test_the_order_of_augmentations_counts() -> None:
    orders = ({"flip": {}, "shift": {"pixels": 1}}, {"shift": {"pixels": 1}, "flip": {}})
    hashes = {
        hash_of(PLAIN, {"data": {"use": "fashion_mnist", "augment": augment, "validation": 100}}) for augment in orders
    }
    assert len(hashes) == 2


@pytest.fixture
def copies(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of the same content: torchvision's layout of Fashion-MNIST, and images in class folders."""
    raw = tmp_path / "a" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    labels = bytes(i % 10 for i in range(20))
    for part in ("train", "t10k"):
        pixels = bytes(i * 7 % 256 for i in range(20 * 64))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, 20, 8, 8) + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 20) + labels)
    for name in ("ant", "bee"):
        (tmp_path / "a" / "pets" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (i * 40, 0, 0)).save(tmp_path / "a" / "pets" / name / f"{i}.png")
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # keeps the times of change
    return tmp_path / "a", tmp_path / "b"


PLACED = config_of(PLAIN, {"data": None}, {"data": {"use": "torchvision", "dataset": "FashionMNIST", "validation": 4}})


def test_where_torchvision_data_lies_does_not_count_and_its_content_does(copies: tuple[Path, Path]) -> None:
    one, other = ({"data": {"root": str(root)}} for root in copies)
    first = hash_of(PLACED, one)
    assert hash_of(PLACED, other) == first
    assert hash_of(PLACED, other, {"data": {"download": True}}) == first
    assert hash_of(PLACED, other, {"data": {"channels": "3"}}) != first
    labels = copies[1] / "FashionMNIST" / "raw" / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\0")
    assert hash_of(PLACED, other) != first


def test_where_an_image_folder_lies_does_not_count_and_its_content_does(copies: tuple[Path, Path]) -> None:
    folder = config_of(PLAIN, {"data": None}, {"data": {"use": "image_folder", "size": 8, "validation": 4}})
    one, other = ({"data": {"path": str(root / "pets")}} for root in copies)
    first = hash_of(folder, one)
    assert hash_of(folder, other) == first
    (copies[1] / "pets" / "bee" / "5.png").rename(copies[1] / "pets" / "bee" / "7.png")
    assert hash_of(folder, other) != first


def test_where_the_data_of_views_lies_does_not_count(copies: tuple[Path, Path]) -> None:
    views = {
        "data": {"augment": {"flip": {}}, "views": {"plain": {"augment": {}}}},
        "teachers": {"wide": {"use": "small", "input": "image@plain"}},
        "losses": {"kd": {"use": "kd"}},
    }
    found = [prepared(PLACED, views, {"data": {"root": str(root)}}) for root in copies]
    assert [view for prepared in found for view in prepared.reached.views] == ["plain", "plain"]
    assert found[0].hash == found[1].hash


def test_where_data_that_is_handed_over_lies_does_not_count(copies: tuple[Path, Path]) -> None:
    made = (TorchvisionDataset(TorchvisionDataset.Config("FashionMNIST", str(root))) for root in copies)
    assert len({prepared(PLAIN, options=quiet(data=dataset)).hash for dataset in made}) == 1


def own_plugin(path: Path, value: str) -> str:
    path.write_text(
        f"""
from dataclasses import dataclass
import kdx


class Mine(kdx.Loss):
    name = "mine"
    inputs = {{"student": "student.logits"}}

    def forward(self, student):
        return student.square().mean() * {value}


class Step(kdx.Schedule):
    name = "mine"

    def at(self, clock):
        return {value}


@kdx.hookimpl
def kdx_losses():
    return [Mine]


@kdx.hookimpl
def kdx_schedules():
    return [Step]
"""
    )
    return str(path)


@pytest.mark.parametrize(
    ("layer", "counts"),
    [
        ({"losses": {"mine": {"use": "mine"}}}, True),
        ({"losses": {"kd": {"weight": {"use": "mine"}}}}, True),
        ({"train": {"lr": {"use": "mine"}}}, True),
        ({}, False),
    ],
    ids=["loss", "schedule of a knob", "schedule of the learning rate", "unused"],
)
def test_the_content_of_a_plugin_file_counts_where_it_is_used(
    tmp_path: Path, layer: dict[str, Any], counts: bool
) -> None:
    hashes = set()
    for value in ("0.5", "0.25"):
        plugins = [str(PLUGIN), own_plugin(tmp_path / "mine.py", value)]
        hashes.add(prepare(load_mapping(config_of(DISTIL, {"plugins": plugins}, layer)), quiet()).hash)
    assert len(hashes) == (2 if counts else 1)


def test_where_a_plugin_file_lies_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    shutil.copy(PLUGIN, tmp_path / "other" / PLUGIN.name)
    hashes = {
        prepare(load_mapping(config_of(DISTIL, {"plugins": [str(path)]})), quiet()).hash
        for path in (PLUGIN, tmp_path / "other" / PLUGIN.name)
    }
    assert len(hashes) == 1


def test_the_config_of_a_teacher_that_is_a_run_counts_but_not_its_name() -> None:
    def with_teacher(*layers: dict[str, Any]) -> str:
        run = config_of(TEACHER, *layers)
        return hash_of(
            DISTIL, {"teachers": {"wide": None}}, {"teachers": {"wide": {"run": run, "taps": {"mid": "second"}}}}
        )

    first = with_teacher()
    assert with_teacher({"name": "renamed"}) == first
    assert with_teacher({"train": {"lr": 0.01}}) != first
    assert with_teacher({"seed": 5}) != first
    assert first != hash_of(DISTIL)


def checkpoint(path: Path, seed: int) -> str:
    found = prepared(BASE)
    save_weights(build_model(found.spec.teachers["wide"], found.splits.facts, seed).net, path)
    return str(path)


def test_the_content_of_a_checkpoint_counts_and_its_place_does_not(tmp_path: Path) -> None:
    def with_weights(name: str, seed: int) -> str:
        return hash_of(BASE, {"teachers": {"wide": {"checkpoint": checkpoint(tmp_path / name, seed)}}})

    first = with_weights("a.safetensors", 0)
    assert with_weights("b.safetensors", 0) == first
    assert with_weights("a.safetensors", 1) != first


def test_a_checkpoint_that_is_not_there_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"teachers\.wide\.checkpoint: cannot read .*none\.pt: No such file"):
        prepared(BASE, {"teachers": {"wide": {"checkpoint": "none.pt"}}})


def test_the_content_of_an_onnx_teacher_counts(tmp_path: Path) -> None:
    path = tmp_path / "teacher.onnx"
    hashes = []
    for content in (b"one", b"two", b"one"):
        path.write_bytes(content)
        onnx = {"teachers": {"wide": {"use": "onnx", "path": str(path)}}, "losses": {"hint": None}, "align": None}
        hashes.append(hash_of(DISTIL, onnx))
    assert hashes[0] == hashes[2] != hashes[1]


def test_a_network_is_known_by_its_structure_weights_and_all_buffers() -> None:
    def net(seed: int = 0, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(2, 2), act(), nn.BatchNorm1d(2))

    first = network_digest(net())
    assert network_digest(net()) == first
    assert network_digest(net(1)) != first
    assert network_digest(net(act=nn.GELU)) != first
    moved, hidden = net(), net()
    moved[2].running_mean += 1  # type: ignore[operator]
    assert network_digest(moved) != first
    hidden.register_buffer("scale", torch.ones(1), persistent=False)
    other = net()
    other.register_buffer("scale", torch.zeros(1), persistent=False)
    assert network_digest(hidden) != network_digest(other)


def test_the_digest_of_a_file_is_that_of_its_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a", "here") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_environment_tells_what_a_person_needs_to_repeat_a_run() -> None:
    found = prepared(BASE)
    about = environment(found.spec, found.reached, hash="abc", needs={"wide": "wide-1"}, device="cpu", precision="fp32")
    assert json.loads(json.dumps(about)) == about
    assert about["hash"] == "abc"
    assert about["seed"] == 0
    assert about["libraries"]["torch"] == torch.__version__.partition("+")[0] or about["libraries"]["torch"]
    plugins = {plugin["name"]: plugin["digest"] for plugin in about["plugins"]}
    assert {"kdx.builtin", "small_plugin.py", "kdx_logit", "kdx_feature"} == set(plugins)
    assert plugins["small_plugin.py"] == f"sha256:{file_digest(PLUGIN, '')}"
    assert about["needs"] == {"wide": "wide-1"}
    assert about["device"] == "cpu"
    assert about["precision"] == "fp32"


def test_only_plugins_in_use_are_named() -> None:
    found = prepared(DISTIL, {"losses": {"kd": None, "hint": None}})
    assert [plugin.name for plugin in used_plugins(found.spec, found.reached)] == ["kdx.builtin", "small_plugin.py"]


def test_the_plugins_of_the_parts_of_a_net_count() -> None:
    parts = {"one": {"use": "cifar", "model": "resnet8"}, "other": {"use": "small"}}
    fused = {"student": {"use": "late_fusion", "parts": parts}, "losses": {"ce": {"use": "cross_entropy"}}}
    config = load_mapping(config_of({**PLAIN, **fused}))
    found = prepare(config, quiet(), registry=registry())
    named = {plugin.name for plugin in used_plugins(found.spec, found.reached)}
    assert named == {"kdx.builtin", "kdx_two_stream", "kdx_cifar_nets", "small_plugin.py"}
    newer = [
        replace(plugin, digest="2.0") if plugin.name == "kdx_cifar_nets" else plugin for plugin in registry().plugins
    ]
    assert prepare(config, quiet(), registry=replace(registry(), plugins=tuple(newer))).hash != found.hash
