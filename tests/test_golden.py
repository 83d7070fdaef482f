"""The golden loss curve: a change that is meant to alter no number leaves it as it is.

A tiny distillation run on the CPU with a teacher, a target, an aligner and schedules. When a change is meant to alter
it, `python tests/test_golden.py` prints the new numbers.
"""

from __future__ import annotations

import pytest
from small_run import DISTIL, Seen, config_of, session_of

GOLDEN_CONFIG = config_of(
    DISTIL,
    {
        "data": {"labelled": 24},
        "targets": {"tau": {"use": "doubt"}},
        "losses": {"kd": {"temperature": "tau"}, "own": {"use": "stateful", "weight": 0.1}},
        "train": {
            "updates": 20,
            "accumulate": 2,
            "clip": 5.0,
            "ema": 0.9,
            "weight_decay": 0.001,
            "lr": {"use": "cosine", "peak": 0.1, "warmup": 1},
        },
    },
)
TOTALS = [
    1.3987336158752441, 1.4394454956054688, 1.5387823581695557, 1.1254771947860718, 1.2908042669296265,
    1.1610246896743774, 1.1320364475250244, 1.1386829614639282, 1.2264245748519897, 1.362929105758667,
    1.1691250801086426, 1.0461589097976685, 1.141459345817566, 1.1441699266433716, 1.0444750785827637,
    1.0979602336883545, 1.0196447372436523, 0.9818601608276367, 0.9754199981689453, 1.0465843677520752,
]  # fmt: skip
"""The total of every update."""
LAST = {
    "total": 1.0465843677520752,
    "ce": 1.019634485244751,
    "kd": 0.06845366954803467,
    "hint": 0.03454945981502533,
    "own": 0.06252477318048477,
    "losses.kd.temperature": 1.5316791534423828,
    "losses.kd.weight": 0.05000000074505806,
    "tau": 1.5316791534423828,
    "tau/std": 0.0009786105947569013,
    "lr": 0.0008513450158049163,
    "accuracy": 0.5,
    "macro_f1": 0.4126984179019928,
    "macro_recall": 0.5,
    "calibration_error": 0.19331297278404236,
    "cross_entropy": 0.9913671016693115,
}
"""The numbers of the last update and of the last evaluation."""


def curve() -> tuple[list[dict[str, float]], dict[str, float]]:
    seen = Seen(session_of(GOLDEN_CONFIG))
    return [report.numbers() for report in seen.steps], dict(seen.evals[-1].metrics)


@pytest.fixture(scope="module")
def found() -> tuple[list[dict[str, float]], dict[str, float]]:
    return curve()


def test_the_loss_curve_is_the_golden_one(found: tuple[list[dict[str, float]], dict[str, float]]) -> None:
    assert [step["total"] for step in found[0]] == pytest.approx(TOTALS, rel=1e-6)


def test_the_last_update_and_evaluation_are_the_golden_ones(
    found: tuple[list[dict[str, float]], dict[str, float]],
) -> None:
    assert {**found[0][-1], **found[1]} == pytest.approx(LAST, rel=1e-6, abs=1e-7)


def test_the_curve_is_the_same_to_the_bit_when_it_is_run_again(
    found: tuple[list[dict[str, float]], dict[str, float]],
) -> None:
    assert curve() == found


if __name__ == "__main__":
    import sys

    steps, metrics = curve()
    lines = [f"    {step['total']!r},\n" for step in steps]
    lines += [f"    {name!r}: {value!r},\n" for name, value in {**steps[-1], **metrics}.items()]
    sys.stdout.writelines(lines)
