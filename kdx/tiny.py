"""A whole run in a second or two, for tests of plugins: real images, a small student, a small teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdx.api import RunResult, run
from kdx.builtin.images import FashionMnist
from kdx.config import overlay, parse_override
from kdx.types import Batch

_NET = {"layers": [1, 1, 1, 1], "stem_width": 8, "output_stride": 8}
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"labelled": 60},
    "student": {"use": "timm", "model": "resnet18", "args": {**_NET, "channels": [4, 4, 8, 8]}},
    "teachers": {"teacher": {"use": "timm", "model": "resnet18", "args": {**_NET, "channels": [8, 8, 12, 16]}}},
    "losses": {"ce": {"use": "cross_entropy"}},
    "train": {"updates": 4, "batch": 32, "lr": 0.05},
    "baseline": False,
}
"""The config: a few shipped images, 60 of them with a label, and a teacher with its first weights."""


def tiny_run(
    folder: str | Path,
    *,
    plugins: Sequence[str | Path] = (),
    overrides: Sequence[str] = (),
    **sections: Mapping[str, Any],
) -> RunResult:
    """Train the config `TINY` with your plugins and sections, and give its result.

    `folder` receives the run's folder, as pytest's `tmp_path`; `plugins` are files or modules; `sections` are laid
    over the config (`losses={"mine": {"use": "my_loss"}}`), `overrides` over that. A section `data` with a `use` of its
    own stands in for the shipped images. Fails as `kdx run` would.
    """
    config = overlay(TINY, {"out": str(folder), "plugins": [str(item) for item in plugins]})
    for layer in (sections, *map(parse_override, overrides)):
        config = overlay(config, layer)
    return run(config, data=None if "use" in config["data"] else _images(), quiet=True)


def _images() -> dict[str, Batch]:
    """The first shipped images of each split."""
    source = FashionMnist(FashionMnist.Config())
    train, test = source.train(), source.test()
    assert test is not None
    return {"train": train.fetch(range(96)), "val": test.fetch(range(40)), "test": test.fetch(range(40, 80))}
