"""The command line. Each command imports what it needs when it runs, so that help comes at once."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich_argparse import RawDescriptionRichHelpFormatter

from kdx.cache_command import EPILOG as CACHE_EPILOG
from kdx.cache_command import HELP as CACHE_HELP
from kdx.cache_command import cache, cache_arguments
from kdx.errors import KdxError
from kdx.garbage import seldom_sought
from kdx.stopping import Stopper
from kdx.tune_command import EPILOG, HELP, tune, tune_arguments

if TYPE_CHECKING:
    from rich.table import Table

    from kdx.runs import Prepared

FAILED, REFUSED, STOPPED, INTERRUPTED = 1, 2, 75, 130
"""Exit codes: a bug, an input that was refused, a run that saved its state and can go on (EX_TEMPFAIL), Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parse(arguments)
    errors = Console(stderr=True)
    try:
        _check_processes(options)
        with seldom_sought():
            code: int = options.command(options)
        return code
    except KdxError as error:
        from kdx.runs import Stopped

        stopped = isinstance(error, Stopped)
        if options.debug and not stopped:
            raise
        style = "yellow" if stopped else "red"
        errors.print(_message(error), style=style, markup=False, highlight=False, soft_wrap=True)
        return STOPPED if stopped else REFUSED
    except KeyboardInterrupt:
        if options.debug:
            raise
        errors.print("interrupted; what was saved before is used when it is started again", style="yellow")
        return INTERRUPTED
    except BrokenPipeError:
        return 0
    except Exception as error:
        if options.debug:
            raise
        errors.print(
            f"{type(error).__name__}: {_message(error)}", style="red", markup=False, highlight=False, soft_wrap=True
        )
        errors.print("This is unexpected; --debug shows where it happened.", style="dim")
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "kdx",
        description="Distil a small model from one or several teachers.",
        formatter_class=RawDescriptionRichHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Callable[[Any], int], help: str, epilog: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=help, epilog=epilog, formatter_class=RawDescriptionRichHelpFormatter
        )
        sub.set_defaults(command=command)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    run = add(
        "run", _run, "Train the student of a config, with the teachers and the plain student that it needs.",
        "Example: kdx run configs/multi_teacher.yaml losses.kd.temperature=2 --seeds 0,1,2",
    )  # fmt: skip
    _config_arguments(run)
    run.add_argument("--fresh", action="store_true", help="train anew although a finished run with this content exists")
    run.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would be trained, train nothing"
    )
    run.add_argument("--seeds", metavar="N,N,...", help="run once for each seed and compare with the plain student")
    run.add_argument("--quiet", action="store_true", help="no progress bars, only the table at the end")

    ablate = add(
        "ablate", _ablate, "Carry out a study: variants of one config with several seeds, and one table over all.",
        "Example: kdx ablate configs/ablations/losses.yaml train.epochs=6",
    )  # fmt: skip
    ablate.add_argument("study", type=Path, help="a study file: base, seeds, variants")
    ablate.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to every variant, as in train.epochs=6"
    )
    ablate.add_argument("--seeds", metavar="N,N,...", help="these seeds in place of those in the file")
    ablate.add_argument("--fresh", action="store_true", help="train anew although finished trials exist")
    ablate.add_argument(
        "--explain", action="store_true", help="show the first plan, and how those of the others differ; train nothing"
    )
    ablate.add_argument(
        "--no-fanout", dest="fanout", action="store_false", help="train each trial by itself, not side by side"
    )
    ablate.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes at once; with Ray, at least as many tasks"
    )
    ablate.add_argument(
        "--executor", choices=("local", "ray"), default="local", help="where trials run: here, or on a Ray cluster"
    )
    ablate.add_argument("--cpus", type=float, metavar="N", help="CPU cores of each task of Ray (default: 1)")
    ablate.add_argument("--gpus", type=float, metavar="N", help="GPUs of each task of Ray (default: 0)")
    ablate.add_argument("--quiet", action="store_true", help="no live table, one line for each trial")

    tune_arguments(add("tune", tune, HELP, EPILOG))
    cache_arguments(add("cache", cache, CACHE_HELP, CACHE_EPILOG))

    report = add(
        "report", _report, "Write the report of a finished run or of a study anew, or compare several of them.",
        "Example: kdx report runs/full-* runs/no_hint-* --out comparison",
    )  # fmt: skip
    report.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="the folder of a run or of a study")
    report.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write the tables and the page of the comparison into this folder"
    )

    explain = add("explain", _explain, "Show the plan of a config: what is built, what reads what, which shapes.")
    _config_arguments(explain)
    explain.add_argument(
        "--taps",
        metavar="MODEL",
        help="list what can be tapped in a model of the config (student, or a teacher's name)",
    )
    explain.add_argument("--mermaid", action="store_true", help="print a Mermaid flow chart")
    explain.add_argument("--text", action="store_true", help="print plain text, made for diff")

    plugins = add("plugins", _plugins, "List the plugins, or show one component with its options.")
    plugins.add_argument("name", nargs="?", help="a component, as in kd")
    plugins.add_argument(
        "--plugin", action="append", default=[], metavar="FILE_OR_MODULE", help="load this one as well"
    )

    init = add("init", _init, "Look at a folder of images and write a commented config that runs on it.")
    init.add_argument("folder", type=Path, help="a folder with one sub-folder per class")
    init.add_argument(
        "--out", type=Path, default=Path("kdx.yaml"), help="where to write the config (default: kdx.yaml)"
    )
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line. Overrides may stand before and after options, which argparse does not see to."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a config file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the config, as in losses.hint=null"
    )


