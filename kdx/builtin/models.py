"""Makers of networks: timm, torchvision, ONNX files, and modules handed in."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.cache_options import STORED
from kdx.components import Model, Network
from kdx.errors import ConfigError, PlanError, did_you_mean
from kdx.taps import STANDARD
from kdx.types import DataFacts, Shape

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation per channel."""


class PrepareImage(nn.Module):
    """Turns raw images `[B, C, H, W]` in `0..1` into a net's input: size, number of channels, statistics."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, channels: int, size: tuple[int, int] | None, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.channels = channels
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None and tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True, align_corners=False)
        if images.shape[1] != self.channels:
            images = images.expand(-1, self.channels, -1, -1) if images.shape[1] == 1 else images.mean(1, keepdim=True)
        return (images - self.mean) / self.std


class Timm(Model):
    """Any model of timm by name. Weights come from `pretrained`, or from `checkpoint` or `run` of the section.

    The number of classes and input channels follow the data; a pretrained net keeps its own input size, statistics
    and channels. `args` are handed to the model's constructor. Where a name fixes what `args` should change, as the
    patches of a mixer, `model` may be a class of `timm.models` instead: `mlp_mixer.MlpMixer`.
    """

    name = "timm"
    offers = STANDARD

    @dataclass(frozen=True)
    class Config:
        model: str
        pretrained: bool = False
        num_classes: int | None = None
        size: int | None = None
        args: dict[str, Any] = field(default_factory=dict)

    config: Config

    def build(self) -> Network:
        return self._make(self.config.pretrained)

    def skeleton(self) -> Network:
        return self._make(False)

    def _make(self, pretrained: bool) -> Network:
        import timm

        config = self.config
        make: Callable[..., nn.Module] = functools.partial(timm.create_model, config.model, pretrained=pretrained)
        if config.model.partition(".")[2][:1].isupper() and not pretrained:  # tags of weights are in lower case
            make = _class_of_timm(config.model)
        elif not timm.is_model(config.model):
            raise ConfigError(f"model: timm has no model {config.model!r}; {_near(config.model, timm.list_models())}")
        images = _image_streams(self.facts, self.streams)
        channels = config.args.get("in_chans", 3 if config.pretrained else images[0])
        classes = config.num_classes or len(self.facts.classes) or None
        arguments: dict[str, Any] = {
            "in_chans": channels,
            **({"num_classes": classes} if classes else {}),
            **config.args,
        }
        try:
            net = make(**arguments)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            problem = f"args: {config.model} refuses {config.args}" if config.args else f"model: no {config.model}"
            raise ConfigError(f"{problem}: {error}") from error
        except OSError as error:
            raise ConfigError(f"pretrained: the weights of {config.model} cannot be had: {error}") from error
        return Network(net, self.streams, self._prepare(net, channels))

    def _prepare(self, net: nn.Module, channels: int) -> PrepareImage:
        import timm.data

        size = (self.config.size, self.config.size) if self.config.size else None
        if self.config.pretrained:
            own = timm.data.resolve_model_data_config(net)
            side = self.config.args.get("img_size")
            expected = (side, side) if isinstance(side, int) else tuple(side or own["input_size"][-2:])
            mean, std = (_for_channels(own[key], channels) for key in ("mean", "std"))
            return PrepareImage(channels, size or expected, mean, std)
        return PrepareImage(channels, size, *_statistics(self.facts, self.streams, channels))


class Torchvision(Model):
    """Any classification model of torchvision by name; `weights` names a set of its published weights."""

    name = "torchvision"

    @dataclass(frozen=True)
    class Config:
        model: str
        weights: str | None = None
        size: int | None = None
        args: dict[str, Any] = field(default_factory=dict)

    config: Config

    def build(self) -> Network:
        return self._make(self.config.weights)

    def skeleton(self) -> Network:
        return self._make(None)

    def _make(self, weights: str | None) -> Network:
        import torchvision

        config = self.config
        names = torchvision.models.list_models()
        if config.model not in names:
            raise ConfigError(f"model: torchvision has no model {config.model!r}; {_near(config.model, names)}")
        preset = self._preset(config.weights)
        arguments = dict(config.args)
        if len(self.facts.classes) and config.weights is None:
            arguments.setdefault("num_classes", len(self.facts.classes))
        try:
            net = torchvision.models.get_model(config.model, weights=weights, **arguments)
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(f"args: {config.model} refuses its options: {error}") from error
        except OSError as error:
            raise ConfigError(f"weights: {config.weights} of {config.model} cannot be had: {error}") from error
        side = config.size or (preset.crop_size[0] if hasattr(preset, "crop_size") else None)
        statistics = _statistics(self.facts, self.streams, 3)
        if preset is not None:
            statistics = tuple(preset.mean), tuple(preset.std)
        return Network(net, self.streams, PrepareImage(3, (side, side) if side else None, *statistics))

    def _preset(self, weights: str | None) -> Any:
        """What these published weights expect of their images."""
        import torchvision

        if weights is None:
            return None
        published = torchvision.models.get_model_weights(self.config.model).__members__
        if weights not in published:
            raise ConfigError(f"weights: {self.config.model} has no {weights!r}; {did_you_mean(weights, published)}")
        return published[weights].transforms()


class Onnx(Model):
    """A frozen teacher in an ONNX file, run by onnxruntime. Raw images in `0..1` are resized and normalised for it.

    `size`, `mean` and `std` describe the input that the file expects; left out, they follow the file and the data.
    """

    name = "onnx"
    offers = ("logits",)

    @dataclass(frozen=True)
    class Config:
        path: str
        size: int | None = None
        mean: list[float] = field(default_factory=list)
        std: list[float] = field(default_factory=list)

    config: Config

    def build(self) -> Network:
        net = OnnxNet(Path(self.config.path))
        channels = net.channels or _image_streams(self.facts, self.streams)[0]
        size = (self.config.size, self.config.size) if self.config.size else net.size
        mean, std = _statistics(self.facts, self.streams, channels)
        prepare = PrepareImage(channels, size, tuple(self.config.mean) or mean, tuple(self.config.std) or std)
        return Network(net, self.streams, prepare)


class OnnxNet(nn.Module):
    """Runs an ONNX file; gives its first output. There is no gradient, so it can teach and not learn."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigError("an ONNX teacher needs onnxruntime: pip install 'kdx[onnx]'") from error
        if not path.is_file():
            raise ConfigError(f"path: there is no file {path}")
        self._path = path
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises classes of its own, which it does not export
            raise ConfigError(f"path: {path} is no ONNX file that onnxruntime can run: {error}") from error
        entry = self._session.get_inputs()[0]
        self._input, shape = entry.name, entry.shape
        fixed = [extent if isinstance(extent, int) else None for extent in shape]
        self.channels = fixed[1] if len(fixed) == 4 else None
        self.size = (fixed[2], fixed[3]) if len(fixed) == 4 and fixed[2] and fixed[3] else None
        self._one_by_one = fixed[0] == 1

    def forward(self, images: Tensor) -> Tensor:
        array = images.detach().float().cpu().contiguous().numpy()
        groups = [array[i : i + 1] for i in range(len(array))] if self._one_by_one else [array]
        answers = [torch.from_numpy(self._session.run(None, {self._input: group})[0]) for group in groups]
        return torch.cat(answers).to(images.device)


