"""The result of a conversion: the model, its metrics, and the time of each step."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hf_topk.evaluation.fidelity import Fidelity
from hf_topk.evaluation.observations import Observations
from hf_topk.model.modeling_topk_experts import TopKExpertsForCausalLM
from hf_topk.windows import Window

from .checkpoint.agreement_plot import Point
from .hub import Uploaded
from .recipe import ResolvedRecipe, calibration_text_name
from .steps.choose_operating_point import Target, is_reached
from .steps.held_out import DenseArgmax


@dataclasses.dataclass
class Report:
    """The converted model and its metrics.

    Attributes:
        model: the converted model, in memory.
        recipe: every choice; k and R as the user gave them.
        fidelity: measured on held-out documents of the calibration text.
        agreement_by_kind: the agreement on each kind of their text of which there are 200 positions or more.
        agreement_reached: the highest target that these documents confirm; see [`DenseArgmax.reached`].
        observations: of the same positions.
        dense_argmax: of the same positions.
        num_experts: M.
        added_bytes: that conversion adds to the model on disk.
        distilled_positions: positions that the router was distilled on.
        router_kl: KL divergence of the router's from the dense head's distribution over experts after distillation,
            in nats.
        seconds: wall time of the conversion.
        step_seconds: wall time of each step, by name.
        curve: agreement and bytes read around k; empty if only k was measured.
        uploaded: the model on the Hub, if it was pushed.
        probe: an example to try a model with an encoder on.
    """

    model: TopKExpertsForCausalLM
    recipe: ResolvedRecipe
    fidelity: Fidelity
    agreement_by_kind: dict[str, float]
    agreement_reached: float
    observations: Observations
    dense_argmax: DenseArgmax
    num_experts: int
    added_bytes: int
    distilled_positions: int
    router_kl: float
    seconds: float
    step_seconds: dict[str, float]
    curve: list[Point] = dataclasses.field(default_factory=list)
    uploaded: Uploaded | None = None
    probe: Window | None = None

    def metrics(self) -> dict[str, Any]:
        """All metrics, for JSON; some floats may not be finite."""
        head, target = self.model.head, Target.of(self.recipe)
        has_target = self.recipe.num_experts_per_tok is None or self.recipe.target_agreement is not None
        reached = is_reached(self.agreement_reached, self.fidelity.bytes_read, target)
        return {
            **dataclasses.asdict(self.fidelity),
            "agreement_by_kind": self.agreement_by_kind,
            "target_reached": reached if has_target else None,
            "num_experts": self.num_experts,
            "num_experts_per_tok": head.num_experts_per_tok,
            "num_rescored": head.num_rescored if head.screens else head.num_experts_per_tok * head.expert_size,
            "router_rank": self.model.config.router_rank,
            "tail_rank": self.model.config.tail_rank,
            "added_bytes": self.added_bytes,
            "added_bytes_share": self.added_bytes / head.dense_bytes(),
            "distilled_positions": self.distilled_positions,
            "router_kl": self.router_kl,
            "seconds": round(self.seconds, 1),
            "curve": [dataclasses.asdict(point) for point in self.curve],
        }

    def summary(self) -> dict[str, str]:
        """The metrics that people look at first, by name."""
        metrics, by_kind = self.metrics(), self.agreement_by_kind
        return {
            "experts": f"{metrics['num_experts']:,} of {self.recipe.expert_size} tokens, "
            f"{metrics['num_experts_per_tok']:,} picked per position, {metrics['num_rescored']:,} exact logits, "
            f"{self.recipe.num_always_on} always-on tokens",
            "top-1 agreement": f"{metrics['agreement']:.2%}, at least {metrics['agreement_lower_bound']:.2%} with 95 % "
            f"confidence, on {metrics['positions']:,} held-out positions of the calibration text "
            f"({calibration_text_name(self.recipe.text)})"
            + (": the target is not reached" if metrics["target_reached"] is False else ""),
            **({"by kind of text": _shares(by_kind)} if len(by_kind) > 1 else {}),
            "perplexity": f"{metrics['perplexity_dense']:.2f} dense, {metrics['perplexity_sparse']:.2f} sparse",
            "bytes read": f"{metrics['bytes_read']:.1%} of the dense head",
            "added on disk": f"{metrics['added_bytes'] / 1e6:.1f} MB, {metrics['added_bytes_share']:.1%} of the head",
            "time": f"{metrics['seconds']:.0f} s",
        }


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.2%}" for name, share in shares.items())


class StepClock:
    """Measures the wall time of steps.

    Attributes:
        seconds: by name of the step.
    """

    def __init__(self) -> None:
        """Start with no steps."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        """Measure the code within the context.

        Args:
            step: its name.
        """
        started = time.monotonic()
        yield
        self.seconds[step] = time.monotonic() - started
