"""Audio: log-mel spectrograms of whole batches, block masks, packed clips in their order, augmentation.

Sound travels as int16 PCM from packed clips (written by prepare.py) to the device, and becomes a normalised log-mel
spectrogram there, a batch at a time. Every random choice is a function of (seed, stream, step, place in the global
batch), so that it depends neither on the number of processes or workers nor on accumulation, and a resumed run goes on
exactly.

This file must not know networks, checkpoints or command lines.
"""
import functools
import hashlib
import json
import os
import re
import signal

import numpy as np
import torch
import torch.nn.functional as F
from torchaudio.compliance import kaldi

SAMPLE_RATE = 16000
WINDOW_SAMPLES = 400        # 25 ms
HOP_SAMPLES = 160           # 10 ms
N_MELS = 128
WINDOWS = ('hamming', 'hanning')
FORMAT_VERSION = 1
MAX_OPEN_SHARDS = 128       # memory maps that a process keeps, each a file descriptor; AudioSet has some 930 shards


class DataError(Exception):
    """Data that is missing or wrong: the message is one line that names the file and says what to do."""


# ----------------------------------------------------------------------------------------------------------- randomness

STREAMS = ('order', 'crop', 'mask', 'noise', 'augment', 'mixup', 'few_labels')


def random(seed, stream, *where):
    """A numpy generator for one purpose (a name in STREAMS) at one place, say (step, place in the global batch)."""
    return np.random.default_rng([seed, STREAMS.index(stream), *where])


def torch_random(device, seed, stream, *where):
    """The same for torch, on the device."""
    state = int(random(seed, stream, *where).integers(2 ** 63))
    return torch.Generator(device).manual_seed(state)


# --------------------------------------------------------------------------------------------------------- spectrograms

def frames_in(samples):
    """Frames of a clip of that many samples (kaldi's snip_edges); works on numbers and tensors."""
    return (samples - WINDOW_SAMPLES) // HOP_SAMPLES + 1


def samples_for(frames):
    """The fewest samples that give so many frames."""
    return (frames - 1) * HOP_SAMPLES + WINDOW_SAMPLES


@functools.lru_cache(maxsize=8)
def window_and_banks(window, device):
    """(400,) kaldi window (symmetric, unlike torch's default) and the (257, 128) mel filters, 20 Hz - 8 kHz, in blocks.

    A filter covers few of the 257 frequencies, so that blocks of 16 filters spare three quarters of the product. Each:
    (first, last) row of the interleaved squares of real and imaginary parts that it needs, and its weights for them.
    """
    make = {'hamming': torch.hamming_window, 'hanning': torch.hann_window}[window]
    banks, _ = kaldi.get_mel_banks(N_MELS, 512, SAMPLE_RATE, 20.0, 0.0, 100.0, -500.0, 1.0)         # (128, 256)
    blocks = []
    for filters in banks.split(16):
        used = filters.any(dim=0).nonzero()
        first, last = int(used[0]), int(used[-1]) + 1
        blocks.append((2 * first, 2 * last, filters[:, first:last].T.repeat_interleave(2, dim=0).to(device)))
    return make(WINDOW_SAMPLES, periodic=False).to(device), blocks


def fbank(wave, lengths, window='hamming'):
    """Kaldi's log-mel filterbank of a batch, equal to torchaudio.compliance.kaldi.fbank clip by clip, to rounding.

    wave (B, samples) float32 in [-1, 1], zero behind each clip's end; lengths (B,) its real samples; window 'hamming'
    or 'hanning'. -> (B, frames, 128): natural logarithm of the mel energies, 0 in the frames behind a clip's last.
    """
    weights, blocks = window_and_banks(window, wave.device)
    frames = wave.unfold(1, WINDOW_SAMPLES, HOP_SAMPLES)                    # (B, frames, 400), nothing copied
    energies = wave.new_empty(*frames.shape[:2], N_MELS)
    # On a CPU one clip at a time: its frames stay in the cache, several times faster than the whole batch.
    size = 1 if wave.device.type == 'cpu' else max(len(wave), 1)
    for some, out in zip(frames.split(size), energies.split(size)):
        log_energies(some, weights, blocks, out)
    real = torch.arange(energies.shape[1], device=wave.device) < frames_in(lengths)[:, None]
    return energies * real[:, :, None]


