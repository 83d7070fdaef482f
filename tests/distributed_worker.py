"""What two processes do for `test_distributed.py`: much in one start, as starting them takes longer than all the rest.

    torchrun --nproc-per-node 2 distributed_worker.py FOLDER

The device is the one that the folder is named after.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mixed_run import MIXED, pictures
from small_run import DISTIL, PLAIN, STATEFUL, Seen, config_of, quiet, run_in
from torch import Tensor

import kdx
from kdx.calls import ModelCall
from kdx.config import load_mapping
from kdx.distributed import Processes, the_group
from kdx.loop import Session, evaluate, make_session
from kdx.plugins import Registry, discover
from kdx.resume import training_state
from kdx.runs import Options, Stopped, build_plan, carry_out, prepare
from kdx.runtime import Runtime

PLUGIN = Path(__file__).parent / "spread_plugin.py"
OURS = {"plugins": [*PLAIN["plugins"], str(PLUGIN)]}
STEADY = config_of(STATEFUL, {"student": {"dropout": 0.0}})
"""Without dropout, which draws other numbers on each process."""
LONG = {"name": "long", "train": {"updates": 30}}
RUNS: dict[str, tuple[Mapping[str, Any], ...]] = {
    "distilled": (DISTIL,),
    "steady": (STEADY, {"name": "steady", "train": {"clip": 0.5}}),
    "uneven": (STEADY, {"name": "uneven", "train": {"batch": 10}, "runtime": {"eval_batch": 5}}),
    "unreached": (
        DISTIL,
        {
            "name": "unreached",
            "losses": {"ce": None, "kd": None},
            "train": {"weight_decay": 0.1, "optimizer": {"use": "adamw"}},
        },
    ),
    "relations": (
        DISTIL,
        {
            "name": "relations",
            "train": {"accumulate": 2, "lr": 0.01},
            "losses": {
                "sp": {"use": "sp", "inputs": {"student": "student.mid", "teacher": "wide.mid"}},
                "rkd": {"use": "rkd", "inputs": {"student": "student.logits", "teacher": "wide.logits"}},
                "crd": {
                    "use": "crd",
                    "inputs": {"student": "student.mid", "teacher": "wide.mid"},
                    "dim": 8,
                    "negatives": 6,
                    "weight": 0.1,
                },
            },
        },
    ),
    "sharded": (DISTIL, {"name": "sharded", "teachers": {"wide": {"shard": True}}, "losses": {"kd": None}}),
    "gathered": (DISTIL, OURS, {"name": "gathered", "losses": {"own": {"use": "gathered"}}}),
    "balanced": (DISTIL, {"name": "balanced", "train": {"updater": {"use": "uncertainty_weighting"}}}),
    "surgery": (DISTIL, {"name": "surgery", "train": {"updater": {"use": "pcgrad"}, "accumulate": 2}}),
}
"""Configs whose result is the same on one process and on two."""


def on(device: str) -> dict[str, Any]:
    """Where a config computes."""
    return {"runtime": {"device": device}}


@functools.cache
def registry() -> Registry:
    return discover(OURS["plugins"])


def ready(*layers: Mapping[str, Any], options: Options | None = None) -> Session:
    """A session that is ready to train, without a folder."""
    found = prepare(load_mapping(config_of(*layers)), options or quiet(), registry=registry())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        runtime = Runtime(found.spec.runtime)
        plan = build_plan(found, quiet(), trained=True)
        return make_session(found.spec, plan, found.dataset, found.splits, runtime)


def trained(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """All that a training gives: weights, the numbers of each update, those of evaluations."""
    session = ready(*layers)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # as a run does
        seen = Seen(session)
    state = training_state(session, 0.0)
    return {
        "student": dict(session.student.net.state_dict()),
        "learner": state["learner"],
        "optimizer": state["optimizer"]["state"],
        "steps": [{"samples": float(report.samples), **report.numbers()} for report in seen.steps],
        "evaluations": [dict(report.metrics) for report in seen.evals],
        "saved": seen.saved,
    }


def main(folder: Path) -> None:
    group = the_group()
    assert isinstance(group, Processes)
    assert group.size == 2
    told: dict[str, Any] = {"gather": gathering(group)}
    here, fsdp = on(folder.name), {"runtime": {"parallel": "fsdp"}}
    found = {name: trained(*layers, here) for name, layers in RUNS.items()}
    found["fsdp"] = trained(*RUNS["steady"], here, fsdp)
    if group.leads:
        torch.save(found, folder / "found.pt")
    run_in(folder / "two", DISTIL, here)
    told["stopped"] = stopped(folder / "resumed", here)
    told["stopped_fsdp"] = stopped(folder / "resumed_fsdp", here, fsdp)
    told["dropout"] = trained(STATEFUL, here)["saved"]
    told["refused"] = {
        "memory": refusal(folder, DISTIL, OURS, {"losses": {"own": {"use": "remembers"}}}),
        "batch": refusal(folder, PLAIN, {"train": {"batch": 3, "accumulate": 3}}),
        "fsdp": refusal(folder, DISTIL, {"train": {"updater": {"use": "pcgrad"}}}, fsdp),
    }
    told["fault"] = fault(group, here)
    told["metrics"] = counted(here)
    told["mixtures"] = mixtures(here)
    told["unfilled"] = unfilled(folder / "unfilled", here)
    for name, cache in (("live", None), ("stored", True)):
        run_in(folder / f"mixed_{name}", MIXED, here, {"teachers": {"wide": {"cache": cache}}}, data=pictures())
    path = folder / f"told{group.rank}.json"
    path.write_text(json.dumps(told))


def gathering(group: Processes) -> dict[str, float]:
    """How far `gather` is from the tensor that it puts together, in values, gradients and second derivatives."""
    whole = torch.arange(15.0).reshape(5, 3) / 10
    group.expect(5, 1)
    parts = group.parts({"index": torch.tensor(group.own([0, 1, 2, 3, 4], 1))}, 1)
    part, share, last = next(parts)
    x = whole[part["index"]].requires_grad_()
    assert share == 1
    assert last
    found = kdx.gather(x)
    (first,) = torch.autograd.grad(found.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    # Both processes ask for the gradient of the whole sum, so each row has it twice, and the second one four times.
    wanted: dict[str, tuple[Tensor, Tensor]] = {
        "value": (found, whole),
        "first": (first, 2 * 3 * x.square()),
        "second": (second, 2 * 2 * 3 * x),
        "bool": (kdx.gather(x > 0.6).float(), (whole > 0.6).float()),
    }
    assert [len(x), 5 - len(x)][group.rank] == 3
    assert next(parts, None) is None
    assert torch.equal(kdx.gather(x), x)  # where no batch is common, each works by itself
    return {name: (one - other).abs().max().item() for name, (one, other) in wanted.items()}


def stopped(folder: Path, *more: Mapping[str, Any]) -> int:
    """Go on with a run that one process began, until after the next saved epoch; gives the update that it reached."""
    asked = {"calls": 0}

    def stop() -> bool:
        asked["calls"] += 1
        return asked["calls"] > 1 and the_group().rank == 1  # told to one of the processes only

    options = quiet(stop=stop)
    prepared = prepare(load_mapping(config_of(STEADY, LONG, *more, {"out": str(folder)})), options)
    try:
        carry_out(prepared, options)
    except Stopped as reason:
        return int(str(reason).partition("after update ")[2].split()[0])
    raise AssertionError("the run did not stop")


def fault(group: Processes, here: Mapping[str, Any]) -> str:
    """What a process says where a sample of the other one spoils the loss of the first update."""
    session = ready(DISTIL, here, {"losses": {"hint": None, "ce": None}})

    def spoil(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * torch.tensor([math.nan] + [1.0] * (len(output) - 1), device=output.device).unsqueeze(1)

    if not group.leads:
        session.learner.student.network.net.head.register_forward_hook(spoil)
    try:
        Seen(session)
    except kdx.KdxError as error:
        return str(error)
    raise AssertionError("nothing was found")


def counted(here: Mapping[str, Any]) -> dict[str, float]:
    """What a metric of torchmetrics finds on the test split."""
    session = ready(DISTIL, OURS, here, {"metrics": {"own": {"use": "counted"}}})
    return evaluate(session, session.splits.test, session.student.answer).numbers


def mixtures(here: Mapping[str, Any]) -> float:
    """How far `mixed_answers` is from mixing by hand what the teacher says of a sample and of its partner, which is the
    one before it among those of the same process: 6 on one process, 5 on the other.
    """
    session = ready(MIXED, here, {"train": {"batch": 11}}, options=quiet(data=pictures()))
    batch = session.feed.at(0)
    for part, _, _ in session.runtime.group.parts(batch, 1):
        kept = session.teachers(part, session.knobs.at(session.clock))
        assert torch.equal(part["mix_partner@mixed"], part["index"].roll(1))
        (teacher,) = (call for call in session.plan.teacher_calls if isinstance(call, ModelCall))
        values = {f"batch.{name}": value for name, value in part.items()}
        with torch.no_grad():
            teacher.run(values)
        softened, share = (values["wide.logits"] / 2).softmax(1), part["mix_share@mixed"].unsqueeze(1)
        expected = share * softened + (1 - share) * softened.roll(1, 0)
        apart = ((kept["both.logits"] / 2).softmax(1) - expected).abs().max().item()
    return apart


def unfilled(folder: Path, here: Mapping[str, Any]) -> str:
    """What a process says where the first one is asked to stop while it fills a cache."""
    options = quiet(stop=lambda: the_group().leads)
    cached = {"data": {"flip": False}, "teachers": {"wide": {"cache": True}}, "out": str(folder)}
    prepared = prepare(load_mapping(config_of(DISTIL, here, cached)), options)
    try:
        carry_out(prepared, options)
    except Stopped as reason:
        return str(reason)
    raise AssertionError("the filling did not stop")


def refusal(folder: Path, *layers: Mapping[str, Any]) -> str:
    try:
        run_in(folder / "refused", *layers)
    except kdx.KdxError as error:
        return str(error)
    raise AssertionError("nothing was refused")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
