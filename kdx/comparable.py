"""Whether runs may be compared: what they must share, and how one differs from another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdx.result import Result

ABSENT = "absent"
METHOD = ("teachers", "targets", "align", "losses")
"""The sections in which methods differ: which teachers a run has follows from them."""
BUDGET = ("train.epochs", "train.updates", "train.steps_per_epoch", "train.batch")
COSMETIC = ("train.save", "train.save_minutes", "student.taps", "student.run")


@dataclass(frozen=True)
class Facts:
    """What a result says of its data and its budget."""

    classes: tuple[str, ...]
    seen: int
    labelled: int
    updates: int


@dataclass(frozen=True)
class Basis:
    """What the scores of two runs rest on besides their methods.

    `config` maps the dotted keys of data, student, training and precision to their values, `teachers` each teacher
    that is used to its section. `plain` is the run of the plain student, None without one.
    """

    facts: Facts
    seed: int
    config: Mapping[str, Any]
    teachers: Mapping[str, Any]
    plain: str | None


@dataclass(frozen=True)
class Difference:
    """One way in which a run differs from another one, as `what` with what was found and what the other one has."""

    what: str
    found: Any
    expected: Any

    def __str__(self) -> str:
        shown = [_short(value) for value in (self.found, self.expected)]
        return self.what if "" in shown else f"{self.what} ({shown[0]} against {shown[1]})"

    @property
    def of_budget_or_data(self) -> bool:
        """Whether the difference alone may move the score or its gain: it counts although it may be what is studied."""
        return self.what in BUDGET or not self.what.startswith(("train.", "teachers.", "runtime."))


def facts_of(result: Result) -> Facts:
    """The facts of a finished run."""
    return Facts(tuple(result.classes), result.seen, result.labelled, result.last.step)


def basis(facts: Facts, config: Mapping[str, Any], *, seed: int, teachers: Sequence[str], plain: str | None) -> Basis:
    """The basis of a run with this resolved config; `teachers` are those that it uses."""
    flat = dict(_flat({name: config.get(name) or {} for name in ("data", "student", "train")}))
    kept = {key: value for key, value in flat.items() if not any(_within(key, outer) for outer in COSMETIC)}
    kept["runtime.precision"] = (config.get("runtime") or {}).get("precision")
    sections = config.get("teachers") or {}
    used = {
        name: {key: value for key, value in (sections.get(name) or {}).items() if key != "taps"} for name in teachers
    }
    return Basis(facts, seed, kept, used, plain)


def fact_differences(first: Facts, other: Facts) -> list[Difference]:
    """How the data and the budget of `other` differ from those of `first`: where they do, a mean over both says
    nothing, and a difference of scores is not that of the methods.
    """
    pairs = (
        ("classes", first.classes, other.classes),
        ("the number of training samples", first.seen, other.seen),
        ("the number of labels", first.labelled, other.labelled),
        ("the number of updates", first.updates, other.updates),
    )
    return [Difference(what, found, expected) for what, expected, found in pairs if found != expected]


def differences(first: Basis, other: Basis) -> list[Difference]:
    """How the basis of `other` differs from that of `first`, config keys before what follows from them."""
    found = [*_keys(first.config, other.config), *_teachers(first, other)]
    found += fact_differences(first.facts, other.facts)
    plains = (first.plain, other.plain)
    if not found and None not in plains and first.seed == other.seed and first.plain != other.plain:
        found.append(Difference("the plain student", "", ""))
    return found


def marks(first: Basis, other: Basis, layers: Sequence[Mapping[str, Any]] = ()) -> tuple[str, ...]:
    """The differences that a reader must know of, as texts: those of budget and data, and all that is not named.

    `layers` are what a variant says that it changes.
    """
    named = [key for layer in layers for key, _ in _flat(layer)]
    return tuple(
        str(difference)
        for difference in differences(first, other)
        if difference.of_budget_or_data or not _is_named(difference, named)
    )


def _keys(first: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Difference]:
    """The keys that differ; three of one inner mapping, as `student.args`, are told as that mapping."""
    keys = [key for key in dict.fromkeys([*first, *other]) if other.get(key) != first.get(key)]
    outer = [key.rpartition(".")[0] for key in keys]
    whole = {name for name in outer if "." in name and outer.count(name) > 2}
    for key, name in zip(keys, outer, strict=True):
        if name not in whole:
            yield Difference(key, other.get(key), first.get(key))
    yield from (Difference(name, "", "") for name in dict.fromkeys(outer) if name in whole)


def _is_named(difference: Difference, named: Sequence[str]) -> bool:
    if difference.what.startswith("teachers.") and ABSENT in (difference.found, difference.expected):
        return any(key.partition(".")[0] in METHOD for key in named)
    return any(_within(key, difference.what) or _within(difference.what, key) for key in named)


def _within(key: str, outer: str) -> bool:
    return key == outer or key.startswith(f"{outer}.")


def _teachers(first: Basis, other: Basis) -> Iterator[Difference]:
    for name in dict.fromkeys([*first.teachers, *other.teachers]):
        own, mine = other.teachers.get(name), first.teachers.get(name)
        if own != mine:
            found, expected = ("present" if section is not None else ABSENT for section in (own, mine))
            yield Difference(f"teachers.{name}", *(("", "") if found == expected else (found, expected)))


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and their values; a mapping without keys counts as a value."""
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    """A value for a sentence; nothing where it would fill the line."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else "unset" if value is None else str(value)
    return text if len(text) <= 60 else ""
