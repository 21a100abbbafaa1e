"""How pre-training goes, in numbers that a falling loss does not have: what can be read off the frozen features."""
import numpy as np
import torch

from audio import frames_in
from audio.clips import carve_validation, open_clips, open_test
from engine.randomness import random
from model import MAX_FRAMES
from scoring.features import feature_batches, log_mel_statistics
from scoring.probes import effective_rank, in_float64, knn_accuracy, linear_probe

CLIPS = 2000                    # of the labelled set, at most
PROBE_L2 = (0.1,)               # one strength, that it takes little time


def labelled_clips(name, data_dir, seed, process):
    """(train, valid) clips of the training split of a labelled set, or, of SET/FOLD, without and of that fold (a
    speaker, 1 to 5, ...); None, and a line that says why, if it is not for a kNN accuracy, or without a name. Raises
    DataError for a set that is not there."""
    if not name:
        return None
    name, _, fold = name.partition('/')
    test = open_test(name, data_dir, fold) if fold else None                # its error speaks of the fold
    clips = open_clips([name], data_dir, ['train'], [f'{name}/{fold}'] if fold else [])
    if clips.multi_label or not clips.classes:
        process.print(f'no kNN accuracy: {name} has {"several labels a clip" if clips.multi_label else "no labels"}')
        return None

    def some(clips):
        return clips.select(random(seed, 'few_labels').permutation(len(clips))[:CLIPS])
    clips = clips.select(clips.label >= 0)
    train, valid = (some(clips), some(test)) if fold else carve_validation(some(clips), 0.3)
    if not len(train) or not len(valid):
        process.print(f'no kNN accuracy: {name} has too few clips')
        return None
    return train, valid


def watch(run, labelled, spectrum, autocast):
    """Print and log what is read off the features of a run's student; at its beginning, with random weights, also off
    log-mel statistics: what training has to beat."""
    settings, encoder, (train, valid) = run.settings, run.model.encoder, labelled
    mean, std = train.statistics(spectrum['window'])
    how = {**spectrum, 'mean': mean, 'std': std}
    name = settings.eval_dataset
    if not run.done:
        frames = min(int(frames_in(np.r_[train.length, valid.length]).max()), MAX_FRAMES)
        longest = {**how, 'frames': frames, 'repeat': False}
        scores = read_off(*(log_mel_statistics(part, longest, run.process, workers=settings.workers)
                            for part in labelled), *labelled)
        run.process.print(f'{name}, log-mel statistics: kNN {scores["knn"]:.1%}, linear probe {scores["probe"]:.1%}')
        run.note({}, **{f'{name}_log_mel_{probe}': score for probe, score in scores.items()})
    scores = monitor(encoder, labelled, how, run.process, autocast, settings.workers)
    run.process.print(f'{name}, step {run.done:,}: kNN {scores["knn"]:.1%}, linear probe {scores["probe"]:.1%} (chance '
                      f'{scores["chance"]:.1%}); CLS: kNN {scores["knn_cls"]:.1%}, effective rank '
                      f'{scores["effective_rank"]:.1f} of {encoder.config.n_embd}')
    run.note(scores, **scores)


def monitor(encoder, labelled, spectrum, process, autocast, workers):
    """Scores of the encoder's frozen features from train to valid clips: kNN and linear probe of the bands, kNN and
    effective rank of the CLS. spectrum: what data.log_mel is told."""
    found = []
    for part in labelled:
        batches = feature_batches(encoder, part, spectrum, process, autocast, ['bands', 'cls'], workers=workers)
        found.append([np.concatenate(parts) for parts in zip(*((rows['bands'], rows['cls']) for _, rows in batches))])
    (x, x_cls), (t, t_cls) = found
    train, valid = labelled
    return {**read_off(x, t, train, valid, in_float64(process.device)),
            'knn_cls': knn_accuracy(x_cls, train.label, t_cls, valid.label),
            'chance': float((valid.label == torch.from_numpy(valid.label).mode().values.item()).mean()),
            'effective_rank': effective_rank(t_cls)}


def read_off(x, t, train, valid, device='cpu'):
    """kNN and linear probe from features x of train to t of valid clips."""
    targets = train.targets(np.arange(len(train)))
    logits, _ = linear_probe((x, targets), t, False, strengths=PROBE_L2, device=device)
    return {'knn': knn_accuracy(x, train.label, t, valid.label, device=device),
            'probe': float((logits.argmax(axis=1) == valid.label).mean())}
