"""Stage 0: audio files -> packed clips in data/NAME, the one format that the other stages read.

    python prepare.py demo                                   # ten classes of synthetic sounds, no download
    python prepare.py fsdd [--source=ARCHIVE_OR_FOLDER]      # Free Spoken Digit Dataset
    python prepare.py esc50 [--source=ARCHIVE_OR_FOLDER]     # ESC-50, or anything in its layout
    python prepare.py speechcommands [--source=ARCHIVE_OR_FOLDER]                    # Speech Commands v2
    python prepare.py audioset --source=FOLDER --segments=balanced_train_segments.csv,unbalanced_train_segments.csv
    python prepare.py folder --source=ARCHIVE_OR_FOLDER      # any tree of audio files; parent folders are the classes

Sources are zip or tar archives or folders, of wav, flac, ogg, mp3, ... at any sample rate, channel count and length;
m4a, webm and the like with torchcodec or the ffmpeg program. Decoding and resampling run in parallel processes; a shard
exists only when it is complete, so that an interrupted run goes on where it stopped, and machines that see the same
source can share the work: --shards=1/4, --shards=2/4, ..., then the same command without it.

This file must not know the network.
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
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import torch
from tqdm import tqdm

import configurator
from audio import HOP_SAMPLES, SAMPLE_RATE, WINDOWS, frames_in, samples_for
from audio.clips import FORMAT_VERSION, key_hash, read_meta
from audio.decoding import NO_DECODER, decode
from audio.sources import ARCHIVE_ERRORS, is_compressed_tar, read_bytes, reason_of
from configurator import words
from engine import processes
from engine.errors import ConfigError, DataError
from engine.files import printable, replacing
from fast.spectrogram import fbank
from recipes import audioset, demo, esc50, folder, fsdd, speechcommands

source = ''             # archive or folder to read; fsdd, esc50 and speechcommands are downloaded without one
out_dir = ''            # where the set goes; default: data/ and the name of the recipe, of the AudioSet part or, for
                        # folder, of the source
max_bad = 0.01          # share of files that may be unreadable; more is an error
workers = -1            # processes that decode; -1: one per core, 0: none, all in this one
shards = ''             # i/n: make only the i-th of n shares of the shards, i from 1, for n machines; then run without
overwrite = False       # delete a set that is there already
label = 'parent'        # folder: class of a file, its parent folder's name; none: no labels
test_part = 0.2         # folder: share of the files that go to the test split, by a stable hash of their names
split_file = ''         # folder: a csv of lines `path,split` instead (train, valid or test), paths as inside the source
max_minutes = 20.0      # longer files are skipped: cut them first
esc10 = False           # esc50: only its ESC-10 part, ten classes
segments = ''           # audioset: its csv files of segments, separated by commas; eval in a name: the eval split
labels = ''             # audioset: class_labels_indices.csv; '': downloaded
clips = 4000            # demo: number of clips
seed = 1                # demo: which clips

CHUNK = 4                                           # files that a worker takes at a time
MINUTE = 6000                                       # frames
# A disk or network that fails, too many open files, no space: reasons to stop, not to leave a file out.
NOT_THE_FILES_FAULT = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENOMEM,
                       errno.ETIMEDOUT, errno.ENOTCONN, errno.EROFS)
CACHED = r'source-[0-9a-f]{8}\.(zip|tar|tgz|csv)'   # a download or decompressed archive, until the set is complete


# -------------------------------------------------------------------------------------------------------------- packing

def pack_clip(place, max_seconds):
    """One file to (int16 samples, log-mel sums (windows, 2)), or to the reason why not, a str."""
    try:
        if place[0] == 'demo':
            wave = demo.synthesise(*place[1:])
        else:
            wave = decode(read_bytes(place), max_seconds)
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
        self.count = count
        self.restart()

    def restart(self):
        self.pool = concurrent.futures.ProcessPoolExecutor(self.count, multiprocessing.get_context('spawn'),
                                                           torch.set_num_threads, (1,))

    def submit(self, chunk, max_seconds):
        return self.pool.submit(pack_chunk, chunk, max_seconds)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown(wait=True, cancel_futures=True)


# --------------------------------------------------------------------------------------------------------------- shards

def prepare(plan, settings):
    """Write every shard of the plan, or of this machine's share, that is not there yet; when all are there,
    skipped.tsv and meta.json. Raises DataError."""
    every = plan.shards()
    if not every:
        raise DataError(f'no audio file found in {settings.source or plan.name}')
    os.makedirs(settings.out_dir, exist_ok=True)
    part, parts = share_of(settings.shards)
    shards = every[part::parts]
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)                                            # as in the workers: the same rounding
        bar = stack.enter_context(tqdm(total=sum(len(rows) for _, rows in shards), unit='clip',
                                       desc=f'preparing {plan.name}', mininterval=0.5))
        pool = stack.enter_context(Workers(settings.workers)) if settings.workers else None
        for base, rows in shards:
            path = os.path.join(settings.out_dir, base)
            entries = [plan.entry(i) for i in rows]
            made_by = shard_plan(path)
            if made_by is None:
                write_shard(path, entries, plan, settings, pool, bar)
            elif made_by == plan_digest(entries, settings):
                bar.update(len(entries))
            else:
                raise DataError(f'{path}.npz is of another source or other settings: add --overwrite to start again')
    if settings.shards:
        print(f'share {settings.shards}: {len(shards)} of {len(every)} shards are in {settings.out_dir}; when all are, '
              'run the same command without --shards')
        return
    finish(plan, every, settings)


def share_of(text):
    """'2/4' -> (1, 4): the shards 1, 5, 9, ... counted from 0."""
    if not text:
        return 0, 1
    match = re.fullmatch(r'(\d+)/(\d+)', text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f'shards = {text!r} is not i/n, the i-th of n shares, i from 1 to n')
    return int(match[1]) - 1, int(match[2])


def plan_digest(entries, settings):
    """What a shard is made of: it changes with every setting that changes its bytes."""
    how = settings.max_minutes, settings.seed if entries[0].place[0] == 'demo' else None
    text = json.dumps([how, [(entry.key, entry.label, entry.fold) for entry in entries]])
    return hashlib.sha256(text.encode()).hexdigest()


def shard_plan(path):
    """The plan that a finished shard was made by; None if there is no such shard."""
    try:
        with np.load(path + '.npz', allow_pickle=False) as stored:
            return str(stored['plan'])
    except FileNotFoundError:
        return None
    except Exception:                           # a damaged file can fail in any way; it is not a shard
        raise DataError(f'{path}.npz is damaged: delete it and run again') from None


def write_shard(path, entries, plan, settings, pool, bar):
    """Decode the entries into path.pcm, then their index into path.npz, whose presence says that both are whole."""
    good, skipped, lengths, stats = [], [], [], []
    with replacing(path + '.pcm', 'wb') as f:
        places = [entry.place for entry in entries]
        for entry, result in zip(entries, pack_in_order(places, settings.max_minutes * 60, pool)):
            bar.update()
            if isinstance(result, str):
                skipped.append((entry.key, result))
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
        'skipped': np.array(skipped, dtype=str).reshape(-1, 2), 'plan': np.array(plan_digest(entries, settings))}
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


def finish(plan, shards, settings):
    """Check how much was skipped, then write skipped.tsv and meta.json from the finished shards."""
    splits, sums, frames = {}, np.zeros((len(WINDOWS), 2)), 0
    skipped, undecoded, example = 0, 0, None
    table = os.path.join(settings.out_dir, 'skipped.tsv')
    with replacing(table) as f:
        for base, _ in shards:
            with np.load(os.path.join(settings.out_dir, base + '.npz'), allow_pickle=False) as stored:
                for key, reason in stored['skipped']:
                    f.write(f'{printable(key)}\t{printable(reason)}\n')
                    skipped, undecoded, example = skipped + 1, undecoded + (NO_DECODER in reason), (key, reason)
                split = splits.setdefault(base.rsplit('-', 1)[0], {'clips': 0, 'seconds': 0.0})
                split['clips'] += len(stored['lengths'])
                split['seconds'] += float(stored['lengths'].sum() / SAMPLE_RATE)
                if base.startswith('train'):
                    sums += stored['stats'].sum(axis=0)
                    frames += int(frames_in(stored['lengths']).sum())
    if not skipped:
        os.remove(table)
    total = sum(len(rows) for _, rows in shards)
    if skipped == total:
        remove_set(settings.out_dir)
        raise DataError(f'none of the {total} files in {settings.source} could be read, e.g. '
                        f'{printable(example[0])}: {example[1]}')
    if skipped > settings.max_bad * total:
        install = f' ({undecoded} need torchcodec or ffmpeg: install one and add --overwrite)' if undecoded else ''
        raise DataError(f'{skipped} of {total} files were skipped{install}, more than max_bad = {settings.max_bad:g} '
                        f'allows; see {table}; to accept them run again with '
                        f'--max_bad={math.ceil(100 * skipped / total) / 100:g}')
    statistics = {}
    for window, (total_sum, squares) in zip(WINDOWS, sums):
        values = max(frames, 1) * 128
        mean = total_sum / values
        statistics[window] = [mean, math.sqrt(max(squares / values - mean ** 2, 0))]
    meta = {'name': os.path.basename(settings.out_dir), 'version': FORMAT_VERSION, 'sample_rate': SAMPLE_RATE,
            'classes': plan.classes, 'multi_label': plan.multi_label, 'folds': plan.folds, 'splits': splits,
            'statistics': statistics, 'skipped': skipped,
            'hours': sum(split['seconds'] for split in splits.values()) / 3600}
    with replacing(os.path.join(settings.out_dir, 'meta.json')) as f:
        json.dump(meta, f, indent=1)
    for file in os.listdir(settings.out_dir):
        if re.fullmatch(CACHED, file):
            os.remove(os.path.join(settings.out_dir, file))
    describe(meta, settings.out_dir)
    if undecoded:
        print(f'{undecoded} of the skipped files need torchcodec or the ffmpeg program: install one, then --overwrite')


def remove_set(folder):
    """Delete a prepared set, whole or not: the files that this script writes and no others,
    then the folder if it is empty."""
    ours = re.compile(r'(meta\.json|skipped\.tsv|' + CACHED + r'|(train|valid|test|eval)-\d{5}\.(pcm|npz))(\.tmp)?')
    for file in os.listdir(folder):
        if ours.fullmatch(file):
            os.remove(os.path.join(folder, file))
    if not os.listdir(folder):
        os.rmdir(folder)


def describe(meta, folder):
    parts = ', '.join(f'{name} {split["clips"]:,}' for name, split in meta['splits'].items())
    skipped = f', {meta["skipped"]} skipped (see {folder}/skipped.tsv)' if meta['skipped'] else ''
    print(f'{folder}: {meta["hours"]:.2f} hours, {len(meta["classes"])} classes, clips: {parts}{skipped}')


# -------------------------------------------------------------------------------------------------------------- recipes


RECIPES = {'demo': demo.plan_demo, 'fsdd': fsdd.plan_fsdd, 'esc50': esc50.plan_esc50,
           'speechcommands': speechcommands.plan_speechcommands, 'audioset': audioset.plan_audioset,
           'folder': folder.plan_folder}


# --------------------------------------------------------------------------------------------------------------- sounds
# The demo's ten classes. Each function gets the sample times (n,) in seconds, a pitch in Hz and a generator
# -> (n,) waveform.


# ----------------------------------------------------------------------------------------------------------------- main

def default_out_dir(recipe, settings):
    """data/NAME in the current folder; the part of AudioSet; a folder's or archive's own name for `folder`."""
    name = recipe
    if recipe == 'audioset':
        lists = ' '.join(os.path.basename(path) for path in words(settings.segments))
        name = 'as2m' if 'unbalanced' in lists else 'as20k' if 'balanced' in lists else 'as_eval'
    if recipe == 'folder':
        name = re.sub(r'[^A-Za-z0-9_.-]', '_', re.sub(r'(\.(zip|tar|tgz|gz|bz2|xz))+$', '',
                                                      os.path.basename(os.path.abspath(settings.source))))
    return os.path.join('data', name or 'folder')


def run(argv):
    if argv and argv[0] in ('-h', '--help') or not argv:
        print(__doc__)
    if not argv or argv[0].startswith('-') and argv[0] not in ('-h', '--help'):
        raise ConfigError(f'name a recipe first: {", ".join(RECIPES)}')
    recipe, *rest = argv
    settings = configurator.configure(__file__, rest if recipe not in ('-h', '--help') else argv)
    if recipe not in RECIPES:
        raise ConfigError(f'unknown recipe {recipe!r}: it is one of {", ".join(RECIPES)}')
    settings.out_dir = os.path.normpath(settings.out_dir or default_out_dir(recipe, settings))
    configurator.check_ranges(settings, max_bad=(0, 1), max_minutes=(0.01, 1e4), clips=(10, 10 ** 7), seed=(0, 2 ** 62))
    settings.workers = (os.cpu_count() or 1) if settings.workers < 0 else settings.workers
    share_of(settings.shards)
    if settings.shards and settings.overwrite:
        raise ConfigError('--shards with --overwrite would delete what other machines have made: delete '
                                       f'{settings.out_dir} yourself')
    if settings.shards and (not settings.source or recipe == 'audioset' and not settings.labels
                            or os.path.exists(settings.source) and is_compressed_tar(settings.source)):
        raise ConfigError('--shards needs a --source (for audioset --labels too) that no machine has to '
                                       'download or decompress: a folder, zip or uncompressed tar')
    if settings.overwrite and os.path.isdir(settings.out_dir):
        remove_set(settings.out_dir)
    if os.path.exists(os.path.join(settings.out_dir, 'meta.json')):
        describe(read_meta(settings.out_dir), settings.out_dir)
        print('it is there already; --overwrite makes it anew')
        return
    try:
        prepare(RECIPES[recipe](settings), settings)
    except DataError:
        if not settings.shards and os.path.isdir(settings.out_dir) and not any(
                file.endswith('.npz') for file in os.listdir(settings.out_dir)):
            remove_set(settings.out_dir)                            # not one whole shard: nothing half-written stays
        raise


if __name__ == '__main__':
    processes.main(run)
