"""Finds plugins and keeps what they supply: `Registry` maps (kind, name) to a component and its supplier."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import (
    Distribution,
    EntryPoint,
    PackageNotFoundError,
    entry_points,
    packages_distributions,
    version,
)
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from kdx import hookspecs
from kdx.components import Aligner, Component, Dataset, Loss, Metric, Model, Node, Schedule, Target
from kdx.errors import PluginError, did_you_mean
from kdx.updater import Updater

KINDS: Mapping[str, type[Component]] = {
    "datasets": Dataset,
    "models": Model,
    "targets": Target,
    "aligners": Aligner,
    "losses": Loss,
    "schedules": Schedule,
    "metrics": Metric,
    "updaters": Updater,
}
RUN_HOOKS = ("kdx_plan_ready", "kdx_run_start", "kdx_step_end", "kdx_eval_end", "kdx_run_end")
BUILTIN = "kdx.builtin"


@dataclass(frozen=True)
class Plugin:
    """Where components come from. `digest` identifies the code: a version for packages, a hash for files."""

    name: str
    origin: str
    digest: str


@dataclass(frozen=True)
class Entry:
    """One component and the plugin that supplies it."""

    kind: str
    component: type[Any]
    plugin: Plugin


@dataclass(frozen=True)
class Registry:
    """What exists for one run: a value, made by `discover`, never changed and never global."""

    entries: Mapping[tuple[str, str], Entry]
    plugins: tuple[Plugin, ...]
    failures: Mapping[str, str] = field(default_factory=dict)
    manager: pluggy.PluginManager = field(default_factory=lambda: pluggy.PluginManager("kdx"), repr=False)

    def names(self, kind: str) -> list[str]:
        """The names of all components of one kind."""
        return sorted(name for at, name in self.entries if at == kind)

    def find(self, kind: str, name: str, where: str) -> Entry:
        """The component `name`, or a `PluginError` that starts with the config path `where`."""
        entry = self.entries.get((kind, name))
        if entry is not None:
            return entry
        message = f"{where}: no {kind} component is named {name!r}; {did_you_mean(name, self.names(kind))}"
        for at, known in self.entries:
            if known == name:
                message += f". {name!r} exists among the {at}"
        for plugin, problem in self.failures.items():
            message += f"\nplugin {plugin} could not be loaded: {problem}"
        raise PluginError(message)

    def watch(self, hook: str) -> tuple[tuple[str, Callable[[Any], object]], ...]:
        """The implementations of a run-time hook in order of registration, each with its plugin's name."""
        implementations = getattr(self.manager.hook, hook).get_hookimpls()
        return tuple((implementation.plugin_name, implementation.function) for implementation in implementations)


def compile_hook(registry: Registry, hook: str) -> Callable[[Any], None]:
    """One callable for all implementations of a run-time hook; an error names the plugin that raised it."""
    watchers = registry.watch(hook)

    def call(argument: Any) -> None:
        for name, function in watchers:
            try:
                function(argument)
            except Exception as error:
                error.add_note(f"in {hook} of plugin {name}")
                raise

    return call


def discover(files: Sequence[str] = (), *, folder: Path = Path(), installed: bool = True) -> Registry:
    """Register built-ins, installed plugins (entry-point group `kdx`), and the files and modules that a config names.

    A path ends in `.py` and is relative to `folder`. A broken installed plugin is kept as a failure and shown when
    something is not found; a broken one that the config names raises `PluginError`.
    """
    manager = pluggy.PluginManager("kdx")
    manager.add_hookspecs(hookspecs)
    entries: dict[tuple[str, str], Entry] = {}
    plugins: list[Plugin] = []
    failures: dict[str, str] = {}

    def add(module: ModuleType, plugin: Plugin) -> None:
        if manager.is_registered(module):
            return
        _check_hooks(module, plugin)
        found = _components(module, plugin)
        for key in found.keys() & entries.keys():
            first = entries[key].plugin
            raise PluginError(
                f"two plugins supply {key[0]} {key[1]!r}: {first.name} ({first.origin}) and "
                f"{plugin.name} ({plugin.origin}); rename one of them"
            )
        for other in plugins:
            if other.name == plugin.name:
                raise PluginError(f"two plugins are called {plugin.name}: {other.origin} and {plugin.origin}")
        manager.register(module, name=plugin.name)
        entries.update(found)
        plugins.append(plugin)

    add(importlib.import_module(BUILTIN), Plugin(BUILTIN, "built in", _package_version("kdx")))
    if installed:
        for point in sorted(entry_points(group="kdx"), key=lambda point: point.name):
            try:
                add(*_load_entry_point(point))
            except Exception as error:  # a stranger's plugin must not stop a run that does not need it
                failures[point.name] = f"{type(error).__name__}: {error}"
    for number, item in enumerate(files):
        where = f"plugins[{number}]"
        add(*(_load_file(folder / item, where) if item.endswith(".py") else _load_module(item, where)))
    return Registry(entries, tuple(plugins), failures, manager)


