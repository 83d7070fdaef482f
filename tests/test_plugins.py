"""Plugins: how they are found, what is refused, and who is named in an error."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdx import hookspecs
from kdx.components import (
    REQUIRED,
    Aligner,
    Component,
    Dataset,
    Knob,
    Loss,
    Metric,
    Model,
    Node,
    Schedule,
    Target,
)  # fmt: skip
from kdx.errors import PluginError
from kdx.plugins import KINDS, RUN_HOOKS, Plugin, Registry, check_component, compile_hook, discover
from kdx.updater import Updater

SHIPPED = {
    ("losses", "kd"): "kdx_logit",
    ("losses", "mse"): "kdx_feature",
    ("targets", "mean"): "kdx_ensemble",
    ("targets", "entropy_temperature"): "kdx_temperature",
}
HEAD = "from dataclasses import dataclass\nimport kdx\n"
HALVE = (
    HEAD
    + """
class Halve(kdx.Schedule):
    name = "NAME"
    @dataclass(frozen=True)
    class Config:
        value: float = 1.0
    def at(self, clock):
        return self.config.value / 2
@kdx.hookimpl
def kdx_schedules():
    return [Halve]
"""
)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def halve(path: Path, name: str = "halve") -> str:
    return write(path, HALVE.replace("NAME", name))


def refusal(path: Path, text: str) -> str:
    with pytest.raises(PluginError) as caught:
        discover([write(path, text)])
    return str(caught.value)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the import path, whose modules are forgotten afterwards."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


def distribution(folder: Path, name: str, points: dict[str, str], version: str = "1.2") -> None:
    """What an installed package leaves: its metadata with entry points."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = "".join(f"{point} = {target}\n" for point, target in points.items())
    (about / "entry_points.txt").write_text(f"[kdx]\n{lines}")


# --- where plugins are found


def test_built_in_components_are_found() -> None:
    registry = discover(installed=False)
    assert [plugin.name for plugin in registry.plugins] == ["kdx.builtin"]
    for kind, name in (
        ("losses", "cross_entropy"), ("models", "timm"), ("aligners", "auto"), ("schedules", "cosine"),
        ("datasets", "fashion_mnist"), ("metrics", "classification"), ("updaters", "plain"),
    ):  # fmt: skip
        assert registry.find(kind, name, "x").plugin.name == "kdx.builtin"


def test_installed_plugins_are_found_by_their_entry_points() -> None:
    registry = discover()
    assert registry.failures == {}
    for key, plugin in SHIPPED.items():
        entry = registry.entries[key]
        assert entry.plugin.name == plugin
        assert entry.plugin.origin.startswith("kdx ")
        assert entry.plugin.digest.startswith("sha256:")


def test_installed_plugins_can_be_left_out() -> None:
    with pytest.raises(PluginError, match="no losses component is named 'kd'"):
        discover(installed=False).find("losses", "kd", "losses.kd.use")


def test_a_file_is_a_plugin_and_its_config_dataclass_works(tmp_path: Path) -> None:
    entry = discover([halve(tmp_path / "mine.py")]).find("schedules", "halve", "x")
    assert entry.component(entry.component.Config(value=3.0)).at(None) == 1.5
    assert entry.plugin == Plugin("mine.py", str(tmp_path / "mine.py"), entry.plugin.digest)


def test_a_file_is_found_relative_to_the_folder(tmp_path: Path) -> None:
    halve(tmp_path / "mine.py")
    assert ("schedules", "halve") in discover(["mine.py"], folder=tmp_path).entries


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    first = discover([halve(tmp_path / "mine.py")])
    second = discover([halve(tmp_path / "mine.py", "third")])
    assert ("schedules", "third") in second.entries
    assert ("schedules", "halve") in first.entries
    assert first.plugins[-1].digest != second.plugins[-1].digest


