"""Losses over classes without tensors of the size of the logits: value and gradient block by block.

Written with ordinary operations, the divergence of two distributions keeps or makes half a dozen tensors as large as
the logits. There are three ways, and the size of the logits alone decides: what is small takes the ordinary operations,
as calling a function of Python from autograd would cost more than it saves; what is of middle size gets its gradient
together with its value; what is larger goes through in blocks of rows that stay in the processor's cache, keeps nothing
but its inputs, and writes its gradient once, in the final scale, when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdx.components import per_sample

SMALL = 1 << 14
"""Up to so many logits the ordinary operations are faster on a CPU."""
MIDDLE = 1 << 20
"""Up to so many logits on a CPU, keeping a tensor of their size costs less than working its numbers out again."""
BLOCK = 1 << 17
"""Logits of a block on a CPU: half a megabyte in float32, of which a few lie in the second-level cache."""
DEVICE_BLOCK = 1 << 22
"""Logits of a block elsewhere, where starting an operation costs much; fewer take the ordinary operations."""


def soft_divergence(student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
    """`tau^2 KL(softmax(teacher / tau) || softmax(student / tau))`, summed over the classes.

    `student`, `teacher` [B, K, ...] are logits, `temperature` is above 0, 0-d or [B]; gives [B, ...]. The teacher gets
    no gradient. A temperature that learns, half precision and compiled code take the composition of torch.
    """
    teacher, learns = teacher.detach(), torch.is_grad_enabled()
    if not _is_small(student) and _suits(student, teacher) and not (learns and temperature.requires_grad):
        if learns and student.requires_grad:
            values: Tensor = _SoftDivergence.apply(student, teacher, temperature)
            return values
        return _divergence(student, teacher, temperature)
    tau = per_sample(temperature, student)
    log_p = (teacher / tau).log_softmax(1)
    # The student comes first in the difference: no sign of its gradient then needs a pass over all logits.
    values = (log_p.exp() * ((student / tau).log_softmax(1) - log_p)).sum(1)
    return values * -per_sample(temperature, values).square()


def cross_entropy_sum(student: Tensor, label: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The cross-entropy of logits [B, K] with the classes `label` [B], summed over the samples with a label, 0-d.

    -1 is no label. `label_smoothing` spreads that part of the target evenly over all K classes.
    """
    blocks = student.ndim == 2 and label.ndim == 1 and not label.is_floating_point() and not goes_whole(student)
    if blocks and _suits(student, student) and torch.is_grad_enabled():
        total: Tensor = _CrossEntropySum.apply(student, label, label_smoothing)
        return total
    # Up to that size, torch's own two operations are as good.
    return F.cross_entropy(student, label, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing)


def cross_entropy_and_divergence(
    student: Tensor, label: Tensor, teacher: Tensor, temperature: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor] | None:
    """The mean cross-entropy over the samples with a label, 0-d, and `soft_divergence`, [B], of the same logits [B, K].

    They have one gradient between them. None where two functions are as good: for what does not go through in blocks.
    """
    hard = student.ndim == 2 and label.ndim == 1 and not label.is_floating_point()
    learns = torch.is_grad_enabled() and student.requires_grad and not temperature.requires_grad
    if not hard or not learns or goes_whole(student) or not _suits(student, teacher):
        return None
    both: tuple[Tensor, Tensor] = _Both.apply(student, label, teacher.detach(), temperature, label_smoothing)
    return both


def goes_whole(x: Tensor) -> bool:
    """Whether logits are so few that they are not taken apart into blocks."""
    return x.numel() <= (MIDDLE if x.device.type == "cpu" else DEVICE_BLOCK)


def log_mixture(logits: Sequence[Tensor], log_weights: Sequence[Tensor | float], temperature: Tensor) -> Tensor:
    """Logits [B, K] of the mixture of M distributions: `tau * log sum_k w_k softmax(z_k / tau)`.

    `logits` are M tensors [B, K], `log_weights` M numbers or tensors [B], `temperature` is above 0, 0-d or [B]. Above
    the size of `SMALL`, probabilities that the type cannot hold count as the least one that it can.
    """
    first = logits[0]
    inputs = [*logits, temperature, *(weight for weight in log_weights if isinstance(weight, Tensor))]
    learns = torch.is_grad_enabled() and any(one.requires_grad for one in inputs)
    if _is_small(first) or learns or not all(_suits(first, z) for z in logits):
        return _mixture(logits, log_weights, temperature)
    result = torch.empty_like(first)
    least = torch.finfo(first.dtype).tiny
    weights = [weight.exp() if isinstance(weight, Tensor) else math.exp(weight) for weight in log_weights]
    for rows in _blocks(first):
        tau = per_sample(_part(temperature, rows), first)
        total = result[rows]
        for place, (z, weight) in enumerate(zip(logits, weights, strict=True)):
            part = (z[rows] / tau).softmax(1).mul_(weight[rows].unsqueeze(1) if isinstance(weight, Tensor) else weight)
            total.add_(part) if place else total.copy_(part)
        total.clamp_(min=least).log_().mul_(tau)
    return result


