"""Errors that a person is meant to read: the command line prints their message and no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KdxError(Exception):
    """Anything kdx refuses. The message says where, what was found, and what was expected."""


class ConfigError(KdxError):
    """A config file or an override is wrong."""


class PluginError(KdxError):
    """A plugin is missing, broken or clashes with another."""


class PlanError(KdxError):
    """The parts named by a config do not fit together."""


class DataError(KdxError):
    """A data set is missing, unreadable or inconsistent."""


class CheckpointError(KdxError):
    """A file of weights or of training state is unreadable, altered or of another run."""


def did_you_mean(word: str, choices: Iterable[str], *, what: str = "known") -> str:
    """A sentence that ends an error message: the nearest choice, and the list of all of them.

    >>> did_you_mean("temprature", ["temperature", "weight"])
    "did you mean 'temperature'? (known: temperature, weight)"
    """
    names = sorted(set(choices))
    listing = f"{what}: {', '.join(names) if names else 'none'}"
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'? ({listing})" if near else listing
