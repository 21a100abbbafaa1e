"""Stage 0: audio files -> packed clips in data/NAME, the one format that the other stages read.

    python prepare.py demo                                   # ten classes of synthetic sounds, no download
    python prepare.py fsdd [--source=ARCHIVE_OR_FOLDER]      # Free Spoken Digit Dataset
    python prepare.py esc50 [--source=ARCHIVE_OR_FOLDER]     # ESC-50, or anything in its layout
    python prepare.py folder --source=ARCHIVE_OR_FOLDER      # any tree of audio files; parent folders are the classes

Sources are zip or tar archives or folders, of wav, flac, ogg, mp3, ... at any sample rate, channel count and length.
Nothing is unpacked: members are read where they lie, so that no name in an archive is ever used as a path. Decoding and
resampling run in parallel processes; a shard exists only when it is complete, so that an interrupted run goes on where
it stopped.

This file must not know the network.
"""
import collections
import concurrent.futures
import contextlib
import csv
import fractions
import functools
import hashlib
import io
import json
import lzma
import math
import multiprocessing
import os
import re
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import soundfile
import torch
import torchaudio
from tqdm import tqdm

import configurator
import runtime
from data import FORMAT_VERSION, SAMPLE_RATE, WINDOW_SAMPLES, WINDOWS, DataError, fbank, frames_in, key_hash, read_meta

source = ''             # archive or folder to read; fsdd and esc50 are downloaded without one
out_dir = ''            # where the set goes; default: data/ and the name of the recipe or, for folder, of the source
max_bad = 0.01          # share of files that may be unreadable; more is an error
workers = -1            # processes that decode; -1: one per core, 0: none, all in this one
overwrite = False       # delete a set that is there already
label = 'parent'        # folder: class of a file, its parent folder's name; none: no labels
test_part = 0.2         # folder: share of the files that go to the test split, by a stable hash of their names
split_file = ''         # folder: a csv of lines `path,split` instead (train, valid or test), paths as inside the source
max_minutes = 20.0      # longer files are skipped: cut them first
esc10 = False           # esc50: only its ESC-10 part, ten classes
clips = 4000            # demo: number of clips
seed = 1                # demo: which clips

