"""Gives names to inner tensors of a network: `Tapped` runs it and returns what was asked for, and no more."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdx import heads
from kdx.components import Network
from kdx.errors import ConfigError, PlanError, did_you_mean
from kdx.heads import GIVES
from kdx.types import Batch

LOGITS = "logits"
"""What a net returns when it returns one tensor."""
EMBEDDING = "embedding"
"""What enters the classifier, `[B, D]`."""
FEATURES = "features"
"""The last feature map or token sequence of a timm net, before pooling."""
STANDARD = (LOGITS, EMBEDDING, FEATURES)
_DEPTH = re.compile(r"depth_([1-9][0-9]?|100)")


@dataclass(frozen=True)
class Tap:
    """Where an inner tensor is: the n-th entry of a timm net's `feature_info`, or a module's output or input.

    `give` names what is read inside of a self-attention module instead (`kdx.heads`).
    """

    path: str | int
    side: str = "output"
    give: str | None = None


def read_taps(taps: Mapping[str, Any], where: str) -> dict[str, Tap]:
    """The `taps` of a model section: a number, a path, or `{path: ..., side: output|input}` for each name.

    `{path: ..., give: attention|scores|queries|keys|values}` reads the inside of a self-attention module.
    """
    read: dict[str, Tap] = {}
    for name, value in taps.items():
        at = f"{where}.{name}"
        if name in STANDARD or is_depth(name):
            raise ConfigError(f"{at}: {name!r} is what every model offers already; choose another name")
        if not str(name).isidentifier():
            raise ConfigError(f"{at}: {name!r} cannot be part of a ref; use letters, digits and underscores")
        options = value if isinstance(value, Mapping) else {"path": value}
        for key in options:
            if key not in ("path", "side", "give"):
                raise ConfigError(f"{at}.{key}: unknown option; {did_you_mean(str(key), ['path', 'side', 'give'])}")
        path, side = options.get("path"), options.get("side", "output")
        if isinstance(path, bool) or not isinstance(path, (int, str)) or path == "":
            raise ConfigError(f"{at}: found {path!r}, expected a stage number or the path of a module")
        if side not in ("output", "input"):
            raise ConfigError(f"{at}.side: found {side!r}, expected output or input")
        if isinstance(path, int) and side == "input":
            raise ConfigError(f"{at}: a stage number gives outputs only; name a module's path to tap its input")
        what = options.get("give")
        if what is not None and what not in GIVES:
            raise ConfigError(f"{at}.give: found {what!r}, expected one of {', '.join(GIVES)}")
        if what is not None and (isinstance(path, int) or "side" in options):
            raise ConfigError(f"{at}.give: it goes with the path of an attention module, without `side`")
        read[name] = Tap(path, side, what)
    return read


class _Stop(Exception):  # noqa: N818  (it is no error)
    """Leaves a forward pass when everything asked for has been seen."""


@dataclass
class _Captured:
    """What the hooks of one network have seen in the current forward pass.

    `versions` counts the changes of a tensor in place at the time when it was taken, for each time that its module
    ran; it is kept only while `protect` looks.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, list[int]] | None = None
    cloned: set[str] = field(default_factory=set)
    stop_at: int = 0
    active: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Captured:
        copied = _Captured(cloned=set(self.cloned), stop_at=self.stop_at)
        memo[id(self)] = copied
        return copied

    def take(self, name: str, value: Any) -> None:
        if not self.active:  # the module is used by itself, as a borrowed part or to predict
            return
        while isinstance(value, (tuple, list)) and value:
            value = value[0]
        if not isinstance(value, Tensor):
            raise PlanError(f"tap {name!r}: the module gives a {type(value).__name__}, not a tensor")
        if self.versions is not None:
            self.versions.setdefault(name, []).append(value._version)
        exporting = torch.compiler.is_exporting()  # which follows calls to their end, past changes in place
        self.tensors[name] = value.clone() if exporting or name in self.cloned else value
        if len(self.tensors) == self.stop_at and not exporting:
            raise _Stop


@dataclass
class _OutputHook:
    name: str
    captured: _Captured

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.captured.take(self.name, output)


@dataclass
class _InputHook:
    name: str
    captured: _Captured

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        self.captured.take(self.name, inputs)


@dataclass
class _HeadsHook:
    """Sits on the layer `qkv` of an attention module."""

    name: str
    captured: _Captured
    attention: nn.Module
    what: str

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self.captured.active:
            self.captured.take(self.name, heads.give(self.attention, output, self.what))


