"""What takes the memory of a run, and what makes it less: the text of an error when there is not enough."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kdx.calls import ModelCall
from kdx.errors import KdxError
from kdx.formats import counted
from kdx.formats import size as bytes_text

if TYPE_CHECKING:
    from kdx.loop import Session

TRAINING, EVALUATION = "update", "evaluation"


class explained:  # noqa: N801  (a context manager, used as a verb)
    """Says of an error for want of memory within the block what takes the memory and what to lower."""

    def __init__(self, session: Session, doing: str) -> None:
        self._session = session
        self._doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise KdxError(out_of_memory(self._session, self._doing, str(error).split(". ")[0])) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error is for want of memory; only that of a GPU has a class of its own."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "out of memory" in text


def out_of_memory(session: Session, doing: str, error: str) -> str:
    """The text for a run that does not fit: where it was, the parts of its memory, and the options that lower it."""
    sizes = parts(session)
    listed = ", ".join(f"{name} {bytes_text(size)}" for name, size in sizes.items() if size)
    where = f"{session.runtime.device}: out of memory in {doing} {session.step + (doing == TRAINING)}"
    return (
        f"{where} ({error}); found {listed}, and beside them {_rest(session, doing)}; expected less: "
        f"{'; '.join(advice(session, doing))}"
    )


def parts(session: Session) -> dict[str, int]:
    """The bytes of all that stays for the whole of a training, by name.

    Gradients count as large as what is trained; an optimizer that has not stepped yet as two numbers for each weight.
    """
    learner = session.learner
    trained = [weight for weight in session.runtime.parameters() if weight.requires_grad]
    state = [
        value for own in session.runtime.optimizer.state.values() for value in own.values() if isinstance(value, Tensor)
    ]
    sizes = {
        "models that are trained": _bytes(_stored(learner.models)),
        "aligners and losses": _bytes(_stored(learner.nodes)),
        "gradients": _bytes(trained),
        "the optimizer": _bytes(state) if state else 2 * _bytes(trained),
    }
    if session.average is not None:
        sizes["the average (train.ema)"] = _bytes(_stored(session.average.model))
    for name, size in _teachers(session).items():
        sizes[f"teachers.{name}"] = size
    sizes["targets"] = _bytes(_stored(session.teachers.nodes))
    return sizes


def advice(session: Session, doing: str) -> list[str]:
    """What to lower, the most effective first."""
    spec = session.spec
    if doing == EVALUATION:
        return [f"runtime.eval_batch (now {spec.runtime.eval_batch})"]
    size = _at_once(session)
    found = []
    if size > 1:
        found.append(f"train.micro_batch (now {counted(size, 'sample')} at once; auto tries what fits)")
    for name, _ in sorted(_teachers(session).items(), key=lambda item: -item[1]):
        if session.runtime.device.type != "cpu" and spec.models[name].engine.offload is None:
            found.append(f"teachers.{name}.offload: cpu")
    if session.runtime.precision == "fp32" and session.runtime.device.type == "cuda":
        found.append("runtime.precision: bf16")
    if session.average is not None:
        found.append("train.ema: null")
    return found or ["a smaller student"]


def _rest(session: Session, doing: str) -> str:
    """What the batch at hand takes."""
    count = _at_once(session) if doing == TRAINING else session.spec.runtime.eval_batch
    if session.runtime.device.type != "cuda":
        return f"the activations of {counted(count, 'sample')}"
    used = torch.cuda.max_memory_allocated(session.runtime.device) - sum(parts(session).values())
    total = torch.cuda.get_device_properties(session.runtime.device).total_memory
    samples = counted(count, "sample")
    return f"{bytes_text(max(used, 0))} for the activations of {samples}, of {bytes_text(total)} in all"


def _at_once(session: Session) -> int:
    """How many samples go through the networks at once in training."""
    return -(-session.loader.size // session.accumulate)


def _teachers(session: Session) -> dict[str, int]:
    """The bytes of each frozen teacher; none for one that lies in main memory."""
    found: dict[str, int] = {}
    for name, call in session.plan.teacher_models.items():
        if isinstance(call, ModelCall) and session.spec.models[name].engine.offload is None:
            found[name] = _bytes(_stored(call.module))
    return found


def _stored(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(value.nbytes for value in tensors)
