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
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import authors
import configurator
import data
import runtime
from model import ASDA, MAX_FRAMES, ASDAConfig, Classifier
from prepare import read_label_csv
from sources import decode_file

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

PROBE_L2 = tuple(10.0 ** k for k in range(-5, 2))       # strengths that the linear probe chooses from
MAX_EMBEDDING_BYTES = 8 << 30


# ---------------------------------------------------------------------------------------------------------- checkpoints

@dataclass
class Loaded:
    """A checkpoint of any origin. classifier and classes are None for a pre-trained one."""
    encoder: torch.nn.Module
    classifier: torch.nn.Module | None
    config: ASDAConfig
    spectrum: dict                  # frames, window, mean, std, repeat: what data.log_mel wants
    classes: list | None
    multi_label: bool | None
    settings: dict


def open_checkpoint(path):
    """Read a checkpoint of ours or of the authors' family. Raises CheckpointError."""
    if not path:
        raise configurator.ConfigError('name a checkpoint: --ckpt=PATH')
    if os.path.isdir(path):
        raise runtime.CheckpointError(f'{path} is a folder; name a checkpoint in it, '
                                      f'say {os.path.join(path, "ckpt.pt")}')
    try:
        return open_ours(path, runtime.load_checkpoint(path))
    except runtime.CheckpointError as error:
        try:
            weights = authors.model_and_cfg(path)[0]
        except runtime.CheckpointError:
            raise error from None
        if not any('modality_encoders.' in str(name) for name in weights):              # ours, and damaged
            raise error from None
    return open_theirs(path, 'head.weight' in weights)


def open_ours(path, state):
    try:
        config = ASDAConfig(**state['config'])
        spectrum = {'frames': config.frames,
                    **{name: state['input'][name] for name in ('window', 'mean', 'std', 'repeat')}}
        is_classifier = 'head.weight' in state['model']
        classes, multi_label = (list(state['classes']), bool(state['multi_label'])) if is_classifier else (None, None)
        if (spectrum['window'] not in data.WINDOWS or not isinstance(spectrum['mean'], float)
                or not isinstance(spectrum['std'], float) or not 0 < spectrum['std'] < math.inf):
            raise ValueError(f'input {spectrum}')

        def build():
            return Classifier(config, len(classes)) if is_classifier else ASDA(config)
        with torch.device('meta'):                                          # before memory is spent on absurd sizes
            runtime.compare_weights(build(), state['model'], path)
        model = build()
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise runtime.CheckpointError(f'{path} is a damaged checkpoint ({type(error).__name__}: {error})') from None
    runtime.load_weights(model, state['model'], path)
    return Loaded(model.encoder, model if is_classifier else None, config, spectrum, classes, multi_label,
                  state['settings'])


def open_theirs(path, is_classifier):
    """Their files name no statistics and no classes: AudioSet's statistics,
    unless the number of classes says otherwise."""
    if not is_classifier:
        model = authors.load_pretrained(path)
        return Loaded(model.encoder, None, model.config,
                      {'frames': model.config.frames, 'repeat': False, **authors.INPUT}, None, None, {})
    model = authors.load_classifier(path)
    n_classes = model.head.out_features
    spectrum = {'frames': model.config.frames, 'repeat': False,
                **authors.INPUT_BY_CLASSES.get(n_classes, authors.INPUT)}
    return Loaded(model.encoder, model, model.config, spectrum, [f'class {i}' for i in range(n_classes)],
                  n_classes == 527, {})


# ---------------------------------------------------------------------------------------------- running over many clips

