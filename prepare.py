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
import csv
import errno
import hashlib
import io
import json
import math
import multiprocessing
import os
import re
from array import array
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import configurator
import runtime
from data import (
    FORMAT_VERSION,
    HOP_SAMPLES,
    SAMPLE_RATE,
    WINDOWS,
    DataError,
    fbank,
    frames_in,
    key_hash,
    read_meta,
    samples_for,
    words,
)
from sources import (
    ARCHIVE_ERRORS,
    NO_DECODER,
    Strings,
    cache_name,
    decode,
    download,
    is_compressed_tar,
    list_source,
    read_bytes,
    reason_of,
)

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

SHARD_CLIPS = 2048                                  # files of one shard; 640 MB of ten-second clips
CHUNK = 4                                           # files that a worker takes at a time
MINUTE = 6000                                       # frames
# A disk or network that fails, too many open files, no space: reasons to stop, not to leave a file out.
NOT_THE_FILES_FAULT = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENOMEM,
                       errno.ETIMEDOUT, errno.ENOTCONN, errno.EROFS)
CACHED = r'source-[0-9a-f]{8}\.(zip|tar|tgz|csv)'   # a download or decompressed archive, until the set is complete
SPLITS = ('eval', 'test', 'train', 'valid')

FSDD_URL = ('https://github.com/Jakobovski/free-spoken-digit-dataset/archive/'
            '26eb9aaf76e81b692f806f9140c2d2777410d7a1.zip')
ESC50_URL = 'https://github.com/karolpiczak/ESC-50/archive/33c8ce9eb2cf0b1c2f8bcf322eb349b6be34dbb6.zip'
SPEECHCOMMANDS_URL = 'https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz'
SPEECHCOMMANDS_SHA256 = 'af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58'      # torchaudio's
SPEECHCOMMANDS_CLIPS = {'train': 84843, 'valid': 9981, 'test': 11005}
AUDIOSET_URL = 'https://storage.googleapis.com/us_audioset/youtube_corpus/v1/csv/'


@dataclass
class Entry:
    key: str                    # names the clip ever after
    place: tuple                # where its bytes are, see sources.read_bytes
    label: object               # class index, -1 for none, or a tuple of indices in a multi-label set
    fold: int                   # index into the set's folds, -1 for none


class Plan:
    """Which files become which clips of which split, a row each in arrays: less than 150 bytes a clip.

    place: a function of the file's number that gives what read_bytes wants to know.
    """

    def __init__(self, name, place, classes, folds=(), multi_label=False):
        self.name, self.place, self.multi_label = name, place, multi_label
        self.classes, self.folds = classes, list(folds)
        self.keys, self.files, self.splits, self.fold = Strings(), array('q'), array('b'), array('h')
        self.labels, self.label_ends = array('i'), array('q', [0])

    def add(self, key, file, split='train', label=-1, fold=-1):
        """label: a class, -1 for none, or several classes in a multi-label set."""
        self.keys.append(key)
        self.files.append(file)
        self.splits.append(SPLITS.index(split))
        self.fold.append(fold)
        self.labels.extend(label if self.multi_label else [label])
        self.label_ends.append(len(self.labels))

    def entry(self, i):
        labels = tuple(self.labels[self.label_ends[i]:self.label_ends[i + 1]])
        return Entry(self.keys[i], self.place(self.files[i]), labels if self.multi_label else labels[0],
                     self.fold[i])

    def shards(self):
        """[(name, rows)] of at most SHARD_CLIPS clips of one split, in the order of the keys; of clips with one key
        the last counts, as in an archive that was added to."""
        order = np.array(sorted(range(len(self.keys)), key=self.keys.__getitem__), dtype=np.int64)
        is_last = np.ones(len(order), bool)
        is_last[:-1] = [self.keys[a] != self.keys[b] for a, b in zip(order[:-1], order[1:])]
        order = order[is_last]
        splits = np.array(self.splits, dtype=np.int8)[order]
        shards = []
        for code, split in enumerate(SPLITS):
            rows = order[splits == code]
            shards += [(f'{split}-{i // SHARD_CLIPS:05d}', rows[i:i + SHARD_CLIPS])
                       for i in range(0, len(rows), SHARD_CLIPS)]
        return shards


# -------------------------------------------------------------------------------------------------------------- packing

