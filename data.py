"""Audio: log-mel spectrograms of whole batches, block masks, packed clips in their order, augmentation.

Sound travels as int16 PCM from packed clips (written by prepare.py) to the device, and becomes a normalised log-mel
spectrogram there, a batch at a time. Every random choice is a function of (seed, stream, step, place in the global
batch), so that it depends neither on the number of processes or workers nor on accumulation, and a resumed run goes on
exactly.

This file must not know networks, checkpoints or command lines.
"""
import functools

import numpy as np
import torch
import torch.nn.functional as F
from torchaudio.compliance import kaldi

from audio import HOP_SAMPLES, N_MELS, SAMPLE_RATE, WINDOW_SAMPLES, frames_in, samples_for
from engine.loading import loader  # noqa: F401  (data.loader)
from engine.randomness import random
from fast import spectrogram

# --------------------------------------------------------------------------------------------------------- spectrograms

@functools.lru_cache(maxsize=8)
def window_and_filters(window, device):
    """(400,) kaldi window (symmetric, unlike torch's default) and the (257, 128) mel filters, 20 Hz - 8 kHz."""
    make = {'hamming': torch.hamming_window, 'hanning': torch.hann_window}[window]
    filters, _ = kaldi.get_mel_banks(N_MELS, 512, SAMPLE_RATE, 20.0, 0.0, 100.0, -500.0, 1.0)       # (128, 256)
    return make(WINDOW_SAMPLES, periodic=False).to(device), F.pad(filters, (0, 1)).T.to(device)


def fbank(wave, lengths, window='hamming'):
    """Kaldi's log-mel filterbank of a batch, equal to torchaudio.compliance.kaldi.fbank clip by clip.

    wave (B, samples) float32 in [-1, 1], zero behind each clip's end; lengths (B,) its real samples; window 'hamming'
    or 'hanning'. -> (B, frames, 128): natural logarithm of the mel energies, 0 in the frames behind a clip's last.
    """
    weights, filters = window_and_filters(window, wave.device)
    frames = wave.unfold(1, WINDOW_SAMPLES, HOP_SAMPLES)                    # (B, frames, 400)
    frames = frames - frames.mean(dim=2, keepdim=True)                      # DC offset
    previous = torch.cat([frames[..., :1], frames[..., :-1]], dim=2)        # the first sample is its own predecessor
    frames = (frames - 0.97 * previous) * weights                           # pre-emphasis
    power = torch.fft.rfft(frames, n=512).abs() ** 2                        # (B, frames, 257)
    energies = (power @ filters).clamp_min(torch.finfo(torch.float32).eps).log()
    return energies * (torch.arange(frames.shape[1], device=wave.device) < frames_in(lengths)[:, None])[:, :, None]


def log_mel(pcm, lengths, frames, window, mean, std, gain=None, repeat=False):
    """Int16 PCM to the network's input: scale, remove the clip's mean, fbank, pad with 0 or cut, normalise.

    pcm (B, samples) int16, lengths (B,) real samples, gain (B,) factors or None; repeat: a clip that is shorter than
    its row starts again at its end instead of being padded. -> (B, frames, 128) float32, (x - mean) / (2 std)
    """
    wave = pcm.float() / 32768
    real = torch.arange(wave.shape[1], device=wave.device) < lengths[:, None]
    wave = (wave - (wave * real).sum(dim=1, keepdim=True) / lengths[:, None].clamp_min(1)) * real
    if gain is not None:
        wave = wave * gain[:, None]
    if repeat:
        wave = wave.gather(1, torch.arange(wave.shape[1], device=wave.device) % lengths[:, None])
        lengths = torch.full_like(lengths, wave.shape[1])
    if wave.shape[1] < WINDOW_SAMPLES:
        wave = F.pad(wave, (0, WINDOW_SAMPLES - wave.shape[1]))
    x = spectrogram.fbank(wave, lengths, window)[:, :frames]                # data.fbank, in less time
    x = F.pad(x, (0, 0, 0, frames - x.shape[1]))                            # zeros in the log-mel domain
    return (x - mean) / (2 * std)


# ---------------------------------------------------------------------------------------------------------------- masks

