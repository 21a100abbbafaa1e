"""Frozen features of clips of any length: what --embed writes and what probes, kNN and neighbours look at.

Which pooling is for what, with figures: docs/results.md.
"""
from dataclasses import replace

import numpy as np
import torch
from torchaudio.functional import create_dct
from tqdm import tqdm

import data
from audio import HOP_SAMPLES, N_MELS, frames_in, samples_for
from scoring.metrics import NotFiniteError

POOLS = ('bands', 'cepstra', 'mean', 'cls')
N_CEPSTRA = 40          # coefficients of a log-mel frame, as many as torchaudio's MFCC has


# ---------------------------------------------------------------------------------------------- running over many clips

def in_batches(function, clips, spectrum, process, autocast, batch_size=64, workers=0, title=''):
    """Yield (indices, tuple of arrays with a row per clip) of every batch of clips, in order, from
    function(spec, lengths, indices) -> tuple of tensors.

    The batches are shared out among the processes, and every process gets all of them. Raises NotFiniteError.
    """
    batches = data.OrderedBatches(clips, spectrum['frames'], batch_size)
    mine = range(process.rank, len(batches), process.world)
    hidden = not title or not process.is_main
    reading = zip(mine, data.loader(batches, mine, workers))
    for first in tqdm(range(0, len(batches), process.world), desc=title, leave=False, disable=hidden or None):
        found = None
        for k, batch in [next(reading)] if first + process.rank < len(batches) else []:
            pcm, lengths = batch['pcm'].to(process.device), batch['lengths'].to(process.device)
            spec = data.log_mel(pcm, lengths, **spectrum)
            lengths = torch.full_like(lengths, pcm.shape[1]) if spectrum['repeat'] else lengths
            with torch.inference_mode(), autocast():
                found = [part.float().cpu().numpy() for part in function(spec, lengths, of_batch(k, batch_size, clips))]
        for k, parts in enumerate(process.gather(found), first):
            if parts is not None:
                indices = of_batch(k, batch_size, clips)
                finite = np.all([np.isfinite(part).reshape(len(part), -1).all(axis=1) for part in parts], axis=0)
                if not finite.all():
                    guilty = clips.select([indices[finite.argmin()]]).keys()[0]
                    raise NotFiniteError(f'what comes out for {guilty} is not finite')
                yield indices, parts


def of_batch(k, batch_size, clips):
    return np.arange(k * batch_size, min((k + 1) * batch_size, len(clips)))


def over_clips(function, clips, *how, **more):
    """The arrays of in_batches, each whole."""
    return [np.concatenate(parts) for parts in zip(*(parts for _, parts in in_batches(function, clips, *how, **more)))]


# ------------------------------------------------------------------------------------------------------------- features

def features(encoder, clips, spectrum, process, autocast, pool='bands', layer=0, **how):
    """Frozen features of whole clips -> (N, F) float32; F as width() says. See feature_batches."""
    found = np.empty((len(clips), width(encoder.config, pool)), np.float32)
    for indices, rows in feature_batches(encoder, clips, spectrum, process, autocast, [pool], layer, **how):
        found[indices] = rows[pool]
    return found


def feature_batches(encoder, clips, spectrum, process, autocast, pools, layer=0, **how):
    """Yield (indices of clips, {pool: their features (n, F) float32}), in order, of whole clips.

    pools: of 'bands' (mean, then standard deviation over time of the patches of a time step side by side, columns x D
    each), 'cepstra' (these, then the standard deviation over time of the DCT of the patches over the columns, as many),
    'mean' (of all patches, D) and 'cls' (D); 'patches' (P, D), time-major, if no clip is longer than the input.
    layer: of block 1 ... L, or 0, the mean of all blocks' outputs.
    A clip that is longer than the input is seen in windows side by side. Every real frame counts once, padding never: a
    row of patches weighs as many frames as it holds of the clip that no window before has seen, a CLS as many as its
    window. Copies of a clip that is repeated to fill its window (spectrum['repeat']) count like the clip; to leave them
    out was no better (docs/recipe.md). Raises NotFiniteError.
    """
    windows, seen = windows_of(clips, spectrum['frames'])

    def sums(spec, lengths, indices):
        """Sums over the frames of each window: how many they are, then one for each pool, two with deviations."""
        x, cls = states(encoder, spec, layer)                               # (B, rows, columns, D), (B, D)
        weight = real_frames(lengths, seen[indices].to(spec.device), x.shape[1], encoder.config.patch_frames)
        count = weight.sum(dim=1, keepdim=True)
        found, columns = [count], x.shape[2]
        rows = {'mean': lambda: x.mean(dim=2), 'bands': lambda: x.flatten(2),
                'cepstra': lambda: torch.cat([x, cepstra(x, columns)], dim=2).flatten(2)}
        with torch.autocast(x.device.type, enabled=False):                  # bfloat16's squares leave no deviation
            for pool in pools:
                if pool in rows:
                    of_row = rows[pool]()                                   # (B, rows, F)
                    found.append(torch.einsum('br,brf->bf', weight, of_row))
                    if pool != 'mean':
                        found.append(torch.einsum('br,brf->bf', weight, of_row.square()))
                else:
                    found.append(cls * count if pool == 'cls' else x.flatten(1, 2))
        return found

    batches = in_batches(sums, windows, spectrum, process, autocast, **how)
    for indices, parts in summed_by_clip(batches, windows.clip):
        yield indices, pooled(pools, *parts)


