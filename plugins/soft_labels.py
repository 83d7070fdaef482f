"""Losses whose soft labels, or whose weight for a sample, follow a rule; and a class for samples without a label.

Logits are [B, K]. Where a loss needs each sample's class, a sample without a label counts 0, and the mean over the
batch is that over the labelled ones, as it is for cross-entropy. The target `pseudo_label` gives all samples a class.
`mixed_cross_entropy` and the target `mixed_answers` are for views with `mixup` or `cutmix`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kdx

DEIT_FORMS = ("hard", "soft", "soft_mean")


def transformed_matching(student: Tensor, teacher: Tensor, power: Tensor, *, weighted: bool = False) -> Tensor:
    """`KL(q || softmax(student))` with `q` in proportion to the teacher's probabilities to this power, [B].

    `weighted` multiplies by the sum of those powers, which grows from 1 as the teacher's answer becomes more even.
    """
    powered = kdx.per_sample(power, teacher) * F.log_softmax(teacher.detach(), dim=1)
    log_sum = powered.logsumexp(1, keepdim=True)
    divergence = F.kl_div(F.log_softmax(student, dim=1), powered - log_sum, reduction="none", log_target=True).sum(1)
    return log_sum[:, 0].exp() * divergence if weighted else divergence


class TransformedMatching(kdx.Loss):
    """Transformed teacher matching (Zheng and Yang, ICLR 2024), one value per sample.

    The teacher's probabilities to a power `gamma` below 1, which is a temperature of `1 / gamma`; the student is not
    softened, and there is no factor tau^2. 0 for a student with the transformed distribution; one with the teacher's
    own is too sure. Published for CIFAR-100 (VGG-13 to VGG-8): `gamma` 0.1 and weight 45.
    """

    name = "ttm"
    confidence = "values"
    inputs = {"student": "student.logits", "teacher": "teacher.logits"}
    knobs = {"gamma": kdx.Knob(0.1, above=0.0)}
    same_shape = (("student", "teacher"),)

    def forward(self, student: Tensor, teacher: Tensor, gamma: Tensor) -> Tensor:
        return transformed_matching(student, teacher, gamma)


class WeightedTransformedMatching(kdx.Loss):
    """`ttm` with samples weighted by how even the teacher's answer is (Zheng and Yang, ICLR 2024), one value each.

    The weight is the sum of the transformed probabilities, from 1 to `K^(1 - gamma)`. Published: `gamma` 0.1 to 0.2, a
    weight by pair of nets.
    """

    name = "wttm"
    confidence = "values"
    inputs = {"student": "student.logits", "teacher": "teacher.logits"}
    knobs = {"gamma": kdx.Knob(0.1, above=0.0)}
    same_shape = (("student", "teacher"),)

    def forward(self, student: Tensor, teacher: Tensor, gamma: Tensor) -> Tensor:
        return transformed_matching(student, teacher, gamma, weighted=True)


def difficulty(student: Tensor, teacher: Tensor, label: Tensor) -> Tensor:
    """`1 - exp(-CE_s / CE_t)`, the cross-entropies of either net with the label, [B], without gradient.

    0 for a student that is sure and right, 1 - 1/e where both nets find a sample equally hard.
    """
    ours, theirs = (F.cross_entropy(logits.detach(), label, reduction="none") for logits in (student, teacher))
    return -torch.expm1(-ours / (theirs + 1e-7))


class WeightedSoftLabels(kdx.Loss):
    """Weighted soft labels (Zhou et al., ICLR 2021), one value per sample, with labels [B].

    `difficulty` times `tau^2` times the cross-entropy of the softened student with the softened teacher: samples that
    the student knows better than the teacher count less. A perfect student has the weighted entropy of the teacher, not
    0, and no gradient. Published: weight 2.25 and temperature 4 for CIFAR-100, 2.5 and 2 for ImageNet.
    """

    name = "wsld"
    confidence = "values"
    inputs = {"student": "student.logits", "teacher": "teacher.logits", "label": "batch.label"}
    knobs = {"temperature": kdx.Knob(4.0, above=0.0)}
    same_shape = (("student", "teacher"),)

    def __init__(self, config: WeightedSoftLabels.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_classes("wsld", given, "student")

    def forward(self, student: Tensor, teacher: Tensor, label: Tensor, temperature: Tensor) -> Tensor:
        tau = kdx.per_sample(temperature, student)
        soft = F.cross_entropy(student / tau, (teacher.detach() / tau).softmax(1), reduction="none")
        weight = difficulty(student, teacher, label.clamp(min=0))
        return kdx.over_labelled(weight * soft * temperature.square(), label)


def asymmetric_targets(teacher: Tensor, label: Tensor, true: Tensor, other: Tensor) -> Tensor:
    """Log-probabilities of a teacher [B, K] with the true class softened by one temperature and the rest by another."""
    is_true = F.one_hot(label, teacher.shape[1]).bool()
    tau = torch.where(is_true, kdx.per_sample(true, teacher), kdx.per_sample(other, teacher))
    return F.log_softmax(teacher / tau, dim=1)


class AsymmetricTemperature(kdx.Loss):
    """Asymmetric temperature scaling (Li et al., NeurIPS 2022), one value per sample, with labels [B].

    `temperature^2` times the KL of the teacher, the true class softened by `true_temperature` and the others by
    `other_temperature`, to the student softened by `temperature`. With three equal temperatures it is `kd`. Published:
    that of the true class is 2 to 6 and above the other one by 1 to 2. 0 for a student with that distribution. As
    temperatures differ, a constant added to a row of the teacher's logits does count.
    """

    name = "ats"
    confidence = "paper"
    inputs = {"student": "student.logits", "teacher": "teacher.logits", "label": "batch.label"}
    knobs = {
        "temperature": kdx.Knob(4.0, above=0.0),
        "true_temperature": kdx.Knob(5.0, above=0.0),
        "other_temperature": kdx.Knob(4.0, above=0.0),
    }
    same_shape = (("student", "teacher"),)

    def __init__(self, config: AsymmetricTemperature.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_classes("ats", given, "student")

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        label: Tensor,
        temperature: Tensor,
        true_temperature: Tensor,
        other_temperature: Tensor,
    ) -> Tensor:
        wanted = asymmetric_targets(teacher.detach(), label.clamp(min=0), true_temperature, other_temperature)
        ours = F.log_softmax(student / kdx.per_sample(temperature, student), dim=1)
        divergence = F.kl_div(ours, wanted, reduction="none", log_target=True).sum(1)
        return kdx.over_labelled(divergence * temperature.square(), label)


def virtual_teacher(label: Tensor, classes: int, correct: float, temperature: Tensor) -> Tensor:
    """Log-probabilities [B, K]: the softmax, at this temperature, of a distribution with `correct` on the label."""
    rest = (1 - correct) / (classes - 1)
    given = temperature.new_full((len(label), classes), rest).scatter(1, label[:, None], correct)
    return F.log_softmax(given / kdx.per_sample(temperature, given), dim=1)


class TeacherFree(kdx.Loss):
    """Teacher-free distillation by a made-up teacher (Yuan et al., CVPR 2020), one value per sample, labels [B].

    The KL of `virtual_teacher` to the student, mean over the K classes as the authors' code has it. The virtual
    teacher's probabilities, not its logits, are softened, and the student is not. 0 for a student with that almost even
    distribution. Published: weight 10 (100 times 0.1) beside 0.9 of the labels.
    """

    name = "tf_kd"
    confidence = "values"
    inputs = {"student": "student.logits", "label": "batch.label"}
    knobs = {"temperature": kdx.Knob(20.0, above=0.0)}

    @dataclass(frozen=True)
    class Config:
        correct: float = 0.99

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_classes("tf_kd", given, "student")
        if not 0 < config.correct < 1:
            raise kdx.ConfigError(f"correct: found {config.correct}, expected a probability between 0 and 1")

    def forward(self, student: Tensor, label: Tensor, temperature: Tensor) -> Tensor:
        wanted = virtual_teacher(label.clamp(min=0), student.shape[1], self.config.correct, temperature)
        divergence = F.kl_div(F.log_softmax(student, dim=1), wanted, reduction="none", log_target=True).mean(1)
        return kdx.over_labelled(divergence, label)


class DistillationToken(kdx.Loss):
    """Distillation through a token of its own (Touvron et al.: DeiT, ICML 2021), one value per sample.

    The logits [B, K] of two heads: `cls` learns the labels [B], `dist` the teacher. The value is
    `(1 - alpha) CE(cls, label) + alpha * form`, so no other loss on labels is needed. The student answers with the mean
    of both heads' logits, as timm's distilled nets do. Published: `hard` with alpha 0.5.

    form: `hard` is the cross-entropy of `dist` with the teacher's first choice; `soft` is `tau^2` times the KL of the
        teacher to it, summed over classes, 0 for a perfect student; `soft_mean` divides that by K, as the released code
        does.
    temperature: of the soft forms, 1 by default.

    The part of the labels is a mean over the labelled samples; that of the teacher is one over all.
    """

    name = "deit_token"
    confidence = "code"
    inputs = {"cls": kdx.REQUIRED, "dist": kdx.REQUIRED, "teacher": "teacher.logits", "label": "batch.label"}
    knobs = {"alpha": kdx.Knob(0.5, at_least=0.0, at_most=1.0)}
    same_shape = (("cls", "dist", "teacher"),)

    @dataclass(frozen=True)
    class Config:
        form: str = "hard"
        temperature: float | None = None

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_classes("deit_token", given, "cls")
        kdx.check_choice("form", config.form, DEIT_FORMS)
        if config.temperature is not None and config.form == "hard":
            raise kdx.ConfigError("temperature: `form: hard` does not read it")
        if config.temperature is not None and not config.temperature > 0:
            raise kdx.ConfigError(f"temperature: found {config.temperature}, expected a number above 0")

    def forward(self, cls: Tensor, dist: Tensor, teacher: Tensor, label: Tensor, alpha: Tensor) -> Tensor:
        truth = kdx.over_labelled(F.cross_entropy(cls, label.clamp(min=0), reduction="none"), label)
        return (1 - alpha) * truth + alpha * self._taught(dist, teacher.detach())

    def _taught(self, dist: Tensor, teacher: Tensor) -> Tensor:
        if self.config.form == "hard":
            return F.cross_entropy(dist, teacher.argmax(1), reduction="none")
        tau = self.config.temperature or 1.0
        ours, theirs = F.log_softmax(dist / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
        divergence = F.kl_div(ours, theirs, reduction="none", log_target=True)
        return (divergence.sum(1) if self.config.form == "soft" else divergence.mean(1)) * tau**2


class PseudoLabel(kdx.Target):
    """The label [B] where a sample has one, and the first choice of the logits [B, K] elsewhere.

    For losses that need each sample's class: `inputs: {label: NAME}` makes them use the unlabelled samples, too.
    """

    name = "pseudo_label"
    inputs = {"logits": "teacher.logits", "label": "batch.label"}

    def __init__(self, config: PseudoLabel.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_classes("pseudo_label", given, "logits")

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        return torch.where(label >= 0, label, logits.argmax(1))


def partners(index: Tensor, partner: Tensor) -> Tensor:
    """The row of each sample's partner, int64 [B], where `partner` [B] are the `index` [B] of other rows."""
    return (partner.unsqueeze(1) == index.unsqueeze(0)).long().argmax(1)


