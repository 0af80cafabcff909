"""Tokens chosen without logits of the whole vocabulary have the distribution of those chosen with them."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from support.heads import make_head, make_hidden, seeds, sizes
from support.tiny_models import VOCAB_SIZE, tiny_converted, tiny_dense
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import logits_process as processors

from hf_topk import TopKExpertsForCausalLM, TopKExpertsHead
from hf_topk.model import token_chooser
from hf_topk.model.candidates import Candidates
from hf_topk.model.draws import draw
from hf_topk.model.suppression import Priors
from hf_topk.model.token_chooser import TokenChooser, can_choose

PREFIX = torch.tensor([[5, 17, 42, 8, 17, 3], [99, 3, 64, 2, 77, 99]])


def rule_of_timestamps(value: float) -> Any:
    """Whisper's: tokens from some id on are timestamps, and the prompt is a part of the prefix, or all of it."""
    config = GenerationConfig(eos_token_id=int(40 * value))
    config.no_timestamps_token_id = int(98 * (1 - value**3))  # few, so that text can be likelier
    config.max_initial_timestamp_index = 10
    return processors.WhisperTimeStampLogitsProcessor(config, begin_index=(3, 5, 6)[int(100 * value) % 3])


# As Transformers orders them.
WARPERS: dict[str, Any] = {
    "penalty": lambda value: processors.RepetitionPenaltyLogitsProcessor(1 + value),
    "bad_words": lambda value: processors.NoBadWordsLogitsProcessor([[token] for token in range(1 + int(90 * value))]),
    "min_length": lambda value: processors.MinLengthLogitsProcessor(int(12 * value), torch.tensor([7, 8])),
    "min_new_tokens": lambda value: processors.MinNewTokensLengthLogitsProcessor(2, int(8 * value), 9),
    "forced_bos": lambda _: processors.ForcedBOSTokenLogitsProcessor(11),
    "forced_eos": lambda value: processors.ForcedEOSTokenLogitsProcessor(6 + int(3 * value), 9),
    "suppressed": lambda value: processors.SuppressTokensLogitsProcessor(range(int(90 * value), 95)),
    "at_begin": lambda value: processors.SuppressTokensAtBeginLogitsProcessor(range(40), 5 + int(3 * value)),
    "timestamps": rule_of_timestamps,
    "temperature": lambda value: processors.TemperatureLogitsWarper(0.3 + 2 * value),
    "top_k": lambda value: processors.TopKLogitsWarper(1 + int(150 * value)),
    "top_p": lambda value: processors.TopPLogitsWarper(0.01 + 0.98 * value),
    "min_p": lambda value: processors.MinPLogitsWarper(value**3),
}
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


def some_of(names: Any, most: int) -> st.SearchStrategy[list[Any]]:
    """Logits processors of these kinds, with random settings."""
    chosen = st.lists(st.sampled_from(list(names)), unique=True, max_size=most)
    values = st.lists(st.floats(0.01, 0.99), min_size=len(WARPERS), max_size=len(WARPERS))
    return st.builds(
        lambda names, values: [
            make(value) for (name, make), value in zip(WARPERS.items(), values, strict=True) if name in names
        ],
        chosen,
        values,
    )


def processed(scores: Tensor, found: list[Any], prefix: Tensor = PREFIX) -> Tensor:
    """Logits [B, V] after Transformers' processors; settings where rounding decides are left out."""
    prefix = prefix[: len(scores)]
    for one in found:
        before, scores = scores, one(prefix, scores.clone())
        assume(not scores.isneginf().all(dim=-1).any())  # Transformers draws from no token there
        ranked = before.double().softmax(-1).sort(descending=True).values.cumsum(-1)
        if isinstance(one, processors.TopPLogitsWarper):
            assume(((ranked - one.top_p).abs() > 1e-5).all())
        if isinstance(one, processors.MinPLogitsWarper):
            best = before.amax(-1, keepdim=True)
            assume(((before - best).exp() / one.min_p - 1).abs().min() > 1e-4)
        if isinstance(one, processors.TopKLogitsWarper) and one.top_k < VOCAB_SIZE:
            near = before.sort(descending=True).values[:, one.top_k - 1 : one.top_k + 1]
            is_clear = (near[:, 0] - near[:, -1]).abs() > 1e-4
            assume((is_clear | (near[:, 0] == near[:, -1])).all())
        if isinstance(one, processors.WhisperTimeStampLogitsProcessor):
            one._detect_timestamp_from_logprob = False
            text, timestamps = one(prefix, before).split(
                [one.timestamp_begin, VOCAB_SIZE - one.timestamp_begin], dim=-1
            )
            one._detect_timestamp_from_logprob = True
            assume(((timestamps.logsumexp(-1) - text.amax(-1)).abs() > 1e-4).all())
    return scores


