"""Stage 0: audio files -> packed clips in data/NAME, the one format that the other stages read.

    python prepare.py demo                                   # ten classes of synthetic sounds, no download
    python prepare.py fsdd [--source=ARCHIVE_OR_FOLDER]      # Free Spoken Digit Dataset
    python prepare.py esc50 [--source=ARCHIVE_OR_FOLDER]     # ESC-50, or anything in its layout
    python prepare.py speechcommands [--source=ARCHIVE_OR_FOLDER]                    # Speech Commands v2
    python prepare.py audioset --source=FOLDER --segments=balanced_train_segments.csv,unbalanced_train_segments.csv
    python prepare.py folder --source=ARCHIVE_OR_FOLDER      # any tree of audio files; parent folders are the classes
    python prepare.py RECIPE --help                          # the settings of a recipe; they stand in recipes/RECIPE.py

Sources are zip or tar archives or folders, of wav, flac, ogg, mp3, ... at any sample rate, channel count and length;
m4a, webm and the like with the ffmpeg program. Decoding and resampling run in parallel processes; a shard
exists only when it is complete, so that an interrupted run goes on where it stopped, and machines that see the same
source can share the work: --shards=1/4, --shards=2/4, ..., then the same command without it.

This file must not know the network, nor what a recipe does.
"""
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import re
import tempfile

import numpy as np
import torch
from tqdm import tqdm

import configurator
from audio import HOP_SAMPLES, WINDOWS, frames_in, making, samples_for
from audio.clips import key_hash, read_meta
from audio.decoding import NO_DECODER, Spilled, decode, has_ffmpeg, pieces_of, to_pcm
from audio.sources import ARCHIVE_ERRORS, content_of, kind_of, reason_of
from audio.workers import AHEAD, Worker, in_order
from engine import machine, processes
from engine.errors import ConfigError, DataError
from engine.files import names_in, printable, replacing
from fast.spectrogram import fbank
from recipes import audioset, demo, esc50, folder, fsdd, speechcommands
from recipes import plan as every_source

out_dir = ''            # where the set goes; default: data/ and the name of the recipe, of the AudioSet part or, for
                        # folder, of the source
workers = -1            # processes that decode; -1: one per core, 0: none, all in this one
memory = 0.0            # GB for all processes; larger clips go by way of the disk; 0: half of the machine's
shards = ''             # i/n: make only the i-th of n shares of the shards, i from 1, for n machines; then run without
overwrite = False       # make a set anew; the old one stays, and takes its space, until the new one is whole

RECIPES = {'demo': demo, 'fsdd': fsdd, 'esc50': esc50, 'speechcommands': speechcommands, 'audioset': audioset,
           'folder': folder}
RANGES = dict(memory=(0, 1e6), max_bad=(0, 1), max_minutes=(0.01, 1e4), clips=(10, 10 ** 7), seed=(0, 2 ** 32 - 1))
FRAMES = 1000                                       # that are computed at a time
OWN_BYTES = 720 << 20                               # what this process and the libraries take that the workers share,
PROCESS_BYTES = 64 << 20                            # and what each worker takes for itself, beside clips
NUMBERS = itertools.count()
# A disk or network that fails, too many open files, no space: reasons to stop, not to leave a file out.
NOT_THE_FILES_FAULT = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENOMEM,
                       errno.ETIMEDOUT, errno.ENOTCONN, errno.EROFS)


# -------------------------------------------------------------------------------------------------------------- packing

def pack_clip(place, max_seconds, most=math.inf):
    """One file, or what a function computes, to (int16 samples, log-mel sums (windows, 2)), or to the reason why not, a
    str. Samples of more than `most` bytes are Spilled."""
    path = os.path.join(tempfile.gettempdir(), f'clip-{os.getpid()}-{next(NUMBERS)}')
    collect = functools.partial(to_pcm, path=path, most=most)
    try:
        if callable(place[0]):
            pcm = collect([place[0](*place[1:])])
        else:
            with content_of(place) as content:
                pcm = decode(content, max_seconds, collect)
    except (*ARCHIVE_ERRORS, ValueError, RuntimeError, TypeError, NotImplementedError, MemoryError) as error:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)
        if getattr(error, 'errno', None) in NOT_THE_FILES_FAULT:
            raise                                                           # or good clips would be skipped for good
        return reason_of(error)
    mean = sum(int(part.sum(dtype=np.int64)) for part in pieces_of(pcm)) / 32768 / len(pcm)
    stats, last = np.zeros((len(WINDOWS), 2)), int(frames_in(len(pcm)))
    for first in range(0, last, FRAMES):                                    # so that a long clip takes little memory
        piece = pcm[first * HOP_SAMPLES:samples_for(min(first + FRAMES, last))]
        piece = torch.from_numpy(piece.astype(np.float32) / 32768)[None] - mean
        for i, window in enumerate(WINDOWS):
            x = fbank(piece, torch.tensor([piece.shape[1]]), window).double()
            stats[i] += x.sum().item(), x.square().sum().item()
    return pcm, stats


# --------------------------------------------------------------------------------------------------------------- shards