def log_energies(frames, window, blocks, out):
    """(B, frames, 400) -> out (B, frames, 128). Up to the spectrum with kaldi's very rounding, which in a frame with
    one loud frequency is what the quiet ones hold."""
    frames = frames - frames.mean(dim=2, keepdim=True)                      # DC offset
    padded = frames.new_zeros(*frames.shape[:2], 512)
    inside = padded[..., :WINDOW_SAMPLES]
    previous = 0.97 * frames                                                # pre-emphasis; the first sample is its own
    torch.sub(frames[..., 1:], previous[..., :-1], out=inside[..., 1:])     # predecessor
    torch.sub(frames[..., :1], previous[..., :1], out=inside[..., :1])
    inside *= window
    spectrum = torch.fft.rfft(padded)                                       # (B, frames, 257)
    squares = torch.view_as_real(spectrum).flatten(2).square_()             # (B, frames, 514), real and imaginary parts
    torch.cat([squares[..., first:last] @ weights for first, last, weights in blocks], dim=2, out=out)
    out.clamp_min_(torch.finfo(torch.float32).eps).log_()


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
    x = fbank(wave, lengths, window)[:, :frames]
    x = F.pad(x, (0, 0, 0, frames - x.shape[1]))                            # zeros in the log-mel domain
    return (x - mean) / (2 * std)


# ---------------------------------------------------------------------------------------------------------------- masks

