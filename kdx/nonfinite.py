"""Losses and gradients that are nan or inf: found on the device, so that such an update is not applied.

What was found is read every `EVERY` updates of `kdx.guard`, and always before anything is kept as good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """References to what an update gave, until it is read.

    It is judged as often as the updater asks for it: once as a rule. Where each update is judged by itself, `flags` say
    on the device what came of it.
    """

    step: int
    parts: list[tuple[Tensor, Mapping[str, Tensor]]] = field(default_factory=list)
    judged: int = 0
    flags: list[Tensor] = field(default_factory=list)


class Faults:
    """Decides on the device whether the update under way may be applied: `found` is 1 where it may not, else 0.

    With `skip` each update is judged by itself. Otherwise `found` stays 1, so that all weights are still those of
    before the first fault when it is read, and a sum of it says how many judgements ago that was; an optimizer on a
    GPU that is not fused has applied the fault by then. `average` sets tensors to their mean over the processes of a
    run; None for one process.
    """

    def __init__(self, device: torch.device, average: Callable[[Sequence[Tensor]], None] | None = None) -> None:
        self.skip = False
        self.skipped = 0
        self.in_a_row = 0
        """How many of the last updates were faults, without one between them that was none."""
        self.found = torch.zeros((), device=device)
        self._average = average
        self._one = torch.ones((), device=device)
        self._since = torch.zeros((), device=device)
        self._updates: list[_Update] = []
        self._totals: list[Tensor] = []

    def add(self, step: int, index: Tensor, losses: Losses) -> None:
        """Take in what a micro-batch of the update `step` gave; `index` [B] names its samples."""
        if not self._updates or self._updates[-1].step != step:
            self._updates.append(_Update(step))
        self._updates[-1].parts.append((index, losses.terms))
        self._totals.append(losses.total.detach())

    def judge(self, gradients: Sequence[list[Tensor]]) -> None:
        """Look at the gradients, lists of one dtype each, and at the totals since the last call."""
        self._look(gradients)
        self._note()

    def judge_scaled(self, overflown: Tensor, scale: Tensor) -> None:
        """The same in fp16, where `overflown` (0 or 1) is common and only says that the `scale` was too high.

        It is a fault where the scale cannot be the reason, at 1 or below. A fault is left in `overflown`.
        """
        self._look([])
        self.found.copy_(torch.maximum(self.found, overflown * (scale <= 1)))
        self._note()
        overflown.copy_(torch.maximum(overflown, self.found))

    def update(self) -> dict[str, Tensor]:
        """Whether the update that has just ended was left out, where it may be."""
        flags = self._updates[-1].flags if self._updates else []
        return {"skipped": flags[-1]} if flags else {}

    def take(self) -> list[Fault]:
        """The faults since the last call. Waits for the device."""
        updates, self._updates = self._updates, []
        judgements = [update.step for update in updates for _ in range(update.judged)]
        if not judgements:
            return []
        if self.skip:
            flags = torch.stack([flag for update in updates for flag in update.flags]).tolist()
            steps = {step for step, bad in zip(judgements, flags, strict=True) if bad}
        else:
            steps = {*judgements[max(0, len(judgements) - int(self._since)) :]}
        for update in updates:
            self.in_a_row = self.in_a_row + 1 if update.step in steps else 0
        found = [Fault(update.step, _bad_terms(update)) for update in updates if update.step in steps]
        self.skipped += len(found) if self.skip else 0
        return found

    def state(self) -> dict[str, int]:
        """What a resumed run needs."""
        return {"skipped": self.skipped}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Take up `state`."""
        self.skipped = state["skipped"]

    def _look(self, gradients: Sequence[list[Tensor]]) -> None:
        if self.skip:
            self.found.zero_()
        groups, totals = [group for group in gradients if group], self._totals
        if totals and groups and groups[0][0].dtype == totals[0].dtype:
            groups[0] = [*groups[0], *totals]
        elif totals:
            groups.append(totals)
        for group in groups:  # multiplies by one, which changes no number, and is a single pass over all of them
            torch._amp_foreach_non_finite_check_and_unscale_(group, self.found, self._one)
        self._totals = []

    def _note(self) -> None:
        if self._average is not None:
            self._average([self.found])
            self.found.ceil_()  # 1 everywhere if it is anywhere
        if not self._updates:
            return
        self._updates[-1].judged += 1
        if self.skip:
            self._updates[-1].flags.append(self.found.clone())
        else:
            self._since.add_(self.found)


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
        """Remember the buffers. The update to come counts until it is judged, which an updater may put off."""
        self._found.zero_()
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


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether there is no nan or inf in any of these, in one pass over them for each type. Waits for the device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            own = tensor.detach().clone() if 0 in tensor.stride() else tensor.detach()  # it writes to each number once
            groups.setdefault((tensor.dtype, tensor.device), []).append(own)
    for (_, device), group in groups.items():
        found = torch.zeros((), device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(group, found, torch.ones((), device=device))
        if found.item():
            return False
    return True


def finite_names(state: Mapping[str, Tensor]) -> frozenset[str]:
    """The names of the tensors without nan or inf. Waits for the device."""
    names = [name for name, value in state.items() if value.is_floating_point() and value.numel()]
    if not names:
        return frozenset()
    sums = torch.stack([state[name].detach().sum().isfinite() for name in names]).tolist()
    # A finite sum is of finite numbers, and found in a tenth of the time; that of finite ones may exceed the type.
    good = {name for name, sound in zip(names, sums, strict=True) if sound or bool(state[name].isfinite().all())}
    return frozenset(good)


def _bad_terms(update: _Update) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for index, terms in update.parts:
        for name, term in terms.items():
            bad = ~term.isfinite()
            if bad.any():
                found[name] = (*found.get(name, ()), *(index[bad].tolist() if term.ndim else ()))
    return found
