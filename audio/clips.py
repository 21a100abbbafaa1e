"""Prepared sets: packed clips in memory-mapped shards with their index, and the splits of a task.

prepare.py writes them: shards, each a .pcm file of its clips' int16 samples, one behind the other, and an .npz file of
the arrays in STORED; and meta.json. These files are hostile input too: checked before they are used.
"""
import hashlib
import json
import os
import re
from dataclasses import dataclass, replace

import numpy as np
from numpy import ndarray

from audio import HOP_SAMPLES, N_MELS, SAMPLE_RATE, WINDOW_SAMPLES, WINDOWS, frames_in
from engine.errors import DataError
from engine.randomness import random

FORMAT_VERSION = 1
# Arrays of a shard, a row per clip: their name here, type when written, kinds that are read, and shape behind the first
# axis. Beside them: keys, skipped and plan.
STORED = {'offsets': ('offset', np.int64, 'i', ()), 'lengths': ('length', np.int64, 'i', ()),
          'labels': ('label', np.int32, 'iu', ()),                          # multi-label: (n, ceil(classes / 8)) uint8
          'folds': ('fold', np.int16, 'i', ()), 'hashes': ('hash', np.uint32, 'u', ()),
          'stats': ('stats', np.float64, 'f', (len(WINDOWS), 2))}


