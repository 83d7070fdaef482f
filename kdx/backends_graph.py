"""Frozen models as one graph: the fields that the plan wants and nothing else, and the same with folded batch norm."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.nn.utils.fusion import fuse_conv_bn_weights

from kdx.calls import Key, ModelCall

_CONV = torch.ops.aten.conv2d.default
_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default
_VIEW, _RESHAPE = torch.ops.aten.view.default, torch.ops.aten.reshape.default


class _Fields(nn.Module):
    def __init__(self, calls: Sequence[ModelCall]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(call.module for call in calls)
        keys = keys_of(calls)
        self.places = [{stream: keys.index(key) for stream, key in call.streams.items()} for call in calls]
        self.wanted = [call.module.wanted for call in calls]

    def forward(self, *streams: Tensor) -> tuple[Tensor, ...]:
        fields: list[Tensor] = []
        for net, places, wanted in zip(self.nets, self.places, self.wanted, strict=True):
            found = net({stream: streams[place] for stream, place in places.items()})
            fields += [found[name] for name in wanted]
        return tuple(fields)


def keys_of(calls: Sequence[ModelCall]) -> tuple[Key, ...]:
    """What calls read, each once."""
    return tuple(dict.fromkeys(key for call in calls for key in call.reads))


def export(calls: Sequence[ModelCall], streams: Sequence[Tensor]) -> ExportedProgram:
    """One graph from what the calls read to all that they give, for streams of just these shapes.

    What only other fields need is not in it, so a pass that stops early stops there as well, each net at its own
    depth. Raises whatever `torch.export` raises for code that it cannot follow.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the inside of torch.export
        traced = torch.export.export(_Fields(calls), tuple(streams), strict=False)
        program: ExportedProgram = traced.run_decompositions({})
    program.graph_module.graph.eliminate_dead_code()
    return program


def as_module(program: ExportedProgram) -> fx.GraphModule:
    """The graph as a module that torch runs. It shares its weights with the models."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def fold(program: ExportedProgram) -> fx.GraphModule:
    """The graph with each batch norm folded into the convolution before it, and with kernels in channels-last layout.

    A convolution that something else reads too, such as a tap, keeps its norm. Fields come out contiguous.
    """
    module = as_module(program)
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is _NORM:
            _fold(module, node)
        elif node.target is _VIEW:
            node.target = _RESHAPE  # a view of channels-last data may need a copy
        elif node.op == "output":
            with graph.inserting_before(node):
                node.args = fx.map_arg(node.args, lambda one: _contiguous(graph, one))
    graph.eliminate_dead_code()
    return _plain(module)


def _plain(module: fx.GraphModule) -> fx.GraphModule:
    """The same with all weights at the top and with nothing between a call and its operations: in small nets, to look
    weights up along their paths and to look inputs over takes longer than to compute.
    """
    weights: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and (weight := _stored(module, node)) is not None:
            name = names.setdefault(str(node.target), f"weight_{len(names)}")
            layout = torch.channels_last if weight.ndim == 4 else torch.preserve_format
            weights.setdefault(name, weight.detach().to(memory_format=layout))
            node.target = name
    module.graph.set_codegen(fx.graph.CodeGen())
    plain = fx.GraphModule(weights, module.graph)
    plain.graph.lint()
    return plain


def _fold(module: fx.GraphModule, norm: fx.Node) -> None:
    conv = norm.args[0]
    if not isinstance(conv, fx.Node) or conv.target is not _CONV or len(conv.users) > 1:
        return
    inputs = [*conv.args[:3], *([None] * (3 - len(conv.args)))][1:3]
    stored = [_stored(module, node) for node in (*inputs, *norm.args[1:5])]
    kernel, bias, scale, shift, mean, variance = stored
    if kernel is None or mean is None or variance is None or (bias is None and inputs[1] is not None):
        return
    # In double precision, so that the only rounding is that of the result.
    eps = float(norm.args[6])  # type: ignore[arg-type]
    wide = [None if value is None else value.detach().double() for value in (kernel, bias, mean, variance)]
    scales = [None if value is None else value.detach().double() for value in (scale, shift)]
    folded = fuse_conv_bn_weights(wide[0], wide[1], wide[2], wide[3], eps, scales[0], scales[1])  # type: ignore[arg-type]
    names = [f"{norm.name}_{part}" for part in ("kernel", "bias")]
    with module.graph.inserting_before(conv):
        for name, value in zip(names, folded, strict=True):
            module.register_buffer(name, value.detach().to(kernel.dtype))
        attributes = [module.graph.get_attr(name) for name in names]
    conv.args = (conv.args[0], *attributes, *conv.args[3:])
    for user in list(norm.users):
        if user.target is operator.getitem and user.args[1] == 0:
            user.replace_all_uses_with(conv)


def _stored(module: fx.GraphModule, node: Any) -> Tensor | None:
    """The weight behind a node, if it is one."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, Tensor) else None


def _contiguous(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.call_function(torch.ops.aten.contiguous.default, (node,))