def test_a_module_is_a_plugin(modules: Path) -> None:
    halve(modules / "my_schedules.py")
    entry = discover(["my_schedules"]).find("schedules", "halve", "x")
    assert entry.plugin.name == "my_schedules"


def test_a_plugin_that_is_named_twice_is_registered_once(modules: Path) -> None:
    path = halve(modules / "my_schedules.py")
    assert len(discover([path, path]).plugins) == len(discover([path]).plugins)
    assert len(discover(["my_schedules", "my_schedules"]).plugins) == len(discover([path]).plugins)


def test_a_module_that_is_installed_and_named_is_registered_once() -> None:
    assert discover(["kdx_plugins.logit"]).entries == discover().entries


def test_a_plugin_of_another_distribution_is_found(modules: Path) -> None:
    halve(modules / "stranger.py")
    distribution(modules, "stranger_kd", {"stranger": "stranger"})
    plugin = discover().find("schedules", "halve", "x").plugin
    assert (plugin.name, plugin.origin) == ("stranger", "stranger_kd 1.2")


def test_a_registry_is_a_value_of_its_own(tmp_path: Path) -> None:
    first = discover([halve(tmp_path / "mine.py")])
    second = discover()
    assert ("schedules", "halve") not in second.entries
    watcher = type("Watcher", (), {})()
    first.manager.register(watcher, name="watcher")
    assert not second.manager.is_registered(watcher)


# --- what is refused


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"^plugins\[1\]: there is no file .*gone.py"):
        discover([halve(tmp_path / "mine.py"), "gone.py"], folder=tmp_path)


def test_a_file_that_cannot_be_imported_is_refused_and_forgotten(tmp_path: Path) -> None:
    known = set(sys.modules)
    text = refusal(tmp_path / "mine.py", "import kdx\nraise ValueError('no luck')\n")
    assert text.startswith(f"plugins[0]: {tmp_path / 'mine.py'} could not be imported: ValueError: no luck")
    assert not [name for name in set(sys.modules) - known if "mine" in name]


def test_a_module_that_is_not_there_is_refused() -> None:
    with pytest.raises(PluginError, match=r"^plugins\[0\]: module 'no.such' could not be imported: ModuleNotFoundErr"):
        discover(["no.such"])


def test_a_module_without_a_hook_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path / "mine.py", "import kdx\n\ndef losses():\n    return []\n")
    assert text.startswith(f"plugin mine.py ({tmp_path / 'mine.py'}) implements no hook; known: kdx_aligners, ")


def test_a_place_that_is_no_option_of_the_data_is_refused(tmp_path: Path) -> None:
    source = (
        "import kdx\nfrom kdx.builtin.image_folder import ImageFolder\n"
        "class Folder(ImageFolder):\n    name = 'mine'\n    places = ('paht',)\n"
        "@kdx.hookimpl\ndef kdx_datasets():\n    return [Folder]\n"
    )
    text = refusal(tmp_path / "mine.py", source)
    assert text.endswith("datasets component Folder has paht among its places, which is no option of its Config")


def test_an_undecorated_hook_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path / "mine.py", "def kdx_losses():\n    return []\n")
    assert text.endswith("kdx_losses is not decorated: did you forget @kdx.hookimpl?")
    assert text.startswith(f"plugin mine.py ({tmp_path / 'mine.py'})")


def test_a_misspelt_hook_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    text = refusal(tmp_path / "mine.py", "import kdx\n@kdx.hookimpl\ndef kdx_loses():\n    return []\n")
    assert "kdx_loses is not a hook; did you mean 'kdx_losses'?" in text


@pytest.mark.parametrize("mark", ["wrapper=True", "hookwrapper=True", "tryfirst=True", "trylast=True"])
def test_wrappers_and_ordering_marks_are_refused(tmp_path: Path, mark: str) -> None:
    text = refusal(tmp_path / "mine.py", f"import kdx\n@kdx.hookimpl({mark})\ndef kdx_losses():\n    yield []\n")
    assert text.endswith("kdx_losses is a wrapper or asks for a place in the order; kdx has neither")