def prepare(plan, settings):
    """Write every shard of the plan, or of this machine's share, that is not there yet; when all are there,
    skipped.tsv and meta.json. Raises DataError."""
    every = plan.shards()
    if not every:
        raise DataError(f'no audio file found in {settings.source}')
    remove_others(every, settings)
    os.makedirs(settings.work_dir, exist_ok=True)
    part, parts = share_of(settings.shards)
    mine = every[part::parts]
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)                                            # as in the workers: the same rounding
        how = getattr(settings, 'max_minutes', math.inf) * 60, bytes_per_clip(settings)
        folder = stack.enter_context(tempfile.TemporaryDirectory('', making.TEMPORARY, settings.work_dir))
        workers = [stack.enter_context(contextlib.closing(Worker(folder))) for _ in range(settings.workers)]
        if not workers:
            stack.callback(setattr, tempfile, 'tempdir', tempfile.tempdir)
            tempfile.tempdir = folder
        bar = stack.enter_context(tqdm(total=sum(len(rows) for _, rows in mine), unit='clip', mininterval=0.5,
                                       desc=f'preparing {printable(os.path.basename(settings.out_dir))}'))
        for base, rows in mine:
            path = os.path.join(settings.work_dir, base)
            entries = [plan.entry(i) for i in rows]
            if is_made(path, entries, plan, settings):
                bar.update(len(entries))
            else:
                places = [entry.place for entry in entries]
                write_shard(path, entries, plan, settings, in_order(pack_clip, places, how, workers), bar)
    if settings.shards:
        print(f'share {settings.shards}: {len(mine)} of {len(every)} shards are in {settings.work_dir}; when all are, '
              'run the same command without --shards')
        return
    making.finish(plan, every, settings)


def bytes_per_clip(settings):
    """How large clips may be in memory, so that all processes together take what settings.memory allows.

    In memory are AHEAD clips a process, two copies of the one that each makes or sends, and one that this one receives.
    """
    processes = max(settings.workers, 1)
    return int(settings.memory * 1e9 - OWN_BYTES - processes * PROCESS_BYTES) // ((AHEAD + 2) * processes + 1)


def least_memory(workers):
    """GB with which clips of half a minute stay in memory."""
    return math.ceil((OWN_BYTES + max(workers, 1) * (PROCESS_BYTES + (10 << 20))) / 1e7) / 100


def share_of(text):
    """'2/4' -> (1, 4): the shards 1, 5, 9, ... counted from 0."""
    if not text:
        return 0, 1
    match = re.fullmatch(r'(\d+)/(\d+)', text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f'shards = {text!r} is not i/n, the i-th of n shares, i from 1 to n')
    return int(match[1]) - 1, int(match[2])


def remove_others(every, settings):
    """Delete shards of an unfinished set that are none of this plan's, if that is allowed. Raises DataError."""
    names = {base for base, _ in every}
    for file in names_in(settings.work_dir):
        if re.fullmatch(making.SHARD, file) and file[:-4] not in names:
            if not settings.overwrite:
                raise another_source(os.path.join(settings.work_dir, file))
            os.remove(os.path.join(settings.work_dir, file))


def another_source(path):
    return DataError(f'{path} was made of other files or with other settings, or the source has changed since: add '
                     '--overwrite to start again')


def plan_digest(entries, stamps, skipped, plan, settings):
    """What a shard is made of: it changes with every setting that changes its bytes, and with the content of its files
    (see Entry.stamp), but for those that were skipped."""
    how = [getattr(settings, 'max_minutes', None), len(plan.classes), plan.multi_label]
    text = json.dumps([how, [(entry.key, entry.label, entry.fold, entry.key not in skipped and stamp)
                             for entry, stamp in zip(entries, stamps)]])
    return hashlib.sha256(text.encode()).hexdigest()


def is_made(path, entries, plan, settings):
    """Whether a shard is there, and skipped no file that might be read now: one that has changed since, or one for
    which there is a decoder now. Raises DataError if it is of other files, unless those may be replaced."""
    try:
        with np.load(path + '.npz', allow_pickle=False) as stored:
            made_by, skipped = str(stored['plan']), {key: rest for key, *rest in stored['skipped'].tolist()}
    except FileNotFoundError:
        return False
    except Exception:                           # a damaged file can fail in any way; it is not a shard
        raise DataError(f'{path}.npz is damaged: delete it and run again') from None
    stamps = [entry.stamp() for entry in entries]
    if made_by != plan_digest(entries, stamps, skipped, plan, settings):
        if not settings.overwrite:
            raise another_source(path + '.npz')
        return False
    return not any(entry.key in skipped and (skipped[entry.key][1] != stamp
                                             or NO_DECODER in skipped[entry.key][0] and has_ffmpeg())
                   for entry, stamp in zip(entries, stamps))


