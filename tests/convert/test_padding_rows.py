"""Padding rows of the head, without a token in the tokenizer, as in most published vocabularies."""

import copy
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support.tiny_models import QUICK, VOCAB_SIZE, tiny_dense
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TemperatureLogitsWarper

from hf_topk import TopKExpertsForCausalLM
from hf_topk.convert import Recipe, convert
from hf_topk.documents import read_documents
from hf_topk.evaluation.fidelity import measure_fidelity
from hf_topk.model.token_chooser import TokenChooser
from hf_topk.windows import Window, make_windows

TOKENS = 70  # of the tokenizer; the other 30 rows are padding
TEMPERATURE, DRAWS = 1.5, 20_000
RECIPE = Recipe(
    **{**QUICK, "positions": 2000, "distill_steps": 100, "router_rank": 16, "tail_rank": 16},
    num_always_on=4,
    num_experts_per_tok=2,
    num_rescored=12,
)


@pytest.fixture
def dense() -> PreTrainedModel:
    """A dense model whose padding rows are different and unlikely, as after training."""
    dense = tiny_dense(tied=False, bias=True)
    head = dense.get_output_embeddings()
    with torch.no_grad():
        head.weight[TOKENS:] *= 0.5
        head.bias[TOKENS:] = -9
    return dense


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<|endoftext|>": 0, **{f"w{number}": number for number in range(1, TOKENS)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def write_text(file: Path, seed: int, every_third: str | None = None) -> Path:
    """Write random words, one document per line; every third word may be a given one."""
    numbers = torch.randint(1, TOKENS, (8, 300), generator=torch.Generator().manual_seed(seed)).tolist()
    words = [[every_third if every_third and not i % 3 else f"w{n}" for i, n in enumerate(row)] for row in numbers]
    file.write_text("\n".join(json.dumps({"text": " ".join(row)}) for row in words))
    return file


def windows_of(file: Path, tokenizer: PreTrainedTokenizerFast) -> list[Window]:
    windows = make_windows(read_documents(str(file)), tokenizer, 32, None, seed=0)
    return [window for window in windows if len(window.token_ids) == 32]


def converted(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: Path) -> TopKExpertsForCausalLM:
    return convert(dense, tokenizer, Recipe.from_dict({**RECIPE.to_dict(), "text": str(text)})).model


@torch.no_grad()
def hidden_states(model: TopKExpertsForCausalLM, windows: list[Window]) -> Tensor:
    ids = torch.tensor([window.token_ids for window in windows])
    return model.base_model(input_ids=ids).last_hidden_state.flatten(0, 1)


@torch.no_grad()
def test_padding_rows_are_sampled_no_more_often_than_by_the_dense_head(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = converted(dense, tokenizer, write_text(tmp_path / "text.jsonl", seed=1))
    model.head_mode = "sparse"
    head = model.head
    assert not (head.always_on_ids >= TOKENS).any()
    hidden = hidden_states(model, windows_of(write_text(tmp_path / "other.jsonl", seed=2), tokenizer))[:1000]
    by_dense, by_sparse = (
        (logits / TEMPERATURE).softmax(-1)[:, TOKENS:].sum(-1).mean() * DRAWS
        for logits in (head.dense_logits(hidden), head.sparse_logits(hidden))
    )
    assert 1 < by_dense < 50
    assert 0.5 * by_dense < by_sparse < 2 * by_dense
    chooser = TokenChooser(head, [TemperatureLogitsWarper(TEMPERATURE)], does_sample=True)
    torch.manual_seed(0)
    drawn = torch.cat(
        [chooser.choose(torch.zeros(1000, 1, dtype=torch.long), head.score(hidden)) for _ in range(DRAWS // 1000)]
    )
    assert len(drawn) == DRAWS
    assert 0 < (drawn >= TOKENS).sum() < 2 * by_dense


@pytest.mark.slow
def test_a_new_token_in_a_padding_row_is_scored_after_joint_training_or_conversion(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    plain = converted(dense, tokenizer, write_text(tmp_path / "text.jsonl", seed=1))
    joint = copy.deepcopy(plain)
    tokenizer.add_tokens(["new"])
    new = tokenizer.convert_tokens_to_ids("new")
    assert new == TOKENS < VOCAB_SIZE
    text = write_text(tmp_path / "new.jsonl", seed=2, every_third="new")
    held_out = windows_of(write_text(tmp_path / "held out.jsonl", seed=3, every_third="new"), tokenizer)
    for model in (plain, joint):
        fine_tune(model, windows_of(text, tokenizer), jointly=model is joint)
    again = converted(dense, tokenizer, text)  # whose tensors are those of `plain`
    assert new in again.head.always_on_ids
    reached = [share_reached(model, new, held_out) for model in (plain, joint, again)]
    assert reached[0] < 0.1
    assert reached[1] > 0.9
    assert reached[2] == 1.0
    agreement = [measure_fidelity(model, held_out).agreement for model in (plain, joint, again)]
    assert agreement[0] + 0.2 < agreement[1] < agreement[2]
    assert agreement[2] > 0.85


def share_reached(model: TopKExpertsForCausalLM, token: int, windows: list[Window]) -> float:
    """The share of positions with this dense argmax where the sparse argmax is the same."""
    hidden = hidden_states(model, windows)
    is_next, is_reached = (
        logits.argmax(-1) == token for logits in (model.head.dense_logits(hidden), model.head.sparse_logits(hidden))
    )
    assert is_next.float().mean() > 0.2
    return float(is_reached[is_next].float().mean())


def fine_tune(model: TopKExpertsForCausalLM, windows: list[Window], jointly: bool) -> None:
    ids = torch.tensor([window.token_ids for window in windows])
    with model.train().joint_training() if jointly else nullcontext():
        optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=1e-2)
        for _ in range(60):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