def windows_of(clips, frames):
    """Clips cut into windows of so many frames, side by side but for the last, which ends with its clip; and how many
    frames of each the window before it has seen (windows,)."""
    whole = replace(clips, length=samples_for(frames_in(clips.length)))     # what is behind the last frame goes
    windows = whole.windows(samples_for(frames), frames * HOP_SAMPLES, spare=0)
    first = windows.start // HOP_SAMPLES                                    # its first frame in the clip
    is_first = np.diff(windows.clip, prepend=-1) > 0
    return windows, torch.from_numpy(np.where(is_first, 0, np.roll(first, 1) + frames - first))


def summed_by_clip(batches, clip):
    """Yield (indices of clips, their sums) from (indices of windows, arrays with a row for each), in order, whose clips
    are clip (windows,): the last clip of a batch waits for the next, since it may go on there."""
    waiting = None
    for indices, parts in batches:
        of_row, parts = clip[indices], [part.astype(np.float64) for part in parts]
        if waiting is not None:
            of_row, parts = np.append(waiting[0], of_row), [np.concatenate(pair) for pair in zip(waiting[1], parts)]
        starts = np.flatnonzero(np.diff(of_row, prepend=-1))
        found, parts = of_row[starts], [np.add.reduceat(part, starts, axis=0) for part in parts]
        done = len(starts) - (indices[-1] < len(clip) - 1)
        waiting = found[done:], [part[done:] for part in parts]
        if done:
            yield found[:done], [part[:done] for part in parts]


def pooled(pools, count, *sums):
    """Sums over frames, as feature_batches has them -> {pool: features}"""
    found, sums = {}, iter(sums)
    for pool in pools:
        total = next(sums)
        found[pool] = total if pool == 'patches' else total / count
        if pool in ('bands', 'cepstra'):
            mean, deviation = found[pool], np.sqrt(np.maximum(next(sums) / count - found[pool] ** 2, 0))
            if pool == 'cepstra':           # whose means say nothing new: they are sums of the bands'
                mean = mean[:, :mean.shape[1] // 2]
            found[pool] = np.concatenate([mean, deviation], axis=1)
    return {pool: values.astype(np.float32) for pool, values in found.items()}


def states(encoder, spec, layer=0):
    """The encoder's view of every patch, and its CLS: (B, rows, columns, D), (B, D) float32, by block `layer` (1 ... L)
    or as the mean over all blocks' outputs (0)."""
    outputs = []
    hooks = [block.register_forward_hook(lambda _, inputs, output: outputs.append(output[0].float()))
             for block in (encoder.blocks[layer - 1:layer] if layer else encoder.blocks)]
    try:
        encoder(spec)
    finally:
        for hook in hooks:
            hook.remove()
    x, config = sum(outputs) / len(outputs), encoder.config                 # (B, N, D)
    place = (x.shape[1] - 1) // 2 if config.cls_position == 'middle' else 0     # of the CLS inside
    patches = torch.cat([x[:, :place], x[:, place + 1:]], dim=1)
    return patches.unflatten(1, (-1, config.n_mels // config.patch_size)), x[:, place]


def real_frames(lengths, seen, rows, patch_frames):
    """(B, rows) float: how many frames of each row of patches are real, of a clip of `lengths` samples (B,), and not
    among the first `seen` frames (B,)."""
    begin = torch.arange(rows, device=lengths.device) * patch_frames
    stop = torch.minimum(begin + patch_frames, frames_in(lengths)[:, None])
    return (stop - torch.maximum(begin, seen[:, None])).clamp_min(0).float()


def width(config, pool):
    """Features of a clip, F."""
    columns = config.n_mels // config.patch_size
    return {'bands': 2 * columns, 'cepstra': 3 * columns}.get(pool, 1) * config.n_embd


def cepstra(x, count):
    """The first coefficients of the orthonormal DCT-II over bands. (..., bands, D) -> (..., count, D)

    A deviation of the bands knows each by itself; that of their sums knows which of them move together, and tells a
    tone that wanders over two bands from two that come and go (docs/results.md).
    """
    return torch.einsum('...bd,bk->...kd', x, create_dct(count, x.shape[-2], 'ortho').to(x))


def log_mel_statistics(clips, spectrum, process, with_cepstra=False, **how):
    """The baseline that embarrasses weak encoders: mean and standard deviation of every mel band over the real frames
    of whole clips (N, 256); with_cepstra: then the standard deviation of their cepstra (N, 296)."""
    def moments(spec, lengths, _):
        if with_cepstra:
            spec = torch.cat([spec, cepstra(spec[..., None], N_CEPSTRA)[..., 0]], dim=2)
        count = frames_in(lengths).clamp(max=spec.shape[1])[:, None]
        real = (torch.arange(spec.shape[1], device=spec.device) < count).float()[:, :, None]
        mean = (spec * real).sum(dim=1) / count
        variance = ((spec - mean[:, None]).square() * real).sum(dim=1) / count
        return torch.cat([mean[:, :N_MELS], variance.sqrt()], dim=1),
    return over_clips(moments, clips, spectrum, process, torch.no_grad, **how)[0]


def predict(classifier, clips, spectrum, process, autocast, **how):
    """Logits (N, classes)."""
    classifier.eval()
    return over_clips(lambda spec, *_: (classifier(spec),), clips, spectrum, process, autocast, **how)[0]
