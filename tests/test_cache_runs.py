"""Runs with cached teachers: the same student, no teacher in the step, and refusals of what no cache can hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import CASCADE, DISTIL, PLAIN, PLUGIN, config_of, lines_of, prepared, quiet, weights_of
from torch import Tensor, nn

from kdx.config import load_mapping
from kdx.errors import ConfigError, KdxError
from kdx.plugins import discover
from kdx.runs import Prepared, build_plan, carry_out, prepare

FIXED = {"data": {"flip": False}}
"""No augmentation."""
CACHED = {"teachers": {"wide": {"cache": True}}}


def caches_in(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache").iterdir() if path.is_dir())


def same_weights(one: Path, other: Path) -> bool:
    mine, own = weights_of(one), weights_of(other)
    return mine.keys() == own.keys() and all(torch.equal(mine[name], own[name]) for name in mine)


def run_of(*layers: Any) -> Prepared:
    """A carried-out run."""
    found = prepared(*layers)
    carry_out(found, quiet())
    return found


@pytest.mark.parametrize("augmented", [FIXED, {"data": {"views": 3}}], ids=["fixed", "three views"])
def test_a_cache_of_float32_trains_the_same_student_to_the_bit(tmp_path: Path, augmented: dict[str, Any]) -> None:
    live = run_of(DISTIL, augmented, {"out": str(tmp_path / "live")})
    cached = run_of(DISTIL, augmented, CACHED, {"out": str(tmp_path / "cached")})
    assert live.hash == cached.hash
    assert same_weights(live.folder, cached.folder)
    assert lines_of(live.folder) == lines_of(cached.folder)
    (folder,) = caches_in(tmp_path / "cached")
    assert json.loads((folder / "meta.json").read_text())["fields"].keys() == {"logits", "mid"}


def test_a_complete_cache_leaves_no_weights_of_the_teacher_in_the_plan(tmp_path: Path) -> None:
    found = run_of(DISTIL, FIXED, CACHED, {"out": str(tmp_path)})
    again = prepared(DISTIL, FIXED, CACHED, {"out": str(tmp_path), "train": {"lr": 0.01}})
    plan = build_plan(again, quiet(), trained=True)
    assert again.hash != found.hash
    assert [len([*call.module.parameters()]) for call in plan.teacher_calls] == [0]
    assert plan.shapes["wide.logits"] == (3,)


def test_the_plan_says_which_answers_are_stored_and_from_where_they_are_read(tmp_path: Path) -> None:
    found = prepared(DISTIL, FIXED, CACHED, {"out": str(tmp_path)})
    later = "wide: its answers for training are stored before it, and read from then on"
    assert later in build_plan(found, quiet(), trained=False).notes
    assert later not in build_plan(prepared(DISTIL, FIXED), quiet(), trained=False).notes
    carry_out(found, quiet())
    (folder,) = caches_in(tmp_path)
    notes = build_plan(found, quiet(), trained=False).notes
    assert f"wide: its answers for training are read from {folder}" in notes
    assert later not in notes


COUNTING = """
import kdx, torch
from dataclasses import dataclass

BUILT, RAN = [], []