SHARD_CLIPS = 2048                                  # files of one shard; 640 MB of ten-second clips
CHUNK = 16                                          # files that a worker takes at a time
MAX_FILE_BYTES = 1 << 30                            # no audio file of a set is larger
MAX_ARCHIVE_RATIO = 100                             # a compressed tar that grows more than this is hostile
CACHED = r'source-[0-9a-f]{8}\.(zip|tar)'           # a download or decompressed archive, until the set is complete
MIN_RATE, MAX_RATE = 1000, 768000                   # Hz
ARCHIVE_ERRORS = (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
AUDIO_SUFFIXES = ('.wav', '.flac', '.ogg', '.oga', '.opus', '.mp3', '.aif', '.aiff', '.au', '.w64', '.caf')

FSDD_URL = ('https://github.com/Jakobovski/free-spoken-digit-dataset/archive/'
            '26eb9aaf76e81b692f806f9140c2d2777410d7a1.zip')
ESC50_URL = 'https://github.com/karolpiczak/ESC-50/archive/33c8ce9eb2cf0b1c2f8bcf322eb349b6be34dbb6.zip'


@dataclass
class Entry:
    key: str                    # name inside the source; names the clip ever after
    place: tuple                # where its bytes are, see read_bytes
    split: str = 'train'
    label: object = -1          # class index, -1 for none, or a tuple of indices in a multi-label set
    fold: int = -1              # index into the set's folds, -1 for none


@dataclass
class Plan:
    name: str
    entries: list
    classes: list
    folds: list
    multi_label: bool = False


# -------------------------------------------------------------------------------------------------------------- sources

def list_source(path, work_dir):
    """{name: place} of every file in a folder, zip or tar archive. work_dir: where a compressed tar is decompressed."""
    if os.path.isdir(path):
        found = {}
        for folder, _, files in os.walk(path):
            for file in files:
                full = os.path.join(folder, file)
                found[os.path.relpath(full, path).replace(os.sep, '/')] = ('file', full)
        return found
    if not os.path.exists(path):
        raise DataError(f'there is no archive or folder {path}')
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return {info.filename: ('zip', path, info.filename) for info in archive.infolist() if not info.is_dir()}
        if not tarfile.is_tarfile(path):
            raise DataError(f'{path} is neither a folder nor a zip or tar archive')
        path = uncompressed_tar(path, work_dir)
        with tarfile.open(path, 'r:') as archive:                           # links and devices are no files: left out
            return {member.name: ('tar', path, member.offset_data, member.size)
                    for member in archive if member.isfile()}
    except (*ARCHIVE_ERRORS, UnicodeError, ValueError, NotImplementedError) as error:
        raise DataError(f'the archive {path} is damaged ({error}): get it again') from None


def uncompressed_tar(path, work_dir):
    """The path of the tar itself, decompressed into work_dir once if it is a .tar.gz, .tar.bz2 or .tar.xz."""
    try:
        with tarfile.open(path, 'r:') as archive:
            archive.next()
        return path
    except tarfile.ReadError:
        pass
    info = os.stat(path)
    plain = os.path.join(work_dir, cache_name(f'{os.path.abspath(path)} {info.st_size} {info.st_mtime_ns}', 'tar'))
    if os.path.exists(plain):
        return plain
    limit, written = os.path.getsize(path) * MAX_ARCHIVE_RATIO, 0
    with tarfile.open(path, 'r:*') as archive, runtime.replacing(plain, 'wb') as out:
        archive.fileobj.seek(0)                                             # opening has read the first header
        while block := archive.fileobj.read(1 << 20):
            written += len(block)
            if written > limit:
                raise DataError(f'{path} grows more than {MAX_ARCHIVE_RATIO} times when decompressed: refused')
            out.write(block)
    return plain


def cache_name(origin, suffix):
    """The name of a file that is kept beside a set until it is complete; another origin gives another name."""
    return f'source-{hashlib.sha256(origin.encode("utf-8", "surrogateescape")).hexdigest()[:8]}.{suffix}'


@functools.lru_cache(maxsize=4)
def open_zip(path):
    return zipfile.ZipFile(path)


def read_bytes(place):
    """The bytes of one audio file, at most MAX_FILE_BYTES whatever a header says.
    Raises ValueError if there are more."""
    kind, path = place[:2]
    if kind == 'tar':
        with open(path, 'rb') as f:
            f.seek(place[2])
            content = f.read(min(place[3], MAX_FILE_BYTES + 1))
    else:
        with open(path, 'rb') if kind == 'file' else open_zip(path).open(place[2]) as f:
            content = f.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f'larger than {MAX_FILE_BYTES >> 20} MiB')
    return content