def block_masks(batch, n_students, grid, mask_ratio, block, generator, adjust=0.07):
    """Inverse block masks with an exact count (data2vec 2.0): blocks of patches are KEPT, the rest is masked.
    Why inverse: of 80 % masked in blocks, scattered crumbs are left; what is kept in blocks holds some context.

    grid (rows, columns) of patches; block: side of a block; adjust: extra share of blocks, since blocks overlap;
    generator: torch.Generator, whose device the masks are on. -> (batch, n_students, rows * columns) bool,
    True = masked; int(P * (1 - mask_ratio)) are False in every view.
    """
    rows, columns = grid
    patches, views, device = rows * columns, batch * n_students, generator.device
    n_keep = int(patches * (1 - mask_ratio))
    n_blocks = int(patches * (1 - mask_ratio + adjust) / block ** 2)
    centre = torch.randint(patches, (views, n_blocks), generator=generator, device=device)
    offset = torch.arange(block, device=device) - block // 2
    # (V, blocks, block); the border takes what lies beyond it, so that edge blocks are truncated
    row = (centre[:, :, None] // columns + offset).clamp(0, rows - 1)
    column = (centre[:, :, None] % columns + offset).clamp(0, columns - 1)
    cells = row[:, :, :, None] * columns + column[:, :, None, :]            # (V, blocks, block, block)
    # Blocks score 1, all places a random part in [0, 1):
    # the n_keep highest are the blocks, thinned or filled up at random.
    score = torch.zeros(views, patches, device=device).scatter_(1, cells.flatten(1), 1.0)
    score += torch.rand(views, patches, generator=generator, device=device)
    keep = score.topk(n_keep, dim=1, sorted=False).indices
    mask = torch.ones(views, patches, dtype=torch.bool, device=device).scatter_(1, keep, False)
    return mask.view(batch, n_students, patches)


# -------------------------------------------------------------------------------------------------------------- batches

class Order:
    """The endless order of training clips, by seed and epoch alone: a fresh permutation of all of them per epoch, or,
    with weights (clips,), per_epoch of them drawn anew."""

    def __init__(self, clips, seed, weights=None, per_epoch=0):
        self.clips, self.seed, self.weights = clips, seed, weights
        self.per_epoch = clips if weights is None else min(per_epoch, int((weights > 0).sum()))
        self.epoch = self.drawn = None

    def at(self, position):
        """The clip at a position counted from the start of training."""
        epoch, place = divmod(position, self.per_epoch)
        if epoch != self.epoch:
            generator = random(self.seed, 'order', epoch)
            self.epoch, self.drawn = epoch, (
                generator.permutation(self.clips) if self.weights is None
                else weighted_draw(self.weights, self.per_epoch, generator))
        return int(self.drawn[place])


def weighted_draw(weights, count, generator):
    """count different indices, drawn one after the other with chances in proportion to the weights that are left, then
    shuffled. The smallest of exponential waiting times with these rates are such a draw (Efraimidis and Spirakis 2006).
    """
    with np.errstate(divide='ignore'):                                      # a clip without labels waits for ever
        waiting = generator.standard_exponential(len(weights)) / weights
    return generator.permutation(np.argpartition(waiting, count - 1)[:count])


def stack(waves, samples):
    """int16 arrays -> pcm (B, samples), zero behind each clip's end, and lengths (B,)."""
    pcm = np.zeros((len(waves), samples), np.int16)
    for row, wave in zip(pcm, waves):
        row[:len(wave)] = wave
    return {'pcm': torch.from_numpy(pcm), 'lengths': torch.tensor([len(wave) for wave in waves])}


class PretrainBatches(torch.utils.data.Dataset):
    """Item k: this process's clips of step k, random crops of clips that are longer than the input.

    join: shorter clips are followed by others, drawn at random, until the input is full, instead of by padding.
    """

    def __init__(self, clips, frames, batch_size, places, seed, join=False):
        self.clips, self.samples, self.batch_size, self.places, self.seed = (
            clips, samples_for(frames), batch_size, places, seed)
        self.join, self.order = join, Order(len(clips), seed)

    def __getitem__(self, step):
        waves = []
        for place in self.places:
            generator = random(self.seed, 'crop', step, place)
            wave = self.crop(self.order.at(step * self.batch_size + place), self.samples, generator)
            while self.join and len(wave) < self.samples:
                wave = np.append(wave, self.crop(generator.integers(len(self.clips)), self.samples - len(wave),
                                                 generator))
            waves.append(wave)
        return stack(waves, self.samples)

    def crop(self, i, samples, generator):
        """At most so many samples of clip i, from anywhere in it."""
        spare = max(int(self.clips.length[i]) - samples, 0)
        return self.clips.read(i, int(generator.integers(spare + 1)), samples)


def mirrored_places(batch_size, part, parts):
    """Places of the global batch that part of parts takes: pairs p, batch_size - 1 - p, so that the mixup partner of
    every place (the batch reversed) lies in the same part, and reversing the part finds it."""
    if parts == 1:
        return list(range(batch_size))
    pairs = batch_size // 2 // parts
    first = list(range(part * pairs, (part + 1) * pairs))
    return first + [batch_size - 1 - place for place in reversed(first)]


class FinetuneBatches(torch.utils.data.Dataset):
    """Item k: this process's labelled clips of step k with every number that their augmentation draws."""

    def __init__(self, clips, frames, batch_size, places, seed, n_layer, roll=False, noise=False, mask_ratio=0.0,
                 mixup=0.0, mixup_probability=0.9, weights=None, epoch_clips=0):
        self.clips, self.frames, self.batch_size, self.places, self.seed, self.n_layer = (
            clips, frames, batch_size, places, seed, n_layer)
        self.roll, self.noise, self.mask_ratio = roll, noise, mask_ratio
        self.mixup, self.mixup_probability = mixup, mixup_probability
        self.samples = samples_for(frames)
        self.order = Order(len(clips), seed, weights, epoch_clips)

    def __getitem__(self, step):
        chosen = [self.order.at(step * self.batch_size + place) for place in range(self.batch_size)]
        waves, draws = [], []
        for place in self.places:
            generator = random(self.seed, 'augment', step, place)
            wave = self.clips.read(chosen[place], count=None if self.roll else self.samples)
            if self.roll:                                               # circular, over the whole clip, before the cut
                wave = np.roll(wave, generator.integers(len(wave)))[:self.samples]
            waves.append(wave)
            draws.append(self.draw(generator))
        labels = self.clips.targets(np.array(chosen))                       # (global batch, classes)
        batch = stack(waves, self.samples)
        batch.update({name: torch.as_tensor(np.array([draw[name] for draw in draws])) for name in draws[0]})
        batch['labels'] = torch.from_numpy(labels[self.places])
        batch['label_sum'] = torch.tensor(labels.sum())                 # mixing with the reversed batch keeps this sum
        mix = random(self.seed, 'mixup', step)
        mixes = self.mixup > 0 and mix.random() < self.mixup_probability
        batch['mix'] = torch.tensor(mix.beta(self.mixup, self.mixup) if mixes else 1.0, dtype=torch.float32)
        return batch

    def draw(self, generator):
        """The random numbers of one clip: gain, frequency and time mask, noise and shift, stochastic depth."""
        def span(size):                                                     # a mask: width U[0, ratio * size), anywhere
            width = generator.random() * self.mask_ratio * size
            start = int(generator.random() * (size - width))
            return start, start + int(width)
        draws = {'gain': np.float32(generator.beta(10, 10) + 0.5 if self.roll else 1.0),
                'bands': span(N_MELS), 'times': span(self.frames),
                'noise': np.float32(generator.random() * 0.1 if self.noise else 0.0),
                'shift': generator.integers(-10, 10) if self.noise else 0,
                'draws': generator.random((self.n_layer, 2), dtype=np.float32)}
        if self.noise:
            draws['noise_seed'] = generator.integers(2 ** 62)
        return draws


def augment(x, batch):
    """Noise and shift, mixup with the reversed batch, one frequency and one time mask, in this order, on spectrograms.

    x (B, frames, 128) normalised; batch: an item of FinetuneBatches on x's device
    -> x alike, labels (B, classes) mixed alike.
    """
    B, frames, bands = x.shape
    if 'noise_seed' in batch:
        noise = [torch.rand(frames, bands, generator=torch.Generator(x.device).manual_seed(int(s)), device=x.device)
                 for s in batch['noise_seed']]
        x = x + torch.stack(noise) * batch['noise'][:, None, None]
        time = (torch.arange(frames, device=x.device) - batch['shift'][:, None]) % frames      # (B, frames)
        x = x.gather(1, time[:, :, None].expand(-1, -1, bands))
    x = batch['mix'] * x + (1 - batch['mix']) * x.flip(0)
    labels = batch['mix'] * batch['labels'] + (1 - batch['mix']) * batch['labels'].flip(0)
    for axis, (start, stop) in ((2, batch['bands'].T), (1, batch['times'].T)):
        place = torch.arange(x.shape[axis], device=x.device)
        hidden = (place >= start[:, None]) & (place < stop[:, None])        # (B, bands or frames)
        x = x.masked_fill(hidden.unsqueeze(3 - axis), 0.0)
    return x, labels


class OrderedBatches(torch.utils.data.Dataset):
    """Item k: the k-th batch of clips in their own order, first frames only; for evaluation."""

    def __init__(self, clips, frames, batch_size):
        self.clips, self.samples, self.batch_size = clips, samples_for(frames), batch_size
        self.places = range(batch_size)

    def __len__(self):
        return -(-len(self.clips) // self.batch_size)

    def __getitem__(self, k):
        chosen = range(k * self.batch_size, min((k + 1) * self.batch_size, len(self.clips)))
        return stack([self.clips.read(i, count=self.samples) for i in chosen], self.samples)
