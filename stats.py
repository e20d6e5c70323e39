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


def interval(D, draws=10_000):
    """95% interval of the mean of D (n,) or (seeds, n), paired differences by item. Items are drawn anew with
    replacement (bootstrap, a fixed generator); the means of k seeds enter by Student's t with k - 1 degrees
    of freedom, as a bootstrap over seeds is far too narrow: of two it covers 61%, of five 88%. With one seed
    the interval is about that run alone. What items and seeds share is counted in both: a little too wide."""
    D, generator = np.atleast_2d(np.asarray(D, float)), np.random.default_rng(0)
    k, n = D.shape
    values, count = np.unique(D.mean(0), return_counts=True)  # items alike are drawn together: one law
    means = generator.multinomial(n, count / n, draws) @ values / n
    if k > 1:
        means += generator.standard_t(k - 1, draws) * D.mean(1).std(ddof=1) / math.sqrt(k)
    return np.quantile(means, (0.025, 0.975)).tolist()


def mcnemar(a, b):
    """Exact two-sided p that a and b (right or wrong by item) are equally good: of the items on which they
    disagree, is it a fair coin that decides?    5 lost, none won -> 2 / 2^5 = 0.0625"""
    lost, won = sum(x > y for x, y in zip(a, b)), sum(x < y for x, y in zip(a, b))
    tail = sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2 ** (lost + won))


def paired(a, b):
    """How b does against a (lists of right or wrong, the same items)."""
    return dict(n=len(a), trained=sum(a) / len(a), ablated=sum(b) / len(b),
                difference=(sum(b) - sum(a)) / len(a), ci95=interval(np.subtract(b, a)), p=mcnemar(a, b))


def spearman(x, y):
    """Correlation of ranks, ties sharing theirs; None where one of the series never changes."""
    def ranked(values):
        _, place, count = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
        return (count.cumsum() - (count - 1) / 2)[place]
    a, b = ranked(x), ranked(y)
    return float(np.corrcoef(a, b)[0, 1]) if min(a.std(), b.std()) > 0 else None


def detrended(steps, x, degree=1):
    """What of x a polynomial of this degree over the steps does not tell: two series that both drift
    correlate for nothing. A straight line leaves a curve in both, and two curves correlate likewise."""
    left = x - np.polyval(np.polyfit(np.subtract(steps, np.mean(steps)), x, degree), steps - np.mean(steps))
    return np.where(np.abs(left) < 1e-9 * (1 + np.abs(x).max()), 0.0, left)


def together(steps, x, y):
    """Spearman of two series (lists): as they are, with a straight trend over the steps taken out of both,
    and with a cubic one."""
    steps, x, y = (np.asarray(v, float) for v in (steps, x, y))
    left = lambda d: spearman(detrended(steps, x, d), detrended(steps, y, d)) if len(x) > d + 1 else None
    return dict(n=len(x), rho=spearman(x, y), detrended=left(1), cubic=left(3))


def detectable(sd, seeds=5):
    """The difference of two means over `seeds` seeds of this deviation that a two-sided test at 5% finds in
    80% of studies: 2.8 (1.96 + 0.84) standard errors."""
    return 2.8 * sd * math.sqrt(2 / seeds)
