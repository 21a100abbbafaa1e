"""A plan: which files become which clips of which split; and what several recipes need."""
import bisect
import os
import posixpath
import re
from array import array
from dataclasses import dataclass

import numpy as np

from audio.downloads import download
from audio.making import CACHED
from audio.sources import ARCHIVE_ERRORS, cache_name, list_source, open_text, reason_of
from engine.errors import DataError
from engine.files import printable

# Settings of every recipe that reads files.
max_bad = 0.01          # share of files that may be unreadable; more is an error
max_minutes = 20.0      # longer files are skipped: cut them first

SHARD_CLIPS = 2048                                  # files of one shard; 640 MB of ten-second clips
SPLITS = ('eval', 'test', 'train', 'valid')
SORTED_AT_ONCE = 1 << 14                            # keys that are in memory as strings


@dataclass
class Entry:
    key: str                    # names the clip ever after
    place: tuple                # where its bytes are, see read_bytes; or a function and its arguments that compute it
    label: object               # class index, -1 for none, or a tuple of indices in a multi-label set
    fold: int                   # index into the set's folds, -1 for none

    def stamp(self):
        """What changes with the content, as far as can be seen without reading it: a file's size and time, the checksum
        that a zip holds, a tar's size and time and where in it the file lies. Raises OSError."""
        kind, path, *inside = self.place
        if callable(kind):
            return repr((kind.__name__, path, *inside))
        if kind == 'zip':
            return repr(inside[-1])
        info, name = os.stat(path), os.path.basename(path)
        fetched = re.fullmatch(CACHED, name)                                # its name says of what; its time is ours
        return repr((info.st_size, name if fetched else info.st_mtime_ns, *inside))


class Plan:
    """Which files become which clips of which split: a number for each, of which functions say what Entry holds.

    Nothing else is kept of a clip. Two million of them have some 70 bytes each, most of which are the files' names.
    """

    def __init__(self, classes, place, key, label=lambda number: -1, fold=lambda number: -1, folds=(),
                 multi_label=False):
        self.classes, self.folds, self.multi_label = classes, list(folds), multi_label
        self.place, self.key, self.label, self.fold = place, key, label, fold
        self.numbers, self.splits = array('i'), array('b')

    def add(self, number, split='train'):
        self.numbers.append(number)
        self.splits.append(SPLITS.index(split))

    def entry(self, number):
        return Entry(*(function(int(number)) for function in (self.key, self.place, self.label, self.fold)))

    def shards(self):
        """[(name, numbers)] of at most SHARD_CLIPS clips of one split, in the order of the keys; of clips with one key
        the last counts, as in an archive that was added to."""
        numbers, key, step = self.numbers, self.key, 16
        sample = sorted(map(key, numbers[::step]))
        bounds = sample[::max(SORTED_AT_ONCE // step, 1)]                   # about so many keys lie between two
        part = np.fromiter((bisect.bisect(bounds, key(number)) for number in numbers), np.int32, len(numbers))
        order = array('i')
        for i in range(len(bounds) + 1):
            last = {key(numbers[row]): row for row in np.flatnonzero(part == i)}
            order.extend(last[key] for key in sorted(last))
        order = np.array(order)
        splits, numbers, shards = np.array(self.splits)[order], np.array(numbers)[order], []
        for code, split in enumerate(SPLITS):
            rows = numbers[splits == code]
            shards += [(f'{split}-{i // SHARD_CLIPS:05d}', rows[i:i + SHARD_CLIPS])
                       for i in range(0, len(rows), SHARD_CLIPS)]
        return shards


def source_or_download(settings, url, suffix='zip', sha256=None):
    """The files of the source, or of the downloaded archive, which stays beside the set until that is complete."""
    path = settings.source or os.path.join(settings.work_dir, cache_name(url, suffix))
    if not settings.source and not os.path.exists(path):
        download(url, path, sha256)
    return list_source(path, settings.work_dir)


def read_table(files, i):
    """A text file of a source, without a byte-order mark. Raises DataError."""
    try:
        with open_text(files.place(i)) as f:
            return f.read()
    except UnicodeError as error:
        raise DataError(f'{printable(files.names[i])} is not a text table ({error})') from None
    except (*ARCHIVE_ERRORS, ValueError, RuntimeError, NotImplementedError) as error:
        raise DataError(f'{printable(files.names[i])} cannot be read ({reason_of(error)}): get it again') from None


def tidy(path):
    """A path as people write it in a list, './a\\b.wav' say, as it stands in a source."""
    return posixpath.normpath(path.strip().replace('\\', '/'))
