"""Stage 3: what a checkpoint knows. Reads ours, and the authors', EAT's and SSLAM's.

    python eval.py --ckpt=out/ft/best.pt                        # fine-tuned: metrics on its test split, per-class CSV
    python eval.py --ckpt=out/demo/ckpt.pt --dataset=demo       # pre-trained: kNN and linear probe, beside log-mel's
    python eval.py --ckpt=out/ft/best.pt --wav=a.wav,b.flac     # fine-tuned: the top classes of files
    python eval.py --ckpt=out/demo/ckpt.pt --dataset=demo --embed=out.npz      # embeddings of a set, or of --wav files

Settings are the names below. Probes use the log-mel statistics of the training split of the set at hand; a fine-tuned
checkpoint, and embeddings, those that the checkpoint holds.
"""
import csv
import dataclasses
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
from prepare import decode_file

ckpt = ''                   # the checkpoint
dataset = ''                # a prepared set; default for a fine-tuned checkpoint: the one it was tuned on
data_dir = 'data'           # where prepared sets are
fold = ''                   # test on this fold of the set; '': on its test split (fine-tuned: as it was tuned)
labels_per_class = 0        # probe: train on so many labels of each class; 0: all
validation_part = 0.1       # share of the training split on which the probe's strength is chosen
seed = 1                    # which labels, if there are few
wav = ''                    # audio files to classify or embed, separated by commas
top_k = 5                   # classes to print for each file
embed = ''                  # write embeddings to this .npz file
csv_file = ''               # per-class table of a fine-tuned checkpoint; default: classes.csv beside it
frames = 0                  # input length; 0: the checkpoint's
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
            is_classifier = authors.is_classifier(path)
        except runtime.CheckpointError:
            raise error from None
    return open_theirs(path, is_classifier)


def open_ours(path, state):
    try:
        config = ASDAConfig(**state['config'])
        spectrum = {'frames': config.frames,
                    **{name: state['input'][name] for name in ('window', 'mean', 'std', 'repeat')}}
        is_classifier = 'head.weight' in state['model']
        classes, multi_label = (list(state['classes']), bool(state['multi_label'])) if is_classifier else (None, None)
        if (spectrum['window'] not in data.WINDOWS
                or not isinstance(spectrum['mean'], float) or not isinstance(spectrum['std'], float)):
            raise ValueError(f'input {spectrum}')
        model = Classifier(config, len(classes)) if is_classifier else ASDA(config)
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

def average_precision(is_positive, scores):
    """Area under the precision-recall steps, ties taken together (scikit-learn's average_precision_score). (N,), (N,)
    -> float"""
    order = np.argsort(-scores, kind='stable')
    hits = np.cumsum(is_positive[order])
    last_of_tie = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = hits[last_of_tie]
    precision, recall = hits / (last_of_tie + 1), hits / hits[-1]
    return float((np.diff(recall, prepend=0) * precision).sum())


def metrics(logits, targets, multi_label):
    """{'accuracy'} or {'mAP'} with counts, and one row per class for the CSV. targets (N, classes), logits alike."""
    if multi_label:
        rows = [(int(positive.sum()), average_precision(positive, scores) if positive.any() else None)
                for positive, scores in zip(targets.T, logits.T)]
        found = [score for _, score in rows if score is not None]       # a class without a positive has no precision
        return {'mAP': float(np.mean(found)) if found else float('nan'), 'classes': len(found),
                'clips': len(logits)}, rows
    labels, guesses = targets.argmax(axis=1), logits.argmax(axis=1)
    rows = [(int((labels == c).sum()), float((guesses[labels == c] == c).mean()) if (labels == c).any() else None)
            for c in range(targets.shape[1])]
    right = int((guesses == labels).sum())
    return {'accuracy': right / len(labels), 'right': right, 'clips': len(labels)}, rows


def describe(scores):
    """'accuracy 81.2 % (65 of 80)' or 'mAP 0.415 (527 classes, 20,550 clips)'"""
    if 'mAP' in scores:
        return f'mAP {scores["mAP"]:.4f} ({scores["classes"]} classes, {scores["clips"]:,} clips)'
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
    """A fine-tuned checkpoint on its test split."""
    tuned = loaded.settings
    name = settings.dataset or tuned.get('dataset', '')
    if not name:
        raise configurator.ConfigError('this checkpoint does not say what it was tuned on: name a prepared set, '
                                       '--dataset=NAME')
    test = data.open_test(name, settings.data_dir, settings.fold or tuned.get('fold', ''))
    if len(test.classes) != len(loaded.classes) or loaded.settings and test.classes != loaded.classes:
        raise configurator.ConfigError(f'{settings.ckpt} knows {len(loaded.classes)} classes ({loaded.classes[0]}, '
                                       f'...), {name} has {len(test.classes)} ({test.classes[0]}, ...)')
    logits = predict(loaded.classifier, test, loaded.spectrum, process, autocast, batch_size=settings.batch_size,
                     workers=settings.workers, title='evaluating')
    scores, rows = metrics(logits, test.targets(np.arange(len(test))), test.multi_label)
    path = settings.csv_file or os.path.join(os.path.dirname(settings.ckpt), 'classes.csv')
    if process.is_main:
        with runtime.replacing(path) as f:
            writer = csv.writer(f, lineterminator='\n')
            writer.writerow(['class', 'clips', 'average_precision' if test.multi_label else 'accuracy'])
            writer.writerows([label, count, '' if score is None else f'{score:.6f}']
                             for label, (count, score) in zip(test.classes, rows))
    process.print(f'{settings.ckpt} on {name}: {describe(scores)}; per class: {path}')
    return scores


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


