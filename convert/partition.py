"""Share the tokens out among experts of equal size: balanced Euclidean k-means.

scikit-learn finds the centroids (mini-batch k-means), an auction gives every expert the same number of tokens at the
least total squared distance, and the two steps alternate: every centroid moves to the mean of its expert, and the
auction, whose prices stay, runs again. Nothing of size tokens x experts is ever held: a token knows its nearest
experts alone, and looks again at all of them when prices have made those too dear.

Sources: Bertsekas, "The auction algorithm: a distributed relaxation method for the assignment problem" (1988);
Bertsekas and Castanon, "The auction algorithm for the transportation problem" (1989), for slots that are alike;
Malinen and Franti, "Balanced k-means for clustering" (2014), for the alternation.
"""

import math
import warnings
from dataclasses import dataclass, replace

import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning

from hf_topk.errors import InputError
from hf_topk.progress import progress

NEAREST_EXPERTS = 64
BLOCK_ELEMENTS = 2**24
BATCH_TOKENS = 4096
TOKENS_A_ROUND = 2**16

KMEANS_FLOPS = 4e11
KMEANS_EPOCHS = 2
ALTERNATION_FLOPS = 3e12
MAX_ALTERNATIONS = 8
SAMPLED_SLOTS = 4

ROUNDS_WHILE_ALTERNATING = 200
ROUNDS_AT_THE_END = 5000
COARSEST_BID, FINEST_BID = 1 / 4, 1 / 64
SMALLEST_SPREAD = 1e-5


def partition(features: torch.Tensor, expert_size: int, seed: int) -> torch.Tensor:
    """Share the tokens out among experts of exactly `expert_size` slots, near ones together.

    Minimises the total squared distance from a token to the mean of its expert, by balanced Euclidean k-means. The
    same arguments give the same result on the same machine with the same number of threads.

    Args:
        features: one row a token, of any float dtype, [n, d]; usually the rows of `lm_head`.
        expert_size: S, the number of slots in an expert. Beyond n, the one expert is mostly padding.
        seed: of the random choices.

    Returns:
        Row numbers of `features`, int64 [M, S], M = ceil(n / S). Every row number is in exactly one expert, ascending
        within it. The M S - n slots that are left over lie in as few experts as the distances suggest, the last ones,
        and repeat the first row number of their expert.

    Raises:
        InputError: `features` is not a matrix of finite floats with at least one row, or `expert_size` is below 1.
    """
    _refuse(features, expert_size)
    num_tokens = len(features)
    num_experts = math.ceil(num_tokens / expert_size)
    with torch.no_grad():
        rows = _Rows.normalised(features)
        if num_experts == 1 or expert_size == 1 or rows.are_equal:
            home = torch.arange(num_tokens) // expert_size
        else:
            home = _balanced_kmeans(rows, num_experts, expert_size, seed)
    return _padded(_members(home, num_experts, expert_size))


def _refuse(features: torch.Tensor, expert_size: int) -> None:
    if features.ndim != 2 or not features.is_floating_point() or 0 in features.shape:
        found = f"{features.dtype} of shape {list(features.shape)}"
        raise InputError(f"features must be floats of shape [tokens, dimensions], at least one of each; got {found}.")
    if expert_size < 1:
        raise InputError(f"expert_size is {expert_size}, and an expert holds at least one token: pass 1 or more.")


