"""The built-in image data sets and augmentations."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Subset
from torch.utils.data import TensorDataset as TorchTensors

from kdx.builtin import images
from kdx.builtin.augment import AUGMENTATIONS, Crop, Erase, Flip, Mixup, Shift, read_augment
from kdx.builtin.image_folder import ImageFolder
from kdx.builtin.images import FILE, FashionMnist
from kdx.builtin.make_fashion_mnist import choose, make
from kdx.builtin.tensor_data import TensorDataset
from kdx.builtin.timm_images import TimmReader
from kdx.builtin.torchvision_images import TorchvisionDataset
from kdx.components import Split
from kdx.data import SplitOptions, TensorSplit, make_splits
from kdx.errors import ConfigError, DataError
from kdx.loader import in_order
from kdx.randomness import Randomness


def whole(split: Split | None) -> dict[str, Tensor]:
    assert split is not None
    return split.fetch(range(len(split)))


def save(path: Path, content: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = content if isinstance(content, Image.Image) else Image.fromarray(np.asarray(content, dtype=np.uint8))
    picture.save(path, **options)
    return path


def grey(value: int, height: int = 6, width: int = 6) -> Any:
    return np.full((height, width), value, dtype=np.uint8)


def colour(*value: int, height: int = 6, width: int = 6) -> Any:
    return np.full((height, width, 3), value, dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three ants and two bees in colour, in class folders."""
    for i, value in enumerate((10, 20, 30)):
        save(tmp_path / "pets" / "ant" / f"{i}.png", colour(value, 0, 0))
    for i, value in enumerate((200, 220)):
        save(tmp_path / "pets" / "bee" / f"{i}.png", colour(0, value, 0))
    return tmp_path / "pets"


# ---- Fashion-MNIST


def test_the_shipped_images_are_balanced_and_grey() -> None:
    data = FashionMnist(FashionMnist.Config())
    train, test = whole(data.train()), whole(data.test())
    assert train["image"].shape == (8000, 1, 28, 28)
    assert test["image"].shape == (2000, 1, 28, 28)
    assert train["image"].dtype == torch.uint8
    assert train["label"].bincount().tolist() == [800] * 10
    assert test["label"].bincount().tolist() == [200] * 10
    assert data.val() is None
    assert len(data.classes()) == 10


def test_the_shipped_file_is_small_quick_and_of_known_content() -> None:
    images._read.cache_clear()
    started = time.process_time()
    data = FashionMnist(FashionMnist.Config())
    data.train()
    assert time.process_time() - started < 2  # a third of a second alone on a core
    assert FILE.stat().st_size < 4e6
    assert data.fingerprint() == "d6daf8a8ee0c0de4148f7aa9d1097f8230f52bd125523f271e41a23681b8ac3f"


def test_the_shipped_images_are_unpacked_once_and_a_changed_batch_changes_none() -> None:
    one, other = (FashionMnist(FashionMnist.Config()).train() for _ in range(2))
    assert isinstance(one, TensorSplit)
    assert isinstance(other, TensorSplit)
    assert one.tensors["image"].data_ptr() == other.tensors["image"].data_ptr()
    before = other.fetch([0, 1])["image"]
    one.fetch([0, 1])["image"].fill_(0)
    assert torch.equal(other.fetch([0, 1])["image"], before)


def test_no_test_image_is_a_training_image() -> None:
    data = FashionMnist(FashionMnist.Config())
    train, test = (
        {image.numpy().tobytes() for image in whole(split)["image"]} for split in (data.train(), data.test())
    )
    assert not train & test


def test_the_statistics_of_the_shipped_images_are_their_own() -> None:
    data = FashionMnist(FashionMnist.Config())
    facts = data.facts().streams["image"]
    pixels = whole(data.train())["image"].double() / 255
    assert facts.shape == (1, 28, 28)
    assert facts.mean == pytest.approx((pixels.mean().item(),))
    assert facts.std == pytest.approx((pixels.std(unbiased=False).item(),), rel=1e-6)
    assert data.facts().classes[0] == "t-shirt"


