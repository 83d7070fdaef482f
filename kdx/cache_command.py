"""`kdx cache`: its arguments, and what it does. As in `kdx.cli`, what it needs is imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from kdx.errors import ConfigError, did_you_mean
from kdx.stopping import Stopper

if TYPE_CHECKING:
    from kdx.cache_key import Wanted
    from kdx.runs import Prepared

HELP = "Fill the caches that a config reads, or bring answers that another program wrote into one."
EPILOG = "Example: kdx cache configs/cached.yaml"


def cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kdx cache`."""
    parser.add_argument("config", type=Path, help="a config file in which teachers or targets say `cache:`")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    parser.add_argument(
        "--import", dest="file", type=Path, metavar="FILE", help="answers in a .npy or .safetensors file, one row each"
    )
    parser.add_argument("--index", type=Path, metavar="FILE", help="a .npy file: the training sample of each row")
    parser.add_argument("--teacher", metavar="NAME", help="whose answers they are, where several teachers say `cache:`")
    parser.add_argument("--field", default="logits", metavar="NAME", help="what a .npy file holds (default: logits)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def cache(options: argparse.Namespace) -> int:
    """Fill the caches of a config; the runs that its teachers are from are trained first where they are missing."""
    from kdx.cache import read_meta
    from kdx.cache_fill import held
    from kdx.cache_import import import_answers
    from kdx.cache_search import folders
    from kdx.config import given_text, load
    from kdx.formats import counted, size
    from kdx.reach import base_of, upstream
    from kdx.runs import Options, carry_out, fill_caches, prepare
    from kdx.runtime import Runtime

    _check_import(options)
    out, notes = Console(), Console(stderr=True)
    stopper = Stopper(notes)
    how = Options(console=notes, quiet=options.quiet, stop=stopper)
    prepared = prepare(
        load(options.config, options.overrides), how, given=given_text(options.config, options.overrides)
    )
    if not prepared.caches:
        raise ConfigError(
            f"teachers: none in {options.config} says `cache:`, nor does a target; add it, as in "
            "teachers.NAME.cache=true"
        )
    if options.file is not None:
        one = _chosen(prepared, options.teacher)
        with held([one], lambda text: notes.print(text, markup=False, highlight=False)):
            import_answers(one, prepared.splits, options.file, options.index, options.field)
    else:
        filled = [one.item for one in prepared.caches.values() if one.options.folder is None]
        read = {base_of(item): None for one in filled for item in upstream(prepared.reached, one)}
        for name in (name for name in read if name in prepared.needs):
            with stopper:
                carry_out(prepared.needs[name], how)
        with stopper:
            fill_caches(prepared, how, Runtime(prepared.spec.runtime))
    for item, one in prepared.caches.items():
        for folder in folders(one, prepared.splits) or [one.folder]:
            meta = read_meta(folder)
            text = "there is none yet" if meta is None else f"{size(meta.size())}, {counted(meta.samples, 'sample')}"
            out.print(f"{item}: {folder}: {text}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _check_import(options: argparse.Namespace) -> None:
    """Refuse what says how answers are brought in where none are."""
    for name in ("index", "teacher"):
        if options.file is None and getattr(options, name) is not None:
            raise ConfigError(f"--{name}: found it without --import, expected --import FILE as well, or neither")


def _chosen(prepared: Prepared, name: str | None) -> Wanted:
    """The teacher that answers are brought in for: one that has no net, and names its cache."""
    alone = {item: one for item, one in prepared.caches.items() if not one.at_hand and one.options.folder is not None}
    if name is None and len(alone) == 1:
        return next(iter(alone.values()))
    if name is None or name not in alone:
        raise ConfigError(
            f"--teacher: found {name!r}, expected a teacher that is a cache alone, as in teachers: "
            f"{{wide: {{cache: FOLDER}}}}; {did_you_mean(name or '', alone)}"
        )
    return alone[name]
