"""The bytes of an audio file of any format -> mono waveform at 16 kHz. All of it is hostile input."""
import fractions
import functools
import io
import os
import shutil
import subprocess
import tempfile

import numpy as np
import soundfile
import torch
import torchaudio

from audio import SAMPLE_RATE, WINDOW_SAMPLES
from audio.sources import MAX_FILE_BYTES, read_bytes, reason_of
from engine.errors import DataError

MAX_SAMPLES = 1 << 27                               # of a file, before resampling: 46 minutes at 48 kHz
MAX_CHANNELS = 64
MIN_RATE, MAX_RATE = 1000, 768000                   # Hz
# Formats that soundfile cannot read: where and what their first bytes are, and ffmpeg's name for them.
FOREIGN = ((4, b'ftyp', 'mov'), (0, b'\x1a\x45\xdf\xa3', 'matroska'), (0, b'\x30\x26\xb2\x75\x8e\x66\xcf\x11', 'asf'),
           (0, b'\xff\xf1', 'aac'), (0, b'\xff\xf9', 'aac'))
NO_DECODER = 'needs torchcodec or the ffmpeg program, and neither is installed'


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
        raise ValueError(f'longer than max_minutes = {max_seconds / 60:g}')
    if samples > max(MAX_SAMPLES, 48000 * max_seconds):
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
