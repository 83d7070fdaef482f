"""Facts of runs with several processes: `kdx/distributed.py` and whatever goes through a group of processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import LONG, OURS, RUNS, STEADY, on, ready, trained
from small_run import DISTIL, PLAIN, config_of, lines_of, quiet, run_in, weights_of, write_config

from kdx.config import load_mapping
from kdx.distributed import cut
from kdx.runs import Stopped, carry_out, prepare

TESTS = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.world_size(2)]


def torchrun(*arguments: str, device: str = "cpu") -> None:
    """Run two processes to their end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]


def stopped_after(folder: Path, calls: int, device: str) -> None:
    """Begin a long run on one process, and stop it."""
    asked = iter(range(1000))
    options = quiet(stop=lambda: next(asked) >= calls)
    with pytest.raises(Stopped):
        carry_out(prepare(load_mapping(config_of(STEADY, LONG, on(device), {"out": str(folder)})), options), options)


GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPUS])])
def two(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """The folder in which two processes have done all that is in `distributed_worker.py`, on the device of its name."""
    device: str = request.param
    folder = tmp_path_factory.mktemp("processes") / device
    for name in ("resumed", "resumed_fsdp"):
        stopped_after(folder / name, 5, device)
    torchrun(str(TESTS / "distributed_worker.py"), str(folder), device=device)
    return folder


def within(two: Path) -> float:
    """How far numbers may be apart: a GPU adds in another order for other sizes."""
    return 1e-6 if two.name == "cpu" else 1e-4


def told(folder: Path, rank: int = 0) -> Any:
    return json.loads((folder / f"told{rank}.json").read_text())


def run_folder(runs: Path, name: str) -> Path:
    (found,) = (path for path in runs.iterdir() if path.is_dir() and path.name.startswith(f"{name}-"))
    return found


def same(one: Path, other: Path, apart: float = 1e-6) -> None:
    """Two run folders have the same hash, weights, lines and numbers of the test split."""
    assert one.name == other.name
    agree(weights_of(one), weights_of(other), apart)
    agree([timeless(line) for line in lines_of(one)], [timeless(line) for line in lines_of(other)], apart)
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    for key in ("best", "last", "confusion", "teachers", "targets", "agreement"):
        agree(results[0][key], results[1][key], 10 * apart)


def timeless(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if "second" not in key and "time" not in key}


def agree(one: Any, other: Any, apart: float) -> None:
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=apart, atol=apart)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            agree(value, other[key], apart)
    elif isinstance(one, list):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            agree(mine, theirs, apart)
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=apart, abs=apart, nan_ok=True)
    else:
        assert one == other


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_learns(name: str, two: Path) -> None:
    found = torch.load(two / "found.pt", map_location=two.name)
    # Distances between nearly equal rows, in units of their mean, turn rounding of 1e-7 into more.
    steep = 30 if name == "relations" else 1
    agree(trained(*RUNS[name], on(two.name)), found[name], steep * within(two))


def test_spread_weights_learn_what_whole_ones_learn(two: Path) -> None:
    found = torch.load(two / "found.pt")
    agree(found["steady"], found["fsdp"], within(two))


def test_a_weight_that_no_loss_reaches_is_left_alone(two: Path) -> None:
    weights = torch.load(two / "found.pt", map_location="cpu")["unreached"]["student"]
    start = dict(ready(*RUNS["unreached"]).student.net.state_dict())
    assert torch.equal(weights["head.weight"], start["head.weight"])
    assert not torch.equal(weights["first.0.weight"], start["first.0.weight"])


def test_a_run_of_two_processes_leaves_what_one_leaves(two: Path, tmp_path: Path) -> None:
    run_in(tmp_path, DISTIL, on(two.name))
    same(run_folder(tmp_path, "distilled"), run_folder(two / "two", "distilled"), within(two))


@pytest.mark.parametrize("name", ["resumed", "resumed_fsdp"])
def test_a_run_goes_from_one_process_to_two_and_back(name: str, two: Path, tmp_path: Path) -> None:
    reached = told(two)["stopped" if name == "resumed" else "stopped_fsdp"]
    assert 5 < reached < 30
    run_in(two / name, STEADY, LONG, on(two.name))
    run_in(tmp_path, STEADY, LONG, on(two.name))
    same(run_folder(tmp_path, "long"), run_folder(two / name, "long"), 5 * within(two))


def test_a_wish_to_stop_that_one_process_hears_stops_all_at_the_same_update(two: Path) -> None:
    assert told(two, 0)["stopped"] == told(two, 1)["stopped"]


def test_gather_gives_rows_in_order_with_gradients_of_all_processes(two: Path) -> None:
    for rank in (0, 1):
        assert max(told(two, rank)["gather"].values()) < 1e-6


def test_a_run_with_dropout_ends_on_two_processes(two: Path) -> None:
    assert told(two, 0)["dropout"] == told(two, 1)["dropout"] == [3, 6]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("memory", "losses/own: what it has learnt or remembered differs between processes"),
        ("batch", "train.batch: a batch of 3 samples in 3 parts leaves some of 2 processes without a sample"),
        ("fsdp", "runtime.parallel: found 'fsdp', but the updater takes the step apart"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_on_each(name: str, text: str, two: Path) -> None:
    for rank in (0, 1):
        assert text in told(two, rank)["refused"][name].replace("remembers", "remembered")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_bad_term_of_one_process_is_named_by_all(rank: int, two: Path) -> None:
    text = r"losses.kd \(kd, .*\), which reads teachers.wide, gave nan or inf in update 1"
    assert re.match(text, told(two, rank)["fault"])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_metric_of_torchmetrics_counts_each_sample_once(rank: int, two: Path) -> None:
    found = told(two, rank)["metrics"]
    assert [found[name] for name in ("counted", "rows", "extreme", "collected", "held")] == [24.0] * 5


@pytest.mark.parametrize("rank", [0, 1])
def test_answers_for_mixtures_are_those_of_a_sample_and_its_partner_on_each_process(rank: int, two: Path) -> None:
    assert told(two, rank)["mixtures"] < within(two)


def test_a_student_of_two_processes_on_mixtures_of_stored_answers_is_that_of_the_live_teacher(two: Path) -> None:
    live, stored = (weights_of(run_folder(two / f"mixed_{name}", "distilled")) for name in ("live", "stored"))
    agree(live, stored, within(two))


@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_stop_where_the_first_is_asked_to_while_it_fills_a_cache(rank: int, two: Path) -> None:
    assert told(two, rank)["unfilled"].startswith("wide: stopped while the cache was filled")


def test_only_the_first_process_writes(two: Path) -> None:
    folder = run_folder(two / "two", "distilled")
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2
    steps = [line["step"] for line in lines_of(folder) if line["kind"] == "step"]
    assert steps == sorted(set(steps))


def test_a_process_that_is_killed_costs_no_more_than_the_time_since_the_last_save(tmp_path: Path) -> None:
    mark = tmp_path / "killed"
    layers = (PLAIN, OURS, {"name": "deadly", "losses": {"own": {"use": "deadly", "mark": str(mark)}}})
    path = write_config(tmp_path / "deadly.yaml", *layers, {"out": str(tmp_path / "two")})
    torchrun("--max-restarts", "1", "-m", "kdx", "run", str(path), "--quiet")
    assert mark.exists()
    run_in(tmp_path / "one", *layers)
    same(run_folder(tmp_path / "one", "deadly"), run_folder(tmp_path / "two", "deadly"))


def test_a_number_is_cut_into_nearly_equal_parts() -> None:
    assert cut(10, 4) == (3, 3, 2, 2)
    assert cut(1, 2) == (1, 0)
