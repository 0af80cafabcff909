"""A lower confidence bound of the agreement over documents, whose positions are not independent."""

import math
from collections.abc import Sequence

CONFIDENCE = 0.95


def lower_bound(agreed: Sequence[int], positions: Sequence[int], *, of_new_documents: bool = False) -> float:
    """One-sided 95 % lower confidence bound of the share of positions that agree, clustered by document.

    The Clopper-Pearson bound at the effective number of positions: the number of independent ones with the variance
    seen between documents, reduced for few documents (Korn and Graubard 1998, "Confidence intervals for proportions
    with small expected number of positive counts estimated from survey data", Survey Methodology 24). Positions of a
    single document count as independent.

    Args:
        agreed: number of positions of each document that agree.
        positions: number of positions of each document, at least one in all.
        of_new_documents: bound what is measured on as many new documents, which varies as much again, not the share of
            all documents.

    Examples:
        >>> f"{lower_bound([298, 300, 297], [300, 300, 300]):.3f}"
        '0.976'
    """
    from scipy.stats import beta, t  # slow to import

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
    independent = min(independent, total) / (2 if of_new_documents else 1)
    bound = float(beta.ppf(1 - CONFIDENCE, share * independent, (1 - share) * independent + 1))
    return 0.0 if math.isnan(bound) else bound
