"""`kdx tune`: its arguments, and what it does. As in `kdx.cli`, what it needs is imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

HELP = "Search for the best values in a space of configs, by validation; the test split is read only with --final."
EPILOG = "Example: kdx tune configs/methods/kd.yaml --space 'losses.kd.temperature={low: 1, high: 8}' --trials 10"


def tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kdx tune`."""
    parser.add_argument("search", type=Path, help="the file of a search (base, space, trials), or a config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the base, in every trial")
    parser.add_argument(
        "--space", action="append", default=[], metavar="KEY=RANGE", help="a part of the space, over that in the file"
    )
    parser.add_argument("--trials", type=int, metavar="N", help="so many trials in all, in place of those in the file")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at once")
    parser.add_argument("--final", action="store_true", help="evaluate the best config on the test split at the end")


def tune(options: argparse.Namespace) -> int:
    """Carry out a search, or go on with it; gives 1 if no trial has a value."""
    from kdx.config import to_yaml
    from kdx.report import comparison, summary_table
    from kdx.runs import Options
    from kdx.stopping import Stopper
    from kdx.tune import check_search, fragment, read_search
    from kdx.tune_jobs import carry_out_with, line_of, shown
    from kdx.tune_report import evaluate_best, write_best, write_page, write_table
    from kdx.tune_trials import Books, Found, best_of

    out, notes = Console(), Console(stderr=True)
    stopper = Stopper(notes)
    how = Options(console=notes, quiet=True, stop=stopper)

    def say(console: Console, text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    search = read_search(options.search, options.overrides, space=options.space, trials=options.trials)
    say(notes, f"{search.name}: checking the plan of each end and choice of the space")
    ground = check_search(search, how)
    books = Books(search, ground)

    def tell(found: Found) -> None:
        say(notes, line_of(found, books, search.trials, ground.monitor))
        with books.lock:
            write_table(search, ground, books.found())

    try:
        with stopper:
            carry_out_with(options.jobs, search, ground, how, tell)
    finally:
        with books.lock:
            trials = books.found()
            best = best_of(trials, minimise=ground.minimise)
            table = write_table(search, ground, trials)
            config = None if best is None else write_best(search, ground, best)
            page = write_page(search, ground, books)
    if best is None or config is None:
        say(notes, f"no trial has a value; {table} says why")
        return 1
    say(out, f"# trial {best.number}: {shown(ground.monitor, best.value)}")
    say(out, to_yaml(fragment(search.space, best.point)))
    if options.final:
        with stopper:
            results = evaluate_best(search, ground, config, how)
        out.print(summary_table(results[0]) if len(results) == 1 else comparison(results)[0])
    say(out, f"config: {config}\nreport: {page}")
    return 0
