"""Reads config files: each function turns plain mappings into plain mappings; `kdx.spec` gives them meaning."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kdx.errors import ConfigError

Mapped = dict[str, Any]
_PATHS = ("checkpoint", "folder", "path")
"""The options of a model section that name files or folders."""
AUTO_RUNTIME = {
    "device": "auto",
    "precision": "auto",
    "channels_last": "auto",
    "compile": "auto",
    "workers": "auto",
    "backend": "auto",
    "teacher_batching": "auto",
}
"""What `runtime: auto` stands for."""
MOST_VALUES, DEEPEST = 100_000, 100
"""How many values a text may stand for, and how deep they may lie in each other."""
_IDENTITY = ("use", "extends")
"""What a section is made from: where this changes, the options that stood beside it mean nothing any more."""


def load(path: str | Path, overrides: Iterable[str | Mapping[str, Any]] = ()) -> Mapped:
    """A config file with everything that it extends, the overrides laid over it, and interpolations resolved.

    The result has no `extends`. Paths of runs, plugins and checkpoints are relative to the file that names them and
    come out absolute. `name` defaults to the file's stem. An override is `key=value` or a mapping.
    """
    path = Path(path)
    given = _read_layers(path, ())
    given.setdefault("name", path.stem)
    return resolve(_overridden(given, overrides))


def load_mapping(
    given: Mapping[str, Any], folder: Path | None = None, overrides: Iterable[str | Mapping[str, Any]] = ()
) -> Mapped:
    """As `load`, for a config written as a mapping; `folder` is what its paths are relative to."""
    return resolve(_overridden(_extended(dict(copy.deepcopy(given)), folder or Path.cwd(), ()), overrides))


def overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> Mapped:
    """Lay one config over another: null removes, a changed `use` or `extends` starts the node afresh, all else merges.

    Lists are replaced. Neither argument is changed. Within a run that `extends` a file, null stays as it is: what it
    removes is in that file, which is laid below later.
    """
    return _lay(below, above, unread=False)


def _lay(below: Mapping[str, Any], above: Mapping[str, Any], *, unread: bool) -> Mapped:
    result: Mapped = dict(below)
    for key, value in above.items():
        under = result.get(key)
        if value is None and not unread:
            result.pop(key, None)
        elif not isinstance(value, Mapping):
            result[key] = copy.deepcopy(value)
        else:
            same = isinstance(under, Mapping) and all(value.get(at, under.get(at)) == under.get(at) for at in _IDENTITY)
            kept = under if same and isinstance(under, Mapping) else {}
            result[key] = _lay(kept, value, unread=unread or "extends" in kept or "extends" in value)
    return result


def nested(key: str, value: Any) -> dict[str, Any]:
    """A dotted key as nested mappings around a value."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def parse_override(text: str) -> Mapped:
    """`losses.kd.temperature=2` as a nested mapping; the value is YAML, so `losses.hint=null` removes a node."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {text!r}: expected key=value with a dotted key, as in losses.kd.temperature=2")
    try:
        nested: Any = OmegaConf.to_container(OmegaConf.create({"value": _yaml(value)}), resolve=False)["value"]  # type: ignore[index,call-overload]
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {_one_line(error)}") from error
    for part in reversed(parts):
        nested = {part: nested}
    return dict(nested)


def given_text(path: Path, overrides: Iterable[str]) -> str:
    """The text of a config file, with the overrides as comments below it."""
    lines = [f"# changed on the command line: {override}\n" for override in overrides]
    return path.read_text(encoding="utf-8").rstrip("\n") + "\n" + "".join(lines)


def resolve(given: Mapped) -> Mapped:
    """Replace every `${...}`; raise `ConfigError` where one names nothing."""
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(given), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{getattr(error, 'full_key', '') or 'config'}: {_first_line(error)}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"config: {_one_line(error)}") from error
    if not isinstance(resolved, dict):
        raise ConfigError(f"a config is a mapping, not a {type(resolved).__name__}")
    return {str(key): value for key, value in resolved.items()}


def to_yaml(config: Mapping[str, Any]) -> str:
    """A config as YAML, keys in the order given."""
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)


def _overridden(given: Mapped, overrides: Iterable[str | Mapping[str, Any]]) -> Mapped:
    for override in overrides:
        layer = parse_override(override) if isinstance(override, str) else dict(override)
        given = overlay(given, absolute_paths(layer, Path.cwd()))
    return given


def _read_layers(path: Path, above: tuple[Path, ...]) -> Mapped:
    resolved = _resolved(path)
    if resolved in above:
        chain = " -> ".join(file.name for file in (*above, resolved))
        raise ConfigError(f"{path}: the files extend each other in a circle: {chain}")
    extended = f" (extended by {above[-1]})" if above else ""
    return _extended(read_yaml(path, extended), path.parent, (*above, resolved))


def read_yaml(path: Path, why: str = "") -> Mapped:
    """The mapping in a YAML file as it stands there; `why` says in errors who asked for it."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read config {path}{why}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {path} is not UTF-8 text: {error}") from error
    try:
        given = _yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"config {path} is not valid YAML: {_one_line(error)}") from error
    if given is None:
        given = {}
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise ConfigError(f"config {path}: expected a mapping with named sections at the top")
    return given


