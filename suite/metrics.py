"""Metrics of classification with intervals from a bootstrap by group.

Every metric is a function of the rows' weights: its value is the metric at weights of one, a resample counts how often
a row's group was drawn. So a thousand resamples are a few matrix products, and value and interval cannot disagree.
A class that no row has is left out of averages over classes; what cannot be computed is left out with a reason.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from adaptsuite.errors import UsageError, nearest

BINS = 15  # of the calibration error
TOP = 5  # of top-5 accuracy
WORK = 2e8  # weights touched by one metric's bootstrap before it makes do with fewer resamples
LEAST = 100  # resamples
LOWER = ("log_loss", "ece")  # metrics of which less is better


@dataclass(frozen=True)
class Scored:
    """Outputs beside targets, as the metrics want them: (N, K) float64 probabilities, (N, K) bool truth."""

    probabilities: np.ndarray
    truth: np.ndarray
    task: str

    @cached_property
    def predicted(self) -> np.ndarray:
        """(N, K) bool: the most probable class, or every label at .5 and above."""
        if self.task == "multilabel":
            return self.probabilities >= 0.5
        return self.probabilities.argmax(1)[:, None] == np.arange(self.probabilities.shape[1])

    @cached_property
    def hit(self) -> np.ndarray:
        """(N,) float64: 1 where the row is right, all its labels for multilabel."""
        return (self.predicted == self.truth).all(1).astype(float)

    @cached_property
    def names(self) -> list[str]:
        """Metrics that say something here: among a handful of classes most are the true one or near it."""
        few = self.truth.shape[1] <= 2 * TOP
        return [name for name in METRICS[self.task] if not (few and name == f"top{TOP}_accuracy")]

    @cached_property
    def near(self) -> np.ndarray:
        """(N,) float64: 1 where the true class is among the TOP most probable; of equals the first ones are."""
        first = np.argsort(-self.probabilities, 1, kind="stable")[:, :TOP]
        return np.take_along_axis(self.truth, first, 1).any(1).astype(float)

    @cached_property
    def losses(self) -> np.ndarray:
        """(N,) cross entropy in nats; for multilabel binary cross entropy, the mean over classes."""
        # the clip of scikit-learn: a probability of 0 costs 36 nats and not infinity
        clipped = np.clip(self.probabilities, np.finfo(float).eps, 1 - np.finfo(float).eps)
        if self.task == "multilabel":
            return -np.where(self.truth, np.log(clipped), np.log(1 - clipped)).mean(1)
        return -np.log(clipped[self.truth])

    @cached_property
    def confidence(self) -> tuple[np.ndarray, np.ndarray]:
        """(N, 1) probability and truth of the predicted class; (N, K) of every label for multilabel."""
        if self.task == "multilabel":
            return self.probabilities, self.truth.astype(float)
        return self.probabilities.max(1, keepdims=True), self.hit[:, None]

    @cached_property
    def binned(self) -> np.ndarray:
        """(3, N, BINS) sums of count, confidence and truth of a row in each bin of confidence."""
        confidence, truth = self.confidence
        bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        sums = np.zeros((3, len(bins), BINS))
        rows = np.arange(len(bins))[:, None]
        for table, values in zip(sums, (np.ones_like(confidence), confidence, truth), strict=True):
            np.add.at(table, (rows, bins), values)
        return sums

    @cached_property
    def order(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """For each class: rows by falling probability, places of the positives in it, start and end of their ties."""
        result = []
        for scores, positive in zip(self.probabilities.T, self.truth.T, strict=True):
            order = np.argsort(-scores, kind="stable")
            sorted_scores = -scores[order]
            places = np.flatnonzero(positive[order])
            ends = np.searchsorted(sorted_scores, sorted_scores[places], side="right")
            result.append((order, places, np.searchsorted(sorted_scores, sorted_scores[places], side="left"), ends))
        return result


# metrics: Scored and weights (R, N) -> (R,), nan where a resample does not define the metric


def _accuracy(scored, weights):
    return weights @ scored.hit / weights.sum(1)


def _top_accuracy(scored, weights):
    return weights @ scored.near / weights.sum(1)


def _balanced_accuracy(scored, weights):
    return _class_mean(weights @ (scored.truth & scored.predicted), weights @ scored.truth)


def _macro_f1(scored, weights):
    support, predicted = weights @ scored.truth, weights @ scored.predicted
    both = 2 * (weights @ (scored.truth & scored.predicted))
    return _class_mean(both, (support + predicted) * (support > 0))


def _log_loss(scored, weights):
    return weights @ scored.losses / weights.sum(1)


def _ece(scored, weights):
    _, confidence, truth = scored.binned
    entries = weights.sum(1) * scored.confidence[0].shape[1]
    return abs(weights @ (confidence - truth)).sum(1) / entries


def _auroc(scored, weights):
    """Area under the ROC curve of each class against the rest; ties count half."""
    return _ranked_mean(_class_auroc, scored, weights)


def _map(scored, weights):
    """Mean over classes of sum (R_n - R_{n-1}) P_n over the distinct thresholds, as scikit-learn defines it."""
    return _ranked_mean(_class_precision, scored, weights)


def _ranked_mean(function, scored, weights):
    per_class = np.full((scored.truth.shape[1], len(weights)), np.nan)
    for k, (order, *places) in enumerate(scored.order):
        if scored.truth[:, k].any():
            per_class[k] = function(weights[:, order], places)
    return _nanmean(per_class)


def _class_auroc(weights, order):
    places, starts, ends = order
    positive = weights[:, places]
    negative = weights.copy()
    negative[:, places] = 0
    above = _running(negative)  # negatives ranked before a place
    wins = above[:, -1:] - 0.5 * (above[:, starts] + above[:, ends])
    with np.errstate(invalid="ignore", divide="ignore"):
        return (positive * wins).sum(1, dtype=float) / (positive.sum(1, dtype=float) * above[:, -1])


def _class_precision(weights, order):
    places, _, ends = order
    positive = weights[:, places]
    last = np.searchsorted(places, ends)  # positives up to the end of a tie
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(_running(positive)[:, last] / _running(weights)[:, ends])
        return (positive * precision).sum(1, dtype=float) / positive.sum(1, dtype=float)


def _running(weights):
    """(R, N) -> (R, N + 1) sums before each place; whole numbers, so exact in float32 up to 16 million rows."""
    result = np.zeros((weights.shape[0], weights.shape[1] + 1), dtype=weights.dtype)
    np.cumsum(weights, axis=1, out=result[:, 1:])
    return result


def _class_mean(part, whole):
    with np.errstate(invalid="ignore", divide="ignore"):
        return _nanmean((part / whole).T)


def _nanmean(per_class):
    """Mean over the classes that are defined; nan where none is."""
    defined = ~np.isnan(per_class)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(defined, per_class, 0).sum(0, dtype=float) / defined.sum(0)


METRICS: dict[str, dict[str, Callable]] = {
    "multiclass": {
        "accuracy": _accuracy,
        f"top{TOP}_accuracy": _top_accuracy,
        "balanced_accuracy": _balanced_accuracy,
        "macro_f1": _macro_f1,
        "auroc": _auroc,
        "map": _map,
        "log_loss": _log_loss,
        "ece": _ece,
    },
    "multilabel": {
        "map": _map,
        "auroc": _auroc,
        "macro_f1": _macro_f1,
        "accuracy": _accuracy,
        "log_loss": _log_loss,
        "ece": _ece,
    },
}
OVER_CLASSES = {"balanced_accuracy", "macro_f1", "auroc", "map"}
RANKED = {"auroc", "map"}


def prepare(outputs, targets, task: str = "multiclass", probabilities: bool | None = None) -> Scored:
    """Check outputs (N, K) against targets, (N,) class numbers or (N, K) zeros and ones for multilabel.

    probabilities: False for logits (softmax; sigmoid for multilabel); None looks: rows that sum to 1, for multilabel
    values in [0, 1], are taken as probabilities. Raises ValueError for what cannot be scored.
    """
    if task not in METRICS:
        raise UsageError(f"no metrics for task {task!r}; {nearest(task, METRICS)}")
    outputs, targets = _checked(outputs), np.asarray(targets)
    rows, classes = outputs.shape
    if targets.shape != ((rows, classes) if task == "multilabel" else (rows,)):
        raise ValueError(f"targets have shape {targets.shape} beside outputs {outputs.shape} of a {task} task")
    if task == "multilabel":
        if not np.isin(targets, (0, 1)).all():
            raise ValueError("multilabel targets hold values other than 0 and 1")
        truth = targets.astype(bool)
    else:
        if not np.isin(targets, np.arange(classes)).all():
            wrong = targets[~np.isin(targets, np.arange(classes))][0]
            raise ValueError(f"target {wrong} is none of the classes 0 to {classes - 1}")
        truth = targets[:, None] == np.arange(classes)
    inside = bool((outputs >= 0).all() and (outputs <= 1 + 1e-6).all())
    if probabilities is None:
        probabilities = inside and (task == "multilabel" or bool(np.allclose(outputs.sum(1), 1, atol=1e-3)))
    if probabilities and not inside:
        raise ValueError("outputs outside [0, 1] are no probabilities")
    return Scored(outputs if probabilities else to_probabilities(outputs, task), truth, task)


def to_probabilities(logits, task: str = "multiclass") -> np.ndarray:
    """(N, K) float64: softmax over the classes, for multilabel a sigmoid each. ValueError for what is not finite."""
    logits = _checked(logits)
    return _sigmoid(logits) if task == "multilabel" else _softmax(logits)


def _checked(outputs) -> np.ndarray:
    outputs = np.asarray(outputs, dtype=float)
    if outputs.ndim != 2 or not len(outputs):
        raise ValueError(f"outputs have shape {outputs.shape}, (rows, classes) with a row at least is expected")
    if not np.isfinite(outputs).all():
        raise ValueError(f"outputs of row {int(np.flatnonzero(~np.isfinite(outputs).all(1))[0])} are not finite")
    return outputs


def _softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _sigmoid(logits):
    return np.exp(-np.logaddexp(0, -logits))


def score(outputs, targets, task: str = "multiclass", probabilities: bool | None = None) -> dict[str, float]:
    """Every metric of the task that is defined here; `absent_classes` says how many classes averages left out.

    A metric that the targets do not define (`auroc` of one class) is not in the result.
    """
    scored = prepare(outputs, targets, task, probabilities)
    result = {name: value for name in scored.names if (value := _value(scored, name)) is not None}
    absent = int((~scored.truth.any(0)).sum())
    return {**result, "absent_classes": float(absent)} if absent else result


def _value(scored: Scored, name: str) -> float | None:
    value = float(METRICS[scored.task][name](scored, np.ones((1, len(scored.truth))))[0])
    return None if np.isnan(value) else value


def evaluate(
    outputs,
    targets,
    groups=None,
    task: str = "multiclass",
    seed: int = 0,
    repeats: int = 1000,
    classes: Sequence[str] | None = None,
    probabilities: bool | None = None,
) -> dict[str, dict]:
    """Every metric of the task as {"value", "ci": [low, high]} with a 95 % interval over resampled groups.

    A metric that is not defined has value None; where there is no interval `ci` is None; `note` says why, which classes
    an average leaves out, and when fewer than `repeats` resamples were drawn. groups: (N,), none: each row is its own.
    """
    scored = prepare(outputs, targets, task, probabilities)
    codes = _codes(groups, len(scored.truth))
    drawn = _resample(scored, codes, scored.names, repeats, seed)
    absent = [str(classes[i] if classes else i) for i in np.flatnonzero(~scored.truth.any(0))]
    result = {}
    for name in scored.names:
        value, interval, notes = _value(scored, name), _interval(drawn.get(name)), []
        if value is None:
            interval, notes = None, ["not defined: no class is in some rows and not in others"]
        elif interval is None:
            notes = ["no interval: all rows are one group"]
        else:
            defined = int(np.isfinite(drawn[name]).sum())
            if defined < repeats:
                notes.append(f"interval from {defined} resamples")
        if absent and name in OVER_CLASSES and value is not None:
            shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
            notes.append(f"without {len(absent)} of {scored.truth.shape[1]} classes that no row has: {shown}")
        result[name] = {"value": value, "ci": None if interval is None else list(interval)}
        if notes:
            result[name]["note"] = "; ".join(notes)
    return result


def bootstrap(
    outputs,
    targets,
    groups,
    metric: str | Callable = "accuracy",
    repeats: int = 1000,
    seed: int = 0,
    task: str = "multiclass",
    level: float = 0.95,
    probabilities: bool | None = None,
) -> tuple[float, float] | None:
    """Percentile interval of a metric over resamples of whole groups; None with one group or nothing defined.

    metric: a name of METRICS, or a function of (outputs, targets) that gives a number, called once a resample.
    """
    codes = _codes(groups, len(targets))
    if callable(metric):
        outputs, targets = np.asarray(outputs), np.asarray(targets)
        rows, values = np.arange(len(targets)), []
        for weights in _weights(codes, repeats, seed):
            for counts in weights.astype(int):
                taken = np.repeat(rows, counts)
                values.append(metric(outputs[taken], targets[taken]))
        return _interval(np.array(values, dtype=float) if values else None, level)
    if metric not in METRICS.get(task, {}):
        raise UsageError(f"metric {metric!r} is unknown for {task}; {nearest(metric, METRICS.get(task, {}))}")
    scored = prepare(outputs, targets, task, probabilities)
    return _interval(_resample(scored, codes, [metric], repeats, seed).get(metric), level)


def resample(
    statistic: Callable, rows: int, groups=None, repeats: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(value, draws) of any statistic over resamples of whole groups: shapes (...) and (r, ...).

    statistic: (r, rows) weights, how often each row was drawn, -> (r, ...), nan where it is not defined. Equal seeds
    and groups give equal resamples, so draws of two statistics can be subtracted. With one group there are no draws.
    """
    codes = _codes(groups, rows)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.asarray(statistic(np.ones((1, rows))), dtype=float)[0]
        draws = [np.asarray(statistic(weights), dtype=float) for weights in _weights(codes, repeats, seed)]
    return value, np.concatenate(draws) if draws else np.empty((0, *value.shape))


