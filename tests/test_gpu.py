"""Facts of a whole update: nothing in it waits for the device, and a GPU is handed its batches ahead of use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import DISTIL, prepared, quiet
from torch.utils._python_dispatch import TorchDispatchMode

from kdx.loop import Session, Watchers, make_session, training
from kdx.runs import build_plan, fill_caches
from kdx.runtime import Runtime
from kdx.sections import RuntimeOptions
from kdx.streams import Streams

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")
"""Operations of torch whose result the host must know before it can go on."""
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def session_in(folder: Path, **runtime: Any) -> Session:
    """A student of labels, of three teachers, of a feature of one of them, and of a fourth whose answers are stored."""
    found = prepared(
        DISTIL,
        {
            "out": str(folder),
            "data": {"flip": False},
            "teachers": {
                "slim": {"use": "small", "width": 3},
                "broad": {"use": "small", "width": 12},
                "stored": {"use": "small", "width": 6, "cache": {"where": str(folder / "caches")}},
            },
            "targets": {"all": {"use": "mean", "inputs": {"logits": ["wide.logits", "slim.logits", "broad.logits"]}}},
            "losses": {
                "kd": {"inputs": {"teacher": "all.logits"}},
                "kept": {"use": "kd", "inputs": {"teacher": "stored.logits"}},
            },
            "train": {"updates": 100, "steps_per_epoch": 100},
            "runtime": {"device": "cpu", **runtime},
        },
    )
    made = Runtime(found.spec.runtime)
    fill_caches(found, quiet(), made)
    plan = build_plan(found, quiet(), trained=True, device=made.device)
    return make_session(found.spec, plan, found.dataset, found.splits, made)


def updates_of(session: Session, warm_up: int = 3) -> Iterator[None]:
    """Updates one by one, after some in which the state of the optimizer is made."""

    def ignore(_: Any) -> None:
        pass

    steps = training(session, Watchers(ignore, ignore, ignore, ignore))
    for _ in range(warm_up + 1):
        next(steps)
    return steps


class Waits(TorchDispatchMode):
    """Keeps the names of the operations that the host would wait for on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        masks = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        if name in WAITING or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_an_update_asks_for_no_number_that_the_host_would_have_to_wait_for(tmp_path: Path) -> None:
    steps = updates_of(session_in(tmp_path))
    with Waits() as waits:
        for _ in range(20):
            next(steps)
        assert waits.seen == []
        values = torch.arange(3.0)
        assert float(values[values > 1].sum()) == 2.0
        assert waits.seen == ["index", "_local_scalar_dense"], "what would be seen"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("overlapped", [False, True])
def test_twenty_updates_never_wait_for_the_gpu(tmp_path: Path, precision: str, overlapped: bool) -> None:
    session = session_in(tmp_path, device="cuda", precision=precision)
    if overlapped:
        session.teachers.lane = Streams(session.runtime.device, len(session.teachers.live))
    steps = updates_of(session)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert session.step == 23


@pytest.mark.gpu
@needs_gpu
def test_a_batch_is_copied_while_the_gpu_computes_something_else() -> None:
    runtime = Runtime(RuntimeOptions(device="cuda"))
    batch = {"image": torch.rand(64, 3, 32, 32)}
    runtime.move(batch)  # memory is taken from the system once
    runtime.wait()
    torch.cuda._sleep(2_000_000_000)  # about a second
    moved = runtime.move(batch)
    assert runtime._copies is not None
    runtime._copies.synchronize()
    assert not torch.cuda.current_stream().query(), "what was computed before is still going on"
    assert torch.equal(moved["image"].cpu(), batch["image"])
