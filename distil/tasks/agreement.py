"""Statistics of a model's outputs against labels: does another reading of them fit better?"""

import math
import statistics

import numpy as np

LUCK = 1e-3  # probability of refusing a model whose outputs don't depend on the labels


def deviations_of_luck(num_tests: int = 1) -> float:
    """Return how many standard deviations luck exceeds, in one of the tests, with LUCK."""
    return -statistics.NormalDist().inv_cdf(max(LUCK / num_tests, 1e-300))


def find_better_order(counts_CC: np.ndarray) -> tuple[np.ndarray, float]:
    """Find the class of each output that agrees best with the labels; say by how much.

    counts_CC[i, j]: examples with output i and label j; in the assumed order, output i is class i.
    Returns (class of each output, standard deviations by which its agreement exceeds that of the
    assumed order). Agreement is counted beyond what the frequencies of outputs and labels give by
    themselves, as Cohen's kappa does: no order is better for a model that always answers the same.
    """
    from scipy.optimize import linear_sum_assignment

    num, same = counts_CC.sum(), np.eye(len(counts_CC))
    p_C, q_C = counts_CC.sum(1) / num, counts_CC.sum(0) / num
    excess_CC = counts_CC - num * np.outer(p_C, q_C)
    # The assumed order wins ties.
    _, order_C = linear_sum_assignment(excess_CC + 1e-6 * same, maximize=True)
    gain_CC = same[order_C] - same
    gain = (excess_CC * gain_CC).sum()
    if not gain > 1e-6 * num:
        return np.arange(len(counts_CC)), 0.0
    # Variance of the gain: of random pairs of outputs and labels with these frequencies, or, where
    # more, of a coin for each example that one order gets right and the other wrong.
    centered_CC = gain_CC - (gain_CC @ q_C)[:, None] - p_C @ gain_CC + p_C @ gain_CC @ q_C
    of_pairs = num**2 / max(num - 1, 1) * (np.outer(p_C, q_C) * centered_CC**2).sum()
    return order_C, float(gain / math.sqrt(max(of_pairs, (counts_CC * abs(gain_CC)).sum())))


def is_beyond_luck(deviations: float, num_classes: int) -> bool:
    """Return whether the best of all orders exceeds the assumed one by more than luck explains."""
    num_orders = math.factorial(min(num_classes, 100)) - 1
    return num_orders > 0 and deviations > deviations_of_luck(num_orders)


def falls(pearson: float, num: int) -> bool:
    """Return whether a correlation is below 0 by more than luck explains (Fisher's z)."""
    if num <= 3:
        return False
    pearson = min(max(pearson, 1e-9 - 1), 1 - 1e-9)
    return math.atanh(pearson) * math.sqrt(num - 3) < -deviations_of_luck()