def block_masks(batch, n_students, grid, mask_ratio, block, generator, adjust=0.07):
    """Inverse block masks with an exact count (data2vec 2.0): blocks of patches are KEPT, the rest is masked.

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


# --------------------------------------------------------------------------------------------------------- packed clips

class Clips:
    """Chosen clips of one or more prepared sets: index arrays in memory, PCM in memory-mapped shards.

    Arrays, one entry per clip: shard, offset and length (samples), fold (index into fold_names), hash (stable, of
    its key), label (class index, -1 without one; or packed bits (n, ceil(classes / 8)) for multi-label sets).
    """

    def __init__(self, shards, arrays, metas):
        self.shards, self.arrays, self.metas = shards, arrays, metas
        self.opened = {}

    def __len__(self):
        return len(self.arrays['offset'])

    def __getattr__(self, name):
        if name.startswith('__') or name == 'arrays' or name not in self.arrays:
            raise AttributeError(name)
        return self.arrays[name]

    def __getstate__(self):                                                 # a worker process opens the shards itself
        return {**self.__dict__, 'opened': {}}

    @property
    def classes(self):
        return self.metas[0]['classes']

    @property
    def multi_label(self):
        return self.metas[0]['multi_label']

    def select(self, chosen):
        """The clips at these indices, or where this mask is True."""
        return Clips(self.shards, {name: array[chosen] for name, array in self.arrays.items()}, self.metas)

    def read(self, i, start=0, count=None):
        """int16 samples of clip i, at most count of them from start."""
        shard, offset, length = int(self.shard[i]), int(self.offset[i]), int(self.length[i])
        if shard not in self.opened:
            if len(self.opened) == MAX_OPEN_SHARDS:
                del self.opened[next(iter(self.opened))]
            self.opened[shard] = np.memmap(self.shards[shard] + '.pcm', dtype=np.int16, mode='r')
        stop = length if count is None else min(length, start + count)
        return np.asarray(self.opened[shard][offset + start:offset + stop])

    def windows(self, samples, hop):
        """These clips cut into windows of so many samples, one every hop samples and the last at the clip's end.

        A tail of less than one patch behind the last window is left out. -> Clips with two more arrays: clip, the index
        of each window's clip, and start, where in it the window begins (samples).
        """
        tail = np.maximum(self.length - samples - 16 * HOP_SAMPLES, 0)
        counts = 1 + -(-tail // hop)
        clip = np.repeat(np.arange(len(self)), counts)
        windows = self.select(clip)
        number = np.arange(len(clip)) - np.repeat(np.cumsum(counts) - counts, counts)       # of the window in its clip
        start = np.minimum(number * hop, np.maximum(windows.length - samples, 0))
        windows.arrays.update(clip=clip, start=start, offset=windows.offset + start,
                              length=np.minimum(windows.length - start, samples))
        windows.opened = self.opened
        return windows

    def keys(self):
        """The file names, read from the shards when asked for (they are the larger part of an index)."""
        loaded = {shard: np.load(self.shards[shard] + '.npz')['keys'] for shard in np.unique(self.shard)}
        return [str(loaded[shard][row]) for shard, row in zip(self.shard, self.row)]

    def targets(self, indices):
        """(len(indices), classes) float32: one-hot, or several ones per row for a multi-label set."""
        if self.multi_label:
            return np.unpackbits(self.label[indices], axis=1, count=len(self.classes)).astype(np.float32)
        return np.eye(len(self.classes), dtype=np.float32)[self.label[indices]]

    def statistics(self, window):
        """Mean and standard deviation of the log-mel values over all real frames of these clips."""
        total, squares = self.stats[:, WINDOWS.index(window)].sum(axis=0)
        count = float(frames_in(self.length).sum() * N_MELS)
        mean = total / count
        variance = squares / count - mean ** 2
        if not variance > 1e-6:
            names = ', '.join(meta['name'] for meta in self.metas)
            raise DataError(f'the log-mel values of {names} do not vary: silence, or a damaged set')
        return float(mean), float(np.sqrt(variance))

    def fingerprint(self):
        """A short text that changes when the chosen clips or their order change."""
        digest = hashlib.sha256(json.dumps([m['name'] for m in self.metas]).encode())
        for name in ('hash', 'length', 'label', 'stats'):
            digest.update(np.ascontiguousarray(self.arrays[name]).tobytes())
        return digest.hexdigest()[:16]


def words(text):
    """'a, b' -> ['a', 'b']"""
    return [word.strip() for word in text.split(',') if word.strip()]


def open_clips(names, data_dir='data', splits=('train',), leave_out=(), only_fold=None):
    """Open prepared sets as one list of clips.

    names: prepared sets, folders in data_dir. splits: those to take. leave_out: 'set/part' to leave out, a part being
    one of the set's splits or folds (a speaker, 1 to 5, ...). only_fold: keep nothing but this fold. Raises DataError.
    """
    if not names or len(set(names)) < len(names):
        raise DataError(f'dataset = {",".join(names)!r} must name prepared sets, each once: write --dataset=NAME')
    metas, shards, parts = [], [], []
    for name in names:
        folder = os.path.join(data_dir, name)
        meta = read_meta(folder)
        out = left_out_of(name, meta, names, leave_out)
        if only_fold is not None and only_fold not in meta['folds']:
            raise DataError(f'fold {only_fold!r} is not in {folder}: its folds are '
                            f'{", ".join(meta["folds"]) or "none"}')
        for split in splits:
            if split in out:
                continue
            found = 0
            for row_count, base, index in read_shards(folder, split, meta):
                folds = np.array(meta['folds'] + [''])[index['fold']] if row_count else np.array([], dtype=str)
                chosen = ~np.isin(folds, out)
                if only_fold is not None:
                    chosen &= folds == only_fold
                found += row_count
                index.update(shard=np.full(row_count, len(shards), np.int32), row=np.arange(row_count, dtype=np.int32))
                parts.append({key: array[chosen] for key, array in index.items()})
                shards.append(base)
            counted = meta.get('splits', {}).get(split, {}).get('clips', found)
            if found != counted:
                raise DataError(f'{folder} holds {found} clips of the split {split}, its meta.json counts {counted}: '
                                'a shard is missing; prepare the set again')
        metas.append(meta)
    if len(metas) > 1:                                                  # classes of different sets have no common order
        parts = [{**part, 'label': np.full(len(part['offset']), -1, np.int32)} for part in parts]
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if parts else {}
    if not parts or not len(arrays['offset']):
        raise DataError(f'no clips left in {", ".join(names)} (splits {", ".join(splits)}, fold {only_fold}, '
                        f'left out: {", ".join(leave_out) or "nothing"})')
    return Clips(shards, arrays, metas)


def left_out_of(name, meta, names, leave_out):
    """The folds and splits of this set that leave_out names; every entry must name a set in use and a part of it."""
    splits, parts = sorted(meta.get('splits', {})), []
    for entry in leave_out:
        owner, slash, part = entry.partition('/')
        if not slash or owner not in names:
            raise DataError(f'leave_out: {entry!r} is not SET/FOLD or SET/SPLIT of one of {", ".join(names)}')
        if owner == name:
            if part not in meta['folds'] and part not in splits:
                raise DataError(f'leave_out: {name} has no fold or split {part!r}, only '
                                f'{", ".join(meta["folds"] + splits)}')
            parts.append(part)
    return parts


def read_meta(folder):
    """The checked meta.json of a prepared set."""
    path = os.path.join(folder, 'meta.json')
    try:
        with open(path, encoding='utf-8') as f:
            meta = json.load(f)
    except FileNotFoundError:
        raise DataError(f'{path} is missing: prepare the set first, see `python prepare.py --help`') from None
    except (OSError, ValueError) as error:
        raise DataError(f'{path} cannot be read ({error}): prepare the set again') from None
    wanted = {'name': str, 'version': int, 'sample_rate': int, 'classes': list, 'multi_label': bool, 'folds': list,
              'splits': dict}
    for key, kind in wanted.items():
        value = meta.get(key) if isinstance(meta, dict) else None
        if not isinstance(value, kind) or kind is list and not all(isinstance(word, str) for word in value):
            raise DataError(f'{path} has no valid {key!r}: prepare the set again')
    if not all(isinstance(split, dict) for split in meta['splits'].values()):
        raise DataError(f'{path} has no valid \'splits\': prepare the set again')
    if meta['version'] != FORMAT_VERSION or meta['sample_rate'] != SAMPLE_RATE:
        raise DataError(f'{path} is of format {meta["version"]} at {meta["sample_rate"]} Hz; this code reads format '
                        f'{FORMAT_VERSION} at {SAMPLE_RATE} Hz: prepare the set again')
    return meta


def read_shards(folder, split, meta):
    """Yield (clips, path without suffix, {array name: array}) of every shard of a split,
    checked against its PCM file."""
    pattern = re.compile(re.escape(split) + r'-\d{5}\.npz')
    for file in sorted(f for f in os.listdir(folder) if pattern.fullmatch(f)):
        base = os.path.join(folder, file[:-4])
        try:
            with np.load(base + '.npz', allow_pickle=False) as stored:
                index = {'offset': stored['offsets'], 'length': stored['lengths'], 'label': stored['labels'],
                         'fold': stored['folds'], 'hash': stored['hashes'], 'stats': stored['stats']}
            size = os.path.getsize(base + '.pcm') // 2
        except Exception as error:          # a damaged or hostile file can fail in any way; it is not a shard
            raise DataError(f'the shard {base} cannot be read ({type(error).__name__}: {str(error)[:100]}): delete it '
                            'and prepare the set again') from None
        if not shard_is_sound(index, size, meta):
            raise DataError(f'the shard {base} does not fit its .pcm file or meta.json: delete it and prepare the set '
                            'again')
        yield len(index['offset']), base, index


def shard_is_sound(index, size, meta):
    """Whether the arrays of a shard have the right types and shapes and stay within the PCM file and the classes."""
    clips, label_dims = index['offset'].shape[:1], 2 if meta['multi_label'] else 1
    kinds = {'offset': ('i', 1), 'length': ('i', 1), 'label': ('iu', label_dims), 'fold': ('i', 1), 'hash': ('u', 1),
             'stats': ('f', 3)}
    if any(array.dtype.kind not in kinds[name][0] or array.ndim != kinds[name][1] or array.shape[:1] != clips
           for name, array in index.items()) or index['stats'].shape[1:] != (len(WINDOWS), 2):
        return False
    offset, length, fold, label = (index[name] for name in ('offset', 'length', 'fold', 'label'))
    if meta['multi_label']:
        labels_fit = label.shape[1] == -(-len(meta['classes']) // 8)
    else:
        labels_fit = ((label >= -1) & (label < len(meta['classes']))).all()
    return bool(labels_fit and (offset >= 0).all() and (length >= WINDOW_SAMPLES).all()
                and (offset <= size - length).all() and (fold >= -1).all() and (fold < len(meta['folds'])).all()
                and np.isfinite(index['stats']).all())


def key_hash(key):
    """A stable 32-bit number of a file name: the same on every machine, for splits that do not depend on order."""
    return int.from_bytes(hashlib.sha1(key.encode('utf-8', 'surrogateescape')).digest()[:4], 'big')


def carve_validation(clips, part):
    """Split training clips into (rest, validation) by the stable hash of their keys; part is validation's share."""
    is_valid = clips.hash % 1000 < round(part * 1000)
    return clips.select(~is_valid), clips.select(is_valid)


