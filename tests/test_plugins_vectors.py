"""Vectors of the data as a teacher."""

from __future__ import annotations

import pytest
import torch
from kdx_plugins.vectors import Vectors

import kdx
from kdx.taps import Tapped

FACTS = kdx.DataFacts(
    {
        "text": kdx.StreamFacts("vector", (4,), (0.0,) * 4, (1.0,) * 4),
        "image": kdx.StreamFacts("image", (3, 8, 8), (0.5,) * 3, (0.2,) * 3),
        "label": kdx.StreamFacts("label", ()),
    },
    classes=("a", "b", "c", "d"),
    size=4,
)


def test_there_is_nothing_to_train_or_to_save() -> None:
    network = Vectors(Vectors.Config(), FACTS, ("text",)).build()
    assert network.streams == ("text",)
    assert network.state_dict() == {}


def test_vectors_are_the_embedding_at_length_1() -> None:
    network = Vectors(Vectors.Config(), FACTS, ("text",)).build()
    found = Tapped(network, ("embedding",), {}, "teachers.words")(
        {"text": torch.tensor([[3.0, 0, 0, 4], [0, 0, 0, 0]])}
    )
    assert torch.allclose(found["embedding"], torch.tensor([[0.6, 0, 0, 0.8], [0, 0, 0, 0]]))


@pytest.mark.parametrize(
    ("streams", "found"),
    [
        (("image",), r"image, image \[3, 8, 8\]"),
        (("sound",), "sound, which the data lacks"),
        (("text", "image"), "text"),
    ],
)
def test_what_is_no_vector_is_refused(streams: tuple[str, ...], found: str) -> None:
    with pytest.raises(kdx.PlanError, match=rf"serves one stream of vectors \[D\], but found {found}"):
        Vectors(Vectors.Config(), FACTS, streams).build()