def write_shard(path, entries, plan, settings, results, bar):
    """Write what pack_clip makes of the entries into path.pcm, then their index into path.npz, whose presence says that
    both are whole."""
    stamps = [entry.stamp() for entry in entries]                           # before their bytes are read
    good, skipped, lengths, stats = [], [], [], []
    with contextlib.suppress(FileNotFoundError):
        os.remove(path + '.npz')                                            # of before: no index of another .pcm
    with replacing(path + '.pcm', 'wb') as f:
        for entry, stamp, result in zip(entries, stamps, results):
            bar.update()
            if isinstance(result, str):
                skipped.append((entry.key, result, stamp))
                continue
            pcm, sums = result
            f.writelines(pieces_of(pcm))
            good.append(entry)
            lengths.append(len(pcm))
            stats.append(sums)
            if isinstance(pcm, Spilled):
                os.remove(pcm.path)
    lengths = np.array(lengths, np.int64)
    arrays = {
        'offsets': np.cumsum(lengths) - lengths, 'lengths': lengths, 'labels': labels_of(good, plan),
        'folds': np.array([entry.fold for entry in good], np.int16),
        'hashes': np.array([key_hash(entry.key) for entry in good], np.uint32),
        'stats': np.array(stats).reshape(-1, len(WINDOWS), 2),
        'keys': np.array([entry.key for entry in good], dtype=str),
        'skipped': np.array(skipped, dtype=str).reshape(-1, 3),
        'plan': np.array(plan_digest(entries, stamps, {key for key, _, _ in skipped}, plan, settings))}
    with replacing(path + '.npz', 'wb') as f:
        np.savez(f, **arrays)


def labels_of(entries, plan):
    """(n,) class indices, or (n, ceil(classes / 8)) packed bits of a multi-label set."""
    if not plan.multi_label:
        return np.array([entry.label for entry in entries], np.int32)
    bits = np.zeros((len(entries), len(plan.classes)), bool)
    for row, entry in zip(bits, entries):
        row[list(entry.label)] = True
    return np.packbits(bits, axis=1)


# ----------------------------------------------------------------------------------------------------------------- main

def configured(argv):
    """-> the recipe, its settings checked. Raises ConfigError."""
    if argv and argv[0] in ('-h', '--help'):
        print(__doc__)
        configurator.configure(__file__, argv)
    if not argv or argv[0].startswith('-'):
        raise ConfigError(f'name a recipe first: {", ".join(RECIPES)}')
    name, *rest = argv
    if name not in RECIPES:
        raise ConfigError(f'unknown recipe {name!r}: it is one of {", ".join(RECIPES)}')
    recipe = RECIPES[name]
    lenders = [(module.__file__,) for module in [recipe, every_source][:1 + hasattr(recipe, 'source')]]
    settings = configurator.configure(__file__, rest, *lenders)
    configurator.check_ranges(settings, **{key: RANGES[key] for key in RANGES if hasattr(settings, key)})
    getattr(recipe, 'check', lambda _: None)(settings)
    settings.out_dir = os.path.normpath(settings.out_dir or os.path.join(
        'data', getattr(recipe, 'name', lambda _: name)(settings)))
    settings.work_dir = os.path.join(settings.out_dir, making.UNFINISHED)
    settings.memory = settings.memory or max(machine.memory() / 2e9, least_memory(settings.workers))
    if settings.workers < 0:
        settings.workers = next((n for n in range(machine.cores(), 1, -1) if least_memory(n) <= settings.memory), 1)
    if settings.memory < least_memory(settings.workers):
        raise ConfigError(f'memory = {settings.memory:g} GB is too little for {settings.workers} workers: give '
                          f'--memory={least_memory(settings.workers):.2f} or more, or fewer --workers')
    share_of(settings.shards)
    if settings.shards and settings.overwrite:
        raise ConfigError('--shards with --overwrite would delete what other machines have made: delete '
                          f'{settings.out_dir} yourself')
    source = getattr(settings, 'source', None)                              # None: the recipe reads no files
    if settings.shards and (source == '' or not getattr(settings, 'labels', True)
                            or source and os.path.exists(source) and kind_of(source) == 'compressed tar'):
        raise ConfigError('--shards needs a --source (for audioset --labels too) that no machine has to '
                          'download or decompress: a folder, zip or uncompressed tar')
    return recipe, settings


def run(argv):
    recipe, settings = configured(argv)
    if not settings.overwrite and making.is_whole(settings.out_dir) and not making.is_whole(settings.work_dir):
        making.describe(read_meta(settings.out_dir), settings.out_dir)
        print('it is there already; --overwrite makes it anew')
        return
    making.check_out_dir(settings)
    with making.interruptible(settings), making.alone(settings, settings.shards.replace('/', '-of-')):
        if making.is_whole(settings.work_dir):                              # ended while it was moved into its place
            making.move_in(settings.work_dir, settings.out_dir)
            if not settings.overwrite:
                making.describe(read_meta(settings.out_dir), settings.out_dir)
                return
        try:
            prepare(recipe.plan(settings), settings)
        except DataError:
            if not settings.shards and not any(file.endswith('.npz') for file in names_in(settings.work_dir)):
                making.remove_unfinished(settings.work_dir)         # not one whole shard: nothing half-written stays
            raise


if __name__ == '__main__':
    processes.main(run)
