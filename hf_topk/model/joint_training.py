"""Joint training: router and combiner are trained to follow the head while the model is trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from .configuration_topk_experts import TopKExpertsConfig
from .errors import InputError
from .head import TopKExpertsHead
from .whole_head import check_whole

LOGITS_AT_ONCE = 1 << 25
KEPT_OF_EARLIER_STATES = 0.99  # per pass: an exponential average over about the last hundred passes
LEVEL_WEIGHT = 0.01  # of the squared error of the scores' level; used in conversion, too

logger = logging.get_logger(__name__)


class JointTrainingMixin:
    """Trains a converted model as a whole: the dense model, its head, and the head's router and combiner."""

    base: PreTrainedModel
    config: TopKExpertsConfig

    @contextmanager
    def joint_training(self, router_loss_coef: float = 1.0, balance_loss_coef: float = 0.0) -> Iterator[None]:
        """Inside the context, train router and combiner with the model, with any trainer.

        In training mode with gradients enabled, two terms are added to the loss. They train only router and combiner,
        and are averaged over the same tokens as the loss:

        - distillation: the KL divergence of the router's distribution over experts and always-on tokens from that of
          the dense head at this step, plus that of the combiner if the head has one (Hinton et al. 2015,
          https://arxiv.org/abs/1503.02531);
        - balance: M sum_e f_e P_e, where f_e is expert e's share of the picks in the batch and P_e its probability by
          the router; 1 where all experts are equally likely (Fedus et al. 2021, https://arxiv.org/abs/2101.03961,
          equation 4, here for several picked experts).

        Inside, a packed router is in floats, also in checkpoints. It is packed again at the end, such that no score
        changes at the mean hidden state. The tail is not trained. Make the optimizer inside, unless a trainer does.

        Args:
            router_loss_coef: weight of the distillation term, relative to the loss of a token.
            balance_loss_coef: weight of the balance term.

        Raises:
            InputError: when a weight is negative or both are 0, or something was put around the head; in training,
                when the model's output has no loss, or in nn.DataParallel.
        """
        head: TopKExpertsHead = cast(Any, self).head
        if min(router_loss_coef, balance_loss_coef) < 0 or router_loss_coef + balance_loss_coef <= 0:
            raise InputError("router_loss_coef and balance_loss_coef cannot be negative, and one must be above 0")
        was_packed = self.config.router_packed
        if was_packed:
            head.router.unpack()
            self.config.router_packed = False
        loss, mean = _JointLoss(head, router_loss_coef, balance_loss_coef), None
        try:
            with loss.added_to(self, self.base.base_model):
                yield
            mean = loss.mean_state() if was_packed else None
        finally:
            if was_packed:
                head.router.pack(mean=mean)
                self.config.router_packed = True


