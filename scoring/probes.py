"""Frozen features of many clips, and what can be read off them: kNN, linear probe, effective rank; log-mel statistics
as the baseline.
"""
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from audio import frames_in
from scoring.metrics import NotFiniteError, metrics

PROBE_L2 = tuple(10.0 ** k for k in range(-5, 2))       # strengths that the linear probe chooses from


# ---------------------------------------------------------------------------------------------- running over many clips

def over_clips(function, clips, spectrum, process, autocast, batch_size=64, workers=0, title=''):
    """[arrays of all clips, ...] from function(spec, lengths) -> tuple of tensors with a row per clip.

    The batches are shared out among the processes, and every process gets the whole result. Raises NotFiniteError.
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
    for k, parts in enumerate(in_order):
        finite = np.all([np.isfinite(part).reshape(len(part), -1).all(axis=1) for part in parts], axis=0)
        if not finite.all():
            at = k * batch_size + int(finite.argmin())
            raise NotFiniteError(f'what comes out for {clips.select([at]).keys()[0]} is not finite')
    return [np.concatenate(parts) for parts in zip(*in_order)]


def features(encoder, clips, spectrum, process, autocast, **how):
    """Frozen features of clips -> CLS (N, D), mean over the patches that hold sound (N, D)."""
    def pooled(spec, lengths):
        x = encoder(spec)                                                   # (B, 1 + P, D)
        return x[:, 0], mean_of_sound(x[:, 1:].float(), lengths, encoder.config)
    return over_clips(pooled, clips, spectrum, process, autocast, **how)


def embeddings(encoder, clips, spectrum, process, autocast, **how):
    """The same, and every patch (N, P, D), time-major, and the number of real frames (N,). Raises NotFiniteError also
    for patches that float16 cannot hold."""
    def everything(spec, lengths):
        x = encoder(spec).float()
        return x[:, 0], mean_of_sound(x[:, 1:], lengths, encoder.config), x[:, 1:], frames_in(lengths)
    found = over_clips(everything, clips, spectrum, process, autocast, **how)
    if max(found[2].max(), -found[2].min()) > np.finfo(np.float16).max:
        raise NotFiniteError('patch embeddings that float16 cannot hold')
    return found


def mean_of_sound(patches, lengths, config):
    """(B, P, D) -> (B, D): without the patches of padding."""
    real = patches_with_sound(lengths, patches.shape[1], config)[:, :, None]
    return (patches * real).sum(dim=1) / real.sum(dim=1)


def patches_with_sound(lengths, n_patches, config):
    """(B, P) float, 1 for patches that hold a real frame of a clip of so many samples, 0 for those of padding alone."""
    columns = config.n_mels // config.patch_size
    rows = -(-frames_in(lengths) // config.patch_size)
    return (torch.arange(n_patches, device=lengths.device) // columns < rows[:, None]).float()


def log_mel_statistics(clips, spectrum, process, **how):
    """The baseline that embarrasses weak encoders:
    mean and standard deviation of every mel band over a clip's real frames (N, 256)."""
    def statistics(spec, lengths):
        count = frames_in(lengths).clamp(max=spec.shape[1])[:, None]
        real = (torch.arange(spec.shape[1], device=spec.device) < count).float()[:, :, None]
        mean = (spec * real).sum(dim=1) / count
        variance = ((spec - mean[:, None]).square() * real).sum(dim=1) / count
        return torch.cat([mean, variance.sqrt()], dim=1),
    return over_clips(statistics, clips, spectrum, process, torch.no_grad, **how)[0]


def predict(classifier, clips, spectrum, process, autocast, **how):
    """Logits (N, classes)."""
    classifier.eval()
    return over_clips(lambda spec, _: (classifier(spec),), clips, spectrum, process, autocast, **how)[0]


# --------------------------------------------------------------------------------------------------------------- probes

def knn_scores(train, train_labels, test, classes, k=10):
    """(N, classes) votes of the k nearest training features by cosine; ties go to the larger summed similarity."""
    train, test = (F.normalize(torch.from_numpy(x).float(), dim=1) for x in (train, test))
    similarity, nearest = (test @ train.T).topk(min(k, len(train)), dim=1)          # (N, k)
    votes = torch.zeros(len(test), classes, dtype=torch.float64)                    # float32 would round the ties away
    return votes.scatter_add_(1, torch.as_tensor(train_labels).long()[nearest], 1 + similarity.double() * 1e-4).numpy()


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
