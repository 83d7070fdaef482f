"""When Python looks for garbage: not while a command loads libraries, which makes 500,000 objects and no garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

SELDOM = (1_000_000, 10, 10)
ASIDE = (100_000, 10, 10)
"""How often once libraries are set aside: the checks of a large study make garbage, too."""
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
    """Pass over what is at hand, libraries above all, until the training or filling that follows has ended.

    What was made since it was called before is looked through first: each check leaves some that no name holds.
    """
    if gc.get_threshold() == ASIDE:
        gc.collect()
    if gc.get_threshold() in (SELDOM, ASIDE):
        gc.freeze()
        gc.set_threshold(*ASIDE)


@contextmanager
def as_usual() -> Iterator[None]:
    """Look as often as usual, where a command has put it off, but within the block only through what is made there.

    What was made since `set_aside` is looked through once: a check or a try may have left weights in a ring. A program
    that calls kdx has its own say in all this.
    """
    if gc.get_threshold() not in (SELDOM, ASIDE):
        yield
        return
    gc.collect()
    gc.freeze()
    gc.set_threshold(*USUAL)
    try:
        yield
    finally:
        gc.unfreeze()
