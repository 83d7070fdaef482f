"""Fills the caches of a run from its live teachers, in the order of the training samples, view by view."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch
from rich import progress as bars
from rich.console import Console
from torch import Tensor

from kdx.cache import BLOCK, Meta, Writer, fields_of, open_store
from kdx.cache_key import Wanted, lookup
from kdx.calls import ModelCall, Values
from kdx.components import Dataset
from kdx.data import Splits, View, in_order
from kdx.errors import DataError, KdxError, PlanError
from kdx.formats import size as size_text
from kdx.plan import Plan
from kdx.randomness import Randomness
from kdx.recall import Stored
from kdx.runtime import Runtime

SYNC_BYTES = 64 << 20
"""After so many bytes the rows are brought onto the disk."""
TOLERANCE = 1e-2
"""By how much of its largest value a teacher's answer may depend on the batch around a sample; more is no rounding."""


@dataclass(frozen=True)
class Source:
    """What a run's samples and their views are: all that decides what a teacher sees. `batch` is that of training."""

    dataset: Dataset
    splits: Splits
    runtime: Runtime
    seed: int
    batch: int
    workers: int


def opened(wanted: Mapping[str, Wanted], splits: Splits, *, verify: bool) -> dict[str, Stored]:
    """Those of the caches that are complete, by teacher and view.

    Raises `DataError` for one that is damaged or of something else, and for one that is named and is not there.
    """
    found: dict[str, Stored] = {}
    for item, one in wanted.items():
        store = open_store(one.folder, verify=verify)
        if store is not None:
            one.check(store.meta, store.folder)
            found[item] = Stored(store, one.fields, lookup(splits.train.positions, splits.facts.size))
        elif one.options.folder is not None:
            raise DataError(
                f"{one.where}: there is no complete cache in {one.folder}; `cache: true` fills one, or kdx cache "
                "CONFIG --import FILE brings answers of another program there"
            )
    return found


@contextmanager
def held(wanted: Iterable[Wanted], say: Callable[[str], None]) -> Iterator[None]:
    """Hold the locks of caches that are to be filled; another process that fills them is waited for."""
    with ExitStack() as stack:
        for folder in sorted({one.folder for one in wanted}):
            lock = filelock.FileLock(folder.parent / f".{folder.name}.lock")
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=0)
            except filelock.Timeout:
                say(f"{folder}: another process fills it; waiting")
                lock.acquire()
            except OSError as error:
                raise KdxError(f"nothing can be written into {folder.parent}: {error.strerror or error}") from error
            stack.callback(lock.release)
        yield


def fill(
    plan: Plan,
    wanted: Sequence[Wanted],
    dataset: Dataset,
    splits: Splits,
    runtime: Runtime,
    console: Console,
    *,
    quiet: bool = False,
) -> None:
    """Fill caches from the live teachers of a plan. What an earlier process has finished is kept.

    Raises `KdxError` where the disk has not the room, and `PlanError` for answers that no cache can hold.
    """
    spec = plan.spec
    calls = {call.name: call for call in plan.teacher_calls if isinstance(call, ModelCall)}
    batch = spec.train.batch // spec.train.accumulate
    read = {key.removeprefix("batch.") for one in wanted for key in calls[one.item].reads}
    source = Source(
        dataset.reading({name for key in read for name in (key, key.partition("@")[0])}),
        splits,
        runtime,
        spec.root.seed,
        batch,
        spec.runtime.workers,
    )
    metas = {one.item: _meta(one, calls[one.item], source) for one in wanted}
    _check_room(wanted, metas, console, quiet)
    with ExitStack() as stack:
        writers: dict[str, Writer] = {}
        for one in wanted:
            writers[one.item] = Writer(one.folder, metas[one.item])
            stack.callback(writers[one.item].close)
        total = sum(len(writer.missing(view)) for writer in writers.values() for view in range(writer.meta.views))
        bar = bars.Progress(
            bars.TextColumn("filling the cache"), bars.BarColumn(), bars.TaskProgressColumn(),
            bars.TimeRemainingColumn(), console=console, disable=quiet,
        )  # fmt: skip
        with bar:
            task = bar.add_task("", total=total)
            for block in {writer.meta.block for writer in writers.values()}:  # of an earlier process, they may differ
                alike = {item: writer for item, writer in writers.items() if writer.meta.block == block}
                for view in range(max(writer.meta.views for writer in alike.values())):
                    _fill_view(view, alike, calls, source, lambda: bar.advance(task))


def _fill_view(
    view: int, writers: Mapping[str, Writer], calls: Mapping[str, ModelCall], source: Source, done: Callable[[], None]
) -> None:
    """One pass over the samples of which a block is missing somewhere. The caches have blocks of one size."""
    needed = {item: writer.missing(view) for item, writer in writers.items() if view < writer.meta.views}
    meta = next(iter(writers.values())).meta
    blocks = sorted({block for missing in needed.values() for block in missing})
    answers = _answers(view, [meta.places(block) for block in blocks], {item: calls[item] for item in needed}, source)
    unsynced = 0
    for block, found in zip(blocks, answers, strict=True):
        for item, missing in needed.items():
            if block in missing:
                writers[item].write(block, found[item])
                unsynced += sum(tensor.nbytes for tensor in found[item].values())
                done()
        if unsynced >= SYNC_BYTES:
            unsynced = 0
            _sync(writers)
    _sync(writers)


