"""Hooks, docs and tests in step, and what is promised of every public name, component and file."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any

import pluggy
import pytest
import torch

import kdx
from kdx import hookspecs
from kdx.api import RunResult
from kdx.components import Metric, Node
from kdx.plugins import KINDS, Entry, Registry, discover
from kdx.testing import tiny_run

ROOT = Path(kdx.__file__).parents[1]
TESTS = Path(__file__).parent
STRANGER = TESTS / "stranger_plugin.py"
HOOKS = {name: spec for name, spec in vars(hookspecs).items() if name.startswith("kdx_")}
CHECKS = {
    "targets": "check_target",
    "aligners": "check_aligner",
    "losses": "check_loss",
    "models": "check_model",
    "schedules": "check_schedule",
}
"""The check of each kind that has one; data sets, metrics and updaters are tested without."""
WITHOUT_CHECK = {
    "module": "any net at all",
    "onnx": "frozen, and the checks train",
    "stored": "no net at all",
    "vectors": "no weights, and the checks train",
}
"""Models that no check can try."""
WRITTEN_ONLY = {("module", "digest"): "stands for the weights in the hash of a run"}
"""Options that decide something although no component reads them."""
SHAPE_OR_SOURCE = re.compile(r"\[B|0-d|\bshape|\bmaps?\b|\btokens\b|\bvectors?\b|per sample|\b(?:19|20)\d\d\b", re.I)


@cache
def registry() -> Registry:
    return discover()


def shipped() -> list[Entry]:
    """Every component that comes with kdx."""
    return [entry for entry in registry().entries.values() if home(entry).split(".")[0] in ("kdx", "kdx_plugins")]


def home(entry: Entry) -> str:
    return str(entry.component.__module__)


def entry_id(entry: Entry) -> str:
    return f"{entry.kind}-{entry.component.name}"


def argument(hook: str) -> str:
    """How the docs write a hook: with the names of its arguments."""
    return f"{hook}({', '.join(inspect.signature(HOOKS[hook]).parameters)})"


@cache
def sources() -> Mapping[Path, str]:
    """The text of every file of tests but this one."""
    return {path: path.read_text(encoding="utf-8") for path in TESTS.glob("test_*.py") if path != Path(__file__)}


@pytest.fixture(scope="module")
def stranger_run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run in which every part but the plain loss `kd` is a stranger's."""
    folder = tmp_path_factory.mktemp("stranger")
    plugin = shutil.copy(STRANGER, folder / "stranger.py")
    net = {"use": "perceptron", "taps": {"mid": "0"}}
    close = {"use": "closeness", "inputs": {"student": "mid", "teacher": "teacher.mid"}, "weight": {"use": "halving"}}
    return tiny_run(
        folder,
        plugins=[plugin],
        data={"use": "stripes"},
        student=net,
        teachers={"teacher": {**net, "width": 16}},
        targets={"calm": {"use": "calm"}},
        align={"mid": {"use": "stretch", "source": "student.mid", "like": "teacher.mid"}},
        losses={"kd": {"use": "kd", "inputs": {"teacher": "calm.logits"}}, "close": close},
        metrics={"hits": {}},
        train={"updater": {"use": "sign"}, "updates": 4, "batch": 20, "lr": 0.01, "monitor": "hit_rate"},
    )


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_its_argument(hook: str) -> None:
    page = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    assert f"`{argument(hook)}`" in page


def test_the_docs_name_no_hook_that_does_not_exist() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        named = set(re.findall(r"\b(kdx_[a-z_]+)\(", page.read_text(encoding="utf-8")))
        assert named <= set(HOOKS), page.name


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_says_when_it_is_called_and_takes_one_argument_at_most(hook: str) -> None:
    assert "Called" in (HOOKS[hook].__doc__ or "")
    assert len(inspect.signature(HOOKS[hook]).parameters) == (hook.removeprefix("kdx_") not in KINDS)


