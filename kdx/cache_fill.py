"""Fills the caches of a run from its teachers and targets, in the order of the training samples, view by view."""

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

from kdx.cache import BLOCK, Meta, Writer, fields_of
from kdx.cache_key import Wanted
from kdx.cache_search import files_of, note_samples, note_weights, with_fewer_views
from kdx.calls import Call, ModelCall, NodeCall, Values, execute
from kdx.components import Dataset
from kdx.data import Splits, View
from kdx.errors import DataError, KdxError, PlanError
from kdx.formats import counted
from kdx.formats import size as size_text
from kdx.guard import NAMED, guarded
from kdx.loader import in_order
from kdx.locks import wait_for
from kdx.plan import Plan
from kdx.presence import ALWAYS
from kdx.presence import held as present_of
from kdx.randomness import Randomness
from kdx.recall import INPUTS, Recall, stored_of
from kdx.runtime import Runtime
from kdx.stopping import Stopped
from kdx.storable import check_samples

SYNC_BYTES = 64 << 20
"""After so many bytes the rows are brought onto the disk."""
TOLERANCE = 1e-2
"""By how much of its largest value a teacher's answer may depend on the batch around a sample; more is no rounding."""


@dataclass(frozen=True)
class Job:
    """A cache to be filled, and the calls that give its answers in their order: the teacher, or the target after all
    that it reads.
    """

    wanted: Wanted
    calls: tuple[Call, ...]

    @property
    def nodes(self) -> tuple[NodeCall, ...]:
        return tuple(call for call in self.calls if isinstance(call, NodeCall))

    def answers(self, values: Values) -> dict[str, Tensor]:
        """Field -> answers for a batch."""
        return {name: values[f"{self.wanted.item}.{name}"] for name in self.wanted.fields}


@dataclass(frozen=True)
class Source:
    """What a run's samples and their views are, and the constants of its targets: all that decides what is stored.
    `batch` is that of training.
    """

    dataset: Dataset
    splits: Splits
    runtime: Runtime
    seed: int
    batch: int
    workers: int
    knobs: Mapping[str, Tensor]