def band(draws: np.ndarray, level: float = 0.95) -> np.ndarray:
    """(2, ...) ends of the percentile interval of draws (r, ...), from those that are finite; nan where none is."""
    draws = np.where(np.isfinite(draws), draws, np.nan)
    ends = np.full((2, *draws.shape[1:]), np.nan)
    some = np.isfinite(draws).any(0)
    ends[:, some] = np.nanquantile(draws[:, some], [(1 - level) / 2, (1 + level) / 2], axis=0)
    return ends


def _codes(groups, rows: int) -> np.ndarray:
    if groups is None:
        return np.arange(rows)
    if len(groups) != rows:
        raise ValueError(f"{len(groups)} groups beside {rows} rows")
    _, first, inverse = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]  # by first appearance: names do not move the interval


def _weights(codes, repeats: int, seed: int):
    """Chunks of (r, N) float32: how often each row is in a resample that draws as many groups as there are."""
    count, rng = int(codes.max()) + 1, np.random.default_rng(seed)
    chunk = max(1, int(1e6 / len(codes)))  # small enough for the cache
    for start in range(0, repeats if count > 1 else 0, chunk):
        drawn = rng.integers(0, count, (min(chunk, repeats - start), count))
        shifted = drawn + count * np.arange(len(drawn))[:, None]
        counts = np.bincount(shifted.ravel(), minlength=drawn.size).reshape(drawn.shape)
        yield counts[:, codes].astype(np.float32)