class Net(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = torch.nn.Linear(64, classes)

    def forward(self, images):
        RAN.append(len(images))
        return self.head(images.flatten(1))

class Counting(kdx.Model):
    name = "counting"

    @dataclass(frozen=True)
    class Config:
        pass

    def build(self):
        BUILT.append(self)
        return kdx.Network(Net(len(self.facts.classes)), self.streams)

@kdx.hookimpl
def kdx_models():
    return [Counting]
"""


def test_a_teacher_whose_cache_is_complete_is_neither_built_nor_called_in_training(tmp_path: Path) -> None:
    plugin = tmp_path / "counting.py"
    plugin.write_text(COUNTING)
    plugins = [*DISTIL["plugins"], str(plugin)]
    teacher = {"wide": {"use": "counting", "cache": True}}
    layers = [config_of(DISTIL, FIXED), {"plugins": plugins, "align": None, "losses": {"hint": None}}]
    config = config_of(*layers, {"teachers": None, "out": str(tmp_path)})
    config["teachers"] = teacher
    registry = discover(plugins)
    module = registry.entries["models", "counting"].component.build.__globals__
    built, ran = module["BUILT"], module["RAN"]

    def training_of(**changes: Any) -> tuple[int, int]:
        """How often the teacher was built and called before the first student was evaluated."""
        built.clear()
        ran.clear()
        counts = [(0, 0)]

        def look() -> bool:
            counts.append((len(built), len(ran)))
            return False

        how = quiet(stop=look)
        carry_out(prepare(load_mapping({**config, **changes}), how, registry=registry), how)
        return counts[-1]

    built_first, ran_first = training_of()
    assert built_first > 0
    assert ran_first > 0
    assert training_of(name="again", train={**config["train"], "lr": 0.01}) == (0, 0)
    assert training_of(teachers={"wide": {"use": "counting"}}, name="live", seed=1)[1] > config["train"]["updates"]


def test_each_change_of_what_decides_the_answers_names_another_cache(tmp_path: Path) -> None:
    base = config_of(DISTIL, CACHED, {"out": str(tmp_path), "data": {"views": 2}})
    folder = prepared(base).caches["wide"].folder
    changed: dict[str, dict[str, Any]] = {
        "the weights": {"seed": 1},
        "the data": {"data": {"size": 60}},
        "the samples": {"data": {"validation": 6}},
        "the augmentation": {"data": {"flip": False}},
        "the views": {"data": {"views": 3}},
        "the model": {"teachers": {"wide": {"width": 6}}},
        "the fields": {"losses": {"hint": None}, "align": None},
        "the tap": {"teachers": {"wide": {"taps": {"mid": "first"}}}},
        "the form": {"teachers": {"wide": {"cache": {"dtype": "float16"}}}},
        "the precision": {"runtime": {"precision": "bf16"}},
    }
    folders = {what: prepared(base, layer).caches["wide"].folder for what, layer in changed.items()}
    assert len({folder, *folders.values()}) == 1 + len(changed)
    same: dict[str, dict[str, Any]] = {
        "the student": {"student": {"width": 5}},
        "the losses": {"losses": {"kd": {"temperature": 8}}},
        "the batch": {"train": {"batch": 6}},
        "the workers": {"runtime": {"workers": 1}},
    }
    assert {prepared(base, layer).caches["wide"].folder for layer in same.values()} == {folder}


def test_the_code_of_the_data_and_of_parts_of_a_teacher_counts(tmp_path: Path) -> None:
    fused = {"use": "late_fusion", "parts": {name: {"use": "small", "input": "image"} for name in ("one", "two")}}
    teachers = {"whole": {"use": "small"}, "fused": {**fused, "input": "image"}}
    said = []
    for name, text in (("as it is", PLUGIN.read_text()), ("changed", PLUGIN.read_text().replace("0.5", "0.6"))):
        plugin = tmp_path / name / PLUGIN.name
        plugin.parent.mkdir()
        plugin.write_text(text)
        kds = {one: {"use": "kd", "inputs": {"teacher": f"{one}.logits"}} for one in teachers}
        config = config_of(PLAIN, FIXED, {"plugins": [str(plugin)], "teachers": teachers, "losses": kds})
        config["teachers"] = {one: {**model, "cache": True} for one, model in teachers.items()}
        said.append(prepare(load_mapping(config), quiet(), registry=discover([str(plugin)])).caches)
    first, second = said
    assert first["fused"].parts["plugin"].keys() == {"kdx_two_stream", PLUGIN.name}
    for item, part in (("whole", "data_plugin"), ("fused", "plugin")):
        assert first[item].parts[part] != second[item].parts[part]


def test_a_fixed_sample_has_one_cache_for_all_seeds_of_a_trained_teacher(tmp_path: Path) -> None:
    layers = (CASCADE, FIXED, {"baseline": False, "teachers": {"wide": {"cache": True, "run": FIXED}}})
    one, other = (prepared(*layers, {"seed": seed, "out": str(tmp_path)}) for seed in (0, 1))
    assert one.caches["wide"].folder == other.caches["wide"].folder
    views = (*layers, {"data": {"flip": True, "views": 2}, "teachers": {"wide": {"run": {"data": {"flip": True}}}}})
    one, other = (prepared(*views, {"seed": seed, "out": str(tmp_path)}) for seed in (0, 1))
    assert one.caches["wide"].folder != other.caches["wide"].folder


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([CACHED], "teachers.wide.cache: image is augmented anew in each epoch.* data.views: 8"),
        ([CACHED, {"data": {"views": 1}}], "one augmented version of each sample.* overfits .*one_view: true"),
        ([CACHED, {"teachers": {"wide": {"trainable": True}}}], "only frozen teachers"),
        ([{"student": {"cache": True}}], "student.cache: only frozen teachers"),
        (
            [FIXED, {"teachers": {"wide": {"cache": {"top": 2}}}, "losses": {"kd": None}}],
            "teachers.wide.cache.top: it is for logits, and nothing reads those",
        ),
    ],
)
def test_what_no_cache_can_hold_is_refused_before_anything_trains(layers: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(DISTIL, *layers)


def test_one_view_of_augmented_samples_is_stored_where_it_is_asked_for_by_name(tmp_path: Path) -> None:
    once = {"teachers": {"wide": {"cache": {"one_view": True}}}, "data": {"views": 1}}
    live = run_of(DISTIL, {"data": {"views": 1}}, {"out": str(tmp_path / "live")})
    cached = run_of(DISTIL, once, {"out": str(tmp_path / "cached")})
    assert same_weights(live.folder, cached.folder)


def test_more_classes_than_there_are_cannot_be_kept(tmp_path: Path) -> None:
    found = prepared(DISTIL, FIXED, {"teachers": {"wide": {"cache": {"top": 3}}}, "out": str(tmp_path)})
    with pytest.raises(KdxError, match=r"teachers.wide.cache.top: found 3, expected fewer than the 3 classes"):
        carry_out(found, quiet())


@pytest.mark.parametrize("form", [{"dtype": "float16"}, {"top": 1}], ids=["float16", "top"])
def test_what_a_store_loses_counts_in_the_hash_and_moves_the_student_a_little(
    tmp_path: Path, form: dict[str, Any]
) -> None:
    plain = {"losses": {"hint": None}, "align": None, "out": str(tmp_path)}
    live = run_of(DISTIL, FIXED, plain)
    lossy = run_of(DISTIL, FIXED, plain, {"teachers": {"wide": {"cache": form}}})
    assert live.hash != lossy.hash
    mine, own = weights_of(live.folder), weights_of(lossy.folder)
    gaps = [float((mine[name] - own[name]).abs().max()) for name in mine if mine[name].is_floating_point()]
    assert 0 < max(gaps) < 0.1


class Centred(nn.Module):
    """Takes the mean of the batch away."""

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)[:, :3]
        return flat - flat.mean(0)


def test_an_answer_that_depends_on_the_batch_is_not_stored(tmp_path: Path) -> None:
    options = quiet(networks={"wide": Centred()})
    layers = (DISTIL, FIXED, {"losses": {"hint": None}, "align": None, "out": str(tmp_path)}, CACHED)
    with pytest.raises(KdxError, match=r"wide.logits depends on the batch around a sample"):
        carry_out(prepared(*layers, options=options), options)


def test_a_module_from_python_is_cached_by_its_weights(tmp_path: Path) -> None:
    layers = (DISTIL, FIXED, {"losses": {"hint": None}, "align": None, "out": str(tmp_path)}, CACHED)
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(64, 3)) for _ in range(2)]
    folders = []
    for net in nets:
        options = quiet(networks={"wide": net})
        found = prepared(*layers, options=options)
        carry_out(found, options)
        folders.append(found.caches["wide"].folder)
    assert folders[0] != folders[1]
    assert len(caches_in(tmp_path)) == 2
