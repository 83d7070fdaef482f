"""One net over several streams: a branch for each, and a head over what these say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import kdx


@dataclass(frozen=True)
class Branch:
    """Where a branch finds its streams among those of the net; `present` is the place of its mask, None without one."""

    streams: tuple[int, ...]
    present: int | None


class FusedNet(nn.Module):
    """Branches that each give an embedding [B, D_i], these side by side [B, sum D_i], and a classifier.

    `parts` are networks with their input side, so the net takes raw streams. With `hidden` above 0 a layer with ReLU
    comes first; what enters the classifier is the embedding.
    """

    def __init__(
        self,
        parts: Mapping[str, kdx.Network],
        branches: Mapping[str, Branch],
        widths: Sequence[int],
        classes: int,
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.branches = dict(branches)
        width = sum(widths)
        mixed = [nn.Linear(width, hidden), nn.ReLU()] if hidden else []
        self.mix = nn.Sequential(*mixed, *([nn.Dropout(dropout)] if dropout else []))
        self.classifier = nn.Linear(hidden or width, classes)

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def forward(self, *streams: Tensor) -> Tensor:
        """Logits [B, K]. What a branch says of a sample without its modality is 0."""
        said = []
        for name, part in self.parts.items():
            branch = self.branches[name]
            embedding = part(*[streams[place] for place in branch.streams]).flatten(1)
            if branch.present is not None:
                embedding = embedding * streams[branch.present].to(embedding)[:, None]
            said.append(embedding)
        logits: Tensor = self.classifier(self.mix(torch.cat(said, 1)))
        return logits


class LateFusion(kdx.Model):
    """Several nets over several streams, joined behind their embeddings: a teacher that sees and hears is one net.

    parts: name -> a model section of its own: `{use: timm, model: resnet18, input: image}`. A part is any model of an
        installed plugin that ends in a linear classifier, which it loses; its `input` is one stream or several, and
        `present` names a mask such as `audio_present`, where its modality may be absent. All of them are in the
        `input` of the whole, as `[image, mel]`.
    hidden: the width of a layer before the classifier; 0 for none. dropout: before the classifier.

    Taps name the net of a part: `parts.ear.net.layer3`. (Simonyan and Zisserman, NeurIPS 2014, have two streams whose
    scores are averaged; here embeddings are joined, as is usual for sound and image.)
    """

    name = "late_fusion"
    offers = ("logits", "embedding")

    @dataclass(frozen=True)
    class Config:
        parts: dict[str, Any]
        hidden: int = 0
        dropout: float = 0.0

    config: Config

    def build(self) -> kdx.Network:
        return self._make(skeleton=False)

    def skeleton(self) -> kdx.Network:
        return self._make(skeleton=True)

    def _make(self, *, skeleton: bool) -> kdx.Network:
        config, classes = self.config, len(self.facts.classes)
        if len(config.parts) < 2:
            raise kdx.ConfigError(f"parts: found {len(config.parts)}, expected two nets or more")
        if config.hidden < 0 or not 0 <= config.dropout < 1:
            raise kdx.ConfigError(
                f"hidden, dropout: found {config.hidden} and {config.dropout}, expected 0 or more, and 0 or more but "
                "below 1"
            )
        if not classes:
            raise kdx.PlanError("late_fusion tells classes apart, but the data has none")
        read = {name: _read_part(name, options, self.streams) for name, options in config.parts.items()}
        used = {place for _, _, branch in read.values() for place in (*branch.streams, branch.present)}
        if idle := [stream for place, stream in enumerate(self.streams) if place not in used]:
            raise kdx.ConfigError(
                f"input: no part reads {', '.join(idle)}; name it in the `input` of one, or leave it out"
            )
        parts = {
            name: self._part(name, use, options, branch, skeleton=skeleton)
            for name, (use, options, branch) in read.items()
        }
        branches = {name: branch for name, (_, _, branch) in read.items()}
        widths = [self._width(name, part) for name, part in parts.items()]
        return kdx.Network(FusedNet(parts, branches, widths, classes, config.hidden, config.dropout), self.streams)

    def _part(self, name: str, use: str, options: Mapping[str, Any], branch: Branch, *, skeleton: bool) -> kdx.Network:
        """The network of a part, without its classifier."""
        chosen = [self.streams[place] for place in branch.streams]
        facts = replace(self.facts, streams={stream: self.facts.streams[stream] for stream in chosen})
        try:
            network: kdx.Network = kdx.make("models", use, facts=facts, skeleton=skeleton, **options)
        except kdx.KdxError as error:
            raise type(error)(f"parts.{name}: {error}") from error
        _drop_classifier(name, network.net)
        return network

    def _width(self, name: str, part: kdx.Network) -> int:
        """The width of a part's embedding, from two silent samples."""
        streams = []
        for stream in part.streams:
            about = self.facts.streams[stream]
            streams.append(torch.zeros(2, *about.shape, dtype=torch.bool if about.kind == "mask" else torch.float32))
        training = part.training
        with torch.no_grad():
            found = part.eval()(*streams)
        part.train(training)
        if not isinstance(found, Tensor) or len(found) != 2:
            raise kdx.PlanError(f"parts.{name}: it gives a {type(found).__name__}, expected one tensor [B, D]")
        return found.flatten(1).shape[1]


@kdx.hookimpl
def kdx_models() -> list[type[kdx.Model]]:
    return [LateFusion]


def _read_part(name: str, options: Any, streams: Sequence[str]) -> tuple[str, dict[str, Any], Branch]:
    """The component of a part, its options, and its streams."""
    if not isinstance(options, Mapping) or not isinstance(options.get("use"), str):
        raise kdx.ConfigError(f"parts.{name}: found {options!r}, expected a model, as {{use: timm, model: resnet18}}")
    if not name.isidentifier():
        raise kdx.ConfigError(f"parts.{name}: {name!r} cannot be part of a path; use letters, digits and underscores")
    rest = {key: value for key, value in options.items() if key not in ("use", "input", "present")}
    named = options.get("input")
    chosen = [named] if isinstance(named, str) else named
    if not isinstance(chosen, list) or not chosen:
        raise kdx.ConfigError(f"parts.{name}.input: found {named!r}, expected one of {', '.join(streams)}, or a list")
    present = options.get("present")
    for key, stream in [*(("input", one) for one in chosen), *([("present", present)] if present is not None else [])]:
        if stream not in streams:
            raise kdx.ConfigError(
                f"parts.{name}.{key}: found {stream!r}, which is not in the `input` of the whole: {', '.join(streams)}"
            )
    places = tuple(streams.index(one) for one in chosen)
    return str(options["use"]), rest, Branch(places, None if present is None else streams.index(present))


def _drop_classifier(name: str, net: nn.Module) -> None:
    """Let a net give what entered its classifier."""
    getter = getattr(net, "get_classifier", None)
    found = getter() if callable(getter) else None
    if found is None:
        linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
        found = linear[-1] if linear else None
    paths = [path for path, module in net.named_modules() if path and module is found]
    if not paths:
        raise kdx.PlanError(
            f"parts.{name}: {type(net).__name__} has no classifier to leave out; expected one to end in"
        )
    net.set_submodule(paths[0], nn.Identity())
