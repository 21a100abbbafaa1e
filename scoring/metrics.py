"""Accuracy, mean average precision, area under the ROC curve and d-prime, in numpy."""
import math

import numpy as np
import torch

from engine.errors import DataError


class NotFiniteError(DataError):
    """A model's output holds NaN or infinity, of which no score and no file is made."""


def ranking_scores(is_positive, scores):
    """How well the scores (N,) of one class rank its positives (N,) bool: average precision and area under the ROC
    curve, equal scores taken together (scikit-learn's average_precision_score and roc_auc_score). NaN where undefined.
    """
    order = np.argsort(-scores)
    ranked = scores[order]
    seen = np.append(np.flatnonzero(ranked[1:] != ranked[:-1]) + 1, len(scores))     # clips down to each distinct score
    hits = np.cumsum(is_positive[order])[seen - 1]                          # positives among them
    gained, misses = np.diff(hits, prepend=0), seen - hits
    positives, negatives = int(hits[-1]), int(misses[-1])
    precision = (gained * hits / seen).sum() / positives if positives else math.nan
    passed = (np.diff(misses, prepend=0) * (hits - gained / 2)).sum()       # pairs in the right order, ties count half
    return float(precision), float(passed / (positives * negatives)) if positives and negatives else math.nan


def metrics(logits, targets, multi_label):
    """{'accuracy'} or {'mAP', 'mAUC', 'd_prime'} with counts, and a row per class for the CSV: its clips, then its
    accuracy, or average precision and area under the ROC curve. targets (N, classes), logits alike.

    Means are over the classes that have a positive (and a negative); d-prime is sqrt(2) times the normal quantile of
    mAUC, as usual for AudioSet. Raises NotFiniteError.
    """
    if not np.isfinite(logits).all():
        raise NotFiniteError('the outputs to score are not finite')
    if multi_label:
        columns = zip(np.ascontiguousarray(targets.T) > 0, np.ascontiguousarray(logits.T))
        rows = [(int(positive.sum()), *ranking_scores(positive, scores)) for positive, scores in columns]
        precision, area = np.array(rows)[:, 1:].T
        found, areas = precision[~np.isnan(precision)], area[~np.isnan(area)]
        mean_area = areas.mean() if len(areas) else math.nan
        inside = torch.tensor(mean_area, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)     # a perfect score stays finite
        return {'mAP': float(found.mean()) if len(found) else math.nan, 'mAUC': float(mean_area),
                'd_prime': math.sqrt(2) * torch.special.ndtri(inside).item(),
                'classes': len(found), 'clips': len(logits)}, rows
    labels, guesses = targets.argmax(axis=1), logits.argmax(axis=1)
    rows = [(int((labels == c).sum()), float((guesses[labels == c] == c).mean()) if (labels == c).any() else math.nan)
            for c in range(targets.shape[1])]
    right = int((guesses == labels).sum())
    return {'accuracy': right / len(labels), 'right': right, 'clips': len(labels)}, rows


def probabilities(logits, multi_label):
    """Logits (N, classes) -> probabilities of every class alone, or of one among them."""
    logits = torch.from_numpy(logits)
    return (logits.sigmoid() if multi_label else logits.softmax(dim=1)).numpy()


def mean_of_windows(values, clip):
    """(windows, classes) -> (clips, classes); clip (windows,) in rising order."""
    first = np.flatnonzero(np.diff(clip, prepend=-1))
    return np.add.reduceat(values, first, axis=0) / np.diff(first, append=len(clip))[:, None]


def describe(scores):
    """'accuracy 81.2 % (65 of 80)' or 'mAP 0.4150, mAUC 0.972, d-prime 2.71 (527 classes, 20,550 clips)'"""
    if 'mAP' in scores:
        return (f'mAP {scores["mAP"]:.4f}, mAUC {scores["mAUC"]:.4f}, d-prime {scores["d_prime"]:.3f} '
                f'({scores["classes"]} classes, {scores["clips"]:,} clips)')
    return f'accuracy {scores["accuracy"]:.1%} ({scores["right"]:,} of {scores["clips"]:,})'
