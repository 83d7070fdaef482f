import dataclasses
import json
import math

import pytest
from sample_run import bare, sample_result

from kdx.errors import CheckpointError
from kdx.result import from_dict, from_json, read_result, to_dict, to_json, write_result


@pytest.mark.parametrize("result", [sample_result(), bare(sample_result())], ids=["full", "bare"])
def test_a_result_is_read_back_as_it_was_written(tmp_path, result):
    path = write_result(tmp_path, result)
    assert path == tmp_path / "result.json"
    assert read_result(tmp_path) == result
    assert [item.name for item in tmp_path.iterdir()] == ["result.json"]


def test_a_number_that_is_not_finite_is_null_in_the_file_and_nan_when_read():
    result = sample_result()
    result.best.test["cross_entropy"] = math.inf
    text = to_json(result)
    assert json.loads(text, parse_constant=pytest.fail)["best"]["test"]["cross_entropy"] is None
    assert math.isnan(from_json(text).best.test["cross_entropy"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"result\.json: there is no such file; the run has not finished"):
        read_result(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 200, -2])
def test_a_torn_file_is_named(tmp_path, length):
    path = write_result(tmp_path, sample_result())
    path.write_text(path.read_text()[:length].rstrip("\n}"))
    with pytest.raises(CheckpointError, match=r"result\.json: torn or not JSON"):
        read_result(tmp_path)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "result.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match=r"result\.json: torn or not JSON"):
        read_result(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_result(tmp_path, sample_result())
    broken = dataclasses.replace(sample_result(), name=object())
    with pytest.raises(TypeError):
        write_result(tmp_path, broken)
    assert read_result(tmp_path) == sample_result()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("seed",), "3", r"file: seed: found '3', expected it to be of type int"),
        (("seed",), True, r"file: seed: found True, expected it to be of type int"),
        (("best", "test", "accuracy"), "high", r"file: best: test: accuracy: found 'high', expected it to be a number"),
        (("teachers", "wide", "size"), 4, r"file: teachers: wide: size: found 4, expected it to be a mapping \(Size\)"),
        (("teachers",), [], r"file: teachers: found \[\], expected it to be a mapping"),
        (("classes",), "ab", r"file: classes: found 'ab', expected it to be a list"),
        (("confusion",), [[1, 2]], r"file: confusion: expected 10 rows of 10 numbers"),
        (("secnds",), {}, r"file: 'secnds' is not known here; did you mean 'seconds'\?"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(path, value, message):
    data = to_dict(sample_result())
    *parents, last = path
    inner = data
    for key in parents:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(CheckpointError, match=message):
        from_dict(data, "file")


def test_a_missing_value_is_named():
    data = to_dict(sample_result())
    del data["seconds"]["total"]
    with pytest.raises(CheckpointError, match="file: seconds: misses total"):
        from_dict(data, "file")
