"""Stage 3: what a checkpoint knows. Reads ours, and the authors', EAT's and SSLAM's.

    python eval.py --ckpt=out/ft/best.pt                        # fine-tuned: metrics on its test split, per-class CSV
    python eval.py --ckpt=out/demo/ckpt.pt --dataset=demo       # pre-trained: kNN and linear probe, beside log-mel's
    python eval.py --ckpt=out/ft/best.pt --wav=a.wav,b.flac     # fine-tuned: the top classes of files
    python eval.py --ckpt=out/ft/best.pt --wav=long.mp3 --hop=0.5 --csv_file=when.csv           # and when they sound
    python eval.py --ckpt=out/demo/ckpt.pt --dataset=demo --embed=out.npz      # embeddings of a set, or of --wav files
    python eval.py --features_file=theirs.npz --dataset=demo    # the same probes of what any other program has computed

Settings are the names below. Probes use the log-mel statistics of the training split of the set at hand; a fine-tuned
checkpoint, and embeddings, those that the checkpoint holds.
"""
import dataclasses
import functools
import os

import numpy as np
import torch

import configurator
from audio import HOP_SAMPLES, SAMPLE_RATE, WINDOW_SAMPLES, frames_in, samples_for
from audio.clips import open_clips, open_test, read_meta, task_splits
from audio.files import complain, named_files, open_files
from checkpoints.opening import open_checkpoint
from engine import processes, ranges
from engine.errors import CheckpointError, ConfigError
from engine.files import printable
from engine.ranges import check_model
from model import MAX_FRAMES, Encoder
from recipes.audioset import read_label_csv
from scoring.features import POOLS, feature_batches, features, log_mel_statistics, predict, width
from scoring.metrics import NotFiniteError, describe, mean_of_windows, metrics, probabilities
from scoring.outputs import check_output, labels_of, table_path, write_arrays, write_classes, write_windows
from scoring.probing import score_features, stored_features

ckpt = ''                   # the checkpoint
features_file = ''          # probe the arrays (N, F) of this .npz, instead of a checkpoint: rows by names (N,), those
                            # that --embed gives the clips of the set
dataset = ''                # a prepared set; default for a fine-tuned checkpoint: the one it was tuned on
data_dir = 'data'           # where prepared sets are
fold = ''                   # test on this fold of the set; '': on its test split (fine-tuned: as it was tuned)
labels_per_class = 0        # probe: train on so many labels of each class (of nine tenths); 0: all there are
seed = 1                    # which labels, if there are few
wav = ''                    # audio files to classify or embed, or folders of them, separated by commas; a comma in a
                            # name is one if the file with it exists
max_minutes = 60.0          # longer files are refused
top_k = 5                   # classes to print for each file
labels = ''                 # AudioSet's class_labels_indices.csv: names for the classes of a checkpoint without any
embed = ''                  # write embeddings to this .npz file
pool = 'bands'              # features: bands (mean and deviation over time of each band of patches), cepstra (bands and
                            # the deviation of their DCT), mean (of patches), cls; or several, separated by commas
layer = 0                   # of this block (1, 2, ...); 0: the mean of all blocks' outputs
patches = False             # --embed: every patch too; then a row is a window
csv_file = ''               # of a set: the table of its classes (default: classes-SET-CKPT.csv beside the checkpoint;
                            # theirs of windows: ...-windows.csv); of files: the probabilities of every window
frames = 0                  # input length; 0: the checkpoint's
window = 0.0                # seconds of a window of longer clips, whose results are averaged; 0: the input length
hop = 0.0                   # seconds from a window to the next; 0: one window (sets without --window: the first only)
norm_mean = None            # log-mel mean instead of the checkpoint's, or the set's
norm_std = None             # log-mel standard deviation, alike
batch_size = 64             # clips at a time
device = 'auto'             # cuda, mps or cpu; auto: the best there is
dtype = 'auto'              # float32 or bfloat16; auto: bfloat16 on a GPU that has it
workers = 0                 # processes that read clips ahead; 0: none
threads = 0                 # CPU threads; 0: PyTorch's choice

MAX_FEATURE_BYTES = 16 << 30


# ---------------------------------------------------------------------------------------------------------------- modes

