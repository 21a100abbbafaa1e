"""ESC-50, or anything in its layout."""
import csv
import io
import os

from engine.errors import DataError
from engine.files import printable
from recipes.plan import Plan, read_table, source_or_download

source = ''             # archive or folder in its layout; without one it is downloaded
esc10 = False           # only its ESC-10 part, ten classes

ESC50_URL = 'https://github.com/karolpiczak/ESC-50/archive/33c8ce9eb2cf0b1c2f8bcf322eb349b6be34dbb6.zip'


def name(settings):
    return 'esc10' if settings.esc10 else 'esc50'


def plan(settings):
    """meta/esc50.csv says fold and class; every clip is in the train split, and a fold is left out to test on."""
    files = source_or_download(settings, ESC50_URL)
    origin = settings.source or ESC50_URL
    tables = [i for i, name in enumerate(files.names) if name.endswith('meta/esc50.csv')]
    if len(tables) != 1:
        raise DataError(f'{origin} holds {len(tables)} files named meta/esc50.csv; ESC-50 has one')
    table = files.names[tables[0]]
    root = table[:-len('meta/esc50.csv')]
    try:
        rows = list(csv.DictReader(io.StringIO(read_table(files, tables[0]))))
        rows = [(os.path.splitext(row['filename'])[0], row['fold'], int(row['target']), row['category'])
                for row in rows if not settings.esc10 or row['esc10'] == 'True']
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(f'{printable(table)} in {origin} is not ESC-50\'s table ({error!r})') from None
    audio = {os.path.splitext(name)[0][len(root):]: i for i, name in files.audio() if name.startswith(root + 'audio/')}
    names = {target: category for _, _, target, category in rows}
    targets, folds = sorted(names), sorted({fold for _, fold, _, _ in rows})
    missing = [stem for stem, *_ in rows if 'audio/' + stem not in audio]
    if missing:
        raise DataError(f'{len(missing)} of the {len(rows)} clips of {printable(table)} are missing, e.g. '
                        f'audio/{printable(missing[0])}')
    if len({stem for stem, *_ in rows}) < len(rows):
        raise DataError(f'{printable(table)} in {origin} names a clip twice')
    whole = ('ESC-10', 400, 10) if settings.esc10 else ('ESC-50', 2000, 50)
    if len(rows) != whole[1]:
        if not settings.source:
            raise DataError(f'{origin} holds {len(rows)} clips instead of {whole[1]:,}: get it by other means, '
                            '--source=PATH')
        print(f'note: {len(rows)} clips of {len(targets)} classes; the whole {whole[0]} has {whole[1]:,} of {whole[2]}')
    made = Plan([names[target] for target in targets], lambda i: files.place(audio['audio/' + rows[i][0]]),
                lambda i: rows[i][0], lambda i: targets.index(rows[i][2]), lambda i: folds.index(rows[i][1]), folds)
    for i in range(len(rows)):
        made.add(i)
    return made
