"""Which device and which precision a config means, and whether this machine has them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from kdx.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def present_devices() -> tuple[str, ...]:
    """The kinds of device that are here, those that are faster as a rule first."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return tuple(name for name, is_there in there.items() if is_there)


def pick_device(name: str | None, where: str = "runtime.device") -> torch.device:
    """The device that a config names; None is the first kind that is here. Raises `ConfigError` for an absent one."""
    here = present_devices()
    if name is None:
        return torch.device(here[0])
    try:
        device = torch.device(name)
    except RuntimeError as error:
        choices = ("auto, " if where == "runtime.device" else "") + "cpu, cuda, cuda:0 or mps"
        raise ConfigError(f"{where}: found {name!r}, expected {choices}") from error
    if device.type not in here:
        raise ConfigError(f"{where}: found {name!r}, but this machine has no such device, only {', '.join(here)}")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(f"{where}: found {name!r}, but there are {torch.cuda.device_count()} GPUs")
    return device


def low_precision(device: torch.device) -> str | None:
    """The lower precision that is worth a try on a device; None where there is none."""
    if device.type == "mps":
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "bf16"


def check_precision(name: str, device: torch.device, where: str = "runtime.precision") -> None:
    """Raise `ConfigError` for a precision that a device does not compute in."""
    if name == "fp16" and device.type == "cpu":
        raise ConfigError(f"{where}: fp16 needs a GPU; a CPU computes in fp32 or bf16")


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Full precision for what runs inside; where it is full anyway, nothing is entered, which costs much itself."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
