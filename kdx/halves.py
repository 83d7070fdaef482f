"""Whether a component that says `separable` gives for halves of a batch what it gives for the whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdx.trial import Trial, require


def check_halves(trial: Trial) -> None:
    """Fail where the whole is not what the halves are together, or where something of them is remembered."""
    size = trial.batch // 2
    node = trial.fresh().eval()  # batch norm, which sees the samples of all processes, would see halves here
    inputs = trial.inputs()
    parts = [_rows(inputs, slice(0, size)), _rows(inputs, slice(size, 2 * size))]
    whole = trial.run(node, _rows(inputs, slice(0, 2 * size)))
    halves = [trial.run(node, part) for part in parts]
    for name, value in whole.items():
        first, second = (half[name] for half in halves)
        together = torch.cat([first, second]) if value.ndim else (first + second) / 2
        same = torch.allclose(together, value, rtol=1e-4, atol=1e-5)
        require(same, trial.who, f"says `separable`, but {name} of a batch is not what its halves give")
    before = trial.prototype.state_dict()
    kept = [name for name, value in node.state_dict().items() if not torch.equal(value, before[name])]
    require(not kept, trial.who, f"says `separable`, but its forward changes {', '.join(kept)}")


def _rows(inputs: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    return {name: _of(value, rows) for name, value in inputs.items()}


def _of(value: Any, rows: slice) -> Any:
    if isinstance(value, list):
        return [_of(one, rows) for one in value]
    return value[rows] if isinstance(value, Tensor) and value.ndim else value
