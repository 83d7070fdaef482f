"""Searches: a config, and which of its values may be what; any point of that space is a config of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from kdx.config import absolute_paths, load, nested, overlay, parse_override, read_yaml
from kdx.errors import ConfigError, KdxError, did_you_mean
from kdx.options import read_options
from kdx.runs import Options, Prepared, check_run, family, finished, prepare
from kdx.runtime_choice import check_shared_precision
from kdx.spec import full_config

SAMPLERS = ("tpe", "random")
PRUNERS = ("median", "halving", "none")
OWN = ("seed", "name", "title", "out", "baseline", "train.monitor", "train.minimise", "data.validation")
"""What every trial of a search has in common: numbers could not be compared otherwise, or runs not be found."""
Value: TypeAlias = "bool | int | float | str | None"
Point: TypeAlias = Mapping[str, Value]
"""A value for each key of a space; for choices that are mappings or lists, their label."""


@dataclass(frozen=True)
class SearchOptions:
    """What the file of a search may say.

    `space` maps dotted keys of the config `base` to `{low: 1, high: 8}`, with `log: true` for orders of magnitude,
    `step`, or `int: true` for whole numbers; to a list of choices; or to `{pick: [kd, dkd]}` for components. There
    are `trials` trials in all, each with every one of the `seeds` (that of the base by default). The first `startup`
    trials are drawn at random and never given up; before its epoch `warmup` no trial is given up.
    """

    name: str = ""
    base: str | None = None
    trials: int = 20
    seeds: list[int] = field(default_factory=list)
    space: dict[str, Any] = field(default_factory=dict)
    sampler: str = "tpe"
    pruner: str = "median"
    startup: int = 5
    warmup: int = 0


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both among them."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    int: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value of a config is one of the numbers, apart from `step`."""
        fits = isinstance(value, int | float) and not isinstance(value, bool) and self.low <= value <= self.high
        return fits and (not self.int or float(value).is_integer())

    def ends(self) -> list[Value]:
        return [int(self.low), int(self.high)] if self.int else [float(self.low), float(self.high)]


@dataclass(frozen=True)
class Choices:
    """Values by what a search calls them: themselves, or a text for a mapping or a list."""

    values: Mapping[Value, Any]


Space: TypeAlias = Mapping[str, "Range | Choices"]


@dataclass(frozen=True)
class Search:
    """What is searched, and how. `layers` are laid over the base in every trial; no `seeds` mean the base's own."""

    name: str
    base: Path
    layers: tuple[str | Mapping[str, Any], ...]
    space: Space
    trials: int
    seeds: tuple[int, ...]
    sampler: str
    pruner: str
    startup: int
    warmup: int


@dataclass(frozen=True)
class Ground:
    """What is known of a search once its plans have been checked.

    `hash` is that of the base's run: a search that goes on must still be about it. `own` is the point that is the base
    itself, if it lies in the space.
    """

    folder: Path
    seeds: tuple[int, ...]
    monitor: str
    minimise: bool
    hash: str
    own: Point | None