@pytest.mark.parametrize(
    ("hook", "found", "gives"),
    [("kdx_run_start", "info", "run"), ("kdx_step_end", "report, lr", "report"), ("kdx_losses", "config", ""),
     ("kdx_eval_end", "", "report")],
)  # fmt: skip
def test_a_hook_with_other_arguments_is_refused(tmp_path: Path, hook: str, found: str, gives: str) -> None:
    text = refusal(tmp_path / "mine.py", f"import kdx\n@kdx.hookimpl\ndef {hook}({found}):\n    return []\n")
    assert text.endswith(f"{hook} takes ({found}) but the hook gives ({gives})")


def test_two_plugins_that_supply_one_name_are_both_named(tmp_path: Path) -> None:
    one, two = halve(tmp_path / "one.py"), halve(tmp_path / "two.py")
    with pytest.raises(PluginError) as caught:
        discover([one, two])
    assert str(caught.value) == (
        f"two plugins supply schedules 'halve': one.py ({one}) and two.py ({two}); rename one of them"
    )


def test_a_plugin_cannot_take_the_name_of_a_built_in_component(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"two plugins supply schedules 'cosine': kdx.builtin \(built in\) and mine"):
        discover([halve(tmp_path / "mine.py", "cosine")])


def test_one_name_may_be_used_by_several_kinds(tmp_path: Path) -> None:
    registry = discover([halve(tmp_path / "mine.py", "kd")])
    assert registry.find("schedules", "kd", "x").plugin.name == "mine.py"
    assert registry.find("losses", "kd", "x").plugin.name == "kdx_logit"


def test_a_plugin_that_supplies_a_name_twice_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path / "mine.py", HALVE.replace("[Halve]", "[Halve, Halve]").replace("NAME", "halve"))
    assert text.endswith("supplies schedules 'halve' twice")


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = halve(tmp_path / "a" / "mine.py"), halve(tmp_path / "b" / "mine.py", "other")
    with pytest.raises(PluginError, match=r"^two plugins are called mine.py: .*a.mine.py and .*b.mine.py$"):
        discover([one, two])


def test_a_hook_that_raises_is_refused_with_what_it_raised(tmp_path: Path) -> None:
    text = refusal(tmp_path / "mine.py", "import kdx\n@kdx.hookimpl\ndef kdx_losses():\n    import no_such_thing\n")
    assert text.endswith("kdx_losses raised ModuleNotFoundError: No module named 'no_such_thing'")


def test_a_hook_that_gives_no_list_is_refused(tmp_path: Path) -> None:
    text = refusal(tmp_path / "mine.py", "import kdx\n@kdx.hookimpl\ndef kdx_losses():\n    return None\n")
    assert text.endswith("kdx_losses must return a list of classes")


# --- broken installed plugins


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("raise RuntimeError('out of luck')\n", "RuntimeError: out of luck"),
        ("import no_such_thing\n", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("def kdx_losses():\n    return []\n", "did you forget @kdx.hookimpl?"),
        ("def broken(:\n", "SyntaxError"),
    ],
)
def test_a_broken_installed_plugin_stops_nothing_and_is_shown_when_a_name_is_missing(
    modules: Path, text: str, problem: str
) -> None:
    write(modules / "broken.py", text)
    halve(modules / "zealous.py")
    distribution(modules, "strangers", {"broken": "broken", "zealous": "zealous"})
    registry = discover()
    assert registry.find("losses", "kd", "x").plugin.name == "kdx_logit"
    assert ("schedules", "halve") in registry.entries
    assert problem in registry.failures["broken"]
    with pytest.raises(PluginError) as caught:
        registry.find("losses", "broken_loss", "losses.x.use")
    assert str(caught.value).startswith("losses.x.use: no losses component is named 'broken_loss'")
    assert "\nplugin broken could not be loaded: " in str(caught.value)
    assert problem in str(caught.value)