class Tapped(nn.Module):
    """Runs a network on a batch and returns the `wanted` fields.

    Stage numbers of timm nets go through `forward_intermediates`, which gives maps `[B, C, H, W]` for transformers
    too; paths go through forward hooks. Where no final output is wanted the pass ends at the last tap. A hooked
    tensor that the net later changes in place is cloned (`protect` finds out which).

    Raises `PlanError` for a field or tap that the network cannot give.
    """

    def __init__(self, network: Network, wanted: Sequence[str], taps: Mapping[str, Tap], where: str) -> None:
        super().__init__()
        self.network = network
        self.wanted = tuple(wanted)
        self._names = (*taps, EMBEDDING)
        depths = {name: Tap(depth_stage(network.net, name, where)) for name in self.wanted if is_depth(name)}
        used = {name: tap for name, tap in {**depths, **taps}.items() if name in self.wanted}
        self.stages_meant = {name: str(tap.path) for name, tap in depths.items()}
        self._stages = {name: _stage(network.net, tap.path, f"{where}.taps.{name}") for name, tap in used.items()
                        if isinstance(tap.path, int)}  # fmt: skip
        self._indices = sorted(set(self._stages.values()))
        self._captured = _Captured()
        self._proofs: dict[nn.Module, heads.Proof] = {}
        self._hooked = [name for name, tap in used.items() if isinstance(tap.path, str)]
        for name, tap in used.items():
            if isinstance(tap.path, str):
                module = _find_module(network.net, tap.path, f"{where}.taps.{name}")
                if tap.give is None:
                    self._hook(module, name, tap.side)
                else:
                    self._hook_heads(module, name, tap, f"{where}.taps.{name}")
        if EMBEDDING in self.wanted and EMBEDDING not in taps:
            self._hook(_classifier(network.net, where), EMBEDDING, "input")
            self._hooked.append(EMBEDDING)
        if FEATURES in self.wanted and not hasattr(network.net, "forward_features"):
            raise PlanError(f"{where}: {type(network.net).__name__} offers no `features`; name a tap instead")
        self._final = [name for name in self.wanted if name not in used and name not in (EMBEDDING, FEATURES)]
        if not self._final and not self._indices and FEATURES not in self.wanted:
            self._captured.stop_at = len(self._hooked)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The wanted fields for the streams of `batch`."""
        network, captured = self.network, self._captured
        streams = [batch[stream] for stream in network.streams]
        if type(network.prepare) is not nn.Identity:
            streams = [network.prepare(stream) for stream in streams]
        if not self._hooked:
            return self._run(streams)
        captured.active, captured.tensors = True, {}  # a dict of this pass: a compiler keeps what others then hold
        try:
            found = self._run(streams)
        except _Stop:
            found = {}
        finally:
            captured.active = False
            taken, captured.tensors = captured.tensors, {}
        for name in self._hooked:
            if name not in taken:
                raise PlanError(f"tap {name!r} of {type(self.network.net).__name__}: the module did not run")
            found[name] = taken[name].flatten(1) if name == EMBEDDING else taken[name]
        return found

    def run_through(self) -> None:
        """Go to the end of the network from now on, though nothing after the last tap is wanted."""
        self._captured.stop_at = 0

    def protect(self, batch: Batch) -> None:
        """Find the taps that the net changes in place after they were taken, and clone them from now on.

        Raises `PlanError` for a module that runs more than once in a pass: which of its tensors is meant is unknown.
        """
        if not self._hooked:
            return
        captured = self._captured
        stop_at = captured.stop_at
        try:
            captured.stop_at = 0
            if self._proofs:
                self._prove(batch)
            captured.versions = {}
            self.forward(batch)
            for name, versions in captured.versions.items():
                if len(versions) > 1:
                    raise PlanError(
                        f"tap {name!r} of {type(self.network.net).__name__}: the module runs {len(versions)} times in "
                        "one pass; tap one that runs once, such as the block around it"
                    )
            captured.stop_at, captured.versions = stop_at, {}
            seen: dict[str, Tensor] = self.forward(batch)
            for name, versions in captured.versions.items():
                if name != EMBEDDING and seen[name]._version != versions[0]:
                    captured.cloned.add(name)
        finally:
            captured.stop_at, captured.versions = stop_at, None

    def _prove(self, batch: Batch) -> None:
        """A pass that compares every tap inside of attention with what its module computes, without dropout."""
        modes = [(module, module.training) for module in self.network.net.modules()]
        self.network.net.eval()
        for proof in self._proofs.values():
            proof.on = True
        try:
            self._run([self.network.prepare(batch[stream]) for stream in self.network.streams])
        finally:
            for proof in self._proofs.values():
                proof.on = False
            for module, mode in modes:
                module.training = mode

    def copy_all(self) -> None:
        """Clone every tap from now on, where no batch is at hand to find out which ones need it."""
        self._captured.cloned.update(name for name in self._hooked if name != EMBEDDING)

    @property
    def is_hooked(self) -> bool:
        """Whether a tensor is read by a hook on a module."""
        return bool(self._hooked)

    @property
    def stops_early(self) -> bool:
        """Whether the pass ends before the net's own output."""
        return not self._final

    def _hook(self, module: nn.Module, name: str, side: str) -> None:
        if side == "input":
            module.register_forward_pre_hook(_InputHook(name, self._captured))
        else:
            module.register_forward_hook(_OutputHook(name, self._captured))

    def _hook_heads(self, module: Any, name: str, tap: Tap, where: str) -> None:
        problem = heads.problem_of(module)
        if problem is not None:
            raise PlanError(
                f"{where}: `give: {tap.give}` needs plain self-attention, but {type(module).__name__} {problem}"
            )
        if module not in self._proofs:
            self._proofs[module] = heads.Proof(module)
        module.qkv.register_forward_hook(_HeadsHook(name, self._captured, module, str(tap.give)))

    def _run(self, streams: list[Tensor]) -> dict[str, Tensor]:
        net: Any = self.network.net
        if not self._indices and FEATURES not in self.wanted:
            return self._named(net(*streams))
        found: dict[str, Tensor] = {}
        if self._indices:
            ends = not self._final and FEATURES not in self.wanted and not self._hooked
            given = net.forward_intermediates(
                *streams, indices=self._indices, output_fmt="NCHW", intermediates_only=ends, stop_early=ends
            )
            maps = given if ends else given[1]
            for name, stage in self._stages.items():
                found[name] = maps[self._indices.index(stage)]
            if ends:
                return found
            features: Tensor = given[0]
        else:
            features = net.forward_features(*streams)
        if FEATURES in self.wanted:
            found[FEATURES] = features
        if self._final or EMBEDDING in self.wanted:
            found |= self._named(net.forward_head(features))
        return found

    def _named(self, output: Any) -> dict[str, Tensor]:
        if not self._final:
            return {}
        if isinstance(output, Tensor):
            output = {LOGITS: output}
        elif isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
            output = {LOGITS: output[0]}
        if not isinstance(output, Mapping):
            raise PlanError(
                f"{type(self.network.net).__name__} returns a {type(output).__name__}; expected a tensor or a dict"
            )
        for name in self._final:
            if name not in output:
                raise PlanError(
                    f"{type(self.network.net).__name__} gives no {name!r}; "
                    f"{did_you_mean(name, [*map(str, output), *self._names])}"
                )
        return {name: output[name] for name in self._final}