def _extended(given: Mapped, folder: Path, above: tuple[Path, ...]) -> Mapped:
    """Lay a mapping over the files that its `extends` names, and make its paths absolute."""
    names = given.pop("extends", None) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"extends: expected a path or a list of paths, found {names!r}")
    below: Mapped = {}
    for name in names:
        layer = _read_layers(folder / name, above)
        layer.setdefault("name", Path(name).stem)
        below = overlay(below, layer)
    if above:  # a file that extends another one has a name of its own
        below.pop("name", None)
    return overlay(below, absolute_paths(given, folder))


def absolute_paths(given: Mapped, folder: Path) -> Mapped:
    """The config with the paths that it may hold made absolute, and what it says in one word spelled out: each
    `run: path` as `run: {extends: path}`, and `runtime: auto`.
    """
    given = copy.deepcopy(given)
    if given.get("runtime") == "auto":
        given["runtime"] = dict(AUTO_RUNTIME)
    if isinstance(given.get("plugins"), list):
        given["plugins"] = [
            _absolute(item, folder) if isinstance(item, str) and item.endswith(".py") else item
            for item in given["plugins"]
        ]
    teachers = given.get("teachers")
    models = [given.get("student"), *(teachers.values() if isinstance(teachers, dict) else [])]
    for model in models:
        if not isinstance(model, dict):
            continue
        for key in _PATHS:
            if isinstance(model.get(key), str):
                model[key] = _absolute(model[key], folder)
        run = model.get("run")
        if isinstance(run, str):
            model["run"] = {"extends": _absolute(run, folder)}
        elif isinstance(run, dict):
            above = run.get("extends")
            if isinstance(above, str):
                run["extends"] = _absolute(above, folder)
            elif isinstance(above, list):
                run["extends"] = [_absolute(item, folder) if isinstance(item, str) else item for item in above]
            model["run"] = absolute_paths(run, folder)
    return given


def _absolute(path: str, folder: Path) -> str:
    """A path as seen from `folder`; one that starts with an interpolation says for itself where it lies."""
    return path if path.startswith("${") else str(_resolved(folder / path))


def _resolved(path: Path) -> Path:
    """The absolute path, without links. Raises `ConfigError` for what no file can be called."""
    try:
        return path.resolve()
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(f"{str(path)!r} cannot be the path of a file: {error}") from error


class _Loader(yaml.SafeLoader):
    """YAML as OmegaConf reads it: `1e-3` is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float, bool)) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            if isinstance(key, (str, int, float, bool)):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
        |\.[0-9_]+(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)


def _yaml(text: str) -> Any:
    """The value of a YAML text. A short one with anchors may mean more than any memory holds: such is refused first."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if (count := _count(node, {}, ())) > MOST_VALUES:
            raise yaml.YAMLError(f"it stands for more than {MOST_VALUES:,} values ({count:,})")
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """How many values a node stands for, with what its anchors repeat."""
    if id(node) in above:
        raise yaml.YAMLError(f"an anchor in line {node.start_mark.line + 1} contains itself")
    if len(above) > DEEPEST:
        raise yaml.YAMLError("it is nested too deeply")
    if id(node) not in known:
        inner = (*above, id(node))
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = parts if isinstance(node, yaml.MappingNode) else [(part,) for part in parts]
        known[id(node)] = 1 + sum(_count(part, known, inner) for pair in pairs for part in pair)
    return known[id(node)]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _first_line(error: BaseException) -> str:
    """The message of an OmegaConf error, without what it says of its own types."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
