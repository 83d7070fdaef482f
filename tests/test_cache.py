"""The store of a teacher's answers: what is read is what was written, whole or named as damaged."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdx.cache import BLOCKS, META, Field, Meta, Store, Writer, changes, fields_of, open_store, read_meta
from kdx.cache_options import CacheOptions, read_cache, split_views
from kdx.errors import ConfigError, DataError, KdxError

SAMPLES, VIEWS = 21, 2
PARTS = {"weights": "a"}


def answers(rows: range) -> dict[str, Tensor]:
    """Logits [B, 5] and maps [B, 2, 3] that tell their row."""
    start = torch.tensor(rows, dtype=torch.float32)
    return {
        "logits": start[:, None] + torch.arange(5) / 8,
        "mid": start[:, None, None] * torch.ones(2, 3),
    }


def meta_of(dtype: torch.dtype = torch.float32, top: int | None = None) -> Meta:
    return Meta(PARTS, fields_of(answers(range(2)), dtype, top), SAMPLES, VIEWS, block=8)


def filled(folder: Path, meta: Meta, blocks: int | None = None) -> Store | None:
    writer = Writer(folder, meta)
    for view in range(VIEWS):
        for block in writer.missing(view)[:blocks]:
            writer.write(block, answers(range(*meta.span(block))))
    writer.sync()
    writer.close()
    return open_store(folder, verify=True)


def read(store: Store, rows: list[int]) -> dict[str, Tensor]:
    found = store.rows(torch.tensor(rows), tuple(store.meta.files))
    return {name: field.decode(name, found) for name, field in store.meta.fields.items()}


def test_rows_come_back_as_they_were_in_any_order(tmp_path: Path) -> None:
    store = filled(tmp_path / "a", meta_of())
    assert store is not None
    rows = [41, 0, 20, 21, 8, 8]
    expected = answers(range(SAMPLES * VIEWS))
    for name, found in read(store, rows).items():
        assert torch.equal(found, expected[name][rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_halves_the_files_and_gives_the_type_of_the_teacher(tmp_path: Path, dtype: torch.dtype) -> None:
    store = filled(tmp_path / "a", meta_of(dtype))
    assert store is not None
    assert store.meta.size() == meta_of().size() // 2
    assert (tmp_path / "a" / "logits.bin").stat().st_size == SAMPLES * VIEWS * 5 * 2
    found = read(store, [30])["logits"]
    assert found.dtype == torch.float32
    assert torch.allclose(found, answers(range(30, 31))["logits"], rtol=1e-2)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 12), st.integers(1, 11), st.integers(0, 999))
def test_the_highest_logits_keep_their_probability_and_the_rest_keeps_its_mass(
    classes: int, top: int, seed: int
) -> None:
    top = min(top, classes - 1)
    logits = 3 * torch.randn(4, classes, generator=torch.Generator().manual_seed(seed))
    field = fields_of({"logits": logits}, torch.float32, top)["logits"]
    found = field.decode("logits", field.encode("logits", logits)).softmax(1)
    expected = logits.softmax(1)
    kept = logits.topk(top).indices
    assert torch.allclose(found.gather(1, kept), expected.gather(1, kept), atol=1e-5)
    assert torch.allclose(found.sum(1), torch.ones(4), atol=1e-5)
    rest = torch.ones_like(found).scatter(1, kept, 0.0)
    assert torch.allclose((found * rest).sum(1), (expected * rest).sum(1), atol=1e-5)


def test_32_of_a_thousand_logits_need_a_fifteenth_of_all() -> None:
    whole, top = (
        Meta({}, fields_of({"logits": torch.zeros(2, 1000)}, torch.float16, k), 50_000, 1) for k in (None, 32)
    )
    assert whole.size() == 100_000_000
    assert top.size() == 50_000 * (32 * 2 + 32 * 2 + 4)


def test_a_filling_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    assert filled(folder, meta_of(), blocks=1) is None
    writer = Writer(folder, meta_of())
    assert (writer.missing(0), writer.missing(1)) == ([1, 2], [4, 5])
    writer.close()
    assert filled(folder, meta_of()) is not None


def test_a_line_that_was_torn_by_a_kill_does_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    filled(folder, meta_of())
    path = folder / BLOCKS
    path.write_bytes(path.read_bytes()[:-9])
    assert open_store(folder) is None
    writer = Writer(folder, meta_of())
    assert writer.missing(1) == [5]
    writer.close()
    store = filled(folder, meta_of())
    assert store is not None
    assert torch.equal(read(store, [41])["mid"], answers(range(41, 42))["mid"])


def test_rows_that_were_not_brought_to_the_disk_do_not_count(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a", meta_of())
    writer.write(0, answers(range(8)))
    writer.close()
    again = Writer(tmp_path / "a", meta_of())
    assert again.missing(0) == [0, 1, 2]
    again.close()


def test_a_block_of_which_the_disk_takes_a_part_is_a_message_and_does_not_count(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a", meta_of())
    before, limit = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # one call writes up to here, and tells of no error
    try:
        with pytest.raises(KdxError, match=r"cannot write into .*/a: no file may grow so large here; what was saved"):
            writer.write(0, answers(range(8)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    writer.sync()
    assert writer.missing(0) == [0, 1, 2]
    writer.close()
    assert filled(tmp_path / "a", meta_of()) is not None


def test_an_altered_row_is_found_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    filled(folder, meta_of())
    path = folder / "mid.bin"
    content = bytearray(path.read_bytes())
    content[24 * 10] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"mid.bin is altered: the checksum of rows 8 to 15 of view 0"):
        open_store(folder, verify=True)


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    filled(folder, meta_of())
    with (folder / "logits.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match=r"logits.bin has 100 bytes, expected 840"):
        open_store(folder)


def test_a_part_of_another_cache_is_not_filled_further(tmp_path: Path) -> None:
    filled(tmp_path / "a", meta_of(), blocks=1)
    with pytest.raises(DataError, match="holds a part of another cache"):
        Writer(tmp_path / "a", meta_of(torch.float16))


def test_a_folder_without_a_cache_is_none(tmp_path: Path) -> None:
    assert read_meta(tmp_path) is None
    assert open_store(tmp_path / "nothing") is None


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(["schema", "fields", "samples", "views", "block", "parts", "shape", "stored", "../x"]), inner),
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_no_content_of_the_files_gives_more_than_a_message(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / META).write_bytes(raw)
    with pytest.raises(KdxError, match=r"damaged|of form|cannot be read"):
        read_meta(folder)
    whole = meta_of()
    filled(folder / "b", whole)
    (folder / "b" / BLOCKS).write_bytes(raw + b"\n")
    store = None
    with contextlib.suppress(DataError):
        store = open_store(folder / "b")
    assert store is None


def test_a_field_cannot_name_a_file_elsewhere(tmp_path: Path) -> None:
    filled(tmp_path / "a", meta_of())
    path = tmp_path / "a" / META
    path.write_text(path.read_text().replace('"mid"', '"../mid"'))
    with pytest.raises(DataError, match="damaged"):
        read_meta(tmp_path / "a")


def test_numbers_that_are_no_floats_keep_their_type() -> None:
    fields = fields_of({"places": torch.zeros(2, 3, dtype=torch.int64)}, torch.float16)
    assert fields == {"places": Field((3,), "int64", "int64")}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (None, None),
        (False, None),
        (True, CacheOptions()),
        ("a/b", CacheOptions(path="a/b")),
        ({"dtype": "float16", "top": 8}, CacheOptions("float16", 8)),
    ],
)
def test_a_cache_is_asked_for_in_one_word_or_by_options(found: object, expected: CacheOptions | None) -> None:
    assert read_cache(found, "teachers.a.cache") == expected


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (3, "teachers.a.cache: found 3, expected true, the folder"),
        ({"dtype": "int8"}, "teachers.a.cache.dtype: found 'int8', expected one of float32"),
        ({"top": 0}, "teachers.a.cache.top: found 0"),
        ({"tops": 0}, "teachers.a.cache.tops: unknown option; did you mean 'top'"),
        ({"path": "a", "top": 4}, "keeps its own form"),
    ],
)
def test_other_words_are_refused(found: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_cache(found, "teachers.a.cache")


def test_views_are_a_number_or_names_or_both() -> None:
    assert split_views(None) == (None, {})
    assert split_views(4) == (4, {})
    assert split_views({"count": 4, "strong": {"flip": True}}) == (4, {"strong": {"flip": True}})
    for wrong in (0, True, "many", {"count": 0.5}):
        with pytest.raises(ConfigError, match=r"data\.views"):
            split_views(wrong)


def test_what_a_cache_loses_is_what_it_changes(tmp_path: Path) -> None:
    filled(tmp_path / "exact", meta_of())
    filled(tmp_path / "half", meta_of(torch.float16))
    assert changes(CacheOptions(), alone=False) is None
    assert changes(CacheOptions("float16"), alone=False) == ["float16", None]
    assert changes(CacheOptions(path=str(tmp_path / "exact")), alone=False) is None
    assert changes(CacheOptions(path=str(tmp_path / "half")), alone=False)
    assert changes(CacheOptions(path=str(tmp_path / "exact")), alone=True)