def write_idx(folder: Path, part: str, images: Any, labels: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">4i", 0x803, *images.shape)
    (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    header = struct.pack(">2i", 0x801, len(labels))
    (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + labels.tobytes()))


def test_the_shipped_file_is_made_the_same_each_time(tmp_path: Path) -> None:
    batch = FashionMnist(FashionMnist.Config()).test().fetch(range(100))
    images, labels = batch["image"][:, 0].numpy(), batch["label"].numpy().astype(np.uint8)
    for part in ("train", "t10k"):
        write_idx(tmp_path / "idx", part, images, labels)
    for name in ("a", "b"):
        make(tmp_path / "idx", tmp_path / name, {"train": 5, "t10k": 2})
    first, second = ((tmp_path / name).read_bytes() for name in ("a", "b"))
    assert first == second
    chosen = choose(labels, 5)
    assert labels[chosen].tolist() == [*range(10)] * 5
    assert len(set(chosen.tolist())) == 50


# ---- image_folder


def test_class_folders_become_labels_in_alphabetical_order(folder: Path) -> None:
    data = ImageFolder(ImageFolder.Config(str(folder), size=4))
    assert data.classes() == ("ant", "bee")
    assert whole(data.train())["label"].tolist() == [0, 0, 0, 1, 1]
    assert whole(data.train())["image"].shape == (5, 3, 4, 4)
    assert data.test() is None
    facts = data.facts()
    assert facts.streams["image"].shape == (3, 4, 4)
    assert facts.streams["image"].mean == pytest.approx((12 / 255, 84 / 255, 0))


def test_split_folders_are_used_and_their_labels_follow_training(folder: Path) -> None:
    root = folder.parent / "split"
    root.mkdir()
    folder.rename(root / "train")
    save(root / "valid" / "bee" / "x.png", colour(1, 2, 3))
    save(root / "test" / "bee" / "x.png", colour(1, 2, 3))
    data = ImageFolder(ImageFolder.Config(str(root), size=4))
    assert whole(data.val())["label"].tolist() == [1]
    assert whole(data.test())["label"].tolist() == [1]
    assert len(make_splits(data, SplitOptions()).train) == 5


def test_a_class_may_be_called_train(folder: Path) -> None:
    save(folder / "train" / "0.png", colour(0, 0, 9))
    assert ImageFolder(ImageFolder.Config(str(folder))).classes() == ("ant", "bee", "train")


def test_grey_files_give_one_channel_and_one_coloured_file_three(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "grey" / "a" / "0.png", grey(7))
    save(tmp_path / "grey" / "b" / "0.png", grey(9))
    config = ImageFolder.Config(str(tmp_path / "grey"), size=2)
    assert whole(ImageFolder(config).train())["image"].flatten(1).tolist() == [[7] * 4, [9] * 4]
    save(tmp_path / "grey" / "b" / "1.png", colour(1, 2, 3))
    assert whole(ImageFolder(config).train())["image"].shape == (3, 3, 2, 2)


@pytest.mark.parametrize(("channels", "found"), [("1", 1), ("3", 3)])
def test_the_number_of_channels_can_be_set(folder: Path, channels: str, found: int) -> None:
    data = ImageFolder(ImageFolder.Config(str(folder), channels=channels))
    assert data.facts().streams["image"].shape == (found, 64, 64)


def test_files_are_read_as_a_person_sees_them(tmp_path: Path) -> None:
    half = colour(0, 0, 0, height=8, width=4)
    half[:4] = 255
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    deep = Image.fromarray(np.full((8, 8), 0x80FF, dtype=np.uint16))
    save(tmp_path / "a" / "0.jpg", half, exif=turned, quality=100)
    save(tmp_path / "a" / "1.png", Image.fromarray(clear))
    save(tmp_path / "a" / "2.png", deep)
    save(tmp_path / "a" / "3.gif", Image.fromarray(grey(200, 8, 8)).convert("P"))
    images = whole(ImageFolder(ImageFolder.Config(str(tmp_path), size=4)).train())["image"].float()
    assert images[0, :, 0].mean() < 64 < 192 < images[0, :, -1].mean()  # turned
    assert (images[1] == 255).all()  # on white
    assert (images[2] == 0x80).all()  # the upper 8 of 16 bits
    assert (images[3] == 200).all()


