"""Plugins that misbehave: the checks for authors refuse each by name, and a run says whose fault an error is."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import PLAIN, config_of, run_in
from torch import Tensor, nn

import kdx
from kdx.testing import check_aligner, check_loss, check_target

Forward = Callable[..., Any]
HELD: list[Tensor] = []
"""What a plugin should not have: a memory outside of itself."""


def loss_of(body: Forward) -> type[kdx.Loss]:
    """A loss that does `body` with itself, student and teacher before it gives the squared difference."""

    class Bad(kdx.Loss):
        name = "bad_loss"
        inputs = {"student": "student.logits", "teacher": "teacher.logits"}

        def forward(self, student: Tensor, teacher: Tensor) -> Any:
            good = (student - teacher.detach()).square().mean(1)
            found = body(self, student, teacher, good)
            return good if found is None else found

    return Bad


def target_of(body: Forward) -> type[kdx.Target]:
    """A target as `loss_of` makes losses, of one input of logits."""

    class Bad(kdx.Target):
        name = "bad_target"
        inputs = {"logits": "teacher.logits"}
        outputs = ("logits", "spread")

        def forward(self, logits: Tensor) -> Any:
            good = {"logits": 2 * logits, "spread": logits.std(1)}
            found = body(self, logits, logits, good)
            return good if found is None else found

    return Bad


def aligner_of(body: Forward) -> type[kdx.Aligner]:
    """A linear aligner as `loss_of` makes losses."""

    class Bad(kdx.Aligner):
        name = "bad_aligner"

        def __init__(self, config: Any, given: kdx.Given) -> None:
            super().__init__(config, given)
            self.map = nn.Linear(given.shape("source")[0], given.shape("like")[0])

        def forward(self, source: Tensor) -> Any:
            good = self.map(source)
            found = body(self, source, source, good)
            return good if found is None else found

    return Bad


def raises(self: Any, first: Tensor, second: Tensor, good: Any) -> Any:
    raise ValueError("no such class")


def gives_text(self: Any, first: Tensor, second: Tensor, good: Any) -> Any:
    return "much"


def gives_more(self: Any, first: Tensor, second: Tensor, good: Any) -> Any:
    """The wrong shape for each kind: two numbers for each sample, or one sample too few."""
    if isinstance(good, dict):
        return {**good, "spread": good["spread"][1:]}
    return torch.cat([good, good])


def gives_nan(self: Any, first: Tensor, second: Tensor, good: Any) -> Any:
    return {**good, "logits": good["logits"] / 0} if isinstance(good, dict) else good / 0


def writes(self: Any, first: Tensor, second: Tensor, good: Any) -> Any:
    with torch.no_grad():
        second.mul_(2)


def draws(self: Any, first: Tensor, second: Tensor, good: Any) -> Any:
    torch.rand(1)


def draws_with_numpy(self: Any, first: Tensor, second: Tensor, good: Any) -> Any:
    np.random.rand()


def draws_with_python(self: Any, first: Tensor, second: Tensor, good: Any) -> Any:
    random.random()


def keeps_the_graph(self: Any, first: Tensor, second: Tensor, good: Any) -> Any:
    self.last = good["logits"] if isinstance(good, dict) else good


def keeps_it_elsewhere(self: Any, first: Tensor, second: Tensor, good: Any) -> Any:
    HELD.append(good["logits"] if isinstance(good, dict) else good)


BAD: dict[Forward, str] = {
    raises: "forward raised ValueError: no such class",
    gives_text: "forward gave a? ?str, ",
    gives_more: "gave .*expected|is .*expected",
    gives_nan: "is not finite",
    writes: "forward changed its input '.*' in place",
    draws: "used a global random generator; use given.generator",
    draws_with_numpy: "used a global random generator; use given.generator",
    draws_with_python: "used a global random generator; use given.generator",
    keeps_the_graph: "holds the graph of a call after it",
    keeps_it_elsewhere: "holds the graph of a call after it",
}
"""Each way to misbehave, and what is said of it."""


@pytest.mark.parametrize("body", BAD, ids=lambda body: body.__name__)
def test_a_loss_that_misbehaves_is_refused_by_name(body: Forward) -> None:
    with pytest.raises(AssertionError, match=rf"^bad_loss \(.*\): .*({BAD[body]})"):
        check_loss(loss_of(body))
    HELD.clear()


@pytest.mark.parametrize("body", BAD, ids=lambda body: body.__name__)
def test_a_target_that_misbehaves_is_refused_by_name(body: Forward) -> None:
    with pytest.raises(AssertionError, match=rf"^bad_target \(.*\): .*({BAD[body]})"):
        check_target(target_of(body))
    HELD.clear()


@pytest.mark.parametrize("body", BAD, ids=lambda body: body.__name__)
def test_an_aligner_that_misbehaves_is_refused_by_name(body: Forward) -> None:
    with pytest.raises(AssertionError, match=rf"^bad_aligner \(.*\): .*({BAD[body]})"):
        check_aligner(aligner_of(body), source=(4,), like=(6,))
    HELD.clear()


def nothing(self: Any, first: Tensor, second: Tensor, good: Any) -> Any:
    return None


def test_the_same_plugins_pass_where_they_behave() -> None:
    check_loss(loss_of(nothing))
    check_target(target_of(nothing))
    check_aligner(aligner_of(nothing), source=(4,), like=(6,))


def keeps_values(self: Any, first: Tensor, second: Tensor, good: Any) -> Any:
    self.last = good.detach()


def test_values_without_their_graph_may_be_kept() -> None:
    check_loss(loss_of(keeps_values))


def goes_in_a_circle(self: Any, first: Tensor, second: Tensor, good: Any) -> Any:
    circle: list[Any] = [good]
    circle.append(circle)


def test_a_graph_that_nothing_but_a_circle_holds_is_let_go() -> None:
    check_loss(loss_of(goes_in_a_circle))


LATE = """
import kdx, torch