def evaluate_classifier(loaded, settings, process, autocast):
    """A fine-tuned checkpoint on its test split; with --window or --hop, the mean over the windows of each clip."""
    tuned = loaded.settings
    own = tuned.get('test_dataset') or tuned.get('dataset', '')
    name = settings.dataset or own
    if not name or not isinstance(name, str):
        raise ConfigError('this checkpoint does not say what it was tuned on: name a prepared set, --dataset=NAME')
    fold = settings.fold or (str(tuned.get('fold', '')) if name == own else '')
    test = open_test(name, settings.data_dir, fold)
    if len(test.classes) != len(loaded.classes) or tuned and test.classes != loaded.classes:
        raise ConfigError(f'{settings.ckpt} knows {len(loaded.classes)} classes ({loaded.classes[0]}, ...), {name} has '
                          f'{len(test.classes)} ({test.classes[0]}, ...)')
    path = settings.csv_file or table_path(settings.ckpt, name, fold)
    timeline, cut = os.path.splitext(path)[0] + '-windows.csv', settings.window or settings.hop
    for written in (path, timeline) if cut else (path,):
        check_output(written, '.csv', settings.ckpt, settings.labels, os.path.join(settings.data_dir, name))
    clips = in_windows(test, settings, loaded.spectrum) if cut else test
    outputs = predict(loaded.classifier, clips, loaded.spectrum, process, autocast, batch_size=settings.batch_size,
                      workers=settings.workers, title='evaluating')
    if cut:
        outputs = of_windows = probabilities(outputs, loaded.multi_label)
        outputs = mean_of_windows(of_windows, clips.clip)
    scores, rows = metrics(outputs, test.targets(np.arange(len(test))), test.multi_label)
    frames = loaded.spectrum['frames']
    if not cut and (longer := (test.length > samples_for(frames) + 16 * HOP_SAMPLES).sum()):
        process.print(f'{longer:,} clips are longer than the input, of which the first {frames / 100:g} s were used; '
                      '--hop=SECONDS takes the mean over windows')
    process.print(f'{settings.ckpt} on {name}: {describe(scores)}')
    if process.is_main:
        write_classes(path, test.classes, rows, test.multi_label)
        if cut:
            write_windows(timeline, clips, of_windows, test.classes)
    process.print(f'per class: {path}' + (f'; of {len(clips):,} windows: {timeline}' if cut else ''))
    return scores


def in_windows(clips, settings, spectrum):
    """The clips cut as --window and --hop say; by default into windows of the input length, side by side."""
    samples = round(settings.window * SAMPLE_RATE) or samples_for(spectrum['frames'])
    return clips.windows(samples, round(settings.hop * SAMPLE_RATE) or samples)


def probed_parts(settings):
    """The training and test clips of the set at hand, and its whole training split."""
    if not settings.dataset:
        raise ConfigError('features are probed on a labelled set: --dataset=NAME (or use --embed)')
    kept = 0.1 if settings.labels_per_class else 0      # a few labels: those that finetune.py draws by default
    train, _, test, whole = task_splits(settings.dataset, settings.data_dir, settings.fold, settings.labels_per_class,
                                        settings.seed, validation_part=kept)
    return train, test, whole


def probe_pretrained(loaded, settings, process, autocast):
    """kNN and linear probe of the frozen encoder on a labelled set, beside what every encoder must beat on the same
    split: log-mel statistics, and the same encoder with random weights. -> {features: {probe: scores}}"""
    *parts, whole = probed_parts(settings)
    mean, std = whole.statistics(loaded.spectrum['window'])
    spectrum = with_given_statistics({**loaded.spectrum, 'mean': mean, 'std': std}, settings)
    longest = min(int(max(frames_in(part.length).max() for part in parts)), MAX_FRAMES)
    torch.manual_seed(settings.seed)
    untrained = Encoder(loaded.config).to(process.device).eval()
    how = {'batch_size': settings.batch_size, 'workers': settings.workers}

    def of_encoder(encoder, pool):
        return [features(encoder, part, spectrum, process, autocast, pool, settings.layer, title='encoding', **how)
                for part in parts]

    def of_log_mel(with_cepstra):
        return [log_mel_statistics(part, {**spectrum, 'frames': longest, 'repeat': False}, process, with_cepstra,
                                   title='log-mel', **how) for part in parts]
    kinds = {'log-mel statistics': functools.partial(of_log_mel, False)}
    for pool in configurator.words(settings.pool):
        check_size(sum(map(len, parts)), width(loaded.config, pool), pool)
        if pool == 'cepstra':
            kinds['log-mel statistics, cepstra'] = functools.partial(of_log_mel, True)
        kinds[f'random weights, {pool}'] = functools.partial(of_encoder, untrained, pool)
        kinds[pool] = functools.partial(of_encoder, loaded.encoder, pool)
    return score_features(kinds, *parts, f'whole clips in windows of {spectrum["frames"]} frames', process)


