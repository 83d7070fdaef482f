"""The metric of classification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdx.components import Metric
from kdx.errors import DataError, PlanError
from kdx.types import DataFacts


class Classification(Metric):
    """`accuracy`, `macro_recall`, `macro_f1`, `calibration_error` and `cross_entropy` (in nats) of logits `[B, K]`.

    All but the last are fractions in `0..1`. Macro means the average over the classes that occur, as a label or as an
    answer. The calibration error is the expected one over `bins` equal bins of confidence with the L1 norm (Naeini,
    Cooper and Hauskrecht, 2015). Samples with label -1 are left out.
    """

    name = "classification"

    @dataclass(frozen=True)
    class Config:
        bins: int = 15

        def __post_init__(self) -> None:
            if self.bins < 1:
                raise ValueError(f"bins: found {self.bins}, expected 1 or more")

    def __init__(self, config: Config, facts: DataFacts, device: torch.device) -> None:
        from torchmetrics import MetricCollection, SumMetric  # takes a second, which only an evaluation should pay
        from torchmetrics.classification import (
            MulticlassAccuracy,
            MulticlassCalibrationError,
            MulticlassConfusionMatrix,
            MulticlassF1Score,
            MulticlassRecall,
        )

        super().__init__(config, facts, device)
        K = self._classes = len(facts.classes)
        if K < 2:
            raise PlanError(f"metrics.classification: found {K} classes in the data, expected 2 or more")
        # Validating the arguments would wait for the device at each batch.
        common: dict[str, Any] = {"num_classes": K, "ignore_index": -1, "validate_args": False}
        self._answers = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(average="micro", **common),
                "macro_recall": MulticlassRecall(average="macro", **common),
                "macro_f1": MulticlassF1Score(average="macro", **common),
            }
        ).to(device)
        self._confusion = MulticlassConfusionMatrix(**common).to(device)
        self._calibration = MulticlassCalibrationError(n_bins=config.bins, norm="l1", **common).to(device)
        # Not a MeanMetric: told to let NaN pass, it forgets its weights too.
        self._cross_entropy = SumMetric(nan_strategy="disable").to(device)

    def update(self, logits: Tensor, label: Tensor) -> None:  # type: ignore[override]
        if logits.ndim != 2 or logits.shape[1] != self._classes:
            raise PlanError(
                f"metrics.classification: found logits of shape {list(logits.shape)}, "
                f"expected [{len(label)}, {self._classes}] for {self._classes} classes"
            )
        logits = logits.float()
        answers = logits.argmax(1)
        self._answers.update(answers, label)
        self._confusion.update(answers, label)
        # Given logits, torchmetrics would take those that happen to lie in 0..1 for probabilities.
        self._calibration.update(logits.softmax(1), label)
        self._cross_entropy.update(F.cross_entropy(logits, label, ignore_index=-1, reduction="sum"))

    def compute(self) -> dict[str, float]:
        """The numbers so far; raises DataError where no sample had a label."""
        seen = self.confusion().sum() if self._confusion.update_called else 0
        if not seen:
            raise DataError("metrics.classification: no sample with a label was seen, so there is nothing to measure")
        values = {
            **self._answers.compute(),
            "calibration_error": self._calibration.compute(),
            "cross_entropy": self._cross_entropy.compute() / seen,
        }
        return {name: float(value) for name, value in values.items()}

    def confusion(self) -> Tensor:
        """How often each class (rows) was answered as each class (columns), int64 `[K, K]`."""
        counts: Tensor = self._confusion.compute()
        return counts


METRICS: list[type[Metric]] = [Classification]
