"""Whatever stands in a file that is read, it is used or refused: no traceback, no hang, no code that is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import warnings
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzzing import VALUES, cases, damaged, well_behaved, written
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sample_run import sample_result
from torch import nn

from kdx.builtin.audio_folder import AudioFolder
from kdx.builtin.image_folder import ImageFolder
from kdx.builtin.paired import Paired
from kdx.cache import Meta, Writer, fields_of, open_store
from kdx.checkpoint import load_state, load_weights, read_weights, save_weights
from kdx.errors import CheckpointError, DataError, KdxError
from kdx.result import from_json, to_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 2)


def saved(name: str) -> bytes:
    """The bytes of a file of weights or of a state."""
    buffer = io.BytesIO()
    if name == "state.pt":
        torch.save({"step": 3, "learner": net().state_dict()}, buffer)
    else:
        torch.save(net().state_dict(), buffer, _use_new_zipfile_serialization=name != "old.pt")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def safe(folder: Path) -> bytes:
    save_weights(net(), folder / "whole.safetensors")
    return (folder / "whole.safetensors").read_bytes()


@cases(500)
@given(data=st.data())
def test_damaged_safetensors_are_loaded_or_refused(folder: Path, safe: bytes, data: st.DataObject) -> None:
    path = written(folder / "damaged.safetensors", data.draw(damaged(safe) | st.binary(max_size=64)))
    with well_behaved():
        load_weights(net(), path, "student.checkpoint")


@pytest.mark.parametrize("name", ["new.pt", "old.pt"])
@cases(250)
@given(data=st.data())
def test_damaged_weights_of_torch_are_loaded_or_refused(folder: Path, name: str, data: st.DataObject) -> None:
    path = written(folder / name, data.draw(damaged(saved(name)) | st.binary(max_size=64)))
    with well_behaved():
        load_weights(net(), path, "student.checkpoint")


@cases(300)
@given(data=st.data())
def test_a_damaged_state_is_passed_over_or_refused(folder: Path, data: st.DataObject) -> None:
    own = folder / "state"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    written(own / "last.pt", data.draw(damaged(saved("state.pt")) | st.binary(max_size=64)))
    with well_behaved(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it says that it goes on from the state before
        found = load_state(own)
        assert isinstance(found, dict)


class Harm:
    """What runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def harmful(kind: str, trace: Path, path: Path) -> None:
    """Write a file that holds code, in one of the forms that torch reads."""
    content: Any = {"weight": torch.zeros(2), "harm": Harm(trace)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "archive")


@pytest.mark.parametrize("kind", ["pickle", "archive", "legacy"])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    trace = tmp_path / "trace"
    harmful(kind, trace, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights\.pt"):
        read_weights(tmp_path / "weights.pt")
    harmful(kind, trace, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt is not usable"):
        load_state(tmp_path)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Harm(trace)))
    assert trace.exists(), "it would have left a trace"


@cases(600)
@given(content=damaged(to_json(sample_result()).encode()))
def test_a_damaged_result_is_read_or_refused(content: bytes) -> None:
    with well_behaved():
        from_json(content.decode("utf-8", "replace"))


@cases(300)
@given(data=st.data())
def test_a_result_with_wrong_values_is_read_or_refused(data: st.DataObject) -> None:
    found = json.loads(to_json(sample_result()))
    found[data.draw(st.sampled_from(sorted(found)))] = data.draw(VALUES)
    with well_behaved():
        from_json(json.dumps(found))


@pytest.fixture(scope="module")
def cache(folder: Path) -> Path:
    answers = {"logits": torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), "mid": torch.zeros(8, 2, 2)}
    meta = Meta({"teacher": "abc"}, fields_of(answers, torch.float16, top=2), samples=8, views=1, block=4)
    writer = Writer(folder / "cache", meta)
    for block in range(meta.blocks):
        writer.write(block, {name: value[4 * block : 4 * block + 4] for name, value in answers.items()})
    writer.sync()
    writer.close()
    return folder / "cache"


