"""When Python looks for garbage: not while a command loads libraries, which makes 500,000 objects and no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

SELDOM = (1_000_000, 10, 10)
USUAL = gc.get_threshold()


@contextmanager
def seldom_sought() -> Iterator[None]:
    """Look through the objects at hand seldom within the block, until `as_usual` is entered."""
    gc.set_threshold(*SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*USUAL)
        gc.unfreeze()


def set_aside() -> None:
    """Pass over what is at hand, libraries above all, until the training that follows has ended."""
    if gc.get_threshold() == SELDOM:
        gc.freeze()


@contextmanager
def as_usual() -> Iterator[None]:
    """Look as often as usual, where a command has put it off, but within the block only through what is made there.

    What was made since `set_aside` is looked through once: a check or a try may have left weights in a ring. A program
    that calls kdx has its own say in all this.
    """
    if gc.get_threshold() != SELDOM:
        yield
        return
    gc.collect()
    gc.freeze()
    gc.set_threshold(*USUAL)
    try:
        yield
    finally:
        gc.unfreeze()
