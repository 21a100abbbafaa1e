"""Stage 3: what a checkpoint knows. Reads ours, and the authors', EAT's and SSLAM's.

    python eval.py --ckpt=out/ft/best.pt                        # fine-tuned: metrics on its test split, per-class CSV
    python eval.py --ckpt=out/demo/ckpt.pt --dataset=demo       # pre-trained: kNN and linear probe, beside log-mel's
    python eval.py --ckpt=out/ft/best.pt --wav=a.wav,b.flac     # fine-tuned: the top classes of files
    python eval.py --ckpt=out/ft/best.pt --wav=long.mp3 --hop=0.5 --csv_file=when.csv           # and when they sound
    python eval.py --ckpt=out/demo/ckpt.pt --dataset=demo --embed=out.npz      # embeddings of a set, or of --wav files

Settings are the names below. Probes use the log-mel statistics of the training split of the set at hand; a fine-tuned
checkpoint, and embeddings, those that the checkpoint holds.
"""
import csv
import dataclasses
import math
import os

import numpy as np
import torch

import configurator
from audio import HOP_SAMPLES, SAMPLE_RATE, WINDOW_SAMPLES, frames_in, samples_for
from audio.clips import Clips, open_clips, open_test, read_meta, task_splits
from audio.decoding import decode_file
from checkpoints.opening import open_checkpoint
from engine import processes
from engine.errors import ConfigError
from engine.files import replacing
from model import MAX_FRAMES
from recipes.audioset import read_label_csv
from scoring.metrics import describe, metrics
from scoring.probes import (
    features,
    knn_scores,
    linear_probe,
    log_mel_statistics,
    over_clips,
    patches_with_sound,
    predict,
)

ckpt = ''                   # the checkpoint
dataset = ''                # a prepared set; default for a fine-tuned checkpoint: the one it was tuned on
data_dir = 'data'           # where prepared sets are
fold = ''                   # test on this fold of the set; '': on its test split (fine-tuned: as it was tuned)
labels_per_class = 0        # probe: train on so many labels of each class; 0: all
validation_part = 0.1       # share of the training split on which the probe's strength is chosen
seed = 1                    # which labels, if there are few
wav = ''                    # audio files to classify or embed, separated by commas
top_k = 5                   # classes to print for each file
labels = ''                 # AudioSet's class_labels_indices.csv: names for the classes of a checkpoint without any
embed = ''                  # write embeddings to this .npz file
csv_file = ''               # of a set: the per-class table, default classes.csv beside the checkpoint; of files: the
                            # probabilities of every window
frames = 0                  # input length; 0: the checkpoint's
window = 0.0                # seconds of a window of longer clips, whose results are averaged; 0: the input length
hop = 0.0                   # seconds from a window to the next; 0: one window (sets without --window: the first only)
norm_mean = None            # log-mel mean instead of the checkpoint's
norm_std = None             # log-mel standard deviation instead of the checkpoint's
batch_size = 64             # clips at a time
device = 'auto'             # cuda, mps or cpu; auto: the best there is
dtype = 'auto'              # float32 or bfloat16; auto: bfloat16 on a GPU that has it
workers = 0                 # processes that read clips ahead; 0: none
threads = 0                 # CPU threads; 0: PyTorch's choice

MAX_EMBEDDING_BYTES = 8 << 30


# ---------------------------------------------------------------------------------------------------------- checkpoints


# ---------------------------------------------------------------------------------------------- running over many clips


# -------------------------------------------------------------------------------------------------------------- metrics


# ---------------------------------------------------------------------------------------------------------------- modes