def pack_clip(place, max_seconds):
    """One file to (int16 samples, log-mel sums (windows, 2)), or to the reason why not, a str."""
    try:
        if place[0] == 'demo':
            wave = synthesise(*place[1:])
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
        raise configurator.ConfigError(f'shards = {text!r} is not i/n, the i-th of n shares, i from 1 to n')
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
    with runtime.replacing(path + '.pcm', 'wb') as f:
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
    with runtime.replacing(path + '.npz', 'wb') as f:
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
    with runtime.replacing(table) as f:
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
    with runtime.replacing(os.path.join(settings.out_dir, 'meta.json')) as f:
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


def printable(text):
    """A name that may hold anything, for one line of a text file."""
    return str(text).encode('utf-8', 'backslashreplace').decode().translate({9: ' ', 10: ' ', 13: ' '})


# -------------------------------------------------------------------------------------------------------------- recipes

def source_or_download(settings, url, suffix='zip', sha256=None):
    """The given source, or the downloaded archive, which stays beside the set until that is complete."""
    if settings.source:
        return settings.source
    path = os.path.join(settings.out_dir, cache_name(url, suffix))
    if not os.path.exists(path):
        download(url, path, sha256)
    return path


def read_table(files, i):
    """A text file of a source. Raises DataError."""
    try:
        return read_bytes(files.place(i)).decode()
    except UnicodeDecodeError as error:
        raise DataError(f'{printable(files.names[i])} is not a text table ({error})') from None
    except (*ARCHIVE_ERRORS, ValueError, RuntimeError, NotImplementedError) as error:
        raise DataError(f'{printable(files.names[i])} cannot be read ({reason_of(error)}): get it again') from None