def test_the_middle_of_an_oblong_image_is_kept(tmp_path: Path) -> None:
    wide = colour(0, 0, 0, height=4, width=12)
    wide[:, 4:8] = 250
    save(tmp_path / "a" / "0.png", wide)
    assert (whole(ImageFolder(ImageFolder.Config(str(tmp_path), size=4)).train())["image"] == 250).all()


def test_files_that_are_no_images_and_hidden_ones_are_left_out(folder: Path) -> None:
    (folder / "ant" / "notes.txt").write_text("ants")
    save(folder / "ant" / ".thumbnails" / "0.png", colour(1, 1, 1))
    (folder / ".cache").mkdir()
    save(folder / "ant" / "deeper" / "4.JPG", colour(40, 0, 0))
    assert len(ImageFolder(ImageFolder.Config(str(folder))).train()) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupted_image_is_an_error_that_names_its_file(folder: Path, workers: int) -> None:
    file = folder / "bee" / "1.png"
    file.write_bytes(file.read_bytes()[:-30])
    data = ImageFolder(ImageFolder.Config(str(folder), channels="3"))
    with pytest.raises(DataError, match=r"bee.1\.png: cannot be read"):
        list(in_order(data.train(), 2, workers))


def test_a_file_that_only_looks_like_an_image_is_an_error_that_names_it(folder: Path) -> None:
    (folder / "bee" / "2.png").write_text("no image")
    with pytest.raises(DataError, match=r"bee.2\.png: cannot be read: UnidentifiedImageError"):
        ImageFolder(ImageFolder.Config(str(folder))).facts()


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.path: .*nowhere does not exist; expected a folder with one sub-folder"):
        ImageFolder(ImageFolder.Config(str(tmp_path / "nowhere")))


def test_a_folder_without_classes_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "0.png", grey(0))
    with pytest.raises(DataError, match=r"data.path: .* has no sub-folders; expected one per class"):
        ImageFolder(ImageFolder.Config(str(tmp_path))).train()


def test_a_class_without_images_is_an_error(folder: Path) -> None:
    (folder / "cow").mkdir()
    with pytest.raises(DataError, match=r"cow holds no image; expected files .bmp"):
        ImageFolder(ImageFolder.Config(str(folder))).train()


def test_a_test_class_that_training_lacks_is_an_error(folder: Path) -> None:
    root = folder.parent
    folder.rename(root / "train")
    save(root / "test" / "bees" / "x.png", colour(1, 2, 3))
    with pytest.raises(DataError, match=r"test.bees is no class of training; did you mean 'bee'\?"):
        ImageFolder(ImageFolder.Config(str(root))).train()


def test_split_folders_without_training_are_an_error(folder: Path) -> None:
    folder.rename(folder.parent / "test")
    with pytest.raises(DataError, match=r"has test but no folder 'train'"):
        ImageFolder(ImageFolder.Config(str(folder.parent)))


def test_wrong_options_of_an_image_folder_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.size: found 0, expected a number of pixels, 1 or more"):
        ImageFolder(ImageFolder.Config(str(folder), size=0))
    with pytest.raises(ConfigError, match=r"data.channels: found '4', expected one of auto, 1, 3"):
        ImageFolder(ImageFolder.Config(str(folder), channels="4")).train()


def test_the_fingerprint_of_a_folder_notices_changes_and_not_where_it_lies(folder: Path) -> None:
    def fingerprint(at: Path) -> str:
        return ImageFolder(ImageFolder.Config(str(at))).fingerprint()

    first = fingerprint(folder)
    moved = folder.rename(folder.parent / "moved")
    assert fingerprint(moved) == first
    file = moved / "ant" / "0.png"
    os.utime(file, ns=(0, 0))
    touched = fingerprint(moved)
    file.rename(moved / "ant" / "9.png")
    assert len({first, touched, fingerprint(moved)}) == 3


