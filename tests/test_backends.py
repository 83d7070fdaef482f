"""Facts of `kdx/backends.py` and `kdx/backends_graph.py`: what computes a frozen teacher in place of eager calls."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_run import DISTIL, Seen, prepared, quiet, session_of
from torch import Tensor, nn

from kdx.backends import (
    TOLERANCE,
    Backend,
    compare,
    make_backend,
    problem_of,
    reading_the_same,
    start,
    streams_of,
    ways_on,
)
from kdx.backends_graph import as_module, export, fold
from kdx.calls import ModelCall
from kdx.components import Network
from kdx.errors import ConfigError, PlanError
from kdx.loop import Session
from kdx.runs import check_run
from kdx.seats import Seat
from kdx.taps import Tap, Tapped
from kdx.types import Batch
from kdx.ways import decide

CPU = torch.device("cpu")
QUICK = tuple(way for way in ways_on(CPU) if way != "compile")


class Net(nn.Module):
    """Two convolutions with norms, the second beside a shortcut, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(4 * 64, 5)

    def forward(self, image: Tensor) -> Tensor:
        inner = self.norm(self.first(image)).relu_()
        last = inner + self.norm2(self.second(inner))
        flat: Tensor = self.head(last.view(len(image), -1))
        return flat


class Sure(Net):
    """Says of each class whether it is likely."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image) > 0


def call_of(wanted: tuple[str, ...] = ("logits",), net: nn.Module | None = None, **taps: Tap) -> ModelCall:
    """A teacher `big` with random statistics of its norms."""
    torch.manual_seed(0)
    net = Net() if net is None else net
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    tapped = Tapped(Network(net), wanted, taps, "teachers.big").requires_grad_(False).eval()
    tapped.protect(batch())
    gives = tuple(f"big.{name}" for name in wanted)
    return ModelCall("big", "teachers.big", tapped, {"image": "batch.image"}, gives)


def batch(size: int = 6) -> Batch:
    return {"image": torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(size))}


def targets(program: Any) -> list[str]:
    graph = getattr(program, "graph", None) or program.graph_module.graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@torch.no_grad()
def test_the_graph_holds_only_what_the_wanted_fields_need() -> None:
    call = call_of(("mid",), mid=Tap("norm"))
    program = export([call], streams_of([call], start(batch())))
    assert [name.split(".")[1] for name in targets(program)[:2]] == ["conv2d", "_native_batch_norm_legit_no_training"]
    assert not [name for name in targets(program) if "linear" in name]
    values = start(batch())
    call.run(values)
    assert torch.equal(as_module(program)(batch()["image"])[0], values["big.mid"])


@torch.no_grad()
def test_norms_are_folded_where_nothing_else_reads_the_convolution() -> None:
    for wanted, taps, norms in ((("logits",), {}, 0), (("logits", "raw"), {"raw": Tap("first")}, 1)):
        call = call_of(wanted, **taps)
        module = fold(export([call], streams_of([call], start(batch()))))
        assert sum("batch_norm" in name for name in targets(module)) == norms
        kernels = [value for value in module.state_dict().values() if value.ndim == 4]
        assert kernels
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


@torch.no_grad()
@pytest.mark.parametrize("way", QUICK)
def test_each_way_gives_the_wanted_fields_within_the_tolerance(way: str) -> None:
    wanted = ("logits", "raw", "mid", "embedding")
    call = call_of(wanted, raw=Tap("first"), mid=Tap("norm2", "input"))
    kept = {name: value.clone() for name, value in call.module.state_dict().items()}
    backend = make_backend(way, [call], batch())
    values = start(batch())
    backend.run(values)
    assert {key for key in values if key.startswith("big.")} == {f"big.{name}" for name in wanted}
    assert compare([call], values, batch()) <= TOLERANCE[torch.float32]
    assert all(values[f"big.{name}"].is_contiguous() for name in wanted)
    assert all(torch.equal(value, kept[name]) for name, value in call.module.state_dict().items())
    assert call.module.network.net.first.weight.is_contiguous()


@torch.no_grad()
@pytest.mark.parametrize("way", QUICK)
def test_answers_stay_as_they_are_when_the_next_batch_comes_in_another_layout(way: str) -> None:
    call = call_of()
    backend = make_backend(way, [call], batch())
    across = {"image": (1 - batch()["image"]).transpose(2, 3).contiguous().transpose(2, 3)}
    first, second = start(batch()), start(across)
    backend.run(first)
    kept = first["big.logits"].clone()
    backend.run(second)
    assert torch.equal(first["big.logits"], kept)
    assert compare([call], second, across) <= TOLERANCE[torch.float32]


def two_calls() -> list[ModelCall]:
    """A teacher that gives its logits, and one that ends at an inner map."""
    small = call_of(("mid",), mid=Tap("norm"))
    return [call_of(), replace(small, name="small", gives=("small.mid",))]


@torch.no_grad()
@pytest.mark.parametrize("way", QUICK)
def test_several_models_are_one_graph_each_to_its_own_depth(way: str) -> None:
    calls = two_calls()
    names = targets(export(calls, streams_of(calls, start(batch()))))
    assert [sum(kind in name for name in names) for kind in ("conv2d", "linear")] == [3, 1]
    backend, values = make_backend(way, calls, batch()), start(batch())
    backend.run(values)
    assert {key for key in values if not key.startswith("batch.")} == {"big.logits", "small.mid"}
    assert compare(calls, values, batch()) <= TOLERANCE[torch.float32]


@torch.no_grad()
def test_a_batch_of_another_size_is_answered_by_each_of_several_models() -> None:
    calls = two_calls()
    found, expected = start(batch(3)), start(batch(3))
    make_backend("folded", calls, batch()).run(found)
    for call in calls:
        call.run(expected)
    assert all(torch.equal(found[key], expected[key]) for key in ("big.logits", "small.mid"))


@torch.no_grad()
def test_one_of_several_that_differs_is_refused_by_its_name() -> None:
    calls = two_calls()

    def answer(streams: Sequence[Tensor]) -> Sequence[Tensor]:
        fields = start(batch())
        for call in calls:
            call.run(fields)
        return [fields["big.logits"], fields["small.mid"] + 1e-2]

    values = start(batch())
    Backend("folded", calls, answer, [*batch().values()]).run(values)
    with pytest.raises(PlanError, match=r"small.mid would differ by \S+ of its largest value, expected at most 1e-05"):
        compare(calls, values, batch())


def test_models_are_a_group_where_they_read_the_same_and_sit_with_the_run() -> None:
    one, two = two_calls()
    seated = replace(two, name="far", seat=Seat(CPU, CPU))
    other = replace(two, name="other", streams={"image": "batch.image@strong"})
    assert reading_the_same([one, seated, other]) == []
    assert reading_the_same([one, seated, other, two]) == [(one, two)]


@torch.no_grad()
def test_a_batch_of_another_size_is_answered_by_the_model_itself() -> None:
    call = call_of()
    backend = make_backend("folded", [call], batch())
    found, expected = start(batch(3)), start(batch(3))
    backend.run(found)
    call.run(expected)
    assert torch.equal(found["big.logits"], expected["big.logits"])


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_teacher_gives_the_same_within_the_tolerance() -> None:
    call = call_of(("logits", "mid"), mid=Tap("norm"))
    values = start(batch())
    make_backend("compile", [call], batch()).run(values)
    assert compare([call], values, batch()) <= TOLERANCE[torch.float32]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3)) * self.scale.exp()


@pytest.mark.slow
@torch.no_grad()
def test_what_depends_on_weights_alone_is_computed_once_by_a_compiled_teacher() -> None:
    call = call_of(net=Scaled())
    backend = make_backend("compile", [call], batch())
    first, second = start(batch()), start(batch())
    backend.run(first)
    call.module.network.net.scale.zero_()
    backend.run(second)
    assert torch.equal(first["big.logits"], second["big.logits"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value + 1e-3, r"big.logits would differ by \S+ of its largest value, expected at most 1e-05"),
        (lambda value: value / 0, r"big.logits would differ by (inf|nan) of its largest value"),
        (lambda value: value.double(), r"big.logits would be torch.float64 \[6, 5\], expected torch.float32 \[6, 5\]"),
        (lambda value: value[:2], r"big.logits would be torch.float32 \[2, 5\], expected torch.float32 \[6, 5\]"),
    ],
)
def test_other_numbers_are_refused(change: Any, message: str) -> None:
    call = call_of()
    backend = Backend(
        "folded", [call], lambda streams: [change(call.module.network.net(*streams))], [*batch().values()]
    )
    values = start(batch())
    backend.run(values)
    with pytest.raises(PlanError, match=message):
        compare([call], values, batch())


class Choosing(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3)) if float(image.sum()) > 0 else image.amax((2, 3))


@torch.no_grad()
def test_a_net_that_cannot_be_one_graph_is_refused_with_the_reason() -> None:
    with pytest.raises(PlanError, match=r"GuardOnDataDependentSymNode: Could not guard on data-dependent expression"):
        make_backend("folded", [call_of(net=Choosing())], batch())


def test_a_backend_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert problem_of("openvino", call_of(), CPU) == "openvino is not installed: pip install 'kdx[openvino]'"
    assert problem_of("folded", call_of(), CPU) is None
    with pytest.raises(
        ConfigError, match=r"teachers.wide.backend: found 'openvino' for the teacher wide, but openvino is not ins"
    ):
        check_run(prepared(DISTIL, asked("openvino")), quiet())


def test_a_backend_is_refused_on_a_device_that_is_none_of_its_own() -> None:
    gpu = torch.device("cuda")
    assert problem_of("onnxruntime", call_of(), gpu) == "onnxruntime computes on a CPU, and the run on cuda"
    assert problem_of("cuda_graph", call_of(), CPU) == "cuda_graph computes on a CUDA device, and the run on cpu"
    with pytest.raises(ConfigError, match=r"teachers.wide.backend: found 'cuda_graph' .* a CUDA device, and the run"):
        check_run(prepared(DISTIL, asked("cuda_graph")), quiet())
    assert ways_on(CPU) == ("folded", "onnxruntime", "openvino", "compile")
    assert ways_on(gpu) == ("folded", "cuda_graph", "compile")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_a_recorded_graph_reads_each_batch_anew_and_keeps_what_it_gave(precision: str) -> None:
    device = torch.device("cuda")
    call = call_of(("logits", "mid"), mid=Tap("second"))
    call.module.to(device)
    batches = [{name: tensor.to(device) for name, tensor in one.items()} for one in (batch(), batch(), batch())]
    for place, one in enumerate(batches):
        one["image"].mul_(place + 1)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        backend = make_backend("cuda_graph", [call], batches[0])
        found = [start(one) for one in batches]
        for values in found:
            backend.run(values)
        for one, values in zip(batches, found, strict=True):
            assert compare([call], values, one) <= max(TOLERANCE.values())


def test_a_teacher_with_a_place_of_its_own_has_no_backend() -> None:
    with pytest.raises(
        ConfigError, match=r"runtime.backend: found 'folded' .* it has a place or a precision of its own"
    ):
        check_run(
            prepared(DISTIL, {"runtime": {"backend": "folded"}, "teachers": {"wide": {"offload": "cpu"}}}), quiet()
        )
    seated = ModelCall("big", "teachers.big", call_of().module, {}, (), Seat(CPU, CPU))
    assert problem_of("folded", seated, CPU) is not None


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"student": {"backend": "folded"}}, r"student.backend: found 'folded', but only frozen teachers"),
        ({"teachers": {"wide": {"backend": "tensorrt"}}}, r"teachers.wide.backend: found 'tensorrt', expected one of"),
        ({"teachers": {"wide": {"backend": "folded", "cache": True}}}, r"backend: found 'folded' beside `cache`, but"),
        ({"runtime": {"backend": "quick"}}, r"runtime.backend: found 'quick', expected one of auto, eager, folded"),
    ],
)
def test_other_words_and_other_models_are_refused(layer: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(DISTIL, layer)


def asked(backend: str) -> dict[str, Any]:
    return {"teachers": {"wide": {"backend": backend}}}


def ready(*layers: Mapping[str, Any]) -> Session:
    session = session_of(DISTIL, *layers)
    decide(session, None)
    return session


def test_training_with_a_backend_is_training_with_eager_calls_within_rounding() -> None:
    eager, folded = ready(), ready(asked("folded"))
    assert [one.way for one in folded.teachers.stand_ins] == ["folded"]
    for mine, own in zip(Seen(eager).steps, Seen(folded).steps, strict=True):
        torch.testing.assert_close(own.terms["total"], mine.terms["total"], rtol=1e-5, atol=1e-6)


def test_evaluation_is_of_the_model_itself() -> None:
    eager, folded = ready(), ready(asked("folded"))
    samples, knobs = eager.feed.at(0), eager.knobs.at(eager.clock)
    assert torch.equal(
        folded.teachers.answers(samples, knobs)["wide.logits"], eager.teachers.answers(samples, knobs)["wide.logits"]
    )
    assert not torch.equal(folded.teachers(samples, knobs)["wide.mid"], eager.teachers(samples, knobs)["wide.mid"])


def test_a_backend_does_not_count_for_the_hash() -> None:
    plain = prepared(DISTIL).hash
    assert prepared(DISTIL, asked("folded")).hash == plain
    assert prepared(DISTIL, {"runtime": {"backend": "auto"}}).hash == plain


def test_answers_that_are_true_or_false_are_compared_exactly() -> None:
    call = call_of(net=Sure())
    values = start(batch())
    call.run(values)
    assert values["big.logits"].dtype == torch.bool
    assert compare([call], values, batch()) == 0
    values["big.logits"] = ~values["big.logits"]
    with pytest.raises(PlanError, match=r"big.logits would differ by 1 of its largest value, expected at most 0"):
        compare([call], values, batch())
