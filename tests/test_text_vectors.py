"""Vectors of texts: n-grams, vectors from files, and transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kdx.builtin.text_vectors import Ngrams, parts_of, read_texts
from kdx.errors import ConfigError, DataError

ENTRIES = [("animals/cat", "A cat.", "cat.txt"), ("food/pie", "A pie.", "pie.txt")]


def test_a_text_is_its_words_and_their_parts() -> None:
    assert list(parts_of("A Cat!")) == ["a", "<a>", "cat", "<ca", "cat", "at>", "<cat", "cat>", "<cat>"]
    assert list(parts_of("...")) == []


def test_ngrams_are_counted_with_signs_at_hashed_places() -> None:
    texts = Ngrams(4096)
    found = texts.raw([("", "cat cat", ""), ("", "cat", ""), ("", "", "")])
    # "cat" as a word and as a part fall together: 2 and 4 times; each other part once and twice.
    assert sorted(found[1].abs()[found[1] != 0].tolist()) == pytest.approx([1] * 5 + [1 + np.log(2)])
    assert sorted(found[0].abs()[found[0] != 0].tolist()) == pytest.approx([1 + np.log(2)] * 5 + [1 + np.log(4)])
    assert found[2].count_nonzero() == 0


def test_texts_with_words_in_common_are_near_and_all_have_length_1() -> None:
    found = Ngrams(2048).vectors([("", "A grey cat.", ""), ("", "Two grey cats", ""), ("", "a plum", ""), ("", "", "")])
    assert found.norm(dim=1).tolist() == pytest.approx([1, 1, 1, 0])
    assert found[0] @ found[1] > 0.4 > found[0] @ found[2]


def test_ngrams_are_the_same_on_every_machine() -> None:
    assert Ngrams(16).raw([("", "cat", "")])[0].nonzero()[:, 0].tolist() == [4, 5, 6, 7, 10, 13]


def store(folder: Path, lines: str = "A pie.\nanimals/cat\n", rows: Any = ((0, 3), (4, 0))) -> dict[str, str]:
    np.save(folder / "v.npy", np.array(rows, np.float32))
    (folder / "v.txt").write_text(lines, encoding="utf-8")
    return {"file": str(folder / "v.npy"), "index": str(folder / "v.txt")}


def test_rows_of_a_file_are_found_by_key_or_by_text(tmp_path: Path) -> None:
    texts = read_texts(store(tmp_path))
    assert texts is not None
    assert texts.vectors(ENTRIES).tolist() == [[1, 0], [0, 1]]


def test_vectors_of_safetensors_are_found_by_name(tmp_path: Path) -> None:
    save_file({"A pie.": torch.tensor([0.0, 2.0]), "animals/cat": torch.tensor([5.0, 0.0])}, tmp_path / "v.safetensors")
    texts = read_texts({"file": str(tmp_path / "v.safetensors")})
    assert texts is not None
    assert texts.vectors(ENTRIES).tolist() == [[1, 0], [0, 1]]


def test_other_vectors_have_another_digest(tmp_path: Path) -> None:
    digests = [
        texts.digest
        for rows in (((0, 3), (4, 0)), ((0, 3), (5, 1)))
        if (texts := read_texts(store(tmp_path, rows=rows)))
    ]
    assert len(set(digests)) == 2


@pytest.mark.parametrize(
    ("stored", "match"),
    [
        (
            {"lines": "A pie.\nanimals/cats\n"},
            r"cat\.txt: .*v\.npy has no vector for 'animals/cat' or 'A cat\.'; did you mean 'animals/cats'",
        ),
        ({"lines": "A pie.\n"}, r"v\.txt has 1 different lines, but .*v\.npy has 2 vectors"),
        ({"rows": (1.0, 2.0)}, r"v\.npy holds \[2\], expected vectors \[N, D\]"),
        ({"rows": ((0, 1), (0, float("nan")))}, r"row 1 of .*v\.npy holds numbers that are not finite"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(tmp_path: Path, stored: dict[str, Any], match: str) -> None:
    texts = read_texts(store(tmp_path, **stored))
    assert texts is not None
    with pytest.raises(DataError, match=match):
        texts.vectors(ENTRIES)


@pytest.mark.parametrize("ending", ["npy", "safetensors"])
def test_a_file_that_is_not_what_it_is_called_is_refused(tmp_path: Path, ending: str) -> None:
    options = store(tmp_path) if ending == "npy" else {"file": str(tmp_path / "v.safetensors")}
    Path(options["file"]).write_bytes(b"nothing")
    texts = read_texts(options)
    assert texts is not None
    with pytest.raises(DataError, match=rf"data\.text\.file: .*v\.{ending} cannot be read"):
        texts.vectors(ENTRIES)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ngrams": 1}, "ngrams: found 1, expected a width of 2 or more"),
        ({"file": "v.npy", "model": "m", "index": "i"}, "but both are given"),
        ({"index": "v.txt"}, "it lists the rows of a `file` that ends in .npy"),
        ({"file": "nowhere.npy", "index": "i"}, r"data\.text\.file: there is no file nowhere\.npy"),
        ({"model": "nowhere"}, r"data\.text\.model: nowhere is not a folder"),
        ({"ngram": 1}, "did you mean 'ngrams'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        read_texts(options)


def test_a_file_needs_a_known_ending_and_rows_their_names(tmp_path: Path) -> None:
    options = store(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.text\.index: it is missing"):
        read_texts({"file": options["file"]})
    with pytest.raises(ConfigError, match=r"expected a file that ends in \.npy or \.safetensors"):
        read_texts({"file": options["index"]})


def test_a_text_model_needs_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    texts = read_texts({"model": str(tmp_path)})
    assert texts is not None
    with pytest.raises(ConfigError, match=r"pip install 'kdx\[text\]'"):
        texts.vectors(ENTRIES)


def test_a_text_model_gives_the_mean_over_its_tokens(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\ncat\npie\n.\n")
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=8, **sizes)).eval()
    model.save_pretrained(tmp_path)
    texts = read_texts({"model": str(tmp_path)})
    assert texts is not None
    tokens = torch.tensor([[2, 4, 5, 7, 3]])
    with torch.no_grad():
        expected = model(tokens).last_hidden_state.mean(1)
    found = texts.vectors([*ENTRIES, ("longer", "a cat a pie a cat", ""), ("none", "", "")])
    assert torch.allclose(found[:1], expected / expected.norm(), atol=1e-5)
    assert found[3].count_nonzero() == 0
