"""What holds for all tests: files with slow tests come first, and figures are drawn only where tests look at them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

FIGURES = {"test_report", "test_report_teachers", "test_study_report", "test_tune_plots"}
"""The files that look at figures."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several processes take a file each; one that takes long must not be the last."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def undrawn(request: pytest.FixtureRequest) -> Iterator[None]:
    """Matplotlib writes an empty picture for each figure: drawing takes most of the time of a run of a few updates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    def blank(self: FigureCanvasAgg, path: Any) -> None:
        Image.new("RGB", (1, 1)).save(path, "png")

    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in FIGURES:
            patch.setattr(FigureCanvasAgg, "print_png", blank)
        yield