def probe_file(settings, process):
    """The same of features that any program has computed. -> {array: {probe: scores}}"""
    *parts, _ = probed_parts(settings)
    stored = stored_features(settings.features_file, [part.keys() for part in parts])
    kinds = {name: lambda found=found: found for name, found in stored.items()}
    return score_features(kinds, *parts, settings.features_file, process)


def check_size(clips, numbers, pool):
    """Refuse features that no machine's memory is made for: kNN and the probe take up to three times as much beside."""
    if clips * numbers * 4 > MAX_FEATURE_BYTES:
        raise ConfigError(f'pool = {pool}: {numbers:,} features of {clips:,} clips take {clips * numbers >> 28} GiB, '
                          f'more than {MAX_FEATURE_BYTES >> 30}: use --pool=mean')


def classify_files(loaded, settings, process, autocast):
    """Print the top classes of audio files with probabilities, means over windows if the file is longer than one."""
    if loaded.classifier is None:
        raise ConfigError(f'{settings.ckpt} is a pre-trained checkpoint and knows no classes: fine-tune it first, or '
                          'use --embed')
    paths = named_files(settings.wav)
    if settings.csv_file:
        check_output(settings.csv_file, '.csv', settings.ckpt, settings.labels, *paths)
    clips, errors = open_files(paths, settings.max_minutes, process)
    windows = in_windows(clips, settings, loaded.spectrum)
    scores = probabilities(predict(loaded.classifier, windows, loaded.spectrum, process, autocast,
                                   batch_size=settings.batch_size, workers=settings.workers, title='classifying'),
                           loaded.multi_label)
    for path, row in zip(clips.keys(), mean_of_windows(scores, windows.clip)):
        top = np.argsort(-row, kind='stable')[:settings.top_k]
        process.print(printable(path) + ':  ' + ', '.join(f'{loaded.classes[i]} {row[i]:.3f}' for i in top))
    if settings.csv_file:
        if process.is_main:
            write_windows(settings.csv_file, windows, scores, loaded.classes)
        process.print(f'{len(windows)} windows: {settings.csv_file}')
    complain(errors, paths)


def write_embeddings(loaded, settings, process, autocast):
    """An .npz with a row per clip, or per window with --window, --hop or --patches: names (N,), start (N,) seconds, and
    a float32 array (N, F) for each pool, named after it: see scoring.features.feature_batches for their columns. Of a
    prepared set also splits (N,), folds (N,) if it has any, labels (N,) index, -1 without one, or (N, classes) bool,
    and classes. --patches: patches (N, P, D) float16, time-major, and sound (N,) real frames.
    """
    if not settings.wav and not settings.dataset:
        raise ConfigError('--embed needs --dataset=NAME or --wav=FILE,...')
    folder = os.path.join(settings.data_dir, settings.dataset)
    paths, errors, beside = named_files(settings.wav) if settings.wav else [], [], {}
    check_output(settings.embed, '.npz', settings.ckpt, *(paths or [folder]))
    if paths:
        clips, errors = open_files(paths, settings.max_minutes, process)
    else:
        clips = open_clips([settings.dataset], settings.data_dir, sorted(read_meta(folder)['splits']))
    if settings.window or settings.hop or settings.patches:
        clips = in_windows(clips, settings, loaded.spectrum)
    config, pools = loaded.config, configurator.words(settings.pool)
    shapes = {pool: ((len(clips), width(config, pool)), np.float32) for pool in pools}
    if settings.patches:
        patches = loaded.spectrum['frames'] * config.n_mels // (config.patch_frames * config.patch_size)
        shapes['patches'] = (len(clips), patches, config.n_embd), np.float16
        beside['sound'] = frames_in(clips.length)
    beside.update(names=np.array(clips.keys()), start=(0 if clips.start is None else clips.start) / SAMPLE_RATE
                  + np.zeros(len(clips)), **({} if paths else labels_of(clips)))
    batches = feature_batches(loaded.encoder, clips, loaded.spectrum, process, autocast, list(shapes), settings.layer,
                              title='encoding', batch_size=settings.batch_size, workers=settings.workers)
    write_arrays(settings.embed, shapes, batches, beside, process.is_main)
    process.print(f'{settings.embed}: ' + ', '.join(f'{name} {shape}' for name, (shape, _) in shapes.items())
                  + f'; {", ".join(beside)}')
    complain(errors, paths)


