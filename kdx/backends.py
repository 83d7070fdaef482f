"""What computes a frozen model in place of eager calls: a folded or compiled graph, onnxruntime or OpenVINO."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from kdx.backends_graph import export, fold
from kdx.calls import ModelCall, Values
from kdx.errors import ConfigError, PlanError
from kdx.plan import Plan
from kdx.ranges import AUTO, EAGER
from kdx.reach import base_of
from kdx.types import Batch

Answer = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""From the streams of a network to its wanted fields."""
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""By how much a field may differ from that of eager calls, as a part of the field's largest value."""
_NEEDS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "openvino": ("openvino",),
}
"""The packages of the backends that compute on a CPU only; the extra of kdx has the name of the backend."""


class Backend:
    """Answers for one model as it does itself within rounding.

    A batch of another size than that which it was made for is answered by the model.
    """

    def __init__(self, way: str, call: ModelCall, answer: Answer, streams: Sequence[Tensor]) -> None:
        self.way = way
        self.calls = (call,)
        self._call = call
        self._answer = answer
        self._shapes = [stream.shape for stream in streams]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def run(self, values: Values) -> None:
        """Leave what the model gives."""
        call = self._call
        streams = streams_of(call, values)
        if [stream.shape for stream in streams] != self._shapes:
            call.run(values)
            return
        for key, tensor in zip(call.gives, self._answer(streams), strict=True):
            values[key] = tensor


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
    if backend not in _NEEDS:
        return None
    if device.type != "cpu":
        return f"{backend} computes on a CPU, and the run on {device}"
    missing = [name for name in _NEEDS[backend] if importlib.util.find_spec(name) is None]
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


def make_backend(way: str, call: ModelCall, batch: Batch) -> Backend:
    """A backend that is made for a batch of this size and has passed the comparison with the model on it.

    Raises `PlanError` with the reason where it cannot be made or differs by more than `TOLERANCE`.
    """
    values = start(batch)
    streams = streams_of(call, values)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's compilers
            backend = Backend(way, call, _MAKERS[way](export(call.module, streams), streams), streams)
            backend.run(values)
    except Exception as error:  # compilers raise anything
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise PlanError(f"{type(error).__name__}: {lines[0]}") from error
    compare(call, values, batch)
    return backend


def compare(call: ModelCall, found: Values, batch: Batch) -> float:
    """The largest difference from the model's own fields, as a part of each field's largest value.

    Raises `PlanError` where it is above the tolerance, or where shape or type differ.
    """
    expected = start(batch)
    call.run(expected)
    gaps = [0.0]
    for key in call.gives:
        mine, own = found[key], expected[key]
        if mine.shape != own.shape or mine.dtype != own.dtype:
            raise PlanError(f"{key} would be {mine.dtype} {[*mine.shape]}, expected {own.dtype} {[*own.shape]}")
        scale = float(own.abs().max()) or 1.0
        gap = float((mine.double() - own.double()).abs().max()) / scale
        allowed = TOLERANCE.get(own.dtype, 0.0)
        if not gap <= allowed:
            raise PlanError(f"{key} would differ by {gap:.2g} of its largest value, expected at most {allowed:g}")
        gaps.append(gap)
    return max(gaps)


def streams_of(call: ModelCall, values: Values) -> list[Tensor]:
    """The inputs of a model in the order of its network."""
    return [values[call.streams[stream]] for stream in call.module.network.streams]


def start(batch: Batch) -> Values:
    """The values of a step before anything has run."""
    return {f"batch.{name}": tensor for name, tensor in batch.items()}


def _folded(program: ExportedProgram, streams: Sequence[Tensor]) -> Answer:
    module = fold(program)

    def answer(streams: Sequence[Tensor]) -> Sequence[Tensor]:
        found: Sequence[Tensor] = module(*map(_channels_last, streams))
        return found

    return answer


def _channels_last(stream: Tensor) -> Tensor:
    return stream.contiguous(memory_format=torch.channels_last) if stream.ndim == 4 else stream


def _compiled(program: ExportedProgram, streams: Sequence[Tensor]) -> Answer:
    module: Any = torch.compile(fold(program), dynamic=False, options={"freezing": True})
    return lambda streams: module(*map(_channels_last, streams))


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
    names = [one.name for one in session.get_inputs()]

    def answer(streams: Sequence[Tensor]) -> Sequence[Tensor]:
        given = {name: stream.numpy() for name, stream in zip(names, streams, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, given)]

    return answer


def _openvino(program: ExportedProgram, streams: Sequence[Tensor]) -> Answer:
    import openvino

    model = openvino.convert_model(program)
    # A CPU with bf16 units would otherwise compute in bf16.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(model, "CPU", {**options, "PERFORMANCE_HINT": "LATENCY"})
    count = len(compiled.outputs)

    def answer(streams: Sequence[Tensor]) -> Sequence[Tensor]:
        found = compiled([stream.numpy() for stream in streams], share_inputs=True)
        return [torch.from_numpy(found[place]) for place in range(count)]

    return answer


_MAKERS: Mapping[str, Callable[[ExportedProgram, Sequence[Tensor]], Answer]] = {
    "folded": _folded,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "compile": _compiled,
}
WAYS = tuple(_MAKERS)
"""All backends but the eager one, those that are made in least time first."""
