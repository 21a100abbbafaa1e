"""placeholder"""
import numpy as np
import torch
import data

@torch.no_grad()
def features(encoder, clips, spectrum, process, autocast, batch_size=64):
    """Frozen features of clips -> (CLS (N, D), mean over the patches that hold sound (N, D)), float32 numpy arrays.

    spectrum: {'frames', 'window', 'mean', 'std'}; the first frames of a clip are seen.
    """
    frames, patch = spectrum['frames'], encoder.config.patch_size
    columns = encoder.config.n_mels // patch
    batches = data.OrderedBatches(clips, frames, batch_size)
    found = [], []
    for batch in data.loader(batches, 0, len(batches)):
        pcm, lengths = batch['pcm'].to(process.device), batch['lengths'].to(process.device)
        with autocast():
            x = encoder(data.log_mel(pcm, lengths, **spectrum)).float()     # (B, 1 + P, D)
        rows = -(-data.frames_in(lengths).clamp(max=frames) // patch)       # rows of patches that hold sound
        real = (torch.arange(x.shape[1] - 1, device=x.device) < (rows * columns)[:, None]).float()
        found[0].append(x[:, 0].cpu())
        found[1].append(((x[:, 1:] * real[:, :, None]).sum(dim=1) / real.sum(dim=1, keepdim=True)).cpu())
    return tuple(torch.cat(part).numpy() for part in found)


def knn_accuracy(train, train_labels, test, test_labels, k=10):
    """Accuracy of the vote of the k nearest training features by cosine; a tie goes to the larger summed similarity."""
    train, test = (torch.nn.functional.normalize(torch.from_numpy(x).float(), dim=1) for x in (train, test))
    train_labels, test_labels = torch.as_tensor(train_labels).long(), torch.as_tensor(test_labels).long()
    similarity, nearest = (test @ train.T).topk(min(k, len(train)), dim=1)          # (N, k)
    votes = torch.zeros(len(test), int(train_labels.max()) + 1)
    votes.scatter_add_(1, train_labels[nearest], 1 + similarity * 1e-4)
    return (votes.argmax(dim=1) == test_labels).float().mean().item()


def effective_rank(features):
    """exp of the entropy of the normalised singular values of centred features: D if all directions are used alike, 1 if collapsed."""
    values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    share = values / max(values.sum(), 1e-12)
    return float(np.exp(-(share * np.log(share + 1e-12)).sum()))