@cases(400)
@given(data=st.data())
def test_a_damaged_cache_is_read_or_refused(cache: Path, data: st.DataObject) -> None:
    own = cache.with_name("damaged")
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(cache, own)
    path = data.draw(st.sampled_from(sorted(own.iterdir())))
    written(path, data.draw(damaged(path.read_bytes()) | st.binary(max_size=64)))
    with well_behaved():
        store = open_store(own, verify=True)
        if store is not None:
            rows = torch.arange(min(store.meta.rows, 8))
            store.rows(rows, tuple(store.meta.files))


@cases(200)
@given(key=st.sampled_from(("schema", "parts", "fields", "samples", "views", "block")), value=VALUES)
def test_a_cache_that_says_something_else_of_itself_is_read_or_refused(cache: Path, key: str, value: Any) -> None:
    own = cache.with_name("changed")
    shutil.rmtree(own, ignore_errors=True)
    shutil.copytree(cache, own)
    about = json.loads((own / "meta.json").read_text())
    (own / "meta.json").write_text(json.dumps({**about, key: value}))
    with well_behaved():
        open_store(own, verify=True)


def pictures() -> dict[str, bytes]:
    """A small picture in each form."""
    grey = np.arange(144, dtype=np.uint8).reshape(12, 12)
    found = {}
    for kind in ("png", "jpeg", "gif", "bmp", "webp", "tiff", "ppm"):
        buffer = io.BytesIO()
        Image.fromarray(grey).save(buffer, kind)
        found[kind] = buffer.getvalue()
    return found


@cases(500)
@given(data=st.data())
def test_a_damaged_picture_is_read_or_refused(folder: Path, data: st.DataObject) -> None:
    own = folder / "pictures" / "class"
    own.mkdir(parents=True, exist_ok=True)
    kind, whole = data.draw(st.sampled_from(sorted(pictures().items())))
    written(own / "good.png", pictures()["png"])
    path = written(own / f"any.{kind}", data.draw(damaged(whole) | st.binary(max_size=40)))
    try:
        with well_behaved():
            data_set = ImageFolder(ImageFolder.Config(str(own.parent), size=8, channels="1"))
            batch = data_set.train().fetch([0, 1])
            assert batch["image"].shape == (2, 1, 8, 8)
    finally:
        path.unlink()


def sound() -> bytes:
    """A tenth of a second as a file."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(800)
        file.writeframes((1000 * np.sin(np.arange(80))).astype("<i2").tobytes())
    return buffer.getvalue()


@cases(300)
@given(content=damaged(sound()) | st.binary(max_size=60))
def test_a_damaged_sound_file_is_read_or_refused(folder: Path, content: bytes) -> None:
    own = folder / "sounds" / "class"
    own.mkdir(parents=True, exist_ok=True)
    written(own / "good.wav", sound())
    written(own / "any.wav", content)
    with well_behaved():
        data_set = AudioFolder(AudioFolder.Config(str(own.parent), rate=800, resample=False, length=0.05))
        batch = data_set.train().fetch([0, 1])
        assert batch["audio"].shape == (2, 40)


CELLS = 'ab.png,cat\n"\\/\x00;'
TABLE = b"image,label\na.png,cat\nb.png,dog\na.png,cat\n"


@cases(400)
@given(content=damaged(TABLE) | st.text(alphabet=CELLS, max_size=60).map(str.encode) | st.binary(max_size=40))
def test_a_damaged_table_of_pairs_is_read_or_refused(folder: Path, content: bytes) -> None:
    own = folder / "pairs"
    own.mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        written(own / name, pictures()["png"])
    path = written(own / "train.csv", content)
    with well_behaved():
        data_set = Paired(Paired.Config(str(path), size=8))
        data_set.train().fetch(range(len(data_set.train())))


def test_a_picture_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "class"
    own.mkdir()
    header = b"P5\n200000 200000\n255\n"
    written(own / "huge.pgm", header)
    with pytest.raises((DataError, KdxError), match=r"huge\.pgm"):
        ImageFolder(ImageFolder.Config(str(tmp_path), size=8, channels="1")).train().fetch([0])
