"""Layers set as output embeddings of a converted model; refused ones leave the model unchanged."""

import copy
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_converted, tiny_dense
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_topk import InputError, TopKExpertsForCausalLM

PROMPT = torch.tensor([[5, 17, 42, 8, 23]])


class Scaled(nn.Linear):
    """A linear layer that scales its outputs."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 0.5 * super().forward(hidden)


class Capped(nn.Linear):
    """A layer that caps its logits."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).tanh()


class OfItsOwn(nn.Module):
    """A linear layer that is not an `nn.Linear`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(100, 32))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.t()


class OfInt8(OfItsOwn):
    """A linear layer with int8 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((self.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ (self.weight * self.scale).t()


class WithoutWeight(nn.Module):
    """A linear layer without a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 100)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden)


class TwoResults(nn.Linear):
    """A layer that returns a tuple."""

    def forward(self, hidden: Tensor) -> Any:
        return super().forward(hidden), hidden


def converted(**choices: Any) -> TopKExpertsForCausalLM:
    return tiny_converted(tiny_dense(tied=False), num_experts_per_tok=6, head_mode="sparse", **choices)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(input_ids=PROMPT).logits


def with_head(model: TopKExpertsForCausalLM, head: nn.Module) -> Any:
    """The dense model with this head."""
    dense = copy.deepcopy(model.base)
    dense.lm_head = copy.deepcopy(head)
    return dense


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(32, 100),
        lambda: nn.Linear(32, 100, bias=False),
        lambda: nn.Linear(32, 90),
        lambda: nn.Linear(32, 120),
        lambda: Scaled(32, 100),
        OfItsOwn,
        OfInt8,
    ],
    ids=["biased", "plain", "fewer rows", "more rows", "scaled", "of its own", "int8"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_becomes_the_head(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, layer = converted().to(dtype), make()
    layer = layer.to(dtype) if not isinstance(layer, OfInt8) else layer
    if isinstance(layer, OfInt8):
        layer.scale = layer.scale.to(dtype)
    before, old = logits_of(model), model.get_output_embeddings()
    expected = logits_of(with_head(model, layer))
    model.set_output_embeddings(layer)
    rounding = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.05}
    torch.testing.assert_close(logits_of(model), expected, **rounding)
    model.head_mode = "dense"
    torch.testing.assert_close(logits_of(model), expected, **rounding)
    model.head_mode = "sparse"
    model.set_output_embeddings(old)  # as it was
    assert logits_of(model).equal(before)
    assert model.config.num_always_on == 8


def test_a_plain_layer_is_shared() -> None:
    model, layer = converted(), nn.Linear(32, 100, bias=False)
    model.set_output_embeddings(layer)
    assert model.head.weight is layer.weight


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (WithoutWeight, "this WithoutWeight has no `weight`"),
        (nn.Identity, "this Identity has no `weight`"),
        (lambda: nn.Linear(16, 100), "has 16 inputs, but hidden states have size 32"),
        (lambda: Scaled(16, 100), "this Scaled cannot compute logits from hidden states of size 32"),
        (lambda: nn.Embedding(100, 32), "this Embedding cannot compute logits"),
        (lambda: TwoResults(32, 100), "this TwoResults cannot compute logits"),
        (lambda: Capped(32, 100), r"this Capped does not compute W h \+ b"),
        (lambda: nn.Linear(32, 1), "a head of 1 rows leaves no token to route"),
    ],
)
def test_a_layer_that_is_not_linear_is_refused(make: Any, reason: str) -> None:
    model, layer = converted(), make()
    head = model.head
    with torch.no_grad():  # the first token is in no expert
        head.expert_ids[head.expert_ids == 0] = head.always_on_ids[0].item()
        head.always_on_ids[0] = 0
    before, tensors = logits_of(model), dict(model.state_dict())
    config = model.config.to_dict()
    with pytest.raises(InputError, match=reason):
        model.set_output_embeddings(layer)
    assert model.head is head
    assert model.config.to_dict() == config
    assert model.state_dict().keys() == tensors.keys()
    assert all(tensor is tensors[name] or tensor.equal(tensors[name]) for name, tensor in model.state_dict().items())
    assert logits_of(model).equal(before)


@pytest.mark.parametrize("tied", [False, True])
def test_a_replaced_head_is_saved(tied: bool, tmp_path: Any) -> None:
    model = tiny_converted(tiny_dense(tied=tied), num_experts_per_tok=6, head_mode="sparse")
    embeddings = model.get_input_embeddings().weight.clone()
    layer = nn.Linear(32, 100, bias=False)
    nn.init.normal_(layer.weight)
    model.set_output_embeddings(layer)
    expected = logits_of(model)
    torch.testing.assert_close(expected, F.linear(states_of(model), layer.weight), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-4, atol=1e-4)
    assert loaded.get_input_embeddings().weight.equal(embeddings)


@torch.no_grad()
def states_of(model: TopKExpertsForCausalLM) -> Tensor:
    return model.base_model(input_ids=PROMPT).last_hidden_state
