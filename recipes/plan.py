"""A plan: which files become which clips of which split; and what several recipes need."""
import os
from array import array
from dataclasses import dataclass

import numpy as np

from audio.downloads import download
from audio.sources import ARCHIVE_ERRORS, Strings, cache_name, open_text, reason_of
from engine.errors import DataError
from engine.files import printable

SHARD_CLIPS = 2048                                  # files of one shard; 640 MB of ten-second clips
SPLITS = ('eval', 'test', 'train', 'valid')


@dataclass
class Entry:
    key: str                    # names the clip ever after
    place: tuple                # where its bytes are, see read_bytes
    label: object               # class index, -1 for none, or a tuple of indices in a multi-label set
    fold: int                   # index into the set's folds, -1 for none


class Plan:
    """Which files become which clips of which split, a row each in arrays: less than 150 bytes a clip.

    place: a function of the file's number that gives what read_bytes wants to know.
    """

    def __init__(self, name, place, classes, folds=(), multi_label=False):
        self.name, self.place, self.multi_label = name, place, multi_label
        self.classes, self.folds = classes, list(folds)
        self.keys, self.files, self.splits, self.fold = Strings(), array('q'), array('b'), array('h')
        self.labels, self.label_ends = array('i'), array('q', [0])

    def add(self, key, file, split='train', label=-1, fold=-1):
        """label: a class, -1 for none, or several classes in a multi-label set."""
        self.keys.append(key)
        self.files.append(file)
        self.splits.append(SPLITS.index(split))
        self.fold.append(fold)
        self.labels.extend(label if self.multi_label else [label])
        self.label_ends.append(len(self.labels))

    def entry(self, i):
        labels = tuple(self.labels[self.label_ends[i]:self.label_ends[i + 1]])
        return Entry(self.keys[i], self.place(self.files[i]), labels if self.multi_label else labels[0],
                     self.fold[i])

    def shards(self):
        """[(name, rows)] of at most SHARD_CLIPS clips of one split, in the order of the keys; of clips with one key
        the last counts, as in an archive that was added to."""
        order = np.array(sorted(range(len(self.keys)), key=self.keys.__getitem__), dtype=np.int64)
        is_last = np.ones(len(order), bool)
        is_last[:-1] = [self.keys[a] != self.keys[b] for a, b in zip(order[:-1], order[1:])]
        order = order[is_last]
        splits = np.array(self.splits, dtype=np.int8)[order]
        shards = []
        for code, split in enumerate(SPLITS):
            rows = order[splits == code]
            shards += [(f'{split}-{i // SHARD_CLIPS:05d}', rows[i:i + SHARD_CLIPS])
                       for i in range(0, len(rows), SHARD_CLIPS)]
        return shards


def source_or_download(settings, url, suffix='zip', sha256=None):
    """The given source, or the downloaded archive, which stays beside the set until that is complete."""
    if settings.source:
        return settings.source
    path = os.path.join(settings.out_dir, cache_name(url, suffix))
    if not os.path.exists(path):
        download(url, path, sha256)
    return path


def read_table(files, i):
    """A text file of a source. Raises DataError."""
    try:
        with open_text(files.place(i)) as f:
            return f.read()
    except UnicodeError as error:
        raise DataError(f'{printable(files.names[i])} is not a text table ({error})') from None
    except (*ARCHIVE_ERRORS, ValueError, RuntimeError, NotImplementedError) as error:
        raise DataError(f'{printable(files.names[i])} cannot be read ({reason_of(error)}): get it again') from None
