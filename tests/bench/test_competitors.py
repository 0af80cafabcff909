"""The models that the benchmark times, and the text that they decode from."""

from dataclasses import replace

import pytest
import torch
from support.tiny_models import tiny_converted, tiny_dense
from torch import Tensor, nn
from transformers import GenerationConfig

from hf_topk.bench.competitors import Competitors, NoHead, sampled_text
from hf_topk.bench.decode_speed import Decoding
from hf_topk.bench.prompts import PROMPT_LENGTH, Prompt

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_competitors_share_all_tensors_and_differ_in_the_head(model_type: str) -> None:
    own = tiny_converted(tiny_dense(model_type), num_experts_per_tok=6, head_mode="dense")
    models = Competitors.of(own)
    assert models.sparse is own
    own.head_mode = "auto"
    dense_tensors = {id(parameter) for parameter in models.dense.parameters()}
    for model in (own, models.no_head):
        outside = [tensor for name, tensor in model.named_parameters() if "router" not in name and "tail" not in name]
        assert {id(tensor) for tensor in outside} <= dense_tensors
    assert type(models.dense.get_output_embeddings()) is torch.nn.Linear
    ids = torch.tensor([[5, 17, 40]])
    with torch.inference_mode():
        dense = models.dense(input_ids=ids).logits
        # All experts are scored.
        torch.testing.assert_close(own(input_ids=ids).logits, dense, atol=1e-4, rtol=1e-4)
        ready = models.no_head(input_ids=ids[:, :1]).logits
    assert ready.shape == (1, 1, own.head.out_features)


def test_text_of_the_dense_model_starts_with_its_first_token() -> None:
    torch.manual_seed(0)
    models = Competitors.of(tiny_converted())
    entered: list[Tensor] = []
    models.dense.get_output_embeddings().register_forward_pre_hook(lambda _, given: entered.append(given[0][:, -1]))
    states, prompts = sampled_text(models, positions=30, batch=8)
    assert len(entered) == PROMPT_LENGTH - 1 + 4
    torch.testing.assert_close(states, torch.cat(entered[-4:]))
    ids = prompts(5).inputs["input_ids"]
    assert ids.shape == (5, PROMPT_LENGTH)
    assert ids[:, 0].eq(0).all()
    with torch.inference_mode():
        last = models.dense.model(input_ids=ids[:1]).last_hidden_state[:, -1]
    assert (states[:8] - last).abs().amax(dim=-1).min() < 1e-4  # the first recorded state follows the prompt


def test_text_of_a_model_without_a_first_token_starts_at_random() -> None:
    torch.manual_seed(0)
    models = Competitors.of(tiny_converted())
    models.dense.generation_config = GenerationConfig(pad_token_id=0)
    _, prompts = sampled_text(models, positions=8, batch=8)
    assert len(prompts(64).inputs["input_ids"][:, 0].unique()) > 1


def test_every_comparison_decodes_from_the_same_prompts() -> None:
    models, given = Competitors.of(tiny_converted(num_rescored=20)), list[Tensor]()

    def recorded(rows: int) -> Prompt:
        prompt = models.prompts(rows)
        given.append(prompt.inputs["input_ids"])
        return prompt

    decoding = Decoding(replace(models, prompts=recorded), rounds=2)
    decoding.greedy()
    decoding.sampling()
    first, second = given[:3], given[3:]  # one round warms up
    assert all(one.equal(same) for one, same in zip(first, second, strict=True))
    assert not first[1].equal(first[2])


def test_constant_logits_have_a_row_for_each_sequence() -> None:
    ready = NoHead(50, torch.bfloat16)
    assert ready(torch.zeros(3, 1, 8)).shape == (3, 1, 50)
    assert ready(torch.zeros(3, 1, 8)).dtype == torch.bfloat16


def test_compiled_constant_logits_leave_no_layer_out() -> None:
    ready = NoHead(50, torch.float32)
    model = nn.Sequential(nn.Linear(8, 8), ready)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for hidden in (torch.full((2, 1, 8), 3.0), torch.full((2, 1, 8), -5.0)):
        compiled(hidden)
        torch.testing.assert_close(ready.kept[:2], model[0](hidden)[:, 0, 0])
