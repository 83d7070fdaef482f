"""A run on mixtures of images, whose teacher has answered for the images as they are."""

from __future__ import annotations

from typing import Any

from small_plugin import made_images
from small_run import DISTIL, config_of

from kdx.builtin.tensor_data import TensorDataset

RECORD = {"share": "batch.mix_share@mixed", "partner": "batch.mix_partner@mixed"}
MIXED: dict[str, Any] = config_of(
    DISTIL,
    {
        "data": {"use": "tensors", "views": {"mixed": {"augment": {"cutmix": {}}}}},
        "targets": {"both": {"use": "mixed_answers", "inputs": {"logits": "wide.logits", **RECORD}, "temperature": 2}},
        "align": None,
        "losses": {
            "ce": {"use": "mixed_cross_entropy", "inputs": {"student": "student@mixed.logits", **RECORD}},
            "kd": {"inputs": {"student": "student@mixed.logits", "teacher": "both.logits"}},
            "hint": None,
        },
    },
)


def pictures() -> TensorDataset:
    classes = ["left", "right", "both"]
    return TensorDataset.from_tensors(train=made_images(48, 1), test=made_images(24, 2), classes=classes)