def few_labels(clips, per_class, seed):
    """per_class clips of every class, drawn by the seed; not for sets with several labels per clip."""
    if clips.multi_label or per_class < 0:
        raise DataError(f'labels_per_class = {per_class} needs a set with one label per clip, and at least 1 (0: all)')
    draws = random(seed, 'few_labels').random(len(clips))
    chosen = []
    for label in range(len(clips.classes)):
        of_class = np.flatnonzero(clips.label == label)
        if len(of_class) < per_class:
            raise DataError(f'labels_per_class = {per_class}, but class {clips.classes[label]!r} has {len(of_class)} '
                            'clips')
        chosen.append(of_class[np.argsort(draws[of_class], kind='stable')[:per_class]])
    return clips.select(np.sort(np.concatenate(chosen)))


def sampling_weights(clips):
    """(n,) weight of every clip: the sum over its labels of 1000 / (clips of that label + 0.01), as in AudioMAE."""
    counts, parts = np.zeros(len(clips.classes)), [slice(i, i + 16384) for i in range(0, len(clips), 16384)]
    for part in parts:                                                      # two million clips x 527 would not fit
        counts += clips.targets(part).sum(axis=0)
    of_label = (1000 / (counts + 0.01)).astype(np.float32)
    return np.concatenate([clips.targets(part) @ of_label for part in parts])