@contextmanager
def held(
    wanted: Iterable[Wanted], say: Callable[[str], None], stop: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Hold the locks of caches that are to be filled; another process that fills them is waited for.

    Raises `Stopped` when it is asked to stop while it waits.
    """
    with ExitStack() as stack:
        for folder in sorted({one.folder for one in wanted}):
            lock = filelock.FileLock(folder.parent / f".{folder.name}.lock")
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=0)
            except filelock.Timeout:
                say(f"{folder}: another process fills it; waiting")
                wait_for(lock, stop, f"{folder}: stopped while another process fills it")
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
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Fill caches from the teachers and targets of a plan. What an earlier process has finished is kept.

    Raises `KdxError` where the disk has not the room, `PlanError` for answers that no cache can hold, and `Stopped`
    after the batch at which it is asked to stop; all whole blocks are stored then.
    """
    spec = plan.spec
    jobs = {one.item: Job(one, _chain(plan, one.item)) for one in wanted}
    batch = spec.train.batch // spec.train.accumulate
    read = {key.removeprefix("batch.") for job in jobs.values() for call in job.calls for key in call.reads
            if key.startswith("batch.")}  # fmt: skip
    source = Source(
        dataset.reading({name for key in read for name in (key, key.partition("@")[0])}),
        splits,
        runtime,
        spec.root.seed,
        batch,
        spec.runtime.workers,
        {key: torch.tensor(knob, device=runtime.device) for key, knob in plan.knobs.items() if isinstance(knob, float)},
    )
    metas = {item: _meta(job, plan, source) for item, job in jobs.items()}
    _check_room(wanted, metas, console, quiet)
    with ExitStack() as stack:
        writers: dict[str, Writer] = {}
        for one in wanted:
            writers[one.item] = Writer(one.folder, metas[one.item])
            stack.callback(writers[one.item].close)
            note_samples(one.folder, splits.train.positions)
            note_weights(one.folder, one)
            for line in _copied(one, writers[one.item], splits, stop):
                if not quiet:
                    console.print(line, markup=False, highlight=False, soft_wrap=True)
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
                    _fill_view(view, alike, jobs, source, lambda: bar.advance(task), stop)


def _copied(one: Wanted, writer: Writer, splits: Splits, stop: Callable[[], bool]) -> Iterator[str]:
    """Copy the views that a cache of the same answers holds, which has fewer of them, and tell of it. Raises `Stopped`
    between two blocks when it is asked to stop.
    """
    meta = writer.meta
    if not writer.missing(meta.views - 1) or (found := with_fewer_views(one, splits)) is None:
        return
    store, rows = found
    views, files = min(store.meta.views, meta.views), files_of(store.meta, meta.fields)
    needed = [[*writer.missing(view)] for view in range(views)]
    if not any(needed) or any(store.meta.fields[name] != field for name, field in meta.fields.items()):
        return
    try:
        store.verify(files)
    except DataError:  # the run that reads it is told; this one computes all by itself
        return
    yield f"{one.item}: {counted(views, 'view')} of {meta.views} copied from {store.folder}"
    for view, missing in enumerate(needed):
        try:
            for block in missing:
                _check_stop(stop, [one.item])
                places = torch.tensor(meta.places(block))
                writer.copy(block, store.rows(view * store.meta.samples + rows[places], files))
        except Stopped:
            writer.sync()
            raise
        writer.sync()


def _check_stop(stop: Callable[[], bool], items: Iterable[str]) -> None:
    """Raise `Stopped` where a filling is asked to stop."""
    if stop():
        named = ", ".join(items)
        raise Stopped(f"{named}: stopped while the cache was filled, what is stored is kept; start it again to go on")


def _chain(plan: Plan, item: str, *, whole: bool = False) -> tuple[Call, ...]:
    """The calls that a teacher or target needs for its answer, itself the last; with `whole` those of which the answers
    that are stored were made, too.
    """
    makers = {key: call for call in plan.teacher_calls for key in call.gives}
    found = {call.name: call for call in plan.teacher_calls if call.name == item}
    waiting = [*found.values()]
    while waiting:
        call = waiting.pop()
        needed = [makers[key] for key in call.reads if key in makers and (whole or not stored_of([call]))]
        waiting += [one for one in needed if one.name not in found]
        found |= {one.name: one for one in needed}
    for call in found.values():
        if isinstance(call, NodeCall):
            call.module.eval()
    return tuple(call for call in plan.teacher_calls if call.name in found)


def _fill_view(
    view: int,
    writers: Mapping[str, Writer],
    jobs: Mapping[str, Job],
    source: Source,
    done: Callable[[], None],
    stop: Callable[[], bool],
) -> None:
    """One pass over the samples of which a block is missing somewhere. The caches have blocks of one size."""
    needed = {item: writer.missing(view) for item, writer in writers.items() if view < writer.meta.views}
    meta = next(iter(writers.values())).meta
    blocks = sorted({block for missing in needed.values() for block in missing})
    answers = _answers(view, [meta.places(block) for block in blocks], [jobs[item] for item in needed], source, stop)
    unsynced = 0
    try:
        for block, found in zip(blocks, answers, strict=True):
            for item, missing in needed.items():
                if block in missing:
                    writers[item].write(block, found[item])
                    unsynced += sum(tensor.nbytes for tensor in found[item].values())
                    done()
            if unsynced >= SYNC_BYTES:
                unsynced = 0
                _sync(writers)
    except Stopped:
        _sync(writers)
        raise
    _sync(writers)


def _sync(writers: Mapping[str, Writer]) -> None:
    for writer in writers.values():
        writer.sync()


@torch.no_grad()
def _answers(
    view: int, blocks: Sequence[range], jobs: Sequence[Job], source: Source, stop: Callable[[], bool]
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """What is to be stored for each block of samples, on the CPU: teacher and view, or target -> field -> [rows, ...].

    Each batch has the size that it has in training, the last one of a block filled up, for a net may round differently
    in batches of another size. Raises `Stopped` between two batches when it is asked to stop.
    """
    size = source.batch
    rows = [place for block in blocks for place in _filled_up(block, size, len(source.splits.train))]
    if not rows:
        return
    train, chosen = source.splits.train, torch.tensor(rows)
    labels = None if train.labels is None else train.labels[chosen]
    batches = in_order(View(train.source, train.positions[chosen], labels), size, source.workers)
    for block in blocks:
        parts: dict[str, dict[str, list[Tensor]]] = {job.wanted.item: {} for job in jobs}
        for _ in range(-(-len(block) // size)):
            _check_stop(stop, [job.wanted.item for job in jobs])
            values = _run(next(batches), view, jobs, source)
            for job in jobs:
                for name, answer in job.answers(values).items():
                    parts[job.wanted.item].setdefault(name, []).append(answer.cpu())
        yield {item: {name: torch.cat(found)[: len(block)] for name, found in fields.items()}
               for item, fields in parts.items()}  # fmt: skip


def _filled_up(block: range, size: int, samples: int) -> list[int]:
    """The places of a block, and after them others until they are whole batches."""
    return [*block, *((block.stop + i) % samples for i in range(-len(block) % size))]


def _run(batch: Mapping[str, Tensor], view: int, jobs: Iterable[Job], source: Source) -> Values:
    """All values of a batch, once it is sure that those of which targets are made are numbers."""
    jobs = [*jobs]
    calls = {call.name: call for job in jobs for call in job.calls}
    rows = Recall(stored_of(calls.values())).rows(batch["index"], view)
    moved = source.runtime.move(dict(batch))
    seen = source.dataset.on_device(moved, Randomness(source.seed, view, moved["index"]))
    values: Values = {f"batch.{name}": tensor for name, tensor in {**seen, **source.runtime.move(rows)}.items()}
    values |= source.knobs
    models = [call for call in calls.values() if isinstance(call, ModelCall)]
    with source.runtime.stopwatch.phase("teachers"), source.runtime.autocast():
        execute(models, values)
        for job in jobs:
            if job.nodes:
                guarded(job.calls, {}, "refuse").inspect(values)  # puts 0 where a sample lacks what a teacher reads
                execute(job.nodes, values)
                _check_finite(job, values)
    return values


def _check_finite(job: Job, values: Values) -> None:
    """Raise `DataError` for what a target is made of, or gives in the form in which it is stored, and is no number."""
    target, options = job.calls[-1], job.wanted.options
    for call in job.calls:
        if call is not target and isinstance(call, NodeCall):
            continue
        for key in call.gives:
            value: Tensor = values[key]
            value = value.to(options.stored_as) if call is target and value.is_floating_point() else value
            bad = ~value.reshape(len(value), -1).isfinite().all(1)
            bad = bad if call.presence == ALWAYS else bad & present_of(call.presence, values)
            if bad.any():
                named = [str(sample) for sample in sorted(values["batch.index"][bad].tolist())]
                more = ", ..." if len(named) > NAMED else ""
                raise DataError(
                    f"{job.wanted.where}: {key} is nan or inf for {counted(len(named), 'sample')} (batch.index "
                    f"{', '.join(named[:NAMED])}{more}), which no cache of a target may hold; expected finite numbers: "
                    "check weights, precision and dtype, or leave the cache out of the target"
                )


@torch.no_grad()
def _meta(job: Job, plan: Plan, source: Source) -> Meta:
    """The form of the rows, from some samples, which also tell whether an answer depends on the batch around it."""
    wanted, train, options = job.wanted, source.splits.train, job.wanted.options
    count = min(source.batch, len(train))
    batch = train.fetch([*range(count)])
    values = _run(batch, 0, [job], source)
    part = job.answers(_run({name: value[: max(1, count // 2)] for name, value in batch.items()}, 0, [job], source))
    answers, parts = job.answers(values), dict(wanted.parts)
    for name, answer in answers.items():
        if answer.ndim == 0 or len(answer) != count:
            raise PlanError(f"{wanted.where}: {wanted.item}.{name} is not one answer for each sample; leave it out")
        other = part[name].double()
        gap = (answer[: len(other)].double() - other).abs().max()
        if gap > TOLERANCE * other.abs().max():
            raise PlanError(
                f"{wanted.where}: {wanted.item}.{name} depends on the batch around a sample (by {gap:.2g}), as "
                "with statistics of the batch; such an answer cannot be stored"
            )
    if job.nodes:
        check_samples(wanted.where, job.nodes, values)
        *made_of, target = _chain(plan, wanted.item, whole=True)
        read = {key for call in (*made_of, target) for key in call.reads}  # others may read more of these calls
        given = (key for call in made_of for key in call.gives)
        parts[INPUTS] = {key: list(plan.shapes[key]) for key in given if key in read and key in plan.shapes}
    logits = answers.get("logits")
    if options.top is not None and logits is not None and logits.ndim == 2 and options.top >= logits.shape[1]:
        classes = logits.shape[1]
        raise PlanError(f"{wanted.where}.top: found {options.top}, expected fewer than the {classes} classes")
    fields = fields_of(answers, options.stored_as, options.top)
    return Meta(parts, fields, wanted.samples, wanted.views, -(-BLOCK // source.batch) * source.batch)


def _check_room(wanted: Sequence[Wanted], metas: Mapping[str, Meta], console: Console, quiet: bool) -> None:
    """Say how large the caches will be. Raises `KdxError` where the disk has not so much room."""
    for one in wanted:
        meta, folder = metas[one.item], one.folder
        free = shutil.disk_usage(_existing(folder)).free
        have = sum(path.stat().st_blocks * 512 for path in folder.glob("*.bin"))
        size = meta.size()
        if not quiet:
            fields = ", ".join(one.fields)
            samples = counted(meta.samples, "sample")
            text = f"{one.item}: {size_text(size)} for {fields} of {samples}, views: {meta.views}, into {folder}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        if size - have > free:
            raise KdxError(
                f"{one.where}: {folder} needs {size_text(size - have)}, and {size_text(free)} are free; store less, as "
                "with `dtype: float16` or `top: 32`"
            )


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)