def evaluate_classifier(loaded, settings, process, autocast):
    """A fine-tuned checkpoint on its test split; with --window or --hop, the mean over the windows of each clip."""
    tuned = loaded.settings
    own = tuned.get('test_dataset') or tuned.get('dataset', '')
    name = settings.dataset or own
    if not name or not isinstance(name, str):
        raise ConfigError('this checkpoint does not say what it was tuned on: name a prepared set, '
                                       '--dataset=NAME')
    test = open_test(name, settings.data_dir, settings.fold or (str(tuned.get('fold', '')) if name == own else ''))
    if len(test.classes) != len(loaded.classes) or loaded.settings and test.classes != loaded.classes:
        raise ConfigError(f'{settings.ckpt} knows {len(loaded.classes)} classes ({loaded.classes[0]}, '
                                       f'...), {name} has {len(test.classes)} ({test.classes[0]}, ...)')
    cut = settings.window or settings.hop
    clips = in_windows(test, settings, loaded.spectrum) if cut else test
    scores = predict(loaded.classifier, clips, loaded.spectrum, process, autocast, batch_size=settings.batch_size,
                     workers=settings.workers, title='evaluating')
    path = settings.csv_file or os.path.join(os.path.dirname(settings.ckpt), 'classes.csv')
    if cut:
        scores = probabilities(scores, loaded.multi_label)
        timeline = os.path.join(os.path.dirname(path), 'windows.csv')
        write_windows(timeline, test.keys(), clips, scores, test.classes, process)
        process.print(f'{len(clips):,} windows of {len(test):,} clips: {timeline}')
        scores = mean_of_windows(scores, clips.clip)
    scores, rows = metrics(scores, test.targets(np.arange(len(test))), test.multi_label)
    if process.is_main:
        with replacing(path) as f:
            writer = csv.writer(f, lineterminator='\n')
            writer.writerow(['class', 'clips', *(['average_precision', 'auc'] if test.multi_label else ['accuracy'])])
            writer.writerows([label, count, *('' if math.isnan(value) else f'{value:.6f}' for value in values)]
                             for label, (count, *values) in zip(test.classes, rows))
    longer = (test.length > samples_for(loaded.spectrum['frames']) + 16 * HOP_SAMPLES).sum()
    if longer and not cut:
        process.print(f'{longer:,} clips are longer than the input, of which the first '
                      f'{loaded.spectrum["frames"] / 100:g} s were used; --hop=SECONDS takes the mean over windows')
    process.print(f'{settings.ckpt} on {name}: {describe(scores)}; per class: {path}')
    return scores


def in_windows(clips, settings, spectrum):
    """The clips cut as --window and --hop say; by default into windows of the input length, side by side."""
    samples = round(settings.window * SAMPLE_RATE) or samples_for(spectrum['frames'])
    return clips.windows(samples, round(settings.hop * SAMPLE_RATE) or samples)


def probabilities(logits, multi_label):
    logits = torch.from_numpy(logits)
    return (logits.sigmoid() if multi_label else logits.softmax(dim=1)).numpy()


def mean_of_windows(values, clip):
    """(windows, classes) -> (clips, classes); clip (windows,) in rising order."""
    first = np.flatnonzero(np.diff(clip, prepend=-1))
    return np.add.reduceat(values, first, axis=0) / np.diff(first, append=len(clip))[:, None]


def write_windows(path, names, windows, scores, classes, process):
    """A csv with a row per window: its clip, start and end in seconds, the probability of every class."""
    if not process.is_main:
        return
    with replacing(path) as f:
        writer = csv.writer(f, lineterminator='\n')
        writer.writerow(['clip', 'start', 'end', *classes])
        for clip, start, length, row in zip(windows.clip, windows.start, windows.length, scores):
            writer.writerow([names[clip], f'{start / SAMPLE_RATE:.3f}',
                             f'{(start + length) / SAMPLE_RATE:.3f}', *(f'{value:.4f}' for value in row)])