def over_clips(function, clips, spectrum, process, autocast, batch_size=64, workers=0, title=''):
    """[arrays of all clips, ...] from function(spec, lengths) -> tuple of tensors with a row per clip.

    The batches are shared out among the processes, and every process gets the whole result.
    """
    batches = data.OrderedBatches(clips, spectrum['frames'], batch_size)
    mine = range(process.rank, len(batches), process.world)
    found = []
    hidden = not title or not process.is_main
    for batch in tqdm(data.loader(batches, mine, workers), desc=title, total=len(mine), leave=False,
                      disable=hidden or None):
        pcm, lengths = batch['pcm'].to(process.device), batch['lengths'].to(process.device)
        spec = data.log_mel(pcm, lengths, **spectrum)
        lengths = torch.full_like(lengths, pcm.shape[1]) if spectrum['repeat'] else lengths
        with torch.inference_mode(), autocast():
            found.append([part.float().cpu().numpy() for part in function(spec, lengths)])
    shared = process.gather(found)
    in_order = [shared[k % process.world][k // process.world] for k in range(len(batches))]
    return [np.concatenate(parts) for parts in zip(*in_order)]


def features(encoder, clips, spectrum, process, autocast, **how):
    """Frozen features of clips -> CLS (N, D), mean over the patches that hold sound (N, D)."""
    def pooled(spec, lengths):
        x = encoder(spec)                                                   # (B, 1 + P, D)
        real = patches_with_sound(lengths, x.shape[1] - 1, encoder.config)[:, :, None]
        return x[:, 0], (x[:, 1:].float() * real).sum(dim=1) / real.sum(dim=1)
    return over_clips(pooled, clips, spectrum, process, autocast, **how)


def patches_with_sound(lengths, n_patches, config):
    """(B, P) float, 1 for patches that hold a real frame of a clip of so many samples, 0 for those of padding alone."""
    columns = config.n_mels // config.patch_size
    rows = -(-data.frames_in(lengths) // config.patch_size)
    return (torch.arange(n_patches, device=lengths.device) // columns < rows[:, None]).float()


def log_mel_statistics(clips, spectrum, process, **how):
    """The baseline that embarrasses weak encoders:
    mean and standard deviation of every mel band over a clip's real frames (N, 256)."""
    def statistics(spec, lengths):
        count = data.frames_in(lengths).clamp(max=spec.shape[1])[:, None]
        real = (torch.arange(spec.shape[1], device=spec.device) < count).float()[:, :, None]
        mean = (spec * real).sum(dim=1) / count
        variance = ((spec - mean[:, None]).square() * real).sum(dim=1) / count
        return torch.cat([mean, variance.sqrt()], dim=1),
    return over_clips(statistics, clips, spectrum, process, torch.no_grad, **how)[0]


def predict(classifier, clips, spectrum, process, autocast, **how):
    """Logits (N, classes)."""
    classifier.eval()
    return over_clips(lambda spec, _: (classifier(spec),), clips, spectrum, process, autocast, **how)[0]


# -------------------------------------------------------------------------------------------------------------- metrics

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
    mAUC, as usual for AudioSet.
    """
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


def describe(scores):
    """'accuracy 81.2 % (65 of 80)' or 'mAP 0.4150, mAUC 0.972, d-prime 2.71 (527 classes, 20,550 clips)'"""
    if 'mAP' in scores:
        return (f'mAP {scores["mAP"]:.4f}, mAUC {scores["mAUC"]:.4f}, d-prime {scores["d_prime"]:.3f} '
                f'({scores["classes"]} classes, {scores["clips"]:,} clips)')
    return f'accuracy {scores["accuracy"]:.1%} ({scores["right"]:,} of {scores["clips"]:,})'


def knn_scores(train, train_labels, test, classes, k=10):
    """(N, classes) votes of the k nearest training features by cosine; ties go to the larger summed similarity."""
    train, test = (F.normalize(torch.from_numpy(x).float(), dim=1) for x in (train, test))
    similarity, nearest = (test @ train.T).topk(min(k, len(train)), dim=1)          # (N, k)
    votes = torch.zeros(len(test), classes)
    return votes.scatter_add_(1, torch.as_tensor(train_labels).long()[nearest], 1 + similarity * 1e-4).numpy()


def knn_accuracy(train, train_labels, test, test_labels, k=10):
    votes = knn_scores(train, train_labels, test, int(max(train_labels)) + 1, k)
    return float((votes.argmax(axis=1) == test_labels).mean())


def effective_rank(features):
    """exp of the entropy of the normalised singular values of centred features: D if all directions are used alike,
    1 if collapsed."""
    values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    share = values / max(values.sum(), 1e-12)
    return float(np.exp(-(share * np.log(share + 1e-12)).sum()))


def linear_probe(train, valid, test, multi_label):
    """Logistic regression on features standardised by the training part, its L2 strength chosen on the validation part.

    train, valid: (features (N, d), targets (N, classes)); test: features
    -> logits (N, classes) of test, chosen strength
    """
    mean, std = train[0].mean(axis=0), train[0].std(axis=0) + 1e-6
    x, v, t = (torch.from_numpy((part - mean) / std).double() for part in (train[0], valid[0], test))
    targets, best = torch.from_numpy(train[1]).double(), None
    weight = torch.zeros(x.shape[1] + 1, targets.shape[1], dtype=torch.float64)
    for strength in reversed(PROBE_L2):                         # from the strongest: each starts where the last ended
        weight = fit_logistic(x, targets, strength, multi_label, weight)
        scores, _ = metrics((v @ weight[1:] + weight[0]).numpy(), valid[1], multi_label)
        score = scores['mAP' if multi_label else 'accuracy']
        if best is None or score > best[0]:
            best = score, strength, (t @ weight[1:] + weight[0]).numpy()
    return best[2], best[1]


def fit_logistic(x, targets, strength, multi_label, start):
    """Minimise mean loss + strength / 2 |W|^2 (bias free) by L-BFGS, in float64. -> (1 + d, classes), bias first"""
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=300, tolerance_grad=1e-6, tolerance_change=1e-10,
                                  line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        logits = x @ weight[1:] + weight[0]
        if multi_label:
            loss = F.binary_cross_entropy_with_logits(logits, targets, reduction='sum') / len(x)
        else:
            loss = F.cross_entropy(logits, targets)
        loss = loss + strength / 2 * weight[1:].square().sum()
        loss.backward()
        return loss
    optimizer.step(closure)
    return weight.detach()


# ---------------------------------------------------------------------------------------------------------------- modes

def evaluate_classifier(loaded, settings, process, autocast):
    """A fine-tuned checkpoint on its test split; with --window or --hop, the mean over the windows of each clip."""
    tuned = loaded.settings
    own = tuned.get('test_dataset') or tuned.get('dataset', '')
    name = settings.dataset or own
    if not name or not isinstance(name, str):
        raise configurator.ConfigError('this checkpoint does not say what it was tuned on: name a prepared set, '
                                       '--dataset=NAME')
    test = data.open_test(name, settings.data_dir, settings.fold or (str(tuned.get('fold', '')) if name == own else ''))
    if len(test.classes) != len(loaded.classes) or loaded.settings and test.classes != loaded.classes:
        raise configurator.ConfigError(f'{settings.ckpt} knows {len(loaded.classes)} classes ({loaded.classes[0]}, '
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
        with runtime.replacing(path) as f:
            writer = csv.writer(f, lineterminator='\n')
            writer.writerow(['class', 'clips', *(['average_precision', 'auc'] if test.multi_label else ['accuracy'])])
            writer.writerows([label, count, *('' if math.isnan(value) else f'{value:.6f}' for value in values)]
                             for label, (count, *values) in zip(test.classes, rows))
    longer = (test.length > data.samples_for(loaded.spectrum['frames']) + 16 * data.HOP_SAMPLES).sum()
    if longer and not cut:
        process.print(f'{longer:,} clips are longer than the input, of which the first '
                      f'{loaded.spectrum["frames"] / 100:g} s were used; --hop=SECONDS takes the mean over windows')
    process.print(f'{settings.ckpt} on {name}: {describe(scores)}; per class: {path}')
    return scores


def in_windows(clips, settings, spectrum):
    """The clips cut as --window and --hop say; by default into windows of the input length, side by side."""
    samples = round(settings.window * data.SAMPLE_RATE) or data.samples_for(spectrum['frames'])
    return clips.windows(samples, round(settings.hop * data.SAMPLE_RATE) or samples)


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
    with runtime.replacing(path) as f:
        writer = csv.writer(f, lineterminator='\n')
        writer.writerow(['clip', 'start', 'end', *classes])
        for clip, start, length, row in zip(windows.clip, windows.start, windows.length, scores):
            writer.writerow([names[clip], f'{start / data.SAMPLE_RATE:.3f}',
                             f'{(start + length) / data.SAMPLE_RATE:.3f}', *(f'{value:.4f}' for value in row)])


def probe_pretrained(loaded, settings, process, autocast):
    """kNN and linear probe of the frozen encoder, and of log-mel statistics, on the same split.
    -> {features: {probe: scores}}"""
    if not settings.dataset:
        raise configurator.ConfigError('a pre-trained checkpoint is probed on a labelled set: '
                                       '--dataset=NAME (or use --embed)')
    *parts, whole = data.task_splits(settings.dataset, settings.data_dir, settings.fold, settings.labels_per_class,
                                     settings.seed, settings.validation_part)
    train, valid, test = parts
    mean, std = whole.statistics(loaded.spectrum['window'])
    spectrum = {**loaded.spectrum, 'mean': mean, 'std': std}
    how = {'batch_size': settings.batch_size, 'workers': settings.workers}
    encoded = [features(loaded.encoder, part, spectrum, process, autocast, title='encoding', **how) for part in parts]
    longest = int(max(data.frames_in(part.length).max() for part in parts))
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
    clips = data.Clips([], {'offset': np.cumsum(lengths) - lengths, 'length': lengths,
                            'shard': np.zeros(len(waves), int)}, [])
    clips.opened = {0: np.concatenate(waves)}
    return clips


def classify_files(loaded, settings, process, autocast):
    """Print the top classes of audio files with probabilities, means over windows if the file is longer than one."""
    if loaded.classifier is None:
        raise configurator.ConfigError(f'{settings.ckpt} is a pre-trained checkpoint and knows no classes: '
                                       'fine-tune it first, or use --embed')
    paths = data.words(settings.wav)
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
        return x[:, 0], (x[:, 1:] * real).sum(dim=1) / real.sum(dim=1), x[:, 1:], data.frames_in(lengths)
    if settings.wav:
        names = data.words(settings.wav)
        clips = open_files(names)
    else:
        meta = data.read_meta(os.path.join(settings.data_dir, settings.dataset))
        clips = data.open_clips([settings.dataset], settings.data_dir, sorted(meta.get('splits', {'train': None})))
        names = clips.keys()
    starts = np.zeros(len(clips))
    if settings.window or settings.hop:
        clips = in_windows(clips, settings, loaded.spectrum)
        names, starts = [names[i] for i in clips.clip], clips.start / data.SAMPLE_RATE
    rows, columns = (loaded.spectrum['frames'] // loaded.config.patch_size,
                     loaded.config.n_mels // loaded.config.patch_size)
    if len(names) * rows * columns * loaded.config.n_embd * 4 > MAX_EMBEDDING_BYTES:
        raise configurator.ConfigError(f'patch embeddings of {len(names):,} clips take more than '
                                       f'{MAX_EMBEDDING_BYTES >> 30} GiB of memory: embed smaller sets')
    cls, mean, patches, sound = over_clips(everything, clips, loaded.spectrum, process, autocast, settings.batch_size,
                                           0 if settings.wav else settings.workers, 'encoding')
    if process.is_main:
        with runtime.replacing(settings.embed, 'wb') as f:
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
        raise configurator.ConfigError('--window and --frames both set the input length: give one')
    if settings.window and settings.window < data.WINDOW_SAMPLES / data.SAMPLE_RATE or 0 < settings.hop < 0.01:
        raise configurator.ConfigError(f'window = {settings.window} s must be at least 0.025, hop = {settings.hop} s '
                                       'at least 0.01')
    if settings.wav and not data.words(settings.wav):
        raise configurator.ConfigError(f'wav = {settings.wav!r} names no file')
    process = runtime.start(settings.device, settings.threads)
    autocast, _ = runtime.autocast(process, settings.dtype)
    loaded = open_checkpoint(settings.ckpt)
    if settings.labels and loaded.classes:
        names = [name for _, name in read_label_csv(settings.labels)]
        if len(names) != len(loaded.classes):
            raise configurator.ConfigError(f'{settings.labels} names {len(names)} classes, {settings.ckpt} has '
                                           f'{len(loaded.classes)}')
        loaded.classes = names
    loaded.encoder.to(process.device).eval()
    if loaded.classifier is not None:
        loaded.classifier.to(process.device)
    frames = settings.frames
    if settings.window:                                                     # up to the next whole patch, padded
        real = data.frames_in(round(settings.window * data.SAMPLE_RATE))
        frames = -(-real // loaded.config.patch_size) * loaded.config.patch_size
    if frames:
        try:
            loaded.spectrum['frames'] = dataclasses.replace(loaded.config, frames=frames).frames
        except ValueError as error:
            raise configurator.ConfigError(str(error)) from None
    for name in ('mean', 'std'):
        if getattr(settings, f'norm_{name}') is not None:
            loaded.spectrum[name] = float(getattr(settings, f'norm_{name}'))
    if settings.embed:
        if not settings.wav and not settings.dataset:
            raise configurator.ConfigError('--embed needs --dataset=NAME or --wav=FILE,...')
        write_embeddings(loaded, settings, process, autocast)
    elif settings.wav:
        classify_files(loaded, settings, process, autocast)
    elif loaded.classifier is not None:
        evaluate_classifier(loaded, settings, process, autocast)
    else:
        probe_pretrained(loaded, settings, process, autocast)


if __name__ == '__main__':
    runtime.main(run)
