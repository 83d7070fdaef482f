"""Which device and which precision a config means, and whether this machine has them."""

from __future__ import annotations

import torch

from kdx.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str, where: str = "runtime.device") -> torch.device:
    """The device that a config names; `auto` is a GPU where there is one. Raises `ConfigError` for an absent one."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{where}: found {name!r}, expected auto, cpu, cuda, cuda:0 or mps") from error
    absent = (device.type == "cuda" and not cuda) or (device.type == "mps" and not mps)
    if absent or device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"{where}: found {name!r}, but this machine has no such device; auto takes what is there")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(f"{where}: found {name!r}, but there are {torch.cuda.device_count()} GPUs")
    return device


def pick_precision(name: str, device: torch.device, where: str = "runtime.precision") -> str:
    """The precision of forward passes: `auto` is bf16 (else fp16) on a GPU and fp32 elsewhere.

    So is `measured` where nothing has been measured yet. A CPU without bf16 units is more than ten times slower in
    bf16, so `auto` never takes it there.
    """
    if name in ("auto", "measured"):
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name == "fp16" and device.type == "cpu":
        raise ConfigError(f"{where}: fp16 needs a GPU; a CPU computes in fp32 or bf16")
    return name
