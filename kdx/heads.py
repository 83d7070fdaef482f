"""What happens inside of self-attention: queries, keys, values, and who attends to whom, of each head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdx.errors import PlanError

GIVES = ("attention", "scores", "queries", "keys", "values")
"""`attention` is the softmax of `scores`, both [B, heads, N, N]; the other three are [B, heads, N, head_dim]."""
_PARTS = ("qkv", "q_norm", "k_norm", "norm", "gate", "proj")
"""The layers of timm's plain attention that have parameters."""


def give(module: Any, qkv: Tensor, what: str) -> Tensor:
    """One of `GIVES`, from what the layer `qkv` of an attention module gave, [B, N, 3 * heads * head_dim].

    Queries and keys come after their norms and before the scale; scores are `queries @ keys^T * scale`.
    """
    queries, keys, values = _split(module, qkv)
    match what:
        case "queries":
            return queries
        case "keys":
            return keys
        case "values":
            return values
    scores = queries * _scale(module, queries) @ keys.transpose(-2, -1)
    return scores if what == "scores" else scores.softmax(-1)


def problem_of(module: nn.Module) -> str | None:
    """Why a module's heads cannot be read, or None. What it computes is still to be compared (`Proof`)."""
    if not isinstance(getattr(module, "qkv", None), nn.Module):
        return "has no layer `qkv`"
    if not isinstance(getattr(module, "num_heads", None), int) or not isinstance(_joint(module), nn.Module):
        return "does not say its `num_heads`, or has no `proj` behind its heads"
    for name, _ in module.named_parameters():
        if name.partition(".")[0] not in _PARTS:
            return f"has parameters besides those of plain attention: {name}"
    return None


class Proof:
    """Compares, while it is `on`, what a module's heads give together with what plain attention would give.

    Scores are made to differ for that: first weights give nearly equal ones, in which positions would not show.
    Raises `PlanError` where the two are not the same up to rounding.
    """

    def __init__(self, module: Any) -> None:
        self.on = False
        self._module = module
        self._expected: Tensor | None = None
        module.qkv.register_forward_hook(self._after_qkv)
        _joint(module).register_forward_pre_hook(self._before_joint)

    def _after_qkv(self, layer: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if not self.on:
            return None
        scores = give(self._module, output, "scores")
        output = output * (2 / scores.std().clamp(min=1e-6)).sqrt()
        values = _split(self._module, output)[2]
        self._expected = (give(self._module, output, "attention") @ values).transpose(1, 2).flatten(2)
        return output

    def _before_joint(self, layer: nn.Module, inputs: Any) -> None:
        expected, self._expected = self._expected, None
        if expected is None:
            return
        found = inputs[0]
        if expected.shape != found.shape or bool((expected - found).norm() > 1e-2 * found.norm()):
            raise PlanError(
                f"{type(self._module).__name__} does more than softmax(q k^T) v, such as relative or rotary positions, "
                "so its heads cannot be tapped; tap its output instead"
            )


def _joint(module: Any) -> Any:
    return module.norm if isinstance(getattr(module, "norm", None), nn.Module) else getattr(module, "proj", None)


def _split(module: Any, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if qkv.ndim != 3 or qkv.shape[-1] % (3 * module.num_heads):
        raise PlanError(f"its `qkv` gives {list(qkv.shape[1:])}, expected [N, 3 * {module.num_heads} heads * head_dim]")
    parts = qkv.reshape(*qkv.shape[:2], 3, module.num_heads, -1)
    queries, keys, values = parts.permute(2, 0, 3, 1, 4).unbind(0)
    q_norm, k_norm = (getattr(module, name, None) or nn.Identity() for name in ("q_norm", "k_norm"))
    return q_norm(queries), k_norm(keys), values


def _scale(module: Any, queries: Tensor) -> float | Tensor:
    scale = getattr(module, "scale", None)
    return scale if isinstance(scale, (float, torch.Tensor)) else queries.shape[-1] ** -0.5
