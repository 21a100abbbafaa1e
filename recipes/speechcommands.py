"""Speech Commands v2."""
import collections
import os
import re

from audio.sources import list_source
from engine.errors import DataError
from recipes.plan import SPLITS, Plan, read_table, source_or_download

SPEECHCOMMANDS_URL = 'https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz'
SPEECHCOMMANDS_SHA256 = 'af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58'      # torchaudio's
SPEECHCOMMANDS_CLIPS = {'train': 84843, 'valid': 9981, 'test': 11005}


def plan_speechcommands(settings):
    """Version 2 in its own layout: a folder per word; validation_list.txt and testing_list.txt name two splits."""
    files = list_source(source_or_download(settings, SPEECHCOMMANDS_URL, 'tgz', SPEECHCOMMANDS_SHA256),
                        settings.out_dir)
    origin = settings.source or SPEECHCOMMANDS_URL
    lists = {name: i for i, name in enumerate(files.names)
             if os.path.basename(name) in ('testing_list.txt', 'validation_list.txt')}
    roots = {name.rpartition('/')[0] for name in lists}
    if len(lists) != 2 or len(roots) != 1:
        raise DataError(f'{origin} must hold one testing_list.txt and one validation_list.txt beside it, not '
                        f'{", ".join(lists) or "none"}')
    root = roots.pop()
    split_of = {}
    for name, i in lists.items():
        split = 'test' if name.endswith('testing_list.txt') else 'valid'
        split_of.update(dict.fromkeys(read_table(files, i).split(), split))
    spoken = {}
    for i, name in files.audio():
        key = name[len(root) + 1:] if root else name
        if name.startswith(root) and re.fullmatch(r'[^_/][^/]*/[^/]+', key):           # _background_noise_ is no word
            spoken[key] = i
    classes = sorted({key.split('/')[0] for key in spoken})
    plan = Plan('speechcommands', files.place, classes)
    for key, i in spoken.items():
        plan.add(key, i, split_of.get(key, 'train'), classes.index(key.split('/')[0]))
    counts = collections.Counter(SPLITS[code] for code in plan.splits)
    if counts != SPEECHCOMMANDS_CLIPS or len(classes) != 35:
        print(f'warning: {counts["train"]} / {counts["valid"]} / {counts["test"]} clips of {len(classes)} words to '
              'train, validate and test; Speech Commands v2 has 84843 / 9981 / 11005 of 35')
    absent = len(split_of.keys() - spoken.keys())
    if absent:
        print(f'warning: {absent} files of the two lists are not in {origin}')
    return plan