def load_waves(paths, samples):
    """The first samples of audio files, as a batch of int16 PCM. Raises DataError, which names the file."""
    waves = [np.clip(np.rint(decode_file(path) * 32768), -32768, 32767).astype(np.int16)[:samples] for path in paths]
    return data.stack(waves, samples)


def classify_files(loaded, settings, process, autocast):
    """Print the top classes of audio files, with probabilities."""
    if loaded.classifier is None:
        raise configurator.ConfigError(f'{settings.ckpt} is a pre-trained checkpoint and knows no classes: '
                                       'fine-tune it first, or use --embed')
    loaded.classifier.eval()
    for path in data.words(settings.wav):
        batch = load_waves([path], data.samples_for(loaded.spectrum['frames']))
        spec = data.log_mel(batch['pcm'].to(process.device), batch['lengths'].to(process.device), **loaded.spectrum)
        with torch.inference_mode(), autocast():
            logits = loaded.classifier(spec)[0].float()
        scores = logits.sigmoid() if loaded.multi_label else logits.softmax(dim=0)
        top = scores.topk(min(settings.top_k, len(scores)))
        process.print(path + ':  '
                      + ', '.join(f'{loaded.classes[i]} {score:.3f}' for score, i in zip(top.values, top.indices)))


def write_embeddings(loaded, settings, process, autocast):
    """An .npz with names (N,), cls (N, D), mean (N, D) and patches (N, P, D) float16, P time-major;
    sound (N,) real frames."""
    def everything(spec, lengths):
        x = loaded.encoder(spec).float()
        real = patches_with_sound(lengths, x.shape[1] - 1, loaded.config)[:, :, None]
        return x[:, 0], (x[:, 1:] * real).sum(dim=1) / real.sum(dim=1), x[:, 1:], data.frames_in(lengths)
    if settings.wav:
        names = data.words(settings.wav)
        batch = load_waves(names, data.samples_for(loaded.spectrum['frames']))
        pcm, lengths = batch['pcm'].to(process.device), batch['lengths'].to(process.device)
        with torch.inference_mode(), autocast():
            parts = [part.float().cpu().numpy()
                     for part in everything(data.log_mel(pcm, lengths, **loaded.spectrum), lengths)]
    else:
        meta = data.read_meta(os.path.join(settings.data_dir, settings.dataset))
        clips = data.open_clips([settings.dataset], settings.data_dir, sorted(meta.get('splits', {'train': None})))
        names = clips.keys()
        rows, columns = (loaded.spectrum['frames'] // loaded.config.patch_size,
                         loaded.config.n_mels // loaded.config.patch_size)
        if len(names) * rows * columns * loaded.config.n_embd * 4 > MAX_EMBEDDING_BYTES:
            raise configurator.ConfigError(f'patch embeddings of {len(names):,} clips take more than '
                                           f'{MAX_EMBEDDING_BYTES >> 30} GiB of memory: embed smaller sets')
        parts = over_clips(everything, clips, loaded.spectrum, process, autocast, settings.batch_size,
                           settings.workers, 'encoding')
    cls, mean, patches, sound = parts
    if process.is_main:
        with runtime.replacing(settings.embed, 'wb') as f:
            np.savez(f, names=np.array(names), cls=cls, mean=mean, patches=patches.astype(np.float16),
                     sound=sound.astype(np.int64))
    process.print(f'{settings.embed}: names {len(names)}, cls and mean {cls.shape}, patches {patches.shape}')


def run(argv):
    settings = configurator.configure(__file__, argv)
    configurator.check_ranges(
        settings, labels_per_class=(0, 1e9), validation_part=(0, 1), seed=(0, 2 ** 62), top_k=(1, 1e6),
        frames=(0, 1e6), norm_mean=(-100, 100), norm_std=(1e-3, 100), batch_size=(1, 1e6), workers=(0, 1000),
        threads=(0, 1000))
    if settings.wav and not data.words(settings.wav):
        raise configurator.ConfigError(f'wav = {settings.wav!r} names no file')
    process = runtime.start(settings.device, settings.threads)
    autocast, _ = runtime.autocast(process, settings.dtype)
    loaded = open_checkpoint(settings.ckpt)
    loaded.encoder.to(process.device).eval()
    if loaded.classifier is not None:
        loaded.classifier.to(process.device)
    if settings.frames:
        try:
            loaded.spectrum['frames'] = dataclasses.replace(loaded.config, frames=settings.frames).frames
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