def probabilities_of(head: TopKExpertsHead, hidden: Tensor, found: list[Any]) -> Tensor:
    """The probability with which a generation with these processors draws each token, [B, V]."""
    chooser = TokenChooser(head, found, does_sample=True)
    left: list[Tensor] = []

    def drawn(candidates: Candidates) -> Tensor:
        """The places of the rows in `left`, in place of their tokens."""
        left.extend(distribution(candidates, head))
        return torch.arange(len(left))[-len(candidates._ids) :]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Candidates, "drawn", drawn)
        places = chooser.choose(PREFIX[: len(hidden)], head.score(hidden))
    return torch.stack(left)[places]


def distribution(candidates: Candidates, head: TopKExpertsHead) -> Tensor:
    """The probability with which each token is drawn, [B, V], token by token."""
    entries, num_experts = candidates._entries(), 0 if candidates._rest_is_removed else head.num_experts
    of_tokens, of_experts = entries.weights.split([entries.weights.shape[1] - num_experts, num_experts], dim=-1)
    tokens = candidates._ids
    if tokens.shape[1] < of_tokens.shape[1]:
        tokens = torch.cat([tokens, head.expert_ids[candidates._experts].flatten(1)], dim=-1)
    by_token = torch.zeros(len(of_tokens), head.out_features).scatter_add_(1, tokens, of_tokens)
    if num_experts:
        everything = torch.arange(num_experts)
        expanded = torch.stack([candidates._expanded(row, everything, entries) for row in range(len(by_token))])
        torch.testing.assert_close(expanded.sum(dim=-1)[of_experts > 0], of_experts[of_experts > 0])
        expanded *= (of_experts > 0).unsqueeze(-1)
        by_token.scatter_add_(1, head.expert_ids.flatten().expand(len(by_token), -1), expanded.flatten(1))
    if candidates._top_p < 1:
        rows = list(range(len(by_token)))
        are_outside = [candidates._are_outside(weights, entries, rows) for weights in by_token.split(1, dim=1)]
        by_token = by_token.masked_fill(torch.cat(are_outside, dim=1), 0.0)
    return by_token.double() / by_token.double().sum(dim=-1, keepdim=True)


@settings(max_examples=150, deadline=None)
@given(
    seed=seeds,
    positions=st.integers(1, 2),
    choices=sizes(),
    num_rescored=st.integers(1, 60),
    spreads=st.tuples(*[st.sampled_from([0.1, 1.0, 4.0])] * 2),
    combine=st.sampled_from(["exact", "exact", "learned"]),
    found=some_of(("penalty", *SAMPLING), 5) | some_of(WARPERS, 3),
)
def test_probabilities_are_those_of_the_sparse_logits(
    seed: int,
    positions: int,
    choices: dict[str, int],
    num_rescored: int,
    spreads: tuple[float, float],
    combine: str,
    found: list[Any],
) -> None:
    """After any of the usual processors, against Transformers' own on all logits."""
    head, hidden = make_head(num_rescored=num_rescored, combine=combine, **choices), make_hidden(seed, positions)
    hidden = hidden * torch.tensor(spreads[:positions]).unsqueeze(1)
    expected = processed(head.sparse_logits(hidden), found).double().softmax(-1)
    torch.testing.assert_close(probabilities_of(head, hidden, found), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("top_k", 0.01), ("min_p", 0.2)])