class MixedAnswers(kdx.Target):
    """A teacher's answers for mixtures, made of its answers for the samples as they are, as logits [B, K].

        tau * log(share * softmax(z_i / tau) + (1 - share) * softmax(z_j / tau))

    `z` are the logits [B, K] for samples that are not mixed, as a cache holds them; `share` [B] is how much of a
    mixture is the sample itself, and `partner` [B] the `batch.index` of the other one, which are the records of a view
    with `mixup` or `cutmix`:

        inputs: {share: batch.mix_share@mixed, partner: batch.mix_partner@mixed}

    The loss `kd` at the same temperature, for a student on that view, has the gradient of the divergences from both
    answers in their shares. So a method is defined that mixes what a teacher said before training, as EfficientAT does
    (Schmid et al., ICASSP 2023). It is not what the teacher would say of a mixture, which others ask it for
    (Beyer et al., CVPR 2022).
    """

    name = "mixed_answers"
    confidence = "paper"
    inputs = {
        "logits": "teacher.logits",
        "share": kdx.REQUIRED,
        "partner": kdx.REQUIRED,
        "index": "batch.index",
    }
    knobs = {"temperature": kdx.Knob(1.0, above=0.0)}
    outputs = ("logits",)
    whole_batch = True

    def __init__(self, config: MixedAnswers.Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_classes(self.name, given, "logits")

    def forward(
        self, logits: Tensor, share: Tensor, partner: Tensor, index: Tensor, temperature: Tensor
    ) -> dict[str, Tensor]:
        own = share.to(logits)
        other = logits[partners(index, partner)]
        return {"logits": kdx.log_mixture([logits, other], [own.log(), (1 - own).log()], temperature)}


class MixedCrossEntropy(kdx.Loss):
    """Cross-entropy with the labels of both samples of a mixture, in their shares, one value per sample.

        share * CE(student, y_i) + (1 - share) * CE(student, y_j)

    (Zhang et al.: mixup, ICLR 2018; Yun et al.: CutMix, ICCV 2019). `share` and `partner` are as for `mixed_answers`,
    and the student is on the view that mixes. A sample without a label counts 0, and the mean over the batch is that
    over the shares with one. Its least value is the entropy of the shares.

        inputs: {student: student@mixed.logits, share: batch.mix_share@mixed, partner: batch.mix_partner@mixed}
    """

    name = "mixed_cross_entropy"
    confidence = "values"
    inputs = {
        "student": kdx.REQUIRED,
        "label": "batch.label",
        "share": kdx.REQUIRED,
        "partner": kdx.REQUIRED,
        "index": "batch.index",
    }
    whole_batch = True

    @dataclass(frozen=True)
    class Config:
        label_smoothing: float = 0.0

    config: Config

    def __init__(self, config: Config, given: kdx.Given) -> None:
        super().__init__(config, given)
        kdx.check_classes(self.name, given, "student")
        if not 0 <= config.label_smoothing < 1:
            raise kdx.ConfigError(f"label_smoothing: found {config.label_smoothing}, expected from 0 and below 1")

    def forward(self, student: Tensor, label: Tensor, share: Tensor, partner: Tensor, index: Tensor) -> Tensor:
        place, smoothing = partners(index, partner), self.config.label_smoothing
        shares = torch.stack([share * (label >= 0), (1 - share) * (label[place] >= 0)])
        entropies = [
            F.cross_entropy(student, y, ignore_index=-1, reduction="none", label_smoothing=smoothing)
            for y in (label, label[place])
        ]
        return (shares * torch.stack(entropies)).sum(0) * len(label) / shares.sum().clamp(min=1e-12)


@kdx.hookimpl
def kdx_losses() -> list[type[kdx.Loss]]:
    return [
        TransformedMatching, WeightedTransformedMatching, WeightedSoftLabels, AsymmetricTemperature, TeacherFree,
        DistillationToken, MixedCrossEntropy,
    ]  # fmt: skip


@kdx.hookimpl
def kdx_targets() -> list[type[kdx.Target]]:
    return [PseudoLabel, MixedAnswers]