def probe_pretrained(loaded, settings, process, autocast):
    """kNN and linear probe of the frozen encoder, and of log-mel statistics, on the same split.
    -> {features: {probe: scores}}"""
    if not settings.dataset:
        raise ConfigError('a pre-trained checkpoint is probed on a labelled set: '
                                       '--dataset=NAME (or use --embed)')
    *parts, whole = task_splits(settings.dataset, settings.data_dir, settings.fold, settings.labels_per_class,
                                     settings.seed, settings.validation_part)
    train, valid, test = parts
    mean, std = whole.statistics(loaded.spectrum['window'])
    spectrum = {**loaded.spectrum, 'mean': mean, 'std': std}
    how = {'batch_size': settings.batch_size, 'workers': settings.workers}
    encoded = [features(loaded.encoder, part, spectrum, process, autocast, title='encoding', **how) for part in parts]
    longest = int(max(frames_in(part.length).max() for part in parts))
    whole = {**spectrum, 'frames': min(longest, MAX_FRAMES), 'repeat': False}       # the baseline may see whole clips
    kinds = {'log-mel statistics': [log_mel_statistics(part, whole, process, **how) for part in parts],
             'CLS': [part[0] for part in encoded], 'mean of patches': [part[1] for part in encoded]}
    targets = [part.targets(np.arange(len(part))) for part in parts]
    process.print(f'{settings.dataset}: {len(train):,} training, {len(valid):,} validation, {len(test):,} test clips; '
                  f'{len(test.classes)} classes; {spectrum["frames"]} frames')
    results = {}
    for kind, (x, v, t) in kinds.items():
        results[kind] = {}
        if not test.multi_label:
            votes = knn_scores(x, train.label, t, len(train.classes))
            results[kind]['kNN'] = metrics(votes, targets[2], False)[0]
        logits, strength = linear_probe((x, targets[0]), (v, targets[1]), t, test.multi_label)
        results[kind]['linear probe'] = {**metrics(logits, targets[2], test.multi_label)[0], 'l2': strength}
        process.print(f'{kind:20}'
                      + ''.join(f'{probe}: {describe(scores)}   ' for probe, scores in results[kind].items()))
    return results


def open_files(paths):
    """Audio files, decoded, as clips in memory. Raises DataError, which names the file."""
    waves = [np.clip(np.rint(decode_file(path) * 32768), -32768, 32767).astype(np.int16) for path in paths]
    lengths = np.array([len(wave) for wave in waves])
    clips = Clips([], {'offset': np.cumsum(lengths) - lengths, 'length': lengths,
                            'shard': np.zeros(len(waves), int)}, [])
    clips.opened = {0: np.concatenate(waves)}
    return clips


def classify_files(loaded, settings, process, autocast):
    """Print the top classes of audio files with probabilities, means over windows if the file is longer than one."""
    if loaded.classifier is None:
        raise ConfigError(f'{settings.ckpt} is a pre-trained checkpoint and knows no classes: '
                                       'fine-tune it first, or use --embed')
    paths = configurator.words(settings.wav)
    windows = in_windows(open_files(paths), settings, loaded.spectrum)
    scores = probabilities(predict(loaded.classifier, windows, loaded.spectrum, process, autocast,
                                   batch_size=settings.batch_size), loaded.multi_label)
    for path, row in zip(paths, mean_of_windows(scores, windows.clip)):
        top = np.argsort(-row, kind='stable')[:settings.top_k]
        process.print(path + ':  ' + ', '.join(f'{loaded.classes[i]} {row[i]:.3f}' for i in top))
    if settings.csv_file:
        write_windows(settings.csv_file, paths, windows, scores, loaded.classes, process)
        process.print(f'{len(windows)} windows: {settings.csv_file}')