def test_more_candidates_are_listed_for_the_rows_that_need_them(
    name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row has a flat distribution, the other one likely token."""
    head, hidden = make_head(num_rescored=30), make_hidden(1, 2) * torch.tensor([[0.01], [20.0]])
    listed: list[int] = []
    list_picked = Candidates._list_picked

    def watched(self: Candidates) -> bool:
        has_listed = list_picked(self)
        listed.extend([len(self._ids)] * has_listed)
        return has_listed

    monkeypatch.setattr(Candidates, "_list_picked", watched)
    found = [WARPERS[name](value)]
    expected = found[0](PREFIX, head.sparse_logits(hidden)).double().softmax(-1)
    torch.testing.assert_close(probabilities_of(head, hidden, found), expected, rtol=1e-3, atol=1e-5)
    assert listed == [1]


prefixes = st.lists(st.lists(st.sampled_from([2, 17, 98, 99]), min_size=8, max_size=8), min_size=1, max_size=2)


@settings(max_examples=100, deadline=None)
@given(
    seed=seeds,
    prefix=prefixes.map(torch.tensor),
    choices=sizes(),
    num_rescored=st.integers(1, 20),
    spread=st.sampled_from([0.1, 0.3, 1.0]),
    found=some_of(["timestamps"], 1) | some_of([name for name in WARPERS if name not in SAMPLING], 3),
)
def test_greedy_tokens_are_those_of_the_sparse_logits(
    seed: int, prefix: Tensor, choices: dict[str, int], num_rescored: int, spread: float, found: list[Any]
) -> None:
    """Along a prefix, as what is suppressed changes with it."""
    head, rows = make_head(num_rescored=num_rescored, **choices), len(prefix)
    chooser = TokenChooser(head, found, does_sample=False)
    for length, hidden in enumerate((make_hidden(seed, 6 * rows) * spread).split(rows), start=3):
        scores = processed(head.sparse_logits(hidden), found, prefix[:, :length])
        chosen = chooser.choose(prefix[:, :length], head.score(hidden)).unsqueeze(1)
        torch.testing.assert_close(scores.gather(1, chosen), scores.amax(1, keepdim=True), rtol=1e-5, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(seed=seeds, positions=st.integers(1, 3), choices=sizes(), num_rescored=st.integers(1, 60))
def test_the_best_candidate_is_the_sparse_argmax(
    seed: int, positions: int, choices: dict[str, int], num_rescored: int
) -> None:
    head, hidden = make_head(num_rescored=num_rescored, **choices), make_hidden(seed, positions)
    logits = head.sparse_logits(hidden)
    best = Candidates(head, head.score(hidden), Priors(head)).best()
    assert logits.gather(1, best.unsqueeze(1)).squeeze(1).equal(logits.amax(dim=-1))


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """The p-value of a chi-square test; tokens expected fewer than ten times are one category."""
    expected = probabilities * counts.sum()
    is_rare = expected < 10
    cells = [torch.cat([one[~is_rare], one[is_rare].sum()[None]]) for one in (counts.double(), expected)]
    is_there = cells[1] > 0
    distance = ((cells[0] - cells[1]) ** 2 / cells[1].clamp_min(1e-9))[is_there].sum()
    return float(chi2.sf(float(distance), int(is_there.sum()) - 1))


def without_the_unlisted(patch: pytest.MonkeyPatch) -> None:
    """Leave out the mass of the tokens that are not listed."""
    unlisted = Candidates._unlisted
    patch.setattr(Candidates, "_unlisted", lambda *args: [one.fill_(-torch.inf) for one in unlisted(*args)])


def without_rejection(patch: pytest.MonkeyPatch) -> None:
    """Accept every draw."""
    patch.setattr(Candidates, "_are_outside", lambda _, weights, *__: torch.zeros_like(weights, dtype=torch.bool))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("top_p", "breaks"),
    [
        (None, None),
        (None, without_the_unlisted),
        (0.9, None),
        (0.9, without_the_unlisted),
        (0.3, None),
        (0.3, without_rejection),
    ],
)
def test_distribution_of_200_000_draws(top_p: float | None, breaks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken rule fails."""
    head, hidden = make_head(num_rescored=20), make_hidden(3, 1) / 3
    many = hidden.expand(2000, -1)
    scores = head.logits_of(head.score(many))[:1]  # products of many positions are rounded otherwise than those of one
    found = []
    if top_p is not None:
        found = [processors.TemperatureLogitsWarper(1.5), processors.TopPLogitsWarper(top_p)]
    for one in found:
        scores = one(PREFIX[:1], scores)
    if breaks is not None:
        breaks(monkeypatch)
    torch.manual_seed(0)
    counts = torch.zeros(VOCAB_SIZE, dtype=torch.long)
    for _ in range(100):
        chooser = TokenChooser(head, found, does_sample=True)
        tokens = chooser.choose(PREFIX[:1].expand(2000, -1), head.score(many))
        counts += tokens.bincount(minlength=VOCAB_SIZE)
    found_p = p_value(counts, scores.double().softmax(-1)[0])
    assert (found_p > 1e-4) if breaks is None else (found_p < 1e-6)


@pytest.mark.parametrize("spread", [0.01, 1.0])
def test_the_smallest_nucleus_is_the_likeliest_token(spread: float) -> None:
    """Wherever that is: with an exact logit, in a picked expert, in another one."""
    head, hidden = make_head(num_rescored=1, num_experts_per_tok=1), make_hidden(2, 64) * spread
    chooser = TokenChooser(head, [processors.TopPLogitsWarper(0.0)], does_sample=True)
    tokens = chooser.choose(torch.zeros(64, 1, dtype=torch.long), head.score(hidden))
    logits = head.sparse_logits(hidden)
    torch.testing.assert_close(logits.gather(1, tokens.unsqueeze(1)), logits.amax(1, keepdim=True))


def test_tokens_without_probability_are_never_drawn() -> None:
    """At any place of the row."""
    logits = torch.tensor([[-torch.inf, 2.0, -torch.inf], [-torch.inf, -torch.inf, 0.0]])
    for _ in range(100):
        assert draw(logits).tolist() == [[1], [2]]


# In generations


@pytest.fixture(scope="module")
def model() -> TopKExpertsForCausalLM:
    return tiny_converted(tiny_dense(), head_mode="sparse", num_rescored=20, num_experts_per_tok=2)


def generate(model: TopKExpertsForCausalLM, **choices: Any) -> Tensor:
    torch.manual_seed(0)
    return model.generate(
        PREFIX, attention_mask=torch.ones_like(PREFIX), max_new_tokens=8, eos_token_id=None, **choices
    )


def whole_steps(model: TopKExpertsForCausalLM, monkeypatch: pytest.MonkeyPatch, **choices: Any) -> int:
    """The number of steps that computed the logits of all tokens."""
    steps: list[int] = []
    logits = model.head.logits
    monkeypatch.setattr(model.head, "logits", lambda hidden: steps.append(1) or logits(hidden))
    generate(model, **choices)
    monkeypatch.undo()
    return len(steps)


@pytest.mark.parametrize(
    "choices",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": True},
        {"do_sample": True, "top_k": 0, "top_p": 0.9, "temperature": 0.7},
        {"do_sample": True, "top_k": 0, "min_p": 0.1},
    ],
)
def test_logits_of_all_tokens_are_computed_only_in_prefill(
    model: TopKExpertsForCausalLM, monkeypatch: pytest.MonkeyPatch, choices: dict[str, Any]
) -> None:
    assert whole_steps(model, monkeypatch, **choices) == 1


