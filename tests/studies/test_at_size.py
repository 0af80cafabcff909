"""A conversion of a model with a random head: its states, its metrics, and the command that prints them."""

import json

import pytest
import torch
from support.tiny_models import QUICK

from hf_topk.cli import main
from hf_topk.convert import Recipe
from hf_topk.convert.steps.hidden_states import recorded_head_input
from hf_topk.model.errors import InputError
from studies import at_size

pytestmark = pytest.mark.slow

VOCAB_SIZE, HIDDEN_SIZE = 500, 48


def test_states_depend_on_earlier_tokens_and_have_peaked_logits() -> None:
    model, frequencies = at_size.model_with_random_head(VOCAB_SIZE, HIDDEN_SIZE, seed=0)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert frequencies.max() > 10 * frequencies.median()
    windows = at_size.random_windows(frequencies, 650, seed=0)
    assert sum(len(window.token_ids) for window in windows) == 650
    token_ids = torch.tensor([window.token_ids for window in windows[:3]])
    with torch.inference_mode(), recorded_head_input(model) as head_input:
        model(input_ids=token_ids)
        together = head_input.states
        model(input_ids=token_ids[1:2, :50])
        assert torch.equal(together[1:2, :50], head_input.states)
    probabilities = (together.float() @ model.lm_head.weight.detach().float().t()).softmax(dim=-1)
    assert 0.2 < float(probabilities.amax(dim=-1).mean()) < 0.95


def test_the_metrics_are_of_a_conversion() -> None:
    recipe = Recipe.from_dict({**QUICK, "positions": 2000, "target_agreement": 0.8, "allow_below_target": True})
    metrics = at_size.convert_at_size(VOCAB_SIZE, HIDDEN_SIZE, recipe)
    steps = metrics["step_seconds"]
    assert list(steps) == [
        "hidden states", "token statistics", "partition", "experts' masses", "distillation", "operating point",
    ]  # fmt: skip
    assert metrics["head_bytes"] == 2 * VOCAB_SIZE * HIDDEN_SIZE
    assert metrics["peak_share"] == metrics["peak_bytes"] / (2 * metrics["head_bytes"] + 2 * 10**9)
    assert metrics["agreement"] > 0.5
    assert json.dumps(metrics)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--shape", "lama"], "unknown shape 'lama': choose one of gemma-3-270m, gemma-3-1b"),
        (["--vocab-size", "100"], "no size: give --shape"),
    ],
)
def test_invalid_sizes_are_refused(
    arguments: list[str], reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["at_size", *arguments])
    with pytest.raises(SystemExit) as caught:
        main(at_size.app)
    assert caught.value.code == InputError.exit_code
    assert reason in capsys.readouterr().err