def check_component(kind: str, component: type[Any], plugin: Plugin) -> None:
    """Raise `PluginError` unless a class keeps the contract that can be read off it."""

    def refuse(problem: str) -> PluginError:
        label = getattr(component, "__name__", repr(component))
        return PluginError(f"plugin {plugin.name} ({plugin.origin}): {kind} component {label} {problem}")

    base = KINDS[kind]
    if not (inspect.isclass(component) and issubclass(component, base)):
        raise refuse(f"is not a subclass of kdx.{base.__name__}")
    if not (isinstance(component.name, str) and component.name):
        raise refuse('has no `name = "..."`')
    if inspect.isabstract(component):
        missing: frozenset[str] = getattr(component, "__abstractmethods__", frozenset())
        raise refuse(f"does not define {', '.join(sorted(missing))}")
    own = getattr(component.Config, "__dict__", {})  # a subclass of a dataclass is one only when it is decorated too
    if "__dataclass_params__" not in own or not own["__dataclass_params__"].frozen:
        raise refuse("needs a nested `Config` that is a frozen dataclass")
    if issubclass(component, Node):
        _check_forward(component, refuse)
        _check_names(kind, component, refuse)
    if issubclass(component, Metric):
        _check_metric(component, refuse)
    places = component.places if issubclass(component, Dataset) else ()
    if unknown := sorted(set(places) - {item.name for item in fields(component.Config)}):
        raise refuse(f"has {', '.join(unknown)} among its places, which is no option of its Config")


def _check_names(kind: str, component: type[Node], refuse: Callable[[str], PluginError]) -> None:
    """Nothing that a section of the config can say may have two meanings."""
    names = [*component.inputs, *component.knobs, *component.borrows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise refuse(f"declares {', '.join(twice)} twice: as input, knob or borrowed part")
    unknown = sorted({name for group in component.same_shape for name in group} - set(component.inputs))
    if unknown:
        raise refuse(f"wants same_shape of {', '.join(unknown)}, which is no input")
    if unknown := sorted(set(component.trains) - set(component.borrows)):
        raise refuse(f"trains {', '.join(unknown)}, which is no borrowed part")
    shown = component.shown if issubclass(component, Target) and component.shown != Target.shown else ()
    if unknown := sorted(set(shown) - set(component.outputs)):
        raise refuse(f"shows {', '.join(unknown)}, which is no output")
    taken = {"use", "inputs", "borrows", "lr_scale", "weight_decay", *component.knobs}
    taken |= {"losses": {"weight"}, "aligners": {"source", "like"}}.get(kind, set())
    if hidden := sorted(taken & {item.name for item in fields(component.Config)}):
        raise refuse(f"has the option {', '.join(hidden)}, which means something else in its section of a config")


def _check_metric(component: type[Metric], refuse: Callable[[str], PluginError]) -> None:
    parameters = list(inspect.signature(component.update).parameters.values())[1:]
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters) and (
        {parameter.name for parameter in parameters} != set(component.inputs)
    ):
        takes = ", ".join(parameter.name for parameter in parameters)
        raise refuse(f"has an update that takes ({takes}) but declares the inputs ({', '.join(component.inputs)})")
    for name, ref in component.inputs.items():
        if ref != "student.logits" and not ref.startswith("batch."):
            raise refuse(f"reads {ref} as {name}; a metric reads student.logits and streams of the batch")


