"""The Free Spoken Digit Dataset."""
import re

from engine.errors import DataError
from recipes.plan import Plan, source_or_download

source = ''             # archive or folder in its layout; without one it is downloaded

FSDD_URL = ('https://github.com/Jakobovski/free-spoken-digit-dataset/archive/'
            '26eb9aaf76e81b692f806f9140c2d2777410d7a1.zip')


def plan(settings):
    """Official split: recordings 0-4 of each speaker and digit are the test; speakers are the folds."""
    files = source_or_download(settings, FSDD_URL)
    named = {i: re.fullmatch(r'(?:.*/)?([^/]*/(\d)_([A-Za-z]+)_(\d+)(?:\.[^./]*)?)', name, re.DOTALL)
             for i, name in files.audio() if 'recordings' in name.split('/')[:-1]}
    speakers = sorted({match[3] for match in named.values() if match})
    made = Plan([str(digit) for digit in range(10)], files.place, lambda i: named[i][1], lambda i: int(named[i][2]),
                lambda i: speakers.index(named[i][3]), speakers)
    for i, match in named.items():
        if match:
            made.add(i, 'test' if int(match[4]) < 5 else 'train')
    if not speakers:
        raise DataError(f'{settings.source or FSDD_URL} holds no recordings/DIGIT_SPEAKER_NUMBER.wav, as the data set '
                        'does: is it another one?')
    if len(made.numbers) != 3000 or len(speakers) != 6:
        print(f'warning: {len(made.numbers)} recordings of {len(speakers)} speakers; the data set has 3000 of 6')
    return made
