"""Studies: variants of one config, each with several seeds, that are planned together before the first one trains."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdx.comparable import Basis, Facts, basis, fact_differences, facts_of, marks
from kdx.config import absolute_paths, load, nested, overlay, parse_override, read_yaml
from kdx.errors import ConfigError, KdxError, did_you_mean
from kdx.loop import length
from kdx.options import read_options
from kdx.result import Result, read_result
from kdx.runs import Options, Prepared, check_run, family, finished, prepare
from kdx.runtime_choice import check_shared_precision
from kdx.spec import full_config
from kdx.table import plan_text


@dataclass(frozen=True)
class StudyOptions:
    """What a study file may say.

    Variants are mappings of differences that are laid over the config `base`, or paths of whole configs; `configs`
    are patterns of such paths, each a variant with the name of its file, and files that are called base are left out.
    `grid` maps dotted keys to values, or to `{pick: [kd, dkd]}` for components, and adds a variant for each
    combination. `reference` names the variant that the others are compared with; the first one by default.
    """

    name: str = ""
    base: str | None = None
    seeds: list[int] = field(default_factory=list)
    variants: dict[str, Any] = field(default_factory=dict)
    configs: list[str] = field(default_factory=list)
    grid: dict[str, Any] = field(default_factory=dict)
    reference: str | None = None


@dataclass(frozen=True)
class Variant:
    """One row of a study. `layers` are laid over the config in the file `path`."""

    name: str
    path: Path
    layers: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Study:
    name: str
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    reference: str


@dataclass(frozen=True)
class Trial:
    """One variant with one seed, not yet trained: its resolved config.

    `marks` say how the variant differs from the reference in its budget and data, and in what it does not name.
    """

    variant: str
    seed: int
    config: Mapping[str, Any]
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: its result, or the reason why there is none."""

    variant: str
    seed: int
    folder: str
    result: Result | None
    reason: str = ""


def read_study(path: Path) -> Study:
    """The study in a YAML file; raises `ConfigError` for names that stand twice, and for seeds or variants missing."""
    options = read_options(StudyOptions, read_yaml(path), path.stem)
    if not options.seeds:
        raise ConfigError(f"{path.name}: seeds: there are none; say which, as in `seeds: [0, 1, 2]`")
    if len(set(options.seeds)) < len(options.seeds):
        raise ConfigError(f"{path.name}: seeds: {options.seeds} names a seed twice")
    variants = [*_named(options, path), *_from_files(options, path), *_from_grid(options, path)]
    names = [variant.name for variant in variants]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{path.name}: two variants are called {repeated!r}; give one of them another name")
    if not variants:
        raise ConfigError(f"{path.name}: there is nothing to compare; add `variants`, `configs` or `grid`")
    reference = options.reference or names[0]
    if reference not in names:
        raise ConfigError(f"{path.name}: reference: no such variant {reference!r}; {did_you_mean(reference, names)}")
    return Study(options.name or path.stem, tuple(options.seeds), tuple(variants), reference)


def plan_study(study: Study, options: Options, overrides: Sequence[str] = ()) -> tuple[list[Trial], dict[str, str]]:
    """Every trial, seed by seed, and the plan of each variant as text.

    What can be refused is refused here, before anything trains: `ConfigError` and `PlanError` name the variant that
    does not fit, or two variants that are one and the same run. `overrides` are laid over each variant.
    """
    trials, plans = [], {}
    seen: dict[str, str] = {}
    bases: dict[str, Basis] = {}
    checked: set[Path] = set()
    for seed in study.seeds:
        for variant in study.variants:
            layers: list[Any] = [*variant.layers, *overrides, _own_keys(study, variant, seed)]
            try:
                _check_own_keys(layers[:-1])
                trials.append(Trial(variant.name, seed, load(variant.path, layers)))
                if seed == study.seeds[0]:  # other seeds have the same plans
                    prepared = prepare(trials[-1].config, options)
                    check_shared_precision(prepared.spec)
                    plans[variant.name] = _checked_plan(prepared, options, checked)
                    bases[variant.name] = _basis(prepared)
            except KdxError as error:
                raise type(error)(f"variant {variant.name}: {error}") from error
            if seed == study.seeds[0] and (other := seen.setdefault(prepared.hash, variant.name)) != variant.name:
                raise ConfigError(f"the variants {other} and {variant.name} are one and the same run")
    found = {one.name: marks(bases[study.reference], bases[one.name], one.layers) for one in study.variants}
    return [replace(trial, marks=found[trial.variant]) for trial in trials], plans


