"""Lists what can be tapped in a network, with shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from kdx.components import Network
from kdx.errors import PlanError
from kdx.heads import problem_of
from kdx.taps import EMBEDDING, FEATURES, LOGITS, Tap, Tapped, classifier_of, is_depth, stage_count
from kdx.types import Batch, Shape


@dataclass(frozen=True)
class Tappable:
    """One tensor that a config can name: `tap` is what the section `taps` says, or a field that is always there."""

    tap: str
    module: str
    gives: Shape | None
    takes: Shape | None


def tappable(network: Network, batch: Batch) -> list[Tappable]:
    """Fields that are always there, numbered stages, every module in the order in which they run, heads of attention.

    `batch` holds at least one sample. Shapes are per sample; None where a module gives or takes no single tensor.
    """
    network = network.eval()
    return [*_fields(network, batch), *_stages(network, batch), *_modules(network, batch), *_heads(network, batch)]


def tap_table(title: str, found: list[Tappable]) -> Table:
    """The list as a table for the terminal."""
    table = Table(title=title, title_justify="left")
    table.add_column("tap", no_wrap=True)
    for column in ("module", "gives", "takes"):
        table.add_column(column, overflow="fold")
    table.caption = "`takes` is what `side: input` gives; `give` has scores as attention, queries and keys as values"
    for item in found:
        table.add_row(item.tap, item.module, _dims(item.gives), _dims(item.takes))
    return table


def _fields(network: Network, batch: Batch) -> Iterator[Tappable]:
    names = [LOGITS]
    names += [EMBEDDING] if classifier_of(network.net) is not None else []
    names += [FEATURES] if hasattr(network.net, "forward_features") else []
    names += [f"depth_{percent}" for percent in (25, 50, 75, 100)] if stage_count(network.net) else []
    for name in names:
        with torch.no_grad():
            tapped = Tapped(network, (name,), {}, "model")
            found = tapped(batch)[name]
        stage = tapped.stages_meant.get(name)
        yield Tappable(name, f"stage {stage}" if is_depth(name) else "always there", _shape(found), None)


def _stages(network: Network, batch: Batch) -> Iterator[Tappable]:
    info: Any = getattr(network.net, "feature_info", None)
    for number in range(stage_count(network.net)):
        with torch.no_grad():
            found = Tapped(network, ("stage",), {"stage": Tap(number)}, "model")(batch)["stage"]
        module = info[number]["module"] if isinstance(info, list) else info.module_name(number)
        yield Tappable(str(number), f"stage: {module}", _shape(found), None)


def _modules(network: Network, batch: Batch) -> Iterator[Tappable]:
    paths = {module: path for path, module in network.net.named_modules() if path}
    seen: dict[str, Tappable] = {}

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        path = paths[module]
        seen.setdefault(path, Tappable(path, type(module).__name__, _shape(output), _shape(inputs)))

    handles = [module.register_forward_hook(look) for module in paths]
    try:
        with torch.no_grad():
            network(*[batch[stream] for stream in network.streams])
    finally:
        for handle in handles:
            handle.remove()
    yield from seen.values()


def _heads(network: Network, batch: Batch) -> Iterator[Tappable]:
    """The inside of plain self-attention: one tensor of each shape."""
    paths = [path for path, module in network.net.named_modules() if path and problem_of(module) is None]
    taps = {f"{what}_{i}": Tap(path, give=what) for i, path in enumerate(paths) for what in ("attention", "values")}
    if not taps:
        return
    tapped = Tapped(network, tuple(taps), taps, "model")
    try:
        with torch.no_grad():
            tapped.protect(batch)
            found = tapped(batch)
    except PlanError:  # it is no plain self-attention
        return
    for name, tap in taps.items():
        yield Tappable(f"{{path: {tap.path}, give: {tap.give}}}", "self-attention", _shape(found[name]), None)


def _shape(value: Any) -> Shape | None:
    while isinstance(value, (tuple, list)) and len(value) == 1:
        value = value[0]
    return tuple(value.shape[1:]) if isinstance(value, Tensor) and value.ndim else None


def _dims(shape: Shape | None) -> str:
    return "" if shape is None else f"[{', '.join(map(str, shape))}]"
