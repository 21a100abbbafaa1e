"""The files that an evaluation writes: checked before anything is computed, written whole or not at all."""
import contextlib
import csv
import math
import os
import tempfile
from urllib.parse import quote

import numpy as np

from audio import SAMPLE_RATE
from engine.errors import ConfigError
from engine.files import replacing
from scoring.metrics import NotFiniteError


def table_path(ckpt, name, fold):
    """The table of a set's (fold's) classes beside a checkpoint. Every set, fold and checkpoint has its own."""
    folder, file = os.path.split(os.path.splitext(ckpt)[0])
    parts = [quote(name, safe=''), *([f'fold-{quote(fold, safe="")}'] if fold else []), file]
    return os.path.join(folder, f'classes-{"-".join(parts)}.csv')


def check_output(path, suffix, *inputs):
    """Refuse a file that cannot be written, or would be in the way of what is read. inputs: files, and folders in which
    nothing may be written. Raises ConfigError."""
    if not path.lower().endswith(suffix):
        raise ConfigError(f'{path} must end in {suffix}, the format that it is written in')
    if os.path.isdir(path):
        raise ConfigError(f'{path} is a folder: name a file in it')
    for source in filter(None, inputs):                                     # '': nothing is read there
        if any(is_within(written, source) for written in (path, path + '.tmp')):
            raise ConfigError(f'{path} would overwrite {source}, which is read: choose another name')
    folder = os.path.dirname(os.path.abspath(path))
    try:
        while not os.path.lexists(folder):                                  # the nearest folder that there is
            folder = os.path.dirname(folder)
        with tempfile.TemporaryFile(dir=folder), contextlib.suppress(FileNotFoundError):
            os.lstat(path + '.tmp')
    except OSError as error:
        raise ConfigError(f'{path} cannot be written ({error.strerror}): choose another name') from None


def is_within(path, source):
    """Whether a path is this file, by whatever name, or lies in this folder."""
    if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
        return True
    path, source = os.path.realpath(path), os.path.realpath(source)
    return path == source or os.path.isdir(source) and os.path.commonpath([path, source]) == source


def write_classes(path, classes, rows, multi_label):
    """A csv with a row per class: its clips and scores, as scoring.metrics.metrics gives them."""
    with replacing(path) as f:
        writer = csv.writer(f, lineterminator='\n')
        writer.writerow(['class', 'clips', *(['average_precision', 'auc'] if multi_label else ['accuracy'])])
        writer.writerows([label, count, *('' if math.isnan(value) else f'{value:.6f}' for value in values)]
                         for label, (count, *values) in zip(classes, rows))


def write_windows(path, windows, probabilities, classes):
    """A csv with a row per window: its clip, start and end in seconds, the probability of every class."""
    keys = windows.keys()
    with replacing(path) as f:
        writer = csv.writer(f, lineterminator='\n')
        writer.writerow(['clip', 'start', 'end', *classes])
        for key, start, length, row in zip(keys, windows.start, windows.length, probabilities):
            writer.writerow([key, f'{start / SAMPLE_RATE:.3f}', f'{(start + length) / SAMPLE_RATE:.3f}',
                             *(f'{value:.4f}' for value in row)])


def labels_of(clips):
    """What a prepared set says of its clips: splits (N,), folds (N,), labels, classes, as far as it has them."""
    splits = np.array([os.path.basename(base).rsplit('-', 1)[0] for base in clips.shards])
    found, meta = {'splits': splits[clips.shard]}, clips.metas[0]
    if meta['folds']:
        found['folds'] = np.array([*meta['folds'], ''])[clips.fold]
    if meta['classes']:
        labels = clips.label
        if clips.multi_label:
            labels = np.unpackbits(labels, axis=1, count=len(clips.classes)).astype(bool)
        found.update(labels=labels, classes=np.array(clips.classes))
    return found


def write_arrays(path, shapes, batches, beside, is_main):
    """An .npz, whole or not at all, of {name: (shape, type)} filled from batches of (rows, {name: values}), of which
    one is in memory at a time, and of the arrays beside."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=os.path.basename(path) + '.', dir=folder) as work:
        arrays = {name: np.lib.format.open_memmap(os.path.join(work, f'{name}.npy'), 'w+', kind, shape)
                  for name, (shape, kind) in shapes.items() if is_main}
        for rows, values in batches:
            for name, array in arrays.items():
                if np.abs(values[name]).max(initial=0) > np.finfo(array.dtype).max:
                    raise NotFiniteError(f'{name} that {array.dtype} cannot hold')
                array[rows] = values[name]
        if is_main:
            with replacing(path, 'wb') as f:
                np.savez(f, **beside, **arrays)
            arrays.clear()