def read_search(
    path: Path, overrides: Sequence[str] = (), *, space: Sequence[str] = (), trials: int | None = None
) -> Search:
    """The search in a YAML file, or over a config, whose space is then `space` alone.

    `space` holds texts like `losses.kd.temperature={low: 1, high: 8}`, which go before those of the file.
    """
    given = read_yaml(path)
    if "space" not in given and not space:
        raise ConfigError(
            f"{path.name}: there is no `space`; write one, or say what to search, as in "
            "--space 'losses.kd.temperature={low: 1, high: 8}'"
        )
    if "space" not in given:
        given = {"base": path.name}
    options = read_options(SearchOptions, given, path.stem)
    if options.base is None:
        raise ConfigError(f"{path.name}: base: there is none, and a space needs a config that it is about")
    asked = {**options.space, **dict(map(_asked, space))}
    for where, found, choices in (("sampler", options.sampler, SAMPLERS), ("pruner", options.pruner, PRUNERS)):
        if found not in choices:
            raise ConfigError(f"{path.name}: {where}: found {found!r}; {did_you_mean(found, choices)}")
    count = options.trials if trials is None else trials
    for where, number, least in (("trials", count, 1), ("startup", options.startup, 1), ("warmup", options.warmup, 0)):
        if number < least:
            raise ConfigError(f"{path.name}: {where}: found {number}, expected {least} or more")
    if len(set(options.seeds)) < len(options.seeds):
        raise ConfigError(f"{path.name}: seeds: {options.seeds} names a seed twice")
    for override in overrides:
        for key in parse_override(override):
            if key in ("name", "title", "baseline") or (key == "seed" and options.seeds):
                raise ConfigError(f"override {override!r}: {key} is what the search says, in {path.name}")
    here = {key: Path.cwd() for key, _ in map(_asked, space)}
    found_space = {
        key: _read_dimension(f"{path.name}: space.{key}", key, value, here.get(key, path.parent))
        for key, value in asked.items()
    }
    return Search(
        options.name or path.stem,
        path.parent / options.base,
        tuple(overrides),
        found_space,
        count,
        tuple(options.seeds),
        options.sampler,
        options.pruner,
        options.startup,
        options.warmup,
    )


def check_search(search: Search, options: Options) -> Ground:
    """Refuse what can be refused before anything trains: every choice and both ends of every range are planned."""
    config = load(search.base, search.layers)
    ground = prepare({**config, "baseline": False}, options)
    check_shared_precision(ground.spec)
    train = ground.spec.train
    if ground.splits.val is None:
        raise ConfigError(f"{search.base.name}: there is no validation split to judge trials by; see data.validation")
    seeds = search.seeds or (ground.spec.root.seed,)
    own = own_point(config, full_config(ground.spec), search.space)
    out = Path(ground.spec.root.out) / f"{search.name}_tune"
    found = Ground(out, seeds, train.monitor, train.minimise, ground.hash, own)
    checked: set[Path] = set()
    for changed, point in _corners(search.space):
        try:
            prepared = prepare_trial(search, found, point, seeds[0], options)
            check_shared_precision(prepared.spec)
            for one, how in family(prepared, options):
                if one.folder not in checked and not finished(one):
                    check_run(one, how)
                checked.add(one.folder)
        except KdxError as error:
            raise type(error)(f"space: with {changed}: {error}") from error
    return found


def prepare_trial(search: Search, ground: Ground, point: Point, seed: int, options: Options) -> Prepared:
    """One point with one seed, ready to train in the folder of the search, and without the test split: a search never
    looks at it. The runs that the student needs are those of everybody.
    """
    title = ", ".join(f"{key}={value}" for key, value in point.items())
    own = {"seed": seed, "name": search.name, "title": f"{search.name} / {title}", "baseline": False}
    prepared = prepare(load(search.base, [*search.layers, *layers_of(search.space, point), own]), options)
    folder = ground.folder / "trials" / prepared.folder.name
    return replace(prepared, folder=folder, splits=replace(prepared.splits, test=None))


def layers_of(space: Space, point: Point) -> Iterator[dict[str, Any]]:
    """The differences from the base that a point is, one for each key."""
    for key, dimension in space.items():
        yield nested(key, dimension.values[point[key]] if isinstance(dimension, Choices) else point[key])


def fragment(space: Space, point: Point) -> dict[str, Any]:
    """The values of a point as a part of a config."""
    found: dict[str, Any] = {}
    for layer in layers_of(space, point):
        merge(found, layer)
    return found


def own_point(config: Mapping[str, Any], full: Mapping[str, Any], space: Space) -> Point | None:
    """The point that a config already is, `full` being the same with all defaults; None where a value lies outside."""
    found: dict[str, Value] = {}
    for key, dimension in space.items():
        value = _at(full, key) if (given := _at(config, key)) is None else given
        if isinstance(dimension, Range):
            if not dimension.holds(value):
                return None
            found[key] = int(value) if dimension.int else float(value)
        else:
            labels = [label for label, choice in dimension.values.items() if _is(value, choice)]
            if not labels:
                return None
            found[key] = labels[0]
    return found


