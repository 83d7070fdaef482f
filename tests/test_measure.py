import copy

import pytest
import torch
from torch import nn

from kdx.components import Network
from kdx.measure import Size, file_bytes, latency_ms, measure, multiply_adds, parameters


def small() -> Network:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(4 * 8 * 8, 10))
    return Network(net)


BATCH = {"image": torch.zeros(5, 3, 8, 8), "label": torch.zeros(5, dtype=torch.int64)}


def test_parameters_are_counted_once_and_buffers_are_not():
    network = small()
    assert parameters(network) == 4 * 3 * 9 + 2 * 4 + 256 * 10 + 10
    tied = nn.ModuleList([nn.Linear(2, 3), nn.Linear(2, 3)])
    tied[1].weight = tied[0].weight
    assert parameters(tied) == 6 + 3 + 3


def test_multiply_adds_are_those_of_one_sample():
    assert multiply_adds(small(), BATCH) == 8 * 8 * 4 * 3 * 9 + 256 * 10


def test_attention_counts_whatever_its_fast_path():
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, tokens):
            return self.attention(tokens, tokens, tokens, need_weights=False)[0]

    tokens = {"tokens": torch.zeros(2, 6, 8)}
    projections, scores = 4 * 6 * 8 * 8, 2 * 6 * 6 * 8
    assert multiply_adds(Network(Attend(), ["tokens"]), tokens) == projections + scores
    assert torch.backends.mha.get_fastpath_enabled()


def test_measuring_leaves_the_network_and_the_threads_as_they_were(tmp_path):
    network = small().train()
    network.net[0].eval()
    before = copy.deepcopy(network.state_dict())
    modes = [module.training for module in network.modules()]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (tmp_path / "weights").write_bytes(bytes(123))
        size = measure(network, BATCH, tmp_path / "weights", runs=3)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert size == Size(parameters(network), multiply_adds(network, BATCH), 123, size.latency_ms)
    assert size.latency_ms > 0


def test_latency_is_measured_with_one_thread_and_one_sample():
    seen: list[tuple[int, int, bool]] = []

    class Watch(nn.Module):
        def forward(self, image):
            seen.append((torch.get_num_threads(), len(image), self.training))
            return image.flatten(1)

    latency_ms(Network(Watch()), BATCH, runs=4)
    assert set(seen) == {(1, 1, False)}
    assert len(seen) > 4


def test_a_slower_network_takes_longer():
    class Wait(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.times = times

        def forward(self, image):
            for _ in range(self.times):
                image = image @ image
            return image

    assert latency_ms(Network(Wait(2000)), BATCH, runs=3) > latency_ms(Network(Wait(1)), BATCH, runs=3)


def test_latency_needs_at_least_one_run():
    with pytest.raises(ValueError, match="runs: found 0, expected at least 1"):
        latency_ms(small(), BATCH, runs=0)


def test_file_bytes_is_the_length_of_the_file(tmp_path):
    (tmp_path / "x").write_bytes(bytes(77))
    assert file_bytes(tmp_path / "x") == 77