# ---- torchvision and timm


@pytest.fixture
def on_disk(tmp_path: Path) -> Path:
    """A small Fashion-MNIST in torchvision's layout."""
    data = FashionMnist(FashionMnist.Config())
    raw = tmp_path / "FashionMNIST" / "raw"
    for part, split in (("train", data.train()), ("t10k", data.test())):
        batch = split.fetch(range(20))
        write_idx(raw, part, batch["image"][:, 0].numpy(), batch["label"].numpy().astype(np.uint8))
        for file in list(raw.glob("*.gz")):
            file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
            file.unlink()
    return tmp_path


def test_a_torchvision_data_set_on_disk_is_read_into_memory(on_disk: Path) -> None:
    data = TorchvisionDataset(TorchvisionDataset.Config("FashionMNIST", str(on_disk)))
    shipped = FashionMnist(FashionMnist.Config()).train().fetch(range(20))
    assert isinstance(data.train(), TensorSplit)
    assert torch.equal(whole(data.train())["image"], shipped["image"])
    assert torch.equal(whole(data.train())["label"], shipped["label"])
    assert len(whole(data.test())["label"]) == 20
    assert data.val() is None
    assert data.classes()[9] == "Ankle boot"


def test_a_torchvision_data_set_can_be_scaled_and_coloured(on_disk: Path) -> None:
    config = TorchvisionDataset.Config("FashionMNIST", str(on_disk), size=14, channels="3")
    data = TorchvisionDataset(config)
    assert data.facts().streams["image"].shape == (3, 14, 14)
    assert whole(data.train())["image"].shape == (20, 3, 14, 14)
    assert (
        data.fingerprint() != TorchvisionDataset(TorchvisionDataset.Config("FashionMNIST", str(on_disk))).fingerprint()
    )


def test_an_absent_torchvision_data_set_is_an_error_and_nothing_is_downloaded(tmp_path: Path) -> None:
    data = TorchvisionDataset(TorchvisionDataset.Config("CIFAR100", str(tmp_path)))
    with pytest.raises(DataError, match=r"data.root: torchvision cannot read the train split of CIFAR100 .*download"):
        data.facts()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_torchvision_data_set_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"data.dataset: 'CIFAR101' is none of .* did you mean 'CIFAR10"):
        TorchvisionDataset(TorchvisionDataset.Config("CIFAR101", "."))


def test_a_download_that_torchvision_does_not_offer_is_an_error(tmp_path: Path) -> None:
    data = TorchvisionDataset(TorchvisionDataset.Config("ImageNet", str(tmp_path), download=True, size=8))
    with pytest.raises(ConfigError, match=r"data.download: torchvision cannot download ImageNet"):
        data.train()


def test_a_timm_reader_reads_split_folders(folder: Path) -> None:
    root = folder.parent
    folder.rename(root / "train")
    save(root / "validation" / "ant" / "x.png", colour(9, 9, 9))
    save(root / "validation" / "bee" / "x.png", colour(9, 9, 9))
    data = TimmReader(TimmReader.Config(str(root), val="validation", size=4))
    assert data.classes() == ("ant", "bee")
    assert whole(data.train())["label"].tolist() == [0, 0, 0, 1, 1]
    assert whole(data.val())["image"].shape == (2, 3, 4, 4)
    assert data.test() is None


def test_a_timm_reader_without_such_a_split_is_an_error(folder: Path) -> None:
    data = TimmReader(TimmReader.Config(str(folder), val="validation"))
    with pytest.raises(ConfigError, match=r"data.val: .* has no part 'validation' of its own"):
        data.train()


def test_a_timm_reader_with_other_classes_in_a_split_is_an_error(folder: Path) -> None:
    root = folder.parent
    folder.rename(root / "train")
    save(root / "test" / "bee" / "x.png", colour(9, 9, 9))
    with pytest.raises(DataError, match=r"data.test: the classes of 'test' \(bee\) are not those of training"):
        TimmReader(TimmReader.Config(str(root), test="test")).train()


