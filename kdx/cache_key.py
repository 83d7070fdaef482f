"""Which caches a run asks for, what their rows are of, and whether a cache that is there is the right one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from kdx.cache import Meta
from kdx.cache_options import CacheOptions, read_cache
from kdx.components import Dataset
from kdx.data import Splits
from kdx.errors import ConfigError, DataError, did_you_mean
from kdx.identity import model_content, suppliers
from kdx.options import plain_options
from kdx.plan import streams_of
from kdx.plugins import BUILTIN
from kdx.randomness import Randomness
from kdx.reach import Reach, base_of
from kdx.spec import ModelSpec, RunSpec
from kdx.types import Batch
from kdx.views import Viewed

TRIED = 64
"""How many samples tell whether a stream is the same each time."""
VIEWS = 2
"""The place of the number of views in what is said of an augmentation."""
_DIFFERS = {
    "model": "the model or its options are others",
    "taps": "its taps are others",
    "weights": "the weights are others",
    "plugin": "the plugin of the model is another version",
    "precision": "the teacher computed in another precision",
    "target": "the target, its options, its knobs or what it reads are others",
    "plugins": "the plugins of the target, or of what it reads, are of other versions",
    "teachers": "the teachers that it reads, or their weights, are others",
    "labels": "the labels are others",
    "data": "the data are others",
    "data_plugin": "the plugin of the data is another version",
    "classes": "the classes, or their order, are others",
    "samples": "the training samples are others",
    "augmentation": "the augmentation, its seed or the number of views is another",
}


@dataclass(frozen=True)
class Wanted:
    """The cache that a teacher on a view (`item`: `wide`, `wide@strong`) asks for; `parts` decide what its rows are.

    `at_hand` says whether there is a net that could fill it; `runs` are the folders of the runs that its teachers are
    from.
    """

    item: str
    where: str
    options: CacheOptions
    parts: Mapping[str, Any]
    fields: tuple[str, ...]
    samples: int
    views: int
    folders: Path
    at_hand: bool
    runs: tuple[Path, ...] = ()

    @property
    def kind(self) -> str:
        return "target" if self.where.startswith("targets.") else "teacher"

    @property
    def folder(self) -> Path:
        """The folder that it has, or will have."""
        return self.options.folder or self.folders / f"{self.item}-{digest_of([self.parts, sorted(self.fields)])}"

    @property
    def teachers(self) -> set[str]:
        """The teachers whose answers these are, or are made of."""
        return {base_of(item) for item in self.parts.get("teachers", (self.item,))}

    @property
    def has_own_weights(self) -> bool:
        """Whether the answers are of weights that are known, and not of first ones, which follow from the name, too."""
        return any(self.parts.get("weights", ())[:2])

    def only(self, fields: tuple[str, ...]) -> Wanted:
        """The same for some of the fields."""
        parts = dict(self.parts)
        if "taps" in parts:
            parts["taps"] = {name: tap for name, tap in parts["taps"].items() if name in fields}
        return replace(self, parts=parts, fields=fields)

    def check(self, meta: Meta, folder: Path) -> None:
        """Raise `DataError` where a cache is of something else, or holds less; the message says of what.

        Which samples it is of is not looked at.
        """
        if (name := self.difference(meta)) is not None:
            self.refuse(name, meta, folder)
        for name in self.fields:
            if name not in meta.fields:
                near = did_you_mean(name, meta.fields, what="it holds")
                raise DataError(f"{self.where}: {folder} holds no {name!r} of the {self.kind}; {near}")

    def difference(self, meta: Meta) -> str | None:
        """The first of the parts in which a cache is of something else, but for its samples; None where all agree.

        It may hold more fields than are wanted, or less, and more views.
        """
        for name, expected in self.parts.items():
            found = _told(meta, name)
            if found == expected or name == "samples" or (name == "form" and self.options.folder is not None):
                continue
            if name == "augmentation" and self._serves(meta, found, expected):
                continue
            if name == "classes" and found is None:
                continue
            held = [field for field in self.fields if field in meta.fields]
            if name == "taps" and isinstance(found, dict) and all(found.get(f) == expected.get(f) for f in held):
                continue
            return name
        return None

    def refuse(self, name: str, meta: Meta, folder: Path) -> NoReturn:
        """Raise `DataError`: a cache is of something else in this part."""
        advice = "`cache: true` fills a right one" if self.at_hand else "fill it anew for this data"
        raise DataError(
            f"{self.where}: {folder} is not of this {self.kind} on this data: {_DIFFERS.get(name, name)} "
            f"(found {_short(_told(meta, name))}, expected {_short(self.parts[name])}); {advice}"
        )

    def _serves(self, meta: Meta, found: Any, expected: Any) -> bool:
        """Whether another augmentation will do: one of more views, or none where that is insisted on."""
        if found is None:
            return self.options.one_view and self.options.folder is not None
        if not (isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected) == 4):
            return False
        counted = found[VIEWS], expected[VIEWS]
        same = [*found[:VIEWS], *found[VIEWS + 1 :]] == [*expected[:VIEWS], *expected[VIEWS + 1 :]]
        return same and None not in counted and meta.views >= self.views


def caches(
    spec: RunSpec, dataset: Dataset, splits: Splits, reached: Reach, needs: Mapping[str, str]
) -> dict[str, Wanted]:
    """The caches that a run reads, by teacher and view (`wide@strong`). `needs` are the hashes of teachers' runs.

    Raises `ConfigError` where what a teacher reads is not the same each time, so that no answer could be stored.
    """
    found: dict[str, Wanted] = {}
    for item, fields in reached.fields.items():
        model = spec.models[base_of(item)]
        options = read_cache(model.engine.cache, f"{model.where}.cache")
        if options is not None and fields:
            found[item] = _wanted(item, model, options, fields, spec, dataset, splits, reached, needs)
    return found


def _wanted(
    item: str,
    model: ModelSpec,
    options: CacheOptions,
    fields: tuple[str, ...],
    spec: RunSpec,
    dataset: Dataset,
    splits: Splits,
    reached: Reach,
    needs: Mapping[str, str],
) -> Wanted:
    where, at_hand = f"{model.where}.cache", model.at_hand
    view = item.removeprefix(model.name)
    streams = [f"{stream}{view}" for stream in streams_of(model, splits.facts)]
    varies = check_repeatable(where, options, streams, spec, dataset, splits)
    parts: dict[str, Any] = {
        **samples_content(spec, dataset, splits),
        "augmentation": augmentation_content(dataset, streams, spec) if varies else None,
    }
    if not at_hand:
        parts["classes"] = list(splits.facts.classes)
    else:
        supply = suppliers([model], spec.registry)
        parts |= data_plugin(spec)
        content = model_content(model, fields, needs.get(model.name))
        weights = content.pop("weights")
        parts |= {
            "taps": content.pop("taps"),
            "model": [content, list(splits.facts.classes)],
            "weights": weights if any(weights) else [*weights, spec.root.seed],  # first weights follow from the seed
            "plugin": supply if len(supply) > 1 else model.entry.plugin.digest,
            "precision": precision_of(spec, model),
            "form": [options.dtype, options.top],
        }
    if options.top is not None and "logits" not in fields:
        raise ConfigError(f"{where}.top: it is for logits, and nothing reads those of {item}")
    parts = json.loads(json.dumps(parts, default=str))
    views = (spec.view_count or 1) if varies else 1
    return Wanted(item, where, options, parts, fields, len(splits.train), views, folders_of(options, spec), at_hand)


def samples_content(spec: RunSpec, dataset: Dataset, splits: Splits) -> dict[str, Any]:
    """What the data are, but for their augmentation, and which samples a run trains on."""
    source = {key: value for key, value in plain_options(dataset.config).items()
              if key not in (*dataset.places, *spec.data.entry.component.view_options)}  # fmt: skip
    return {
        "data": [spec.data.entry.component.name, dataset.fingerprint(), json.dumps(source, default=str)],
        "samples": digest_of(splits.train.positions.tolist()),
    }


def data_plugin(spec: RunSpec) -> dict[str, Any]:
    """The code that decodes and augments, where it is not that of kdx: no fingerprint of the content tells of it."""
    supply = suppliers([spec.data], spec.registry)
    return {} if supply.keys() == {BUILTIN} else {"data_plugin": supply}


def folders_of(options: CacheOptions, spec: RunSpec) -> Path:
    """The folder of all caches."""
    return Path(options.where) if options.where is not None else Path(spec.root.out) / "cache"


def check_repeatable(
    where: str, options: CacheOptions, streams: list[str], spec: RunSpec, dataset: Dataset, splits: Splits
) -> bool:
    """Whether the streams vary at random. Raises `ConfigError` where they are not the same for a view and a sample."""
    first, again, parts = _tried(dataset, splits, spec.root.seed)
    named = ", ".join(streams)
    if mixed := [one for one in streams if dataset.mixes(one) or not _alike(first[one], parts[one])]:
        raise ConfigError(
            f"{where}: {', '.join(mixed)} is mixed from several samples of a batch, or another each time it is read, "
            "so no stored answer fits it; leave the cache out, read a view without mixing, or, where the method is "
            "defined so, store the teacher's answers and mix those for both samples with the target `mixed_answers`"
        )
    varies = any(dataset.varies(stream) or not _alike(first[stream], again[stream]) for stream in streams)
    if varies and spec.view_count is None and not (options.folder is not None and options.one_view):
        raise ConfigError(
            f"{where}: {named} is augmented anew in each epoch, which no cache can hold; say how many versions of each "
            "sample there are, as in data.views: 8, or leave its augmentation out"
        )
    if varies and spec.view_count == 1 and not options.one_view:
        raise ConfigError(
            f"{where}: with data.views: 1, {named} is one augmented version of each sample, and a student that sees no "
            f"other overfits to it (Beyer et al., 2022); say more views, or {where}.one_view: true"
        )
    return varies


def _tried(dataset: Dataset, splits: Splits, seed: int) -> tuple[Batch, Batch, Batch]:
    """Some samples in one view, in another, and in the first one again but in other batches."""
    count = min(TRIED, len(splits.train))

    def seen(places: list[int], view: int) -> Batch:
        batch = splits.train.fetch(places)
        return dataset.on_device(batch, Randomness(seed, view, batch["index"]))

    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    halves = [seen(half, 0) for half in (order[: count // 2], order[count // 2 :]) if half]
    back = torch.tensor(order).argsort()
    parts = {name: torch.cat([half[name] for half in halves])[back] for name in halves[0]}
    return seen([*range(count)], 0), seen([*range(count)], 1), parts


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-4)


def augmentation_content(dataset: Dataset, streams: Sequence[str], spec: RunSpec) -> list[Any]:
    """What decides how streams vary: the options of each of their views, which a model may name as its input, too."""
    ways = [_options_of(dataset, view) for view in dict.fromkeys(stream.partition("@")[2] for stream in streams)]
    return [ways[0] if len(ways) == 1 else ways, [*streams], spec.view_count, spec.root.seed]


def _options_of(dataset: Dataset, view: str) -> str:
    """The options by which a view varies, in their order, in which augmentations act.

    They are those of the data themselves, which may have been handed over in Python.
    """
    seen = dataset.of(view) if isinstance(dataset, Viewed) else dataset
    able = seen.view_options
    return json.dumps({key: value for key, value in plain_options(seen.config).items() if key in able}, default=str)


def precision_of(spec: RunSpec, model: ModelSpec) -> str:
    return model.engine.precision or spec.runtime.precision


def lookup(positions: Tensor, size: int) -> Tensor | None:
    """Index of a sample -> its row, int64 [size]; None where they are the same."""
    if len(positions) == size and torch.equal(positions, torch.arange(size)):
        return None
    rows = torch.zeros(size, dtype=torch.int64)
    rows[positions] = torch.arange(len(positions))
    return rows


def _told(meta: Meta, name: str) -> Any:
    """What a cache says of one of the parts. That of a teacher with a net names the classes beside the model."""
    model = meta.parts.get("model")
    if name == "classes" and isinstance(model, list) and model:
        return meta.parts.get(name, model[-1])
    return meta.parts.get(name)


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-30:]}"
