"""Vectors of texts, for the stream `text`: hashed n-grams, vectors stored in a file, or a transformer in a folder."""

from __future__ import annotations

import functools
import hashlib
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kdx.errors import ConfigError, DataError, did_you_mean
from kdx.options import read_options

Entry = tuple[str, str, str]
"""The key of a sample, its text, and where it stands, for errors."""
ENDINGS = (".npy", ".safetensors")


@dataclass(frozen=True)
class TextOptions:
    """`data.text`: a stream `text`, one vector `[D]` for each sample, of length 1 where it has a text.

    ngrams: the width D of hashed n-grams: words, and parts of words of 3 to 5 letters; needs nothing else.
    file: stored vectors in their place: `.npy` [N, D] with an `index`, a file with one key or text in each line; or
        `.safetensors`, one vector for each key or text. A key is the path of a sample's picture without its ending;
        a sample that has no vector by key or text is an error.
    model: a folder with a text model of `transformers` in their place; the mean over its tokens. Needs `kdx[text]`.
    """

    ngrams: int = 1024
    file: str | None = None
    index: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if self.ngrams < 2:
            raise ValueError(f"ngrams: found {self.ngrams}, expected a width of 2 or more")
        if self.file is not None and self.model is not None:
            raise ValueError("file: vectors are either stored in a file or made by a model, but both are given")
        if self.index is not None and not (self.file or "").endswith(".npy"):
            raise ValueError("index: it lists the rows of a `file` that ends in .npy, and there is none")


class Texts(ABC):
    """Makes the vectors of a data set."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """What, beside the texts, decides on the vectors."""

    @abstractmethod
    def raw(self, entries: Sequence[Entry]) -> Tensor:
        """One vector for each entry, float [N, D]."""

    def vectors(self, entries: Sequence[Entry]) -> Tensor:
        """Vectors of length 1, float [N, D]; 0 for an entry without a text."""
        return F.normalize(self.raw(entries).float(), dim=1)


@dataclass(frozen=True)
class Ngrams(Texts):
    """Counts of words and of parts of words of 3 to 5 letters, hashed to `width` places with signs.

    Damped as 1 + ln of the count. (Weinberger et al., ICML 2009; the parts are those of fastText, Bojanowski et al.,
    TACL 2017.)
    """

    width: int

    @property
    def digest(self) -> str:
        return f"ngrams {self.width}"

    def raw(self, entries: Sequence[Entry]) -> Tensor:
        found = torch.zeros(len(entries), self.width)
        for row, (_, text, _) in zip(found, entries, strict=True):
            counts: dict[str, int] = {}
            for part in parts_of(text):
                counts[part] = counts.get(part, 0) + 1
            for part, count in counts.items():
                code = int.from_bytes(hashlib.blake2b(part.encode(), digest_size=8).digest(), "big")
                row[(code >> 1) % self.width] += (1 + np.log(count)) * (1 if code & 1 else -1)
        return found


@dataclass(frozen=True)
class Stored(Texts):
    """Vectors from a file, by key or by text."""

    file: Path
    index: Path | None

    @property
    def digest(self) -> str:
        files = [self.file, *([] if self.index is None else [self.index])]
        return " ".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)

    def raw(self, entries: Sequence[Entry]) -> Tensor:
        names, table = self._table
        return torch.stack([self._find(entry, names, table) for entry in entries])

    def _find(self, entry: Entry, names: Mapping[str, int], table: Tensor) -> Tensor:
        key, text, where = entry
        if key not in names and text not in names:
            near = did_you_mean(key, names) if len(names) <= 20 else f"it has {len(names)} others"
            raise DataError(f"{where}: {self.file} has no vector for {key!r} or {text!r}; {near}")
        return table[names[key if key in names else text]]

    @functools.cached_property
    def _table(self) -> tuple[dict[str, int], Tensor]:
        try:
            names, table = self._read()
        except (OSError, ValueError, KeyError, RuntimeError, UnicodeDecodeError) as error:
            raise DataError(f"data.text.file: {self.file} cannot be read as vectors: {error}") from error
        except Exception as error:  # safetensors raises a class of its own
            raise DataError(f"data.text.file: {self.file} cannot be read: {type(error).__name__}: {error}") from error
        if table.ndim != 2 or not table.numel():
            raise DataError(f"data.text.file: {self.file} holds {list(table.shape)}, expected vectors [N, D]")
        if len(names) != len(table):
            raise DataError(
                f"data.text.index: {self.index} has {len(names)} different lines, but {self.file} has {len(table)} "
                "vectors; expected one line for each"
            )
        if not table.isfinite().all():
            row = int((~table.isfinite().all(1)).nonzero()[0])
            raise DataError(f"data.text.file: row {row} of {self.file} holds numbers that are not finite")
        return names, table

    def _read(self) -> tuple[dict[str, int], Tensor]:
        if self.index is None:
            from safetensors.torch import load_file

            tensors = load_file(self.file)
            return {name: row for row, name in enumerate(tensors)}, torch.stack([*tensors.values()]).float()
        lines = self.index.read_text(encoding="utf-8").splitlines()
        return {line: row for row, line in enumerate(lines)}, torch.from_numpy(
            np.load(self.file, allow_pickle=False)
        ).float()


@dataclass(frozen=True)
class Transformer(Texts):
    """The mean of a transformer's last hidden states over the tokens of a text, from weights in a folder."""

    folder: Path

    @property
    def digest(self) -> str:
        files = sorted(file for file in self.folder.iterdir() if file.is_file())
        return " ".join(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files)

    def raw(self, entries: Sequence[Entry]) -> Tensor:
        try:
            library = importlib.import_module("transformers")
        except ImportError as error:
            raise ConfigError(f"data.text.model: it needs transformers ({error}): pip install 'kdx[text]'") from error
        try:
            # Only what is in the folder: nothing is downloaded, and no code of the folder is run.
            tokenizer = library.AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
            model = library.AutoModel.from_pretrained(self.folder, local_files_only=True).eval()
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"data.text.model: {self.folder} holds no text model: {error}") from error
        texts = [text for _, text, _ in entries]
        return torch.cat([self._encode(tokenizer, model, texts[i : i + 32]) for i in range(0, len(texts), 32)])

    @torch.no_grad()
    def _encode(self, tokenizer: Any, model: Any, texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        hidden: Tensor = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][:, :, None].float()
        means: Tensor = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return means * torch.tensor([float(bool(text)) for text in texts])[:, None]


