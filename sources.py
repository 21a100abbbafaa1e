"""Where audio comes from: folders, zip and tar archives, downloads, and the decoding of every format.

All of it is hostile input. Nothing is unpacked: members of archives are read where they lie, so that no name in one is
ever used as a path; sizes are bounded whatever a header says; a download appears only when it is whole.

This file must not know data sets, labels or the network.
"""
import fractions
import functools
import hashlib
import http.client
import io
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from array import array

import numpy as np
import soundfile
import torch
import torchaudio
from tqdm import tqdm

import runtime
from data import SAMPLE_RATE, WINDOW_SAMPLES, DataError

MAX_FILE_BYTES = 1 << 30                            # no audio file of a set is larger
MAX_ARCHIVE_RATIO = 100                             # what grows more than this when it is decompressed is hostile ...
HARMLESS_BYTES = 32 << 20                           # ... if it grows to more than this: silence compresses well
MAX_HEADER_BYTES = 1 << 20                          # of a tar's long names
MAX_SAMPLES = 1 << 27                               # of a file, before resampling: 46 minutes at 48 kHz
MAX_CHANNELS = 64
MIN_RATE, MAX_RATE = 1000, 768000                   # Hz
ARCHIVE_ERRORS = (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
AUDIO_SUFFIXES = ('.wav', '.flac', '.ogg', '.oga', '.opus', '.mp3', '.aif', '.aiff', '.au', '.w64', '.caf',
                  '.m4a', '.mp4', '.aac', '.webm', '.mkv', '.mka', '.wma')
# Formats that soundfile cannot read: where and what their first bytes are, and ffmpeg's name for them.
FOREIGN = ((4, b'ftyp', 'mov'), (0, b'\x1a\x45\xdf\xa3', 'matroska'), (0, b'\x30\x26\xb2\x75\x8e\x66\xcf\x11', 'asf'),
           (0, b'\xff\xf1', 'aac'), (0, b'\xff\xf9', 'aac'))
NO_DECODER = 'needs torchcodec or the ffmpeg program, and neither is installed'


# ---------------------------------------------------------------------------------------------------- files of a source

class Strings:
    """A list of strings in one stretch of bytes: two million file names take 100 MB instead of 250."""

    def __init__(self):
        self.bytes, self.ends = bytearray(), array('q', [0])

    def append(self, text):
        self.bytes += text.encode('utf-8', 'surrogateescape')
        self.ends.append(len(self.bytes))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.bytes[self.ends[i]:self.ends[i + 1]].decode('utf-8', 'surrogateescape')


class Files:
    """The files of a folder or archive: their names inside it, and where their bytes are."""

    def __init__(self, kind, path):
        self.kind, self.path = kind, path                                   # folder, zip or tar
        self.names, self.offsets, self.sizes = Strings(), array('q'), array('q')

    def add(self, name, offset=0, size=0):
        self.names.append(name)
        self.offsets.append(offset)
        self.sizes.append(size)

    def place(self, i):
        """What read_bytes wants to know of file i."""
        if self.kind == 'folder':
            return 'file', os.path.join(self.path, self.names[i])
        if self.kind == 'zip':
            return 'zip', self.path, self.names[i]
        return 'tar', self.path, self.offsets[i], self.sizes[i]

    def audio(self):
        """Yield (index, name) of every audio file, by its suffix."""
        for i, name in enumerate(self.names):
            if name.lower().endswith(AUDIO_SUFFIXES) and not os.path.basename(name).startswith('.'):
                yield i, name


def list_source(path, work_dir):
    """Files of a folder, zip or tar archive, always in the same order. Raises DataError.

    work_dir: where a compressed tar is decompressed.
    """
    if os.path.isdir(path):
        found = Files('folder', path)
        for folder, folders, files in os.walk(path):
            folders.sort()
            inside = os.path.relpath(folder, path).replace(os.sep, '/')
            for file in sorted(files):
                found.add(file if inside == '.' else f'{inside}/{file}')
        return found
    if not os.path.exists(path):
        raise DataError(f'there is no archive or folder {path}')
    try:
        if zipfile.is_zipfile(path):
            found = Files('zip', path)
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if not info.is_dir():
                        found.add(info.filename)
            return found
        try:
            tarfile.open(path, 'r:*', tarinfo=BoundedHeader).close()
        except tarfile.ReadError:
            raise DataError(f'{path} is neither a folder nor a zip or tar archive') from None
        path = uncompressed_tar(path, work_dir)
        found = Files('tar', path)
        with tarfile.open(path, 'r:', tarinfo=BoundedHeader) as archive:
            for member in archive:
                if member.isfile():                                         # links and devices are no files: left out
                    found.add(member.name.removeprefix('./'), member.offset_data, member.size)
                archive.members = []                                        # or it would keep every header in memory
        return found
    except (*ARCHIVE_ERRORS, UnicodeError, ValueError, NotImplementedError) as error:
        raise DataError(f'the archive {path} is damaged ({error}): get it again') from None


class BoundedHeader(tarfile.TarInfo):
    """A tar header whose long names and further fields are not read into memory if they are absurdly long."""

    def check_size(self):
        if self.size > MAX_HEADER_BYTES:
            raise ValueError(f'a header of {self.size >> 20} MiB')

    def _proc_gnulong(self, archive):
        self.check_size()
        return super()._proc_gnulong(archive)

    def _proc_pax(self, archive):
        self.check_size()
        return super()._proc_pax(archive)


def is_compressed_tar(path):
    if os.path.isdir(path) or zipfile.is_zipfile(path):
        return False
    try:
        with tarfile.open(path, 'r:', tarinfo=BoundedHeader) as archive:
            archive.next()
        return False
    except tarfile.ReadError:
        return True


def uncompressed_tar(path, work_dir):
    """The path of the tar itself, decompressed into work_dir once if it is a .tar.gz, .tar.bz2 or .tar.xz."""
    if not is_compressed_tar(path):
        return path
    info = os.stat(path)
    plain = os.path.join(work_dir, cache_name(f'{os.path.abspath(path)} {info.st_size} {info.st_mtime_ns}', 'tar'))
    if os.path.exists(plain):
        return plain
    limit = os.path.getsize(path) * MAX_ARCHIVE_RATIO
    with (tarfile.open(path, 'r:*', tarinfo=BoundedHeader) as archive, runtime.replacing(plain, 'wb') as out,
          tqdm(unit='B', unit_scale=True, desc=f'decompressing {os.path.basename(path)}', delay=1) as bar):
        archive.fileobj.seek(0)                                             # opening has read the first header
        while block := archive.fileobj.read(1 << 20):
            bar.update(len(block))
            if bar.n > limit:
                raise DataError(f'{path} grows more than {MAX_ARCHIVE_RATIO} times when decompressed: refused')
            out.write(block)
    return plain


def cache_name(origin, suffix):
    """The name of a file that is kept beside a set until it is complete; another origin gives another name."""
    return f'source-{hashlib.sha256(origin.encode("utf-8", "surrogateescape")).hexdigest()[:8]}.{suffix}'


@functools.lru_cache(maxsize=4)
def open_zip(path, modified):
    """modified: when, so that a file that has been replaced is opened anew."""
    return zipfile.ZipFile(path)


def read_bytes(place):
    """The bytes of one file, at most MAX_FILE_BYTES whatever a header says. Raises ValueError if there are more."""
    kind, path = place[:2]
    limit = MAX_FILE_BYTES
    if kind == 'zip':
        archive = open_zip(path, os.stat(path).st_mtime_ns)
        limit = min(limit, max(HARMLESS_BYTES, archive.getinfo(place[2]).compress_size * MAX_ARCHIVE_RATIO))
        with archive.open(place[2]) as f:
            content = f.read(limit + 1)
    else:
        with open(path, 'rb') as f:
            f.seek(place[2] if kind == 'tar' else 0)
            content = f.read(min(place[3], limit + 1) if kind == 'tar' else limit + 1)
    if len(content) > limit:
        raise ValueError(f'larger than {limit >> 20} MiB' if limit == MAX_FILE_BYTES else
                         f'grows more than {MAX_ARCHIVE_RATIO} times when decompressed')
    return content


def download(url, path, sha256=None, instead='--source=PATH'):
    """Fetch url to path, with a progress bar; the file appears only when it is whole and of that checksum.

    instead: the option that takes the file when it was got by other means. Raises DataError.
    """
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, runtime.replacing(path, 'wb') as out:
            size = int(answer.headers.get('Content-Length') or 0)
            with tqdm(total=size or None, unit='B', unit_scale=True,
                      desc=f'downloading {os.path.basename(url)}', delay=1) as bar:
                while block := answer.read(1 << 18):
                    out.write(block)
                    digest.update(block)
                    bar.update(len(block))
                if size and bar.n != size:
                    raise DataError(f'{url} ended after {bar.n} of {size} bytes: run again')
            if sha256 and digest.hexdigest() != sha256:
                raise DataError(f'{url} has the checksum {digest.hexdigest()[:12]}..., not {sha256[:12]}...: another '
                                f'file than expected; if you trust one that you have, give {instead}')
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise DataError(f'cannot download {url} ({error}): get it by other means and give {instead}') from None


# ------------------------------------------------------------------------------------------------------------- decoding

def decode(content, max_seconds):
    """The bytes of an audio file -> mono float32 waveform at 16 kHz.

    By soundfile; m4a, webm and the like by torchcodec or the ffmpeg program. Raises ValueError, RuntimeError, OSError.
    """
    try:
        wave, rate = by_soundfile(content, max_seconds)
    except soundfile.LibsndfileError:
        foreign = [name for start, magic, name in FOREIGN if content[start:start + len(magic)] == magic]
        if not foreign:
            raise
        wave, rate = by_another(content, foreign[0], max_seconds)
    if not np.isfinite(wave).all():
        raise ValueError('NaN or infinite samples')
    if rate != SAMPLE_RATE:
        # The filter bank of a rate like 44101 Hz would take gigabytes; the nearest fraction is off by 0.02 % at most.
        ratio = fractions.Fraction(rate, SAMPLE_RATE).limit_denominator(4000)
        wave = torchaudio.functional.resample(torch.from_numpy(wave), ratio.numerator, ratio.denominator).numpy()
    if len(wave) < WINDOW_SAMPLES:
        raise ValueError(f'{len(wave)} samples at 16 kHz, shorter than one window of {WINDOW_SAMPLES}')
    return wave


def by_soundfile(content, max_seconds):
    """-> mono waveform (n,), its rate"""
    with soundfile.SoundFile(io.BytesIO(content)) as f:
        rate, channels = f.samplerate, f.channels
        check_rate(rate)
        if channels > MAX_CHANNELS:
            raise ValueError(f'{channels} channels')
        blocks, read = [], 0
        while True:                                                         # by blocks: a header's length may be a lie
            block = f.read(max(1, (1 << 20) // channels), dtype='float32', always_2d=True)
            if not len(block):
                break
            blocks.append(block.mean(axis=1))
            read += len(block)
            check_length(read, rate, max_seconds)
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32), rate


def check_rate(rate):
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f'sample rate of {rate} Hz')


def check_length(samples, rate, max_seconds):
    if samples > max_seconds * rate:
        raise ValueError(f'longer than {max_seconds / 60:g} minutes')
    if samples > MAX_SAMPLES:
        raise ValueError(f'more than {MAX_SAMPLES:,} samples')


@functools.lru_cache(maxsize=1)
def other_decoder():
    """torchcodec's AudioDecoder, else the path of the ffmpeg program, else None."""
    try:
        from torchcodec.decoders import AudioDecoder
        silence = io.BytesIO()
        soundfile.write(silence, np.zeros(WINDOW_SAMPLES), SAMPLE_RATE, format='WAV')
        AudioDecoder(silence.getvalue())                                    # it may be there without FFmpeg's libraries
        return AudioDecoder
    except (ImportError, OSError, RuntimeError):
        return shutil.which('ffmpeg')


def by_another(content, demuxer, max_seconds):
    """-> mono waveform (n,), its rate"""
    decoder = other_decoder()
    if decoder is None:
        raise ValueError(f'{demuxer} format: {NO_DECODER}')
    if isinstance(decoder, str):
        return by_ffmpeg(decoder, content, demuxer, max_seconds)
    decoder = decoder(content)
    rate, channels = decoder.metadata.sample_rate, decoder.metadata.num_channels
    check_rate(rate)
    seconds = min(max_seconds + 1, MAX_SAMPLES / (rate * channels))         # what all channels take in memory
    samples = decoder.get_samples_played_in_range(0, seconds)               # data (channels, n)
    check_length(samples.data.numel(), rate * channels, min(max_seconds, seconds * 0.999))
    return samples.data.float().mean(dim=0).numpy(), samples.sample_rate


def by_ffmpeg(program, content, demuxer, max_seconds):
    """The ffmpeg program with one fixed demuxer, which may open no other file or address."""
    with tempfile.TemporaryDirectory() as folder:
        source, decoded = os.path.join(folder, 'in'), os.path.join(folder, 'out.wav')
        with open(source, 'wb') as f:                                       # a file, since m4a needs to be sought in
            f.write(content)
        command = [program, '-nostdin', '-v', 'error', '-protocol_whitelist', 'file', '-f', demuxer, '-i', source,
                   '-map', '0:a:0', '-t', str(max_seconds + 1), '-fs', str(MAX_FILE_BYTES), '-c:a', 'pcm_f32le',
                   decoded]
        with open(os.path.join(folder, 'said'), 'w+b') as said:
            try:
                result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=said, timeout=300)
            except subprocess.TimeoutExpired:
                raise ValueError('ffmpeg took longer than five minutes') from None
            said.seek(max(said.tell() - 500, 0))
            lines = said.read().decode('utf-8', 'replace').strip().splitlines()
        if result.returncode or not os.path.exists(decoded):
            raise ValueError(f'ffmpeg: {lines[-1] if lines else "failed"}')
        return by_soundfile(read_bytes(('file', decoded)), max_seconds)


def decode_file(path, max_seconds=3600):
    """decode() of a file on disk, for the other stages. Raises DataError, which names the file."""
    try:
        return decode(read_bytes(('file', path)), max_seconds)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise DataError(f'cannot read {path}: {reason_of(error)}') from None


def reason_of(error):
    """An exception as one line."""
    text = (getattr(error, 'error_string', None) or getattr(error, 'strerror', None) or str(error)
            or type(error).__name__)
    return ' '.join(text.split())
