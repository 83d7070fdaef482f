"""Losses over classes without tensors of the size of the logits: value and gradient block by block.

Written with ordinary operations, the divergence of two distributions keeps or makes half a dozen tensors as large as
the logits, and its gradient goes back through as many. There are three ways, and the size of the logits alone decides:
what is small or of middle size gets its gradient together with its value, by the operations that are the fastest there;
what is larger goes through in blocks of rows that stay in the processor's cache, keeps nothing but its inputs, and
writes its gradient once, in the final scale, when it is asked for. Each tensor that is made takes the room of one that
is done with, as far as can be, for the processor's cache holds few of them.
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
"""Up to so many logits on a CPU, an operation costs more by being called than by its numbers."""
MIDDLE = 1 << 20
"""Up to so many logits on a CPU, keeping a tensor of their size costs less than working its numbers out again."""
BLOCK = 1 << 17
"""Logits of a block on a CPU: half a megabyte in float32, of which a few lie in the second-level cache."""
DEVICE_BLOCK = 1 << 22
"""Logits of a block elsewhere, where starting an operation costs much; fewer take the ordinary operations."""
REGISTER = 64
"""Bytes of a vector of the processor. Over shorter rows, torch's softmax on a CPU goes number by number."""
NARROW = 1 << 8
"""From so many numbers in short rows on, one sample beside the other is faster; with a graph, from four times that."""