def download(url, path):
    """Fetch url to path, with a progress bar; the file appears only when it is whole. Raises DataError."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, runtime.replacing(path, 'wb') as out:
            size = int(answer.headers.get('Content-Length') or 0)
            with tqdm(total=size or None, unit='B', unit_scale=True,
                      desc=f'downloading {os.path.basename(url)}') as bar:
                while block := answer.read(1 << 18):
                    out.write(block)
                    bar.update(len(block))
                if size and bar.n != size:
                    raise DataError(f'{url} ended after {bar.n} of {size} bytes: run again')
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise DataError(f'cannot download {url} ({error}): get it by other means and give --source=PATH') from None


def source_or_download(settings, url):
    """The given source, or the downloaded archive, which stays beside the set until that is complete."""
    if settings.source:
        return settings.source
    path = os.path.join(settings.out_dir, cache_name(url, 'zip'))
    if not os.path.exists(path):
        download(url, path)
    return path


# ------------------------------------------------------------------------------------------------------------- decoding

def decode(content, max_seconds):
    """The bytes of an audio file -> mono float32 waveform at 16 kHz. Raises ValueError, soundfile.LibsndfileError."""
    with soundfile.SoundFile(io.BytesIO(content)) as f:
        rate, channels = f.samplerate, f.channels
        if not MIN_RATE <= rate <= MAX_RATE:
            raise ValueError(f'sample rate of {rate} Hz')
        blocks, read, limit = [], 0, max_seconds * rate
        while True:                                                         # by blocks: a header's length may be a lie
            block = f.read(max(1, (1 << 20) // channels), dtype='float32', always_2d=True)
            if not len(block):
                break
            blocks.append(block.mean(axis=1))
            read += len(block)
            if read > limit:
                raise ValueError(f'longer than {max_seconds / 60:g} minutes')
    wave = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if not np.isfinite(wave).all():
        raise ValueError('NaN or infinite samples')
    if rate != SAMPLE_RATE:
        # The filter bank of a rate like 44101 Hz would take gigabytes; the nearest fraction is off by 0.02 % at most.
        ratio = fractions.Fraction(rate, SAMPLE_RATE).limit_denominator(4000)
        wave = torchaudio.functional.resample(torch.from_numpy(wave), ratio.numerator, ratio.denominator).numpy()
    if len(wave) < WINDOW_SAMPLES:
        raise ValueError(f'{len(wave)} samples at 16 kHz, shorter than one window of {WINDOW_SAMPLES}')
    return wave


def decode_file(path, max_seconds=3600):
    """decode() of a file on disk, for the other stages. Raises DataError, which names the file."""
    try:
        return decode(read_bytes(('file', path)), max_seconds)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise DataError(f'cannot read {path}: {reason_of(error)}') from None


def reason_of(error):
    text = (getattr(error, 'error_string', None) or getattr(error, 'strerror', None) or str(error)
            or type(error).__name__)
    return ' '.join(text.split())


def pack_clip(place, max_seconds):
    """One file to (int16 samples, log-mel sums (windows, 2)), or to the reason why not, a str."""
    try:
        if place[0] == 'demo':
            wave = synthesise(*place[1:])
        else:
            wave = decode(read_bytes(place), max_seconds)
    except (*ARCHIVE_ERRORS, ValueError, RuntimeError, TypeError, NotImplementedError, MemoryError) as error:
        return reason_of(error)
    pcm = np.clip(np.rint(wave * 32768), -32768, 32767).astype(np.int16)
    centred = torch.from_numpy(pcm.astype(np.float32) / 32768)[None]
    centred = centred - centred.mean()
    stats = np.empty((len(WINDOWS), 2))
    for i, window in enumerate(WINDOWS):
        x = fbank(centred, torch.tensor([len(pcm)]), window).double()
        stats[i] = x.sum().item(), x.square().sum().item()
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
    """Write every shard of the plan that is not there yet, then skipped.tsv and meta.json. Raises DataError."""
    if not plan.entries:
        raise DataError(f'no audio file found in {settings.source or plan.name}')
    os.makedirs(settings.out_dir, exist_ok=True)
    shards = cut_into_shards(plan)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)                                            # as in the workers: the same rounding
        bar = stack.enter_context(tqdm(total=len(plan.entries), unit='clip', desc=f'preparing {plan.name}',
                                       mininterval=0.5))
        pool = stack.enter_context(Workers(settings.workers)) if settings.workers else None
        for base, entries in shards:
            path = os.path.join(settings.out_dir, base)
            made_by = shard_plan(path)
            if made_by is None:
                write_shard(path, entries, plan, settings.max_minutes * 60, pool, bar)
            elif made_by == plan_digest(entries):
                bar.update(len(entries))
            else:
                raise DataError(f'{path}.npz is of another source or other settings: add --overwrite to start again')
    finish(plan, shards, settings)


def cut_into_shards(plan):
    """[(name, entries)] of at most SHARD_CLIPS files of one split, in the order of the keys."""
    shards = []
    for split in sorted({entry.split for entry in plan.entries}):
        entries = sorted((entry for entry in plan.entries if entry.split == split), key=lambda entry: entry.key)
        shards += [(f'{split}-{i // SHARD_CLIPS:05d}', entries[i:i + SHARD_CLIPS])
                   for i in range(0, len(entries), SHARD_CLIPS)]
    return shards


def plan_digest(entries):
    text = json.dumps([(entry.key, entry.label, entry.fold) for entry in entries])
    return hashlib.sha256(text.encode()).hexdigest()


def shard_plan(path):
    """The plan that a finished shard was made by; None if there is no such shard."""
    try:
        with np.load(path + '.npz', allow_pickle=False) as stored:
            return str(stored['plan'])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise DataError(f'{path}.npz is damaged: delete it and run again') from None


def write_shard(path, entries, plan, max_seconds, pool, bar):
    """Decode the entries into path.pcm, then their index into path.npz, whose presence says that both are whole."""
    good, skipped, lengths, stats = [], [], [], []
    with runtime.replacing(path + '.pcm', 'wb') as f:
        for entry, result in zip(entries, pack_in_order([entry.place for entry in entries], max_seconds, pool)):
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
        'skipped': np.array(skipped, dtype=str).reshape(-1, 2), 'plan': np.array(plan_digest(entries))}
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
    skipped, splits, sums, frames = [], {}, np.zeros((len(WINDOWS), 2)), 0
    for base, _ in shards:
        with np.load(os.path.join(settings.out_dir, base + '.npz'), allow_pickle=False) as stored:
            skipped += [tuple(row) for row in stored['skipped']]
            split = splits.setdefault(base.rsplit('-', 1)[0], {'clips': 0, 'seconds': 0.0})
            split['clips'] += len(stored['lengths'])
            split['seconds'] += float(stored['lengths'].sum() / SAMPLE_RATE)
            if base.startswith('train'):
                sums += stored['stats'].sum(axis=0)
                frames += int(frames_in(stored['lengths']).sum())
    total = len(plan.entries)
    if skipped:
        with runtime.replacing(os.path.join(settings.out_dir, 'skipped.tsv')) as f:
            f.writelines(f'{printable(key)}\t{printable(reason)}\n' for key, reason in skipped)
    if len(skipped) == total:
        remove_set(settings.out_dir)
        raise DataError(f'none of the {total} files in {settings.source} could be read, e.g. '
                        f'{printable(skipped[0][0])}: {skipped[0][1]}')
    if len(skipped) > settings.max_bad * total:
        raise DataError(f'{len(skipped)} of {total} files were skipped, more than max_bad = {settings.max_bad:g} '
                        f'allows; see {settings.out_dir}/skipped.tsv; to accept them run again with '
                        f'--max_bad={math.ceil(100 * len(skipped) / total) / 100:g}')
    statistics = {}
    for window, (total_sum, squares) in zip(WINDOWS, sums):
        values = max(frames, 1) * 128
        mean = total_sum / values
        statistics[window] = [mean, math.sqrt(max(squares / values - mean ** 2, 0))]
    meta = {'name': os.path.basename(settings.out_dir), 'version': FORMAT_VERSION, 'sample_rate': SAMPLE_RATE,
            'classes': plan.classes, 'multi_label': plan.multi_label, 'folds': plan.folds, 'splits': splits,
            'statistics': statistics, 'skipped': len(skipped),
            'hours': sum(split['seconds'] for split in splits.values()) / 3600}
    with runtime.replacing(os.path.join(settings.out_dir, 'meta.json')) as f:
        json.dump(meta, f, indent=1)
    for file in os.listdir(settings.out_dir):
        if re.fullmatch(CACHED, file):
            os.remove(os.path.join(settings.out_dir, file))
    describe(meta, settings.out_dir)


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

def plan_demo(settings):
    classes = list(SOUNDS)
    entries = [Entry(f'{classes[i % len(classes)]}/{i:05d}', ('demo', settings.seed, i), label=i % len(classes),
                     split='test' if i % 5 == 4 - (i // 10) % 5 else 'train') for i in range(settings.clips)]
    return Plan('demo', entries, classes, [])


def plan_fsdd(settings):
    """Official split: recordings 0-4 of each speaker and digit are the test; speakers are the folds."""
    found = list_source(source_or_download(settings, FSDD_URL), settings.out_dir)
    named = {key: re.fullmatch(r'(\d)_([A-Za-z]+)_(\d+)', os.path.splitext(os.path.basename(key))[0])
             for key in found if 'recordings' in key.split('/')[:-1] and key.lower().endswith(AUDIO_SUFFIXES)}
    speakers = sorted({match[2] for match in named.values() if match})
    entries = [Entry('/'.join(key.split('/')[-2:]), found[key], 'test' if int(match[3]) < 5 else 'train',
                     int(match[1]), speakers.index(match[2]))
               for key, match in named.items() if match]
    if len(entries) != 3000 or len(speakers) != 6:
        print(f'warning: {len(entries)} recordings of {len(speakers)} speakers; the data set has 3000 of 6')
    return Plan('fsdd', entries, [str(digit) for digit in range(10)], speakers)


def plan_esc50(settings):
    """meta/esc50.csv says fold and class; every clip is in the train split, and a fold is left out to test on."""
    found = list_source(source_or_download(settings, ESC50_URL), settings.out_dir)
    tables = [key for key in found if key.endswith('meta/esc50.csv')]
    if len(tables) != 1:
        raise DataError(f'{settings.source or ESC50_URL} holds {len(tables)} files named meta/esc50.csv; '
                        'ESC-50 has one')
    root = tables[0][:-len('meta/esc50.csv')]
    try:
        rows = list(csv.DictReader(io.StringIO(read_bytes(found[tables[0]]).decode())))
        rows = [(os.path.splitext(row['filename'])[0], row['fold'], int(row['target']), row['category'])
                for row in rows if not settings.esc10 or row['esc10'] == 'True']
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(f'{tables[0]} in {settings.source} is not ESC-50\'s table ({error!r})') from None
    audio = {os.path.splitext(key)[0][len(root):]: key for key in found if key.startswith(root + 'audio/')}
    names = {target: category for _, _, target, category in rows}
    targets, folds = sorted(names), sorted({fold for _, fold, _, _ in rows})
    missing = [stem for stem, *_ in rows if 'audio/' + stem not in audio]
    if missing:
        raise DataError(f'{len(missing)} of the {len(rows)} clips of {tables[0]} are missing, e.g. audio/{missing[0]}')
    entries = [Entry(stem, found[audio['audio/' + stem]], label=targets.index(target), fold=folds.index(fold))
               for stem, fold, target, _ in rows]
    if len(entries) != 2000:
        print(f'note: {len(entries)} clips of {len(targets)} classes; the whole ESC-50 has 2,000 of 50')
    return Plan('esc50', entries, [names[target] for target in targets], folds)


def plan_folder(settings):
    if not settings.source:
        raise DataError('folder needs --source=PATH, a folder or archive of audio files')
    if settings.label not in ('parent', 'none'):
        raise DataError(f'label = {settings.label!r} is neither parent nor none')
    if not 0 <= settings.test_part < 1:
        raise DataError(f'test_part = {settings.test_part} must lie in [0, 1)')
    found = {key: place for key, place in list_source(settings.source, settings.out_dir).items()
             if key.lower().endswith(AUDIO_SUFFIXES) and not os.path.basename(key).startswith('.')}
    parents = {key: os.path.basename(os.path.dirname(key)) for key in found}
    classes = sorted(set(parents.values())) if settings.label == 'parent' else []
    if len(classes) == 1:
        classes = []                                                    # one folder of sounds has nothing to tell apart
    splits = read_split_file(settings.split_file, found) if settings.split_file else {
        key: 'test' if key_hash(key) % 10000 < settings.test_part * 10000 else 'train' for key in found}
    entries = [Entry(key, place, splits[key], classes.index(parents[key]) if classes else -1)
               for key, place in found.items() if key in splits]
    return Plan(os.path.basename(settings.out_dir), entries, classes, [])


def read_split_file(path, found):
    """{name: split} from a csv of `path,split`; every path must be in the source."""
    try:
        with open(path, encoding='utf-8', newline='') as f:
            rows = [row for row in csv.reader(f) if row]
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f'cannot read split_file {path} ({reason_of(error)})') from None
    for row in rows:
        if len(row) != 2 or row[1].strip() not in ('train', 'valid', 'test'):
            raise DataError(f'split_file {path}: {",".join(row)!r} is not `path,split` with split train, valid or test')
        if row[0] not in found:
            raise DataError(f'split_file {path}: {row[0]!r} is not an audio file in the source')
    return {key: split.strip() for key, split in rows}


RECIPES = {'demo': plan_demo, 'fsdd': plan_fsdd, 'esc50': plan_esc50, 'folder': plan_folder}


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

def default_out_dir(recipe, source):
    """data/NAME in the current folder; a folder's or archive's own name for the recipe `folder`."""
    name = recipe
    if recipe == 'folder':
        name = re.sub(r'[^A-Za-z0-9_.-]', '_',
                      re.sub(r'(\.(zip|tar|tgz|gz|bz2|xz))+$', '', os.path.basename(os.path.abspath(source))))
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
    settings.out_dir = os.path.normpath(settings.out_dir or default_out_dir(recipe, settings.source))
    configurator.check_ranges(settings, max_bad=(0, 1), max_minutes=(0.01, 1e4), clips=(10, 10 ** 7), seed=(0, 2 ** 62))
    settings.workers = (os.cpu_count() or 1) if settings.workers < 0 else settings.workers
    if settings.overwrite and os.path.isdir(settings.out_dir):
        remove_set(settings.out_dir)
    if os.path.exists(os.path.join(settings.out_dir, 'meta.json')):
        describe(read_meta(settings.out_dir), settings.out_dir)
        print('it is there already; --overwrite makes it anew')
        return
    try:
        prepare(RECIPES[recipe](settings), settings)
    except DataError:
        if os.path.isdir(settings.out_dir) and not any(file.endswith('.npz') for file in os.listdir(settings.out_dir)):
            remove_set(settings.out_dir)                            # not one whole shard: nothing half-written stays
        raise


if __name__ == '__main__':
    runtime.main(run)
