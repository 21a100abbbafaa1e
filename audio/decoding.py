"""The bytes of an audio file of any format -> mono waveform at 16 kHz. All of it is hostile input."""
import contextlib
import fractions
import io
import math
import os
import re
import shutil
import subprocess
import tempfile

import numpy as np
import soundfile
import torch
import torchaudio

from audio import SAMPLE_RATE, WINDOW_SAMPLES
from audio.headers import ONLY_FFMPEG, demuxer_of, missing_bytes, mp3_start
from audio.sources import MAX_FILE_BYTES, content_of, reason_of
from engine.errors import DataError

MAX_SAMPLES = 1 << 27                               # of a file, before resampling: 46 minutes at 48 kHz
MAX_CHANNELS = 64
PIECE = 1 << 20                                     # samples of all channels that are decoded at a time
MIN_RATE, MAX_RATE = 1000, 768000                   # Hz
# Float samples reach 1 at full scale, a hot master 1.4, a lossy decoder 2 or 3. From 8 (18 dB above full scale) they
# are on another scale; one of int16 values below 8 is silence to its own 12th bit.
MAX_PEAK = 8
# Channels cancel if their mean has this share of the loudest one's power or less; of 64 channels with sound in only one
# it has 1 / 64^2 = 2.4e-4.
CANCELLED = 1e-4
NO_DECODER = 'needs the ffmpeg program, which is not installed'


def decode(content, max_seconds, collect=lambda pieces: np.concatenate([np.zeros(0, np.float32), *pieces])):
    """The bytes of an audio file -> mono float32 waveform at 16 kHz: the mean of the channels, or the loudest of
    channels that cancel each other.

    By soundfile; what it cannot open by the ffmpeg program. content: bytes or a Section. collect: makes
    the result of the waveform's pieces, an iterator; it is called again if channels turn out to cancel each other.
    Raises ValueError, RuntimeError, OSError.
    """
    if not len(content):
        raise ValueError('an empty file')
    missing = missing_bytes(content)
    if missing:
        raise ValueError(f'cut short: its header promises {missing:,} more bytes')
    for pieces, rate in takes(content, max_seconds):                        # the last one counts
        wave = collect(resampled(pieces, rate))
    if len(wave) < WINDOW_SAMPLES:
        raise ValueError(f'{len(wave)} samples at 16 kHz, shorter than one window of {WINDOW_SAMPLES}')
    return wave


