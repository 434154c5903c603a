"""The tasks' metrics, computed by scikit-learn, scipy and seqeval, and their names on the hub."""

import collections
import math
import statistics
from collections.abc import Sequence

from distil.tasks.schema import Example, Task

# a metric in scores.json: the hub's name for it in a model card
HUB_METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "precision": "precision",
    "recall": "recall",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "exact": "exact_match",
    "HasAns_exact": "exact_match",
    "NoAns_exact": "exact_match",
    "HasAns_f1": "f1",
    "NoAns_f1": "f1",
    "perplexity": "perplexity",
    "token_perplexity": "perplexity",
    "word_perplexity": "perplexity",
    "pseudo_perplexity": "perplexity",
    "drawn_perplexity": "perplexity",
}


def accuracy(predictions: Sequence[str], gold: Sequence[str]) -> dict[str, float]:
    """Return the share of equal labels, x100."""
    from sklearn.metrics import accuracy_score

    return {"accuracy": 100 * float(accuracy_score(gold, predictions))}


def accuracy_and_f1(predictions: Sequence[str], gold: Sequence[str]) -> dict[str, float]:
    """Return accuracy, and F1 of class 1 (0 where neither side has the class), x100."""
    from sklearn.metrics import f1_score

    f1 = f1_score(gold, predictions, labels=["0", "1"], pos_label="1", zero_division=0.0)
    return {**accuracy(predictions, gold), "f1": 100 * float(f1)}


def matthews(predictions: Sequence[str], gold: Sequence[str]) -> dict[str, float]:
    """Return Matthews' correlation, x100; 0 where one side has one class only."""
    from sklearn.metrics import matthews_corrcoef

    return {"matthews": 100 * float(matthews_corrcoef(gold, predictions))}


def correlations(predictions: Sequence[float], gold: Sequence[float]) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation, x100; 0 where one side is constant."""
    from scipy.stats import pearsonr, spearmanr

    if len(set(predictions)) < 2 or len(set(gold)) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": 100 * float(pearsonr(predictions, gold).statistic),
        "spearman": 100 * float(spearmanr(predictions, gold).statistic),
    }


def entities(
    predictions: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Return F1, precision and recall of entities, x100.

    An entity is right where span and type are equal, as conlleval counts (not strict IOB2).
    """
    from seqeval.metrics import f1_score, precision_score, recall_score

    functions = {"f1": f1_score, "precision": precision_score, "recall": recall_score}
    pair = [list(row) for row in gold], [list(row) for row in predictions]
    return {
        name: 100 * float(function(*pair, zero_division=0)) for name, function in functions.items()
    }


def perplexities(
    nll_sum: float, num_scored: int, num_tokens: int, num_words: int
) -> dict[str, float]:
    """Return the perplexity per token, exp(nll_sum / num_scored), and per word.

    nll_sum: in nats. Per word: exp(nll_sum / num_scored x num_tokens / num_words); tokens that
    blocks leave unscored (their first ones, the tail) count with the mean of the others.
    """
    mean = nll_sum / num_scored
    by_token, by_word = math.exp(min(mean, 700)), math.exp(min(mean * num_tokens / num_words, 700))
    return {"score": by_token, "token_perplexity": by_token, "word_perplexity": by_word}


def score(task: Task, examples: Sequence[Example], predictions: Sequence) -> dict[str, float]:
    """Compute a task's metrics: "score", its one number, and its metrics or a number per group.

    predictions: one per example, of the type of its label.
    """
    groups: dict[str, tuple[list, list]] = collections.defaultdict(lambda: ([], []))
    for example, prediction in zip(examples, predictions, strict=True):
        groups[example.group][0].append(prediction)
        groups[example.group][1].append(example.label)
    parts = {group: task.metrics(*pair) for group, pair in groups.items()}
    figures = {
        group: statistics.fmean(values[name] for name in task.score_metrics)
        for group, values in parts.items()
    }
    if set(parts) == {""}:
        return {"score": figures[""], **parts[""]}
    main = [group for group in task.main_groups if group in figures]
    chosen = main if main and len(main) == len(task.main_groups) else list(figures)
    return {"score": statistics.fmean(figures[group] for group in chosen), **figures}


def num_words(text: str) -> int:
    """Count a text's words and line ends, as WikiText's word perplexity does."""
    return len(text.split()) + text.count("\n")
