"""What fuzz tests have in common: the number of cases, damage to bytes and mappings, what counts as well behaved."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from kdx.errors import KdxError


def cases(count: int) -> Callable[[Any], Any]:
    """So many cases, always the same ones."""
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


@contextmanager
def well_behaved() -> Iterator[None]:
    """Success or a `KdxError` with a text that says something; all else is a failure."""
    told = "a text that is long enough"
    try:
        yield
    except KdxError as error:
        told = str(error)
    assert len(told) > 10


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file that was cut, overwritten in places, or that has something put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(("cut", "byte", "insert", "head")))
        if kind == "cut":
            del content[place:]
        elif kind == "byte" and content:
            content[place] = draw(st.integers(0, 255))
        elif kind == "insert":
            content[place:place] = draw(st.binary(max_size=12))
        elif content:  # headers are where lengths stand
            content[place % min(len(content), 64)] = draw(st.sampled_from((0, 1, 127, 128, 255)))
    return bytes(content)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(("auto", "student.logits", "*.logits", "../..", "/etc/passwd", "${name}", "${oc.env:NOBODY}", "a/b",
                     "\x00", "timm", "kd", "nan", "1e400")),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.sampled_from(("use", "extends",
                                                                "inputs", "weight")), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, config: dict[str, Any]) -> dict[str, Any]:
    """A config in which some sections are other things than they should be."""
    found = copy.deepcopy(config)
    for _ in range(draw(st.integers(1, 3))):
        node: Any = found
        while True:
            keys = list(node)
            key = draw(st.sampled_from([*keys, "new"])) if keys else "new"
            deeper = isinstance(node.get(key), dict) and draw(st.integers(0, 3)) > 0
            if not deeper:
                break
            node = node[key]
        if draw(st.booleans()) and key in node:
            del node[key]
        else:
            node[draw(st.text(max_size=6)) if key == "new" else key] = draw(VALUES)
    return found


def written(path: Path, content: bytes) -> Path:
    """The path of a file with this content."""
    path.write_bytes(content)
    return path
