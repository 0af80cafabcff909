"""Partition the tokens into experts of equal size: balanced Euclidean k-means.

The centroids start from mini-batch k-means (scikit-learn), or from bisection if there are too many for that. Then two
steps alternate: an auction assigns the same number of tokens to every expert at the least total squared distance, and
every centroid moves to the mean of its expert. The next auction starts from the prices and assignments of the last. No
tokens x experts matrix is stored: a token keeps a list of its nearest experts, and searches all experts again when
prices have made those too expensive.

Sources: Bertsekas, "The auction algorithm: a distributed relaxation method for the assignment problem" (1988);
Bertsekas and Castanon, "The auction algorithm for the transportation problem" (1989), for identical slots;
Malinen and Franti, "Balanced k-means for clustering" (2014), for the alternation.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning

from hf_topk.model.errors import InputError
from hf_topk.progress import Advance, progress

from .bisection import bisect

NEAREST_EXPERTS = 64  # listed per token, in 512 bytes
BLOCK_ELEMENTS = 2**24
TOKENS_PER_BATCH = 4096
TOKENS_PER_ROUND = 2**16

# Limits on the work, in floating-point operations of the products of rows and centroids.
KMEANS_FLOPS, KMEANS_EPOCHS = 4e11, 2
ALTERNATION_FLOPS, MIN_ALTERNATIONS, MAX_ALTERNATIONS = 1.4e12, 2, 8
MIN_TOKENS_PER_SEARCH = 256  # fewer wait, as a search reads all centroids once however many tokens take part
ROUNDS_WHILE_ALTERNATING, ROUNDS_AT_THE_END, ROUNDS_OF_FILLING_UP = 200, 1000, 8

# Minimum increment of a bid (epsilon), relative to the mean squared distance: coarse is fast, fine is exact.
COARSE_INCREMENT, MEDIUM_INCREMENT, FINE_INCREMENT = 1 / 4, 1 / 16, 1 / 64
MIN_MEAN_DISTANCE = 1e-2


def partition(features: torch.Tensor, expert_size: int, seed: int) -> torch.Tensor:
    """Partition the tokens into experts of exactly `expert_size` slots, similar tokens together.

    Minimises the total squared distance from a token to the mean of its expert. The same arguments give the same
    experts on the same machine with the same number of threads.

    Args:
        features: one row per token, of any float dtype, [n, d].
        expert_size: S, slots per expert. If S exceeds n, the only expert is padded to S.
        seed: of the random choices.

    Returns:
        Row indices of `features`, int64 [M, S], M = ceil(n / S). Every index is in exactly one expert, in ascending
        order. The M S - n padding slots are in the last few experts, and repeat the first index of their expert.

    Raises:
        InputError: `features` is not a matrix of finite floats with at least one row, or `expert_size` is below 1.
    """
    _refuse(features, expert_size)
    num_experts = math.ceil(len(features) / expert_size)
    with torch.no_grad():
        rows = _Rows.normalised(features)
        if num_experts == 1 or expert_size == 1 or rows.are_all_equal:
            expert_of = torch.arange(len(rows)) // expert_size
        else:
            expert_of = _balanced_kmeans(rows, num_experts, expert_size, seed)
    return _padded(_members(expert_of, num_experts, expert_size))


def _refuse(features: torch.Tensor, expert_size: int) -> None:
    if features.ndim != 2 or not features.is_floating_point() or 0 in features.shape:
        found = f"{features.dtype} of shape {list(features.shape)}"
        raise InputError(f"features must be floats of shape [tokens, dimensions], at least one of each; got {found}.")
    if expert_size < 1:
        raise InputError(f"expert_size is {expert_size}, must be at least 1.")


@dataclass(frozen=True)
class _Rows:
    """Rows of the features in fp32, centred and scaled to a mean squared norm of 1; computed when they are taken."""

    features: torch.Tensor  # [all tokens, d]
    ids: torch.Tensor  # [n], indices of the tokens in use
    mean: torch.Tensor  # [d]
    scale: float

    @classmethod
    def normalised(cls, features: torch.Tensor) -> "_Rows":
        """All rows of the features; raises InputError if one is not finite."""
        features = features.detach().cpu()
        blocks = features.split(max(1, BLOCK_ELEMENTS // features.shape[1]))
        _refuse_rows(torch.cat([block.float().isfinite().all(1) for block in blocks]))
        mean = reduce(torch.add, (block.sum(0, dtype=torch.float64) for block in blocks)) / len(features)
        mean = mean.float()
        norms = (float((block.float() - mean).norm(dtype=torch.float64)) for block in blocks)
        return cls(features, torch.arange(len(features)), mean, math.hypot(*norms) / math.sqrt(len(features)))

    @property
    def are_all_equal(self) -> bool:
        return self.scale <= 1e-6 * float(self.mean.norm())

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """The rows of `tokens`, indices below n: fp32 [len(tokens), d]."""
        return self.features[self.ids[tokens]].float().sub_(self.mean).div_(self.scale)


def _refuse_rows(is_finite: torch.Tensor) -> None:
    bad = (~is_finite).nonzero()[:, 0]
    if len(bad):
        raise InputError(
            f"{len(bad):,} of the {len(is_finite):,} rows of the features hold NaN, infinity or values beyond fp32, "
            f"first in row {int(bad[0])}: repair these rows of the dense model."
        )


def _balanced_kmeans(rows: _Rows, num_experts: int, expert_size: int, seed: int) -> torch.Tensor:
    """The expert of every token, int64 [n]. Starts from bisection if there is time for few alternations only."""
    alternations = round(ALTERNATION_FLOPS / (2.0 * len(rows) * num_experts * rows.features.shape[1]))
    if alternations < MAX_ALTERNATIONS:
        every_row = rows.take(torch.arange(len(rows)))
        expert_of = bisect(every_row, num_experts, expert_size)
        sums = torch.zeros(num_experts, every_row.shape[1]).index_add_(0, expert_of, every_row)
        auction = _Auction(rows, expert_size, sums / expert_of.bincount(minlength=num_experts).unsqueeze(-1))
        auction.expert_of[: len(rows)] = expert_of
        coarsest = MEDIUM_INCREMENT
    else:
        auction = _Auction(rows, expert_size, _kmeans_centroids(rows, num_experts, seed))
        coarsest = COARSE_INCREMENT
    increments = _geometric(coarsest, FINE_INCREMENT, min(MAX_ALTERNATIONS, max(MIN_ALTERNATIONS, alternations)))
    _alternate("balancing the experts", auction, increments, ROUNDS_AT_THE_END)
    return auction.expert_of[: len(rows)]


def _geometric(first: float, last: float, count: int) -> list[float]:
    return [first * (last / first) ** (step / (count - 1)) for step in range(count)]


def _kmeans_centroids(rows: _Rows, num_experts: int, seed: int) -> torch.Tensor:
    """Centroids of mini-batch k-means from a random start, fp32 [M, d].

    Random tokens, unlike those of k-means++, follow the density of the tokens, as experts of equal size have to.
    """
    batch_size = min(len(rows), max(TOKENS_PER_BATCH, num_experts))
    batch_flops = 2.0 * batch_size * num_experts * rows.features.shape[1]
    batches = min(KMEANS_EPOCHS * math.ceil(len(rows) / batch_size), max(4, int(KMEANS_FLOPS / batch_flops)))
    generator = torch.Generator().manual_seed(seed)
    start = rows.take(torch.randperm(len(rows), generator=generator)[:num_experts]).numpy()
    kmeans = MiniBatchKMeans(num_experts, init=start, n_init=1, random_state=seed % 2**32)
    with progress("finding the centroids", batches * batch_size, "tokens") as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # equal rows make equal centroids
        for _ in range(batches):
            batch = torch.randperm(len(rows), generator=generator)[:batch_size]
            kmeans.partial_fit(rows.take(batch).numpy())
            advance(batch_size)
    return torch.from_numpy(kmeans.cluster_centers_).float()


def _alternate(what: str, auction: "_Auction", increments: list[float], last_rounds: int) -> None:
    """Run the auction and move the centroids to the means of their experts, once for each minimum increment."""
    with progress(what, 2 * len(auction.rows) * len(increments), "tokens") as advance:
        for number, increment in enumerate(increments, start=1):
            auction.search_all(advance)
            auction.run(increment, last_rounds if number == len(increments) else ROUNDS_WHILE_ALTERNATING, advance)
            auction.move_centroids()


class _Auction:
    """Tokens bid for slots of experts; prices rise until every token holds a slot of nearly the best value to it.

    The value of an expert to a token is minus (squared distance + price), plus a constant per token. The slots of an
    expert are identical, so its price is the lowest bid that holds one. Dummy tokens, equally near to all experts,
    fill the surplus slots: without them a price could stay above zero at an expert that is not full.
    """

    def __init__(self, rows: _Rows, expert_size: int, centroids: torch.Tensor) -> None:
        self.rows = rows
        self.expert_size = expert_size
        self.centroids = centroids  # [M, d]
        self.norms = centroids.square().sum(1)
        self.price = torch.zeros(len(centroids))  # [M]
        self.holders = torch.full((len(centroids), expert_size), -1)  # tokens, -1: a free slot
        self.bids = torch.full((len(centroids), expert_size), -torch.inf)
        self.expert_of = torch.full(
            (len(centroids) * expert_size,), -1
        )  # expert of every token, then of the dummies; -1: none
        num_nearest = min(NEAREST_EXPERTS, len(centroids))
        self.nearest = torch.empty(len(rows), num_nearest, dtype=torch.int32)
        self.distance = torch.empty(len(rows), num_nearest)  # squared, to the nearest experts, minus the smallest
        self.best_unlisted = torch.empty(len(rows))  # upper bound of the value of an unlisted expert
        self.mean_distance = 0.0

    def search_all(self, advance: Advance) -> None:
        """List the nearest experts of every token again; prices and assignments stay."""
        self.price -= float(self.price.min())
        total = 0.0
        for tokens in torch.arange(len(self.rows)).split(max(1, BLOCK_ELEMENTS // len(self.price))):
            total += self._search(tokens)
            advance(len(tokens))
        self.mean_distance = max(MIN_MEAN_DISTANCE, total / len(self.rows))

    def run(self, increment: float, max_rounds: int, advance: Advance) -> None:
        """Assign every token, starting from the assignments that are still good enough.

        Args:
            increment: by how much a bid exceeds the price at which the token's two best experts are of equal value,
                relative to the mean squared distance. The total ends within this share of the optimum, usually closer.
            max_rounds: of bids; tokens still unassigned after them go to experts with free slots.
            advance: told the number of tokens, without the dummies, that are assigned.
        """
        increment *= self.mean_distance
        self._release(increment)
        reported = 0
        threads = torch.get_num_threads()
        for _ in range(max_rounds):
            waiting = (self.expert_of < 0).nonzero()[:, 0]
            placed = max(reported, len(self.rows) - len(waiting))
            advance(placed - reported)
            reported = placed
            if not len(waiting):
                break
            waiting = waiting[-TOKENS_PER_ROUND:]
            with _threads(1):
                is_outdated = self._are_outdated(waiting)
            if is_outdated.all() or int(is_outdated.sum()) >= MIN_TOKENS_PER_SEARCH:
                with _threads(threads):
                    self._search(waiting[is_outdated])
            else:
                waiting = waiting[~is_outdated]
            with _threads(1):
                self._sell(*self._bid(waiting, increment))
        self._fill_up()
        advance(len(self.rows) - reported)

    def move_centroids(self) -> None:
        """Move every centroid to the mean of its expert; an empty expert keeps its own."""
        totals = torch.zeros_like(self.centroids)
        for tokens in torch.arange(len(self.rows)).split(max(1, BLOCK_ELEMENTS // totals.shape[1])):
            totals.index_add_(0, self.expert_of[tokens], self.rows.take(tokens))
        counts = self.expert_of[: len(self.rows)].bincount(minlength=len(totals))[:, None]
        self.centroids = torch.where(counts > 0, totals / counts.clamp(min=1), self.centroids)
        self.norms = self.centroids.square().sum(1)

    def _search(self, tokens: torch.Tensor) -> float:
        """List the experts of highest value to `tokens` at current prices; return the sum of the smallest distances."""
        rows = self.rows.take(tokens)
        values = torch.addmm(self.norms + self.price, rows, self.centroids.T, beta=-1, alpha=2)
        value, expert = values.topk(
            self.nearest.shape[1], dim=1
        )  # of the largest values: 1.5 times as fast as of the smallest costs
        distance = -value - self.price[expert]
        least = distance.amin(1)
        self.nearest[tokens] = expert.int()
        self.distance[tokens] = distance - least[:, None]
        self.best_unlisted[tokens] = least + value[:, -1] if expert.shape[1] < len(self.price) else -torch.inf
        return float((least + rows.square().sum(1)).sum(dtype=torch.float64))

    def _values(self, tokens: torch.Tensor) -> torch.Tensor:
        return -(self.distance[tokens] + self.price[self.nearest[tokens].long()])

    def _release(self, increment: float) -> None:
        """Unassign the dummies, and the tokens to which another expert is worth more by over `increment`."""
        self.expert_of[len(self.rows) :] = -1
        for tokens in torch.arange(len(self.rows)).split(TOKENS_PER_ROUND):
            values = self._values(tokens)
            is_own = self.nearest[tokens] == self.expert_of[tokens, None]
            own = torch.where(is_own, values, -torch.inf).amax(1)
            best = torch.maximum(values.amax(1), self.best_unlisted[tokens])
            self.expert_of[tokens] = torch.where(own < best - increment, -1, self.expert_of[tokens])
        self.holders = _members(self.expert_of, len(self.price), self.expert_size)
        self.bids = torch.where(self.holders >= 0, self.price[:, None], -torch.inf)

    def _are_outdated(self, waiting: torch.Tensor) -> torch.Tensor:
        """Whether an expert that a token does not list may be worth more to it than all that it lists."""
        is_outdated = waiting < len(self.rows)
        tokens = waiting[is_outdated]
        is_outdated[is_outdated.clone()] = self._values(tokens).amax(1) < self.best_unlisted[tokens]
        return is_outdated

    def _bid(self, waiting: torch.Tensor, increment: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The bidders, their experts and their bids: the price at which the second best is as good, and `increment`."""
        dummies, tokens = waiting[waiting >= len(self.rows)], waiting[waiting < len(self.rows)]
        cheapest = self.price.topk(2, largest=False)
        best, column = self._values(tokens).topk(2, dim=1)
        expert = self.nearest[tokens].gather(1, column[:, :1])[:, 0].long()
        second = torch.maximum(best[:, 1], self.best_unlisted[tokens])
        offer = self.price[expert] + (best[:, 0] - second) + increment
        return (
            torch.cat([dummies, tokens]),
            torch.cat([cheapest.indices[0].expand(len(dummies)), expert]),
            torch.cat([(cheapest.values[1] + increment).expand(len(dummies)), offer]),
        )

    def _sell(self, tokens: torch.Tensor, experts: torch.Tensor, offers: torch.Tensor) -> None:
        """Every expert keeps the highest of its old and new bids."""
        order = offers.argsort(descending=True, stable=True)
        order = order[experts[order].argsort(stable=True)]
        wanted, which, rank = _ranks(experts[order])
        order, which, rank = (part[rank < self.expert_size] for part in (order, which, rank))
        shape = len(wanted), int(rank.max()) + 1
        bids, holders = torch.full(shape, -torch.inf), torch.full(shape, -1)
        bids[which, rank], holders[which, rank] = offers[order], tokens[order]
        before = self.holders[wanted]
        self.expert_of[before[before >= 0]] = -1
        kept, column = torch.cat([self.bids[wanted], bids], 1).topk(self.expert_size, dim=1)
        winners = torch.cat([before, holders], 1).gather(1, column)
        is_held = winners >= 0
        self.expert_of[winners[is_held]] = wanted[:, None].expand_as(winners)[is_held]
        self.bids[wanted], self.holders[wanted] = kept, winners
        self.price[wanted] = torch.maximum(self.price[wanted], kept[:, -1])

    def _fill_up(self) -> None:
        """Assign the remaining tokens to the nearest expert with free slots, nearest first; the last ones anywhere."""
        expert_of = self.expert_of[: len(self.rows)]
        for _ in range(ROUNDS_OF_FILLING_UP):
            left, room = self._left_and_room()
            if not len(left):
                return
            free = room.nonzero()[:, 0]
            cost, expert = (torch.cat(parts) for parts in zip(*self._nearest_of(free, left), strict=True))
            order = cost.argsort(stable=True)
            order = order[expert[order].argsort(stable=True)]
            order = order[_ranks(expert[order])[2] < room[expert[order]]]
            expert_of[left[order]] = expert[order]
        left, room = self._left_and_room()
        expert_of[left] = torch.arange(len(room)).repeat_interleave(room)[: len(left)]

    def _left_and_room(self) -> tuple[torch.Tensor, torch.Tensor]:
        expert_of = self.expert_of[: len(self.rows)]
        return (expert_of < 0).nonzero()[:, 0], self.expert_size - expert_of[expert_of >= 0].bincount(
            minlength=len(self.price)
        )

    def _nearest_of(self, experts: torch.Tensor, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Squared distance to the nearest of `experts`, and that expert, for each block of the tokens."""
        found = []
        for block in tokens.split(max(1, BLOCK_ELEMENTS // len(experts))):
            nearest = torch.cdist(self.rows.take(block), self.centroids[experts]).min(1)
            found.append((nearest.values.square(), experts[nearest.indices]))
        return found


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Use `count` threads within the context: in short operations threads mostly wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ranks(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The distinct groups of a sorted list, the group index of each entry, and its rank within the group."""
    distinct, which, counts = groups.unique_consecutive(return_inverse=True, return_counts=True)
    return distinct, which, torch.arange(len(groups)) - (counts.cumsum(0) - counts)[which]


def _members(expert_of: torch.Tensor, num_experts: int, expert_size: int) -> torch.Tensor:
    """The tokens of every expert, ascending, padded with -1: int64 [M, S]. Tokens with `expert_of` -1 are left out."""
    order = expert_of.argsort(stable=True)
    order = order[expert_of[order] >= 0]
    members = torch.full((num_experts, expert_size), -1)
    members[expert_of[order], _ranks(expert_of[order])[2]] = order
    return members


def _padded(members: torch.Tensor) -> torch.Tensor:
    """Sort full experts first, and replace every -1 by the first token of its expert."""
    members = members[(members < 0).sum(1).argsort(stable=True)]
    return torch.where(members < 0, members[:, :1], members)
