"""Vectors that come with the data as a teacher: of captions, or of a model that is not at hand."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

import kdx


class VectorNet(nn.Module):
    """Vectors [B, D] brought to length 1. It has no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def forward(self, vectors: Tensor) -> Tensor:
        found: Tensor = self.classifier(F.normalize(vectors.float(), dim=1))
        return found


class Vectors(kdx.Model):
    """Serves a stream of vectors [D], such as `text`, as the `embedding` of a teacher, at length 1.

    Losses that read `teacher.embedding` thus learn from captions, or from what a model said that is not at hand. It has
    no logits, and nothing to train.
    """

    name = "vectors"
    offers = ("embedding",)

    def build(self) -> kdx.Network:
        streams = [self.facts.streams.get(name) for name in self.streams]
        first = streams[0]
        if first is None or len(first.shape) != 1 or first.kind != "vector" or len(streams) != 1:
            found = "which the data lacks" if first is None else f"{first.kind} {list(first.shape)} for one sample"
            raise kdx.PlanError(
                f"input: vectors serves one stream of vectors [D], but found {self.streams[0]}, {found}"
            )
        return kdx.Network(VectorNet(), self.streams)


@kdx.hookimpl
def kdx_models() -> list[type[kdx.Model]]:
    return [Vectors]
