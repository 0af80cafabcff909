"""Head mode "auto" runs sparse where that is measured to be faster; the tests set the measured times."""

import copy

import pytest
import torch
from support.heads import make_head, make_hidden
from support.tiny_models import QUICK, some_windows, tiny_converted, tiny_dense

from hf_topk import TopKExpertsForCausalLM, TopKExpertsHead
from hf_topk.convert import Recipe, convert
from hf_topk.model import crossover, kernels
from hf_topk.model.drafting import TYPICAL_SIZE, drafting_pays
from hf_topk.model.scored import Scored


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> TopKExpertsHead:
    """A head in mode "auto", without measurements."""
    monkeypatch.setattr(crossover, "_measured", {})
    return copy.deepcopy(make_head(head_mode="auto", sparse_max_positions=None))


@pytest.mark.parametrize(("sparse", "is_sparse"), [(0.01, True), (0.9, True), (0.97, False), (2.0, False)])
@torch.no_grad()
def test_sparse_is_chosen_if_it_gains_more_than_noise(
    head: TopKExpertsHead, sparse: float, is_sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossover, "SECONDS", 1e9)
    times = {"sparse_logits": sparse, "fastest_dense_logits": 1.0}
    clock = [0.0]
    for name, seconds in times.items():
        run = getattr(head, name)

        def taking(hidden: torch.Tensor, run: object = run, seconds: float = seconds) -> torch.Tensor:
            clock[0] += seconds
            return run(hidden)

        taking.__name__ = name
        monkeypatch.setattr(head, name, taking)
    monkeypatch.setattr(crossover.time, "perf_counter", lambda: clock[0])
    assert head.runs_sparse(1) == is_sparse
    ran = clock[0]
    assert head.runs_sparse(1) == is_sparse  # known by now
    assert clock[0] == ran
    assert head.runs_sparse(3) == is_sparse  # another size, measured as 4
    measured = clock[0]
    assert measured > ran
    assert head.runs_sparse(4) == is_sparse
    assert clock[0] == measured
    assert not head.runs_sparse(crossover.MOST_POSITIONS + 1)


@pytest.mark.parametrize(
    ("draft", "block", "pays"), [(0.5, 3.4, True), (0.5, 4.0, False), (0.1, 6.6, True), (0.9, 1.0, False)]
)
@torch.no_grad()
def test_lossless_decoding_drafts_if_its_passes_cost_less(
    draft: float, block: float, pays: bool, head: TopKExpertsHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense pass of one position takes 1 s; eight positions share a verification pass."""
    monkeypatch.setattr(crossover, "SECONDS", 1e9)
    clock = [0.0]
    score, dense = head.score, head.dense_logits

    def scoring(hidden: torch.Tensor) -> Scored:
        clock[0] += draft
        return score(hidden)

    def all_logits(hidden: torch.Tensor) -> torch.Tensor:
        clock[0] += block if len(hidden) == TYPICAL_SIZE else 1.0
        return dense(hidden)

    monkeypatch.setattr(head, "score", scoring)
    monkeypatch.setattr(head, "fastest_dense_logits", all_logits)
    monkeypatch.setattr(crossover.time, "perf_counter", lambda: clock[0])
    assert drafting_pays(head, 1, head.fastest_dense_logits) == pays
    assert len(crossover._measured) == 1
    assert drafting_pays(head, 1, head.fastest_dense_logits) == pays
    assert not drafting_pays(head, crossover.MOST_POSITIONS + 1, head.fastest_dense_logits)
    assert len(crossover._measured) == 1


@pytest.mark.parametrize(
    ("dtype", "mode", "positions", "is_faster", "uses_float32"),
    [
        (torch.bfloat16, "auto", 8, True, True),
        (torch.float16, "auto", 64, True, True),
        (torch.bfloat16, "auto", 8, False, False),
        (torch.bfloat16, "auto", 3, True, False),
        (torch.bfloat16, "dense", 8, True, False),
        (torch.float32, "auto", 8, True, True),
        (torch.float64, "auto", 8, True, False),
    ],
)
@torch.no_grad()
def test_dense_products_are_in_float32_where_that_is_faster(
    dtype: torch.dtype,
    mode: str,
    positions: int,
    is_faster: bool,
    uses_float32: bool,
    head: TopKExpertsHead,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But never in head mode "dense", whose logits are bit for bit the dense model's."""
    head = head.to(dtype)
    head.head_mode, head.sparse_max_positions = mode, 0
    monkeypatch.setattr("hf_topk.model.head.is_faster", lambda *_: is_faster)
    runs, in_float32 = [], kernels.linear_in_float32
    monkeypatch.setattr("hf_topk.model.head.linear_in_float32", lambda *given: runs.append(1) or in_float32(*given))
    hidden = make_hidden(0, positions).to(dtype)
    logits = head(hidden)
    assert len(runs) == uses_float32
    torch.testing.assert_close(logits, head.dense_logits(hidden), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("is_narrow", [False, True])
@torch.no_grad()
def test_columns_are_filled_up_to_what_is_faster(
    is_narrow: bool, head: TopKExpertsHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.sparse_max_positions = 0
    monkeypatch.setattr("hf_topk.model.head.is_faster", lambda *given: is_narrow or given[-1] != "columns")
    multiplied, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda rows, columns: multiplied.append(columns.shape[1]) or mm(rows, columns))
    head(make_hidden(0, 5))
    assert multiplied == [kernels.NARROW if is_narrow else kernels.WIDE]


@torch.no_grad()
def test_a_measurement_is_of_one_setting(head: TopKExpertsHead) -> None:
    head.runs_sparse(1)
    head.runs_sparse(1, head.score)
    head.num_experts_per_tok = 3
    head.runs_sparse(1)
    assert len(crossover._measured) == 3


@torch.no_grad()
def test_a_set_crossover_is_not_measured(head: TopKExpertsHead) -> None:
    head.sparse_max_positions = 3
    assert [head.runs_sparse(positions) for positions in (1, 3, 4)] == [True, True, False]
    assert not crossover._measured


@torch.no_grad()
def test_nothing_is_measured_while_code_is_compiled(head: TopKExpertsHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert [head.runs_sparse(positions) for positions in (1, 4, 5)] == [True, True, False]
    assert not crossover._measured


@torch.no_grad()
def test_measuring_does_not_change_the_random_state(head: TopKExpertsHead) -> None:
    state = torch.get_rng_state()
    head.runs_sparse(2)
    assert torch.get_rng_state().equal(state)


def test_lossless_decoding_drafts_only_where_sparse_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = tiny_converted(), torch.tensor([[5, 17, 42]])
    model.sparse_max_positions = None

    def drafts(model: TopKExpertsForCausalLM) -> bool:
        model.generate(prompt, max_new_tokens=4, do_sample=False, lossless=True)
        return model.last_generation_stats is not None

    for is_faster in (False, True):
        monkeypatch.setattr("hf_topk.model.drafting.drafting_is_faster", lambda *_, answer=is_faster: answer)
        assert drafts(model) == is_faster
    model.sparse_max_positions = 0  # set by hand, for calls that are not lossless
    assert drafts(model)


@pytest.mark.parametrize("chosen", [None, 3])
def test_conversion_leaves_the_crossover_to_be_measured_unless_it_is_set(chosen: int | None) -> None:
    recipe = Recipe(**{**QUICK, "sparse_max_positions": chosen})
    model = convert(tiny_dense(), None, recipe, windows=some_windows()).model
    assert model.config.sparse_max_positions == model.head.sparse_max_positions == chosen
