"""ESC-50, or anything in its layout."""
import csv
import io
import os

from audio.sources import list_source
from engine.errors import DataError
from recipes.plan import Plan, read_table, source_or_download

ESC50_URL = 'https://github.com/karolpiczak/ESC-50/archive/33c8ce9eb2cf0b1c2f8bcf322eb349b6be34dbb6.zip'


def plan_esc50(settings):
    """meta/esc50.csv says fold and class; every clip is in the train split, and a fold is left out to test on."""
    files = list_source(source_or_download(settings, ESC50_URL), settings.out_dir)
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
        raise DataError(f'{table} in {origin} is not ESC-50\'s table ({error!r})') from None
    audio = {os.path.splitext(name)[0][len(root):]: i for i, name in files.audio() if name.startswith(root + 'audio/')}
    names = {target: category for _, _, target, category in rows}
    targets, folds = sorted(names), sorted({fold for _, fold, _, _ in rows})
    missing = [stem for stem, *_ in rows if 'audio/' + stem not in audio]
    if missing:
        raise DataError(f'{len(missing)} of the {len(rows)} clips of {table} are missing, e.g. audio/{missing[0]}')
    if len(rows) != 2000:
        if not settings.source and not settings.esc10:
            raise DataError(f'{origin} holds {len(rows)} clips instead of 2,000: get it by other means, --source=PATH')
        print(f'note: {len(rows)} clips of {len(targets)} classes; the whole ESC-50 has 2,000 of 50')
    plan = Plan('esc50', files.place, [names[target] for target in targets], folds)
    for stem, fold, target, _ in rows:
        plan.add(stem, audio['audio/' + stem], label=targets.index(target), fold=folds.index(fold))
    return plan