def plan_demo(settings):
    classes = list(SOUNDS)
    plan = Plan('demo', lambda i: ('demo', settings.seed, i), classes)
    for i in range(settings.clips):
        plan.add(f'{classes[i % len(classes)]}/{i:05d}', i, 'test' if i % 5 == 4 - (i // 10) % 5 else 'train',
                 i % len(classes))
    return plan


def plan_fsdd(settings):
    """Official split: recordings 0-4 of each speaker and digit are the test; speakers are the folds."""
    files = list_source(source_or_download(settings, FSDD_URL), settings.out_dir)
    named = {i: (name, re.fullmatch(r'(\d)_([A-Za-z]+)_(\d+)', os.path.splitext(os.path.basename(name))[0]))
             for i, name in files.audio() if 'recordings' in name.split('/')[:-1]}
    speakers = sorted({match[2] for _, match in named.values() if match})
    plan = Plan('fsdd', files.place, [str(digit) for digit in range(10)], speakers)
    for i, (name, match) in named.items():
        if match:
            plan.add('/'.join(name.split('/')[-2:]), i, 'test' if int(match[3]) < 5 else 'train', int(match[1]),
                     speakers.index(match[2]))
    if len(plan.keys) != 3000 or len(speakers) != 6:
        print(f'warning: {len(plan.keys)} recordings of {len(speakers)} speakers; the data set has 3000 of 6')
    return plan


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


# A YouTube id has 11 characters, of which - and _ may be any. People put Y before it (it may begin with - otherwise),
# and the start, or start and end, behind it, in seconds or milliseconds.
AUDIOSET_FILE = re.compile(r'Y?([A-Za-z0-9_-]{11})(?:[_-](\d{1,9}(?:\.\d+)?)(?:[_-]\d+(?:\.\d+)?)?)?')


def plan_audioset(settings):
    """The segments of the official csv files whose audio is in the source, by YouTube id and start time."""
    if not settings.source or not settings.segments:
        raise DataError('audioset needs --source=FOLDER, where its audio is, and --segments=CSV[,CSV], its lists '
                        f'of segments: {AUDIOSET_URL}balanced_train_segments.csv, unbalanced_train_segments.csv and '
                        'eval_segments.csv there')
    mids, classes = read_class_labels(settings)
    paths = words(settings.segments)
    ids, starts, parts, labels, label_ends = read_segments(paths, mids)
    files = list_source(settings.source, settings.out_dir)
    file_of = match_segments(ids, starts, files)
    for part, path in enumerate(paths):
        print(f'{os.path.basename(path)}: {(file_of[parts == part] >= 0).sum():,} of its {(parts == part).sum():,} '
              'segments found')
    if (file_of < 0).all():
        example = next((name for _, name in files.audio()), 'there is no audio file')
        raise DataError(f'{settings.source} holds no segment of {settings.segments}: files are found by names like '
                        f'ID.wav, YID.flac, ID_30000_40000.flac, ID_30.000.m4a; the first here is {example}')
    splits = ['eval' if 'eval' in os.path.basename(path) else 'train' for path in paths]
    plan = Plan(os.path.basename(settings.out_dir), files.place, classes, multi_label=True)
    for i in np.flatnonzero(file_of >= 0):
        plan.add(f'{ids[i].decode()}_{starts[i]}', int(file_of[i]), splits[parts[i]],
                 labels[label_ends[i]:label_ends[i + 1]])
    return plan


def read_class_labels(settings):
    """class_labels_indices.csv (index, mid, display_name) -> {mid: class}, [display names]. Raises DataError."""
    path = settings.labels
    if not path:
        path = os.path.join(settings.out_dir, cache_name(AUDIOSET_URL + 'labels', 'csv'))
        if not os.path.exists(path):
            download(AUDIOSET_URL + 'class_labels_indices.csv', path, instead='--labels=PATH')
    rows = read_label_csv(path)
    if len(rows) != 527 and not settings.labels:
        os.remove(path)
        raise DataError(f'{AUDIOSET_URL}class_labels_indices.csv names {len(rows)} classes instead of 527: get it by '
                        'other means and give --labels=PATH')
    if len(rows) != 527:
        print(f'warning: {len(rows)} classes in {path}; AudioSet has 527')
    return {mid: i for i, (mid, _) in enumerate(rows)}, [name for _, name in rows]


def read_label_csv(path):
    """[(mid, display name)] of AudioSet's class_labels_indices.csv, in the order of its indices. Raises DataError."""
    try:
        with open(path, encoding='utf-8', newline='') as f:
            rows = [(int(row['index']), row['mid'], row['display_name']) for row in csv.DictReader(f)]
    except (OSError, UnicodeError) as error:
        raise DataError(f'cannot read the labels {path} ({reason_of(error)}); AudioSet\'s are '
                        f'{AUDIOSET_URL}class_labels_indices.csv') from None
    except (KeyError, TypeError, ValueError, csv.Error):
        rows = []
    if not rows or [index for index, _, _ in rows] != list(range(len(rows))) or not all(mid for _, mid, _ in rows):
        raise DataError(f'{path} is not a list `index,mid,display_name` with indices from 0, as AudioSet\'s '
                        'class_labels_indices.csv')
    return [(mid, name) for _, mid, name in rows]


def read_segments(paths, mids):
    """Official lists of segments -> ids (N,) bytes, starts (N,) in ms, which list (N,), and their classes: those of
    segment i are labels[label_ends[i]:label_ends[i + 1]]. Raises DataError, which names file and line."""
    ids, starts, parts, labels, label_ends = bytearray(), array('q'), array('b'), array('i'), array('q', [0])
    for part, path in enumerate(paths):
        try:
            with open(path, encoding='utf-8', newline='') as f:
                reader = csv.reader(f, skipinitialspace=True)               # id, 30.000, 40.000, "mid,mid"
                for row in reader:
                    if not row or row[0].startswith('#'):
                        continue
                    name, start, _, of_segment = row
                    if not re.fullmatch('[A-Za-z0-9_-]{11}', name):
                        raise ValueError(f'{name!r} is no YouTube id')
                    labels.extend(sorted({mids[mid] for mid in of_segment.split(',')}))
                    ids += name.encode()
                    starts.append(round(float(start) * 1000))
                    parts.append(part)
                    label_ends.append(len(labels))
        except (OSError, UnicodeError) as error:
            raise DataError(f'cannot read the segments {path} ({reason_of(error)})') from None
        except KeyError as error:
            raise DataError(f'{path}, line {reader.line_num}: the class {error} is not in the list of labels') from None
        except (ValueError, OverflowError, csv.Error) as error:
            raise DataError(f'{path}, line {reader.line_num}: not `id, start, end, "class,class"` ({error})') from None
    return (np.frombuffer(bytes(ids), 'S11'), np.array(starts, np.int64), np.array(parts, np.int8), labels, label_ends)


def match_segments(ids, starts, files):
    """(N,) number of the file of every segment, -1 where there is none. A file matches by its id and, if its name holds
    one, its start; without one only if the id has a single segment. Of several files the first is taken."""
    found_ids, found_starts, found = bytearray(), array('d'), array('q')
    for i, name in files.audio():
        match = AUDIOSET_FILE.fullmatch(os.path.splitext(os.path.basename(name))[0])
        if match:
            found_ids += match[1].encode()
            found_starts.append(float(match[2]) if match[2] else math.nan)
            found.append(i)
    found_ids, found_starts, found = (np.frombuffer(bytes(found_ids), 'S11'), np.array(found_starts), np.array(found))
    by_id = np.argsort(ids, kind='stable')
    first, last = (np.searchsorted(ids[by_id], found_ids, side) for side in ('left', 'right'))
    file_of = np.full(len(ids), -1, np.int64)
    for back in range(int((last - first).max(initial=0))):                  # one round, unless an id has more segments
        file = np.flatnonzero(first + back < last)[::-1]                    # backwards: the first file is the last word
        segment = by_id[first[file] + back]
        start = found_starts[file]
        fits = (np.round(start * 1000) == starts[segment]) | (start == starts[segment])     # seconds or milliseconds
        fits |= np.isnan(start) & (last[file] - first[file] == 1)
        file_of[segment[fits]] = found[file[fits]]
    return file_of


def plan_folder(settings):
    if not settings.source:
        raise DataError('folder needs --source=PATH, a folder or archive of audio files')
    if settings.label not in ('parent', 'none'):
        raise DataError(f'label = {settings.label!r} is neither parent nor none')
    if not 0 <= settings.test_part < 1:
        raise DataError(f'test_part = {settings.test_part} must lie in [0, 1)')
    files = list_source(settings.source, settings.out_dir)

    def parent(name):
        return os.path.basename(os.path.dirname(name))
    classes = sorted({parent(name) for _, name in files.audio()}) if settings.label == 'parent' else []
    if len(classes) == 1:
        classes = []                                                    # one folder of sounds has nothing to tell apart
    number = {name: i for i, name in enumerate(classes)}
    splits = read_split_file(settings.split_file, files) if settings.split_file else None
    plan = Plan(os.path.basename(settings.out_dir), files.place, classes)
    for i, name in files.audio():
        if splits is None:
            split = 'test' if key_hash(name) % 10000 < settings.test_part * 10000 else 'train'
        elif name in splits:
            split = splits[name]
        else:
            continue
        plan.add(name, i, split, number.get(parent(name), -1))
    return plan


def read_split_file(path, files):
    """{name: split} from a csv of `path,split`; every path must be in the source."""
    try:
        with open(path, encoding='utf-8', newline='') as f:
            rows = [row for row in csv.reader(f) if row]
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f'cannot read split_file {path} ({reason_of(error)})') from None
    found = {name for _, name in files.audio()}
    for row in rows:
        if len(row) != 2 or row[1].strip() not in ('train', 'valid', 'test'):
            raise DataError(f'split_file {path}: {",".join(row)!r} is not `path,split` with split train, valid or test')
        if row[0] not in found:
            raise DataError(f'split_file {path}: {row[0]!r} is not an audio file in the source')
    return {key: split.strip() for key, split in rows}