def soft_divergence(student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
    """`tau^2 KL(softmax(teacher / tau) || softmax(student / tau))`, summed over the classes.

    `student`, `teacher` [B, K, ...] are logits, `temperature` is above 0, 0-d or [B]; gives [B, ...]. The teacher gets
    no gradient. A temperature that learns, half precision, compiled code and the transforms of `torch.func` take the
    composition of torch.
    """
    learns = torch.is_grad_enabled()
    if _suits(student, teacher) and not (learns and temperature.requires_grad):
        if learns and student.requires_grad:
            values: Tensor = _SoftDivergence.apply(student, savable(teacher), temperature)
            return values
        return _divergence(student, teacher.detach(), temperature)
    teacher = teacher.detach()
    tau = per_sample(temperature, student)
    log_p = log_softmax(teacher / tau)
    # The student comes first in the difference: no sign of its gradient then needs a pass over all logits.
    values = (log_p.exp() * (log_softmax(student / tau) - log_p)).sum(1)
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
    return few_cross_entropy(student, label, label_smoothing, reduction="sum")


def few_cross_entropy(student: Tensor, label: Tensor, label_smoothing: float, *, reduction: str) -> Tensor:
    """The cross-entropy with ordinary operations, the "sum" or the "mean" over the samples with a label, 0-d."""
    if _is_narrow(student) and not label_smoothing and not label.is_floating_point():
        return F.nll_loss(log_softmax(student), label, ignore_index=-1, reduction=reduction)
    return F.cross_entropy(student, label, ignore_index=-1, reduction=reduction, label_smoothing=label_smoothing)


def cross_entropy_and_divergence(
    student: Tensor,
    label: Tensor,
    teacher: Tensor,
    temperature: Tensor,
    label_smoothing: float = 0.0,
    *,
    labelled: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """The mean cross-entropy over the samples with a label, 0-d, and `soft_divergence`, [B], of the same logits [B, K].

    They have one gradient between them. Where all samples are known to be `labelled`, none is looked for. None where
    two functions are as good, as for few logits.
    """
    if is_small(student) or not _suits(student, teacher):
        return None
    hard = student.ndim == 2 and label.ndim == 1 and not label.is_floating_point()
    if not hard or not torch.is_grad_enabled() or not student.requires_grad or temperature.requires_grad:
        return None
    both: tuple[Tensor, Tensor] = _Both.apply(student, label, savable(teacher), temperature, label_smoothing, labelled)
    return both


def savable(teacher: Tensor) -> Tensor:
    """The same numbers without a graph, which second derivatives would go into, for autograd to keep.

    It keeps no tensor of `torch.inference_mode`, so of such a one it gets a copy.
    """
    return teacher.clone() if not is_traced() and teacher.is_inference() else teacher.detach()


def is_traced() -> bool:
    """Whether a compiler or a transform of `torch.func` follows what runs: they need ordinary operations."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def goes_whole(x: Tensor) -> bool:
    """Whether logits are so few that they are not taken apart into blocks."""
    return x.numel() <= (MIDDLE if x.is_cpu else DEVICE_BLOCK)


def is_small(x: Tensor) -> bool:
    """Whether logits are so few that it is the number of operations that counts."""
    return x.numel() <= (SMALL if x.is_cpu else DEVICE_BLOCK)


def log_softmax(x: Tensor) -> Tensor:
    """`x.log_softmax(1)`, within rounding."""
    return x.t().log_softmax(0).t() if _is_narrow(x) else x.log_softmax(1)


def log_mixture(logits: Sequence[Tensor], log_weights: Sequence[Tensor | float], temperature: Tensor) -> Tensor:
    """Logits [B, K] of the mixture of M distributions: `tau * log sum_k w_k softmax(z_k / tau)`.

    `logits` are M tensors [B, K], `log_weights` M numbers or tensors [B], `temperature` is above 0, 0-d or [B].
    Probabilities that the type cannot hold count as the least one that it can, unless the mixture has a graph.
    """
    first = logits[0]
    inputs = [*logits, temperature, *(weight for weight in log_weights if isinstance(weight, Tensor))]
    learns = torch.is_grad_enabled() and any(one.requires_grad for one in inputs)
    if learns or not all(_suits(first, z) for z in logits):
        return _mixture(logits, log_weights, temperature)
    weights = [weight.exp() if isinstance(weight, Tensor) else math.exp(weight) for weight in log_weights]
    if first.numel() <= _block_of(first):
        return _mixed(logits, weights, temperature)
    result = torch.empty_like(first)
    for rows in _blocks(first):
        own = [weight[rows] if isinstance(weight, Tensor) else weight for weight in weights]
        result[rows] = _mixed([z[rows] for z in logits], own, _part(temperature, rows))
    return result


class _SoftDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
        if is_small(student):
            values, gradient = _few(student, teacher, temperature)
            ctx.save_for_backward(student, teacher, temperature, gradient)
            return values
        if goes_whole(student):
            values, q, p = _parts(student, teacher, temperature, student.amax(1))
            ctx.save_for_backward(student, teacher, temperature, q.sub_(p))
            return values
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
        temperature, gradient = temperature.to(student.dtype), torch.empty_like(student)
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
        return torch.where(known, _surprises(student, place, smoothing), 0).sum()

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
        ctx: Any,
        student: Tensor,
        label: Tensor,
        teacher: Tensor,
        temperature: Tensor,
        smoothing: float,
        labelled: bool,
    ) -> tuple[Tensor, Tensor]:
        known = None if labelled else label != -1
        place = (label if known is None else torch.where(known, label, 0)).unsqueeze(1)
        ctx.count = len(label) if known is None else known.sum().clamp(min=1)
        ctx.smoothing, soft, hard = smoothing, None, None
        if goes_whole(student):
            top = student.amax(1)
            values, soft, p = _parts(student, teacher, temperature, top)
            soft.sub_(p)
            del p  # what follows takes its room
            hard = student.softmax(1)
            surprise = _surprise(student, place, smoothing, top, hard)
            if smoothing:
                hard.sub_(smoothing / student.shape[1])
            hard.scatter_(1, place, smoothing - 1, reduce="add")
        else:
            surprise, values = _surprises(student, place, smoothing), _divergence(student, teacher, temperature)
        ctx.save_for_backward(student, teacher, temperature, place, known, soft, hard)
        return (surprise if known is None else torch.where(known, surprise, 0)).sum() / ctx.count, values

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, temperature, place, known, soft, hard = ctx.saved_tensors
        one, two = above[0] / ctx.count, (above[1] * temperature).unsqueeze(1)
        if known is not None:
            one = torch.where(known, one, 0).unsqueeze(1)
        if hard is not None and not torch.is_grad_enabled():
            return (soft * two).addcmul_(hard, one), None, None, None, None, None
        one = one.expand(len(student), 1)
        even, rest = ctx.smoothing / student.shape[1], (ctx.smoothing - 1) * one
        if torch.is_grad_enabled():
            tau = per_sample(temperature, student)
            apart = ((student / tau).softmax(1) - (teacher / tau).softmax(1)) * two
            gradient = (apart + (student.softmax(1) - even) * one).scatter_add(1, place, rest)
            return gradient, None, None, None, None, None
        temperature, gradient = temperature.to(student.dtype), torch.empty_like(student)
        for rows in _blocks(student):
            tau, block = per_sample(_part(temperature, rows), student), gradient[rows]
            torch.softmax(student[rows] / tau, 1, out=block)
            block.sub_((teacher[rows] / tau).softmax(1)).mul_(two[rows])
            q = student[rows].softmax(1)
            block.addcmul_(q.sub_(even) if even else q, one[rows])
        return gradient.scatter_add_(1, place, rest), None, None, None, None, None


def _surprises(student: Tensor, place: Tensor, smoothing: float) -> Tensor:
    """The cross-entropy [B] with the classes `place` [B, 1], block by block."""
    values = student.new_empty(len(student))
    for rows in _blocks(student):
        block = student[rows]
        values[rows] = _surprise(block, place[rows], smoothing, block.amax(1), block.softmax(1))
    return values


def _surprise(student: Tensor, place: Tensor, smoothing: float, top: Tensor, probabilities: Tensor) -> Tensor:
    """The cross-entropy [B], its log of a sum of exponentials read off the likeliest class, whose logit is `top`."""
    target = student.gather(1, place).squeeze(1)
    if smoothing:
        target.lerp_(student.mean(1), smoothing)
    return target.neg_().add_(top).sub_(probabilities.amax(1).log_())


def _divergence(student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
    """The values [B, ...], block by block."""
    if is_small(student):
        return _few(student, teacher, temperature)[0]
    values = student.new_empty(student[:, 0].shape)
    for rows in _blocks(student):
        block = student[rows]
        values[rows] = _parts(block, teacher[rows], _part(temperature, rows), block.amax(1))[0]
    return values


def _few(student: Tensor, teacher: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence [B, ...] of few logits, and the difference of the distributions of student and teacher."""
    classes = 0 if (narrow := _is_narrow(student)) else 1
    x, y = (student.t(), teacher.t()) if narrow else (student, teacher)
    tau = temperature if narrow else per_sample(temperature, student)
    log_q, log_p = (x / tau).log_softmax(classes), (y / tau).log_softmax(classes)
    p = log_p.exp()
    values = log_p.sub_(log_q).mul_(p).sum(classes)
    difference = log_q.exp_().sub_(p)
    return values.mul_(per_sample(temperature, values).square()), difference.t() if narrow else difference


def _parts(student: Tensor, teacher: Tensor, temperature: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence [B, ...], and the distributions of student and teacher; `top` are the student's largest logits."""
    tau = per_sample(temperature, student)
    room = student / tau
    q = room.softmax(1)
    p = torch.div(teacher, tau, out=room).softmax(1)
    # As sum p = 1, KL = sum p (teacher - student) / tau + log sum exp (student / tau) - log sum exp (teacher / tau).
    # Each of the sums of exponentials is read off the likeliest class.
    apart = torch.sub(teacher, student, out=room).mul_(p).sum(1).add_(top).sub_(teacher.amax(1))
    tau = per_sample(temperature, apart)
    return p.amax(1).div_(q.amax(1)).log_().mul_(tau).add_(apart).mul_(tau), q, p


def _mixed(logits: Sequence[Tensor], weights: Sequence[Tensor | float], temperature: Tensor) -> Tensor:
    """`log_mixture` without a graph, by way of the probabilities."""
    narrow, tau = _is_narrow(logits[0]), per_sample(temperature, logits[0])
    parts: list[Tensor] = []
    for z, weight in zip(logits, weights, strict=True):
        part = (z / tau).t().softmax(0).t() if narrow else (z / tau).softmax(1)
        part.mul_(weight.unsqueeze(1) if isinstance(weight, Tensor) else weight)
        parts.append(parts.pop().add_(part) if parts else part)
    (total,) = parts
    return total.clamp_(min=torch.finfo(total.dtype).tiny).log_().mul_(tau).contiguous()


def _mixture(logits: Sequence[Tensor], log_weights: Sequence[Tensor | float], temperature: Tensor) -> Tensor:
    tau = per_sample(temperature, logits[0])
    parts = [
        log_softmax(z / tau) + (weight.unsqueeze(1) if isinstance(weight, Tensor) else weight)
        for z, weight in zip(logits, log_weights, strict=True)
    ]
    return tau * torch.logsumexp(torch.stack(parts), dim=0)


def _suits(student: Tensor, teacher: Tensor) -> bool:
    """Whether a way of its own is right."""
    alike = student.dtype == teacher.dtype and student.shape == teacher.shape and student.ndim > 1
    return alike and student.dtype in (torch.float32, torch.float64) and not is_traced()


def _is_narrow(x: Tensor) -> bool:
    """Whether rows are so short, and so many, that a CPU is faster with one sample beside the other in a vector."""
    short = x.is_cpu and x.ndim == 2 and x.shape[1] * x.element_size() < REGISTER
    return short and x.numel() >= (4 * NARROW if torch.is_grad_enabled() and x.requires_grad else NARROW)


def _blocks(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of [B, ...], each of at least one row."""
    size = max(1, _block_of(x) * len(x) // x.numel())
    for start in range(0, len(x), size):
        yield slice(start, start + size)


def _block_of(x: Tensor) -> int:
    return BLOCK if x.is_cpu else DEVICE_BLOCK


def _part(knob: Tensor, rows: slice) -> Tensor:
    return knob[rows] if knob.ndim else knob
