"""Error messages."""

from __future__ import annotations

import pytest

from kdx import errors
from kdx.errors import KdxError, did_you_mean


def test_the_nearest_choice_and_all_choices_are_named() -> None:
    text = did_you_mean("temprature", ["weight", "temperature"], what="options")
    assert text == "did you mean 'temperature'? (options: temperature, weight)"


def test_nothing_is_suggested_where_nothing_is_near() -> None:
    assert did_you_mean("zebra", ["temperature", "weight"]) == "known: temperature, weight"


def test_an_empty_list_of_choices_says_so() -> None:
    assert did_you_mean("kd", []) == "known: none"


@pytest.mark.parametrize("name", ["ConfigError", "PluginError", "PlanError", "DataError", "CheckpointError"])
def test_every_error_is_one_that_the_command_line_can_show(name: str) -> None:
    assert issubclass(getattr(errors, name), KdxError)
