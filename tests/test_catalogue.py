"""What a person sees of the plugins."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import pytest
from builders import registry
from rich.console import Console, RenderableType

from kdx.catalogue import component_rows, component_view, default_text, plugin_table
from kdx.errors import PluginError
from kdx.plugins import Registry, discover


def shown(*parts: RenderableType) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200)
    for part in parts:
        console.print(part)
    return out.getvalue()


def rows(kind: str, name: str) -> set[tuple[str, str, str, str]]:
    return set(component_rows(registry().find(kind, name, "x")))


def test_every_plugin_is_listed_with_its_origin_and_what_it_supplies() -> None:
    text = shown(plugin_table(registry()))
    for words in ("kdx.builtin", "built in", "kdx_logit", "losses: ", "mse_logits", "toy_plugin.py", "targets: half, "):
        assert words in text


def test_a_plugin_that_could_not_be_loaded_is_listed_with_the_reason() -> None:
    found = discover(installed=False)
    text = shown(plugin_table(Registry(found.entries, found.plugins, {"broken": "ImportError: no luck"})))
    assert "not loaded" in text
    assert "ImportError: no luck" in text


def test_a_plugin_without_components_is_listed_as_one_that_watches(tmp_path: Path) -> None:
    (tmp_path / "watch.py").write_text("import kdx\n@kdx.hookimpl\ndef kdx_run_start(run): ...\n")
    assert "watches runs" in shown(plugin_table(discover([str(tmp_path / "watch.py")])))


def test_a_component_is_shown_with_inputs_knobs_and_options() -> None:
    assert rows("losses", "kd") == {
        ("input", "student", "ref", "student.logits"),
        ("input", "teacher", "ref", "teacher.logits"),
        ("knob", "temperature", "number, schedule or ref, above 0", "4"),
        ("knob", "weight", "number, schedule or ref", "1"),
        ("option", "divergence", "str", "forward_kl"),
        ("option", "reduction", "str", "sum"),
        ("option", "alpha", "float | None", "none"),
        ("option", "beta", "float | None", "none"),
    }


def test_inputs_that_must_or_may_be_given_and_ranges_are_told_apart() -> None:
    assert ("input", "student", "ref", "required") in rows("losses", "mse")
    assert ("input", "logits", "refs", "*.logits") in rows("targets", "mean")
    assert ("input", "mask", "ref", "none") in rows("losses", "masked")
    assert ("knob", "scale", "number, schedule or ref, at least 0, at most 10", "1") in rows("losses", "masked")
    assert ("part", "head", "part of a model", "teacher.classifier") in rows("losses", "reused")
    assert not any(row[1] == "weight" for row in rows("targets", "mean"))


def test_options_have_their_types_and_defaults() -> None:
    found = rows("models", "timm")
    assert ("option", "model", "str", "required") in found
    assert ("option", "pretrained", "bool", "False") in found
    assert ("option", "size", "int | None", "none") in found
    assert ("option", "args", "dict[str, Any]", "{}") in found


@pytest.mark.parametrize(
    ("name", "read", "not_read"),
    [
        ("kd", {"losses.NAME.lr_scale": "1.0", "losses.NAME.weight_decay": "none"}, "cache"),
        ("mean", {"targets.NAME.lr_scale": "1.0", "targets.NAME.cache": "none"}, "losses"),
        ("timm", {"student.taps": "{}", "teachers.NAME.cache": "none"}, "student.cache"),
        ("conv1x1", {"align.NAME.lr_scale": "1.0"}, "cache"),
        ("tensors", {"data.validation": "0.1"}, "lr_scale"),
    ],
)
def test_what_the_engine_reads_of_a_section_is_shown_where_it_may_be_said(
    name: str, read: dict[str, str], not_read: str
) -> None:
    lines = shown(*component_view(registry(), name)).splitlines()
    found = [[cell.strip() for cell in line.split("│")] for line in lines if "│" in line]
    told = {cells[2]: cells[4] for cells in found if cells[1] == "engine"}
    assert read.items() <= told.items()
    assert not any(not_read in path for path in told)


def test_a_component_is_described_by_its_own_words() -> None:
    text = shown(*component_view(registry(), "kd"))
    assert "losses: kd  (kdx_logit, kdx " in text
    assert "Soft targets (Hinton, Vinyals, Dean" in text


def test_a_name_that_several_kinds_use_shows_them_all() -> None:
    found = registry()
    twice = {**found.entries, ("targets", "kd"): found.find("targets", "mean", "x")}
    assert "targets: mean" in shown(*component_view(Registry(twice, found.plugins), "kd"))


def test_a_component_without_any_option_needs_no_table() -> None:
    assert len(list(component_view(registry(), "plain"))) == 2


def test_an_unknown_component_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(PluginError, match=r"^no component is named 'cosin'; did you mean 'cosine'\?"):
        list(component_view(registry(), "cosin"))


def test_every_component_can_be_shown() -> None:
    names: Iterable[str] = {name for _, name in registry().entries}
    for name in names:
        assert name in shown(*component_view(registry(), name))


def test_a_default_reads_as_a_config_says_it() -> None:
    from dataclasses import dataclass, field, fields

    @dataclass
    class Options:
        a: int
        b: int | None = None
        c: list[int] = field(default_factory=lambda: [1])
        d: str = "x"

    assert [default_text(item) for item in fields(Options)] == ["required", "none", "[1]", "x"]