class Late(kdx.Loss):
    name = "late"
    inputs = {{"student": "student.logits"}}

    def __init__(self, config, given):
        super().__init__(config, given)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def after_update(self, clock):
        self.seen += 1

    def forward(self, student):
        good = student.square().mean(1)
        if self.seen < 2:
            return good
        {body}

@kdx.hookimpl
def kdx_losses():
    return [Late]
"""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no such class')", "no such class"),
        ("return 1.0", "losses.mine is float, expected a tensor"),
        ("return student", r"losses.mine has shape \[12, 3\] for 12 samples, expected 0-d or \[B\]"),
        ("return good[1:]", r"losses.mine has shape \[11\] for 12 samples, expected 0-d or \[B\]"),
        ("return good * torch.nan", "gave nan or inf in update 3"),
    ],
)
def test_a_run_names_the_plugin_that_fails_in_the_midst_of_it(tmp_path: Path, body: str, message: str) -> None:
    path = tmp_path / "late_plugin.py"
    path.write_text(LATE.format(body=body))
    layer = {"plugins": [*PLAIN["plugins"], str(path)], "losses": {"mine": {"use": "late"}}}
    with pytest.raises(Exception, match=message) as found:
        run_in(tmp_path, config_of(PLAIN, layer))
    told = "\n".join([str(found.value), *getattr(found.value, "__notes__", [])])
    assert "losses.mine (late, plugin late_plugin.py)" in told


WRITER = """
import kdx

class Writer(kdx.Loss):
    name = "writer"
    inputs = {"student": "student.logits", "label": "batch.label"}

    def forward(self, student, label):
        label.add_(1).sub_(1)
        return student.square().mean(1)

@kdx.hookimpl
def kdx_losses():
    return [Writer]
"""


def test_a_node_that_writes_into_what_others_read_is_refused_before_training(tmp_path: Path) -> None:
    path = tmp_path / "writer_plugin.py"
    path.write_text(WRITER)
    layer = {"plugins": [*PLAIN["plugins"], str(path)], "losses": {"mine": {"use": "writer"}}}
    with pytest.raises(kdx.PlanError, match=r"losses.mine \(writer, .*\): it changed batch.label in place"):
        run_in(tmp_path, config_of(PLAIN, layer))


@pytest.mark.parametrize("draw", ["torch.rand(())", "random.random()", "np.random.rand()"])
def test_a_node_that_draws_global_random_numbers_is_refused_before_training(tmp_path: Path, draw: str) -> None:
    path = tmp_path / "writer_plugin.py"
    path.write_text(WRITER.replace("label.add_(1).sub_(1)", draw).replace("import kdx", "import random\nimport kdx"))
    path.write_text("import numpy as np\nimport torch\n" + path.read_text())
    layer = {"plugins": [*PLAIN["plugins"], str(path)], "losses": {"mine": {"use": "writer"}}}
    with pytest.raises(kdx.PlanError, match=r"losses.mine \(writer, .*\): it draws from the global random numbers"):
        run_in(tmp_path, config_of(PLAIN, layer))
