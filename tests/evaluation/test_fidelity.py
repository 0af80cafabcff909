"""The metrics of fidelity, against plain references."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from support.tiny_models import VOCAB_SIZE, tiny_converted, tiny_dense
from transformers import AutoConfig, PreTrainedConfig

from hf_topk import TopKExpertsForCausalLM
from hf_topk.evaluation import fidelity
from hf_topk.evaluation.confidence_bound import lower_bound
from hf_topk.evaluation.fidelity import Fidelity, measure_fidelity
from hf_topk.windows import Window, readable_length

NUM_EXPERTS = 6


def some_windows() -> list[Window]:
    """Windows of different lengths, the shortest of 2 tokens, of three documents."""
    generator = torch.Generator().manual_seed(3)
    return [
        Window(document, tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist()))
        for document, length in ((0, 2), (1, 17), (2, 40), (1, 5))
    ]


def brute_force(model: TopKExpertsForCausalLM, windows: list[Window]) -> Fidelity:
    """The metrics, position by position, from the logits of the model in each head mode."""
    agreed, contained, divergences, losses = {}, [], [], {"dense": [], "sparse": []}
    log_z, confidences, correlations = [], {"dense": [], "sparse": []}, []
    head, kept = model.head, []
    hook = head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    for window in windows:
        token_ids = torch.tensor([window.token_ids])
        logs, raw = {}, {}
        for model.head_mode in ("dense", "sparse"):
            with torch.no_grad():
                raw[model.head_mode] = model(token_ids).logits[0].double()
                logs[model.head_mode] = raw[model.head_mode].log_softmax(dim=-1)
        log_z += (raw["sparse"].logsumexp(-1) - raw["dense"].logsumexp(-1)).tolist()
        middle = len(window.token_ids) // 2
        if head.num_experts_per_tok < NUM_EXPERTS:
            picked = head.router(kept[-1][0, middle : middle + 1]).topk(head.num_experts_per_tok).indices
            scored = set(head.scored_ids(picked)[0].tolist())
            unscored = [token for token in range(VOCAB_SIZE) if token not in scored]
            correlations.append(spearmanr(raw["dense"][middle][unscored], raw["sparse"][middle][unscored]).statistic)
        for position in range(len(window.token_ids)):
            dense, sparse = logs["dense"][position].tolist(), logs["sparse"][position].tolist()
            best = max(range(len(dense)), key=dense.__getitem__)
            order = sorted(range(len(sparse)), key=sparse.__getitem__, reverse=True)
            agreed.setdefault(window.document, []).append(order[0] == best)
            contained.append(best in order[:5])
            divergences.append(sum(math.exp(p) * (p - q) for p, q in zip(dense, sparse, strict=True)))
            if position + 1 < len(window.token_ids):
                losses["dense"].append(-dense[window.token_ids[position + 1]])
                losses["sparse"].append(-sparse[window.token_ids[position + 1]])
                for mode, likeliest, logarithms in (("dense", best, dense), ("sparse", order[0], sparse)):
                    is_right = likeliest == window.token_ids[position + 1]
                    confidences[mode].append((math.exp(logarithms[likeliest]), is_right))
    hook.remove()
    mean = {name: math.fsum(some) / len(some) for name, some in losses.items()}
    return Fidelity(
        agreement=sum(map(sum, agreed.values())) / len(contained),
        agreement_lower_bound=lower_bound(
            [*map(sum, agreed.values())], [*map(len, agreed.values())], of_new_documents=True
        ),
        top5_containment=sum(contained) / len(contained),
        kl=math.fsum(divergences) / len(divergences),
        perplexity_dense=math.exp(mean["dense"]),
        perplexity_sparse=math.exp(mean["sparse"]) if mean["sparse"] < math.inf else math.inf,
        log_z_error=math.fsum(log_z) / len(log_z),
        log_z_absolute_error=math.fsum(map(abs, log_z)) / len(log_z),
        calibration_error_dense=calibration_error(confidences["dense"]),
        calibration_error_sparse=calibration_error(confidences["sparse"]),
        tail_rank_correlation=math.fsum(correlations) / len(correlations) if correlations else math.nan,
        bytes_read=model.head.bytes_read() / model.head.dense_bytes(),
        positions=len(contained),
    )


def calibration_error(answers: list[tuple[float, bool]]) -> float:
    bins = [[answer for answer in answers if number <= answer[0] * 15 < number + 1] for number in range(16)]
    gaps = (abs(sum(confidence - is_right for confidence, is_right in one)) for one in bins)
    return math.fsum(gaps) / len(answers)


def check_metrics(model: TopKExpertsForCausalLM, windows: list[Window]) -> Fidelity:
    got = measure_fidelity(model, windows)
    assert dataclasses.asdict(got) == pytest.approx(
        dataclasses.asdict(brute_force(model, windows)), rel=1e-4, abs=1e-6, nan_ok=True
    )
    return got


@pytest.mark.parametrize("num_rescored", [5, 256])
@pytest.mark.parametrize("num_experts_per_tok", [1, 3, NUM_EXPERTS])
@pytest.mark.parametrize("positions_at_once", [3, 1000])
def test_metrics_are_those_of_brute_force(
    positions_at_once: int, num_experts_per_tok: int, num_rescored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "LOGITS_AT_ONCE", positions_at_once * VOCAB_SIZE)
    model = tiny_converted(num_experts_per_tok=num_experts_per_tok, num_rescored=num_rescored)
    metrics = check_metrics(model, some_windows())
    assert metrics.positions == 64
    assert (metrics.agreement < 1) == (num_experts_per_tok < NUM_EXPERTS)


def test_positions_with_almost_all_tokens_scored_have_no_rank_correlation() -> None:
    generator = torch.Generator().manual_seed(3)
    windows = [Window(0, tuple(torch.randint(VOCAB_SIZE, (2,), generator=generator).tolist())) for _ in range(12)]
    model = tiny_converted(num_always_on=3, num_experts=7, num_experts_per_tok=6)  # the last expert has one token
    alone = [measure_fidelity(model, [window]).tail_rank_correlation for window in windows]
    ranked = [correlation for correlation in alone if not math.isnan(correlation)]
    assert 0 < len(ranked) < len(windows)
    assert measure_fidelity(model, windows).tail_rank_correlation == pytest.approx(math.fsum(ranked) / len(ranked))


@pytest.mark.parametrize("combine", ["router", "learned"])
def test_metrics_of_the_other_ways_to_combine(combine: Any) -> None:
    check_metrics(tiny_converted(combine=combine), some_windows())


def test_metrics_include_biases_and_soft_capping() -> None:
    check_metrics(tiny_converted(tiny_dense("phi", tied=False, bias=True)), some_windows())
    capped = tiny_dense("gemma2", head_dim=8, final_logit_softcapping=3.0)
    assert float(capped(torch.arange(20).unsqueeze(0)).logits.detach().max()) < 3
    check_metrics(tiny_converted(capped), some_windows())


def test_all_experts_are_the_dense_model() -> None:
    metrics = measure_fidelity(tiny_converted(num_experts_per_tok=NUM_EXPERTS), some_windows())
    assert metrics.agreement == metrics.top5_containment == 1
    assert abs(metrics.kl) < 1e-5
    assert metrics.perplexity_sparse == pytest.approx(metrics.perplexity_dense, rel=1e-5)


def test_more_experts_agree_better() -> None:
    metrics = [measure_fidelity(tiny_converted(num_experts_per_tok=k), some_windows()) for k in (1, NUM_EXPERTS - 1)]
    assert metrics[0].agreement < metrics[1].agreement < 1
    assert metrics[0].agreement_lower_bound < metrics[0].agreement
    assert metrics[0].bytes_read < metrics[1].bytes_read


def test_perplexity_overflows_to_infinity() -> None:
    dense = tiny_dense(tied=False)
    dense.get_output_embeddings().weight.data.mul_(1000)
    assert measure_fidelity(tiny_converted(dense), some_windows()).perplexity_dense == math.inf


@pytest.mark.parametrize("mode", ["auto", "sparse", "dense"])
def test_the_head_mode_is_ignored_and_unchanged(mode: Any) -> None:
    expected = measure_fidelity(tiny_converted(), some_windows())
    model = tiny_converted()
    model.head_mode, head = mode, model.head
    assert measure_fidelity(model, some_windows()) == expected
    assert model.head is head
    assert model.head_mode == mode


def test_the_head_is_restored_after_an_error() -> None:
    model = tiny_converted()
    head = model.head
    with pytest.raises(IndexError):
        measure_fidelity(model, [Window(0, (1, VOCAB_SIZE))])
    assert model.head is head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_metrics_in_half_precision_are_near_those_in_float32(dtype: torch.dtype) -> None:
    exact = measure_fidelity(tiny_converted(), some_windows())
    rounded = measure_fidelity(tiny_converted().to(dtype), some_windows())
    assert rounded.positions == exact.positions
    assert rounded.perplexity_dense == pytest.approx(exact.perplexity_dense, rel=0.2)
    assert abs(rounded.agreement - exact.agreement) < 0.15


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (AutoConfig.for_model("gpt2", n_positions=128), 128),
        (AutoConfig.for_model("llama", max_position_embeddings=4096), 256),
        (AutoConfig.for_model("mamba"), 256),
    ],
)
def test_windows_fit_the_model_s_positions(config: PreTrainedConfig, length: int) -> None:
    assert readable_length(config) == length
    assert readable_length(config, 7) == 7
