"""The Free Spoken Digit Dataset."""
import os
import re

from audio.sources import list_source
from recipes.plan import Plan, source_or_download

source = ''             # archive or folder in its layout; without one it is downloaded

FSDD_URL = ('https://github.com/Jakobovski/free-spoken-digit-dataset/archive/'
            '26eb9aaf76e81b692f806f9140c2d2777410d7a1.zip')


def plan(settings):
    """Official split: recordings 0-4 of each speaker and digit are the test; speakers are the folds."""
    files = list_source(source_or_download(settings, FSDD_URL), settings.work_dir)
    named = {i: (name, re.fullmatch(r'(\d)_([A-Za-z]+)_(\d+)', os.path.splitext(os.path.basename(name))[0]))
             for i, name in files.audio() if 'recordings' in name.split('/')[:-1]}
    speakers = sorted({match[2] for _, match in named.values() if match})
    made = Plan(files.place, [str(digit) for digit in range(10)], speakers)
    for i, (name, match) in named.items():
        if match:
            made.add('/'.join(name.split('/')[-2:]), i, 'test' if int(match[3]) < 5 else 'train', int(match[1]),
                     speakers.index(match[2]))
    if len(made.keys) != 3000 or len(speakers) != 6:
        print(f'warning: {len(made.keys)} recordings of {len(speakers)} speakers; the data set has 3000 of 6')
    return made
