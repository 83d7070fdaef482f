"""Facts of `kdx/runtime.py`."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from kdx.devices import check_precision, low_precision, pick_device, present_devices
from kdx.errors import ConfigError
from kdx.runtime import FOLD_EVERY, Runtime, Stopwatch
from kdx.sections import RuntimeOptions

CPU = RuntimeOptions(device="cpu", precision="fp32")


def test_without_a_device_a_run_takes_the_gpu_where_there_is_one() -> None:
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device(None).type == present_devices()[0] == found
    assert present_devices()[-1] == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_device_that_is_absent_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"runtime.device: found '{name}', but this machine has no such device"):
        pick_device(name)


@pytest.mark.parametrize("name", ["meta", "xla"])
def test_a_device_that_kdx_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.device"):
        pick_device(name)


def test_a_word_that_is_no_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="found 'gpu', expected auto, cpu, cuda"):
        pick_device("gpu")


def test_bf16_is_the_lower_precision_of_a_cpu_and_fp16_is_refused_there() -> None:
    cpu = torch.device("cpu")
    assert low_precision(cpu) == "bf16"
    assert low_precision(torch.device("mps")) is None
    check_precision("bf16", cpu)
    with pytest.raises(ConfigError, match=r"runtime.precision: fp16 needs a GPU"):
        check_precision("fp16", cpu)


def linear_and_sgd() -> tuple[nn.Linear, torch.optim.Optimizer]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Linear(3, 2)
    return net, torch.optim.SGD(net.parameters(), lr=0.5)


def test_an_update_steps_the_optimizer_and_clears_the_gradients() -> None:
    net, optimizer = linear_and_sgd()
    before = net.weight.detach().clone()
    runtime = Runtime(CPU)
    runtime.prepare(net, optimizer, None)
    runtime.backward(net(torch.ones(4, 3)).sum())
    assert net.weight.grad is not None
    gradient = net.weight.grad.clone()
    runtime.update()
    assert torch.equal(net.weight, before - 0.5 * gradient)
    assert net.weight.grad is None


def test_clipping_scales_the_gradient_of_everything_trained_to_the_norm() -> None:
    net, optimizer = linear_and_sgd()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    runtime = Runtime(CPU)
    runtime.prepare(net, optimizer, 0.1)
    runtime.backward(net(torch.ones(4, 3)).square().sum() * 100)
    runtime.update()
    moved = [(old - new).flatten() / 0.5 for old, new in zip(before, net.parameters(), strict=True)]
    assert torch.cat(moved).norm().item() == pytest.approx(0.1, rel=1e-4)


def test_a_gradient_below_the_norm_is_not_scaled() -> None:
    moved = []
    for clip in (None, 1e6):
        net, optimizer = linear_and_sgd()
        runtime = Runtime(CPU)
        runtime.prepare(net, optimizer, clip)
        runtime.backward(net(torch.ones(4, 3)).square().sum())
        runtime.update()
        moved.append(net.weight.detach().clone())
    assert torch.equal(*moved)


def test_autocast_changes_forward_passes_in_bf16_only() -> None:
    net, _ = linear_and_sgd()
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with Runtime(RuntimeOptions(device="cpu", precision=precision)).autocast():
            assert net(torch.ones(1, 3)).dtype == dtype


def test_channels_last_changes_the_layout_of_kernels() -> None:
    net = nn.Conv2d(3, 4, 3)
    Runtime(RuntimeOptions(device="cpu", precision="fp32", channels_last=True)).place(net)
    assert net.weight.is_contiguous(memory_format=torch.channels_last)


def test_only_what_is_trained_counts_as_parameters() -> None:
    net, optimizer = linear_and_sgd()
    net.bias.requires_grad_(False)
    runtime = Runtime(CPU)
    runtime.prepare(net, optimizer, None)
    assert [id(parameter) for parameter in runtime.parameters()] == [id(net.weight)]


def test_the_stopwatch_adds_up_by_phase() -> None:
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.phase("a"):
            time.sleep(0.01)
    watch.add("b", 3.0)
    watch.add("b", 1.0)
    seconds = watch.seconds()
    assert 0.02 <= seconds["a"] < 1
    assert seconds["b"] == 4.0


class Reached:
    """A moment of a device that has worked until `now` milliseconds."""

    now = 0.0

    def __init__(self, at: float) -> None:
        self.at = at

    def query(self) -> bool:
        return self.at <= Reached.now

    def elapsed_time(self, end_event: Reached) -> float:
        assert self.query()
        assert end_event.query(), "this would make the host wait"
        return end_event.at - self.at


def test_spans_that_are_over_become_seconds_and_the_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Stopwatch(torch.device("cpu"))
    for step in range(10 * FOLD_EVERY):
        monkeypatch.setattr(Reached, "now", 100.0 * (step - 5))  # the device is five spans behind the host
        watch.spans.append("a", Reached(100.0 * step), Reached(100.0 * step + 50))
        assert len(watch.spans) <= FOLD_EVERY + 5
    assert len(watch.spans) == 6
    monkeypatch.setattr(Reached, "now", float("inf"))
    watch.spans.fold()
    assert len(watch.spans) == 0
    assert watch.seconds()["a"] == pytest.approx(10 * FOLD_EVERY * 0.05)


def test_threads_are_set_and_state_can_be_taken_up() -> None:
    before = torch.get_num_threads()
    try:
        runtime = Runtime(RuntimeOptions(device="cpu", threads=1))
        assert torch.get_num_threads() == 1
        runtime.load_state(runtime.state())
    finally:
        torch.set_num_threads(before)