def _sync(writers: Mapping[str, Writer]) -> None:
    for writer in writers.values():
        writer.sync()


@torch.no_grad()
def _answers(
    view: int, blocks: Sequence[range], calls: Mapping[str, ModelCall], source: Source
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """What the calls give for each block of samples, on the CPU: teacher and view -> field -> [rows, ...].

    Each batch has the size that it has in training, the last one of a block filled up, for a net may round differently
    in batches of another size.
    """
    size = source.batch
    rows = [place for block in blocks for place in _filled_up(block, size, len(source.splits.train))]
    if not rows:
        return
    train = source.splits.train
    batches = in_order(View(train.source, train.positions[torch.tensor(rows)], None), size, source.workers)
    for block in blocks:
        parts: dict[str, dict[str, list[Tensor]]] = {item: {} for item in calls}
        for _ in range(-(-len(block) // size)):
            values = _run(next(batches), view, calls.values(), source)
            for item, call in calls.items():
                for name in call.module.wanted:
                    parts[item].setdefault(name, []).append(values[f"{item}.{name}"].cpu())
        yield {item: {name: torch.cat(found)[: len(block)] for name, found in fields.items()}
               for item, fields in parts.items()}  # fmt: skip


def _filled_up(block: range, size: int, samples: int) -> list[int]:
    """The places of a block, and after them others until they are whole batches."""
    return [*block, *((block.stop + i) % samples for i in range(-len(block) % size))]


def _run(batch: Mapping[str, Tensor], view: int, calls: Iterable[ModelCall], source: Source) -> Values:
    moved = source.runtime.move(dict(batch))
    seen = source.dataset.on_device(moved, Randomness(source.seed, view, moved["index"]))
    values: Values = {f"batch.{name}": tensor for name, tensor in seen.items()}
    with source.runtime.stopwatch.phase("teachers"), source.runtime.autocast():
        for call in calls:
            call.run(values)
    return values


@torch.no_grad()
def _meta(wanted: Wanted, call: ModelCall, source: Source) -> Meta:
    """The form of the rows, from some samples, which also tell whether an answer depends on the batch around it."""
    train, options = source.splits.train, wanted.options
    count = min(source.batch, len(train))
    batch = train.fetch([*range(count)])
    values = _run(batch, 0, [call], source)
    part = _run({name: value[: max(1, count // 2)] for name, value in batch.items()}, 0, [call], source)
    answers = {name: values[f"{wanted.item}.{name}"] for name in wanted.fields}
    for name, answer in answers.items():
        if answer.ndim == 0 or len(answer) != count:
            raise PlanError(f"{wanted.where}: {wanted.item}.{name} is not one answer for each sample; leave it out")
        other = part[f"{wanted.item}.{name}"].double()
        gap = (answer[: len(other)].double() - other).abs().max()
        if gap > TOLERANCE * other.abs().max():
            raise PlanError(
                f"{wanted.where}: {wanted.item}.{name} depends on the batch around a sample (by {gap:.2g}), as "
                "with statistics of the batch; such an answer cannot be stored"
            )
    if options.top is not None and answers["logits"].ndim == 2 and options.top >= answers["logits"].shape[1]:
        classes = answers["logits"].shape[1]
        raise PlanError(f"{wanted.where}.top: found {options.top}, expected fewer than the {classes} classes")
    fields = fields_of(answers, options.stored_as, options.top)
    return Meta(wanted.parts, fields, wanted.samples, wanted.views, -(-BLOCK // source.batch) * source.batch)


def _check_room(wanted: Sequence[Wanted], metas: Mapping[str, Meta], console: Console, quiet: bool) -> None:
    """Say how large the caches will be. Raises `KdxError` where the disk has not so much room."""
    for one in wanted:
        meta, folder = metas[one.item], one.folder
        free = shutil.disk_usage(_existing(folder)).free
        have = sum(path.stat().st_blocks * 512 for path in folder.glob("*.bin"))
        size = meta.size()
        if not quiet:
            fields = ", ".join(one.fields)
            text = (f"{one.item}: {size_text(size)} for {fields} of {meta.samples} samples, views: {meta.views}, "
                    f"into {folder}")  # fmt: skip
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        if size - have > free:
            raise KdxError(
                f"{one.where}: {folder} needs {size_text(size - have)}, and {size_text(free)} are free; store less, as "
                "with `dtype: float16` or `top: 32`"
            )


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)


def incomplete(wanted: Iterable[Wanted]) -> list[Wanted]:
    """The caches that lack something and may be filled."""
    found: list[Wanted] = []
    for one in wanted:
        if one.options.folder is None and open_store(one.folder) is None:
            found.append(one)
    return found