@dataclass(frozen=True)
class _Rows:
    """Rows of the features as fp32, centred and scaled so that their mean squared norm is 1; made when asked for."""

    features: torch.Tensor  # [all tokens, d]
    ids: torch.Tensor  # [n], the rows in use
    mean: torch.Tensor  # [d]
    scale: float

    @classmethod
    def normalised(cls, features: torch.Tensor) -> "_Rows":
        """Measure the mean and the scale of all rows, and refuse those that are not finite."""
        features = features.detach().cpu()
        ids = torch.arange(len(features))
        blocks = features.split(max(1, BLOCK_ELEMENTS // features.shape[1]))
        total = sum(block.double().sum(0) for block in blocks)
        mean = (torch.as_tensor(total) / len(features)).float()
        if not mean.isfinite().all():
            _refuse_rows(blocks)
        centred = (block.float() - mean for block in blocks)
        scale = math.sqrt(sum(float(block.double().square().sum()) for block in centred) / len(features))
        return cls(features, ids, mean, scale)

    @property
    def are_equal(self) -> bool:
        return self.scale <= 1e-6 * float(self.mean.norm())

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """The rows of `tokens` (numbers into `ids`), fp32 [len(tokens), d]."""
        return self.features[self.ids[tokens]].float().sub_(self.mean).div_(self.scale)

    def sample(self, count: int, seed: int) -> "_Rows":
        """`count` of the rows, drawn at random."""
        if count >= len(self):
            return self
        drawn = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count]
        return replace(self, ids=self.ids[drawn.sort().values])


def _refuse_rows(blocks: tuple[torch.Tensor, ...]) -> None:
    finite = torch.cat([block.isfinite().all(1) for block in blocks])
    bad = (~finite).nonzero()[:, 0]
    raise InputError(
        f"{len(bad):,} rows of the features hold NaN or infinity, the first of them row {int(bad[0]):,}: "
        "repair the dense checkpoint, or load it in a wider dtype."
    )


def _balanced_kmeans(rows: _Rows, num_experts: int, expert_size: int, seed: int) -> torch.Tensor:
    """The expert of every token, [n]."""
    centroids = _kmeans_centroids(rows, num_experts, seed)
    price = torch.zeros(num_experts)
    for part, slots, alternations, finest in _stages(rows, num_experts, expert_size, seed):
        auction = _Auction(part, slots, centroids, price)
        with progress(f"balancing the experts, {len(part):,} tokens", alternations, "alternations") as advance:
            for alternation in range(alternations):
                last = alternation == alternations - 1
                increment = finest if last else max(finest, COARSEST_BID / 2**alternation)
                home = auction.run(increment, ROUNDS_AT_THE_END if last else ROUNDS_WHILE_ALTERNATING)
                centroids, price = _means(part, home, auction.centroids), auction.price
                if not last:
                    auction.move_centroids(centroids)
                advance(1)
    return home


def _stages(rows, num_experts, expert_size, seed):
    if SAMPLE:
        slots = max(2, expert_size // SAMPLE)
        yield rows.sample(num_experts * slots, seed), slots, SAMPLE_ALT, 1 / 16
    yield rows, expert_size, FULL_ALT, FINEST_BID


SAMPLE = 8
SAMPLE_ALT = 6
FULL_ALT = 3


def _kmeans_centroids(rows: _Rows, num_experts: int, seed: int) -> torch.Tensor:
    """Centroids of mini-batch k-means that starts at tokens drawn at random, [M, d].

    Tokens drawn at random, unlike k-means++, put centroids where many tokens are, which is what equal sizes need.
    """
    batch_size = min(len(rows), max(BATCH_TOKENS, num_experts))
    batch_flops = 2.0 * batch_size * num_experts * rows.features.shape[1]
    batches = int(min(KMEANS_EPOCHS * math.ceil(len(rows) / batch_size), max(4, KMEANS_FLOPS // batch_flops)))
    generator = torch.Generator().manual_seed(seed)
    start = rows.take(torch.randperm(len(rows), generator=generator)[:num_experts])
    kmeans = MiniBatchKMeans(num_experts, init=start.numpy(), n_init=1, random_state=seed % 2**32)
    with progress("finding the centroids", batches * batch_size, "tokens") as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for _ in range(batches):
            batch = torch.randperm(len(rows), generator=generator)[:batch_size]
            kmeans.partial_fit(rows.take(batch).numpy())
            advance(batch_size)
    return torch.from_numpy(kmeans.cluster_centers_).float()


class _Auction:
    """Tokens bid for slots of experts; prices rise until every token holds the slot that it likes best, nearly.

    The value of an expert to a token is minus (squared distance + price), less a constant of the token. Slots of an
    expert are alike, so its price is the lowest bid that holds one. Spare slots are filled by spare tokens, to which
    all experts are equally near: without them, prices left from an earlier run would not be right for an expert that
    stays short.
    """

    def __init__(self, rows: _Rows, expert_size: int, centroids: torch.Tensor, price: torch.Tensor) -> None:
        self.rows = rows
        self.expert_size = expert_size
        num_experts, num_tokens = len(centroids), len(rows)
        self.num_spare = num_experts * expert_size - num_tokens
        num_nearest = min(NEAREST_EXPERTS, num_experts)
        self.price = price.clone()
        self.home = torch.full((num_tokens,), -1)
        self.nearest = torch.empty(num_tokens, num_nearest, dtype=torch.int32)
        self.distance = torch.empty(num_tokens, num_nearest)  # to the nearest experts, squared, less the least
        self.elsewhere = torch.empty(num_tokens)  # no expert but the nearest has a higher value: prices only rise
        self.spread = SMALLEST_SPREAD
        self.move_centroids(centroids)

    def move_centroids(self, centroids: torch.Tensor) -> None:
        """Look for the nearest experts of every token again; prices and homes stay."""
        self.centroids = centroids
        self.norms = centroids.square().sum(1)
        self.price -= self.price.min().clone()
        least = self._look(torch.arange(len(self.rows)))
        self.spread = max(SMALLEST_SPREAD, 1 + least / len(self.rows))

    def run(self, increment: float, max_rounds: int) -> torch.Tensor:
        """Give every token a home, starting from the homes that are still good enough.

        Args:
            increment: by how much a bid exceeds what the token would pay at the most, as a share of the mean squared
                distance. The total ends within this share of the optimum, usually much nearer.
            max_rounds: after so many rounds of bids, the tokens left go to the nearest experts that have room.

        Returns:
            The expert of every token, int64 [n].
        """
        increment *= self.spread
        self._leave_homes(increment)
        home = torch.cat([self.home, torch.full((self.num_spare,), -1)])
        holders = _members(self.home, len(self.price), self.expert_size)
        bids = torch.where(holders >= 0, self.price[:, None], -torch.inf)
        for _ in range(max_rounds):
            waiting = (home < 0).nonzero()[:, 0]
            if not len(waiting):
                break
            tokens, experts, offers = self._bid(waiting[-TOKENS_A_ROUND:], increment)
            self._sell(tokens, experts, offers, home, holders, bids)
        self.home = home[: len(self.rows)]
        self._fill_up()
        return self.home

    def _look(self, tokens: torch.Tensor) -> float:
        """Find the experts of highest value to `tokens` at the present prices; returns the sum of least distances."""
        total = 0.0
        for some in tokens.split(max(1, BLOCK_ELEMENTS // len(self.price))):
            costs = torch.addmm(self.norms + self.price, self.rows.take(some), self.centroids.T, alpha=-2)
            cost, expert = costs.topk(self.nearest.shape[1], dim=1, largest=False)
            distance = cost - self.price[expert]
            least = distance.min(1).values
            self.nearest[some] = expert.int()
            self.distance[some] = distance - least[:, None]
            self.elsewhere[some] = least - cost[:, -1]
            total += float(least.sum(dtype=torch.float64))
        if self.nearest.shape[1] == len(self.price):
            self.elsewhere[tokens] = -torch.inf
        return total

    def _values(self, tokens: torch.Tensor) -> torch.Tensor:
        return -(self.distance[tokens] + self.price[self.nearest[tokens].long()])

    def _leave_homes(self, increment: float) -> None:
        """Free the tokens to which another expert is worth more than their own by over `increment`."""
        for tokens in torch.arange(len(self.rows)).split(TOKENS_A_ROUND):
            values = self._values(tokens)
            is_home = self.nearest[tokens] == self.home[tokens, None]
            own = torch.where(is_home, values, -torch.inf).amax(1)
            best = torch.maximum(values.amax(1), self.elsewhere[tokens])
            self.home[tokens] = torch.where(own < best - increment, -1, self.home[tokens])

    def _bid(self, waiting: torch.Tensor, increment: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the waiting tokens offer, and for which experts: as much as makes the second best equally good."""
        spare = waiting[waiting >= len(self.rows)]
        cheapest = self.price.topk(2, largest=False)
        tokens = waiting[waiting < len(self.rows)]
        best, column = self._values(tokens).topk(2, dim=1)
        outdated = best[:, 0] < self.elsewhere[tokens]
        if outdated.any():
            self._look(tokens[outdated])
            best[outdated], column[outdated] = self._values(tokens[outdated]).topk(2, dim=1)
        expert = self.nearest[tokens].gather(1, column[:, :1])[:, 0].long()
        second = torch.maximum(best[:, 1], self.elsewhere[tokens])
        offer = self.price[expert] + best[:, 0] - second + increment
        return (
            torch.cat([spare, tokens]),
            torch.cat([cheapest.indices[0].expand(len(spare)), expert]),
            torch.cat([(cheapest.values[1] + increment).expand(len(spare)), offer]),
        )

    def _sell(
        self,
        tokens: torch.Tensor,
        experts: torch.Tensor,
        offers: torch.Tensor,
        home: torch.Tensor,
        holders: torch.Tensor,
        bids: torch.Tensor,
    ) -> None:
        """Every expert keeps the highest of the bids that it holds and of those offered."""
        order = offers.argsort(descending=True, stable=True)
        order = order[experts[order].argsort(stable=True)]
        tokens, offers = tokens[order], offers[order]
        wanted, which, rank = _ranks(experts[order])
        heard = rank < self.expert_size
        width = int(rank[heard].max()) + 1
        new_bids = torch.full((len(wanted), width), -torch.inf)
        new_holders = torch.full((len(wanted), width), -1)
        new_bids[which[heard], rank[heard]] = offers[heard]
        new_holders[which[heard], rank[heard]] = tokens[heard]
        old = holders[wanted]
        home[old[old >= 0]] = -1
        kept, column = torch.cat([bids[wanted], new_bids], 1).topk(self.expert_size, dim=1)
        winners = torch.cat([old, new_holders], 1).gather(1, column)
        is_held = winners >= 0
        home[winners[is_held]] = wanted[:, None].expand_as(winners)[is_held]
        bids[wanted], holders[wanted] = kept, winners
        self.price[wanted] = torch.maximum(self.price[wanted], kept[:, -1])

    def _fill_up(self) -> None:
        """Send tokens without a home to the nearest expert that has room, the nearest first, until none is left."""
        while len(left := (self.home < 0).nonzero()[:, 0]):
            room = self.expert_size - self.home[self.home >= 0].bincount(minlength=len(self.price))
            free = room.nonzero()[:, 0]
            found = []
            for some in left.split(max(1, BLOCK_ELEMENTS // len(free))):
                row = self.rows.take(some)
                cost = torch.addmm(self.norms[free], row, self.centroids[free].T, alpha=-2).min(1)
                found.append((row.square().sum(1) + cost.values, free[cost.indices]))
            distance, expert = (torch.cat(parts) for parts in zip(*found, strict=True))
            order = distance.argsort(stable=True)
            order = order[expert[order].argsort(stable=True)]
            fits = _ranks(expert[order])[2] < room[expert[order]]
            self.home[left[order[fits]]] = expert[order[fits]]


def _ranks(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The distinct groups of an ascending list, which of them an entry is in, and its rank within that group."""
    distinct, which, counts = groups.unique_consecutive(return_inverse=True, return_counts=True)
    return distinct, which, torch.arange(len(groups)) - (counts.cumsum(0) - counts)[which]


def _means(rows: _Rows, home: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The mean row of every expert, [M, d]; an expert without tokens keeps its centroid."""
    totals = torch.zeros_like(centroids)
    for tokens in torch.arange(len(rows)).split(max(1, BLOCK_ELEMENTS // centroids.shape[1])):
        totals.index_add_(0, home[tokens], rows.take(tokens))
    counts = home.bincount(minlength=len(centroids))[:, None]
    return torch.where(counts > 0, totals / counts.clamp(min=1), centroids)


def _members(home: torch.Tensor, num_experts: int, expert_size: int) -> torch.Tensor:
    """The tokens of every expert, ascending, then -1 where it is short: int64 [M, S]. Tokens at home -1 are left out."""
    order = home.argsort(stable=True)
    order = order[home[order] >= 0]
    members = torch.full((num_experts, expert_size), -1)
    members[home[order], _ranks(home[order])[2]] = order
    return members


def _padded(members: torch.Tensor) -> torch.Tensor:
    """Full experts first, and in the others every -1 replaced by their first token."""
    members = members[(members < 0).sum(1).argsort(stable=True)]
    return torch.where(members < 0, members[:, :1], members)
