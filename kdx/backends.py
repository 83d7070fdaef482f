"""What computes frozen models in place of eager calls: a folded, recorded or compiled graph, onnxruntime, OpenVINO."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from kdx.backends_graph import export, fold, keys_of
from kdx.calls import Call, Key, ModelCall, Values
from kdx.devices import without_autocast
from kdx.errors import ConfigError, PlanError
from kdx.plan import Plan
from kdx.ranges import AUTO, EAGER
from kdx.reach import base_of
from kdx.recall import IdleCall
from kdx.timing import start
from kdx.types import Batch

Answer = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""From the streams of a graph to its fields."""
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""By how much a field may differ from that of eager calls, as a part of the field's largest value."""
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino",),
}
"""The packages of backends; the extra of kdx has the name of the backend."""
_PLACES: Mapping[str, tuple[str, str]] = {
    "onnxruntime": ("cpu", "a CPU"),
    "openvino": ("cpu", "a CPU"),
    "cuda_graph": ("cuda", "a CUDA device"),
}
"""The one kind of device that a backend computes on, and how it is called."""


class Backend:
    """Answers for one model, or for several that read the same, as they do themselves within rounding.

    A batch of another size than that which it was made for is answered by the models.
    """

    def __init__(self, way: str, calls: Sequence[ModelCall], answer: Answer, streams: Sequence[Tensor]) -> None:
        self.way = way
        self.calls = tuple(calls)
        self._reads = keys_of(calls)
        self._gives = [key for call in calls for key in call.gives]
        self._answer = answer
        self._shapes = [stream.shape for stream in streams]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(self, values: Values) -> None:
        """Leave what the models give."""
        streams = [values[key] for key in self._reads]
        if [stream.shape for stream in streams] == self._shapes:
            values.update(zip(self._gives, self._answer(streams), strict=True))
        else:
            for call in self.calls:
                call.run(values)


def backend_of(plan: Plan, call: ModelCall) -> str:
    """The backend that the config asks for: that of the teacher's section, else that of `runtime`."""
    return plan.spec.models[base_of(call.name)].engine.backend or plan.spec.runtime.backend


def where_of(plan: Plan, call: ModelCall) -> str:
    """The path of the option that says so."""
    own = plan.spec.models[base_of(call.name)].engine.backend
    return "runtime.backend" if own is None else f"{call.where}.backend"


def problem_of(backend: str, call: ModelCall, device: torch.device) -> str | None:
    """Why a backend cannot be, as far as this is known before it is made; None if it may."""
    if call.seat is not None:
        return "it has a place or a precision of its own"
    if backend in _PLACES and _PLACES[backend][0] != device.type:
        return f"{backend} computes on {_PLACES[backend][1]}, and the run on {device}"
    missing = [name for name in _NEEDS.get(backend, ()) if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} is not installed: pip install 'kdx[{backend}]'" if missing else None


def check_backends(plan: Plan, device: torch.device) -> None:
    """Raise `ConfigError` for a backend that a config asks for by name and that cannot be here."""
    for call in plan.teacher_models.values():
        backend = backend_of(plan, call)
        if backend not in (EAGER, AUTO) and (problem := problem_of(backend, call, device)) is not None:
            raise ConfigError(
                f"{where_of(plan, call)}: found {backend!r} for the teacher {call.name}, but {problem}; expected eager "
                "or auto"
            )


def computed_eagerly(plan: Plan) -> list[ModelCall]:
    """The calls of frozen teachers for which the config names no backend."""
    calls = [call for call in plan.teacher_calls if isinstance(call, ModelCall)]
    return [call for call in calls if backend_of(plan, call) in (EAGER, AUTO)]


def reading_the_same(calls: Iterable[ModelCall]) -> list[tuple[ModelCall, ...]]:
    """The calls that may be one graph: two or more that read the same streams and have no place of their own."""
    groups: dict[frozenset[Key], list[ModelCall]] = {}
    for call in calls:
        if call.seat is None:
            groups.setdefault(frozenset(call.reads), []).append(call)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def named_graphs(plan: Plan, calls: Iterable[Call]) -> list[tuple[str, tuple[ModelCall, ...]]]:
    """What is one graph where one call is asked for `always`: the live teachers that name the same backend."""
    named: dict[str, list[ModelCall]] = {}
    for call in calls:
        if isinstance(call, ModelCall) and not isinstance(call, IdleCall):
            named.setdefault(backend_of(plan, call), []).append(call)
    for way in (EAGER, AUTO):
        named.pop(way, None)
    return [(way, group) for way, found in named.items() for group in reading_the_same(found)]


def make_backend(way: str, calls: Sequence[ModelCall], batch: Batch) -> Backend:
    """A backend that is made for a batch of this size and has passed the comparison with the models on it.

    Raises `PlanError` with the reason where it cannot be made or differs by more than `TOLERANCE`.
    """
    values = start(batch)
    streams = streams_of(calls, values)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's compilers
            backend = Backend(way, calls, _MAKERS[way](export(calls, streams), streams), streams)
            backend.run(values)
    except Exception as error:  # compilers raise anything
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise PlanError(f"{type(error).__name__}: {lines[0]}") from error
    compare(calls, values, batch)
    return backend


