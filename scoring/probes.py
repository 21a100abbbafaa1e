"""What can be read off frozen features: kNN, linear probe, effective rank."""
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

PROBE_L2 = tuple(10.0 ** k for k in range(-5, 2))       # strengths that the linear probe chooses from,
FIFTHS, MANY_CLIPS = 5, 1_000                           # on each fifth of the training clips; of more clips, on one
BLOCK = 1 << 24                                         # numbers that are worked on at a time, of any number of clips


def in_float64(device):
    """The device itself, or the CPU where it has no float64, which the probe computes in."""
    return device if device.type == 'cuda' else torch.device('cpu')


def standardised(train, *others):
    """Features (N, F) with the mean and standard deviation of the training part taken out of each, in float32."""
    mean, std = train.mean(axis=0), train.std(axis=0) + 1e-6
    return [(part - mean) / std for part in (train, *others)]


def knn_scores(train, train_labels, test, classes, k=10, device='cpu'):
    """(N, classes) votes of the k nearest training features by cosine; ties go to the larger summed similarity. Give it
    standardised features: else the few that vary most decide."""
    train, test = (F.normalize(torch.from_numpy(x).float(), dim=1) for x in (train, test))
    train, labels, votes = train.to(device), torch.as_tensor(train_labels).long(), []
    for part in test.split(max(BLOCK // len(train), 1)):                            # never the whole matrix at once
        similarity, nearest = (found.cpu() for found in (part.to(device) @ train.T).topk(min(k, len(train)), dim=1))
        of_part = torch.zeros(len(part), classes, dtype=torch.float64)              # float32 would round the ties away
        votes.append(of_part.scatter_add_(1, labels[nearest], 1 + similarity.double() * 1e-4))
    return torch.cat(votes).numpy()


def knn_accuracy(train, train_labels, test, test_labels, k=10, device='cpu'):
    """Of standardised features."""
    train, test = standardised(train, test)
    votes = knn_scores(train, train_labels, test, int(max(train_labels)) + 1, k, device)
    return float((votes.argmax(axis=1) == test_labels).mean())


def effective_rank(features):
    """exp of the entropy of the normalised singular values of centred features: D if all directions are used alike,
    1 if collapsed."""
    values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    share = values / max(values.sum(), 1e-12)
    return float(np.exp(-(share * np.log(share + 1e-12)).sum()))


def linear_probe(train, test, multi_label, strengths=PROBE_L2, title='', device='cpu'):
    """Logistic regression on features standardised by the training part, of the L2 strength that best_strength chooses.

    train: (features (N, d), targets (N, classes)); test: features; title: of a bar over the strengths, '': none
    -> logits (N, classes) of test, chosen strength
    """
    strengths = sorted(strengths, reverse=True)                             # each fit starts where the last ended
    if len(strengths) > 1:
        best = best_strength(*train, multi_label, strengths, title, device)
        strengths = strengths[:strengths.index(best) + 1]
    (x, test), weight = standardised(train[0], test), None
    for strength in tqdm(strengths, desc=title, leave=False, disable=not title or None):
        weight = fit_logistic(x, train[1], strength, multi_label, weight, device)
    return outputs(test, weight), strengths[-1]


def best_strength(x, targets, multi_label, strengths, title, device):
    """Of L2 strengths, in falling order, that with the least loss on fifths of the clips that are held out in turn; of
    many clips, on one fifth. The loss, since accuracies of few clips tie; without classes that the other fifths lack,
    of which nothing can be said; the strongest where nothing else is left to choose."""
    folds, losses = [], []
    part = fifth_of_each_class(targets)
    for k in range(FIFTHS if len(x) <= MANY_CLIPS else 1):
        valid, classes = part == k, targets[part != k].any(axis=0)
        if valid.any() and classes.any():
            folds.append((*standardised(x[~valid], x[valid]), targets[~valid][:, classes], targets[valid][:, classes]))
    weights = [None] * len(folds)
    for strength in tqdm(strengths, desc=title, leave=False, disable=not title or None):
        weights = [fit_logistic(x, y, strength, multi_label, weight, device)
                   for weight, (x, _, y, _) in zip(weights, folds)]
        losses.append(sum(mean_loss(outputs(v, weight), z, multi_label)
                          for weight, (_, v, _, z) in zip(weights, folds)))
        rising = len(losses) > 2 and losses[-1] > losses[-2] > losses[-3]
        if rising or not np.isfinite(losses[-1]):
            break
    return strengths[np.nan_to_num(losses, nan=np.inf).argmin()]


def fifth_of_each_class(targets):
    """(N,) 0 ... 4: which fifth of its class (of several labels, of its first) a clip is in."""
    part = np.empty(len(targets), int)
    part[targets.argmax(axis=1).argsort(kind='stable')] = np.arange(len(targets)) % FIFTHS
    return part


def loss_of(multi_label):
    return F.binary_cross_entropy_with_logits if multi_label else F.cross_entropy


def mean_loss(logits, targets, multi_label):
    return loss_of(multi_label)(torch.from_numpy(logits), torch.from_numpy(targets).double()).item()


def outputs(x, weight):
    """Logits (N, classes) of features (N, d), in float64, a block at a time, on the device of the weight."""
    blocks = torch.from_numpy(x).split(rows_of_block(x))
    return torch.cat([(part.to(weight) @ weight[1:] + weight[0]).cpu() for part in blocks]).numpy()


def rows_of_block(x):
    return max(BLOCK // x.shape[1], 1)


def fit_logistic(x, targets, strength, multi_label, start=None, device='cpu'):
    """Minimise mean loss + strength / 2 |W|^2 (bias free) by L-BFGS from start, or zero, in float64.

    x (N, d), targets (N, classes) -> (1 + d, classes), bias first. No copy of x in float64 is made if it is larger than
    a block.
    """
    x, targets = torch.as_tensor(x), torch.from_numpy(targets)
    if start is None:
        start = torch.zeros(1 + x.shape[1], targets.shape[1], dtype=torch.float64, device=device)
    if len(x) >= x.shape[1] or x.numel() > BLOCK:
        return minimised(x, targets, strength, multi_label, start)
    # Of fewer clips than features: the weights of least L2 lie in the span of the clips.
    basis, coordinates = torch.linalg.qr(x.T.to(start))                     # (d, N), (N, N)
    start = torch.cat([start[:1], basis.T @ start[1:]])
    weight = minimised(coordinates.T, targets, strength, multi_label, start)
    return torch.cat([weight[:1], basis @ weight[1:]])


def minimised(x, targets, strength, multi_label, start):
    """What fit_logistic says, of tensors."""
    weight, rows = start.clone().requires_grad_(), rows_of_block(x)
    optimizer = torch.optim.LBFGS([weight], max_iter=300, tolerance_grad=1e-6, tolerance_change=1e-10,
                                  line_search_fn='strong_wolfe')
    blocks = list(zip(x.split(rows) if len(x) > rows else [x.to(start)], targets.split(rows)))

    def closure():
        optimizer.zero_grad()
        total = strength / 2 * weight[1:].square().sum()
        total.backward()
        for part, wanted in blocks:
            logits = part.to(start) @ weight[1:] + weight[0]
            loss = loss_of(multi_label)(logits, wanted.to(start), reduction='sum') / len(x)
            loss.backward()                                                 # its logits go before the next block's come
            total = total.detach() + loss.detach()
        return total
    optimizer.step(closure)
    return weight.detach()
