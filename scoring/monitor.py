"""How pre-training goes, in numbers that a falling loss does not have: kNN accuracy and rank of the frozen features."""
import torch

from audio.clips import carve_validation, open_clips
from engine.randomness import random
from scoring.probes import effective_rank, features, knn_accuracy

CLIPS = 2000                    # of the labelled set, at most


def labelled_clips(name, data_dir, seed, process):
    """(train, valid) clips of the training split of a labelled set; None, and a line that says why, if it is not for a
    kNN accuracy, or without a name. Raises DataError for a set that is not there."""
    if not name:
        return None
    clips = open_clips([name], data_dir)
    if clips.multi_label or not clips.classes:
        process.print(f'no kNN accuracy: {name} has {"several labels a clip" if clips.multi_label else "no labels"}')
        return None
    clips = clips.select(clips.label >= 0)
    train, valid = carve_validation(clips.select(random(seed, 'few_labels').permutation(len(clips))[:CLIPS]), 0.3)
    if not len(train) or not len(valid):
        process.print(f'no kNN accuracy: {name} has too few clips')
        return None
    return train, valid


def monitor(encoder, labelled, spectrum, process, autocast, workers):
    """Scores of the encoder's frozen features, kNN from train to valid clips. spectrum: what data.log_mel is told,
    but for the statistics, which are the set's own."""
    train, valid = labelled
    mean, std = train.statistics(spectrum['window'])
    (train_cls, train_patches), (valid_cls, valid_patches) = (
        features(encoder, part, {**spectrum, 'mean': mean, 'std': std}, process, autocast, workers=workers)
        for part in labelled)
    return {'knn_cls': knn_accuracy(train_cls, train.label, valid_cls, valid.label),
            'knn_patches': knn_accuracy(train_patches, train.label, valid_patches, valid.label),
            'chance': float((valid.label == torch.from_numpy(valid.label).mode().values.item()).mean()),
            'effective_rank': effective_rank(valid_cls)}
