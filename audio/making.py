"""The folder of a prepared set while it is made: which files are ours, the old set until the new is whole, the end.

A set is made in a folder inside its own, so that nothing is replaced before all of it is there, and moved out then.
What no preparation has written is never written over or deleted.
"""
import contextlib
import json
import math
import os
import re
import shutil
import signal
import sys

import numpy as np

from audio import N_MELS, SAMPLE_RATE, WINDOWS, frames_in
from audio.clips import FORMAT_VERSION
from audio.decoding import NO_DECODER
from engine.errors import ConfigError, DataError
from engine.files import fsync_folder, locked, names_in, printable, replacing

TEMPORARY = 'temporary-'                            # a folder in that: clips too long for memory, ffmpeg's files
UNFINISHED = '.unfinished'                          # the folder inside the set's that it is made in
CACHED = r'source-[0-9a-f]{8}\.(zip|tar|tgz|csv)'   # a download or decompressed archive, until the set is complete
SHARD = r'(train|valid|test|eval)-\d{5}\.(npz|pcm)'
NAMES = re.compile(rf'(meta\.json|skipped\.tsv|{SHARD})')


def is_whole(folder):
    """Whether meta.json, which comes last, is there and written by a preparation."""
    try:
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as f:
            return {'name', 'version', 'sample_rate', 'splits'} <= json.load(f).keys()
    except (OSError, ValueError, AttributeError):
        return False


def files_of_set(folder):
    """The files in a folder that a preparation has written: shards whose index holds its plan, and what goes with
    them; meta.json comes last."""
    there, ours = names_in(folder), []
    for file in there:
        if file.endswith('.npz') and NAMES.fullmatch(file):
            with contextlib.suppress(Exception):                            # whatever it is, it is not ours
                with np.load(os.path.join(folder, file), allow_pickle=False) as stored:
                    ours += [file[:-4] + '.pcm', file] if 'plan' in stored else []
    whole = is_whole(folder)
    ours += ['skipped.tsv'] * bool(ours or whole) + ['meta.json'] * whole
    return [file for file in ours if file in there]


def check_out_dir(settings):
    """Raise ConfigError for a folder in the source or around it, or with files of others under our names."""
    out_dir, source = settings.out_dir, getattr(settings, 'source', '')
    real, real_source = os.path.realpath(out_dir), os.path.realpath(source)
    work = os.path.join(real, UNFINISHED)
    if source and (os.path.isdir(source) and os.path.commonpath([real, real_source]) in (real, real_source)
                   or os.path.commonpath([work, real_source]) == work):
        raise ConfigError(f'{out_dir} lies in the source {source} or around it, and the set would be mixed with it: '
                          'choose another --out_dir')
    if is_whole(settings.work_dir):                                         # being moved out: a mixture
        return
    ours = files_of_set(out_dir)
    for file in names_in(out_dir):
        if NAMES.fullmatch(file) and file not in ours:
            raise ConfigError(f'{os.path.join(out_dir, file)} belongs to no prepared set: move it, or choose another '
                              '--out_dir')
    if ours and not is_whole(out_dir) and not settings.overwrite:
        raise ConfigError(f'{out_dir} holds parts of a set that was not finished in another way than now: add '
                          '--overwrite to start again')


def remove_set(folder):
    """Delete what a preparation has written, meta.json last."""
    for file in files_of_set(folder):
        os.remove(os.path.join(folder, file))


def move_in(work_dir, out_dir):
    """Replace the set in out_dir, if there is one, by the whole one in work_dir. After a crash in the middle the same
    call finishes it: a new meta.json still in work_dir says that it is to be done, an old one in out_dir that what lies
    there is old."""
    if is_whole(out_dir):
        remove_set(out_dir)
    files = filter(NAMES.fullmatch, os.listdir(work_dir))
    for file in sorted(files, key=lambda file: file == 'meta.json'):
        os.replace(os.path.join(work_dir, file), os.path.join(out_dir, file))
    fsync_folder(out_dir)
    remove_unfinished(work_dir)


def remove_unfinished(work_dir):
    """Delete what an unfinished preparation has left, then its folder if it is empty."""
    for file in names_in(work_dir):
        if file.startswith(TEMPORARY):                                      # of one that was killed
            shutil.rmtree(os.path.join(work_dir, file), ignore_errors=True)
        elif re.fullmatch(rf'({NAMES.pattern}|{CACHED})(\.tmp)?', file):
            os.remove(os.path.join(work_dir, file))
    remove_if_empty(work_dir)


@contextlib.contextmanager
def alone(settings, share):
    """Hold the set's folder for this process alone, or beside others that make other shares. Raises ConfigError.

    share: a name for this machine's share; '' for all.
    """
    shares, new = os.path.join(settings.work_dir, 'share-'), [settings.work_dir]
    while not os.path.exists(above := os.path.dirname(new[-1]) or '.'):
        new.append(above)
    with contextlib.ExitStack() as stack:
        for folder in reversed(new):
            stack.callback(remove_if_empty, folder)
        stack.enter_context(locked(shares + share if share else settings.out_dir))
        if share and os.path.exists(os.path.join(settings.out_dir, '.lock')):
            with locked(settings.out_dir):                                  # whoever makes all must not be at it
                pass
        for name in names_in(settings.work_dir):
            if name.startswith('share-') and not share:
                with locked(os.path.join(settings.work_dir, name)):
                    pass
                remove_if_empty(os.path.join(settings.work_dir, name))
        yield


