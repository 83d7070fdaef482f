"""Data sets of sound files: folders of classes, and tables of pairs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import kdx
from kdx.builtin.audio_folder import AudioFolder
from kdx.builtin.paired import Paired
from kdx.data import SplitOptions, make_splits
from kdx.errors import ConfigError, DataError
from kdx.randomness import Randomness
from kdx.student import read_header

RATE = 8000


def sound(path: Path, hertz: float = 440, seconds: float = 0.1, rate: int = RATE, channels: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    soundfile.write(path, np.stack([wave * (i + 1) / channels for i in range(channels)], 1), rate)
    return path


def picture(path: Path, value: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6), value, np.uint8)).save(path)
    return path


def folder_of(path: Path, **options: Any) -> AudioFolder:
    return AudioFolder(AudioFolder.Config(str(path), **{"rate": RATE, **options}))


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Two cats of different length and a dog, in three formats."""
    sound(tmp_path / "clips" / "cat" / "a.wav", 300)
    sound(tmp_path / "clips" / "cat" / "b.flac", 400, seconds=0.05)
    sound(tmp_path / "clips" / "dog" / "c.ogg", 500)
    return tmp_path / "clips"


# ---- audio_folder


def test_clips_are_read_with_their_labels_and_masks(clips: Path) -> None:
    data = folder_of(clips)
    batch = data.train().fetch([0, 1, 2])
    assert data.classes() == ("cat", "dog")
    assert batch["label"].tolist() == [0, 0, 1]
    assert batch["audio"].shape == (3, 800)
    assert batch["audio_mask"].sum(1).tolist() == [800, 400, 800]
    expected = 0.5 * np.sin(2 * np.pi * 300 * np.arange(800) / RATE)
    assert np.abs(batch["audio"][0].numpy() - expected).max() < 1e-4
    assert batch["audio"][1, 400:].count_nonzero() == 0


def test_streams_of_clips_say_what_they_are(clips: Path) -> None:
    data = folder_of(clips, mel={})
    streams = data.facts().streams
    assert {name: (about.kind, about.shape) for name, about in streams.items()} == {
        "audio": ("audio", (800,)),
        "mel": ("image", (1, 40, 11)),
        "audio_mask": ("mask", (800,)),
        "mel_mask": ("mask", (11,)),
        "label": ("label", ()),
    }
    assert streams["audio"].rate == RATE
    batch = data.on_device(data.train().fetch([0, 1]), None)
    assert batch["mel_mask"].sum(1).tolist() == [11, 5]
    assert all(tuple(batch[name].shape[1:]) == about.shape for name, about in streams.items())


def test_a_delay_moves_the_mask_with_the_sound(clips: Path) -> None:
    data = folder_of(clips, augment={"delay": {"share": 0.5}})
    batch = {**data.train().fetch([1]), "index": torch.tensor([1])}
    found = data.on_device(batch, Randomness(0, 1, batch["index"]))
    assert not torch.equal(found["audio_mask"], batch["audio_mask"])
    assert found["audio"][~found["audio_mask"]].count_nonzero() == 0


def test_of_a_longer_clip_the_middle_is_kept(clips: Path) -> None:
    whole = folder_of(clips).train().fetch([0])["audio"]
    part = folder_of(clips, length=0.025).train().fetch([0])
    assert torch.equal(part["audio"], whole[:, 300:500])
    assert part["audio_mask"].all()


def test_clips_of_other_rates_are_resampled(tmp_path: Path) -> None:
    sound(tmp_path / "a" / "x.wav", 440, rate=RATE)
    sound(tmp_path / "b" / "x.wav", 440, rate=22050)
    batch = folder_of(tmp_path).train().fetch([0, 1])
    assert batch["audio"].shape == (2, 800)
    inner = batch["audio"][:, 100:700]
    torch.testing.assert_close(inner[0], inner[1], atol=5e-3, rtol=0)


def test_channels_are_averaged(tmp_path: Path) -> None:
    sound(tmp_path / "a" / "x.wav", channels=2)
    sound(tmp_path / "b" / "x.wav", channels=1)
    batch = folder_of(tmp_path).train().fetch([0, 1])
    torch.testing.assert_close(batch["audio"][0], batch["audio"][1] * 0.75, atol=1e-4, rtol=0)