def test_an_entry_point_that_is_no_module_is_kept_as_a_failure(modules: Path) -> None:
    halve(modules / "stranger.py")
    distribution(modules, "strangers", {"pointless": "stranger:Halve"})
    assert "is not a module" in discover().failures["pointless"]


def test_a_broken_plugin_that_the_config_names_raises(modules: Path) -> None:
    write(modules / "broken.py", "raise RuntimeError('out of luck')\n")
    distribution(modules, "strangers", {"broken": "broken"})
    with pytest.raises(PluginError, match=r"^plugins\[0\]: module 'broken' could not be imported: RuntimeError: out"):
        discover(["broken"])


def test_nothing_of_a_broken_plugin_stays(modules: Path) -> None:
    write(
        modules / "broken.py",
        HALVE.replace("NAME", "early") + "@kdx.hookimpl\ndef kdx_losses():\n    return [int]\n",
    )
    distribution(modules, "strangers", {"broken": "broken"})
    registry = discover()
    assert ("schedules", "early") not in registry.entries
    assert "broken" not in [plugin.name for plugin in registry.plugins]
    assert not registry.manager.has_plugin("broken")


# --- what a component must keep


@dataclass
class Thawed:
    """A config that may be changed."""


class Bare:
    """A config that is no dataclass."""


class Undecorated(Component.Config):
    """A config that adds an option, but not as a dataclass."""

    option: int = 1


@dataclass(frozen=True)
class Weighty:
    """A config with an option that every loss has."""

    weight: float = 1.0


FROZEN = "needs a nested `Config` that is a frozen dataclass"
FORWARD = {"forward": lambda self: None}
ONE = {"inputs": {"a": REQUIRED}, "forward": lambda self, a: None}
METRIC = {"compute": lambda self: {}}


def made(base: type[Component], **body: Any) -> type[Component]:
    return type("C", (base,), {"name": "c", **body})


@pytest.mark.parametrize(
    ("kind", "component", "problem"),
    [
        ("losses", made(Target, **FORWARD), "is not a subclass of kdx.Loss"),
        ("losses", made(Loss, **FORWARD, name=""), 'has no `name = "..."`'),
        ("losses", made(Loss, **FORWARD, name=3), 'has no `name = "..."`'),
        ("losses", made(Loss), "does not define forward"),
        ("models", made(Model), "does not define build"),
        ("schedules", made(Schedule), "does not define at"),
        ("losses", made(Loss, **FORWARD, Config=Thawed), FROZEN),
        ("losses", made(Loss, **FORWARD, Config=Bare), FROZEN),
        ("losses", made(Loss, **FORWARD, Config=Undecorated), FROZEN),
        ("losses", made(Loss, **ONE | {"inputs": {"a": REQUIRED, "b": REQUIRED}}),
         "declares b, which its forward does not take"),
        ("losses", made(Loss, **FORWARD, knobs={"k": Knob(1.0)}), "declares k, which its forward does not take"),
        ("losses", made(Loss, **FORWARD, borrows={"head": "teacher.fc"}),
         "declares head, which its forward does not take"),
        ("losses", made(Loss, forward=lambda self, extra: None),
         "has a forward that takes extra, which is no declared input, knob or borrowed part"),
        ("aligners", made(Aligner, forward=lambda self, other: None),
         "declares source, which its forward does not take"),
        ("losses", made(Loss, **ONE, knobs={"a": Knob(1.0)}), "declares a twice: as input, knob or borrowed part"),
        ("losses", made(Loss, **ONE, same_shape=(("a", "b"),)), "wants same_shape of b, which is no input"),
        ("losses", made(Loss, **ONE, trains=("head",)), "trains head, which is no borrowed part"),
        ("losses", made(Loss, **FORWARD, Config=Weighty),
         "has the option weight, which means something else in its section of a config"),
        ("metrics", made(Metric, **METRIC, update=lambda self, logits: None),
         "has an update that takes (logits) but declares the inputs (logits, label)"),
        ("metrics", made(Metric, **METRIC, inputs={"x": "student.mid"}, update=lambda self, x: None),
         "reads student.mid as x; a metric reads student.logits and streams of the batch"),
    ],
)  # fmt: skip
def test_a_component_that_breaks_the_contract_is_refused(kind: str, component: type[Component], problem: str) -> None:
    with pytest.raises(PluginError) as caught:
        check_component(kind, component, Plugin("mine", "mine 1.0", ""))
    assert str(caught.value) == f"plugin mine (mine 1.0): {kind} component C {problem}"