def read_texts(options: Mapping[str, Any] | None) -> Texts | None:
    """What makes the vectors that `data.text` asks for; None where it asks for none."""
    if options is None:
        return None
    read: TextOptions = read_options(TextOptions, options, "data.text")
    if read.model is not None:
        if not Path(read.model).is_dir():
            raise ConfigError(f"data.text.model: {read.model} is not a folder; expected one with a text model")
        return Transformer(Path(read.model))
    if read.file is None:
        return Ngrams(read.ngrams)
    for option, file in (("file", read.file), ("index", read.index)):
        if file is not None and not Path(file).is_file():
            raise ConfigError(f"data.text.{option}: there is no file {file}")
    if Path(read.file).suffix not in ENDINGS:
        raise ConfigError(f"data.text.file: found {read.file}, expected a file that ends in {' or '.join(ENDINGS)}")
    if read.file.endswith(".npy") and read.index is None:
        raise ConfigError("data.text.index: it is missing; expected a file with the key or text of each row of `file`")
    return Stored(Path(read.file), None if read.index is None else Path(read.index))


def parts_of(text: str) -> Iterator[str]:
    """The words of a text in small letters, and their parts of 3 to 5 letters with `<` and `>` at their ends."""
    kept = "".join(letter if letter.isalnum() else " " for letter in text.casefold())
    for word in kept.split():
        yield word
        whole = f"<{word}>"
        for length in (3, 4, 5):
            for first in range(len(whole) - length + 1):
                yield whole[first : first + length]
