"""Facts of the figures of a search."""

from __future__ import annotations

from pathlib import Path

from kdx.tune import Choices, Range
from kdx.tune_plots import draw_parallel, draw_search
from kdx.tune_trials import Found

SPACE = {"lr": Range(0.01, 1.0, log=True), "$use_": Choices({"sgd": "sgd", None: None})}
TRIALS = [
    Found(0, "complete", {"lr": 0.1, "$use_": "sgd"}, 0.5, {1: 0.4, 2: 0.5}, 1.0, "", ""),
    Found(1, "complete", {"lr": 0.3, "$use_": None}, 0.7, {1: 0.4, 2: 0.7}, 1.0, "", ""),
    Found(2, "pruned", {"lr": 0.9, "$use_": None}, None, {1: 0.1}, 1.0, "", ""),
    Found(3, "failed", {"lr": 0.9, "$use_": None}, None, {}, 1.0, "", "it broke"),
]


def test_finished_trials_are_drawn(tmp_path: Path) -> None:
    for minimise in (False, True):
        assert draw_search(tmp_path / "a.png", TRIALS, {"lr": 0.9, "$use_": 0.1}, monitor="accuracy", minimise=minimise)
        assert draw_parallel(tmp_path / "b.png", TRIALS, SPACE, monitor="accuracy", minimise=minimise)
        assert (tmp_path / "a.png").stat().st_size > 10_000
        assert (tmp_path / "b.png").stat().st_size > 10_000


def test_a_single_trial_is_drawn_without_importances(tmp_path: Path) -> None:
    assert draw_search(tmp_path / "a.png", TRIALS[:1], {}, monitor="accuracy", minimise=False)
    assert draw_parallel(tmp_path / "b.png", TRIALS[:1], SPACE, monitor="accuracy", minimise=False)


def test_without_a_finished_trial_there_is_no_figure(tmp_path: Path) -> None:
    assert not draw_search(tmp_path / "a.png", TRIALS[2:], {}, monitor="accuracy", minimise=False)
    assert not draw_parallel(tmp_path / "b.png", TRIALS[2:], SPACE, monitor="accuracy", minimise=False)
    assert not [*tmp_path.iterdir()]