def resampled(pieces, rate):
    """Yield pieces of a waveform at 16 kHz, of pieces at a rate. As if it were resampled whole: each piece has as much
    of its neighbours beside it as the filter sees."""
    # The filter bank of a rate like 44101 Hz would take gigabytes; the nearest fraction is off by 0.02 % at most.
    ratio = fractions.Fraction(rate, SAMPLE_RATE).limit_denominator(4000)
    up, down, held, before = ratio.denominator, ratio.numerator, np.zeros(0, np.float32), 0

    def resample(wave):
        return torchaudio.functional.resample(torch.from_numpy(wave), down, up).numpy()
    # torchaudio's filter sees up to 7 samples of the lower rate on either side, and begins anew every `down` samples.
    margin = -(-7 * -(-down // up) // down) * down
    for piece in pieces:
        if up == down:
            yield piece
            continue
        held = np.concatenate([held, piece])                                # of that `before` is neighbours
        if len(held) > PIECE:
            ready = (len(held) - before - margin) // down * down
            yield resample(held[:before + ready + margin])[before // down * up:][:ready // down * up]
            held, before = held[before + ready - margin:], margin
    if up != down and len(held):
        yield resample(held)[before // down * up:]


def takes(content, max_seconds):
    """Yield (pieces (n,) of a mono waveform, rate) by the first decoder that can open the file, as often as mono does.
    A decoder that opens it and then finds it damaged has the last word."""
    file, demuxer = None, demuxer_of(content)
    try:
        file = stream_of(content)
    except soundfile.LibsndfileError as error:
        start = None if demuxer else mp3_start(content)
        if start:                                                           # an mp3 with junk ahead of it
            yield from takes(content[start:], max_seconds)
            return
        if demuxer is None:
            raise
        if not has_ffmpeg():
            raise ValueError(f'{demuxer} format: {NO_DECODER}' if demuxer in ONLY_FFMPEG else
                             f'{reason_of(error)} (ffmpeg, which might read it, is not installed)') from None
    if file is None or not file.frames and demuxer and has_ffmpeg():     # a recorder that crashed leaves a size of 0
        yield from by_ffmpeg(content, demuxer, max_seconds)
    else:
        with file:
            yield from by_soundfile(file, content, max_seconds)


class Stream(soundfile.SoundFile):
    """A file that is read from its beginning to its end.

    soundfile seeks after every block that it reads, which costs an mp3 the bits that a frame borrows from the one
    before (up to 2,000 wrong samples at each block) and a FLAC of unknown length everything.
    """

    def seekable(self):
        return False


def stream_of(content):
    return Stream(io.BytesIO(content) if isinstance(content, bytes) else io.BufferedReader(content, 1 << 16))


def by_soundfile(file, content, max_seconds):
    """Yield (pieces of a mono waveform, rate), once or twice, see mono."""
    check_rate(file.samplerate)
    if file.channels > MAX_CHANNELS:
        raise ValueError(f'{file.channels} channels')

    end = file.frames if file.format == 'FLAC' else 1 << 62                 # behind a FLAC's last sample may be a tag

    def blocks():                                                           # a header's length may be a lie
        # soundfile.read goes to the start, and so does this. It matters to mp3 alone: at rates up to 24 kHz libmpg123
        # rounds the last bit (6e-8) otherwise after it. That turns a few int16 samples by one, which shows where a tone
        # leaves nothing but rounding noise: log-mels differed by up to 0.03 (Hamming) and 0.47 (Hanning).
        if file.format == 'MP3' or file.tell():
            file.seek(0)
        read = 0
        most = max(1, PIECE // file.channels)
        while len(block := file.read(min(most, end - read), dtype='float32', always_2d=True)):
            read += len(block)
            check_length(read, file.samplerate, max_seconds)
            yield block
        check_whole(file, content, read)
    for pieces in mono(blocks):
        yield pieces, file.samplerate


def check_whole(file, content, read):
    """Raise ValueError if there are fewer samples than the header of a FLAC promises, or the Xing or Info header of an
    mp3; that counts frames and may be off by one."""
    promised = file.frames if file.format == 'FLAC' and file.frames < 1 << 36 else 0
    if file.format == 'MP3':
        start = mp3_start(content) or 0
        frame = 1152 if file.samplerate > 24000 else 576
        promised = file.frames - frame if re.search(b'Xing|Info', content[start:start + 200]) else 0
    if read < promised:
        raise ValueError(f'cut short: {read:,} of the {file.frames:,} samples that its header promises')


def mono(blocks):
    """Of a function that yields blocks (n, channels): yield the pieces (n,) of the channels' mean, an iterator; then,
    if channels cancel each other (one is the other's inverse), those of the loudest. Raises ValueError of samples that
    are not finite or on another scale."""
    power = np.zeros(2)

    def means():
        nonlocal power
        for block in blocks():
            peak = np.abs(block).max(initial=0)
            if not np.isfinite(peak):
                raise ValueError('NaN or infinite samples')
            if peak > MAX_PEAK:
                raise ValueError(f'a peak of {peak:g} where full scale is 1: samples on another scale')
            mean = block.mean(axis=1)
            if block.shape[1] > 1 and len(block):
                rows = np.vstack([mean[::7], block[::7].T])                 # enough to tell their power
                rows -= rows.mean(axis=1, keepdims=True)                    # a constant offset is no sound
                power = np.einsum('cn,cn->c', rows, rows) + (power if power.any() else 0)
            yield mean
    yield means()
    loudest = int(power[1:].argmax())
    if power[0] < CANCELLED * power[1 + loudest]:
        yield (block[:, loudest] for block in blocks())


def to_pcm(pieces, path=None, most=math.inf):
    """Pieces of a waveform -> int16 samples (n,): an array or, of more than `most` bytes, Spilled into a new file."""
    parts, size, file = [], 0, None
    with contextlib.ExitStack() as stack:
        for piece in pieces:
            parts.append(np.clip(np.rint(piece * 32768), -32768, 32767).astype(np.int16))
            size += parts[-1].nbytes
            if size > most:
                file = file or stack.enter_context(open(path, 'wb'))
                file.writelines(parts)
                parts.clear()
    return np.concatenate(parts or [np.zeros(0, np.int16)]) if file is None else Spilled(path)


class Spilled:
    """int16 samples in a file, which slices read; from process to process goes its path. Whoever is done deletes it."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return os.path.getsize(self.path) // 2

    def __getitem__(self, part):
        return np.fromfile(self.path, np.int16, part.stop - part.start, offset=2 * part.start)


def pieces_of(pcm):
    return (pcm[i:min(i + PIECE, len(pcm))] for i in range(0, len(pcm), PIECE))


def check_rate(rate):
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f'sample rate of {rate} Hz')


def check_length(samples, rate, max_seconds):
    if samples > max_seconds * rate:
        raise ValueError(f'longer than max_minutes = {max_seconds / 60:g}')
    if samples > max(MAX_SAMPLES, 48000 * max_seconds):
        raise ValueError(f'more than {MAX_SAMPLES:,} samples')


def has_ffmpeg():
    return shutil.which('ffmpeg') is not None


def by_ffmpeg(content, demuxer, max_seconds):
    """Yield what by_soundfile does. ffmpeg is held to one demuxer, which may open no other file or address."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = os.path.join(folder, 'in'), os.path.join(folder, 'out.wav')
        with open(source, 'wb') as f:                                       # a file, since m4a needs to be sought in
            for i in range(0, len(content), PIECE):
                f.write(content[i:i + PIECE])
        command = ['ffmpeg', '-nostdin', '-v', 'error', '-protocol_whitelist', 'file', '-f', demuxer, '-i', source,
                   '-map', '0:a:0', '-t', str(max_seconds + 1), '-fs', str(MAX_FILE_BYTES), '-c:a', 'pcm_f32le',
                   output]
        with open(os.path.join(folder, 'said'), 'w+b') as said:
            try:
                result = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=said, timeout=300)
            except subprocess.TimeoutExpired:
                raise ValueError('ffmpeg took longer than five minutes') from None
            said.seek(max(said.tell() - 500, 0))
            lines = said.read().decode('utf-8', 'replace').strip().splitlines()
        if lines or result.returncode or not os.path.exists(output):        # what it says at this level is damage
            said = re.sub(r'\[[^]]*\] *', '', lines[-1]) if lines else 'failed'          # without addresses
            raise ValueError(f'ffmpeg: {said}')
        with content_of(('file', output)) as wave, stream_of(wave) as file:
            yield from by_soundfile(file, wave, max_seconds)


def decode_file(path, max_seconds=3600):
    """decode() of a file on disk, for the other stages. Raises DataError, which names the file."""
    try:
        with content_of(('file', path)) as content:
            return decode(content, max_seconds)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise DataError(f'cannot read {path}: {reason_of(error)}') from None