# ------------------------------------------------------------------------------------------------------------- settings

def check(settings):
    """Raise ConfigError for settings that cannot work."""
    configurator.check_ranges(settings, **ranges.EVALUATE)
    if settings.features_file and (settings.ckpt or settings.wav or settings.embed or settings.csv_file):
        raise ConfigError('--features_file is probed by itself: leave out --ckpt, --wav, --embed and --csv_file')
    if settings.wav and settings.dataset:
        raise ConfigError('--wav and --dataset both say what is looked at: give one')
    if settings.window and settings.frames:
        raise ConfigError('--window and --frames both set the input length: give one')
    pools = configurator.words(settings.pool)
    if not pools or len(set(pools)) < len(pools) or not set(pools) <= set(POOLS):
        raise ConfigError(f'pool = {settings.pool!r} must be of {", ".join(POOLS)}, each once')
    if settings.window and settings.window < WINDOW_SAMPLES / SAMPLE_RATE or 0 < settings.hop < 0.01:
        raise ConfigError(f'window = {settings.window} s must be at least 0.025, hop = {settings.hop} s at least 0.01')


def apply(settings, loaded, process):
    """Let the settings overrule what a checkpoint says of its classes' names, input length and statistics."""
    if settings.labels and loaded.classes:
        known, loaded.classes = loaded.classes, [name for _, name in read_label_csv(settings.labels)]
        if len(known) != len(loaded.classes):
            raise ConfigError(f'{settings.labels} names {len(loaded.classes)} classes, {settings.ckpt} has '
                              f'{len(known)}')
    frames = settings.frames
    if settings.window:                                                     # up to the next whole patch, padded
        patch = loaded.config.patch_frames
        frames = -(-frames_in(round(settings.window * SAMPLE_RATE)) // patch) * patch
    if frames := frames or (not settings.embed and loaded.frames):          # embeddings are of what the encoder sees
        loaded.spectrum['frames'] = check_model(dataclasses.replace(loaded.config, frames=frames)).frames
    if settings.layer > loaded.config.n_layer:
        raise ConfigError(f'layer = {settings.layer}, but {settings.ckpt} has {loaded.config.n_layer} blocks')
    loaded.spectrum = with_given_statistics(loaded.spectrum, settings)
    (loaded.classifier or loaded.encoder).to(process.device).eval()


def with_given_statistics(spectrum, settings):
    given = {'mean': settings.norm_mean, 'std': settings.norm_std}
    return {**spectrum, **{name: float(value) for name, value in given.items() if value is not None}}


def run(argv):
    settings = configurator.configure(__file__, argv)
    check(settings)
    process = processes.start(settings.device, settings.threads)
    if settings.features_file:
        return probe_file(settings, process)
    autocast, _ = processes.autocast(process, settings.dtype)
    loaded = open_checkpoint(settings.ckpt)
    apply(settings, loaded, process)
    mode = (write_embeddings if settings.embed else classify_files if settings.wav else
            evaluate_classifier if loaded.classifier else probe_pretrained)
    if settings.csv_file and mode in (write_embeddings, probe_pretrained):
        raise ConfigError('csv_file is for the scores of a fine-tuned checkpoint: leave it out')
    try:
        return mode(loaded, settings, process, autocast)
    except NotFiniteError as error:
        raise CheckpointError(f'{settings.ckpt}: {error}: its weights, or what it is told of its input, are damaged or '
                              'too large') from None


if __name__ == '__main__':
    processes.main(run)
