"""Joint training: the terms added to the loss, the trained parameters, and the model afterwards."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.heads import dense_logits, make_head, make_hidden, scored_mask
from support.seq2seq_models import tiny_model
from support.tiny_models import pack_router_of, tiny_converted, tiny_dense
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_topk import InputError, TopKExpertsForCausalLM, TopKExpertsHead
from hf_topk.model.joint_training import dense_masses

pytestmark = pytest.mark.slow

IDS = torch.randint(2, 98, (3, 12), generator=torch.Generator().manual_seed(7))
LABELS = IDS.masked_fill(torch.rand(IDS.shape, generator=torch.Generator().manual_seed(8)) < 0.3, -100)

MANY = {"num_experts": 46, "expert_size": 2, "num_experts_per_tok": 10, "router_rank": 32}


def converted(**choices: Any) -> TopKExpertsForCausalLM:
    return tiny_converted(**choices).train()


def loss_of(model: Any, ids: Tensor = IDS, labels: Tensor = LABELS, **given: Any) -> Tensor:
    return model(input_ids=ids, labels=labels, **given).loss


def hidden_of(model: TopKExpertsForCausalLM) -> Tensor:
    """The hidden states of the tokens that have a successor with a label, [N, d]."""
    states = model.base_model(input_ids=IDS).last_hidden_state
    return states[:, :-1][LABELS[:, 1:] != -100].detach()


def masses_one_by_one(head: TopKExpertsHead, hidden: Tensor) -> Tensor:
    groups = [*head.expert_ids.unbind(), *([head.always_on_ids] if head.num_always_on else [])]
    logits = dense_logits(head, hidden).double()
    return torch.stack([logits[:, ids.unique()].logsumexp(-1) for ids in groups], dim=-1)


@pytest.mark.parametrize("sizes", [{}, {"num_always_on": 0, "num_experts": 7}])
@pytest.mark.parametrize("bias", [False, True])
def test_masses_are_those_of_the_dense_head(sizes: dict[str, int], bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_topk.model.joint_training.LOGITS_AT_ONCE", 300)  # three positions
    head, hidden = make_head(bias=bias, **sizes), make_hidden(1, 7)
    torch.testing.assert_close(dense_masses(head, hidden), masses_one_by_one(head, hidden).float())
    assert dense_masses(head, hidden[:0]).shape == (0, head.num_experts + bool(head.num_always_on))


def test_only_the_dense_model_is_trained_by_default(tmp_path: Path) -> None:
    model = converted(combine="learned")
    model.save_pretrained(tmp_path)
    for one in (model, AutoModelForCausalLM.from_pretrained(tmp_path).train()):
        trained = {name for name, parameter in one.base.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, _ in tiny_dense().named_parameters()}


def test_the_distillation_term_is_added_to_the_loss() -> None:
    model = converted()
    plain, hidden = loss_of(model), hidden_of(model)
    target, scores = masses_one_by_one(model.head, hidden), model.head.router(hidden).double()
    predicted = torch.cat([scores, target[:, -1:]], dim=-1)
    expected = F.kl_div(predicted.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
    expected += 0.01 * (predicted.logsumexp(-1) - target.logsumexp(-1)).square().mean()
    with model.joint_training(router_loss_coef=0.5):
        torch.testing.assert_close(loss_of(model), plain + 0.5 * expected.float())
    assert loss_of(model).equal(plain)


def test_terms_train_only_router_and_combiner() -> None:
    model = converted(combine="learned")
    loss_of(model).backward()
    plain = {name: parameter.grad for name, parameter in model.base.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    with model.joint_training():
        loss_of(model).backward()
        found = {name: parameter.grad for name, parameter in model.base.named_parameters()}
    assert all(found.pop(name).equal(gradient) for name, gradient in plain.items())
    assert found
    assert all(gradient is None or name.startswith("lm_head.") for name, gradient in found.items())
    trained = {name.removeprefix("lm_head.") for name, gradient in found.items() if gradient is not None}
    assert trained == {"router.rows", "router.bias", "combiner.gate", "combiner.shift", "combiner.tail_shift"}
    assert all(parameter.grad is None for parameter in model.head.router.parameters())


@pytest.mark.parametrize("num_experts_per_tok", [1, 4])
def test_the_combiner_s_gradient_is_that_of_the_kl_divergence(num_experts_per_tok: int) -> None:
    """Of the sparse logits from the dense logits, with the term of the level."""
    model = converted(combine="learned", num_experts_per_tok=num_experts_per_tok, num_always_on=4)  # none is short
    hidden, parameters = hidden_of(model), list(model.head.combiner.parameters())
    for number, parameter in enumerate(parameters):
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(number))
        parameter.requires_grad_()
    sparse, dense = model.head.sparse_logits(hidden), dense_logits(model.head, hidden).detach()
    kl = F.kl_div(sparse.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean")
    level = 0.01 * (sparse.logsumexp(-1) - dense.logsumexp(-1)).square().mean()
    expected = torch.autograd.grad(kl + level, parameters)
    with model.joint_training():
        found = torch.autograd.grad(loss_of(model), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_balance_is_one_for_equal_experts_and_more_otherwise() -> None:
    model = converted()
    for parameter in model.head.router.parameters():
        torch.nn.init.zeros_(parameter)
    plain = loss_of(model)
    with model.joint_training(router_loss_coef=0.0, balance_loss_coef=2.0):
        torch.testing.assert_close(loss_of(model), plain + 2.0)
        with torch.no_grad():
            model.head.router.bias[:2] = 50.0
        torch.testing.assert_close(loss_of(model), plain + 2.0 * model.head.num_experts / 2)
        loss_of(model).backward()
    assert model.head.num_experts_per_tok == 2


def test_accumulated_batches_have_the_loss_of_one_batch() -> None:
    """With `num_items_in_batch` of all parts, as trainers accumulate gradients."""
    model, count = converted(), (LABELS[:, 1:] != -100).sum()
    with model.joint_training():
        whole = loss_of(model)
        parts = [loss_of(model, IDS[one], LABELS[one], num_items_in_batch=count) for one in (slice(0, 1), slice(1, 3))]
        torch.testing.assert_close(sum(parts), whole)
        shifted = F.pad(LABELS[:, 1:], (0, 1), value=-100)
        torch.testing.assert_close(loss_of(model, shift_labels=shifted), whole)


def test_a_batch_without_labels_adds_no_loss_but_has_a_gradient() -> None:
    model = converted(combine="learned")
    with model.joint_training():
        loss_of(model, labels=torch.full_like(IDS, -100), num_items_in_batch=4).backward()
        assert all(not parameter.grad.any() for parameter in model.head.combiner.parameters())


def test_evaluation_uses_the_dense_head() -> None:
    model = converted(sparse_max_positions=16)
    plain = loss_of(model)
    with model.joint_training():
        with torch.no_grad():
            assert loss_of(model).equal(plain)
        assert loss_of(model.eval()).equal(plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_router_is_in_floats_inside_the_context(dtype: torch.dtype, tmp_path: Path) -> None:
    model = pack_router_of(tiny_converted(tiny_dense().to(dtype)).train())
    before, hidden = copy.deepcopy(model.head.router.state_dict()), make_hidden(2, 5, dtype)
    scores = model.head.router(hidden)
    with model.joint_training():
        assert {name for name, _ in model.head.router.named_parameters()} == {"rows", "bias"}
        assert all(one.dtype == dtype and one.requires_grad for one in model.head.router.parameters())
        torch.testing.assert_close(model.head.router(hidden), scores, rtol=3e-2, atol=1e-1)
        model.save_pretrained(tmp_path / "inside")
        inside = model.head.router(hidden)
    assert {name: tensor.dtype for name, tensor in model.head.router.state_dict().items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }
    assert model.config.router_packed
    assert not any(parameter.requires_grad for parameter in model.head.router.parameters())
    model.save_pretrained(tmp_path / "after")
    for folder, expected in (("inside", inside), ("after", model.head.router(hidden))):
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values())
        assert loaded.config.router_packed == (folder == "after")
        assert loaded.head.router(hidden).equal(expected)


def test_an_untrained_packed_router_is_unchanged() -> None:
    model = pack_router_of(converted(**MANY))
    before = {name: tensor.clone() for name, tensor in model.head.router.state_dict().items()}
    with model.joint_training():
        pass
    after = model.head.router.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-4, atol=1e-4)


def test_packing_keeps_most_of_the_training() -> None:
    torch.manual_seed(0)
    model = pack_router_of(converted(**MANY))
    hidden = hidden_of(model)
    target = masses_one_by_one(model.head, hidden)

    @torch.no_grad()
    def divergence() -> float:
        predicted = torch.cat([model.head.router(hidden).double(), target[:, -1:]], dim=-1).log_softmax(-1)
        return float(F.kl_div(predicted, target.log_softmax(-1), log_target=True, reduction="batchmean"))

    before = divergence()
    for parameter in model.base.parameters():
        parameter.requires_grad_(False)
    with model.joint_training():
        optimizer = torch.optim.Adam(model.head.router.parameters(), lr=0.03)
        for _ in range(150):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        learned = divergence()
    assert learned < 0.01 * before
    assert divergence() < 0.1 * before


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_scored_tokens_keep_the_trained_head_s_logits(model_type: str, autocast: bool, checkpointing: bool) -> None:
    sizes = {} if model_type != "gemma2" else {"head_dim": 8, "final_logit_softcapping": None}
    model = tiny_converted(tiny_dense(model_type, **sizes)).train()
    model.resize_token_embeddings(104)
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    head, before = model.head, model.head.weight.detach().clone()
    with model.joint_training():
        optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=1e-2)
        losses = []
        for _ in range(8):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                losses.append(loss_of(model))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0] - 1
    assert not head.weight.equal(before)
    hidden = make_hidden(4, 6)
    with torch.no_grad():
        sparse, scored = head.sparse_logits(hidden), scored_mask(head, hidden)
        torch.testing.assert_close(sparse[scored], dense_logits(head, hidden)[scored], rtol=1e-4, atol=1e-4)
    assert sparse.isfinite().all()


def test_router_follows_a_head_that_moves() -> None:
    torch.manual_seed(0)
    without, within = converted(num_experts_per_tok=1), converted(num_experts_per_tok=1)

    def train(model: TopKExpertsForCausalLM) -> None:
        optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=1e-2)
        for _ in range(60):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(without)
    with within.joint_training():
        train(within)
    hidden = hidden_of(within)
    for name, parameter in without.base_model.named_parameters():  # the terms have not changed what the decoder learns
        assert parameter.equal(within.base_model.get_parameter(name))
    divergences = []
    for model in (without, within):
        masses = masses_one_by_one(model.head, hidden)[:, :-1]
        scores = model.head.router(hidden).double()
        divergences.append(
            F.kl_div(scores.log_softmax(-1), masses.log_softmax(-1), log_target=True, reduction="batchmean")
        )
    assert divergences[1] < 0.5 * divergences[0]


def test_warns_if_the_optimizer_lacks_the_router(caplog: pytest.LogCaptureFixture) -> None:
    model = converted()
    optimizer = torch.optim.Adam(one for one in model.parameters() if one.requires_grad)
    logging.getLogger("hf_topk").setLevel(logging.WARNING)
    with model.joint_training():
        loss_of(model).backward()
        optimizer.step()
    assert "Make the optimizer inside" in caplog.text


@pytest.mark.parametrize("coefs", [(-1.0, 2.0), (1.0, -0.1), (0.0, 0.0)])
def test_refuses_coefficients_that_train_nothing(coefs: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="cannot be negative"), converted().joint_training(*coefs):
        pass


@pytest.mark.parametrize("given", [{}, {"labels": IDS, "return_dict": False}])
def test_refuses_a_model_without_a_loss(given: dict[str, Any]) -> None:
    model = converted()
    with model.joint_training(), pytest.raises(InputError, match="needs a loss in the model's output"):
        model(input_ids=IDS, **given)
    assert loss_of(model).isfinite()


def test_refuses_data_parallel_threads() -> None:
    model = converted()
    with model.joint_training():
        replica = model._replicate_for_data_parallel()  # as nn.DataParallel makes one for each of its threads
        with pytest.raises(InputError, match="accelerate launch"):
            loss_of(replica)
        with torch.no_grad():
            assert loss_of(replica).equal(loss_of(model))


def test_refuses_a_head_with_something_around_it() -> None:
    model = converted()
    model.base.set_submodule("lm_head", torch.nn.Sequential(model.head))
    with pytest.raises(InputError, match=r"Sequential around the head.*merge"), model.joint_training():
        pass


def test_loads_a_checkpoint_s_tensors_as_trainers_do(tmp_path: Path) -> None:
    model, other = converted(), tiny_converted(tiny_dense(tied=True))
    torch.nn.init.normal_(model.base_model.layers[0].mlp.up_proj.weight)
    torch.nn.init.normal_(model.head.router.rows)
    model.save_pretrained(tmp_path)
    found = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert found.missing_keys == ["base.lm_head.weight"]  # tied
    assert not found.unexpected_keys
    for one in (model.state_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}):
        assert all(tensor.equal(one[name]) for name, tensor in other.state_dict().items())
        other.load_state_dict(one)
    del one["base.lm_head.router.bias"]  # what is given in part is loaded in part
    assert other.load_state_dict(one, strict=False).missing_keys == ["base.lm_head.router.bias"]


def test_refuses_a_router_in_the_other_form() -> None:
    """If it was saved inside the context and is loaded outside, or the reverse."""
    floats, packed = converted(), pack_router_of(converted())
    with pytest.raises(InputError, match="in floats in the model and packed in the checkpoint: load it inside"):
        floats.load_state_dict(packed.state_dict(), strict=False)
    names = {name.removeprefix("base."): tensor for name, tensor in floats.state_dict().items()}
    with pytest.raises(InputError, match="packed in the model and in floats in the checkpoint"):
        packed.load_state_dict(names, strict=False)
    with packed.joint_training():
        packed.load_state_dict(names, strict=False)
        assert packed.head.router.rows.equal(floats.head.router.rows)


@pytest.mark.parametrize("model_type", ["t5", "marian", "whisper"])
def test_an_encoder_decoder_is_trained_on_what_enters_its_head(model_type: str) -> None:
    """T5 scales it, and Marian adds a bias to the logits; its labels are not shifted."""
    dense, inputs = tiny_model(model_type)
    model = tiny_converted(dense, num_experts_per_tok=2)
    labels = LABELS[:2, :6].contiguous()
    states: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda _, arguments: states.append(arguments[0].detach()))
    alone = model(**inputs, labels=labels).loss  # in evaluation mode, in which nothing is dropped
    with model.joint_training():
        for module in model.modules():
            module.training = module is model
        loss = model(**inputs, labels=labels).loss
        hidden = states[-1][labels != -100]
        logits = dense_logits(model.head, hidden) + (0 if model.head.later_bias is None else model.head.later_bias)
        experts = logits[:, model.head.expert_ids].logsumexp(-1)
        scores, always = model.head.router(hidden), logits[:, model.head.always_on_ids].logsumexp(-1, keepdim=True)
        kl = F.kl_div(
            torch.cat([scores, always], -1).log_softmax(-1),
            torch.cat([experts, always], -1).log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
        assert loss > alone + 0.9 * kl > alone
        optimizer = torch.optim.AdamW(model.head.router.parameters(), lr=1e-2)
        for _ in range(20):
            model(**inputs, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model(**inputs, labels=labels).loss < alone + 0.7 * (loss - alone)