def remove_if_empty(folder):
    with contextlib.suppress(OSError):
        os.rmdir(folder)


@contextlib.contextmanager
def interruptible(settings):
    """End on SIGTERM as on Ctrl-C, without a half-written file; a line says what stays. Exit code 143 or 130."""
    def end(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)                       # once is enough
        raise SystemExit(143)
    before, work_dir = signal.signal(signal.SIGTERM, end), settings.work_dir
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        kept = sum(file.endswith('.npz') for file in names_in(work_dir))
        print(f'interrupted; {kept} finished shards stay in {printable(work_dir)}: to go on, run the same command '
              'again', file=sys.stderr)
        raise SystemExit(getattr(stop, 'code', 130)) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def finish(plan, every, settings):
    """Check how much was skipped, write skipped.tsv and meta.json, and put the set in its place. Raises DataError."""
    splits, sums, frames, skipped = {}, np.zeros((len(WINDOWS), 2)), 0, []
    for base, _ in every:
        with np.load(os.path.join(settings.work_dir, base + '.npz'), allow_pickle=False) as stored:
            split = splits.setdefault(base.rsplit('-', 1)[0], {'clips': 0, 'seconds': 0.0, 'of_class': 0})
            split['clips'] += len(stored['lengths'])
            split['seconds'] += float(stored['lengths'].sum() / SAMPLE_RATE)
            split['of_class'] += clips_of_classes(stored['labels'], plan)
            skipped += stored['skipped'].tolist()
            if base.startswith('train'):
                sums += stored['stats'].sum(axis=0)
                frames += int(frames_in(stored['lengths']).sum())
    undecoded = check_skipped(skipped, sum(len(rows) for _, rows in every), settings)
    mean, square = sums.T / (max(frames, 1) * N_MELS)                       # (windows,) each
    deviation = np.sqrt(np.maximum(square - mean ** 2, 0))
    tell_small_classes(plan, {name: split.pop('of_class') for name, split in splits.items()})
    meta = {'name': os.path.basename(settings.out_dir), 'version': FORMAT_VERSION, 'sample_rate': SAMPLE_RATE,
            'classes': plan.classes, 'multi_label': plan.multi_label, 'folds': plan.folds, 'splits': splits,
            'statistics': dict(zip(WINDOWS, np.stack([mean, deviation], 1).tolist())), 'skipped': len(skipped),
            'hours': sum(split['seconds'] for split in splits.values()) / 3600}
    if settings.overwrite and not is_whole(settings.out_dir):
        remove_set(settings.out_dir)
    with replacing(os.path.join(settings.work_dir, 'meta.json')) as f:
        json.dump(meta, f, indent=1)
    move_in(settings.work_dir, settings.out_dir)
    describe(meta, settings.out_dir)
    if undecoded:
        print(f'{undecoded} of the skipped files need the ffmpeg program: install it, then --overwrite')


def check_skipped(skipped, total, settings):
    """Write skipped.tsv if files were skipped. -> how many for want of a decoder. Raises DataError if there are more
    than max_bad allows."""
    table = os.path.join(settings.work_dir, 'skipped.tsv')
    undecoded = sum(NO_DECODER in reason for _, reason, _ in skipped)
    if len(skipped) == total:
        remove_unfinished(settings.work_dir)
        raise DataError(f'none of the {total} files in {settings.source} could be read, e.g. '
                        f'{printable(skipped[0][0])}: {printable(skipped[0][1])}')
    with replacing(table) as f:
        f.writelines(f'{printable(key)}\t{printable(reason)}\n' for key, reason, _ in skipped)
    if not skipped:
        os.remove(table)
    elif len(skipped) > settings.max_bad * total:
        install = f' ({undecoded} need ffmpeg: install it and run again)' if undecoded else ''
        raise DataError(f'{len(skipped)} of {total} files were skipped{install}, more than max_bad = '
                        f'{settings.max_bad:g} allows; see {table}; mend them and run again, or accept them with '
                        f'--max_bad={math.ceil(100 * len(skipped) / total) / 100:g}')
    return undecoded


def clips_of_classes(labels, plan):
    """(classes,) clips of each class in a shard."""
    if plan.multi_label:
        return np.unpackbits(labels, axis=1, count=len(plan.classes)).sum(axis=0)
    return np.bincount(labels[labels >= 0], minlength=len(plan.classes))


def tell_small_classes(plan, of_split):
    """A line for classes of one clip or none, and one for those that a split lacks.

    of_split: {split: (classes,) clips of each class}
    """
    def tell(chosen, what):
        if chosen.any():
            names = [printable(plan.classes[i]) for i in np.flatnonzero(chosen)]
            print(f'note: {what}: {", ".join(names[:5])}{f", ... ({len(names)})" if len(names) > 5 else ""}')
    total = sum(of_split.values())
    tell(total == 1, 'classes of a single clip')
    tell(total == 0, 'classes without a clip')
    for name, clips in of_split.items():
        tell((clips == 0) & (total > 1), f'classes without a clip in {name}')


def describe(meta, folder):
    parts = ', '.join(f'{name} {split["clips"]:,}' for name, split in meta['splits'].items())
    skipped = f', {meta["skipped"]} skipped (see {folder}/skipped.tsv)' if meta['skipped'] else ''
    print(f'{printable(folder)}: {meta["hours"]:.2f} hours, {len(meta["classes"])} classes, clips: {parts}{skipped}')
