"""Audio files that a user names, opened as clips in memory."""
import os

from tqdm import tqdm

from audio.clips import Clips
from audio.decoding import decode_file, to_pcm
from audio.sources import list_source
from engine.errors import ConfigError, DataError
from engine.files import printable


def named_files(text):
    """The paths in a text, folders as the audio files in them, sorted. A comma separates, unless the whole text, or a
    run of its parts, is the name of something that exists. Raises ConfigError, DataError."""
    parts, paths = [text] if os.path.exists(text) else text.split(','), []
    while parts:
        runs = [','.join(parts[:end]).strip() for end in range(1, len(parts) + 1)]
        end = next((end for end, run in enumerate(runs) if os.path.exists(run)), 0)
        path, parts = runs[end], parts[end + 1:]
        if os.path.isdir(path):
            inside = sorted(name for _, name in list_source(path, '').audio())
            if not inside:
                raise DataError(f'{path} holds no audio file')
            paths += [os.path.join(path, name) for name in inside]
        elif path:
            paths.append(path)
    if not paths:
        raise ConfigError(f'wav = {text!r} names no file')
    return paths


def open_files(paths, max_minutes, process):
    """Those of the files that can be read, as clips; the others are named, a line each. -> clips, errors of the others.
    Raises DataError if none can be read."""
    waves, read, errors = [], [], []
    for path in tqdm(paths, desc='decoding', leave=False, disable=not process.is_main or None):
        try:
            wave = decode_file(path, 60 * max_minutes)
        except DataError as error:
            errors.append(error)
            continue
        waves.append(to_pcm([wave]))
        read.append(path)
    for error in errors if len(paths) > 1 else ():
        process.print(f'left out: {printable(error)}')
    if not waves:
        complain(errors, paths)
    return Clips.of_waves(waves, read), errors


def complain(errors, paths):
    """Raise one DataError for the files among the paths that could not be read."""
    if errors:
        raise DataError(str(errors[0]) if len(paths) == 1 else
                        f'{len(errors)} of {len(paths)} files could not be read: {errors[0]}')
