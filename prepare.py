"""Stage 0: audio files -> packed clips in data/NAME, the one format that the other stages read.

    python prepare.py demo                                   # ten classes of synthetic sounds, no download
    python prepare.py fsdd [--source=ARCHIVE_OR_FOLDER]      # Free Spoken Digit Dataset
    python prepare.py esc50 [--source=ARCHIVE_OR_FOLDER]     # ESC-50, or anything in its layout
    python prepare.py speechcommands [--source=ARCHIVE_OR_FOLDER]                    # Speech Commands v2
    python prepare.py audioset --source=FOLDER --segments=balanced_train_segments.csv,unbalanced_train_segments.csv
    python prepare.py folder --source=ARCHIVE_OR_FOLDER      # any tree of audio files; parent folders are the classes
    python prepare.py RECIPE --help                          # the settings of a recipe; they stand in recipes/RECIPE.py

Sources are zip or tar archives or folders, of wav, flac, ogg, mp3, ... at any sample rate, channel count and length;
m4a, webm and the like with torchcodec or the ffmpeg program. Decoding and resampling run in parallel processes; a shard
exists only when it is complete, so that an interrupted run goes on where it stopped, and machines that see the same
source can share the work: --shards=1/4, --shards=2/4, ..., then the same command without it.

This file must not know the network, nor what a recipe does.
"""
import collections
import concurrent.futures
import contextlib
import errno
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import tempfile
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import torch
from tqdm import tqdm

import configurator
from audio import HOP_SAMPLES, WINDOWS, frames_in, making, samples_for
from audio.clips import key_hash, read_meta
from audio.decoding import NO_DECODER, decode, other_decoder
from audio.sources import ARCHIVE_ERRORS, is_compressed_tar, read_bytes, reason_of
from engine import processes
from engine.errors import ConfigError, DataError
from engine.files import printable, replacing
from fast.spectrogram import fbank
from recipes import audioset, demo, esc50, folder, fsdd, speechcommands
from recipes import plan as every_source

out_dir = ''            # where the set goes; default: data/ and the name of the recipe, of the AudioSet part or, for
                        # folder, of the source
workers = -1            # processes that decode; -1: one per core, 0: none, all in this one
shards = ''             # i/n: make only the i-th of n shares of the shards, i from 1, for n machines; then run without
overwrite = False       # make a set anew; the old one stays, and takes its space, until the new one is whole

RECIPES = {'demo': demo, 'fsdd': fsdd, 'esc50': esc50, 'speechcommands': speechcommands, 'audioset': audioset,
           'folder': folder}
RANGES = dict(max_bad=(0, 1), max_minutes=(0.01, 1e4), clips=(10, 10 ** 7), seed=(0, 2 ** 32 - 1))
CHUNK = 4                                           # files that a worker takes at a time
MINUTE = 6000                                       # frames
# A disk or network that fails, too many open files, no space: reasons to stop, not to leave a file out.
NOT_THE_FILES_FAULT = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENOMEM,
                       errno.ETIMEDOUT, errno.ENOTCONN, errno.EROFS)


# -------------------------------------------------------------------------------------------------------------- packing

def pack_clip(place, max_seconds):
    """One file, or what a function computes, to (int16 samples, log-mel sums (windows, 2)), or to the reason why not, a
    str."""
    try:
        wave = place[0](*place[1:]) if callable(place[0]) else decode(read_bytes(place), max_seconds)
    except (*ARCHIVE_ERRORS, ValueError, RuntimeError, TypeError, NotImplementedError, MemoryError) as error:
        if getattr(error, 'errno', None) in NOT_THE_FILES_FAULT:
            raise                                                           # or good clips would be skipped for good
        return reason_of(error)
    pcm = np.clip(np.rint(wave * 32768), -32768, 32767).astype(np.int16)
    centred = torch.from_numpy(pcm.astype(np.float32) / 32768)[None]
    centred = centred - centred.mean()
    stats, last = np.zeros((len(WINDOWS), 2)), int(frames_in(len(pcm)))
    for first in range(0, last, MINUTE):                                    # so that a long clip takes little memory
        piece = centred[:, first * HOP_SAMPLES:samples_for(min(first + MINUTE, last))]
        for i, window in enumerate(WINDOWS):
            x = fbank(piece, torch.tensor([piece.shape[1]]), window).double()
            stats[i] += x.sum().item(), x.square().sum().item()
    return pcm, stats


def pack_chunk(places, max_seconds):
    return [pack_clip(place, max_seconds) for place in places]