def _resample(scored: Scored, codes, names: Sequence[str], repeats: int, seed: int) -> dict[str, np.ndarray]:
    """(repeats,) values of each metric over the same resamples, fewer where the table is too large for all of them."""
    rows, classes = scored.truth.shape
    limits = {name: min(repeats, max(LEAST, int(WORK / (rows * (classes if name in RANKED else 1))))) for name in names}
    values: dict[str, list] = {name: [] for name in names}
    done = 0
    for weights in _weights(codes, max(limits.values()), seed):
        for name in names:
            if done < limits[name]:
                values[name].append(METRICS[scored.task][name](scored, weights[: limits[name] - done]))
        done += len(weights)
    return {name: np.concatenate(parts) for name, parts in values.items() if parts}


def _interval(values, level: float = 0.95) -> tuple[float, float] | None:
    values = values[np.isfinite(values)] if values is not None else ()
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# tables for a report ------------------------------------------------------------------------------------------------


def confusion_matrix(outputs, targets) -> np.ndarray:
    """(K, K) counts of a multiclass task: rows are the true classes, columns the predicted ones."""
    scored = prepare(outputs, targets)
    return (scored.truth.astype(int).T @ scored.predicted.astype(int)).astype(int)


def per_class(outputs, targets, classes: Sequence[str], task: str = "multiclass", probabilities: bool | None = None):
    """One dict a class: label, support, predicted, precision, recall, f1, auroc, average_precision.

    None stands for what the rows do not define, the recall of a class that no row has for instance.
    """
    scored = prepare(outputs, targets, task, probabilities)
    weights = np.ones((1, len(scored.truth)))
    table = []
    for name, truth, predicted, order in zip(classes, scored.truth.T, scored.predicted.T, scored.order, strict=True):
        both, support, chosen = int((truth & predicted).sum()), int(truth.sum()), int(predicted.sum())
        ranked = weights[:, order[0]]
        table.append(
            {
                "label": name,
                "support": support,
                "predicted": chosen,
                "precision": both / chosen if chosen else None,
                "recall": both / support if support else None,
                "f1": 2 * both / (support + chosen) if support else None,
                "auroc": float(_class_auroc(ranked, order[1:])[0]) if 0 < support < len(truth) else None,
                "average_precision": float(_class_precision(ranked, order[1:])[0]) if support else None,
            }
        )
    return table


def reliability(outputs, targets, task: str = "multiclass", probabilities: bool | None = None) -> list[dict]:
    """The bins behind `ece` that are not empty: low, high, count, mean confidence and share of truth."""
    count, confidence, truth = prepare(outputs, targets, task, probabilities).binned.sum(1)
    return [
        {
            "low": i / BINS,
            "high": (i + 1) / BINS,
            "count": int(count[i]),
            "confidence": float(confidence[i] / count[i]),
            "accuracy": float(truth[i] / count[i]),
        }
        for i in range(BINS)
        if count[i]
    ]
