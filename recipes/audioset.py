"""AudioSet, from the official lists of segments and a folder or archive of its clips."""
import csv
import itertools
import os
import re
from array import array

import numpy as np

from audio.downloads import download
from audio.sources import cache_name, list_source, open_text, reason_of
from configurator import words
from engine.errors import ConfigError, DataError
from engine.files import printable
from recipes.plan import Plan

source = ''             # archive or folder of its clips
segments = ''           # csv files of segments, separated by commas: the train split; eval_segments.csv: the eval split
eval_segments = ''      # further csv files for the eval split, whatever their names
labels = ''             # class_labels_indices.csv; '': downloaded

AUDIOSET_URL = 'https://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/'
# A YouTube id has 11 characters, of which - and _ may be any. People put Y before it (it may begin with - otherwise),
# and the start, or start and end, behind it, in seconds or milliseconds.
AUDIOSET_FILE = re.compile(r'Y?([A-Za-z0-9_-]{11})(?:[_-](\d{1,9}(?:\.\d+)?)(?:[_-]\d+(?:\.\d+)?)?)?')


def name(settings):
    """The part of AudioSet."""
    lists = [os.path.basename(path) for path, split in segment_lists(settings) if split == 'train']
    return 'as2m' if 'unbalanced' in ' '.join(lists) else 'as20k' if lists else 'as_eval'


def segment_lists(settings):
    """[(path, split)]"""
    return ([(path, 'eval' if os.path.splitext(os.path.basename(path))[0] == 'eval_segments' else 'train')
             for path in words(settings.segments)] + [(path, 'eval') for path in words(settings.eval_segments)])


def check(settings):
    if not settings.source or not segment_lists(settings):
        raise ConfigError('audioset needs --source=FOLDER, where its audio is, and --segments=CSV[,CSV], its lists '
                          f'of segments: {AUDIOSET_URL}balanced_train_segments.csv, unbalanced_train_segments.csv and '
                          'eval_segments.csv there')


def plan(settings):
    """The segments of the official csv files whose audio is in the source, by YouTube id and start time."""
    mids, classes = read_class_labels(settings)
    lists = segment_lists(settings)
    ids, starts, parts, labels, label_ends = read_segments([path for path, _ in lists], mids)
    first = listed_first(ids, starts, parts, lists)
    kept = first == np.arange(len(first))
    kept = slice(None) if kept.all() else kept                              # a view then, and no copy
    files = list_source(settings.source, settings.work_dir)
    file_of = np.full(len(ids), -1, np.int32)
    file_of[kept] = match_segments(ids[kept], starts[kept], files)
    for part, (path, split) in enumerate(lists):
        listed = file_of[first[parts == part]]
        print(f'{printable(os.path.basename(path))}: {(listed >= 0).sum():,} of its {len(listed):,} segments found, '
              f'to {split}')
    if (file_of < 0).all():
        example = next((name for _, name in files.audio()), 'there is no audio file')
        raise DataError(f'{settings.source} holds no segment of {", ".join(path for path, _ in lists)}: files are '
                        'found by names like ID.wav, YID.flac, ID_30000_40000.flac, ID_30.000.m4a; the first here is '
                        f'{printable(example)}')

    def labels_of(i):
        return tuple(sorted(together[i]) if i in together else labels[label_ends[i]:label_ends[i + 1]])
    together = {}                                       # labels of segments that several lists name
    for i in np.flatnonzero(first != np.arange(len(first))):
        together[first[i]] = {*labels_of(first[i]), *labels_of(i)}
    made = Plan(classes, lambda i: files.place(file_of[i]), lambda i: f'{ids[i].decode()}_{starts[i]}', labels_of,
                multi_label=True)
    for i in np.flatnonzero(file_of >= 0):
        made.add(i, lists[parts[i]][1])
    return made


def listed_first(ids, starts, parts, lists):
    """(N,) of every segment the first of the same id and start: itself, unless lists overlap. Raises DataError if a
    segment is in lists of train and of eval."""
    order = np.lexsort((starts, ids))
    is_new = np.ones(len(order), bool)
    is_new[1:] = (ids[order[1:]] != ids[order[:-1]]) | (starts[order[1:]] != starts[order[:-1]])
    first = np.empty(len(order), np.int32)
    first[order] = order[np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))]
    is_eval = np.array([split == 'eval' for _, split in lists])[parts]
    both = np.flatnonzero(is_eval != is_eval[first])
    if len(both):
        raise DataError(f'{len(both):,} segments are in lists of train and of eval, e.g. {ids[both[0]].decode()} from '
                        f'{starts[both[0]] / 1000:g} s: take them out of one')
    return first