@dataclass(eq=False)
class Clips:
    """Chosen clips of one or more prepared sets, or of waves in memory: arrays with an entry per clip, and where the
    samples are."""
    shards: list                # paths of shards without suffix; of waves the samples
    metas: list                 # the sets' meta.json; none of waves
    offset: ndarray             # of the clip in its shard, samples
    length: ndarray = None      # samples
    shard: ndarray = None       # index into shards
    row: ndarray = None         # of the clip in its shard's index
    fold: ndarray = None        # index into the folds of its set's meta.json, -1 without one
    hash: ndarray = None        # key_hash of its key
    label: ndarray = None       # class index, -1 without one; multi-label: packed bits (n, ceil(classes / 8))
    stats: ndarray = None       # (n, 2 windows, 2) sums of its log-mel values and of their squares, by prepare.py
    key: ndarray = None         # names of waves
    clip: ndarray = None        # of windows: the index of the clip that each is cut from,
    start: ndarray = None       # and where in it the window begins, samples

    @classmethod
    def of_waves(cls, waves, keys):
        """Clips in memory, of int16 arrays and their names."""
        length = np.array([len(wave) for wave in waves])
        return cls([np.concatenate(waves)], [], offset=np.cumsum(length) - length, length=length,
                   shard=np.zeros(len(waves), int), key=np.array(keys))

    def __len__(self):
        return len(self.offset)

    @property
    def classes(self):
        return self.metas[0]['classes']

    @property
    def multi_label(self):
        return self.metas[0]['multi_label']

    def select(self, chosen):
        """The clips at these indices, or where this mask is True."""
        return replace(self, **{name: array[chosen] for name, array in vars(self).items()
                                if isinstance(array, ndarray)})

    def read(self, i, start=0, count=None):
        """int16 samples of clip i, at most count of them from start."""
        shard, offset, length = int(self.shard[i]), int(self.offset[i]), int(self.length[i])
        count = max(min(length - start, length if count is None else count), 0)
        if isinstance(self.shards[shard], ndarray):
            return self.shards[shard][offset + start:offset + start + count]
        path = self.shards[shard] + '.pcm'                                  # opened anew: AudioSet has some 930 shards
        wave = np.fromfile(path, np.int16, count, offset=2 * (offset + start))
        if len(wave) < count:
            raise DataError(f'{path} is shorter than its index says: delete both and prepare the set again')
        return wave

    def windows(self, samples, hop, spare=16 * HOP_SAMPLES):
        """These clips cut into windows of so many samples, one every hop samples and the last at the clip's end.

        A tail of at most `spare` samples (a patch) behind the last window is left out, unless hop is finer than that.
        -> Clips with clip and start.
        """
        spare = spare if hop >= spare else 0
        counts = 1 + -(-np.maximum(self.length - samples - spare, 0) // hop)
        clip = np.repeat(np.arange(len(self)), counts)
        windows = self.select(clip)
        number = np.arange(len(clip)) - np.repeat(np.cumsum(counts) - counts, counts)       # of the window in its clip
        start = np.minimum(number * hop, np.maximum(windows.length - samples, 0))
        return replace(windows, clip=clip, start=start, offset=windows.offset + start,
                       length=np.minimum(windows.length - start, samples))

    def keys(self):
        """The file names, read from the shards when asked for (they are the larger part of an index)."""
        if self.key is not None:
            return self.key.tolist()
        loaded = {shard: np.load(self.shards[shard] + '.npz')['keys'] for shard in np.unique(self.shard)}
        return [str(loaded[shard][row]) for shard, row in zip(self.shard, self.row)]

    def targets(self, indices):
        """(len(indices), classes) float32: one-hot, or several ones per row for a multi-label set. Raises DataError."""
        if self.multi_label:
            return np.unpackbits(self.label[indices], axis=1, count=len(self.classes)).astype(np.float32)
        if (self.label[indices] < 0).any():                                 # -1 would be the last class
            raise DataError(f'{self.names()}: clips without a label have no targets')
        return np.eye(len(self.classes), dtype=np.float32)[self.label[indices]]

    def statistics(self, window):
        """Mean and standard deviation of the log-mel values over all frames of these clips, each in its whole length,
        without padding. Raises DataError."""
        total, squares = self.stats[:, WINDOWS.index(window)].sum(axis=0)
        count = float(frames_in(self.length).sum() * N_MELS)
        mean = total / count
        variance = squares / count - mean ** 2
        if not variance > 1e-6:
            raise DataError(f'the log-mel values of {self.names()} do not vary: silence, or a damaged set')
        return float(mean), float(np.sqrt(variance))

    def fingerprint(self):
        """A short text that changes when the chosen clips or their order change."""
        digest = hashlib.sha256(json.dumps([m['name'] for m in self.metas]).encode())
        for name in ('hash', 'length', 'label', 'stats'):
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return digest.hexdigest()[:16]

    def names(self):
        return ', '.join(meta['name'] for meta in self.metas)


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
        if not set(splits) & set(meta['splits']):
            raise DataError(f'{folder} has no split {" or ".join(splits) or "at all"}, only '
                            f'{", ".join(sorted(meta["splits"])) or "none"}')
        if only_fold is not None and only_fold not in meta['folds']:
            raise DataError(f'fold {only_fold!r} is not in {folder}: its folds are '
                            f'{", ".join(meta["folds"]) or "none"}')
        for split in splits:
            if split in out or split not in meta['splits']:
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
            counted = meta['splits'][split].get('clips', found)
            if found != counted:
                raise DataError(f'{folder} holds {found} clips of the split {split}, its meta.json counts {counted}: '
                                'a shard is missing; prepare the set again')
        metas.append(meta)
    known = {split for meta in metas for split in meta['splits']}
    if not known.issuperset(splits):
        raise DataError(f'splits: none of {", ".join(names)} has {" or ".join(sorted(set(splits) - known))}, only '
                        f'{", ".join(sorted(known))}')
    if len(metas) > 1:                                                  # classes of different sets have no common order
        parts = [{**part, 'label': np.full(len(part['offset']), -1, np.int32)} for part in parts]
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if parts else {}
    if not parts or not len(arrays['offset']):
        raise DataError(f'no clips left in {", ".join(names)} (splits {", ".join(splits)}, fold {only_fold}, '
                        f'left out: {", ".join(leave_out) or "nothing"})')
    return Clips(shards, metas, **arrays)


def left_out_of(name, meta, names, leave_out):
    """The folds and splits of this set that leave_out names; every entry must name a set in use and a part of it."""
    splits, parts = sorted(meta['splits']), []
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
    """Yield (clips, path without suffix, {array name: array}) of every shard of a split, checked."""
    pattern = re.compile(re.escape(split) + r'-\d{5}\.npz')
    for file in sorted(f for f in os.listdir(folder) if pattern.fullmatch(f)):
        base = os.path.join(folder, file[:-4])
        try:
            with np.load(base + '.npz', allow_pickle=False) as stored:
                index = {attribute: stored[name] for name, (attribute, *_) in STORED.items()}
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
    clips, classes, multi_label = index['offset'].size, len(meta['classes']), meta['multi_label']
    for attribute, _, kinds, shape in STORED.values():
        if attribute == 'label' and multi_label:
            shape = (-(-classes // 8),)
        if index[attribute].dtype.kind not in kinds or index[attribute].shape != (clips, *shape):
            return False
    offset, length, fold, label = (index[name] for name in ('offset', 'length', 'fold', 'label'))
    labels_fit = label.dtype == np.uint8 if multi_label else ((label >= -1) & (label < classes)).all()
    return bool(labels_fit and (offset >= 0).all() and (length >= WINDOW_SAMPLES).all()
                and (offset <= size - length).all() and (fold >= -1).all() and (fold < len(meta['folds'])).all()
                and np.isfinite(index['stats']).all())


def key_hash(key):
    """A stable 32-bit number of a file name: the same on every machine, for splits that do not depend on order."""
    return int.from_bytes(hashlib.sha1(key.encode('utf-8', 'surrogateescape')).digest()[:4], 'big')


def carve_validation(clips, part):
    """Split training clips into (rest, validation) by the stable hash of their keys; part is validation's share, about.

    A class with one label a clip keeps at least one clip for training; it may have none for validation.
    """
    limit = round(part * 1000)
    is_valid = clips.hash % 1000 < limit
    if 0 < limit < 1000 and is_valid.all() == is_valid.any():               # all or none: sets prepared before have a
        is_valid = clips.hash // 10000 % 1000 < limit                       # test part carved by the last four digits
    if limit < 1000 and clips.label.ndim == 1:
        for label in np.setdiff1d(clips.label[is_valid], clips.label[~is_valid]):
            of_class = np.flatnonzero(clips.label == label)
            is_valid[of_class[clips.hash[of_class].argmax()]] = False
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
    splits = list(meta['splits'])
    if fold:
        return labelled(open_clips([name], data_dir, splits, only_fold=fold))
    if not {'test', 'eval'} & set(splits):
        raise DataError(f'{name} has no test split' + (
            f': name a fold to test on, --fold={meta["folds"][0]}' if meta['folds'] else
            ' and no folds: prepare it with a test part, or name another set'))
    return labelled(open_clips([name], data_dir, [split for split in splits if split in ('test', 'eval')]))


def labelled(clips):
    """These clips, all of which must have a label, since -1 would be taken for a class. Raises DataError."""
    missing = 0 if clips.multi_label else int((clips.label < 0).sum())
    if missing:
        raise DataError(f'{clips.names()} holds {missing} clips without a label among labelled ones: prepare it again '
                        'without them, or as a set without labels')
    return clips


def task_splits(name, data_dir='data', fold='', labels_per_class=0, seed=1, validation_part=0.1, test_name=''):
    """(train, valid, test) clips of a labelled set, and the whole training split, for its statistics. Raises DataError.

    fold: test on all clips of that fold and train without it; '': test on the set's test (or eval) split, or on that of
    the set test_name. The validation part is the set's own, or carved from the training split by a stable hash; 0: no
    clips. labels_per_class: so many training clips of each class.
    """
    test = open_test(test_name or name, data_dir, fold)
    leave_out = [f'{name}/{fold}'] if fold else []
    whole = train = labelled(open_clips([name], data_dir, ['train'], leave_out))
    if test.classes != train.classes:
        raise DataError(f'{test_name} has other classes than {name}: {len(test.classes)} and {len(train.classes)}')
    if 'valid' in train.metas[0]['splits']:
        valid = labelled(open_clips([name], data_dir, ['valid'], leave_out))
    else:
        train, valid = carve_validation(train, validation_part)
    if labels_per_class:
        train = few_labels(train, labels_per_class, seed)
    if not len(train):
        raise DataError(f'{name}: no training clips are left beside {len(valid)} for validation: a smaller '
                        'validation_part')
    return train, valid, test, whole