def read_outcomes(folders: Sequence[Path]) -> list[Outcome]:
    """The outcomes in the folders of finished runs; runs of one name with different seeds are one variant.

    Where a name and a seed occur twice, the variants are the folders themselves. Raises `ConfigError` for runs that
    cannot be compared, as they differ in their data or in the number of updates.
    """
    found = [(folder, read_result(folder)) for folder in folders]
    (first_folder, first), *others = found
    for folder, result in others:
        if differing := fact_differences(facts_of(first), facts_of(result)):
            raise ConfigError(
                f"{folder.name} cannot be compared with {first_folder.name}: they differ in {differing[0]}"
            )
    keys = [(result.name, result.seed) for _, result in found]
    by_name = len(set(keys)) == len(keys)
    return [
        Outcome(result.name if by_name else folder.name, result.seed, folder.name, result) for folder, result in found
    ]


def plan_differences(plans: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The plan of the first variant, then of each other one how it differs from that, as (variant, text)."""
    (first, whole), *others = plans.items()
    yield first, whole
    for name, own in others:
        lines = [*difflib.unified_diff(whole.splitlines(), own.splitlines(), lineterm="", n=0)][2:]
        yield name, "\n".join(line for line in lines if not line.startswith("@@"))


def _checked_plan(prepared: Prepared, options: Options, checked: set[Path]) -> str:
    """The plan of a run as text, once whatever it needs has been checked; `checked` are the folders that were."""
    for one, how in family(prepared, options):
        if one.folder not in checked and one is not prepared and not finished(one):
            check_run(one, how)
            checked.add(one.folder)
    return plan_text(check_run(prepared, options))


def _basis(prepared: Prepared) -> Basis:
    """What the scores of a run will rest on."""
    spec, splits = prepared.spec, prepared.splits
    seen = len(splits.train)
    labelled = sum(label >= 0 for label in splits.facts.labels)
    return basis(
        Facts(tuple(splits.facts.classes), seen, labelled, length(spec, seen)[1]),
        full_config(spec),
        seed=spec.root.seed,
        teachers=[name for name in prepared.reached.models if name != "student"],
        plain=None if prepared.plain is None else prepared.plain.hash,
    )


def _own_keys(study: Study, variant: Variant, seed: int) -> dict[str, Any]:
    """What a study says for its trials. The title counts for no hash: a run that two studies share is one run."""
    return {"seed": seed, "name": study.name, "title": f"{study.name} / {variant.name}"}


def _check_own_keys(layers: Sequence[str | Mapping[str, Any]]) -> None:
    for layer in layers:
        for key, own in (("seed", "seeds"), ("name", "name"), ("title", "name")):
            if key in (parse_override(layer) if isinstance(layer, str) else layer):
                raise ConfigError(f"{key}: no difference can change it; the study says it for all, as `{own}`")


def _named(options: StudyOptions, path: Path) -> list[Variant]:
    found = []
    for name, difference in options.variants.items():
        if isinstance(difference, str):
            found.append(Variant(name, path.parent / difference))
        elif isinstance(difference, Mapping) or difference is None:
            layer = absolute_paths(dict(difference or {}), path.parent)
            found.append(Variant(name, _base(options, path), (layer,)))
        else:
            where = f"{path.name}: variants.{name}"
            raise ConfigError(f"{where}: found {difference!r}, expected differences or the path of a config")
    return found


def _from_files(options: StudyOptions, path: Path) -> list[Variant]:
    found = []
    for pattern in options.configs:
        files = sorted(file for file in path.parent.glob(pattern) if file.stem != "base")
        if not files:
            raise ConfigError(f"{path.name}: configs: no file fits {pattern!r}")
        found += [Variant(file.stem, file) for file in files]
    return found


def _from_grid(options: StudyOptions, path: Path) -> list[Variant]:
    axes = []
    for key, values in options.grid.items():
        picked = isinstance(values, Mapping) and list(values) == ["pick"]
        choices = values["pick"] if picked else values
        if not isinstance(choices, list) or not choices:
            raise ConfigError(f"{path.name}: grid.{key}: found {values!r}, expected a list or {{pick: [...]}}")
        axes.append([(f"{key}={choice}", nested(key, {"use": choice} if picked else choice)) for choice in choices])
    if not axes:
        return []
    found = []
    for point in itertools.product(*axes):
        layer: dict[str, Any] = {}
        for _, difference in point:
            layer = overlay(layer, difference)
        found.append(Variant(", ".join(name for name, _ in point), _base(options, path), (layer,)))
    return found


def _base(options: StudyOptions, path: Path) -> Path:
    if options.base is None:
        raise ConfigError(f"{path.name}: base: there is none, and differences need a config to be laid over")
    return path.parent / options.base
