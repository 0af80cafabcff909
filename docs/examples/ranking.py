"""Documents ranked by the likelihood of a query: python ranking.py [MODEL].

The tokens of the query are given, not chosen: many of them have no exact logit at their position, so that the estimates
of screen and tail decide.
"""

import sys
import time
from dataclasses import dataclass

import torch
from common import load
from scipy.stats import kendalltau
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hf_topk import TopKExpertsForCausalLM

# Each document with a query that asks for it.
DOCUMENTS = (
    (
        "The lamp of the lighthouse is lit at dusk, so that ships find the harbour and keep off the rocks.",
        "light for ships",
    ),
    (
        "The baker rises at three, kneads the dough and heats the oven, and has bread for the village by six.",
        "making bread",
    ),
    (
        "In winter the wolves come down from the mountains and take sheep from the farms in the valley.",
        "wolves and sheep",
    ),
    (
        "The judge listened to both sides, and said that the field belonged to the widow.",
        "a decision in court",
    ),
    (
        "A good horse is known by its legs, its breath and the way it carries its head.",
        "how to choose a horse",
    ),
    (
        "The doctor found the child in a fever, and told the mother to give it water and keep the room cool.",
        "a sick child",
    ),
    (
        "The two armies met at the river before dawn, and by noon the bridge was lost.",
        "a battle at a river",
    ),
    (
        "She learned the violin from her father, and at twelve played in the church before the whole town.",
        "a young musician",
    ),
    (
        "Gold was found in the stream, and within a month a thousand men had come with spades and pans.",
        "finding gold",
    ),
    (
        "The king sent for the wisest men of the land, and asked them what a man needs to be happy.",
        "the question of a king",
    ),
)


@dataclass(frozen=True)
class Ranking:
    """How a head ranks the documents for each query.

    Attributes:
        scores: mean log-likelihood of each query's tokens after each document, [queries, documents].
        tau: Kendall's tau with the dense head's ranking, mean over the queries.
        found: queries whose own document comes first.
        seconds: for all scores.
    """

    scores: Tensor
    tau: float
    found: int
    seconds: float


@torch.inference_mode()
def likelihood(model: TopKExpertsForCausalLM, tokenizer: PreTrainedTokenizerBase, document: str, query: str) -> float:
    """Mean log-likelihood of the tokens of a query after a document, in nats."""
    before = tokenizer(f"{document}\n\nIn short:", return_tensors="pt")["input_ids"]
    asked = tokenizer(f" {query}", add_special_tokens=False, return_tensors="pt")["input_ids"]
    logits = model(input_ids=torch.cat([before, asked], dim=1), logits_to_keep=asked.shape[1] + 1).logits[:, :-1]
    return logits.float().log_softmax(dim=-1).gather(-1, asked.unsqueeze(-1)).mean().item()


def rank(model: TopKExpertsForCausalLM, tokenizer: PreTrainedTokenizerBase, dense: Tensor | None = None) -> Ranking:
    """Score every document for every query with the head mode that is set, and compare with the dense scores."""
    began = time.perf_counter()
    scores = torch.tensor(
        [[likelihood(model, tokenizer, document, query) for document, _ in DOCUMENTS] for _, query in DOCUMENTS]
    )
    seconds = time.perf_counter() - began
    pairs = zip(scores if dense is None else dense, scores, strict=True)
    taus = [kendalltau(one.tolist(), two.tolist()).statistic for one, two in pairs]
    found = int((scores.argmax(dim=1) == torch.arange(len(scores))).sum())
    return Ranking(scores, sum(taus) / len(taus), found, seconds)


def main(folder: str | None = None) -> dict[str, Ranking]:
    """Rank with the dense head, with the sparse head, and with the sparse head at twice and four times k and R."""
    model, tokenizer = load(folder)
    model.head_mode = "dense"
    rankings = {"dense": rank(model, tokenizer)}
    model.head_mode = "sparse"
    k, rescored = model.num_experts_per_tok, model.num_rescored
    for times in (1, 2, 4):
        model.num_experts_per_tok = min(times * k, model.config.num_experts)
        model.num_rescored = times * rescored
        name = "sparse" if times == 1 else f"sparse, {times} x k and R"
        rankings[name] = rank(model, tokenizer, rankings["dense"].scores)
    print(f"{'head':24}{'Kendall tau':>14}{'own document first':>22}{'mean log-likelihood':>22}{'scores/s':>12}")
    for name, ranking in rankings.items():
        print(
            f"{name:24}{ranking.tau:>14.3f}{f'{ranking.found} of {len(DOCUMENTS)}':>22}{ranking.scores.mean():>22.3f}"
            f"{ranking.scores.numel() / ranking.seconds:>12.1f}"
        )
    return rankings


if __name__ == "__main__":
    main(*sys.argv[1:])