RECIPES = {'demo': plan_demo, 'fsdd': plan_fsdd, 'esc50': plan_esc50, 'speechcommands': plan_speechcommands,
           'audioset': plan_audioset, 'folder': plan_folder}


# --------------------------------------------------------------------------------------------------------------- sounds
# The demo's ten classes. Each function gets the sample times (n,) in seconds, a pitch in Hz and a generator
# -> (n,) waveform.

def tone(t, pitch, rng):
    return np.sin(2 * np.pi * pitch * t)


def chirp(t, low, high):
    """Exponential sweep."""
    rate = np.log(high / low) / t[-1]
    return np.sin(2 * np.pi * low * (np.exp(rate * t) - 1) / rate)


def chirp_up(t, pitch, rng):
    return chirp(t, pitch, pitch * rng.uniform(1.3, 3))


def chirp_down(t, pitch, rng):
    return chirp(t, pitch * rng.uniform(1.3, 3), pitch)


def noise_bursts(t, pitch, rng):
    rate = rng.uniform(3, 12)
    return rng.standard_normal(len(t)) * ((t * rate + rng.random()) % 1 < rng.uniform(0.2, 0.6))


def am_tone(t, pitch, rng):
    return np.sin(2 * np.pi * pitch * t) * (1 + np.sin(2 * np.pi * rng.uniform(4, 25) * t)) / 2


