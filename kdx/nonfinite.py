"""Losses and gradients that are nan or inf: found on the device, so that such an update is not applied.

What was found is read every `EVERY` updates of `kdx.guard`, and always before anything is kept as good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kdx.types import Losses

STOP, SKIP = "stop", "skip"


@dataclass(frozen=True)
class Fault:
    """An update that was not applied. `terms` maps each loss whose term was bad to the samples for which it was, an
    empty tuple for a term that is one number; no term at all where the gradient alone was bad.
    """

    step: int
    terms: Mapping[str, tuple[int, ...]]


@dataclass
class _Update:
    """References to what an update gave, until it is read."""

    step: int
    parts: list[tuple[Tensor, Losses]] = field(default_factory=list)
    flags: list[Tensor] = field(default_factory=list)


class Faults:
    """Decides on the device whether the update under way may be applied: `found` is 1 where it may not, else 0.

    With `skip` each update is judged by itself. Otherwise `found` stays 1, so that all weights are still those of
    before the first fault when it is read. `average` sets tensors to their mean over the processes of a run.
    """

    def __init__(
        self, device: torch.device, average: Callable[[Sequence[Tensor]], None] = lambda tensors: None
    ) -> None:
        self.skip = False
        self.skipped = 0
        self.in_a_row = 0
        """How many of the last updates were faults, without one between them that was none."""
        self.found = torch.zeros((), device=device)
        self._average = average
        self._one = torch.ones((), device=device)
        self._updates: list[_Update] = []
        self._totals: list[Tensor] = []

    def add(self, step: int, index: Tensor, losses: Losses) -> None:
        """Take in what a micro-batch of the update `step` gave; `index` [B] names its samples."""
        if not self._updates or self._updates[-1].step != step:
            self._updates.append(_Update(step))
        own = Losses(losses.total.detach(), losses.terms)
        self._updates[-1].parts.append((index, own))
        self._totals.append(own.total)

    def judge(self, gradients: Sequence[list[Tensor]]) -> None:
        """Look at the gradients, lists of one dtype each, and at the totals since the last call."""
        self._begin()
        for group in gradients:
            if group:  # multiplies by one, which changes no number, and is a single pass over all of them
                torch._amp_foreach_non_finite_check_and_unscale_(group, self.found, self._one)
        self._note()

    def judge_scaled(self, overflown: Tensor, scale: Tensor) -> None:
        """The same in fp16, where `overflown` (0 or 1) is common and only says that the `scale` was too high.

        It is a fault where the scale cannot be the reason, at 1 or below. A fault is left in `overflown`.
        """
        self._begin()
        self.found.copy_(torch.maximum(self.found, overflown * (scale <= 1)))
        self._note()
        overflown.copy_(torch.maximum(overflown, self.found))

    def update(self) -> dict[str, Tensor]:
        """Whether the update that has just ended was left out, where it may be."""
        return {"skipped": self._updates[-1].flags[-1]} if self.skip and self._updates else {}

    def take(self) -> list[Fault]:
        """The faults since the last call. Waits for the device."""
        updates, self._updates = self._updates, []
        flags = [(update, flag) for update in updates for flag in update.flags]
        if not flags:
            return []
        read = torch.stack([flag for _, flag in flags]).tolist()
        steps = {update.step for (update, _), bad in zip(flags, read, strict=True) if bad}
        found = [Fault(update.step, _bad_terms(update)) for update in updates if update.step in steps]
        for update in updates:
            self.in_a_row = self.in_a_row + 1 if update.step in steps else 0
        self.skipped += len(found) if self.skip else 0
        return found

    def state(self) -> dict[str, int]:
        """What a resumed run needs."""
        return {"skipped": self.skipped}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Take up `state`."""
        self.skipped = state["skipped"]

    def _begin(self) -> None:
        if self.skip:
            self.found.zero_()
        if self._totals:
            torch._amp_foreach_non_finite_check_and_unscale_(self._totals, self.found, self._one)
            self._totals = []

    def _note(self) -> None:
        self._average([self.found])
        self.found.ceil_()  # 1 everywhere if it is anywhere
        if self._updates:
            self._updates[-1].flags.append(self.found.clone())


class Rollback:
    """Puts buffers back as they were before an update that was left out: batch statistics, banks, running weights.

    A buffer that has another size after the update stays as it is.
    """

    def __init__(self, modules: Sequence[nn.Module], found: Tensor) -> None:
        owners = [part._buffers for module in modules for part in module.modules()]
        self._places = [(own, name) for own in owners for name, buffer in own.items() if buffer is not None]
        self._saved: list[Tensor] = [own[name].clone() for own, name in self._places]  # type: ignore[union-attr]
        self._found = found

    @torch.no_grad()
    def save(self) -> None:
        """Remember the buffers."""
        for i, (own, name) in enumerate(self._places):
            now = own[name]
            assert now is not None
            if now.shape == self._saved[i].shape:
                self._saved[i].copy_(now)
            else:
                self._saved[i] = now.clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back if the update was left out."""
        bad = self._found > 0
        for saved, (own, name) in zip(self._saved, self._places, strict=True):
            now = own[name]
            assert now is not None
            if now.shape == saved.shape:
                now.copy_(torch.where(bad, saved, now))


def finite_names(state: Mapping[str, Tensor]) -> frozenset[str]:
    """The names of the tensors without nan or inf. Waits for the device."""
    names = [name for name, value in state.items() if value.is_floating_point() and value.numel()]
    if not names:
        return frozenset()
    flags = torch.stack([state[name].detach().isfinite().all() for name in names]).tolist()
    return frozenset(name for name, good in zip(names, flags, strict=True) if good)


def _bad_terms(update: _Update) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for index, losses in update.parts:
        for name, term in losses.terms.items():
            bad = ~term.isfinite()
            if bad.any():
                found[name] = (*found.get(name, ()), *(index[bad].tolist() if term.ndim else ()))
    return found
