"""Every config that comes with kdx can be planned, and those of methods say where they are from."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import yaml
from stamp_folder import stamps

import kdx
from kdx.config import load
from kdx.errors import DataError
from kdx.plan import Plan
from kdx.plugins import Registry, discover
from kdx.runs import Options, build_plan, prepare

CONFIGS = Path(kdx.__file__).parents[1] / "configs"
METHODS = [path for path in sorted((CONFIGS / "methods").glob("*.yaml")) if path.stem != "base"]
CIFAR = sorted((CONFIGS / "cifar").rglob("*.yaml"))
SMALL = ("resnet56_resnet20", "wrn_40_2_wrn_16_2", "resnet20")
"""The configs of the benchmark whose nets are built in a second or two."""
RECIPES = {"funmatch": {"use": "kd", "inputs": {"student": "student@mixed.logits", "teacher": "cnn@mixed.logits"}}}
"""What in the config of a method that is a way to use others, without a component of its own, makes it that method."""
SOURCE = re.compile(r"\([A-Z][^()]*, (19|20)\d\d\)")


def is_whole(path: Path) -> bool:
    """Whether a config is made to be run. Those called base, and those without a student, are there to be extended."""
    return path.stem != "base" and "student" in load(path)


def extended() -> set[Path]:
    """The configs that others are laid over."""
    found = set()
    for path in CONFIGS.rglob("*.yaml"):
        name = yaml.safe_load(path.read_text(encoding="utf-8")).get("extends")
        if name is not None:
            found.add((path.parent / name).resolve())
    return found


STUDIES = sorted((CONFIGS / "ablations").glob("*.yaml"))
"""They are planned in test_study.py, and searches in test_tune.py."""
STAMPS = [path for path in sorted(CONFIGS.rglob("*.yaml")) if path not in STUDIES and is_whole(path)
          and load(path).get("data", {}).get("use") == "tuxpaint"]  # fmt: skip
"""Those of data that kdx does not bring, whose layout a small folder can have."""
OTHERS = [
    path
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path not in CIFAR and path not in STUDIES and path not in STAMPS and is_whole(path)
]
QUICK = {"multi_teacher", "kd", "fitnet", "crd"}


def name_of(path: Path) -> str:
    return path.relative_to(CONFIGS).with_suffix("").as_posix()


@functools.cache
def registry() -> Registry:
    return discover()


def plan_of(path: Path, *overrides: str) -> Plan:
    how = Options(quiet=True)
    found = prepare(load(path, ["baseline=false", *overrides]), how, registry=registry())
    return build_plan(found, how, trained=False)


@pytest.mark.parametrize(
    "path",
    [path if path.stem in QUICK else pytest.param(path, marks=pytest.mark.slow) for path in OTHERS],
    ids=name_of,
)
def test_a_config_can_be_planned(path: Path) -> None:
    plan = plan_of(path)
    assert not plan.unused or path.resolve() in extended(), f"no loss needs {plan.unused}"


@pytest.mark.parametrize("path", STAMPS, ids=name_of)
def test_a_config_of_stamps_can_be_planned_on_a_folder_of_them(path: Path, tmp_path: Path) -> None:
    plan = plan_of(path, f"data.root={stamps(tmp_path)}")
    assert not plan.unused, f"no loss needs {plan.unused}"


@pytest.mark.parametrize("path", CIFAR, ids=name_of)
def test_a_config_of_the_benchmark_lacks_nothing_but_the_data(path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="CIFAR100"):
        plan_of(path, f"data.root={tmp_path}")


@pytest.mark.parametrize(
    "path",
    [path if path.stem in SMALL else pytest.param(path, marks=pytest.mark.slow) for path in CIFAR],
    ids=name_of,
)
def test_a_config_of_the_benchmark_can_be_planned_on_other_images(path: Path) -> None:
    plan = plan_of(path, "data.use=fashion_mnist")
    assert set(plan.teachers) == ({"teacher"} if "_" in path.stem and path.parent.name == "cifar" else set())


def test_a_config_without_a_student_is_extended_by_another_one() -> None:
    for path in set(CONFIGS.rglob("*.yaml")) - set(STUDIES):
        assert is_whole(path) or path.resolve() in extended(), f"{name_of(path)} has no student, and nothing extends it"


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_a_config_of_a_method_uses_what_it_is_named_after(path: Path) -> None:
    """The component of that name, the value of an option, as a divergence of `kd`, or what its recipe says."""
    config = load(path)
    nodes = {**config.get("targets", {}), **config["losses"]}
    recipe = RECIPES.get(path.stem)
    assert any(
        path.stem in node.values() if recipe is None else recipe.items() <= node.items() for node in nodes.values()
    ), f"{path.name} uses no {path.stem}"


@pytest.mark.parametrize("path", METHODS, ids=name_of)
def test_a_config_of_a_method_begins_with_its_source(path: Path) -> None:
    comment = "".join(re.findall(r"\A(?:#.*\n)+", path.read_text(encoding="utf-8")))
    assert SOURCE.search(comment), f"{path.name} begins with {comment!r}, expected (Authors, year) there"


def test_each_component_for_several_teachers_has_a_config() -> None:
    page = (CONFIGS.parent / "docs" / "teachers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*\|(.*)\|$", page, flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    used = set()
    for path in (CONFIGS / "multi").glob("*.yaml"):
        config = load(path)
        used |= {node.get("use") for node in [*config.get("targets", {}).values(), *config["losses"].values()]}
    assert named
    assert named <= used, f"no config uses {', '.join(sorted(named - used))}"


def test_teachers_of_some_classes_have_not_seen_what_validates_the_student() -> None:
    found = prepare(load(CONFIGS / "multi" / "class_subset.yaml"), Options(quiet=True), registry=registry())
    assert found.splits.val is not None
    held_out = {*found.splits.val.positions.tolist()}
    assert set(found.needs) == {"first", "second"}
    for name, teacher in found.needs.items():
        assert not held_out & {*teacher.splits.train.positions.tolist()}, name