def test_the_stranger_implements_every_hook() -> None:
    tree = ast.parse(STRANGER.read_text(encoding="utf-8"))
    assert {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} >= set(HOOKS)


def test_every_hook_is_called_in_the_order_of_a_run(stranger_run: RunResult) -> None:
    lines = (stranger_run.folder.parent / "calls.txt").read_text().splitlines()
    terms = "ce, close, kd, total"
    assert [line for line in lines if not line.startswith("calibrate")] == [
        "plan teacher",
        "plan teacher",
        "start tiny 4",
        f"step 1 {terms}",
        f"step 2 {terms}",
        "eval 2 student hit_rate",
        f"step 3 {terms}",
        f"step 4 {terms}",
        "eval 4 student hit_rate",
        "end tiny",
    ]
    assert lines.index("calibrate ['mask', 'student', 'teacher']") == lines.index("start tiny 4") + 1


def test_a_strangers_plugin_can_supply_every_kind(stranger_run: RunResult) -> None:
    plan = (stranger_run.folder / "plan.txt").read_text()
    config = (stranger_run.folder / "config.yaml").read_text()
    supplied = discover([str(stranger_run.folder.parent / "stranger.py")]).entries.items()
    names = {kind: name for (kind, name), entry in supplied if entry.plugin.name == "stranger.py"}
    assert names.keys() == KINDS.keys()
    assert [name for kind, name in names.items() if name not in (config if kind == "datasets" else plan + config)] == []


def test_a_run_made_of_strange_parts_learns_and_is_deployed(stranger_run: RunResult) -> None:
    assert stranger_run.metrics["hit_rate"] > 0.8
    logits = stranger_run.student()(torch.rand(3, 1, 8, 8))
    assert logits.shape == (3, 2)


@pytest.mark.parametrize("kind", ["models", "targets", "aligners", "losses", "schedules"])
def test_a_strangers_components_pass_the_checks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import kdx.testing

    spec = importlib.util.spec_from_file_location("stranger_checked", STRANGER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "note", lambda text: None)
    (component,) = getattr(module, f"kdx_{kind}")()
    arguments: dict[str, Any] = {
        "aligners": {"source": (4,), "like": (6,)},
        "losses": {"shapes": {"student": (4,), "teacher": (4,)}, "zero_at_equality": True},
    }
    getattr(kdx.testing, CHECKS[kind])(component, **arguments.get(kind, {}))


def test_a_plugin_is_found_whatever_kind_it_supplies() -> None:
    assert {kind for kind, _ in registry().entries} == set(KINDS)
    assert not registry().failures


