"""Who is told what happens in a run: its own watchers and the hooks of plugins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from kdx.plugins import Registry, compile_hook

Hook = Callable[[Any], None]


@contextmanager
def watching(registry: Registry, *watchers: object, leads: bool = True) -> Iterator[Callable[[str], Hook]]:
    """Register watchers of one run for the length of the block; gives what makes a hook ready by its name.

    A process that does not lead the others tells nobody.
    """
    if not leads:
        yield lambda name: _nobody
        return
    for watcher in watchers:
        registry.manager.register(watcher, name=f"kdx {type(watcher).__name__}")
    try:
        yield partial(compile_hook, registry)
    finally:
        for watcher in watchers:
            registry.manager.unregister(watcher)


def _nobody(report: object) -> None:
    """Takes a report that another process gives to its watchers as well."""