def _check_forward(component: type[Node], refuse: Callable[[str], PluginError]) -> None:
    if component.forward is Node.forward:
        raise refuse("does not define forward")
    parameters = list(inspect.signature(component.forward).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    takes = {parameter.name for parameter in parameters}
    declared = {*component.inputs, *component.knobs, *component.borrows}
    if issubclass(component, Aligner):
        declared -= {"like"}
        takes -= {"like"}
    if missing := sorted(declared - takes):
        raise refuse(f"declares {', '.join(missing)}, which its forward does not take")
    required = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    if extra := sorted(required - declared):
        raise refuse(f"has a forward that takes {', '.join(extra)}, which is no declared input, knob or borrowed part")


def _check_hooks(module: ModuleType, plugin: Plugin) -> None:
    known = {name for name in vars(hookspecs) if name.startswith("kdx_")}
    hooks = 0
    for name, value in vars(module).items():
        if not name.startswith("kdx_") or not inspect.isfunction(value):
            continue
        where = f"plugin {plugin.name} ({plugin.origin}): {name}"
        if name not in known:
            raise PluginError(f"{where} is not a hook; {did_you_mean(name, known)}")
        options = getattr(value, "kdx_impl", None)
        if options is None:
            raise PluginError(f"{where} is not decorated: did you forget @kdx.hookimpl?")
        if any(options[key] for key in ("wrapper", "hookwrapper", "tryfirst", "trylast")):
            raise PluginError(f"{where} is a wrapper or asks for a place in the order; kdx has neither")
        expected = list(inspect.signature(getattr(hookspecs, name)).parameters)
        found = list(inspect.signature(value).parameters)
        if found != expected:
            raise PluginError(f"{where} takes ({', '.join(found)}) but the hook gives ({', '.join(expected)})")
        hooks += 1
    if not hooks:
        raise PluginError(
            f"plugin {plugin.name} ({plugin.origin}) implements no hook; known: {', '.join(sorted(known))}"
        )


def _components(module: ModuleType, plugin: Plugin) -> dict[tuple[str, str], Entry]:
    found: dict[tuple[str, str], Entry] = {}
    for kind in KINDS:
        hook = getattr(module, f"kdx_{kind}", None)
        if hook is None:
            continue
        try:
            classes = hook()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            raise PluginError(f"plugin {plugin.name} ({plugin.origin}): kdx_{kind} raised {problem}") from error
        if not isinstance(classes, Iterable):
            raise PluginError(f"plugin {plugin.name} ({plugin.origin}): kdx_{kind} must return a list of classes")
        for component in classes:
            check_component(kind, component, plugin)
            if (kind, component.name) in found:
                raise PluginError(f"plugin {plugin.name} ({plugin.origin}) supplies {kind} {component.name!r} twice")
            found[kind, component.name] = Entry(kind, component, plugin)
    return found


def _package_version(module: str) -> str:
    top = module.split(".")[0]
    # The search through all that is installed takes a quarter of a second, and kdx knows its own name.
    for distribution in ["kdx"] if top == "kdx" else packages_distributions().get(top, [top]):
        try:
            return f"{distribution} {version(distribution)}"
        except PackageNotFoundError:
            continue
    return f"{top} (not installed)"


def _digest(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def _load_entry_point(point: EntryPoint) -> tuple[ModuleType, Plugin]:
    module = point.load()
    if not isinstance(module, ModuleType):
        raise PluginError(f"entry point {point.name} = {point.value} is not a module")
    origin = _name_and_version(point.dist) if point.dist else point.value
    return module, Plugin(point.name, origin, _file_digest(module))


@functools.lru_cache(maxsize=16)
def _name_and_version(distribution: Distribution) -> str:
    """Kept, since each look at a distribution parses its metadata, and one may have many entry points."""
    return f"{distribution.name} {distribution.version}"


def _load_module(name: str, where: str) -> tuple[ModuleType, Plugin]:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise PluginError(f"{where}: module {name!r} could not be imported: {type(error).__name__}: {error}") from error
    return module, Plugin(name, _package_version(name), _file_digest(module))


def _file_digest(module: ModuleType) -> str:
    return _digest(Path(module.__file__)) if module.__file__ else _package_version(module.__name__)


def _load_file(path: Path, where: str) -> tuple[ModuleType, Plugin]:
    if not path.is_file():
        raise PluginError(f"{where}: there is no file {path}")
    digest = _digest(path)
    name = f"kdx_file_{path.stem}_{digest[7:19]}"
    plugin = Plugin(path.name, str(path), digest)
    if name in sys.modules:
        return sys.modules[name], plugin
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"{where}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PluginError(f"{where}: {path} could not be imported: {type(error).__name__}: {error}") from error
    return module, plugin