@pytest.mark.parametrize(
    "choices",
    [
        {"do_sample": True, "no_repeat_ngram_size": 2},
        {"do_sample": True, "typical_p": 0.5},
        {"do_sample": True, "output_scores": True, "return_dict_in_generate": True},
        {"do_sample": True, "logits_processor": [lambda ids, scores: scores]},
    ],
)
def test_with_other_settings_all_logits_are_computed_at_every_step(
    model: TopKExpertsForCausalLM, monkeypatch: pytest.MonkeyPatch, choices: dict[str, Any]
) -> None:
    monkeypatch.setattr(token_chooser.TokenChooser, "__init__", None)
    steps: list[int] = []
    forward = model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda hidden: steps.append(1) or forward(hidden))
    generate(model, **choices)
    assert len(steps) == 8


def test_greedy_tokens_are_the_argmax_of_all_logits(
    model: TopKExpertsForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [generate(model, do_sample=False), generate(model, do_sample=False, repetition_penalty=1.4)]
    monkeypatch.setattr("hf_topk.model.modeling_topk_experts.can_choose", lambda *_: False)
    assert chosen[0].equal(generate(model, do_sample=False))
    assert chosen[1].equal(generate(model, do_sample=False, repetition_penalty=1.4))


def test_a_model_that_caps_its_logits_computes_all_logits_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """And samples from the capped logits."""
    model = tiny_converted(tiny_dense("gemma2", final_logit_softcapping=0.5), head_mode="sparse", num_rescored=20)
    assert whole_steps(model, monkeypatch, do_sample=True, top_k=0) == 8
    chosen = generate(model, do_sample=False)
    monkeypatch.setattr("hf_topk.model.modeling_topk_experts.can_choose", lambda *_: False)
    assert chosen.equal(generate(model, do_sample=False))


def test_a_model_that_masks_logits_in_place_computes_all_logits_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some models do with image tokens."""
    model = tiny_converted(tiny_dense(), head_mode="sparse", num_rescored=20)
    forward = model.base.forward

    def masked(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits[..., :50] = torch.finfo(output.logits.dtype).min
        return output

    monkeypatch.setattr(model.base, "forward", masked)
    for choices in ({"do_sample": False}, {"do_sample": True}, {"do_sample": False, "lossless": True}):
        assert (generate(model, **choices)[:, PREFIX.shape[1] :] >= 50).all()


def test_with_all_experts_transformers_samples() -> None:
    """So the same seed gives the dense model's tokens."""
    head = make_head(num_experts_per_tok=6)
    assert head.num_experts == 6
    assert not can_choose(head, [], GenerationConfig(do_sample=True))
    assert can_choose(make_head(), [], GenerationConfig(do_sample=True))