def test_another_rate_is_refused_where_nothing_is_resampled(clips: Path) -> None:
    file = sound(clips / "dog" / "d.wav", rate=11025)
    with pytest.raises(
        DataError, match=rf"{file}: found a sample rate of 11025 Hz, expected 8000 Hz as data.rate says"
    ):
        folder_of(clips, resample=False).splits  # noqa: B018 - headers are read here


def test_an_unreadable_clip_is_named(clips: Path) -> None:
    (clips / "dog" / "d.wav").write_bytes(b"no sound at all")
    with pytest.raises(DataError, match=r"d\.wav: cannot be read as sound"):
        folder_of(clips).facts()


def test_an_empty_clip_is_named(clips: Path) -> None:
    sound(clips / "dog" / "d.wav", seconds=0)
    with pytest.raises(DataError, match=r"d\.wav: the clip is empty; expected at least one sample"):
        folder_of(clips).facts()


def test_a_clip_that_holds_no_numbers_is_named(clips: Path) -> None:
    soundfile.write(clips / "dog" / "d.wav", np.full(800, np.nan), RATE, subtype="FLOAT")
    with pytest.raises(DataError, match=r"d\.wav: cannot be read: .* not finite"):
        folder_of(clips).facts()


def test_folders_without_sound_are_errors(clips: Path, tmp_path: Path) -> None:
    (clips / "owl").mkdir()
    with pytest.raises(DataError, match=r"owl holds no sound; expected files \.aif"):
        folder_of(clips)
    with pytest.raises(DataError, match="does not exist"):
        folder_of(tmp_path / "nowhere")


def test_wrong_options_of_an_audio_folder_are_refused(clips: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.rate: found 0, expected samples per second"):
        folder_of(clips, rate=0)
    with pytest.raises(ConfigError, match=r"data.length: found 0, expected seconds, at least one sample"):
        folder_of(clips, length=0.0).facts()
    with pytest.raises(ConfigError, match=r"data.augment.flip: unknown augmentation"):
        folder_of(clips, augment={"flip": {}})


def test_a_missing_library_says_what_to_install(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ConfigError, match=r"data: sound files need soundfile.*pip install 'kdx\[audio\]'"):
        folder_of(clips).facts()


def test_the_fingerprint_follows_content_and_not_place(clips: Path) -> None:
    before = folder_of(clips).fingerprint()
    moved = clips.rename(clips.parent / "elsewhere")
    assert folder_of(moved).fingerprint() == before
    sound(moved / "cat" / "a.wav", 310, seconds=0.2)
    assert folder_of(moved).fingerprint() != before


# ---- paired


TABLE = """image,audio,label,split
0.png,0.wav,cat,train
1.png,1.wav,dog,train
2.png,,dog,train
,3.wav,,train
4.png,4.wav,dog,test
"""


def table_of(folder: Path, content: str = TABLE, /, **options: Any) -> Paired:
    """A table, with images in `pictures` and clips in `sounds`."""
    index = folder / "pairs.csv"
    index.write_text(content, encoding="utf-8")
    paths = {"images": str(folder / "pictures"), "sounds": str(folder / "sounds")}
    return Paired(Paired.Config(index=str(index), **{"rate": RATE, "size": 6, **paths, **options}))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    for i in range(5):
        picture(tmp_path / "pictures" / f"{i}.png", 50 * i)
        sound(tmp_path / "sounds" / f"{i}.wav", 300 + 100 * i)
    return tmp_path


def test_a_row_is_a_pair(pairs: Path) -> None:
    data = table_of(pairs)
    batch = data.train().fetch([0, 1, 2, 3])
    assert data.classes() == ("cat", "dog")
    assert batch["label"].tolist() == [0, 1, 1, -1]
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 50, 100, 0]
    assert batch["audio"].shape == (4, 800)
    assert data.val() is None
    assert data.test() is not None


def test_captions_of_a_table_become_vectors(pairs: Path) -> None:
    table = "image,audio,caption,label\n0.png,0.wav,A cat.,cat\n1.png,1.wav,,dog\n2.png,2.wav,Two cats.,cat\n"
    data = table_of(pairs, table, text={"ngrams": 64})
    batch = data.train().fetch([0, 1, 2])
    assert batch["text"].norm(dim=1).tolist() == pytest.approx([1, 0, 1])
    assert batch["text"][0] @ batch["text"][2] > 0.2
    assert data.facts().streams["text"].kind == "vector"
    other = table_of(pairs, table.replace("Two", "Three"), text={"ngrams": 64})
    assert other.fingerprint() != data.fingerprint()


