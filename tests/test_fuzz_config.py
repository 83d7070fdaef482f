"""Whatever stands in a config, it is read or refused: no traceback, no hang, no code, nothing outside of its folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from fuzzing import VALUES, cases, damaged, mutated, well_behaved, written
from hypothesis import given
from hypothesis import strategies as st
from small_run import DISTIL, registry

from kdx.config import load, load_mapping, overlay, parse_override, to_yaml
from kdx.errors import ConfigError
from kdx.ranges import check_names
from kdx.sections import RootOptions
from kdx.spec import check, full_config

TEXT = to_yaml(DISTIL).encode()
YAML = st.text(alphabet="ab:{}[]&*!|>-? \n\t'\"#%@`,$.0123~e", max_size=60)
"""What YAML is made of."""
SECTIONS = st.sampled_from([*DISTIL, "align", "targets", "metrics", "extends", "seed"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@cases(1200)
@given(text=YAML)
def test_a_text_is_read_or_refused(folder: Path, text: str) -> None:
    with well_behaved():
        load(written(folder / "any.yaml", text.encode()))


@cases(400)
@given(content=damaged(TEXT) | st.binary(max_size=80))
def test_a_damaged_config_is_read_or_refused(folder: Path, content: bytes) -> None:
    with well_behaved():
        load(written(folder / "damaged.yaml", content))


@cases(60)
@given(config=mutated(DISTIL))
def test_a_config_with_wrong_sections_is_checked_or_refused(config: dict[str, Any]) -> None:
    with well_behaved():
        full_config(check(load_mapping(config), registry()))


@cases(100)
@given(config=st.dictionaries(SECTIONS, VALUES))
def test_a_config_of_anything_is_checked_or_refused(config: dict[str, Any]) -> None:
    with well_behaved():
        check(load_mapping(config, Path(os.devnull)), registry())


@cases(300)
@given(text=YAML | st.tuples(st.sampled_from(tuple(DISTIL)), YAML).map("=".join))
def test_an_override_is_read_or_refused(text: str) -> None:
    with well_behaved():
        parse_override(text)
    with well_behaved():
        load_mapping(DISTIL, overrides=[text])


@cases(300)
@given(below=VALUES, above=VALUES)
def test_laying_over_changes_neither_argument(below: Any, above: Any) -> None:
    if isinstance(below, dict) and isinstance(above, dict):
        before = repr((below, above))
        overlay(below, above)
        assert repr((below, above)) == before


def laughs(depth: int) -> str:
    """A short text that means ten to the power of `depth` words."""
    lines = ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, depth)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(9), "it stands for more than 100,000 values"),
        ("a: &a [*a]", "contains itself"),
        ("a: &a {b: *a}", "contains itself"),
        ("[" * 1200, "nested too deeply"),
        ("a: " + "{b: " * 500 + "1" + "}" * 500, "nested too deeply"),
        ("a: !!python/object/apply:os.system [exit 1]", "could not determine a constructor"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("? [a, b]\n: 1", "unhashable key"),
        ("a: {? [a]\n : 1}", "unhashable|not valid|keys"),
        ("a: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("a: ${a}", "a: "),
        ("a: ${nothing}", "nothing"),
        ("a: ${os.system:exit}", "Unsupported interpolation"),
    ],
    ids=range(13),
)
def test_a_text_that_is_meant_to_harm_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(load(written(tmp_path / "bad.yaml", text.encode())), registry())


@pytest.mark.parametrize("path", ["\x00", "a\x00b.yaml", "\ud800"])
@pytest.mark.parametrize(
    "config", [{"extends": "PATH"}, {"student": {"checkpoint": "PATH"}}, {"student": {"run": "PATH"}}]
)
def test_what_no_file_can_be_called_is_refused(config: dict[str, Any], path: str) -> None:
    found = {key: path if value == "PATH" else dict.fromkeys(value, path) for key, value in config.items()}
    with pytest.raises(ConfigError, match=r"cannot be the path of a file|cannot read config"):
        load_mapping(found)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../up", "a/b", "a\\b", "/etc", "a\x00b", "a\nb", "x" * 300, "~/a", "a\x1b[2J", "\ud800"]
)
def test_a_name_cannot_leave_the_folder_of_runs(name: str) -> None:
    with pytest.raises(ConfigError, match=r"name: .* cannot be a folder name"):
        check_names(RootOptions(name=name))


@cases(800)
@given(name=st.text(max_size=30) | st.text(alphabet="./\\~a: ", max_size=8))
def test_every_name_that_is_allowed_is_one_folder_in_the_folder_of_runs(name: str) -> None:
    with well_behaved():
        check_names(RootOptions(name=name))
        folder = Path("runs") / f"{name}-0123456789ab"
        assert os.path.normpath(folder).split(os.sep) == ["runs", folder.name]
        assert len(os.fsencode(folder.name)) < 256
        assert folder.name.isprintable()
