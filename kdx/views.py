"""Several views of a sample: one data set, with options of its own for each view."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from kdx.components import Dataset, Split
from kdx.errors import ConfigError, did_you_mean
from kdx.randomness import Randomness
from kdx.types import Batch, DataFacts


class Viewed(Dataset):
    """A data set whose training batches hold further views of each sample: `image@strong` beside `image`.

    A view is the same raw sample with other options, as another augmentation. All views draw the same random numbers,
    so they agree where their augmentations do. Where nothing is augmented, as in evaluation, all views are equal and
    cost nothing.
    """

    name = "viewed"

    def __init__(self, source: Dataset, views: Mapping[str, Dataset]) -> None:
        super().__init__(source.config)
        self.places = source.places
        self._source = source
        self._views = views

    def facts(self) -> DataFacts:
        facts = self._source.facts()
        extra = {f"{name}@{view}": facts.streams[name] for view in self._views for name in self._seen(facts)}
        extra |= {f"{name}@{view}": about for view, data in self._views.items() for name, about in data.records.items()}
        return replace(facts, streams={**facts.streams, **extra})

    def train(self) -> Split:
        return self._source.train()

    def val(self) -> Split | None:
        return self._source.val()

    def test(self) -> Split | None:
        return self._source.test()

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def on_device(self, batch: Batch, randomness: Randomness | None) -> Batch:
        found = dict(self._source.on_device(dict(batch), randomness))
        streams = self._seen(self._source.facts())
        for view, dataset in self._views.items():
            other = found if randomness is None else dataset.on_device(dict(batch), randomness)
            found |= {f"{name}@{view}": other[name] for name in (*streams, *dataset.records) if name in other}
            if randomness is None and "mix_share" in dataset.records:  # each sample is itself
                index = batch["index"]
                found |= {
                    f"mix_share@{view}": torch.ones(len(index), device=index.device),
                    f"mix_partner@{view}": index,
                }
        return found

    def reading(self, streams: Iterable[str]) -> Dataset:
        names = {stream.partition("@")[0] for stream in streams}
        return Viewed(self._source.reading(names), {view: data.reading(names) for view, data in self._views.items()})

    def varies(self, stream: str) -> bool:
        name, _, view = stream.partition("@")
        return self.of(view).varies(name)

    def mixes(self, stream: str) -> bool:
        name, _, view = stream.partition("@")
        return self.of(view).mixes(name)

    def only(self, names: Iterable[str]) -> Dataset:
        """The data set with these of its views; views that nothing reads are not made."""
        kept = {name: view for name, view in self._views.items() if name in set(names)}
        return Viewed(self._source, kept) if kept else self._source

    def of(self, view: str) -> Dataset:
        """The data as one view has them; the main one has an empty name."""
        return self._views[view] if view else self._source

    @staticmethod
    def _seen(facts: DataFacts) -> list[str]:
        return [name for name, stream in facts.streams.items() if stream.kind != "label"]


def with_views(source: Dataset, views: Mapping[str, Mapping[str, Any]]) -> Dataset:
    """A data set with views; `views` maps the name of each to the options in which it differs.

    Raises `ConfigError` for options that data handed over in Python does not have.
    """
    if not views:
        return source
    source.facts()  # what is read for it is shared with the views
    return Viewed(source, {name: _view(source, name, options) for name, options in views.items()})


def _view(source: Dataset, name: str, options: Mapping[str, Any]) -> Dataset:
    known = [item.name for item in fields(source.config)] if is_dataclass(source.config) else []
    known = [option for option in known if option in source.view_options]
    for option in options:
        if option not in known:
            near = did_you_mean(option, known, what="views may differ in")
            raise ConfigError(f"data.views.{name}.{option}: {type(source).__name__} has no such option; {near}")
    try:
        return source.view(replace(source.config, **options) if options else source.config)
    except ConfigError as error:
        raise ConfigError(f"data.views.{name}: {error}") from error
