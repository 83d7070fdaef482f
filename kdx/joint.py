"""Cross-entropy and a divergence of the same logits in one call, so that many logits have one gradient between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from kdx.builtin.losses import CrossEntropy
from kdx.calls import NodeCall, Values, full_precision, settings_of
from kdx.components import Loss
from kdx.fused import cross_entropy_and_divergence, is_small
from kdx.plan import Plan
from kdx.presence import ALWAYS


@dataclass(frozen=True, kw_only=True)
class JointCall(NodeCall):
    """A divergence that is worked out together with the cross-entropy `labels`, where that gains anything."""

    labels: NodeCall

    def run(self, values: Values) -> None:
        if is_small(values[str(self.arguments["student"])]) or not self._run_joint(values):
            self.labels.run(values)
            super().run(values)

    def _run_joint(self, values: Values) -> bool:
        """Leave both terms in `values`, or say that there is no joint way for them."""
        soft = {name: full_precision(value) for name, value in self.inputs(values).items()}
        label = self.labels.inputs(values)["label"]
        own = cast(CrossEntropy, self.labels.module)
        try:
            found = cross_entropy_and_divergence(
                **soft, label=label, label_smoothing=own.config.label_smoothing, labelled=own.labelled
            )
        except Exception as error:
            error.add_note(f"in {self.labels.label} and {self.label}")
            raise
        if found is not None:
            values[self.labels.gives[0]], values[self.gives[0]] = found
        return found is not None


def joined(plan: Plan) -> tuple[NodeCall, ...]:
    """The losses of a plan, with the first cross-entropy and the first divergence of the same logits in one call.

    Terms and weights stay apart. Losses stay as they are where the updater asks for the gradient of each, where any of
    them reads the term of another, where samples may be absent, and where a call needs the samples of other processes.
    """
    calls, eager = plan.loss_calls, plan.spec.updater.entry.component.eager
    terms = {key for call in calls for key in call.gives}
    plain = [call for call in calls if type(call) is NodeCall and call.presence == ALWAYS]
    if eager or any(terms.intersection(call.reads) for call in calls):
        return calls
    for soft in plain:
        for labels in plain:
            if (
                type(labels.module) is CrossEntropy
                and _is_divergence(soft.module)
                and labels.arguments["student"] == soft.arguments["student"]
            ):
                joint = JointCall(**settings_of(soft), labels=labels)
                return tuple(joint if call is soft else call for call in calls if call is not labels)
    return calls


def _is_divergence(module: object) -> bool:
    """Whether a loss says so itself: one that derives from it may compute something else."""
    return isinstance(module, Loss) and "is_soft_divergence" in vars(type(module)) and module.is_soft_divergence