def read_class_labels(settings):
    """class_labels_indices.csv (index, mid, display_name) -> {mid: class}, [display names]. Raises DataError."""
    path = settings.labels
    if not path:
        path = os.path.join(settings.work_dir, cache_name(AUDIOSET_URL + 'labels', 'csv'))
        if not os.path.exists(path):
            download(AUDIOSET_URL + 'class_labels_indices.csv', path, instead='--labels=PATH')
    rows = read_label_csv(path)
    if len(rows) != 527 and not settings.labels:
        os.remove(path)
        raise DataError(f'{AUDIOSET_URL}class_labels_indices.csv names {len(rows)} classes instead of 527: get it by '
                        'other means and give --labels=PATH')
    if len(rows) != 527:
        print(f'warning: {len(rows)} classes in {path}; AudioSet has 527')
    return {mid: i for i, (mid, _) in enumerate(rows)}, [name for _, name in rows]


def read_label_csv(path):
    """[(mid, display name)] of AudioSet's class_labels_indices.csv, in the order of its indices. Raises DataError."""
    try:
        with open_text(path) as f:
            rows = [(int(row['index']), row['mid'], row['display_name']) for row in csv.DictReader(f)]
    except (OSError, UnicodeError) as error:
        raise DataError(f'cannot read the labels {path} ({reason_of(error)}); AudioSet\'s are '
                        f'{AUDIOSET_URL}class_labels_indices.csv') from None
    except (KeyError, TypeError, ValueError, csv.Error):
        rows = []
    if not rows or [index for index, _, _ in rows] != list(range(len(rows))) or not all(mid for _, mid, _ in rows):
        raise DataError(f'{path} is not a list `index,mid,display_name` with indices from 0, as AudioSet\'s '
                        'class_labels_indices.csv')
    return [(mid, name) for _, mid, name in rows]


def read_segments(paths, mids):
    """Official lists of segments -> ids (N,) bytes, starts (N,) in ms, which list (N,), and their classes: those of
    segment i are labels[label_ends[i]:label_ends[i + 1]]. Raises DataError, which names file and line."""
    ids, starts, parts, labels, label_ends = bytearray(), array('i'), array('b'), array('H'), array('I', [0])
    for part, path in enumerate(paths):
        try:
            with open_text(path) as f:
                reader = csv.reader(f, skipinitialspace=True)               # id, 30.000, 40.000, "mid,mid"
                for row in reader:
                    if not ''.join(row).strip() or row[0].startswith('#'):
                        continue
                    name, start, _, of_segment = row
                    if not re.fullmatch('[A-Za-z0-9_-]{11}', name):
                        raise ValueError(f'{name!r} is no YouTube id')
                    labels.extend(sorted({mids[mid] for mid in of_segment.split(',')}))
                    ids += name.encode()
                    starts.append(round(float(start) * 1000))
                    parts.append(part)
                    label_ends.append(len(labels))
        except (OSError, UnicodeError) as error:
            raise DataError(f'cannot read the segments {printable(path)} ({reason_of(error)})') from None
        except KeyError as error:
            raise DataError(f'{path}, line {reader.line_num}: the class {error} is not in the list of labels') from None
        except (ValueError, OverflowError, csv.Error) as error:
            raise DataError(f'{path}, line {reader.line_num}: not `id, start, end, "class,class"` ({error})') from None
    return (np.frombuffer(ids, 'S11'), np.frombuffer(starts, np.int32), np.frombuffer(parts, np.int8), labels,
            label_ends)


def match_segments(ids, starts, files):
    """(N,) number of the file of every segment, -1 where there is none. A file matches by its id and, if its name holds
    one, its start; without one only if the id has a single segment. Of several files the first is taken."""
    by_id = np.argsort(ids, kind='stable').astype(np.int32)
    sorted_ids, file_of = ids[by_id], np.full(len(ids), -1, np.int32)
    named = ((i, match) for i, name in files.audio()
             if (match := AUDIOSET_FILE.fullmatch(os.path.splitext(os.path.basename(name))[0])))
    while some := list(itertools.islice(named, 1 << 12)):                   # so that two million take little memory
        found = np.array([i for i, _ in some])
        found_starts = np.array([float(match[2] or 'nan') for _, match in some])
        first, last = (np.searchsorted(sorted_ids, np.array([match[1] for _, match in some], 'S11'), side)
                       for side in ('left', 'right'))
        for back in range(int((last - first).max())):                       # one round, unless an id has more segments
            file = np.flatnonzero(first + back < last)[::-1]                # backwards: the first file is the last word
            segment, start = by_id[first[file] + back], found_starts[file]
            fits = (np.round(start * 1000) == starts[segment]) | (start == starts[segment])         # s or ms
            fits |= np.isnan(start) & (last[file] - first[file] == 1)
            fits &= file_of[segment] < 0                                    # nor is it found already
            file_of[segment[fits]] = found[file[fits]]
    return file_of
