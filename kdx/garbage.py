"""When Python looks for garbage: seldom while a command loads libraries, which makes 350,000 objects and no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

SELDOM = (100_000, 10, 10)
USUAL = gc.get_threshold()


@contextmanager
def seldom_sought() -> Iterator[None]:
    """Look through the objects at hand seldom within the block, until `as_usual` is called."""
    gc.set_threshold(*SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*USUAL)


def as_usual() -> None:
    """Look as often as usual, where a command has put it off; a program that calls kdx has its own say in this."""
    if gc.get_threshold() == SELDOM:
        gc.set_threshold(*USUAL)