def test_a_timm_reader_names_a_corrupted_file_instead_of_putting_another_in_its_place(folder: Path) -> None:
    file = folder / "ant" / "0.png"
    file.write_bytes(file.read_bytes()[:-30])
    data = TimmReader(TimmReader.Config(str(folder), channels="3"))
    with pytest.raises(DataError, match=r"ant.0\.png: cannot be read"):
        data.train().fetch([0])


@pytest.mark.parametrize("reader", ["", "torch/image_folder"])
def test_what_timm_cannot_read_by_number_is_an_error(tmp_path: Path, folder: Path, reader: str) -> None:
    root = str(folder if reader else tmp_path / "nowhere")
    expected = r"data.reader: timm's reader 'torch" if reader else r"data.root: timm's reader '' cannot read 'train'"
    with pytest.raises((ConfigError, DataError), match=expected):
        TimmReader(TimmReader.Config(root, reader)).train()


# ---- tensors


def test_tensors_from_python_become_splits_with_facts() -> None:
    images = torch.randint(0, 256, (12, 2, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(12) % 3
    data = TensorDataset.from_tensors(
        {"image": images, "label": labels}, test={"image": images[:4], "label": labels[:4]}
    )
    facts = data.facts()
    assert facts.classes == ("0", "1", "2")
    assert facts.streams["image"].mean == pytest.approx((images / 255).double().mean((0, 2, 3)).tolist())
    assert len(whole(data.test())["image"]) == 4
    assert data.val() is None


@pytest.mark.parametrize("channels", [1, 3, 9])
@pytest.mark.parametrize("as_floats", [False, True])
def test_statistics_are_those_of_all_values(channels: int, as_floats: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1500, channels, 2, 3), dtype=torch.uint8, generator=generator)
    values = images.double() / 255
    data = TensorDataset.from_tensors({"image": values.float() if as_floats else images})
    facts = data.facts().streams["image"]
    assert facts.mean == pytest.approx(values.mean((0, 2, 3)).tolist())
    assert facts.std == pytest.approx(values.transpose(0, 1).flatten(1).std(1, unbiased=False).tolist())


def test_a_constant_channel_does_not_make_a_normalised_image_infinite() -> None:
    facts = TensorDataset.from_tensors({"image": torch.zeros(3, 1, 2, 2)}).facts()
    assert facts.streams["image"].std == pytest.approx((1 / 255,))


def test_grey_arrays_get_a_channel_and_small_integer_labels_grow() -> None:
    data = TensorDataset.from_tensors(
        {"image": np.zeros((3, 5, 5), np.uint8), "label": np.array([0, 1, 1], np.uint8)}, classes=["no", "yes"]
    )
    batch = whole(data.train())
    assert batch["image"].shape == (3, 1, 5, 5)
    assert batch["label"].dtype == torch.int64
    assert data.classes() == ("no", "yes")


def test_vectors_are_not_augmented() -> None:
    values = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    data = TensorDataset.from_tensors(
        {"sound": values, "label": torch.zeros(6, dtype=torch.int64)}, augment={"flip": {}}
    )
    assert data.facts().streams["sound"].kind == "vector"
    batch = data.on_device(whole(data.train()), Randomness(0, 0, torch.arange(6)))
    assert torch.equal(batch["sound"], values)


def test_a_torch_data_set_of_pairs_is_read_sample_by_sample() -> None:
    images = torch.rand(5, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    pairs = TorchTensors(images, torch.tensor([0, 1, 0, 1, 1]))
    data = TensorDataset.from_tensors(pairs, test=Subset(pairs, [1, 4]))
    assert torch.equal(whole(data.train())["image"], images)
    assert whole(data.test())["label"].tolist() == [1, 1]
    assert data.facts().streams["image"].shape == (1, 3, 3)
    assert data.fingerprint() == TensorDataset.from_tensors(pairs, test=Subset(pairs, [1, 4])).fingerprint()
    assert data.fingerprint() != TensorDataset.from_tensors(pairs, test=Subset(pairs, [1, 3])).fingerprint()


def test_a_torch_data_set_may_give_pil_pictures(on_disk: Path) -> None:
    from torchvision.datasets import FashionMNIST

    source = FashionMNIST(str(on_disk))
    data = TensorDataset.from_tensors(source, classes=source.classes)
    assert torch.equal(whole(data.train())["image"][:, 0], source.data)
    assert torch.equal(whole(data.train())["label"], source.targets)


def test_a_torch_data_set_of_something_else_is_an_error() -> None:
    with pytest.raises(DataError, match=r"data: sample 0 of train: found tuple, expected a pair \(image, label\)"):
        TensorDataset.from_tensors(TorchTensors(torch.zeros(3, 1)))
    named: Any = [(torch.zeros(1, 2, 2), "cat")]
    with pytest.raises(DataError, match=r"data: sample 0 of train: found the label 'cat', expected the number"):
        TensorDataset.from_tensors(named)


def test_tensors_in_a_config_file_are_refused_with_the_way_to_hand_them_over() -> None:
    with pytest.raises(ConfigError, match=r"data.use: 'tensors' stands for data handed over in Python: kdx.run"):
        TensorDataset(TensorDataset.Config()).facts()


@pytest.mark.parametrize("change", ["pixel", "label", "type", "name"])
def test_the_fingerprint_of_tensors_follows_their_content(change: str) -> None:
    train: dict[str, Tensor] = {"image": torch.zeros(2, 1, 2, 2), "label": torch.tensor([0, 1])}
    first = TensorDataset.from_tensors(train).fingerprint()
    assert TensorDataset.from_tensors({k: v.clone() for k, v in train.items()}).fingerprint() == first
    if change == "pixel":
        train["image"] = train["image"] + torch.eye(2)
    elif change == "label":
        train["label"] = torch.tensor([1, 0])
    elif change == "type":
        train["image"] = train["image"].int()
    else:
        train["photo"] = train.pop("image")
    assert TensorDataset.from_tensors(train).fingerprint() != first


# ---- augmentation


def randomness(count: int = 64, view: int = 0, first: int = 0) -> Randomness:
    return Randomness(5, view, torch.arange(first, first + count))


def pictures(count: int = 64, size: int = 9) -> Tensor:
    return torch.rand(count, 2, size, size, generator=torch.Generator().manual_seed(0))


SINGLE = [name for name, kind in AUGMENTATIONS.items() if not kind.mixes]
"""The augmentations of one image at a time."""
ALL: Mapping[str, Any] = {name: {} for name in SINGLE}


def test_bytes_become_fractions_in_training_and_evaluation_alike() -> None:
    images = torch.tensor([[[[0, 51]], [[255, 102]]]], dtype=torch.uint8)
    data = TensorDataset.from_tensors({"image": images, "label": torch.tensor([0])})
    for draws in (None, randomness(1)):
        batch = data.on_device({"image": images, "index": torch.tensor([0])}, draws)
        assert batch["image"].flatten().tolist() == pytest.approx([0, 0.2, 1, 0.4])
        assert batch["index"].dtype == torch.int64


def test_evaluation_is_not_augmented() -> None:
    images = pictures()
    data = TensorDataset.from_tensors({"image": images, "label": torch.zeros(64).long()}, augment=ALL)
    assert torch.equal(data.on_device({"image": images}, None)["image"], images)
    assert not torch.equal(data.on_device({"image": images}, randomness())["image"], images)


@pytest.mark.parametrize("name", SINGLE)
def test_augmentation_of_a_sample_does_not_depend_on_its_company(name: str) -> None:
    images = pictures()
    (augment,) = read_augment({name: {}})
    together = augment(images, randomness())
    alone = augment(images[10:14], randomness(4, first=10))
    assert together.shape == images.shape
    torch.testing.assert_close(together[10:14], alone)
    is_the_same = torch.equal(augment(images, randomness(view=1)), together)
    assert is_the_same == (name == "rotate")  # which draws nothing
    assert together.min() >= 0
    assert together.max() <= 1


def test_flip_mirrors_about_half_of_the_images() -> None:
    images = pictures(1000)
    flipped = Flip()(images, randomness(1000))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    untouched = (flipped == images).flatten(1).all(1)
    assert (mirrored | untouched).all()
    assert 400 < mirrored.sum() < 600
    assert torch.equal(Flip(probability=0)(images, randomness(1000)), images)


def test_shift_moves_by_whole_pixels_and_fills_with_zeros() -> None:
    images = torch.zeros(500, 1, 7, 7)
    images[:, :, 3, 3] = 1
    moved = Shift(pixels=2)(images, randomness(500))
    places = moved[:, 0].nonzero()
    assert len(places) == 500
    assert sorted({(int(row), int(column)) for _, row, column in places}) == [
        (row, column) for row in range(1, 6) for column in range(1, 6)
    ]


def test_shift_further_than_the_image_leaves_zeros() -> None:
    moved = Shift(pixels=40)(torch.ones(100, 1, 4, 4), randomness(100))
    assert moved.flatten(1).sum(1).min() == 0


def test_a_crop_of_everything_is_the_image_itself() -> None:
    images = pictures()
    torch.testing.assert_close(Crop(least_area=1, stretch=1)(images, randomness()), images)


def test_a_crop_is_a_part_of_the_image_scaled_up() -> None:
    ramp = torch.linspace(0, 1, 32).expand(200, 1, 32, 32)
    cropped = Crop(least_area=0.25, stretch=1)(ramp, randomness(200))
    extent = cropped[:, 0, 0, -1] - cropped[:, 0, 0, 0]
    assert 0.45 < extent.min() < 0.6
    assert 0.9 < extent.max() <= 1
    assert (cropped.diff(dim=-1) >= -1e-6).all()


def test_erase_covers_a_rectangle_with_the_mean_colour() -> None:
    images = pictures(400)
    erased = Erase(probability=1, side=0.5)(images, randomness(400))
    changed = (erased != images).any(1)
    assert changed.flatten(1).sum(1).max() <= 25  # at most 5 of 9 pixels a side
    assert changed.flatten(1).any(1).float().mean() > 0.5
    rows, columns = changed.any(2), changed.any(1)
    assert torch.equal(changed, rows[:, :, None] & columns[:, None, :])
    mean = images.mean((-2, -1), keepdim=True).expand_as(images)
    assert torch.equal(erased[changed[:, None].expand_as(erased)], mean[changed[:, None].expand_as(mean)])
    assert torch.equal(Erase(probability=0)(images, randomness(400)), images)


def test_brightness_and_contrast_stay_within_their_range() -> None:
    images = torch.full((300, 1, 3, 3), 0.5)
    (bright,) = read_augment({"brightness_contrast": {"brightness": 0.2, "contrast": 0}})
    values = bright(images, randomness(300))[:, 0, 0, 0]
    assert 0.4 <= values.min() < 0.42
    assert 0.58 < values.max() <= 0.6
    (contrast,) = read_augment({"brightness_contrast": {"brightness": 0, "contrast": 0.5}})
    scaled = contrast(0.25 + 0.5 * pictures(300), randomness(300))
    torch.testing.assert_close(scaled.mean((1, 2, 3)), (0.25 + 0.5 * pictures(300)).mean((1, 2, 3)))


def test_mixup_lies_between_an_image_and_the_one_before_it() -> None:
    images = torch.arange(400.0).mul(7).remainder(400).div(400)[:, None, None, None].expand(400, 2, 3, 3)
    mixed = Mixup()(images, randomness(400))
    partner = images.roll(1, 0)
    ratios = ((mixed - partner) / (images - partner))[:, 0, 0, 0]
    torch.testing.assert_close(ratios, randomness(400).uniform("mixup"), rtol=0, atol=1e-3)
    assert ratios.min() < 0.02
    assert 0.45 < ratios.mean() < 0.55
    assert ratios.max() > 0.98
    assert not torch.equal(Mixup()(images, randomness(400, view=1)), mixed)


def test_mixup_with_a_ratio_of_1_keeps_the_image_and_of_0_gives_its_partner() -> None:
    images = pictures()
    assert torch.equal(Mixup(low=1)(images, randomness()), images)
    assert torch.equal(Mixup(high=0)(images, randomness()), images.roll(1, 0))
    half = Mixup(low=0.5, high=0.5)(images, randomness())
    torch.testing.assert_close(half, (images + images.roll(1, 0)) / 2)
    alone = images[:1]
    assert torch.equal(Mixup()(alone, randomness(1)), alone)


def test_mixup_is_refused_where_labels_are_read_too() -> None:
    message = (
        r"data.augment.mixup: it mixes images, and a label stays that of the unmixed one; put it into a view, "
        r"as in `data: \{views: \{mixed: \{augment: \{mixup: \{\}\}\}\}\}`, .* the loss mixed_cross_entropy"
    )
    with pytest.raises(ConfigError, match=message):
        FashionMnist(FashionMnist.Config(augment={"flip": {}, "mixup": {}}))
    images = {"image": pictures(), "label": torch.zeros(64).long()}
    with pytest.raises(ConfigError, match=message):
        TensorDataset.from_tensors(images, augment={"mixup": None})


def test_augmentations_run_in_the_order_given() -> None:
    images = pictures()
    there, back = read_augment({"shift": {}, "crop": {}}), read_augment({"crop": {}, "shift": {}})
    assert [type(step).__name__ for step in there] == ["Shift", "Crop"]
    first = there[1](there[0](images, randomness()), randomness())
    assert not torch.equal(first, back[1](back[0](images, randomness()), randomness()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flipp": {}}, r"data.augment.flipp: unknown augmentation; did you mean 'flip'\?"),
        ({"shift": {"pixel": 2}}, r"data.augment.shift.pixel: unknown option; did you mean 'pixels'\?"),
        ({"shift": {"pixels": "two"}}, r"data.augment.shift.pixels: found 'two'"),
        ({"shift": {"pixels": 0}}, r"data.augment.shift: pixels: found 0, expected 1 to 1024"),
        ({"flip": {"probability": 2}}, r"data.augment.flip: probability: found 2, expected 0 to 1"),
        ({"crop": {"least_area": 0}}, r"data.augment.crop: least_area: found 0, expected 0.01 to 1"),
        ({"mixup": {"high": 1.5}}, r"data.augment.mixup: high: found 1.5, expected 0 to 1"),
        ({"cutmix": {"high": -0.5}}, r"data.augment.cutmix: high: found -0.5, expected 0 to 1"),
        ({"cutmix": {"probability": 2}}, r"data.augment.cutmix: probability: found 2, expected 0 to 1"),
        ({"mixup": {"low": 0.5, "high": 0.2}}, r"data.augment.mixup: high: found 0.2, expected 0.5 to 1"),
        ({"flip": True}, r"data.augment.flip: found True, expected a mapping of options"),
    ],
)
def test_wrong_augmentations_are_refused(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FashionMnist(FashionMnist.Config(augment=dict(options)))


def test_augmentation_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    for step in read_augment(ALL):
        step(pictures(), randomness())
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_is_the_same_on_the_gpu(name: str) -> None:
    (augment,) = read_augment({name: {}})
    there = augment(pictures().cuda(), Randomness(5, 0, torch.arange(64).cuda()))
    torch.testing.assert_close(there.cpu(), augment(pictures(), randomness()), rtol=1e-4, atol=1e-5)


def test_the_licence_of_the_shipped_images_lies_beside_them() -> None:
    text = (FILE.parent / "FASHION_MNIST_LICENSE.txt").read_text()
    assert "Copyright (c) 2017 Zalando SE" in text
    assert "Permission is hereby granted, free of charge" in text
    assert hashlib.sha256(FILE.read_bytes()).hexdigest().startswith("7915afda")
