"""A plugin with a teacher that obeys `order.txt` at one of its calls: `kill 40` ends its process there, and `hold 40`
waits there until the file is gone, or for a minute. Each call is a line of `calls.txt`.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

import kdx

ORDER, CALLS = Path("order.txt"), Path("calls.txt")


class MortalNet(nn.Module):
    """A map of the images, and logits from it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 2, 3, stride=4)
        self.head = nn.Linear(8, classes)
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 2:  # no probe
            self.calls += 1
            self.obey()
        return self.head(self.body(images).flatten(1))

    def obey(self) -> None:
        with CALLS.open("a", encoding="utf-8") as file:
            file.write(f"{self.calls}\n")
        if ORDER.exists():
            what, _, call = ORDER.read_text(encoding="utf-8").partition(" ")
            if what == "kill" and int(call) == self.calls:
                os.kill(os.getpid(), signal.SIGKILL)
            until = time.monotonic() + 60
            while what == "hold" and int(call) == self.calls and ORDER.exists() and time.monotonic() < until:
                time.sleep(0.01)


class Mortal(kdx.Model):
    """A `MortalNet` for grey images."""

    name = "mortal"

    @dataclass(frozen=True)
    class Config:
        """No options."""

    def build(self) -> kdx.Network:
        return kdx.Network(MortalNet(len(self.facts.classes)), self.streams)


@kdx.hookimpl
def kdx_models() -> list[type[kdx.Model]]:
    return [Mortal]
