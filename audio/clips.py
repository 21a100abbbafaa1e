"""Prepared sets: packed clips in memory-mapped shards with their index, and the splits of a task.

prepare.py writes them. Their files are hostile input too: checked before they are used.
"""
import hashlib
import json
import os
import re

import numpy as np

from audio import HOP_SAMPLES, N_MELS, SAMPLE_RATE, WINDOW_SAMPLES, WINDOWS, frames_in
from engine.errors import DataError
from engine.randomness import random

FORMAT_VERSION = 1
MAX_OPEN_SHARDS = 128       # memory maps that a process keeps, each a file descriptor; AudioSet has some 930 shards


class Clips:
    """Chosen clips of one or more prepared sets: index arrays in memory, PCM in memory-mapped shards.

    Arrays, one entry per clip: shard, offset and length (samples), fold (index into fold_names), hash (stable, of
    its key), label (class index, -1 without one; or packed bits (n, ceil(classes / 8)) for multi-label sets).
    """

    def __init__(self, shards, arrays, metas):
        self.shards, self.arrays, self.metas = shards, arrays, metas
        self.opened = {}

    @classmethod
    def of_waves(cls, waves, keys):
        """Clips in memory, of int16 arrays and their names."""
        lengths = np.array([len(wave) for wave in waves])
        return cls([np.concatenate(waves)], {'shard': np.zeros(len(waves), int), 'length': lengths,
                                             'offset': np.cumsum(lengths) - lengths, 'key': np.array(keys)}, [])

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
            pcm = self.shards[shard]                                        # the path of a file, or its samples
            self.opened[shard] = pcm if isinstance(pcm, np.ndarray) else np.memmap(pcm + '.pcm', np.int16, 'r')
        stop = length if count is None else min(length, start + count)
        return np.asarray(self.opened[shard][offset + start:offset + stop])

    def windows(self, samples, hop):
        """These clips cut into windows of so many samples, one every hop samples and the last at the clip's end.

        A tail of less than one patch behind the last window is left out, unless hop is finer than that. -> Clips with
        two more arrays: clip, the index of each window's clip, and start, where in it the window begins (samples).
        """
        spare = 16 * HOP_SAMPLES if hop >= 16 * HOP_SAMPLES else 0
        counts = 1 + -(-np.maximum(self.length - samples - spare, 0) // hop)
        clip = np.repeat(np.arange(len(self)), counts)
        windows = self.select(clip)
        number = np.arange(len(clip)) - np.repeat(np.cumsum(counts) - counts, counts)       # of the window in its clip
        start = np.minimum(number * hop, np.maximum(windows.length - samples, 0))
        windows.arrays.update(clip=clip, start=start, offset=windows.offset + start,
                              length=np.minimum(windows.length - start, samples))
        return windows

    def keys(self):
        """The file names, read from the shards when asked for (they are the larger part of an index)."""
        if 'key' in self.arrays:
            return self.key.tolist()
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
        raise DataError(f'{name} has no test split' + (
            f': name a fold to test on, --fold={meta["folds"][0]}' if meta['folds'] else
            ' and no folds: prepare it with a test part, or name another set'))
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
