"""
Is a difference more than chance? Every interval, p and correlation of this project.

Differences are paired: the same problems on both sides, so what makes a problem easy or hard cancels out.
"""

import math

import numpy as np


def wilson(right, n, z=1.96):
    """95% interval of a share (Wilson 1927), honest for small n and near 0 and 1.    8 of 10 -> [0.49,
    0.94]"""
    p, zn = right / n, z * z / n
    centre, half = (p + zn / 2) / (1 + zn), z * math.sqrt(p * (1 - p) / n + zn / (4 * n)) / (1 + zn)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def bootstrap(D, draws=10_000):
    """95% interval of the mean of D (n,) or (seeds, n), paired differences by item: items, and seeds where
    there are several, are drawn anew (Owen 2007, 0712.1111), by a fixed generator. About their own mean k
    seeds spread too little, by sqrt((k - 1) / k): so much are they drawn apart."""
    D, generator = np.atleast_2d(np.asarray(D, float)), np.random.default_rng(0)
    k, n = D.shape
    D = D + (D.mean(1, keepdims=True) - D.mean()) * (math.sqrt(k / max(1, k - 1)) - 1)
    columns, count = np.unique(D, axis=1, return_counts=True)  # items alike are drawn together: one law
    seeds, items = generator.multinomial(k, [1 / k] * k, draws), generator.multinomial(n, count / n, draws)
    return np.quantile((seeds @ columns * items).sum(1) / (k * n), (0.025, 0.975)).tolist()


def mcnemar(a, b):
    """Exact two-sided p that a and b (right or wrong by item) are equally good: of the items on which they
    disagree, is it a fair coin that decides?    5 lost, none won -> 2 / 2^5 = 0.0625"""
    lost, won = sum(x > y for x, y in zip(a, b)), sum(x < y for x, y in zip(a, b))
    tail = sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2 ** (lost + won))


def paired(a, b):
    """How b does against a (lists of right or wrong, the same items)."""
    return dict(n=len(a), trained=sum(a) / len(a), ablated=sum(b) / len(b),
                difference=(sum(b) - sum(a)) / len(a), ci95=bootstrap(np.subtract(b, a)), p=mcnemar(a, b))


def spearman(x, y):
    """Correlation of ranks, ties sharing theirs; None where one of the series never changes."""
    def ranked(values):
        _, place, count = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
        return (count.cumsum() - (count - 1) / 2)[place]
    a, b = ranked(x), ranked(y)
    return float(np.corrcoef(a, b)[0, 1]) if min(a.std(), b.std()) > 0 else None


def detrended(steps, x):
    """What of x a straight line over the steps does not tell: two series that both drift correlate for
    nothing."""
    left = x - np.polyval(np.polyfit(steps, x, 1), steps)
    return np.where(np.abs(left) < 1e-9 * (1 + np.abs(x).max()), 0.0, left)


def together(steps, x, y):
    """Spearman of two series (lists), as they are and with their trends over the steps taken out."""
    steps, x, y = (np.asarray(v, float) for v in (steps, x, y))
    return dict(n=len(x), rho=spearman(x, y),
                detrended=spearman(detrended(steps, x), detrended(steps, y)) if len(x) > 2 else None)


def detectable(sd, seeds=5):
    """The difference of two means over `seeds` seeds of this deviation that a two-sided test at 5% finds in
    80% of studies: 2.8 (1.96 + 0.84) standard errors."""
    return 2.8 * sd * math.sqrt(2 / seeds)