def compare(calls: Sequence[ModelCall], found: Values, batch: Batch) -> float:
    """The largest difference from the models' own fields, as a part of each field's largest value.

    Raises `PlanError` where it is above the tolerance, or where shape or type differ.
    """
    expected = start(batch)
    for call in calls:
        call.run(expected)
    gaps = [0.0]
    for key in (key for call in calls for key in call.gives):
        mine, own = found[key], expected[key]
        if mine.shape != own.shape or mine.dtype != own.dtype:
            raise PlanError(f"{key} would be {mine.dtype} {[*mine.shape]}, expected {own.dtype} {[*own.shape]}")
        scale = float(own.double().abs().max()) or 1.0
        gap = float((mine.double() - own.double()).abs().max()) / scale
        allowed = TOLERANCE.get(own.dtype, 0.0)
        if not gap <= allowed:
            raise PlanError(f"{key} would differ by {gap:.2g} of its largest value, expected at most {allowed:g}")
        gaps.append(gap)
    return max(gaps)


def streams_of(calls: Sequence[ModelCall], values: Values) -> list[Tensor]:
    """What calls read, in the order of their graph."""
    return [values[key] for key in keys_of(calls)]


def _folded(program: ExportedProgram, streams: Sequence[Tensor]) -> Answer:
    module = fold(program)

    def answer(streams: Sequence[Tensor]) -> Sequence[Tensor]:
        found: Sequence[Tensor] = module(*map(_channels_last, streams))
        return found

    return answer


def _channels_last(stream: Tensor) -> Tensor:
    return stream.contiguous(memory_format=torch.channels_last) if stream.ndim == 4 else stream


def _compiled(program: ExportedProgram, streams: Sequence[Tensor]) -> Answer:
    from torch._inductor import config

    module: Any = torch.compile(fold(program), dynamic=False)

    def answer(streams: Sequence[Tensor]) -> Sequence[Tensor]:
        found: Sequence[Tensor] = module(*map(_channels_last, streams))
        return found

    # As an option of `torch.compile` it comes too late: weights are inputs of the traced code by then.
    with config.patch(freezing=True):
        answer(streams)
    return answer


def _recorded(program: ExportedProgram, streams: Sequence[Tensor]) -> Answer:
    module, given = fold(program), [_channels_last(stream).clone() for stream in streams]
    device = given[0].device
    with torch.cuda.device(device), without_autocast(device.type):  # what it casts is in the graph
        before = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        before.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(before):  # libraries choose their kernels and take their memory in the first calls
            for _ in range(3):
                module(*given)
        torch.cuda.current_stream(device).wait_stream(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found: Sequence[Tensor] = module(*given)

    def answer(streams: Sequence[Tensor]) -> Sequence[Tensor]:
        for own, stream in zip(given, streams, strict=True):
            own.copy_(stream)
        graph.replay()
        return [one.clone() for one in found]  # the next call writes to the same memory

    return answer


def _onnxruntime(program: ExportedProgram, streams: Sequence[Tensor]) -> Answer:
    import onnxruntime

    exported = torch.onnx.export(program, (), dynamo=True, verbose=False)
    assert exported is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the threads are torch's between calls
    options.log_severity_level = 3
    model = exported.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs, outputs = ([one.name for one in ends] for ends in (session.get_inputs(), session.get_outputs()))
    like = session.run(None, {name: stream.numpy() for name, stream in zip(inputs, streams, strict=True)})
    binding = session.io_binding()

    def bind(put: Callable[..., None], names: Sequence[str], arrays: Sequence[Any]) -> None:
        for name, array in zip(names, arrays, strict=True):
            put(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def answer(streams: Sequence[Tensor]) -> Sequence[Tensor]:
        given = [stream.contiguous().numpy() for stream in streams]
        found = [np.empty_like(one) for one in like]
        bind(binding.bind_input, inputs, given)
        bind(binding.bind_output, outputs, found)
        session.run_with_iobinding(binding)
        return [torch.from_numpy(one) for one in found]

    return answer


def _openvino(program: ExportedProgram, streams: Sequence[Tensor]) -> Answer:
    import openvino

    model = openvino.convert_model(program)
    model.reshape({place: [*stream.shape] for place, stream in enumerate(streams)})  # it leaves sizes open otherwise
    # A CPU with bf16 units would otherwise compute in bf16; and the threads are torch's between calls.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    options |= {"PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
    request = openvino.compile_model(model, "CPU", options).create_infer_request()
    like = [np.empty(one.shape, one.element_type.to_dtype()) for one in request.model_outputs]

    def answer(streams: Sequence[Tensor]) -> Sequence[Tensor]:
        given = [stream.contiguous().numpy() for stream in streams]  # kept until the end: a request does not
        found = [np.empty_like(one) for one in like]
        for place, array in enumerate(given):
            request.set_input_tensor(place, openvino.Tensor(array, shared_memory=True))
        for place, array in enumerate(found):
            request.set_output_tensor(place, openvino.Tensor(array, shared_memory=True))
        request.infer()
        return [torch.from_numpy(one) for one in found]

    return answer


_MAKERS: Mapping[str, Callable[[ExportedProgram, Sequence[Tensor]], Answer]] = {
    "folded": _folded,
    "cuda_graph": _recorded,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "compile": _compiled,
}
WAYS = tuple(_MAKERS)
"""All backends but the eager one, those that are made in least time first."""


def ways_on(device: torch.device) -> tuple[str, ...]:
    """The backends that compute on such a device, installed or not."""
    return tuple(way for way in WAYS if way not in _PLACES or _PLACES[way][0] == device.type)
