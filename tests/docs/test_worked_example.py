"""docs/how-it-works.md: its numbers are those of the head, and the functions that it names exist."""

import importlib
import re
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_topk import TopKExpertsConfig, TopKExpertsHead

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
FOLDERS = {"hf_topk/model": "hf_topk.model", "convert/steps": "hf_topk.convert.steps"}
IN_ONE_LINE = " ".join(PAGE.split())
NAMED = re.findall(r"`([A-Za-z_.]+)` in `(\w+\.py)`", IN_ONE_LINE)
HALF_A_PLACE = 0.5e-3 + 1e-6  # numbers are printed with three decimals

Row = dict[str, str]


def rows_with(column: str) -> list[Row]:
    """The rows of the table with such a column."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, flags=re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        if column in head:
            found.append([dict(zip(head, row, strict=True)) for row in rows])
    (table,) = found
    return table


def numbers(cell: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", cell.replace(",", " "))]


def column(rows: list[Row], name: str) -> Tensor:
    return torch.tensor([numbers(row[name]) for row in rows]).squeeze(-1)


def in_text(pattern: str) -> list[float]:
    (found,) = re.finditer(pattern, IN_ONE_LINE)
    return [float(number) for number in found.groups()]


def close(computed: Tensor, printed: Tensor) -> None:
    torch.testing.assert_close(computed.float(), printed, rtol=0, atol=HALF_A_PLACE)


TOKENS, EXPERTS = rows_with("codes"), rows_with("router's row")
WORDS = [row["token"] for row in TOKENS]
ROUTED = [row for row in TOKENS if row["expert"] != "always on"]
HIDDEN = torch.tensor([in_text(r"hidden state is z = \((\d), (\d)\)")])


def words(ids: Tensor) -> list[str]:
    return [WORDS[token] for token in ids.flatten().tolist()]


@pytest.fixture(scope="module")
def head() -> TopKExpertsHead:
    """The head of the page's tables."""
    config = TopKExpertsConfig(
        num_experts=len(EXPERTS),
        expert_size=2,
        num_experts_per_tok=2,
        num_always_on=1,
        num_rescored=2,
        router_rank=1,
        tail_rank=1,
        head_mode="sparse",
    )
    dense = nn.Linear(2, len(TOKENS), bias=False)
    dense.weight.data = column(TOKENS, "row of W")
    made = TopKExpertsHead(dense, config).requires_grad_(False)
    made.reset_additions()
    by_expert = [[WORDS.index(row["token"]) for row in ROUTED if row["expert"] == one["expert"]] for one in EXPERTS]
    made.expert_ids.copy_(torch.tensor(by_expert))
    made.always_on_ids.fill_(WORDS.index(next(row["token"] for row in TOKENS if row["expert"] == "always on")))
    made.router.floats.copy_(column(EXPERTS, "router's row"))
    made.router.bias.copy_(column(EXPERTS, "bias"))
    ((step,),) = [in_text(r"one step is 1/(\d) of a coordinate")]
    made.tail.basis[:2] = torch.eye(2, dtype=torch.int8)
    made.tail.basis_scales[:2] = 1 / step
    coordinates = torch.zeros(*made.expert_ids.shape, len(made.tail.basis))
    coordinates[..., :2] = column(ROUTED, "codes").view(*made.expert_ids.shape, 2)
    rows = made.weight[made.expert_ids]
    assert ((rows - rows.mean(dim=1, keepdim=True)) * step - coordinates[..., :2]).abs().max() <= 0.5 + HALF_A_PLACE
    made.tail.set_codes(slice(None), coordinates)
    made.tail.log_prior.copy_(column(ROUTED, "prior").log().view(made.expert_ids.shape))
    assert made.screens
    return made


def test_scores_and_picked_experts(head: TopKExpertsHead) -> None:
    rows = rows_with("log-sum-exp")
    picked = head.pick(HIDDEN)
    close(picked.scores[0], column(rows, "score"))
    close(head.dense_logits(HIDDEN)[0][head.expert_ids].logsumexp(dim=-1), column(rows, "log-sum-exp"))
    assert sorted(picked.experts[0].tolist()) == [i for i, row in enumerate(rows) if row["picked"] == "yes"]


