"""What can be read off frozen features: kNN, linear probe, effective rank."""
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from scoring.metrics import metrics

PROBE_L2 = tuple(10.0 ** k for k in range(-5, 2))       # strengths that the linear probe chooses from
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


def linear_probe(train, valid, test, multi_label, strengths=PROBE_L2, title='', device='cpu'):
    """Logistic regression on features standardised by the training part, its L2 strength chosen on the validation part.

    train, valid: (features (N, d), targets (N, classes)); test: features; title: of a bar over the strengths, '': none
    -> logits (N, classes) of test, chosen strength
    """
    x, v, t = map(torch.from_numpy, standardised(train[0], valid[0], test))
    targets, best = torch.from_numpy(train[1]), None
    weight = torch.zeros(x.shape[1] + 1, targets.shape[1], dtype=torch.float64, device=device)
    # From the strongest: each starts where the last ended.
    for strength in tqdm(strengths[::-1], desc=title, leave=False, disable=not title or None):
        weight = fit_logistic(x, targets, strength, multi_label, weight)
        scores, _ = metrics(outputs(v, weight), valid[1], multi_label)
        score = scores['mAP' if multi_label else 'accuracy']
        if best is None or score > best[0]:
            best = score, strength, outputs(t, weight)
    return best[2], best[1]


def outputs(x, weight):
    """Logits (N, classes) of features (N, d), in float64, a block at a time, on the device of the weight."""
    return torch.cat([(part.to(weight) @ weight[1:] + weight[0]).cpu() for part in x.split(rows_of_block(x))]).numpy()


def rows_of_block(x):
    return max(BLOCK // x.shape[1], 1)


def fit_logistic(x, targets, strength, multi_label, start):
    """Minimise mean loss + strength / 2 |W|^2 (bias free) by L-BFGS, in float64, on the device of start. -> (1 + d,
    classes), bias first

    No copy of x (N, d) in float64 is made if it is larger than a block.
    """
    weight = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=300, tolerance_grad=1e-6, tolerance_change=1e-10,
                                  line_search_fn='strong_wolfe')
    loss_of = F.binary_cross_entropy_with_logits if multi_label else F.cross_entropy
    rows = rows_of_block(x)
    blocks = list(zip(x.split(rows) if len(x) > rows else [x.to(start)], targets.split(rows)))

    def closure():
        optimizer.zero_grad()
        total = strength / 2 * weight[1:].square().sum()
        total.backward()
        for part, wanted in blocks:
            loss = loss_of(part.to(start) @ weight[1:] + weight[0], wanted.to(start), reduction='sum') / len(x)
            loss.backward()                                                 # its logits go before the next block's come
            total = total.detach() + loss.detach()
        return total
    optimizer.step(closure)
    return weight.detach()