def _check_processes(options: argparse.Namespace) -> None:
    """Of all commands only `run` is for several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and options.command is not _run:
        raise KdxError("torchrun: several processes work at one `kdx run` together; start any other command without it")


def _run(options: argparse.Namespace) -> int:
    from kdx.config import given_text, load
    from kdx.distributed import the_group
    from kdx.report import comparison, summary_table
    from kdx.runs import Options, carry_out, prepare

    leads = the_group().leads
    out, notes = Console(quiet=not leads), Console(stderr=True, quiet=not leads)
    seeds = _seeds(options.seeds)
    stopper = Stopper(notes)
    how = Options(fresh=options.fresh, console=notes, quiet=options.quiet, stop=stopper)
    results = []
    for seed in seeds:
        overrides = [*options.overrides, *([f"seed={seed}"] if seed is not None else [])]
        prepared = prepare(load(options.config, overrides), how, given=given_text(options.config, overrides))
        if options.dry_run:
            _dry_run(prepared, how, out)
            continue
        with stopper:
            result = carry_out(prepared, how)
        results.append(result)
        out.print(summary_table(result))
        out.print(f"report: {prepared.folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    if len(results) > 1:
        out.print(comparison(results)[0])
    return 0


def _ablate(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from kdx.executors import carry_out_study
    from kdx.findings import of_study
    from kdx.formats import counted
    from kdx.runs import Options
    from kdx.study import Outcome, plan_differences, plan_study, read_study
    from kdx.study_live import Board
    from kdx.study_report import lines_of, write_page, write_tables
    from kdx.study_table import study_table, warnings

    out, notes = Console(), Console(stderr=True)
    stopper = Stopper(notes)
    how = Options(fresh=options.fresh, console=notes, quiet=True, stop=stopper)
    study = read_study(options.study)
    if options.seeds is not None:
        study = replace(study, seeds=tuple(seed for seed in _seeds(options.seeds) if seed is not None))
    notes.print(f"{study.name}: checking {counted(len(study.variants), 'plan')}", markup=False, highlight=False)
    trials, plans = plan_study(study, how, options.overrides)
    for warning in warnings(trials, study.reference):
        notes.print(warning, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if options.explain:
        for variant, text in plan_differences(plans):
            out.print(f"--- {variant}\n{text}\n", markup=False, highlight=False, soft_wrap=True)
        return 0
    runs = Path(trials[0].config.get("out", "runs"))
    folder = runs / f"{study.name}_study"
    findings = of_study(study, trials, [], runs)

    def tell(outcomes: Sequence[Outcome], left: float) -> None:
        nonlocal findings
        findings = of_study(study, trials, outcomes, runs)
        board.tell(outcomes, write_tables(folder, findings), left)

    try:
        with stopper, Board(notes, study, plain=options.quiet) as board:
            outcomes = carry_out_study(
                trials, how, tell, fan_out=options.fanout, jobs=options.jobs, execute=_executor(options, notes)
            )
    finally:
        if findings.outcomes:
            path = write_page(folder, findings)
    out.print(study_table(study.name, lines_of(findings), study.reference))
    out.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)
    return FAILED if any(outcome.result is None for outcome in outcomes) else 0


def _executor(options: argparse.Namespace, notes: Console) -> Any:
    """Where the trials of a study are carried out; None for this very process."""
    if options.jobs < 1:
        raise KdxError(f"--jobs: found {options.jobs}, expected 1 or more")
    if options.executor == "ray":
        from kdx.ray_executor import Ray

        given = {"cpus": options.cpus, "gpus": options.gpus}
        return Ray(**{name: value for name, value in given.items() if value is not None})
    if options.cpus is not None or options.gpus is not None:
        raise KdxError("--cpus, --gpus: only tasks of Ray have them; add --executor ray, or say --jobs alone")
    if options.jobs > 1:
        from functools import partial

        from kdx.processes import Processes

        say = partial(notes.print, markup=False, highlight=False, soft_wrap=True)
        return Processes(options.jobs, None if options.quiet else say)
    return None


def _report(options: argparse.Namespace) -> int:
    from kdx.findings import FILE, of_folders
    from kdx.report import summary_table, write_report
    from kdx.result import read_result
    from kdx.study_report import lines_of, write_page, write_tables
    from kdx.study_table import study_table

    out = Console()
    folder, *others = options.folders
    is_study = not others and (folder / FILE).is_file()
    if not others and not is_study and options.out is None:
        path = write_report(folder)
        out.print(summary_table(read_result(folder)))
        out.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)
        return 0
    findings = of_folders(options.folders)
    out.print(study_table(findings.name, lines_of(findings), findings.reference))
    place = folder if is_study and options.out is None else options.out
    if place is not None:
        write_tables(place, findings)
        path = write_page(place, findings)
        out.print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _dry_run(prepared: Prepared, how: Any, out: Console) -> None:
    from kdx.runs import check_run, family, finished
    from kdx.table import plan_table

    runs = [one for one, _ in family(prepared, how)]
    plans = [check_run(one, how) for one in runs]
    out.print(plan_table(plans[-1]))
    for one in runs:
        state = (
            "finished"
            if finished(one)
            else "half finished"
            if (one.folder / "checkpoint").exists()
            else "to be trained"
        )
        out.print(f"{one.folder}: {state}", markup=False, highlight=False, soft_wrap=True)


def _explain(options: argparse.Namespace) -> int:
    from kdx.config import load
    from kdx.runs import Options, build_plan, prepare
    from kdx.runtime_choice import choice_remarks
    from kdx.table import plan_mermaid, plan_table, plan_text, remarks

    how = Options(quiet=True)
    prepared = prepare(load(options.config, options.overrides), how)
    if options.taps is not None:
        Console().print(_tap_table(prepared, options.taps))
        return 0
    plan = build_plan(prepared, how, trained=False)
    if options.mermaid:
        sys.stdout.write(plan_mermaid(plan))
    elif options.text:
        sys.stdout.write(plan_text(plan))
    else:
        out = Console()
        out.print(plan_table(plan))
        for line in (*remarks(plan), *choice_remarks(prepared.spec, prepared.folder)):
            out.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _tap_table(prepared: Prepared, name: str) -> Table:
    from kdx.errors import ConfigError, did_you_mean
    from kdx.plan import build_model
    from kdx.tap_list import tap_table, tappable

    spec = prepared.spec
    if name not in spec.models:
        raise ConfigError(f"--taps: the config has no model {name!r}; {did_you_mean(name, spec.models)}")
    network = build_model(spec.models[name], prepared.splits.facts, spec.root.seed)
    return tap_table(f"{name}: what can be tapped", tappable(network, prepared.sample))


def _plugins(options: argparse.Namespace) -> int:
    from kdx.catalogue import component_view, plugin_table
    from kdx.plugins import discover

    registry = discover(options.plugin, folder=Path.cwd())
    out = Console()
    for item in [plugin_table(registry)] if options.name is None else component_view(registry, options.name):
        out.print(item)
    return 0


def _init(options: argparse.Namespace) -> int:
    from kdx.init import scan, write_config

    facts = scan(options.folder)
    path = write_config(facts, options.out)
    Console().print(f"wrote {path}: look at it, then kdx run {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _seeds(text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    try:
        seeds: list[int | None] = [int(part) for part in text.split(",")]
    except ValueError:
        raise KdxError(f"--seeds: found {text!r}, expected whole numbers with commas, as in 0,1,2") from None
    if len(set(seeds)) != len(seeds):
        raise KdxError(f"--seeds: {text!r} names a seed twice")
    return seeds


def _message(error: BaseException) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


def _version() -> str:
    from kdx import __version__

    return f"kdx {__version__}"