def write_embeddings(loaded, settings, process, autocast):
    """An .npz with a row per clip, or per window with --window or --hop: names (N,), start (N,) seconds, cls (N, D),
    mean (N, D) and patches (N, P, D) float16, P time-major; sound (N,) real frames."""
    def everything(spec, lengths):
        x = loaded.encoder(spec).float()
        real = patches_with_sound(lengths, x.shape[1] - 1, loaded.config)[:, :, None]
        return x[:, 0], (x[:, 1:] * real).sum(dim=1) / real.sum(dim=1), x[:, 1:], frames_in(lengths)
    if settings.wav:
        names = configurator.words(settings.wav)
        clips = open_files(names)
    else:
        meta = read_meta(os.path.join(settings.data_dir, settings.dataset))
        clips = open_clips([settings.dataset], settings.data_dir, sorted(meta.get('splits', {'train': None})))
        names = clips.keys()
    starts = np.zeros(len(clips))
    if settings.window or settings.hop:
        clips = in_windows(clips, settings, loaded.spectrum)
        names, starts = [names[i] for i in clips.clip], clips.start / SAMPLE_RATE
    rows, columns = (loaded.spectrum['frames'] // loaded.config.patch_size,
                     loaded.config.n_mels // loaded.config.patch_size)
    if len(names) * rows * columns * loaded.config.n_embd * 4 > MAX_EMBEDDING_BYTES:
        raise ConfigError(f'patch embeddings of {len(names):,} clips take more than '
                                       f'{MAX_EMBEDDING_BYTES >> 30} GiB of memory: embed smaller sets')
    cls, mean, patches, sound = over_clips(everything, clips, loaded.spectrum, process, autocast, settings.batch_size,
                                           0 if settings.wav else settings.workers, 'encoding')
    if process.is_main:
        with replacing(settings.embed, 'wb') as f:
            np.savez(f, names=np.array(names), start=starts, cls=cls, mean=mean, patches=patches.astype(np.float16),
                     sound=sound.astype(np.int64))
    process.print(f'{settings.embed}: names {len(names)}, cls and mean {cls.shape}, patches {patches.shape}')


def run(argv):
    settings = configurator.configure(__file__, argv)
    configurator.check_ranges(
        settings, labels_per_class=(0, 1e9), validation_part=(1e-6, 1), seed=(0, 2 ** 62), top_k=(1, 1e6),
        frames=(0, 1e6), norm_mean=(-100, 100), norm_std=(1e-3, 100), batch_size=(1, 1e6), workers=(0, 1000),
        threads=(0, 1000), window=(0, MAX_FRAMES / 100), hop=(0, 1e6))
    if settings.window and settings.frames:
        raise ConfigError('--window and --frames both set the input length: give one')
    if settings.window and settings.window < WINDOW_SAMPLES / SAMPLE_RATE or 0 < settings.hop < 0.01:
        raise ConfigError(f'window = {settings.window} s must be at least 0.025, hop = {settings.hop} s '
                                       'at least 0.01')
    if settings.wav and not configurator.words(settings.wav):
        raise ConfigError(f'wav = {settings.wav!r} names no file')
    process = processes.start(settings.device, settings.threads)
    autocast, _ = processes.autocast(process, settings.dtype)
    loaded = open_checkpoint(settings.ckpt)
    if settings.labels and loaded.classes:
        names = [name for _, name in read_label_csv(settings.labels)]
        if len(names) != len(loaded.classes):
            raise ConfigError(f'{settings.labels} names {len(names)} classes, {settings.ckpt} has '
                                           f'{len(loaded.classes)}')
        loaded.classes = names
    loaded.encoder.to(process.device).eval()
    if loaded.classifier is not None:
        loaded.classifier.to(process.device)
    frames = settings.frames
    if settings.window:                                                     # up to the next whole patch, padded
        real = frames_in(round(settings.window * SAMPLE_RATE))
        frames = -(-real // loaded.config.patch_size) * loaded.config.patch_size
    if frames:
        try:
            loaded.spectrum['frames'] = dataclasses.replace(loaded.config, frames=frames).frames
        except ValueError as error:
            raise ConfigError(str(error)) from None
    for name in ('mean', 'std'):
        if getattr(settings, f'norm_{name}') is not None:
            loaded.spectrum[name] = float(getattr(settings, f'norm_{name}'))
    if settings.embed:
        if not settings.wav and not settings.dataset:
            raise ConfigError('--embed needs --dataset=NAME or --wav=FILE,...')
        write_embeddings(loaded, settings, process, autocast)
    elif settings.wav:
        classify_files(loaded, settings, process, autocast)
    elif loaded.classifier is not None:
        evaluate_classifier(loaded, settings, process, autocast)
    else:
        probe_pretrained(loaded, settings, process, autocast)


if __name__ == '__main__':
    processes.main(run)
