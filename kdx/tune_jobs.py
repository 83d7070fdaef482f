"""One search in several processes of a machine: each asks for trials of its own, until there are enough."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from kdx.formats import number, percent
from kdx.processes import PATIENCE, Share, fresh_processes, orphaned, shares, spared
from kdx.runs import Options, Stopped
from kdx.stopping import Stopper
from kdx.tune import Ground, Search
from kdx.tune_trials import Books, Found, best_of, carry_out_search


def carry_out_with(jobs: int, search: Search, ground: Ground, options: Options, tell: Callable[[Found], None]) -> None:
    """Carry out a search in `jobs` processes, this one among them; `tell` gets the trials of this one.

    The others write their own lines. When one of them dies, its trial is begun once more by whoever asks next.
    Raises `Stopped` when asked to stop, once all of them have saved.
    """
    mine, *others = shares(jobs)
    context = fresh_processes()
    processes = [context.Process(target=_join, args=(search, ground, share)) for share in others]
    with spared():
        for process in processes:
            process.start()
    try:
        if processes:
            mine.take()
        carry_out_search(search, ground, options, tell)
        for process in processes:
            while process.is_alive() and not options.stop():
                process.join(PATIENCE)
        carry_out_search(search, ground, options, tell)  # what a process left that has died meanwhile
        if options.stop():
            raise Stopped("the search was stopped; start it again to go on")
    except Stopped:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        raise
    finally:
        for process in processes:
            process.kill()


def line_of(found: Found, books: Books, total: int, monitor: str) -> str:
    """How far a search has come: the trial that has just ended, and the best one so far."""
    trials = books.found()
    done = sum(one.state != "running" for one in trials)
    best = best_of(trials, minimise=books.minimise)
    parts = [f"[{done}/{total}] trial {found.number}: {said_of(found, monitor)}"]
    if best is not None:
        parts.append(f"best so far trial {best.number} {shown(monitor, best.value)}")
    return "; ".join(parts)


def said_of(found: Found, monitor: str) -> str:
    """What came of a trial, in one line."""
    if found.state == "failed":
        return f"failed: {' '.join(found.reason.split())}"
    if found.state == "pruned":
        epoch = max(found.values, default=0)
        return f"given up at epoch {epoch} with {shown(monitor, found.values.get(epoch))}"
    return shown(monitor, found.value)


def shown(monitor: str, value: float | None) -> str:
    """A validation value with its name."""
    return f"val {monitor} {(percent if monitor == 'accuracy' else number)(value)}"


def _join(search: Search, ground: Ground, share: Share) -> None:
    """What each further process does."""
    share.take()
    console = Console(stderr=True)
    books = Books(search, ground)

    def tell(found: Found) -> None:
        text = line_of(found, books, search.trials, ground.monitor)
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    with Stopper(Console(quiet=True)) as asked:
        options = Options(console=console, quiet=True, stop=lambda: asked() or orphaned())
        try:
            carry_out_search(search, ground, options, tell)
        except Stopped:
            return
