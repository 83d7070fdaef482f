"""What a teacher's `cache:` may say, and how many views each sample has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdx.errors import ConfigError
from kdx.options import read_options

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORED = "stored"
"""The model of a teacher that has no net."""


@dataclass(frozen=True)
class CacheOptions:
    """How the answers of a frozen teacher are stored: `cache: true`, or a mapping of these options.

    dtype: float32, float16 or bfloat16. A teacher that computes in float32 trains the same student from float32 alone.
    top: of `logits`, keep this many per sample, and the mass of all others together; None keeps all.
    where: the folder of all caches; `cache` in the folder of runs (`out`) where it is left out.
    path: read this very cache and fill none. `cache: PATH` says the same. A teacher that says nothing else answers
        from there alone.
    one_view: with `data.views: 1`, store the only view of augmented samples. Students that see one view overfit to it.
    """

    dtype: str = "float32"
    top: int | None = None
    where: str | None = None
    path: str | None = None
    one_view: bool = False

    @property
    def exact(self) -> bool:
        """Whether nothing of a float32 answer is lost."""
        return self.dtype == "float32" and self.top is None

    @property
    def stored_as(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def folder(self) -> Path | None:
        """The cache that is named, if one is."""
        return None if self.path is None else Path(self.path)


def read_cache(found: Any, where: str) -> CacheOptions | None:
    """The options behind `cache:` of a teacher; None where it has none. Raises `ConfigError` for anything else."""
    if found is None or found is False:
        return None
    if found is True:
        return CacheOptions()
    if isinstance(found, str) and found:
        return CacheOptions(path=found)
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: found {found!r}, expected true, the folder of a cache, or a mapping of options")
    options: CacheOptions = read_options(CacheOptions, found, where)
    if options.dtype not in DTYPES:
        raise ConfigError(f"{where}.dtype: found {options.dtype!r}, expected one of {', '.join(DTYPES)}")
    if options.top is not None and options.top < 1:
        raise ConfigError(f"{where}.top: found {options.top}, expected a number of classes from 1")
    if options.path is not None and (options.where is not None or options.dtype != "float32" or options.top):
        raise ConfigError(f"{where}.path: a cache that is there keeps its own form; leave out dtype, top and where")
    return options


def split_views(found: Any) -> tuple[int | None, Mapping[str, Any]]:
    """How many views each sample has (None: a new one in each epoch), and the named views.

    `data.views: 4` is the number alone, and `{count: 4, strong: {...}}` says both.
    """
    if found is None:
        return None, {}
    if isinstance(found, int) and not isinstance(found, bool):
        found = {"count": found}
    if not isinstance(found, Mapping):
        raise ConfigError(f"data.views: found {found!r}, expected a whole number from 1, or names with their options")
    count = found.get("count")
    if isinstance(count, Mapping):  # a view that is called so
        return None, found
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ConfigError(f"data.views.count: found {count!r}, expected a whole number from 1")
    return count, {name: options for name, options in found.items() if name != "count"}
