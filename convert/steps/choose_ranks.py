"""Chooses the ranks, how many numbers are kept of each row of router and screen, by the bytes that the target takes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hf_topk.model.modeling_topk_experts import TopKExpertsForCausalLM

from ..recipe import ROUTER_RANK, TAIL_RANK, Recipe
from .choose_operating_point import ArgmaxRanks, Target, fewest_bytes, rank_argmax
from .held_out import DenseArgmax
from .pack_router_and_tail import Ranks

# Tried in this order while they read fewer bytes; more than the default never did on the models measured.
SMALLER_ROUTER_RANKS, SMALLER_TAIL_RANKS = (256, 192), (192, 144)


@dataclass(frozen=True)
class Tried:
    """A converted head at one pair of ranks.

    Attributes:
        ranks: of router and screen.
        argmax_ranks: of the dense argmax.
        quality: the target that is reached, as far as it counts, and the negative share of bytes: larger is better.
    """

    ranks: Ranks
    argmax_ranks: ArgmaxRanks
    quality: tuple[float, float]


def default_ranks(recipe: Recipe) -> Ranks:
    """The ranks that a recipe gives, with the defaults for those that it leaves open."""
    return Ranks(recipe.router_rank or ROUTER_RANK, recipe.tail_rank or TAIL_RANK)


def choose_ranks(
    model: TopKExpertsForCausalLM,
    dense: DenseArgmax,
    recipe: Recipe,
    quantise: Callable[[Ranks], None],
) -> ArgmaxRanks:
    """Quantise router and screen at the ranks that reach the target with the fewest bytes.

    The ranks that the recipe leaves open are lowered one after the other, first the router's, while this reads less.

    Args:
        model: the converted model; its router, tail and ranks are set.
        dense: the dense argmax on documents that the router was not distilled on.
        recipe: of the conversion.
        quantise: sets router and tail of the model at given ranks.

    Returns:
        The ranks of the dense argmax with this router and screen.
    """
    target = Target.of(recipe)

    def tried(ranks: Ranks) -> Tried:
        quantise(ranks)
        argmax_ranks = rank_argmax(model.head, dense)
        return Tried(ranks, argmax_ranks, fewest_bytes(model, dense, argmax_ranks, target))

    best = tried(default_ranks(recipe))
    for smaller in _open_ranks(recipe):
        for change in smaller:
            one = tried(best.ranks._replace(**change))
            if one.quality <= best.quality:
                break
            best = one
    quantise(best.ranks)
    return best.argmax_ranks


def _open_ranks(recipe: Recipe) -> Iterator[list[dict[str, int]]]:
    """The smaller values of each rank that the recipe leaves open."""
    if recipe.router_rank is None:
        yield [{"router": rank} for rank in SMALLER_ROUTER_RANKS]
    if recipe.tail_rank is None:
        yield [{"tail": rank} for rank in SMALLER_TAIL_RANKS]