class Given(Model):
    """A module handed in from Python (`kdx.run(config, models={...})`)."""

    name = "module"

    @dataclass(frozen=True)
    class Config:
        digest: str = ""

    def build(self) -> Network:
        raise PlanError("`module` stands for a network handed to kdx.run(models={...}), and none was")


class Stored(Model):
    """No net: a teacher whose answers are read from a cache alone (`teachers: {wide: {cache: FOLDER}}`)."""

    name = STORED

    def build(self) -> Network:
        raise PlanError("it has no net, and its cache is not there; expected cache: FOLDER with the folder of a cache")


def _class_of_timm(path: str) -> Callable[..., nn.Module]:
    """The class of a network in a module of `timm.models`."""
    module, _, name = path.partition(".")
    known = {found.name for found in pkgutil.iter_modules(importlib.import_module("timm.models").__path__)}
    if module not in known or module.startswith("_"):
        raise ConfigError(f"model: timm.models has no module {module!r}; {did_you_mean(module, known)}")
    found = getattr(importlib.import_module(f"timm.models.{module}"), name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ConfigError(f"model: timm.models.{module} has no network {name!r}")
    return found


def _image_streams(facts: DataFacts, streams: tuple[str, ...]) -> Shape:
    for stream in streams:
        if stream not in facts.streams:
            raise PlanError(f"input: the data has no stream {stream!r}; {did_you_mean(stream, facts.streams)}")
    return facts.streams[streams[0]].shape


def _statistics(
    facts: DataFacts, streams: tuple[str, ...], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the data for a net with this many channels."""
    stream = facts.streams[streams[0]]
    mean, std = stream.mean or (0.5,), stream.std or (0.5,)
    return _for_channels(mean, channels), _for_channels(std, channels)


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One value per channel; their mean for each where the net has another number of channels."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _near(name: str, names: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {', '.join(near)}?" if near else f"it has {len(names)} others"


MODELS: list[type[Model]] = [Timm, Torchvision, Onnx, Given, Stored]