def pack_in_order(places, max_seconds, pool):
    """Yield pack_clip's result for every place, in order, computed by the pool's workers (None: in this process).

    A file that crashes its decoder costs that file and no other.
    """
    chunks = collections.deque(places[i:i + CHUNK] for i in range(0, len(places), CHUNK))
    waiting = collections.deque()
    while chunks or waiting:
        if pool is None:
            yield from pack_chunk(chunks.popleft(), max_seconds)
            continue
        try:
            while chunks and len(waiting) < 2 * pool.count:                 # few enough to bound the memory
                waiting.append((chunks[0], pool.submit(chunks[0], max_seconds)))
                chunks.popleft()
            results = waiting[0][1].result()
            waiting.popleft()
        except BrokenProcessPool:                                           # a worker died, of any of these chunks
            pool.restart()
            chunks.extendleft(chunk for chunk, _ in reversed(waiting))
            waiting.clear()
            results = pack_one_by_one(chunks.popleft(), max_seconds)
        yield from results


def pack_one_by_one(chunk, max_seconds):
    """After a crash: one file at a time in one process, so that only the culprit is lost."""
    with Workers(1) as alone:
        for place in chunk:
            try:
                yield alone.submit([place], max_seconds).result()[0]
            except BrokenProcessPool:
                alone.restart()
                yield 'its decoder crashed'


class Workers:
    """A pool of decoding processes that can be started again after one has died."""

    def __init__(self, count):
        self.count, self.scratch = count, tempfile.TemporaryDirectory()
        self.restart()

    def restart(self):
        self.pool = concurrent.futures.ProcessPoolExecutor(self.count, multiprocessing.get_context('spawn'),
                                                           start_worker, (self.scratch.name,))

    def submit(self, chunk, max_seconds):
        """Start a worker too, if more can run. They never see Ctrl-C, not even before their imports: it goes to every
        process of a terminal, and this one ends them."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            return self.pool.submit(pack_chunk, chunk, max_seconds)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind and not issubclass(kind, Exception):                        # interrupted: not even their last files
            for process in multiprocessing.active_children():
                process.terminate()
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.scratch.cleanup()                                              # of decoders that were ended in the middle


def start_worker(scratch):
    torch.set_num_threads(1)
    tempfile.tempdir = scratch


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
        bar = stack.enter_context(tqdm(total=sum(len(rows) for _, rows in mine), unit='clip', mininterval=0.5,
                                       desc=f'preparing {printable(os.path.basename(settings.out_dir))}'))
        pool = stack.enter_context(Workers(settings.workers)) if settings.workers else None
        for base, rows in mine:
            path = os.path.join(settings.work_dir, base)
            entries = [plan.entry(i) for i in rows]
            if is_made(path, entries, plan, settings):
                bar.update(len(entries))
            else:
                write_shard(path, entries, plan, settings, pool, bar)
    if settings.shards:
        print(f'share {settings.shards}: {len(mine)} of {len(every)} shards are in {settings.work_dir}; when all are, '
              'run the same command without --shards')
        return
    making.finish(plan, every, settings)


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
    for file in sorted(os.listdir(settings.work_dir)) if os.path.isdir(settings.work_dir) else ():
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
                                             or NO_DECODER in skipped[entry.key][0] and other_decoder())
                   for entry, stamp in zip(entries, stamps))


def write_shard(path, entries, plan, settings, pool, bar):
    """Decode the entries into path.pcm, then their index into path.npz, whose presence says that both are whole."""
    stamps = [entry.stamp() for entry in entries]                           # before their bytes are read
    good, skipped, lengths, stats = [], [], [], []
    with contextlib.suppress(FileNotFoundError):
        os.remove(path + '.npz')                                            # of before: no index of another .pcm
    with replacing(path + '.pcm', 'wb') as f:
        places = [entry.place for entry in entries]
        longest = getattr(settings, 'max_minutes', math.inf) * 60
        for entry, stamp, result in zip(entries, stamps, pack_in_order(places, longest, pool)):
            bar.update()
            if isinstance(result, str):
                skipped.append((entry.key, result, stamp))
                continue
            pcm, sums = result
            f.write(pcm.tobytes())
            good.append(entry)
            lengths.append(len(pcm))
            stats.append(sums)
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
    settings.workers = (os.cpu_count() or 1) if settings.workers < 0 else settings.workers
    share_of(settings.shards)
    if settings.shards and settings.overwrite:
        raise ConfigError('--shards with --overwrite would delete what other machines have made: delete '
                          f'{settings.out_dir} yourself')
    if settings.shards and not (getattr(settings, 'source', True) and getattr(settings, 'labels', True)) or (
            settings.shards and os.path.exists(getattr(settings, 'source', '')) and is_compressed_tar(settings.source)):
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
            if not settings.shards and os.path.isdir(settings.work_dir) and not any(
                    file.endswith('.npz') for file in os.listdir(settings.work_dir)):
                making.remove_unfinished(settings.work_dir)         # not one whole shard: nothing half-written stays
            raise


if __name__ == '__main__':
    processes.main(run)
