"""Facts of comparability: what runs must share, and what is marked."""

from __future__ import annotations

from typing import Any

from kdx.comparable import Basis, Facts, basis, differences, fact_differences, marks

FACTS = Facts(("cat", "dog"), 100, 50, 20)
CONFIG: dict[str, Any] = {
    "data": {"use": "folder", "labelled": 50},
    "student": {"use": "timm", "model": "resnet18", "taps": {"mid": "layer3"}},
    "teachers": {"wide": {"use": "timm", "model": "resnet50", "taps": {"mid": "layer3"}}},
    "train": {"epochs": 2, "batch": 10, "lr": {"use": "cosine", "peak": 0.1}, "save": 1},
    "runtime": {"precision": "fp32", "workers": 0},
}


def made(
    facts: Facts = FACTS, teachers: tuple[str, ...] = ("wide",), plain: str | None = "p", **sections: Any
) -> Basis:
    config = {name: {**value, **sections.get(name, {})} for name, value in CONFIG.items()}
    return basis(facts, config, seed=0, teachers=teachers, plain=plain)


def told(*arguments: Any) -> list[str]:
    return [str(difference) for difference in differences(*arguments)]


def test_equal_runs_differ_in_nothing() -> None:
    assert differences(made(), made()) == []


def test_what_changes_no_number_does_not_count() -> None:
    other = made(student={"taps": {}}, train={"save": 5}, runtime={"workers": 4})
    assert differences(made(), other) == []


def test_a_difference_names_the_key_and_both_values() -> None:
    other = made(Facts(("cat", "dog"), 100, 50, 40), train={"epochs": 4})
    assert told(made(), other) == ["train.epochs (4 against 2)", "the number of updates (40 against 20)"]


def test_a_teacher_that_is_absent_or_another_one_is_a_difference() -> None:
    assert told(made(), made(teachers=())) == ["teachers.wide (absent against present)"]
    changed = basis(
        FACTS,
        {**CONFIG, "teachers": {"wide": {"use": "timm", "model": "vit"}}},
        seed=0,
        teachers=["wide"],
        plain="p",
    )
    assert told(made(), changed) == ["teachers.wide"]


def test_another_plain_student_counts_where_nothing_else_explains_it() -> None:
    assert told(made(), made(plain="q")) == ["the plain student"]
    assert told(made(), made(plain=None)) == []
    assert told(made(), made(plain="q", student={"model": "resnet34"})) == ["student.model (resnet34 against resnet18)"]


def test_budget_and_data_are_marked_although_they_are_named() -> None:
    longer = made(train={"epochs": 4})
    assert marks(made(), longer, [{"train": {"epochs": 4}}]) == ("train.epochs (4 against 2)",)
    fewer = made(data={"labelled": 10})
    assert marks(made(), fewer, [{"data": {"labelled": 10}}]) == ("data.labelled (10 against 50)",)


def test_anything_else_is_marked_only_where_it_is_not_named() -> None:
    faster = made(train={"lr": {"use": "cosine", "peak": 0.2}})
    assert marks(made(), faster) == ("train.lr.peak (0.2 against 0.1)",)
    assert marks(made(), faster, [{"train": {"lr": {"peak": 0.2}}}]) == ()
    assert marks(made(), faster, [{"train": {"lr": 0.2}}]) == ()


def test_a_teacher_that_goes_with_its_losses_is_named_by_them() -> None:
    assert marks(made(), made(teachers=()), [{"losses": {"kd": None}}]) == ()
    assert marks(made(), made(teachers=())) == ("teachers.wide (absent against present)",)


def test_many_keys_of_one_inner_mapping_are_told_as_one() -> None:
    other = made(student={"args": {"depth": 3, "heads": 2, "size": 28}, "model": "vit"}, data={"labelled": None})
    assert told(made(), other) == [
        "data.labelled (unset against 50)",
        "student.model (vit against resnet18)",
        "student.args",
    ]


def test_a_value_that_would_fill_the_line_is_left_out() -> None:
    classes = tuple(f"class {number}" for number in range(100))
    assert [str(one) for one in fact_differences(FACTS, Facts(classes, 100, 50, 20))] == ["classes"]
