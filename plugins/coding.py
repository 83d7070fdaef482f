"""Losses with parts that are trained on the teacher's features alone: factors and denoising.

Those parts learn along with the student; what the student is compared with is detached from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdx

FORMS = ("paper", "code")
MATCHES = ("mse", "kl")
SLOPE = 0.1
TIMES = 1000
FIRST_BETA, LAST_BETA = 1e-4, 0.02


def factor_distance(student: Tensor, teacher: Tensor, form: str = "paper") -> Tensor:
    """The mean absolute difference of two factors [B, C, H, W], each scaled to length 1, [B].

    `paper` takes the factor as one vector; `code` the mean over its channels of its square, as attention maps do.
    """
    if form == "code":
        student, teacher = student.square().mean(1), teacher.square().mean(1)
    ours, theirs = (F.normalize(factor.flatten(1), dim=1) for factor in (student, teacher.detach()))
    return (ours - theirs).abs().mean(1)


class FactorTransfer(kdx.Loss):
    """Factor transfer (Kim, Park, Kwak, NeurIPS 2018), one value per sample.

    Maps [B, C, H, W], by default the last ones. A paraphraser, a convolutional auto-encoder, puts the teacher's map
    into a factor of `rate` times its channels; a translator makes the student's map such a factor. The larger factor is
    average-pooled to the smaller one. The value is `factor` times the difference of the factors plus `reconstruction`
    times the mean squared error of the auto-encoder. The first is 0 where both factors point the same way. The
    published weight of the form `code` is 200.

    The authors train the paraphraser in a stage of its own and freeze it. Here it learns beside the student, and no
    gradient of the comparison reaches it. With schedules, one run does as they do: `factor` at 0 for the first epochs,
    `reconstruction` at 0 from then on (and `weight_decay: 0` for this loss).

    form: `paper`, or `code` for what the public benchmark computes instead, which is of another size.
    """

    name = "ft"
    confidence = "values"
    inputs = {"student": "student.depth_100", "teacher": "teacher.depth_100"}
    knobs = {"factor": kdx.Knob(1.0, at_least=0.0), "reconstruction": kdx.Knob(1.0, at_least=0.0)}

    @dataclass(frozen=True)
    class Config:
        form: str = "paper"
        rate: float = 0.5

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("form", config.form, FORMS)
        if not 0 < config.rate <= 1:
            raise kdx.ConfigError(f"rate: found {config.rate}, expected a share above 0, up to 1")
        student, teacher = given.shape("student"), given.shape("teacher")
        for side, shape in {"student": student, "teacher": teacher}.items():
            if len(shape) != 3:
                raise kdx.PlanError(
                    f"ft needs maps [C, H, W], but {side} is {list(shape)}; tap a stage, as in depth_75"
                )
        width = max(1, round(teacher[0] * config.rate))
        self.encoder = nn.Sequential(
            *_leaky(nn.Conv2d(teacher[0], teacher[0], 3, padding=1)),
            *_leaky(nn.Conv2d(teacher[0], width, 3, padding=1)),
            *_leaky(nn.Conv2d(width, width, 3, padding=1)),
        )
        self.decoder = nn.Sequential(
            *_leaky(nn.ConvTranspose2d(width, width, 3, padding=1)),
            *_leaky(nn.ConvTranspose2d(width, teacher[0], 3, padding=1)),
            *_leaky(nn.ConvTranspose2d(teacher[0], teacher[0], 3, padding=1)),
        )
        self.translator = nn.Sequential(
            *_leaky(nn.Conv2d(student[0], student[0], 3, padding=1), norm=student[0]),
            *_leaky(nn.Conv2d(student[0], width, 3, padding=1), norm=width),
            *_leaky(nn.Conv2d(width, width, 3, padding=1), norm=width),
        )

    def forward(self, student: Tensor, teacher: Tensor, factor: Tensor, reconstruction: Tensor) -> Tensor:
        teacher = teacher.detach()
        code: Tensor = self.encoder(teacher)
        ours, theirs = kdx.pool_to_smaller(self.translator(student), code.detach())
        value = factor * factor_distance(ours, theirs, self.config.form)
        return value + reconstruction * _mean_square(self.decoder(code) - teacher)


class DiffusionDenoising(kdx.Loss):
    """Denoised student features (Huang et al.: DiffKD, NeurIPS 2023), one value per sample.

    Maps [B, C, H, W], by default the last ones, or vectors such as logits. A small diffusion model learns to predict
    the noise in the teacher's feature. The student's feature, brought to the teacher's width, counts as a noisy one: so
    much noise is mixed in as an adapter says per sample, the model takes noise out in `steps` steps, and the refined
    feature is compared with the teacher's. The value is the sum of that difference, of the squared error of the
    predicted noise, and of that of the auto-encoder, all means over elements; it is above 0 for a perfect student. The
    gradient of the first part flows through all steps, into the student and the model. The larger map is average-pooled
    to the smaller one. Published weight: 1.

    match: `mse`, or `kl` for logits: the divergence of the refined distribution from the teacher's.
    width: the channels that an auto-encoder compresses the teacher's map to; by default there is none.
    """

    name = "diffkd"
    confidence = "code"
    inputs = {"student": "student.depth_100", "teacher": "teacher.depth_100"}

    @dataclass(frozen=True)
    class Config:
        match: str = "mse"
        width: int | None = None
        steps: int = 5

    config: Config
    kept: Tensor

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_choice("match", config.match, MATCHES)
        if not 1 <= config.steps <= TIMES // 2:
            raise kdx.ConfigError(f"steps: found {config.steps}, expected 1 to {TIMES // 2}")
        if config.width is not None and config.width < 1:
            raise kdx.ConfigError(f"width: found {config.width}, expected a number of channels from 1")
        student, teacher = given.shape("student"), given.shape("teacher")
        if len(student) != len(teacher) or len(student) not in (1, 3):
            raise kdx.PlanError(
                "diffkd compares two maps [C, H, W] or two vectors [D], but student is "
                f"{list(student)} and teacher {list(teacher)}"
            )
        if config.match == "kl" and (len(teacher) != 1 or config.width is not None):
            raise kdx.PlanError(
                f"diffkd with `match: kl` is for logits [K] and takes no `width`; found {list(teacher)}"
            )
        width = config.width or teacher[0]
        is_map = len(teacher) == 3
        self.encoder = self.decoder = None
        if config.width:
            self.encoder = nn.Sequential(nn.Conv2d(teacher[0], width, 1), nn.BatchNorm2d(width))
            self.decoder = nn.Conv2d(width, teacher[0], 1)
        self.enter = nn.Conv2d(student[0], width, 1)
        self.adapter = NoiseAdapter(width, is_map=is_map)
        self.model = NoisePredictor(width, is_map=is_map)
        self.leave = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))
        kept = (1 - torch.linspace(FIRST_BETA, LAST_BETA, TIMES)).cumprod(0)
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        ours, theirs = kdx.pool_to_smaller(_as_map(student), _as_map(teacher.detach()))
        hidden, rebuilding = theirs, None
        if self.encoder is not None and self.decoder is not None:
            code = self.encoder(theirs)
            rebuilding = _mean_square(self.decoder(code) - theirs)
            hidden = code.detach()
        refined = self.leave(self.denoise(self.enter(ours)))
        if self.config.match == "kl":
            logs = [logits.flatten(1).log_softmax(1) for logits in (refined, hidden)]
            value = F.kl_div(logs[0], logs[1], reduction="none", log_target=True).sum(1)
        else:
            value = _mean_square(refined - hidden)
        value = value + self._noise_error(hidden)
        return value if rebuilding is None else value + rebuilding

    def denoise(self, feature: Tensor) -> Tensor:
        """A feature [B, C, H, W] with noise mixed in and taken out again, step by step without further noise (DDIM)."""
        share = self.adapter(feature)[:, None, None, None]
        x: Tensor = share * feature + (1 - share) * self._noise(feature)
        stride = TIMES // (2 * self.config.steps)
        for time in range((self.config.steps - 1) * stride, -1, -stride):
            kept = self.kept[time]
            before = self.kept[time - stride] if time else torch.ones_like(kept)
            noise = self.model(x, torch.full((len(x),), time, device=x.device))
            clean = (x - (1 - kept).sqrt() * noise) / kept.sqrt()
            x = before.sqrt() * clean + (1 - before).sqrt() * noise
        return x

    def _noise_error(self, feature: Tensor) -> Tensor:
        """How well the model finds the noise that is mixed into `feature` at a random time, [B]."""
        generator, device = self.given.generator, feature.device
        time = torch.randint(TIMES, (len(feature),), generator=generator, device=device)
        kept = self.kept[time][:, None, None, None]
        noise = self._noise(feature)
        return _mean_square(self.model(kept.sqrt() * feature + (1 - kept).sqrt() * noise, time) - noise)

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.given.generator, device=like.device, dtype=like.dtype)


class NoiseAdapter(nn.Module):
    """How much of each feature [B, C, H, W] is kept when noise is mixed in, between 0 and 1, [B]."""

    def __init__(self, width: int, *, is_map: bool) -> None:
        super().__init__()
        self.feature = Residual(width, width // 8) if is_map else _wide(width, 2)
        self.choice = nn.Linear(width, 2)

    def forward(self, feature: Tensor) -> Tensor:
        choice: Tensor = self.choice(self.feature(feature).mean((2, 3)))
        return choice.softmax(1)[:, 0]


class NoisePredictor(nn.Module):
    """The noise in features [B, C, H, W] at the times [B]."""

    def __init__(self, width: int, *, is_map: bool) -> None:
        super().__init__()
        self.times = nn.Embedding(TIMES, width)
        layers = (
            [
                Residual(width, width // 4),
                Residual(width, width // 4),
                nn.Conv2d(width, width, 1),
                nn.BatchNorm2d(width),
            ]
            if is_map
            else [_wide(width, 4), *_wide(width, 4)[:-1]]
        )
        self.layers = nn.Sequential(*layers)

    def forward(self, noisy: Tensor, time: Tensor) -> Tensor:
        noise: Tensor = self.layers(noisy + self.times(time)[:, :, None, None])
        return noise


class Residual(nn.Module):
    """A map plus what three convolutions through `inner` channels make of it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        inner = max(1, inner)
        self.block = nn.Sequential(
            nn.Conv2d(width, inner, 1),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1),
            nn.BatchNorm2d(width),
        )

    def forward(self, feature: Tensor) -> Tensor:
        changed: Tensor = feature + self.block(feature)
        return changed


def _leaky(layer: nn.Module, norm: int | None = None) -> list[nn.Module]:
    return [layer, *([] if norm is None else [nn.BatchNorm2d(norm)]), nn.LeakyReLU(SLOPE)]


def _wide(width: int, factor: int) -> nn.Sequential:
    """Two 1x1 convolutions through `factor` times the width, each with batch norm."""
    return nn.Sequential(
        nn.Conv2d(width, factor * width, 1),
        nn.BatchNorm2d(factor * width),
        nn.ReLU(),
        nn.Conv2d(factor * width, width, 1),
        nn.BatchNorm2d(width),
    )


def _mean_square(difference: Tensor) -> Tensor:
    """[B]."""
    return difference.square().flatten(1).mean(1)


def _as_map(feature: Tensor) -> Tensor:
    return feature if feature.ndim == 4 else feature[:, :, None, None]


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [FactorTransfer, DiffusionDenoising]