@pytest.mark.parametrize(
    ("kind", "component"),
    [
        ("losses", made(Loss, **ONE | {"forward": lambda self, **everything: None})),
        ("losses", made(Loss, forward=lambda self, extra=None: None)),
        ("aligners", made(Aligner, forward=lambda self, source: source)),
        ("metrics", made(Metric, **METRIC, update=lambda self, **everything: None)),
    ],
)
def test_a_component_that_keeps_the_contract_is_taken(kind: str, component: type[Component]) -> None:
    check_component(kind, component, Plugin("mine", "mine 1.0", ""))


def test_an_instance_is_no_component() -> None:
    with pytest.raises(PluginError, match=r"losses component 3 is not a subclass of kdx.Loss"):
        check_component("losses", 3, Plugin("mine", "mine 1.0", ""))  # type: ignore[arg-type]


def test_all_known_components_keep_the_contract() -> None:
    for (kind, name), entry in discover().entries.items():
        check_component(kind, entry.component, entry.plugin)
        assert entry.component.name == name
        assert inspect.getdoc(entry.component), name


# --- hooks


def test_every_kind_has_a_hook_and_every_hook_a_description() -> None:
    hooks = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("kdx_")}
    assert set(hooks) == {f"kdx_{kind}" for kind in KINDS} | set(RUN_HOOKS)
    for name, hook in hooks.items():
        assert hook.__doc__, name
        assert len(inspect.signature(hook).parameters) == (name in RUN_HOOKS), name


def test_every_kind_is_a_component_class_of_its_own() -> None:
    assert set(KINDS.values()) >= {Dataset, Model, Schedule, Metric, Updater}
    assert all(issubclass(base, Component) for base in KINDS.values())
    assert {kind for kind, base in KINDS.items() if issubclass(base, Node)} == {"targets", "aligners", "losses"}


def watchers(tmp_path: Path) -> Registry:
    for name in ("first", "second"):
        write(
            tmp_path / f"{name}.py",
            "import kdx\n@kdx.hookimpl\ndef kdx_run_start(run):\n"
            f"    run.append('{name}')\n    if '{name}' in run[0]:\n        raise ValueError('stop')\n",
        )
    return discover([str(tmp_path / "first.py"), str(tmp_path / "second.py")], installed=False)


def test_run_time_hooks_are_called_in_the_order_of_registration(tmp_path: Path) -> None:
    seen = ["nobody"]
    compile_hook(watchers(tmp_path), "kdx_run_start")(seen)
    assert seen == ["nobody", "first", "second"]


def test_an_error_in_a_run_time_hook_names_the_plugin_and_keeps_its_type(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop") as caught:
        compile_hook(watchers(tmp_path), "kdx_run_start")(["second"])
    assert caught.value.__notes__ == ["in kdx_run_start of plugin second.py"]


def test_a_hook_that_nobody_implements_costs_nothing_and_does_nothing(tmp_path: Path) -> None:
    registry = watchers(tmp_path)
    assert registry.watch("kdx_step_end") == ()
    compile_hook(registry, "kdx_step_end")(None)