def test_stored_vectors_of_a_table_are_found_by_the_path_of_the_image(pairs: Path) -> None:
    np.save(pairs / "v.npy", np.eye(3, dtype=np.float32))
    (pairs / "v.txt").write_text("2\n1\n0\n")
    stored = {"file": str(pairs / "v.npy"), "index": str(pairs / "v.txt")}
    data = table_of(pairs, "image,label\n0.png,cat\n2.png,dog\n", text=stored)
    assert data.train().fetch([0, 1])["text"].tolist() == [[0, 0, 1], [1, 0, 0]]
    with pytest.raises(DataError, match=r"pairs\.csv row 3: .*v\.npy has no vector for '3'"):
        _ = table_of(pairs, "image,label\n0.png,cat\n3.png,dog\n", text=stored).splits


def test_vectors_of_captions_need_a_column_of_captions(pairs: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.text: .*pairs\.csv has no column 'caption'"):
        table_of(pairs, text={})


def test_masks_say_what_a_row_lacks(pairs: Path) -> None:
    data = table_of(pairs)
    batch = data.on_device(data.train().fetch([0, 1, 2, 3]), None)
    assert batch["image_present"].tolist() == [True, True, True, False]
    assert batch["audio_present"].tolist() == [True, True, False, True]
    assert batch["audio"][2].count_nonzero() == 0
    assert not batch["audio_mask"][2].any()
    assert data.facts().streams["audio_present"].kind == "mask"


def test_what_is_absent_does_not_count_for_statistics(pairs: Path) -> None:
    about = table_of(pairs).facts().streams
    assert about["image"].mean == pytest.approx(((0 + 50 + 100) / 3 / 255,))
    assert about["audio"].std == pytest.approx((0.5 / 2**0.5,), rel=0.02)


def test_a_table_of_one_modality_has_no_other_streams(pairs: Path) -> None:
    data = table_of(pairs, "audio\n0.wav\n1.wav\n")
    assert set(data.facts().streams) == {"audio", "audio_mask"}
    assert data.facts().classes == ()
    assert data.train().labels is None
    data = table_of(pairs, "image,label\n0.png,10\n1.png,9\n")
    assert set(data.facts().streams) == {"image", "label"}
    assert data.classes() == ("9", "10")


def test_paths_are_relative_to_the_table_where_no_folder_is_given(pairs: Path) -> None:
    data = table_of(pairs, "image,audio\npictures/0.png,sounds/0.wav\n", images=None, sounds=None)
    assert data.train().fetch([0])["audio"].abs().max() > 0.4


def test_options_of_any_data_set_work_on_pairs(pairs: Path) -> None:
    splits = make_splits(table_of(pairs), SplitOptions(labelled=2, validation=0))
    assert sorted(splits.facts.labels) == [-1, -1, 0, 1]
    assert splits.test is not None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("9.png,0.wav,cat,train", r"pairs\.csv row 7: .*9\.png: there is no such file"),
        ("0.png,9.wav,cat,train", r"pairs\.csv row 7: .*9\.wav: there is no such file"),
        ("pairs.txt,,cat,train", r"row 7: .*pairs\.txt: cannot be read as an image"),
        ("0.png,../pictures/0.png,cat,train", r"row 7: .*0\.png: cannot be read as sound"),
        ("4.png,,dog,train", r"row 6: 4\.png is in test, and in train in row 7; a file belongs to one split"),
        (",4.wav,dog,train", r"row 6: 4\.wav is in test, and in train in row 7"),
        ("../pictures/4.png,,dog,train", r"row 6: 4\.png is in test, and in train in row 7"),
        ("0.png,,dog,train", r"row 7: 0\.png has the label 'dog', and 'cat' in row 2"),
        ("3.png,,bird,test", r"row 7: found the label 'bird', which no training row has; .*cat, dog"),
        ("3.png,,cat,tset", r"row 7: found the split 'tset'; did you mean 'test'"),
        (",,cat,train", "row 7: it names neither an image nor a clip"),
        ("3.png,cat", "row 7: found 2 cells, expected 4 as in the header"),
    ],
)
def test_a_wrong_row_is_named(pairs: Path, row: str, message: str) -> None:
    (pairs / "pictures" / "pairs.txt").write_text("words")
    with pytest.raises(DataError, match=message):
        table_of(pairs, TABLE + row + "\n").facts()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("picture,sound\n0.png,0.wav\n", "row 1: found picture, sound; expected a column 'image', a column 'audio'"),
        ("image,lable\n0.png,cat\n", "row 1: found the column 'lable'; did you mean 'label'"),
        ("image,image\n0.png,0.png\n", "row 1: the column 'image' is there 2 times"),
        ("image,split\n0.png,test\n", "has no row for training"),
        ("", "row 1: found nothing"),
        ("image,audio\n0.png,\n1.png,\n", "rows 2 to 3: no row of train has audio"),
        (
            "image,audio,split\n0.png,0.wav,train\n1.png,,test\n",
            "rows 3 to 3: no row of test has audio; `data.allow_absent: true`",
        ),
    ],
)
def test_a_wrong_table_is_refused(pairs: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        table_of(pairs, text)


def test_a_modality_may_be_absent_from_testing_if_that_is_said(pairs: Path) -> None:
    data = table_of(pairs, "image,audio,split\n0.png,0.wav,train\n1.png,,test\n", allow_absent=True)
    test = data.test()
    assert test is not None
    assert test.fetch([0])["audio_present"].tolist() == [False]


def test_options_for_a_column_that_is_not_there_are_refused(pairs: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.mel: .*pairs\.csv has no column 'audio'"):
        table_of(pairs, "image\n0.png\n", mel={})
    with pytest.raises(ConfigError, match=r"data.augment.gain: it is for audio, a column that .* lacks"):
        table_of(pairs, "image\n0.png\n", augment={"gain": {}})
    with pytest.raises(ConfigError, match=r"data.augment.flip: it is for image, a column that .* lacks"):
        table_of(pairs, "audio\n0.wav\n", augment={"flip": {}})


def test_an_index_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.index: .*nowhere\.csv cannot be read"):
        Paired(Paired.Config(index=str(tmp_path / "nowhere.csv")))


def test_the_fingerprint_of_pairs_follows_pairing_and_not_place(pairs: Path) -> None:
    before = table_of(pairs).fingerprint()
    swapped = TABLE.replace("0.png,0.wav", "0.png,1.wav").replace("1.png,1.wav", "1.png,0.wav")
    assert table_of(pairs, swapped).fingerprint() != before
    moved = pairs.rename(pairs.parent / f"{pairs.name}-moved")
    assert table_of(moved).fingerprint() == before


def test_a_network_that_sees_learns_from_pairs_and_hears_nothing(pairs: Path) -> None:
    """The whole way: a table of a person's own files, a teacher that hears, a student that sees."""
    table_of(pairs, TABLE + "3.png,,cat,test\n")
    net = {"use": "timm", "model": "resnet10t", "args": {"layers": [1] * 4, "channels": [8] * 4, "stem_width": 8}}
    result = kdx.run(
        {
            "out": str(pairs / "runs"),
            "data": {
                "use": "paired",
                "index": str(pairs / "pairs.csv"),
                "images": str(pairs / "pictures"),
                "sounds": str(pairs / "sounds"),
                "rate": RATE,
                "size": 32,
                "validation": 0,
                "mel": {},
            },
            "student": {**net, "input": "image"},
            "teachers": {"ear": {**net, "input": "mel"}},
            "losses": {"ce": {"use": "cross_entropy"}, "kd": {"use": "kd", "inputs": {"teacher": "ear.logits"}}},
            "train": {"epochs": 1, "batch": 4},
            "baseline": False,
        }
    )
    student = kdx.load_student(result.folder)
    assert student.streams == ("image",)
    assert student(torch.rand(2, 1, 32, 32)).shape == (2, 2)


def test_a_student_that_hears_is_deployed_with_its_sample_rate(clips: Path) -> None:
    result = kdx.run(
        {
            "out": str(clips.parent / "runs"),
            "data": {"use": "audio_folder", "path": str(clips), "rate": RATE, "validation": 0, "augment": {"gain": {}}},
            "student": {"use": "wave_cnn", "input": ["audio", "audio_mask"], "channels": [4], "strides": [16]},
            "losses": {"ce": {"use": "cross_entropy"}},
            "train": {"epochs": 1, "batch": 3},
            "baseline": False,
        }
    )
    assert read_header(result.folder / "student.safetensors")["facts"]["streams"]["audio"]["rate"] == RATE
    student = kdx.load_student(result.folder)
    assert student.streams == ("audio", "audio_mask")
    waves = torch.rand(2, 800)
    assert student(waves, torch.ones(2, 800, dtype=torch.bool)).shape == (2, 2)
