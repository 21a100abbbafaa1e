"""Speech Commands v2."""
import collections
import os
import re

from engine.errors import DataError
from engine.files import printable
from recipes.plan import SPLITS, Plan, read_table, source_or_download, tidy

source = ''             # archive or folder in its layout; without one it is downloaded

SPEECHCOMMANDS_URL = 'https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz'
SPEECHCOMMANDS_SHA256 = 'af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58'      # torchaudio's
SPEECHCOMMANDS_CLIPS = {'train': 84843, 'valid': 9981, 'test': 11005}
LISTS = {'testing_list.txt': 'test', 'validation_list.txt': 'valid'}


def plan(settings):
    """Version 2 in its own layout: a folder per word; validation_list.txt and testing_list.txt name two splits."""
    files = source_or_download(settings, SPEECHCOMMANDS_URL, 'tgz', SPEECHCOMMANDS_SHA256)
    origin = settings.source or SPEECHCOMMANDS_URL
    lists = {name: i for i, name in enumerate(files.names) if os.path.basename(name) in LISTS}
    roots = {name[:name.rfind('/') + 1] for name in lists}
    if len(lists) != 2 or len(roots) != 1:
        raise DataError(f'{origin} must hold one testing_list.txt and one validation_list.txt beside it, not '
                        f'{printable(", ".join(lists)) or "none"}')
    root = roots.pop()
    spoken = {name[len(root):]: i for i, name in files.audio() if name.startswith(root)
              and re.fullmatch(r'[^_/][^/]*/[^/]+', name[len(root):])}                  # _background_noise_ is no word
    split_of = read_lists(files, lists, spoken, origin)
    classes = sorted({key.split('/')[0] for key in spoken})
    made = Plan(classes, files.place, lambda i: files.names[i][len(root):],
                lambda i: classes.index(files.names[i][len(root):].split('/')[0]))
    for key, i in spoken.items():
        made.add(i, split_of.get(key, 'train'))
    counts = collections.Counter(SPLITS[code] for code in made.splits)
    if counts != SPEECHCOMMANDS_CLIPS or len(classes) != 35:
        print(f'warning: {counts["train"]} / {counts["valid"]} / {counts["test"]} clips of {len(classes)} words to '
              'train, validate and test; Speech Commands v2 has 84843 / 9981 / 11005 of 35')
    return made


def read_lists(files, lists, spoken, origin):
    """{clip: split} of the clips that the two lists name. Raises DataError if one names none that is there, or both
    the same: test clips would be trained on."""
    split_of, absent = {}, 0
    for name, i in lists.items():
        listed = {tidy(line) for line in read_table(files, i).splitlines() if line.strip()}
        if not listed & spoken.keys():
            raise DataError(f'none of the {len(listed)} files that {printable(name)} names is in {origin}, e.g. '
                            f'{printable(min(listed, default="(it is empty)"))}')
        twice = sorted(listed & split_of.keys())
        if twice:
            raise DataError(f'{len(twice)} files are in both lists of {origin}, e.g. {printable(twice[0])}')
        split_of.update(dict.fromkeys(listed, LISTS[os.path.basename(name)]))
        absent += len(listed - spoken.keys())
    if absent:
        print(f'warning: {absent} files of the two lists are not in {origin}')
    return split_of