@dataclass
class _JointLoss:
    """The terms of joint training, added to a model's loss.

    Attributes:
        head: whose router and combiner, if any, are trained.
        router_coef: weight of the distillation term.
        balance_coef: weight of the balance term.
        hidden: hidden states of the current forward pass, [B, T, d].
        passes: number of times that terms were added.
        states: weighted sum of the hidden states of recent passes, and their weighted number, fp32 [d + 1].
    """

    head: TopKExpertsHead
    router_coef: float
    balance_coef: float
    hidden: Tensor | None = None
    passes: int = 0
    states: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start without states."""
        self.states = torch.zeros(self.head.in_features + 1, device=self.head.weight.device)

    def mean_state(self) -> Tensor | None:
        """The mean hidden state of recent passes over all processes, fp32 [d]; None if there were none."""
        if dist.is_available() and dist.is_initialized():  # all processes must end with the same model
            dist.all_reduce(self.states)
        return self.states[:-1] / self.states[-1] if self.states[-1] > 0 else None

    @contextmanager
    def added_to(self, model: Any, decoder: nn.Module) -> Iterator[None]:
        """Inside the context, add the terms to the loss that a model returns.

        Args:
            model: the converted model.
            decoder: of the model; it returns the hidden states.
        """
        parameters = list(self.head.router.parameters())
        if self.head.combine == "learned":
            parameters += self.head.combiner.parameters()
        bias = self.head.router.bias.detach().clone()
        hooks = [
            decoder.register_forward_hook(self._see_output),
            self.head.register_forward_pre_hook(self._see_input),  # takes precedence if the head is called
            model.register_forward_hook(self._add_to, with_kwargs=True),
        ]
        try:
            for parameter in parameters:
                parameter.requires_grad_()
            yield
            was_called = self.passes > 0 or self.hidden is not None
            if was_called and bias.equal(self.head.router.bias):
                logger.warning(
                    "Joint training did not change the router. Make the optimizer inside `joint_training`, so that it "
                    "has the router's parameters, and call the model itself, not its `forward`."
                )
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in parameters:
                parameter.requires_grad_(False).grad = None

    def _see_output(self, decoder: nn.Module, inputs: Any, output: Any) -> None:
        self.hidden = getattr(output, "last_hidden_state", self.hidden)

    def _see_input(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.hidden = inputs[0]

    def _add_to(self, model: nn.Module, args: Any, given: dict[str, Any], output: Any) -> Any:
        """Add the terms to the loss, or to the tokens' log-probabilities if a trainer computes the loss from those."""
        hidden, self.hidden = self.hidden, None
        is_trained = model.training and torch.is_grad_enabled()
        if is_trained and getattr(model, "_is_replica", False):  # the threads of replicas would mix up hidden states
            raise InputError(
                "joint training does not support nn.DataParallel, which trainers use with several visible GPUs: start "
                "with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one GPU"
            )
        if hidden is None or not is_trained:
            return output
        labels, is_shifted = given.get("shift_labels"), given.get("shift_labels") is not None
        labels = labels if is_shifted else given.get("labels")
        is_shifted = is_shifted or cast(Any, model).config.is_encoder_decoder  # its decoder inputs are shifted instead
        log_probs = getattr(output, "log_probs", None)
        has_loss = log_probs is not None or getattr(output, "loss", None) is not None
        if labels is None or not has_loss or not isinstance(output, ModelOutput):
            raise InputError(
                "joint training needs a loss in the model's output, and there is none: pass labels by name, and do not "
                "set return_dict=False, label_smoothing_factor or compute_loss_func"
            )
        if not is_shifted:
            hidden, labels = hidden[:, :-1], labels[:, 1:]
        has_label = (labels != -100).to(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            terms = self.terms(hidden[has_label].detach())
        self.passes += 1
        if log_probs is not None:
            weighed = torch.zeros(has_label.shape, device=terms.device).masked_scatter(has_label, terms)
            output["log_probs"] = _WeighedAlike.apply(log_probs, weighed.to(log_probs.device))
        else:
            count = given.get("num_items_in_batch")
            added = terms.sum() / torch.as_tensor(max(1, len(terms)) if count is None else count).to(terms.device)
            output["loss"] = output["loss"] + added.to(output["loss"].device)
        return output

    def terms(self, hidden: Tensor) -> Tensor:
        """The terms of each position: hidden states [N, d] to fp32 [N]."""
        head = self.head
        seen = F.pad(hidden.float(), (0, 1), value=1.0).sum(dim=0)
        self.states = KEPT_OF_EARLIER_STATES * self.states + seen.to(self.states.device)
        masses, scores = dense_masses(head, hidden), head.router(hidden)
        terms = self.router_coef * _distance(_with_always_on(scores, masses), masses)
        if head.combine == "learned":
            terms = terms + self.router_coef * _distance(_combined(head, hidden, masses), masses)
        return terms + self.balance_coef * _imbalance(scores, head.num_experts_per_tok)


class _WeighedAlike(torch.autograd.Function):
    """Returns values unchanged, and gives terms the absolute gradient of the values, so the same weight in the loss."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, terms: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.abs().float()


@torch.no_grad()
def dense_masses(head: TopKExpertsHead, hidden: Tensor) -> Tensor:
    """The scores of a perfect router, and the mass of the always-on tokens if there are any.

    Args:
        head: of whose dense logits the masses are, before the model caps or scales them.
        hidden: hidden states, [N, d].

    Returns:
        Log-sum-exp of the dense logits of each expert, and of the always-on tokens last: fp32 [N, M] or [N, M + 1].
    """
    check_whole(head)
    weight, bias = head.weight.to(hidden.dtype), None if head.full_bias is None else head.full_bias.to(hidden.dtype)
    masses = []
    for some in hidden.split(max(1, LOGITS_AT_ONCE // head.out_features)):
        logits = F.linear(some, weight, bias).float()
        by_expert = head.mask_padding(logits[:, head.expert_ids], head.expert_ids).logsumexp(dim=-1)
        always = [logits[:, head.always_on_ids].logsumexp(dim=-1, keepdim=True)] if head.num_always_on else []
        masses.append(torch.cat([by_expert, *always], dim=-1))
    return torch.cat(masses)


def _with_always_on(scores: Tensor, masses: Tensor) -> Tensor:
    return torch.cat([scores, masses[:, scores.shape[1] :]], dim=-1)


def divergence(predicted: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms that distillation minimises, the second with weight `LEVEL_WEIGHT`, as a softmax ignores the level.

    Args:
        predicted: scores, fp32 [N, M].
        masses: scores of a perfect router, fp32 [N, M].

    Returns:
        The summands of the KL divergence of the scores' distribution from that of the masses, [N, M], and the squared
        error of the scores' log-sum-exp, [N].
    """
    kl = F.kl_div(predicted.log_softmax(-1), masses.log_softmax(-1), log_target=True, reduction="none")
    return kl, (predicted.logsumexp(-1) - masses.logsumexp(-1)).square()


def _distance(predicted: Tensor, masses: Tensor) -> Tensor:
    """The loss of each position, [N]."""
    kl, off = divergence(predicted, masses)
    return kl.sum(dim=-1) + LEVEL_WEIGHT * off


def _combined(head: TopKExpertsHead, hidden: Tensor, masses: Tensor) -> Tensor:
    """The masses of experts and always-on tokens in the sparse head's logits, by which the combiner is trained."""
    with torch.no_grad():
        scores, top, estimated = head.pick(hidden)
        exact = masses.gather(1, top)
        offset = exact.logsumexp(-1, keepdim=True) - estimated.logsumexp(-1, keepdim=True)
    shifts, tail_scores = head.combiner(scores + offset, top, estimated - exact + offset)
    return _with_always_on(tail_scores.scatter(1, top, exact + shifts), masses)


def _imbalance(scores: Tensor, picked: int) -> Tensor:
    """The balance term of each position, [N]; 1 where all experts are equally likely."""
    num_experts = scores.shape[1]
    counts = scores.topk(picked, dim=-1).indices.flatten().bincount(minlength=num_experts)
    return num_experts * scores.softmax(dim=-1) @ (counts / counts.sum().clamp_min(1))
