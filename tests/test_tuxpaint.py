"""The data set of Tux Paint's stamps, on a small folder in their layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from stamp_folder import RATE, stamp, stamps

import kdx
from kdx.builtin.tuxpaint import TuxPaint
from kdx.errors import ConfigError, DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return stamps(tmp_path / "stamps")


def data_of(root: Path, **options: Any) -> TuxPaint:
    return TuxPaint(TuxPaint.Config(root=str(root), **{"rate": RATE, "size": 6, **options}))


def test_a_sample_is_a_picture_a_clip_and_a_category(root: Path) -> None:
    data = data_of(root, val_share=0.0, test_share=0.0)
    batch = data.train().fetch([0, 18])
    assert len(data.train()) == 19  # the cake that nobody speaks of is left out
    assert data.classes() == ("animals", "food")
    assert batch["label"].tolist() == [0, 1]
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 180]
    assert batch["image"].shape == (2, 3, 6, 6)
    assert batch["audio"].shape == (2, 800)
    assert data.test() is None
    assert data.val() is None


def test_stamps_without_the_sound_can_stay(root: Path) -> None:
    data = data_of(root, unpaired="keep", val_share=0.0, test_share=0.0)
    assert len(data.train()) == 20
    assert data.train().fetch([18, 19])["audio_present"].tolist() == [True, False]
    assert data.facts().streams["audio"].present == "audio_present"
    assert data_of(root).facts().streams["audio"].present == ""


def test_no_clip_picture_or_caption_is_in_two_splits(root: Path) -> None:
    stamp(root, "food/pie", "Cake 3.", shade=250, spoken=900)
    data = data_of(root, val_share=0.2, test_share=0.3, label="caption")
    seen: dict[str, str] = {}
    for name, split in data.splits.items():
        for row in split.rows:
            assert row.image is not None
            assert row.sound is not None
            for key in (row.image.read_bytes(), row.sound.file.read_bytes(), data.classes()[row.label]):
                assert seen.setdefault(str(key), name) == name
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 10, "val": 4, "test": 6}


def test_a_caption_can_be_the_class(root: Path) -> None:
    data = data_of(root, label="caption")
    assert len(data.classes()) == 19
    assert data.classes()[0] == "A cat of kind 0."


def test_captions_become_a_stream_of_vectors(root: Path) -> None:
    data = data_of(root, text={"ngrams": 32}, val_share=0.0, test_share=0.0)
    batch = data.on_device(data.train().fetch([0, 1, 18]), None)
    assert batch["text"].shape == (3, 32)
    assert batch["text"].norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    near, far = batch["text"][0] @ batch["text"][1], batch["text"][0] @ batch["text"][2]
    assert near > far + 0.3  # two cats, a cat and a cake
    assert data.facts().streams["text"].kind == "vector"
    other = data_of(root, text={"ngrams": 32}, language="fr", val_share=0.0, test_share=0.0)
    assert not torch.equal(other.train().fetch([0])["text"], batch["text"][:1])


def test_the_fingerprint_covers_content_and_not_place(root: Path) -> None:
    before = data_of(root).fingerprint()
    moved = root.rename(root.parent / "elsewhere")
    assert data_of(moved).fingerprint() == before
    assert data_of(moved, text={}).fingerprint() != before
    stamp(moved, "food/cake1", "Cake 1.", shade=1, spoken=610)
    assert data_of(moved).fingerprint() != before


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"label": "name"}, r"data\.label: found 'name', expected one of category, caption"),
        ({"unpaired": "no"}, r"data\.unpaired: found 'no', expected one of drop, keep"),
        ({"val_share": 0.5, "test_share": 0.5}, r"found shares of 0\.5 and 0\.5, expected .* less than 1"),
        ({"test_share": -0.1}, "found shares of"),
    ],
)
def test_wrong_options_are_refused(root: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        data_of(root, **options)


def test_what_has_been_read_stays_in_memory_unless_it_is_not_to_be_kept(root: Path) -> None:
    kept, again = (data_of(root, keep=keep, val_share=0.0, test_share=0.0).train() for keep in (True, False))
    first = [split.fetch([0, 1]) for split in (kept, again)]
    (root / "animals/pets/cat1.png").write_bytes(b"gone")
    second = kept.fetch([1, 0])
    assert all(torch.equal(second[name], first[0][name].flip(0)) for name in second)
    assert all(torch.equal(first[0][name], first[1][name]) for name in second)
    with pytest.raises(DataError, match=r"cat1\.png: cannot be read"):
        again.fetch([1])


def test_an_unreadable_picture_or_clip_is_named(root: Path) -> None:
    (root / "food/cake2.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"cake2\.png: cannot be read as an image"):
        data_of(root).facts()
    stamp(root, "food/cake2", "Cake 2.", shade=120)
    (root / "food/cake2_desc_fr.wav").write_bytes(b"no clip")
    with pytest.raises(DataError, match=r"cake2_desc_fr\.wav: cannot be read as sound"):
        data_of(root).facts()


def test_drawings_are_rendered(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    stamp(tmp_path, "space/moon", "The moon.", shade=1, spoken=300)
    red = '<rect width="99" height="99" fill="red"/>'
    square = f'<svg xmlns="http://www.w3.org/2000/svg" width="9pt" height="9pt">{red}</svg>'
    stamp(tmp_path, "space/sun", "The sun.", shade=9, spoken=400)
    (tmp_path / "space/sun.png").rename(tmp_path / "space/sun.bin")
    (tmp_path / "space/sun.svg").write_text(square)
    data = data_of(tmp_path, svg=True, val_share=0.0, test_share=0.0)
    assert data.train().fetch([1])["image"][0, :, 3, 3].tolist() == [255, 0, 0]


NET = {"use": "timm", "model": "resnet10t", "args": {"layers": [1] * 4, "channels": [8] * 4, "stem_width": 8}}


def test_a_student_that_sees_learns_from_captions_alone_deployed(root: Path, tmp_path: Path) -> None:
    result = kdx.run(
        {
            "name": "captions",
            "out": str(tmp_path / "runs"),
            "baseline": False,
            "data": {"use": "tuxpaint", "root": str(root), "rate": RATE, "size": 32, "text": {"ngrams": 16}},
            "student": {**NET, "input": "image"},
            "teachers": {"words": {"use": "vectors", "input": "text"}},
            "losses": {
                "ce": {"use": "cross_entropy"},
                "clip": {"use": "clip_kd", "inputs": {"teacher": "words.embedding"}, "terms": ["interactive"]},
            },
            "train": {"epochs": 1, "batch": 4},
        },
        quiet=True,
    )
    assert kdx.load_student(result.folder).streams == ("image",)
    assert 0 <= result.metrics["accuracy"] <= 1
