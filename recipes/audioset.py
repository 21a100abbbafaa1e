"""AudioSet, from the official lists of segments and a folder or archive of its clips."""
import csv
import math
import os
import re
from array import array

import numpy as np

from audio.downloads import download
from audio.sources import cache_name, list_source, reason_of
from configurator import words
from engine.errors import DataError
from recipes.plan import Plan

AUDIOSET_URL = 'https://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/'
# A YouTube id has 11 characters, of which - and _ may be any. People put Y before it (it may begin with - otherwise),
# and the start, or start and end, behind it, in seconds or milliseconds.
AUDIOSET_FILE = re.compile(r'Y?([A-Za-z0-9_-]{11})(?:[_-](\d{1,9}(?:\.\d+)?)(?:[_-]\d+(?:\.\d+)?)?)?')


def plan_audioset(settings):
    """The segments of the official csv files whose audio is in the source, by YouTube id and start time."""
    if not settings.source or not settings.segments:
        raise DataError('audioset needs --source=FOLDER, where its audio is, and --segments=CSV[,CSV], its lists '
                        f'of segments: {AUDIOSET_URL}balanced_train_segments.csv, unbalanced_train_segments.csv and '
                        'eval_segments.csv there')
    mids, classes = read_class_labels(settings)
    paths = words(settings.segments)
    ids, starts, parts, labels, label_ends = read_segments(paths, mids)
    files = list_source(settings.source, settings.out_dir)
    file_of = match_segments(ids, starts, files)
    for part, path in enumerate(paths):
        print(f'{os.path.basename(path)}: {(file_of[parts == part] >= 0).sum():,} of its {(parts == part).sum():,} '
              'segments found')
    if (file_of < 0).all():
        example = next((name for _, name in files.audio()), 'there is no audio file')
        raise DataError(f'{settings.source} holds no segment of {settings.segments}: files are found by names like '
                        f'ID.wav, YID.flac, ID_30000_40000.flac, ID_30.000.m4a; the first here is {example}')
    splits = ['eval' if 'eval' in os.path.basename(path) else 'train' for path in paths]
    plan = Plan(os.path.basename(settings.out_dir), files.place, classes, multi_label=True)
    for i in np.flatnonzero(file_of >= 0):
        plan.add(f'{ids[i].decode()}_{starts[i]}', int(file_of[i]), splits[parts[i]],
                 labels[label_ends[i]:label_ends[i + 1]])
    return plan


def read_class_labels(settings):
    """class_labels_indices.csv (index, mid, display_name) -> {mid: class}, [display names]. Raises DataError."""
    path = settings.labels
    if not path:
        path = os.path.join(settings.out_dir, cache_name(AUDIOSET_URL + 'labels', 'csv'))
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
        with open(path, encoding='utf-8', newline='') as f:
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
    ids, starts, parts, labels, label_ends = bytearray(), array('q'), array('b'), array('i'), array('q', [0])
    for part, path in enumerate(paths):
        try:
            with open(path, encoding='utf-8', newline='') as f:
                reader = csv.reader(f, skipinitialspace=True)               # id, 30.000, 40.000, "mid,mid"
                for row in reader:
                    if not row or row[0].startswith('#'):
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
            raise DataError(f'cannot read the segments {path} ({reason_of(error)})') from None
        except KeyError as error:
            raise DataError(f'{path}, line {reader.line_num}: the class {error} is not in the list of labels') from None
        except (ValueError, OverflowError, csv.Error) as error:
            raise DataError(f'{path}, line {reader.line_num}: not `id, start, end, "class,class"` ({error})') from None
    return (np.frombuffer(bytes(ids), 'S11'), np.array(starts, np.int64), np.array(parts, np.int8), labels, label_ends)


def match_segments(ids, starts, files):
    """(N,) number of the file of every segment, -1 where there is none. A file matches by its id and, if its name holds
    one, its start; without one only if the id has a single segment. Of several files the first is taken."""
    found_ids, found_starts, found = bytearray(), array('d'), array('q')
    for i, name in files.audio():
        match = AUDIOSET_FILE.fullmatch(os.path.splitext(os.path.basename(name))[0])
        if match:
            found_ids += match[1].encode()
            found_starts.append(float(match[2]) if match[2] else math.nan)
            found.append(i)
    found_ids, found_starts, found = (np.frombuffer(bytes(found_ids), 'S11'), np.array(found_starts), np.array(found))
    by_id = np.argsort(ids, kind='stable')
    first, last = (np.searchsorted(ids[by_id], found_ids, side) for side in ('left', 'right'))
    file_of = np.full(len(ids), -1, np.int64)
    for back in range(int((last - first).max(initial=0))):                  # one round, unless an id has more segments
        file = np.flatnonzero(first + back < last)[::-1]                    # backwards: the first file is the last word
        segment = by_id[first[file] + back]
        start = found_starts[file]
        fits = (np.round(start * 1000) == starts[segment]) | (start == starts[segment])     # seconds or milliseconds
        fits |= np.isnan(start) & (last[file] - first[file] == 1)
        file_of[segment[fits]] = found[file[fits]]
    return file_of
