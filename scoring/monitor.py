"""How pre-training goes, in numbers that a falling loss does not have: kNN accuracy and rank of the frozen features."""
import numpy as np
import torch

from audio.clips import carve_validation, open_clips
from engine.randomness import random
from scoring.features import feature_batches
from scoring.probes import effective_rank, knn_accuracy, linear_probe

CLIPS = 2000                    # of the labelled set, at most
PROBE_L2 = (0.1,)               # one strength: nothing is left to choose it on, and it takes little time


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
    """Scores of the encoder's frozen features from train to valid clips: kNN and linear probe of the bands, kNN of the
    CLS, and the effective rank of the CLS. spectrum: what data.log_mel is told, but for the statistics, which are the
    set's own."""
    train, valid = labelled
    mean, std = train.statistics(spectrum['window'])
    how = {**spectrum, 'mean': mean, 'std': std}, process, autocast
    found = [dict(zip(('bands', 'cls'), zip(*(
        (rows['bands'], rows['cls']) for _, rows in feature_batches(encoder, part, *how, ['bands', 'cls'],
                                                                    workers=workers))))) for part in labelled]
    x, t = ({pool: np.concatenate(parts) for pool, parts in part.items()} for part in found)
    targets = train.targets(np.arange(len(train)))
    logits, _ = linear_probe((x['bands'], targets), (t['bands'], valid.targets(np.arange(len(valid)))), t['bands'],
                             False, strengths=PROBE_L2)
    return {'knn_bands': knn_accuracy(x['bands'], train.label, t['bands'], valid.label),
            'knn_cls': knn_accuracy(x['cls'], train.label, t['cls'], valid.label),
            'probe_bands': float((logits.argmax(axis=1) == valid.label).mean()),
            'chance': float((valid.label == torch.from_numpy(valid.label).mode().values.item()).mean()),
            'effective_rank': effective_rank(t['cls'])}