class _SoftDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
        if goes_whole(student):
            values, q, p = _parts(student, teacher, per_sample(temperature, student))
            ctx.save_for_backward(student, teacher, temperature, q.sub_(p))
            return values.mul_(per_sample(temperature, values).square())
        ctx.save_for_backward(student, teacher, temperature, None)
        return _divergence(student, teacher, temperature)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, temperature, gradient = ctx.saved_tensors
        scale = (above[0] * per_sample(temperature, above[0])).unsqueeze(1)
        if torch.is_grad_enabled():  # a second derivative is wanted, so the gradient must have a graph of its own
            tau = per_sample(temperature, student)
            return ((student / tau).softmax(1) - (teacher / tau).softmax(1)) * scale, None, None
        if gradient is not None:
            return gradient * scale, None, None
        gradient = torch.empty_like(student)
        for rows in _blocks(student):
            tau, block = per_sample(_part(temperature, rows), student), gradient[rows]
            torch.softmax(student[rows] / tau, 1, out=block)
            block.sub_((teacher[rows] / tau).softmax(1)).mul_(scale[rows])
        return gradient, None, None


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, label: Tensor, smoothing: float) -> Tensor:
        known = label != -1
        place = torch.where(known, label, 0).unsqueeze(1)
        ctx.save_for_backward(student, place, known)
        ctx.smoothing = smoothing
        return torch.where(known, _surprise(student, place, smoothing), 0).sum()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None, None]:
        student, place, known = ctx.saved_tensors
        scale = torch.where(known, above[0], 0).unsqueeze(1)
        even, rest = ctx.smoothing / student.shape[1], (ctx.smoothing - 1) * scale
        if torch.is_grad_enabled():
            return ((student.softmax(1) - even) * scale).scatter_add(1, place, rest), None, None
        gradient = torch.empty_like(student)
        for rows in _blocks(student):
            block = gradient[rows]
            torch.softmax(student[rows], 1, out=block)
            (block.sub_(even) if even else block).mul_(scale[rows])
        return gradient.scatter_add_(1, place, rest), None, None


class _Both(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, label: Tensor, teacher: Tensor, temperature: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        known = label != -1
        place, count = torch.where(known, label, 0).unsqueeze(1), known.sum().clamp(min=1)
        ctx.save_for_backward(student, teacher, temperature, place, known, count)
        ctx.smoothing = smoothing
        total = torch.where(known, _surprise(student, place, smoothing), 0).sum()
        return total / count, _divergence(student, teacher, temperature)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, temperature, place, known, count = ctx.saved_tensors
        hard = torch.where(known, above[0] / count, 0).unsqueeze(1)
        soft = (above[1] * temperature).unsqueeze(1)
        even, rest = ctx.smoothing / student.shape[1], (ctx.smoothing - 1) * hard
        if torch.is_grad_enabled():
            tau = per_sample(temperature, student)
            apart = ((student / tau).softmax(1) - (teacher / tau).softmax(1)) * soft
            return (apart + (student.softmax(1) - even) * hard).scatter_add(1, place, rest), None, None, None, None
        gradient = torch.empty_like(student)
        for rows in _blocks(student):
            tau, block = per_sample(_part(temperature, rows), student), gradient[rows]
            torch.softmax(student[rows] / tau, 1, out=block)
            block.sub_((teacher[rows] / tau).softmax(1)).mul_(soft[rows])
            q = student[rows].softmax(1)
            block.addcmul_(q.sub_(even) if even else q, hard[rows])
        return gradient.scatter_add_(1, place, rest), None, None, None, None


def _surprise(student: Tensor, place: Tensor, smoothing: float) -> Tensor:
    """The cross-entropy [B] with the classes `place` [B, 1], block by block."""
    values = student.gather(1, place).squeeze(1).mul(smoothing - 1)
    for rows in _blocks(student):
        block = student[rows]
        values[rows] += _log_sum(block, block.softmax(1))
        if smoothing:
            values[rows].sub_(block.mean(1), alpha=smoothing)
    return values


def _divergence(student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
    """The values [B, ...], block by block."""
    values = student.new_empty(student[:, 0].shape)
    for rows in _blocks(student):
        values[rows] = _parts(student[rows], teacher[rows], per_sample(_part(temperature, rows), student))[0]
    return values.mul_(per_sample(temperature, values).square())


def _parts(student: Tensor, teacher: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence [B, ...] without its factor, and the distributions of student and teacher."""
    ours, theirs = student / tau, teacher / tau
    q, p = ours.softmax(1), theirs.softmax(1)
    # As sum p = 1, KL = sum p (theirs - ours) + log sum exp ours - log sum exp theirs. Each of
    # the sums is read off the likeliest class.
    values = p.amax(1).div_(q.amax(1)).log_().add_(ours.amax(1)).sub_(theirs.amax(1))
    return values.add_(torch.linalg.vecdot(p, theirs.sub_(ours), dim=1)), q, p


def _mixture(logits: Sequence[Tensor], log_weights: Sequence[Tensor | float], temperature: Tensor) -> Tensor:
    tau = per_sample(temperature, logits[0])
    parts = [
        torch.log_softmax(z / tau, dim=1) + (weight.unsqueeze(1) if isinstance(weight, Tensor) else weight)
        for z, weight in zip(logits, log_weights, strict=True)
    ]
    return tau * torch.logsumexp(torch.stack(parts), dim=0)


def _log_sum(logits: Tensor, probabilities: Tensor) -> Tensor:
    """`log sum exp` over the classes, read off the likeliest one, without a further pass of exponentials."""
    return logits.amax(1) - probabilities.amax(1).log()


def _suits(student: Tensor, teacher: Tensor) -> bool:
    """Whether a way of its own is right; a compiler fuses ordinary operations itself."""
    alike = student.dtype == teacher.dtype and student.shape == teacher.shape and student.ndim > 1
    return alike and student.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()


def _is_small(x: Tensor) -> bool:
    return x.numel() <= (SMALL if x.device.type == "cpu" else DEVICE_BLOCK)


def _blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of [B, ...], each of at least one row."""
    size = max(1, (BLOCK if x.device.type == "cpu" else DEVICE_BLOCK) * len(x) // x.numel())
    for start in range(0, len(x), size):
        yield slice(start, start + size)


def _part(knob: Tensor, rows: slice) -> Tensor:
    return knob[rows] if knob.ndim else knob
