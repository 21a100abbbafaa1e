"""Any tree of audio files; parent folders are the classes."""
import csv
import os

from audio.clips import key_hash
from audio.sources import list_source, open_text, reason_of
from engine.errors import DataError
from recipes.plan import Plan


def plan_folder(settings):
    if not settings.source:
        raise DataError('folder needs --source=PATH, a folder or archive of audio files')
    if settings.label not in ('parent', 'none'):
        raise DataError(f'label = {settings.label!r} is neither parent nor none')
    if not 0 <= settings.test_part < 1:
        raise DataError(f'test_part = {settings.test_part} must lie in [0, 1)')
    files = list_source(settings.source, settings.out_dir)

    def parent(name):
        return os.path.basename(os.path.dirname(name))
    classes = sorted({parent(name) for _, name in files.audio()}) if settings.label == 'parent' else []
    if len(classes) == 1:
        classes = []                                                    # one folder of sounds has nothing to tell apart
    number = {name: i for i, name in enumerate(classes)}
    splits = read_split_file(settings.split_file, files) if settings.split_file else None
    plan = Plan(os.path.basename(settings.out_dir), files.place, classes)
    for i, name in files.audio():
        if splits is None:
            split = 'test' if key_hash(name) % 10000 < settings.test_part * 10000 else 'train'
        elif name in splits:
            split = splits[name]
        else:
            continue
        plan.add(name, i, split, number.get(parent(name), -1))
    return plan


def read_split_file(path, files):
    """{name: split} from a csv of `path,split`; every path must be in the source."""
    try:
        with open_text(path) as f:
            rows = [row for row in csv.reader(f) if row]
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f'cannot read split_file {path} ({reason_of(error)})') from None
    found = {name for _, name in files.audio()}
    for row in rows:
        if len(row) != 2 or row[1].strip() not in ('train', 'valid', 'test'):
            raise DataError(f'split_file {path}: {",".join(row)!r} is not `path,split` with split train, valid or test')
        if row[0] not in found:
            raise DataError(f'split_file {path}: {row[0]!r} is not an audio file in the source')
    return {key: split.strip() for key, split in rows}
