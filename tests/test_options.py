"""Options of a section: what is accepted, and how the refusals read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from kdx.errors import ConfigError
from kdx.options import plain_options, read_options, type_text

WHO = " (kd, plugin logit)"


@dataclass(frozen=True)
class Options:
    model: str
    count: int = 3
    share: float = 1.0
    fast: bool = False
    places: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    either: int | float | None = None


@dataclass(frozen=True)
class Nothing:
    pass


def refusal(options: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        read_options(Options, options, "losses.kd", WHO)
    return str(caught.value)


def test_options_become_an_instance_with_defaults_filled_in() -> None:
    read = read_options(Options, {"model": "a", "places": [1, 2.5], "extra": {"b": [1]}, "either": 2}, "x")
    assert read == Options("a", places=[1.0, 2.5], extra={"b": [1]}, either=2)
    assert type(read.places) is list
    assert type(read.extra) is dict


def test_an_unknown_option_is_refused_with_the_nearest_one() -> None:
    expected = r"losses.kd.cuont: unknown option (kd, plugin logit); did you mean 'count'?"
    assert refusal({"model": "a", "cuont": 3}).startswith(expected)


def test_a_key_that_is_no_word_is_refused() -> None:
    assert refusal({"model": "a", 3: 4}).startswith("losses.kd.3: unknown option")  # type: ignore[dict-item]


def test_an_option_without_a_default_must_be_given() -> None:
    assert refusal({}) == "losses.kd.model: it is missing (kd, plugin logit); expected str"


def test_options_of_a_component_without_any_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a: unknown option; options: none"):
        read_options(Nothing, {"a": 1}, "")


@pytest.mark.parametrize(
    ("option", "value", "found", "expected"),
    [
        ("count", "many", "'many'", "int"),
        ("count", 2.5, "2.5", "int"),
        ("count", True, "True", "int"),
        ("count", None, "None", "int"),
        ("share", "much", "'much'", "float"),
        ("share", False, "False", "float"),
        ("fast", "maybe", "'maybe'", "bool"),
        ("model", ["a"], "['a']", "str"),
        ("places", 3, "3", "list[float]"),
        ("limit", 2.5, "2.5", "int | None"),
        ("either", True, "True", "int | float | None"),
        ("either", "x", "'x'", "int | float | None"),
    ],
)
def test_a_wrong_type_is_refused_with_place_finding_expectation_and_owner(
    option: str, value: Any, found: str, expected: str
) -> None:
    message = refusal({"model": "a", option: value})
    assert message.startswith(f"losses.kd.{option}: found {found}, expected {expected} (kd, plugin logit): ")


@pytest.mark.parametrize("value", ["x", [1], 1])
def test_what_is_no_mapping_where_one_is_expected_is_refused_in_plain_words(value: Any) -> None:
    message = refusal({"model": "a", "extra": value})
    assert message == f"losses.kd.extra: found {value!r}, expected a mapping of options (kd, plugin logit)"


def test_a_mapping_with_a_key_that_is_no_word_is_refused_with_what_is_wrong_about_it() -> None:
    message = refusal({"model": "a", "extra": {1: 2}})
    assert message.startswith("losses.kd.extra.1: found {1: 2}, expected dict[str, Any] (kd, plugin logit): Key 1 ")


def test_a_wrong_type_inside_of_a_list_is_refused_with_its_place() -> None:
    message = refusal({"model": "a", "places": [1.0, "x"]})
    assert message.startswith("losses.kd.places[1]: found 'x', expected list[float]")


def test_a_message_is_one_line_without_the_names_of_omegaconf() -> None:
    message = refusal({"model": "a", "count": "many"})
    assert "\n" not in message
    assert "full_key" not in message
    assert "object_type" not in message


def test_options_of_the_whole_config_need_no_prefix() -> None:
    with pytest.raises(ConfigError, match=r"^count: found 'many'"):
        read_options(Options, {"model": "a", "count": "many"}, "")


def test_options_as_a_mapping_are_what_was_read() -> None:
    options = {"model": "a", "count": 3, "share": 1.0, "fast": False, "places": [], "extra": {"k": 1}, "limit": None}
    assert plain_options(read_options(Options, options, "x")) == {**options, "either": None}
    assert plain_options(None) == {}


def test_a_type_reads_as_its_class_says_it() -> None:
    assert type_text("int | None") == "int | None"
    assert type_text(int) == "int"
    assert type_text(list[float]) == "list[float]"