def fm_tone(t, pitch, rng):
    rate = rng.uniform(4, 15)
    return np.sin(2 * np.pi * pitch * t + rng.uniform(0.05, 0.2) * pitch / rate * np.sin(2 * np.pi * rate * t))


def click_train(t, pitch, rng):
    period = int(SAMPLE_RATE / rng.uniform(8, 40))
    clicks = np.zeros(len(t))
    clicks[rng.integers(period)::period] = 1
    return 8 * np.convolve(clicks, rng.standard_normal(32) * np.exp(-np.arange(32) / 6), 'same')


def harmonic_buzz(t, pitch, rng):
    return sum(np.sin(2 * np.pi * k * pitch / 3 * t + rng.uniform(0, 6.3)) / k for k in range(1, 12))


def inharmonic_bell(t, pitch, rng):
    partials = pitch * np.array([0.56, 0.92, 1.19, 1.71, 2.0, 2.74, 3.76]) * rng.uniform(0.97, 1.03, 7)
    return sum(np.sin(2 * np.pi * p * t) * np.exp(-t * rng.uniform(3, 8) * (1 + i / 3)) for i, p in enumerate(partials))


def noise_sweep(t, pitch, rng):
    """Noise around a sweeping carrier: ring modulation of low-pass noise."""
    width = int(rng.uniform(10, 40))
    smooth = np.convolve(rng.standard_normal(len(t)), np.ones(width) / np.sqrt(width), 'same')
    return smooth * (chirp_up if rng.random() < 0.5 else chirp_down)(t, pitch, rng)


SOUNDS = {function.__name__: function for function in (tone, chirp_up, chirp_down, noise_bursts, am_tone, fm_tone,
                                                       click_train, harmonic_buzz, inharmonic_bell, noise_sweep)}


def synthesise(seed, i):
    """Clip i: 1.3 s of background noise of random colour, level and hum with one sound at a random onset, length,
    pitch, level."""
    rng = np.random.default_rng([seed, i])
    sound = list(SOUNDS.values())[i % len(SOUNDS)]
    samples = 20720                                                         # 128 frames
    length = int(SAMPLE_RATE * rng.uniform(0.35, 1.2))
    start = rng.integers(samples - length + 1)
    wave = sound(np.arange(length) / SAMPLE_RATE, np.exp(rng.uniform(np.log(250), np.log(2200))), rng)
    ramp = np.minimum(1, np.minimum(np.arange(length), np.arange(length)[::-1]) / 160)
    wave = wave * ramp / (np.sqrt(np.mean(wave ** 2)) + 1e-9)
    background = np.fft.rfft(rng.standard_normal(samples))
    background *= (1 + np.arange(len(background))) ** -rng.uniform(0, 1.0)  # white to pink
    background = np.fft.irfft(background, samples)
    background /= np.sqrt(np.mean(background ** 2))
    background *= 10 ** (rng.uniform(-12, 6) / 20)                          # signal-to-noise ratio 12 to -6 dB
    background[start:start + length] += wave
    level = 10 ** (rng.uniform(-30, -12) / 20)
    return (background * level / np.sqrt(np.mean(background ** 2))).astype(np.float32)


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
        raise configurator.ConfigError(f'name a recipe first: {", ".join(RECIPES)}')
    recipe, *rest = argv
    settings = configurator.configure(__file__, rest if recipe not in ('-h', '--help') else argv)
    if recipe not in RECIPES:
        raise configurator.ConfigError(f'unknown recipe {recipe!r}: it is one of {", ".join(RECIPES)}')
    settings.out_dir = os.path.normpath(settings.out_dir or default_out_dir(recipe, settings))
    configurator.check_ranges(settings, max_bad=(0, 1), max_minutes=(0.01, 1e4), clips=(10, 10 ** 7), seed=(0, 2 ** 62))
    settings.workers = (os.cpu_count() or 1) if settings.workers < 0 else settings.workers
    share_of(settings.shards)
    if settings.shards and settings.overwrite:
        raise configurator.ConfigError('--shards with --overwrite would delete what other machines have made: delete '
                                       f'{settings.out_dir} yourself')
    if settings.shards and (not settings.source or recipe == 'audioset' and not settings.labels
                            or os.path.exists(settings.source) and is_compressed_tar(settings.source)):
        raise configurator.ConfigError('--shards needs a --source (for audioset --labels too) that no machine has to '
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
    runtime.main(run)
