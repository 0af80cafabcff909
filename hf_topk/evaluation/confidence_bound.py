"""A lower bound of an agreement that holds for documents, whose positions depend on one another."""

import math
from collections.abc import Sequence

CONFIDENCE = 0.95


def lower_bound(agreed: Sequence[int], positions: Sequence[int]) -> float:
    """One-sided 95 % lower bound of the share of positions that agree, in documents like those that were measured.

    The Clopper-Pearson bound at the number of independent positions that has the variance seen between documents, less
    what is lost where documents are few (Korn and Graubard 1998, "Confidence intervals for proportions with small
    expected number of positive counts estimated from survey data", Survey Methodology 24). A single document tells no
    variance: its positions count as independent.

    Args:
        agreed: positions of each document that agree.
        positions: positions of each document, more than none in all.

    Example:
        >>> f"{lower_bound([298, 300, 297], [300, 300, 300]):.3f}"
        '0.976'
    """
    from scipy.stats import beta, t  # takes long

    total, documents = sum(positions), len(positions)
    share = sum(agreed) / total
    if share == 0:
        return 0.0
    independent = float(total)
    if documents > 1:
        off = sum((some - share * count) ** 2 for some, count in zip(agreed, positions, strict=True))
        variance = documents / (documents - 1) * off / total**2
        if variance > 0:
            independent = min(independent, share * (1 - share) / variance)
        if total > documents:
            independent *= (t.ppf(CONFIDENCE, total - 1) / t.ppf(CONFIDENCE, documents - 1)) ** 2
    independent = min(independent, total)
    bound = float(beta.ppf(1 - CONFIDENCE, share * independent, (1 - share) * independent + 1))
    return 0.0 if math.isnan(bound) else bound