def space_text(space: Space) -> str:
    """A space as text, equal for equal spaces."""
    plain = {
        key: vars(dimension) if isinstance(dimension, Range) else [[*pair] for pair in dimension.values.items()]
        for key, dimension in space.items()
    }
    return json.dumps(plain, sort_keys=True, default=str)


def _asked(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--space {text!r}: expected KEY=RANGE, as in 'losses.kd.temperature={{low: 1, high: 8}}'")
    return key.strip(), parse_override(f"value={value}")["value"]


def _read_dimension(where: str, key: str, value: Any, folder: Path) -> Range | Choices:
    if (own := next((own for own in OWN if key == own or own.startswith(f"{key}.")), None)) is not None:
        raise ConfigError(f"{where}: {own} is the same in all trials of a search; say it in the base")
    if isinstance(value, list):
        return _choices(where, key, value, [_label(one) for one in value], folder)
    if isinstance(value, Mapping) and list(value) == ["pick"] and isinstance(value["pick"], list):
        return _choices(where, key, [{"use": name} for name in value["pick"]], value["pick"], folder)
    if not isinstance(value, Mapping) or not {"low", "high"} <= set(value):
        raise ConfigError(
            f"{where}: found {value!r}, expected {{low: 1, high: 8}}, a list of choices, or {{pick: [...]}}"
        )
    found: Range = read_options(Range, {key: _number(item) for key, item in value.items()}, where)
    numbers = (found.low, found.high, found.step)
    if not all(math.isfinite(number) for number in numbers if number is not None) or found.low >= found.high:
        raise ConfigError(f"{where}: found {value!r}, expected low below high")
    if found.log and (found.low <= 0 or found.step is not None):
        raise ConfigError(f"{where}: found {value!r}; with log, low is above 0 and there is no step")
    if found.step is not None and not 0 < found.step <= found.high - found.low:
        raise ConfigError(f"{where}.step: found {found.step}, expected above 0 and at most high - low")
    if found.int and not all(float(number).is_integer() for number in numbers if number is not None):
        raise ConfigError(f"{where}: found {value!r}; with int, all numbers are whole ones")
    return found


def _is(value: Any, choice: Any) -> bool:
    """Whether a choice, laid over a value, leaves it as it is."""
    if isinstance(value, Mapping) and isinstance(choice, Mapping):
        return overlay(value, choice) == value
    return bool(value == choice)


def _choices(where: str, key: str, values: list[Any], labels: list[Any], folder: Path) -> Choices:
    if len(values) < 2 or min(len({*map(str, labels)}), len({*labels})) < len(labels):  # 1 and true are one key
        raise ConfigError(f"{where}: found {values!r}, expected two or more different choices")
    made = [_at(absolute_paths(nested(key, value), folder), key) for value in values]
    return Choices(dict(zip(labels, made, strict=True)))


def _label(value: Any) -> Value:
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _at(config: Any, key: str) -> Any:
    """What a config has at a dotted key; None if nothing."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _corners(space: Space) -> Iterator[tuple[str, Point]]:
    """Points in which every choice and both ends of every range occur, each with what is special about it."""
    values = {
        key: dimension.ends() if isinstance(dimension, Range) else [*dimension.values]
        for key, dimension in space.items()
    }
    first = {key: choices[0] for key, choices in values.items()}
    yield ", ".join(f"{key}={value}" for key, value in first.items()), first
    for key, choices in values.items():
        for choice in choices[1:]:
            yield f"{key}={choice}", {**first, key: choice}


def merge(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Add to a fragment; unlike laying configs over each other, null stays, to be laid over the base."""
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(below.get(key), dict):
            merge(below[key], value)
        else:
            below[key] = dict(value) if isinstance(value, Mapping) else value
