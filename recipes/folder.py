"""Any tree of audio files; parent folders are the classes, folders named train, test, valid and the like the splits."""
import csv
import hashlib
import os
import re
from array import array

import numpy as np

from audio.sources import list_source, open_text, reason_of
from engine.errors import ConfigError, DataError
from engine.files import printable
from recipes.plan import SPLITS, Plan, tidy

source = ''             # archive or folder of audio files
label = 'parent'        # class of a file, its parent folder's name; none: no labels
test_part = 0.2         # share of each class that goes to the test split, by a stable hash of the names
split_file = ''         # a csv of lines `path,split` instead (train, valid or test), paths as inside the source

SPLIT_FOLDERS = {'train': 'train', 'training': 'train', 'test': 'test', 'testing': 'test', 'eval': 'eval',
                 'evaluation': 'eval', 'valid': 'valid', 'val': 'valid', 'validation': 'valid', 'dev': 'valid'}


def name(settings):
    """The source's own name."""
    stem = re.sub(r'(\.(zip|tar|tgz|gz|bz2|xz))+$', '', os.path.basename(os.path.abspath(settings.source)))
    return re.sub(r'[^A-Za-z0-9_.-]', '_', stem) or 'folder'


def check(settings):
    if not settings.source:
        raise ConfigError('folder needs --source=PATH, a folder or archive of audio files')
    if settings.label not in ('parent', 'none'):
        raise ConfigError(f'label = {settings.label!r} is neither parent nor none')
    if not 0 <= settings.test_part < 1:
        raise ConfigError(f'test_part = {settings.test_part} must lie in [0, 1)')


def plan(settings):
    """Clips are named by their path below the folder that holds all of them: the same for a folder and its archive."""
    files = list_source(settings.source, settings.work_dir)
    root = len(common_folder(name for _, name in files.audio()))
    split_of = read_split_file(settings.split_file, files, root) if settings.split_file else None
    numbers = array('i', (i for i, _ in files.audio()) if split_of is None else sorted(split_of))

    def key(number):
        return files.names[number][root:]

    def keys():
        return map(key, numbers)
    level = level_of_splits(keys, settings.source) if split_of is None else None
    classes, label_of = classes_of(keys, level, settings)
    if split_of is not None:
        splits = array('b', (SPLITS.index(split_of[i]) for i in numbers))
        left_out = sum(1 for _ in files.audio()) - len(numbers)
        if left_out:
            print(f'{left_out} audio files are in no line of {printable(settings.split_file)}: left out')
    else:
        splits = array('b', (SPLITS.index('train' if level is None else SPLIT_FOLDERS[key.split('/')[level].lower()])
                             for key in keys()))
        names = sorted({SPLITS[code] for code in splits})
        if level is not None:
            print(f'splits by folder: {", ".join(names)} (--split_file=CSV says otherwise)')
        if not {'test', 'eval'} & set(names):
            carve_test(splits, keys, label_of, settings.test_part)
    made = Plan(classes, files.place, key, lambda number: label_of(key(number)))
    made.numbers, made.splits = numbers, splits
    return made


def common_folder(names):
    """The deepest folder that holds all of these files, with its slash; '' for the top."""
    root = None
    for path in names:
        root = path[:path.rfind('/') + 1] if root is None else root
        while not path.startswith(root):
            root = root[:root.rfind('/', 0, -1) + 1]
    return root or ''


def level_of_splits(keys, source):
    """Which folders of the paths are named after splits: 0, the first, or -2, the last; None without such.
    Raises DataError if only some are."""
    for level in (0, -2):
        folders = {key.split('/')[level] if '/' in key else '' for key in keys()}
        splits = {SPLIT_FOLDERS.get(folder.lower()) for folder in folders}
        if len(splits) > 1 and None not in splits:
            return level
        if 'train' in splits and len(splits - {None}) > 1:
            beside = next(key for key in keys()
                          if '/' not in key or key.split('/')[level].lower() not in SPLIT_FOLDERS)
            raise DataError(f'{printable(beside)} in {source} lies beside folders named after splits: move it into '
                            'one, or say with --split_file=CSV what is of which split')
    return None


def classes_of(keys, level, settings):
    """-> class names, and a function of a key that gives its class's index, -1 for none. Raises DataError."""
    def parent(key):
        folders = key.split('/')[:-1]
        if level is not None:
            del folders[0 if level == 0 else -1]
        return folders[-1] if folders else ''
    classes = sorted(set(map(parent, keys()))) if settings.label == 'parent' else []
    if len(classes) < 2:                                                # one folder of sounds has nothing to tell apart
        return [], lambda key: -1
    if classes[0] == '':
        beside = next(key for key in keys() if not parent(key))
        raise DataError(f'{printable(beside)} in {settings.source} lies beside the folders of classes: move it into '
                        'one, or give --label=none for a set without labels')
    index = {folder: i for i, folder in enumerate(classes)}
    return classes, lambda key: index[parent(key)]


def carve_test(splits, keys, label_of, part):
    """Give `part` of each class's training clips to the test split, at least one and not all: those of smallest hash.

    The hash is of the path alone, with other digits than validation's, so that no split depends on the order of the
    files, and a file that is added moves one other at most.
    """
    hashes = np.fromiter((int.from_bytes(hashlib.sha1(key.encode('utf-8', 'surrogateescape')).digest()[4:12], 'big')
                          for key in keys()), np.uint64, len(splits))
    labels, codes = np.fromiter(map(label_of, keys()), np.int32, len(splits)), np.frombuffer(splits, np.int8)
    others = codes != SPLITS.index('train')
    labels[others] = np.iinfo(np.int32).max                                 # behind the training clips
    order = np.lexsort((hashes, labels))[:len(codes) - others.sum()]
    for clips in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1) if part and len(order) else ():
        codes[clips[:min(max(int(part * len(clips) + 0.5), 1), len(clips) - 1)]] = SPLITS.index('test')


def read_split_file(path, files, root):
    """{file: split} from a csv of `path,split`; every path must be in the source. Raises DataError."""
    try:
        with open_text(path) as f:
            rows = [row for row in csv.reader(f) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f'cannot read split_file {path} ({reason_of(error)})') from None
    found = {name[start:]: i for start in (root, 0) for i, name in files.audio()}
    split_of = {}
    for row in rows[[cell.strip() for cell in rows[0]] == ['path', 'split']:] if rows else ():
        line = printable(','.join(row))
        if len(row) != 2 or row[1].strip() not in ('train', 'valid', 'test'):
            raise DataError(f'split_file {path}: {line!r} is not `path,split` with split train, valid or test')
        file, split = found.get(row[0], found.get(tidy(row[0]))), row[1].strip()
        if file is None:
            raise DataError(f'split_file {path}: {printable(row[0])!r} is not an audio file in the source')
        if split_of.setdefault(file, split) != split:
            raise DataError(f'split_file {path} names {printable(row[0])!r} twice, for {split_of[file]} and {split}')
    return split_of
