"""Embeddings of sounds in Python.

    from tools.embeddings import load
    model = load('out/demo/ckpt.pt')            # of ours, the authors', EAT's or SSLAM's
    clip, frames, seconds = model(waves, rate)  # (clips, F), (clips, rows, columns * D), (clips, rows)

The shapes, units and poolings: docs/embeddings.md.
"""
import contextlib
from dataclasses import replace

import numpy as np

from audio import HOP_SAMPLES, SAMPLE_RATE, WINDOW_SAMPLES, frames_in, samples_for
from audio.clips import Clips
from audio.decoding import check_rate, mono, resampled, to_pcm
from checkpoints.opening import open_checkpoint
from engine import processes
from engine.errors import CheckpointError, ConfigError, DataError
from scoring.features import POOLS, features, in_batches, states, width
from scoring.metrics import NotFiniteError


def load(path, pool='bands', layer=0, device='auto', dtype='auto', batch_size=64):
    """Open a checkpoint of any origin for embedding -> Embedder.

    pool: 'bands', 'cepstra', 'mean' or 'cls', of the clip embeddings; layer: of block 1 ... L, or 0, the mean of all
    blocks' outputs; device, dtype, batch_size: as in eval.py. Raises CheckpointError, ConfigError.
    """
    if pool not in POOLS:
        raise ConfigError(f'pool = {pool!r} is none of {", ".join(POOLS)}')
    process = processes.start(device)
    autocast, _ = processes.autocast(process, dtype)
    loaded = open_checkpoint(path)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= loaded.config.n_layer:
        raise ConfigError(f'layer = {layer!r} must be from 0 to {loaded.config.n_layer}, the blocks of {path}')
    return Embedder(path, loaded.encoder.to(process.device).eval(), loaded.spectrum, process, autocast, pool, layer,
                    batch_size)


class Embedder:
    """Sounds to embeddings. encoder: model.Encoder; spectrum: what data.log_mel wants; clip_size F and row_size
    columns * D: numbers of an embedding."""

    def __init__(self, path, encoder, spectrum, process, autocast, pool, layer, batch_size):
        self.path, self.encoder, self.spectrum, self.process, self.autocast, self.pool, self.layer, self.batch_size = (
            path, encoder, spectrum, process, autocast, pool, layer, batch_size)
        config = encoder.config
        self.clip_size, self.row_size = width(config, pool), config.grid[1] * config.n_embd

    def __call__(self, waves, rate):
        """-> (clips(waves, rate), *rows(waves, rate)): the encoder runs twice, so call the one that you need."""
        waves = clips_of(waves, rate)
        return self.clips(waves), *self.rows(waves)

    def clips(self, waves, rate=SAMPLE_RATE, title=''):
        """Clip embeddings (clips, F) float32, of any length: those of eval.py --embed. F: 2 * columns * D of bands,
        3 * columns * D of cepstra, D of mean and cls. waves: see clips_of; title: of a progress bar, '': none. Raises
        DataError, CheckpointError."""
        with self.named():
            return features(self.encoder, clips_of(waves, rate), self.spectrum, self.process, self.autocast, self.pool,
                            self.layer, batch_size=self.batch_size, title=title)

    def rows(self, waves, rate=SAMPLE_RATE):
        """Time-stamped embeddings (clips, rows, columns * D) float32, one per row of patches (16 frames, 160 ms,
        unless the checkpoint has others), the columns side by side from low to high frequencies; and the seconds
        (clips, rows) float64 of their centres from the clip's start, 0.0875, 0.2475, ...

        A row whose centre lies behind the clip's end is left out, but for the first, whose time is then the clip's
        middle. Where a clip is shorter than the longest, both are NaN. A clip that is longer than the input is seen in
        windows side by side; the last begins earlier, on a row, for what the others have not seen. waves: see clips_of.
        Raises DataError, CheckpointError.
        """
        clips, config, frames = clips_of(waves, rate), self.encoder.config, self.spectrum['frames']
        patch = config.patch_frames
        rows = -(-frames_in(clips.length) // patch)
        windows = replace(clips, length=samples_for(rows * patch)).windows(samples_for(frames), frames * HOP_SAMPLES,
                                                                           spare=0)
        windows = replace(windows, length=np.minimum(windows.length, clips.length[windows.clip] - windows.start))
        centre = (np.arange(rows.max()) * patch + (patch - 1) / 2) * HOP_SAMPLES + WINDOW_SAMPLES / 2      # samples
        seconds = np.where(centre < clips.length[:, None], centre, np.nan) / SAMPLE_RATE
        seconds[:, 0] = np.where(centre[0] < clips.length, centre[0], clips.length / 2) / SAMPLE_RATE

        def encode(spec, *_):
            return states(self.encoder, spec, self.layer)[0].flatten(2),    # (B, rows, columns * D)
        found = np.full((*seconds.shape, self.row_size), np.nan, np.float32)
        with self.named():
            for indices, (of_rows,) in in_batches(encode, windows, self.spectrum, self.process, self.autocast,
                                                  batch_size=self.batch_size):
                for window, values in zip(indices, of_rows):
                    first = windows.start[window] // (patch * HOP_SAMPLES)
                    here = found[windows.clip[window], first:first + len(values)]
                    unseen = np.isnan(here[:, 0])                           # by the window before
                    here[unseen] = values[:len(here)][unseen]
        found[np.isnan(seconds)] = np.nan
        longest = int((~np.isnan(seconds)).sum(axis=1).max())
        return found[:, :longest], seconds[:, :longest]

    @contextlib.contextmanager
    def named(self):
        """What is not finite is the checkpoint's fault: name it."""
        try:
            yield
        except NotFiniteError as error:
            raise CheckpointError(f'{self.path}: {error}: its weights, or what it is told of its input, are damaged or '
                                  'too large') from None


def clips_of(waves, rate):
    """Sounds -> audio.clips.Clips at 16 kHz.

    waves: one mono sound (samples,), several (clips, samples), or a list of sounds of different lengths; floating
    point, with full scale at 1, or int16, at 32768; arrays or tensors. rate: samples per second. Raises DataError.
    """
    if isinstance(waves, Clips):
        return waves
    try:
        check_rate(rate)
    except (TypeError, ValueError) as error:
        raise DataError(f'rate = {rate!r}: {error}') from None
    if not isinstance(waves, (list, tuple)):
        waves = np.atleast_1d(np.asarray(waves))
        waves = [waves] if waves.ndim == 1 else waves
    found = []
    for i, wave in enumerate(waves):
        wave = np.asarray(wave)
        if wave.ndim != 1 or not (wave.dtype == np.int16 or np.issubdtype(wave.dtype, np.floating)):
            raise DataError(f'sound {i} is {wave.dtype} {wave.shape}: it must be float or int16 samples (samples,)')
        wave = wave / np.float32(32768) if wave.dtype == np.int16 else wave.astype(np.float32)
        try:
            pieces = next(mono(lambda wave=wave: [wave[:, None]]))                    # finite, and not on another scale
            found.append(to_pcm(resampled(pieces, rate)))
        except ValueError as error:
            raise DataError(f'sound {i}: {error}') from None
        if len(found[-1]) < WINDOW_SAMPLES:
            raise DataError(f'sound {i} has {len(found[-1])} samples at 16 kHz, fewer than one window of '
                            f'{WINDOW_SAMPLES}')
    if not found:
        raise DataError('no sounds to embed')
    return Clips.of_waves(found, [f'sound {i}' for i in range(len(found))])
