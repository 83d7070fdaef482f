"""What belongs to a stamp, and which stamps belong together."""

from __future__ import annotations

from pathlib import Path

import pytest
from stamp_folder import clip, stamp, stamps

from kdx.builtin.stamps import groups_of, read_captions, read_stamps, same_files_once, spread_groups
from kdx.errors import DataError


def test_a_stamp_is_a_picture_with_a_caption_and_perhaps_a_sound(tmp_path: Path) -> None:
    found = read_stamps(stamps(tmp_path), "fr", svg=False)
    assert [stamp.name for stamp in found[:2]] == ["animals/pets/cat0", "animals/pets/cat1"]
    assert found[0].category == "animals"
    assert found[0].captions == {"en": "A cat of kind 0.", "fr": "Le A cat of kind 0."}
    assert found[0].sound == tmp_path / "animals/pets/cat0_desc_fr.wav"
    assert [stamp.name for stamp in found if stamp.sound is None] == ["food/cake9"]


def test_a_sound_belongs_to_the_stamp_of_its_whole_name(tmp_path: Path) -> None:
    stamp(tmp_path, "space/moon", "The moon.", shade=1)
    stamp(tmp_path, "space/moon-2", "The new moon.", shade=2, spoken=300)
    clip(tmp_path / "space/moon.wav", 500)
    assert [s.sound for s in read_stamps(tmp_path, "fr", svg=False)] == [tmp_path / "space/moon-2_desc_fr.wav", None]
    assert [s.sound for s in read_stamps(tmp_path, "effect", svg=False)] == [None, tmp_path / "space/moon.wav"]


def test_a_spoken_caption_without_a_language_is_english(tmp_path: Path) -> None:
    stamp(tmp_path, "space/moon", "The moon.", shade=1)
    clip(tmp_path / "space/moon_desc.wav", 500)
    clip(tmp_path / "space/moon_desc_pt_BR.wav", 600)
    assert read_stamps(tmp_path, "en", svg=False)[0].sound == tmp_path / "space/moon_desc.wav"
    assert read_stamps(tmp_path, "pt_BR", svg=False)[0].sound == tmp_path / "space/moon_desc_pt_BR.wav"


def test_drawings_count_only_where_they_are_asked_for(tmp_path: Path) -> None:
    stamp(tmp_path, "space/moon", "The moon.", shade=1, spoken=300)
    (tmp_path / "space/sun.svg").write_text("<svg/>")
    (tmp_path / "space/sun.txt").write_text("The sun.\n")
    assert [s.name for s in read_stamps(tmp_path, "fr", svg=False)] == ["space/moon"]
    assert [s.picture.name for s in read_stamps(tmp_path, "fr", svg=True)] == ["moon.png", "sun.svg"]


def test_pictures_clips_and_captions_in_common_make_a_group(tmp_path: Path) -> None:
    found = read_stamps(stamps(tmp_path), "fr", svg=False)
    assert [[found[i].name for i in group] for group in groups_of(found) if len(group) > 1] == [
        ["animals/pets/cat0", "animals/pets/cat1"]  # one clip, told by its content
    ]
    stamp(tmp_path, "food/other", "CAKE 1.", shade=250)  # the caption of cake1
    stamp(tmp_path, "food/another", "Another.", shade=110)  # the picture of cake1
    found = read_stamps(tmp_path, "fr", svg=False)
    names = [{found[i].name for i in group} for group in groups_of(found)]
    assert {"food/cake1", "food/other", "food/another"} in names


def test_the_same_clip_is_one_clip(tmp_path: Path) -> None:
    found = same_files_once(read_stamps(stamps(tmp_path), "fr", svg=False))
    assert len(found) == 19
    assert len(set(found.values())) == 18
    assert found[tmp_path / "animals/pets/cat1_desc_fr.wav"] == tmp_path / "animals/pets/cat0_desc_fr.wav"


def test_groups_stay_whole_and_each_category_is_shared_out(tmp_path: Path) -> None:
    found = read_stamps(stamps(tmp_path), "fr", svg=False)
    splits = spread_groups(found, {"val": 0.1, "test": 0.3})
    assert sorted(i for positions in splits.values() for i in positions) == list(range(20))
    for group in groups_of(found):
        assert sum(bool(set(group) & set(positions)) for positions in splits.values()) == 1
    assert {name: [found[i].category for i in positions].count("food") for name, positions in splits.items()} == {
        "train": 6,
        "val": 1,
        "test": 3,
    }


def test_a_category_of_one_thing_is_for_training(tmp_path: Path) -> None:
    stamp(tmp_path, "space/moon", "The moon.", shade=1, spoken=300)
    found = read_stamps(tmp_path, "fr", svg=False)
    assert spread_groups(found, {"test": 0.9}) == {"train": [0], "test": []}


def test_captions_of_a_file_are_told_apart_by_language(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(
        "\ufeffA cat.\nde.utf8=Eine Katze.\nca@valencia.utf8=Un gat.\nnothing\nfr.utf8=\n", encoding="utf-8"
    )
    assert read_captions(file) == {"en": "A cat.", "de": "Eine Katze.", "ca@valencia": "Un gat."}


@pytest.mark.parametrize(("content", "match"), [(b"\n", "no first line"), (b"caf\xe9\n", r"a\.txt: cannot be read")])
def test_a_bad_caption_is_named_by_its_file(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=match):
        read_captions(tmp_path / "a.txt")


def test_folders_without_stamps_and_sounds_that_no_stamp_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root: .*nowhere is not a folder"):
        read_stamps(tmp_path / "nowhere", "fr", svg=False)
    with pytest.raises(DataError, match="has no stamps; expected folders with pairs"):
        read_stamps(tmp_path, "fr", svg=False)
    with pytest.raises(DataError, match=r"data\.sound: no stamp .* has 'fra'; did you mean 'fr'\?"):
        read_stamps(stamps(tmp_path), "fra", svg=False)