def test_screen_and_rescored_tokens(head: TopKExpertsHead) -> None:
    rows, scored = rows_with("estimate"), head.score(HIDDEN)
    order = scored.experts[0].argsort()
    shares = scored.screened[0][order]
    assert words(head.expert_ids[scored.experts[0][order]]) == [row["token"] for row in rows]
    close(shares.flatten(), column(rows, "log-share"))
    close((shares + scored.masses[0][order].unsqueeze(-1)).flatten(), column(rows, "estimate"))
    rescored = {row["token"]: numbers(row["exact logit"])[0] for row in rows if row["exact logit"] != "-"}
    assert dict(zip(words(scored.ids[:, 1:]), scored.exact[0, 1:].tolist(), strict=True)) == pytest.approx(rescored)


def test_the_offset(head: TopKExpertsHead) -> None:
    exact, estimated, offset = in_text(r"\\delta = ([\d.]+) - ([\d.]+) = ([\d.]+)")
    scored = head.score(HIDDEN)
    mass = scored.exact[:, 1:].logsumexp(dim=-1)  # without the always-on token
    close(mass, torch.tensor([exact]))
    close(scored.offset.flatten(), torch.tensor([offset]))
    close(mass - scored.offset.flatten(), torch.tensor([estimated]))


def test_logits_and_probabilities(head: TopKExpertsHead) -> None:
    rows = rows_with("sparse logit")
    dense, sparse = head.dense_logits(HIDDEN)[0], head.sparse_logits(HIDDEN)[0]
    assert [row["token"] for row in rows] == WORDS
    close(dense, column(rows, "dense logit"))
    close(sparse, column(rows, "sparse logit"))
    close(dense.softmax(dim=0), column(rows, "dense p"))
    close(sparse.softmax(dim=0), column(rows, "sparse p"))
    exact = [i for i, row in enumerate(rows) if row["from"] == "its row of W"]
    torch.testing.assert_close(dense[exact], sparse[exact])
    losses = in_text(r"is ([\d.]+) with the dense head and ([\d.]+) with the sparse one")
    target = WORDS.index("sat")
    close(torch.stack([-one.log_softmax(dim=0)[target] for one in (dense, sparse)]), torch.tensor(losses))


def test_no_unscored_token_may_win(head: TopKExpertsHead) -> None:
    scored = head.score(HIDDEN)
    least, picked, most_left, best = in_text(r"max\(([\d.]+), ([\d.]+)\) \+ 0\.\d+ = ([\d.]+), below ([\d.]+)")
    close(torch.stack([scored.kept.amin(), scored.masses.amin()]), torch.tensor([least, picked]))
    close(scored.most_left.flatten(), torch.tensor([most_left]))
    close(scored.exact.amax().view(1), torch.tensor([best]))
    assert not head.tail_may_win(scored).any()
    assert words(head.best_scored(scored)) == ["sat"]


def test_bytes_of_a_published_shape() -> None:
    """The sum is what `bytes_read` counts, and the parts are those of its tensors."""
    config = TopKExpertsConfig(
        num_experts=3068,
        num_experts_per_tok=527,
        num_always_on=64,
        num_rescored=922,
        router_packed=True,
        router_rank=384,
        tail_rank=144,
    )
    with torch.device("meta"):
        made = TopKExpertsHead(nn.Linear(576, 49152, bias=False), config)
    made.stored_type = torch.bfloat16
    *parts, total, dense = (int(row["bytes"].replace(",", "")) for row in rows_with("bytes"))
    of_router = sum(one.numel() * (2 if one.is_floating_point() else 1) for one in made.router.state_dict().values())
    assert parts[:2] == [(64 + 922) * 576 * 2, of_router]
    assert parts[3] == made.tail.log_prior.numel() * 2
    assert sum(parts) == total == made.bytes_read()
    assert dense == made.dense_bytes()
    assert in_text(r"These are ([\d.]+) % of the dense") == [round(100 * total / dense, 2)]


@pytest.mark.parametrize(("name", "file"), sorted(set(NAMED)), ids=lambda one: one)
def test_named_functions_exist(name: str, file: str) -> None:
    folders = [module for folder, module in FOLDERS.items() if (ROOT / folder / file).exists()]
    module = importlib.import_module(f"{folders[0]}.{file.removesuffix('.py')}")
    assert callable(reduce(getattr, name.split("."), module))


def test_formulas_name_their_functions() -> None:
    followed_by = re.findall(r"^\$\$.*\$\$\n\n(.*)", PAGE, flags=re.MULTILINE)
    assert len(followed_by) > 8
    assert [line for line in followed_by if not re.match(r"`[A-Za-z_.]+` in `\w+\.py`", line)] == []