@pytest.mark.parametrize("name", [name for name in kdx.__all__ if name != "__version__"])
def test_every_public_name_is_explained(name: str) -> None:
    value = getattr(kdx, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        doc = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        assert doc, f"kdx.{name} has no docstring"
        assert not doc.startswith(f"{value.__name__}("), f"kdx.{name} has only the docstring that dataclasses make"
    else:
        assert name in explained(kdx._HOMES[name]), f"no string stands below {name} in {kdx._HOMES[name]}"


def explained(module: str) -> set[str]:
    """The names in a module whose assignment is followed by a string."""
    body = ast.parse(inspect.getsource(importlib.import_module(module))).body
    found = set()
    for node, after in pairwise(body):
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("entry", shipped(), ids=entry_id)
def test_every_component_is_described(entry: Entry) -> None:
    component = entry.component
    doc = vars(component).get("__doc__") or ""
    first = inspect.cleandoc(doc).partition("\n")[0]
    assert len(first) > 20, f"{component.name} has no docstring of its own"
    if issubclass(component, (Node, Metric)):
        assert SHAPE_OR_SOURCE.search(doc), f"the docstring of {component.name} names neither shapes nor a source"


@pytest.mark.parametrize("entry", shipped(), ids=entry_id)
def test_every_component_has_a_test(entry: Entry) -> None:
    """A file of tests names its class, and tries its contract where there is a check for its kind."""
    name = entry.component.__name__
    check = "" if entry.component.name in WITHOUT_CHECK else CHECKS.get(entry.kind, "")
    found = [
        path for path, text in sources().items()
        if re.search(rf"\b{name}\b", text) and (f"{check}(" in text or f"{check}," in text or not check)
    ]  # fmt: skip
    assert found, f"no file of tests names {name} ({home(entry)}) and calls {check or 'it'}"


@pytest.mark.parametrize(
    ("entry", "option"),
    [
        (entry, item.name)
        for entry in shipped()
        for item in fields(entry.component.Config)
        if (entry.component.name, item.name) not in WRITTEN_ONLY
    ],
    ids=lambda value: entry_id(value) if isinstance(value, Entry) else value,
)
def test_every_option_is_read(entry: Entry, option: str) -> None:
    component = entry.component
    classes = [*component.__mro__, *component.Config.__mro__]
    modules = {kind.__module__ for kind in classes if kind.__module__.startswith(("kdx.builtin", "kdx_plugins"))}
    assert any(option in read_in(module) for module in modules), f"nothing in {modules} reads {component.name}.{option}"


@cache
def read_in(module: str) -> set[str]:
    """The attributes that a module reads, also through `getattr(config, name)` in a loop over names."""
    nodes = list(ast.walk(ast.parse(inspect.getsource(importlib.import_module(module)))))
    found = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    for node in nodes:
        if isinstance(node, (ast.DictComp, ast.ListComp, ast.GeneratorExp)) and "getattr(" in ast.unparse(node):
            loops = [ast.unparse(loop.iter) for loop in node.generators]
            found |= {word for loop in loops for word in re.findall(r"'(\w+)'", loop)}
    return found


def test_with_all_plugins_blocked_a_plain_run_still_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [point for point in entry_points(group="kdx") if point.value.startswith("kdx_plugins.")]
    assert points
    for name in ["kdx_plugins", *(point.value for point in points)]:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    assert discover().failures.keys() >= {point.name for point in points}
    assert "accuracy" in tiny_run(tmp_path, teachers={"teacher": {"use": "timm", "model": "resnet18"}}).metrics


def test_installed_plugins_can_be_left_out(tmp_path: Path) -> None:
    tiny_run(tmp_path, overrides=["installed_plugins=false", "train.updates=1"])
    with pytest.raises(kdx.PluginError, match="no losses component is named 'kd'"):
        tiny_run(tmp_path, overrides=["installed_plugins=false"], losses={"kd": {"use": "kd"}})


@pytest.mark.parametrize(
    "path", [*(ROOT / "kdx").rglob("*.py"), *(ROOT / "plugins").glob("*.py")], ids=lambda path: path.stem
)
def test_a_file_is_short_enough_to_be_read(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400, f"{path.name} has {len(lines)} lines; one idea per file"


def test_every_shipped_plugin_has_an_entry_point() -> None:
    listed = {point.value for point in entry_points(group="kdx") if point.value.startswith("kdx_plugins.")}
    assert listed == {f"kdx_plugins.{path.stem}" for path in (ROOT / "plugins").glob("*.py")}


def test_hook_markers_belong_to_one_project() -> None:
    assert isinstance(kdx.hookimpl, pluggy.HookimplMarker)
    assert kdx.hookimpl.project_name == hookspecs.hookspec.project_name == discover().manager.project_name


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("build", "setuptools"))), reason="needs build, setuptools")
def test_a_wheel_lists_its_entry_points(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("kdx", "plugins"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        points = wheel.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    for plugin in (ROOT / "plugins").glob("*.py"):
        assert f"= kdx_plugins.{plugin.stem}\n" in points
        assert f"kdx_plugins/{plugin.name}" in names
    assert "kdx = kdx.cli:main" in points