def is_depth(name: str) -> bool:
    """Whether a field names a stage by its relative depth, as `depth_50` does."""
    return _DEPTH.fullmatch(name) is not None


def depth_stage(net: nn.Module, name: str, where: str) -> int:
    """The stage at a relative depth: `depth_100` is the last one, `depth_50` the one that ends the first half."""
    count = stage_count(net)
    if not count:
        raise PlanError(f"{where}: {type(net).__name__} has no numbered stages, so no {name!r}; name a tap instead")
    return -(-int(name.removeprefix("depth_")) * count // 100) - 1


def stage_count(net: nn.Module) -> int:
    """How many stages `feature_info` of a timm net lists; 0 for other nets."""
    info = getattr(net, "feature_info", None)
    if info is None or not hasattr(net, "forward_intermediates"):
        return 0
    try:
        return len(info)
    except TypeError:
        return 0


def _stage(net: nn.Module, number: Any, where: str) -> int:
    count = stage_count(net)
    if not count:
        raise PlanError(f"{where}: {type(net).__name__} has no numbered stages; give the path of a module")
    if not -count <= number < count:
        raise PlanError(f"{where}: found stage {number}, but {type(net).__name__} has stages 0 to {count - 1}")
    return int(number) % count


def _find_module(net: nn.Module, path: str, where: str) -> nn.Module:
    modules: dict[str, nn.Module] = {name: module for name, module in net.named_modules() if name}
    if path in modules:
        return modules[path]
    matches = fnmatch.filter(modules, path)
    if len(matches) == 1:
        return modules[matches[0]]
    if matches:
        raise PlanError(
            f"{where}: {path!r} fits {len(matches)} modules ({', '.join(matches[:6])} ...); expected one: write its "
            f"path, as in {matches[0]}, and give each further module a tap of its own"
        )
    near = did_you_mean(path, modules)
    raise PlanError(f"{where}: {type(net).__name__} has no module {path!r}; {near}")


def classifier_of(net: nn.Module) -> nn.Module | None:
    """The module that turns an embedding into logits: timm's classifier, else the last linear layer.

    Of a net with several classifiers, as distilled transformers have them, it is the first.
    """
    getter = getattr(net, "get_classifier", None)
    found = getter() if callable(getter) else None
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if isinstance(found, nn.Module):
        return found
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None


def _classifier(net: nn.Module, where: str) -> nn.Module:
    found = classifier_of(net)
    if found is None:
        raise PlanError(f"{where}: {type(net).__name__} has no classifier, so no `embedding`; name a tap instead")
    return found