def open_test(name, data_dir='data', fold=''):
    """The clips that a labelled set is tested on: all of a fold, or the test (or eval) split. Raises DataError."""
    meta = read_meta(os.path.join(data_dir, name))
    if not meta['classes']:
        raise DataError(f'{name} has no labels: prepare it from folders named after their classes')
    splits = list(meta.get('splits', {}))
    if fold:
        return open_clips([name], data_dir, splits, only_fold=fold)
    if not {'test', 'eval'} & set(splits):
        some_fold = meta['folds'][0] if meta['folds'] else '?'
        raise DataError(f'{name} has no test split: name a fold to test on, --fold={some_fold}')
    return open_clips([name], data_dir, [split for split in splits if split in ('test', 'eval')])


def task_splits(name, data_dir='data', fold='', labels_per_class=0, seed=1, validation_part=0.1, test_name=''):
    """(train, valid, test) clips of a labelled set, and the whole training split, for its statistics. Raises DataError.

    fold: test on all clips of that fold and train without it; '': test on the set's test (or eval) split, or on that of
    the set test_name. The validation part is the set's own, or carved from the training split by a stable hash; 0: no
    clips. labels_per_class: so many training clips of each class.
    """
    test = open_test(test_name or name, data_dir, fold)
    leave_out = [f'{name}/{fold}'] if fold else []
    whole = train = open_clips([name], data_dir, ['train'], leave_out)
    if test.classes != train.classes:
        raise DataError(f'{test_name} has other classes than {name}: {len(test.classes)} and {len(train.classes)}')
    if 'valid' in train.metas[0].get('splits', {}):
        valid = open_clips([name], data_dir, ['valid'], leave_out)
    else:
        train, valid = carve_validation(train, validation_part)
    if labels_per_class:
        train = few_labels(train, labels_per_class, seed)
    if not len(train) or not len(valid) and validation_part:
        raise DataError(f'{name}: {len(train)} training and {len(valid)} validation clips; change validation_part')
    return train, valid, test, whole


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
        self.__dict__.update({name: value for name, value in locals().items() if name not in ('self', 'weights')})
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

    def __len__(self):
        return -(-len(self.clips) // self.batch_size)

    def __getitem__(self, k):
        chosen = range(k * self.batch_size, min((k + 1) * self.batch_size, len(self.clips)))
        return stack([self.clips.read(i, count=self.samples) for i in chosen], self.samples)


def loader(batches, items, workers=0, pin=False):
    """Iterate over these items (a range) of a batch dataset, ahead of time in worker processes if there are any."""
    return torch.utils.data.DataLoader(batches, batch_size=None, sampler=items, num_workers=workers, pin_memory=pin,
                                       prefetch_factor=4 if workers else None,
                                       worker_init_fn=quiet_worker if workers else None)


def quiet_worker(worker):
    """Ctrl-C and SIGTERM, which reach a whole group, are the main process's to handle; a worker goes on until that ends
    it. Nor may it use its siblings' cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
