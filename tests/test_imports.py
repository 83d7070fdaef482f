"""Imports go one way, plugins see public names only, and `import kdx` is quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import kdx

ROOT = Path(kdx.__file__).parent
PLUGINS = ROOT.parent / "plugins"
LAYERS = """
    errors formats page statistics markdown figures
    garbage stopping types files options config randomness heads sections worked rough
    cache_options
    cache
    components ranges devices class_choice group
    distributed synced_norm shards fused
    updater fused_distance parallel locks
    authoring hookspecs taps data optim measure checkpoint
    result tap_list views seats loader
    history standings comparable
    builtin.layouts builtin.augment builtin.schedules builtin.losses builtin.metrics builtin.models builtin.updaters \
        builtin.pictures builtin.watchers builtin.spectra builtin.stamps builtin.text_vectors
    builtin.aligners builtin.image_data builtin.audio_augment
    builtin.audio_data builtin.image_folder builtin.sound_files
    builtin.pair_files builtin.spoken_digits builtin.tensor_data builtin.timm_images builtin.torchvision_images
    builtin.audio_folder builtin.paired builtin.tuxpaint
    builtin.images
    builtin builtin.make_fashion_mnist
    builtin.make_spoken_digits
    plugins
    spec catalogue presence watching
    calls trial
    recall reach probe shown guard gaps streams
    storable wiring timing
    plan identity
    cache_key plots_shown report_teachers batched backends_graph nonfinite
    backends
    spread cache_search joint one_graph
    modules runtime table deploy plots report_text cache_targets
    cache_fill cache_import feed student report functional diagnosis memory
    loop
    agreement
    outcome ways preflight derive runtime_choice micro_batch
    resume overlap
    saving
    runs
    api init reference study fanout tune
    study_table findings executors tune_trials
    processes ray_executor tune_plots
    tune_jobs
    study_plots study_latex study_text study_live
    study_report tune_report
    tiny bench tune_command cache_command halves held_graph
    testing cli
    __main__
"""
"""From what imports nothing to what a person starts. A module imports from the lines above its own only."""
RANKS = {
    name: rank
    for rank, line in enumerate(LAYERS.replace("\\\n", "").strip().splitlines())
    for name in line.split()
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of kdx by its name without `kdx.`, except the lazy list of public names."""
    found = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}
    del found["__init__"]
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Everything that a file imports, also inside of functions, with the line; not what is for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_checkers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} is a relative import"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}".removeprefix("kdx.")
                yield (f"kdx.{inner}" if inner in RANKS else node.module), node.lineno


def test_every_module_has_a_place_in_the_order() -> None:
    assert set(modules()) == set(RANKS)


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_from_below(name: str) -> None:
    path = modules()[name]
    for imported, line in imports(path):
        inner = imported.removeprefix("kdx.")
        if imported == "kdx" or not imported.startswith("kdx."):
            assert imported != "kdx" or RANKS[name] >= RANKS["cli"], f"{path.name}:{line} imports the public names"
        else:
            assert inner in RANKS, f"{path.name}:{line} imports {imported}, which has no place in the order"
            assert RANKS[inner] < RANKS[name], f"{path.name}:{line} imports {imported}, which is not below {name}"


@pytest.mark.parametrize("name", modules())
def test_the_engine_imports_no_shipped_plugin(name: str) -> None:
    for imported, line in imports(modules()[name]):
        assert imported.partition(".")[0] not in ("kdx_plugins", "plugins"), f"{name}:{line} imports {imported}"


@pytest.mark.parametrize("path", sorted(PLUGINS.glob("*.py")), ids=lambda path: path.stem)
def test_a_shipped_plugin_imports_public_names_and_libraries_only(path: Path) -> None:
    for imported, line in imports(path):
        assert not imported.startswith(("kdx.", "kdx_plugins", "plugins", "tests")), f"line {line} imports {imported}"


def test_public_names_are_all_there_and_listed_alike() -> None:
    for name in kdx.__all__:
        assert getattr(kdx, name) is not None
    assert set(kdx.__all__) <= set(dir(kdx))
    with pytest.raises(AttributeError, match="module 'kdx' has no attribute 'nothing'"):
        kdx.nothing  # noqa: B018


def test_type_checkers_and_users_see_the_same_public_names() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom)
                for alias in node.names}  # fmt: skip
    assert declared == {name: module for name, module in kdx._HOMES.items() if name != "__version__"}


@cache
def loaded_after(statement: str) -> set[str]:
    program = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_kdx_alone_loads_neither_torch_nor_the_engine() -> None:
    names = loaded_after("import kdx")
    assert not {"torch", "timm", "numpy", "pluggy", "omegaconf", "kdx.components"} & names


def test_the_errors_can_be_named_without_torch() -> None:
    assert "torch" not in loaded_after("from kdx import ConfigError")


READY = "import kdx.runs, kdx.builtin.metrics, kdx.builtin.models"


def test_no_plugin_is_loaded_before_a_registry_is_made() -> None:
    assert not {name for name in loaded_after(READY) if name.startswith("kdx_plugins")}


def test_what_draws_tests_and_measures_is_not_loaded_before_it_is_used() -> None:
    assert not {"matplotlib", "scipy", "markdown_it", "torchmetrics", "timm", "torchvision"} & loaded_after(READY)
