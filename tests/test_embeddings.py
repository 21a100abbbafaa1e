"""Embeddings in Python, neighbours, the HEAR interface, the exported encoder.
python -m pytest tests/test_embeddings.py"""
import os

import numpy as np
import pytest
import soundfile
import torch

import data
import eval as evaluation
from audio import samples_for
from audio.decoding import decode_file
from checkpoints.opening import open_checkpoint
from engine.errors import CheckpointError, ConfigError, DataError
from tools.embeddings import load

from .conftest import ROOT, call
from .test_finetune import pretrained  # noqa: F401  (a fixture)

FIXTURES = os.path.join(ROOT, 'tests', 'fixtures')


def noise(samples, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ in Python

@pytest.mark.parametrize('ckpt', ['ours', 'authors_tiny_pretrain.pt', 'eat_tiny_finetune.pt'])
@pytest.mark.parametrize('rate, lengths', [(16000, [500, 9000, 10640, 47777]), (44100, [30000, 100001])])
def test_clip_embeddings_are_those_of_eval(pretrained, tmp_path, ckpt, rate, lengths):      # noqa: F811
    """Of the same samples, at their rate and resampled, shorter and longer than the input."""
    path = pretrained if ckpt == 'ours' else os.path.join(FIXTURES, ckpt)
    waves = [np.rint(noise(n, n) * 32767).astype(np.int16) for n in lengths]
    for i, wave in enumerate(waves):
        soundfile.write(tmp_path / f'{i}.wav', wave, rate)
    named = ','.join(f'{tmp_path}/{i}.wav' for i in range(len(waves)))
    assert call(evaluation.run, f'--ckpt={path}', f'--wav={named}', f'--embed={tmp_path}/x.npz', '--device=cpu',
                '--pool=bands,mean,cls').code == 0
    with np.load(tmp_path / 'x.npz') as stored:
        for pool in ('bands', 'mean', 'cls'):
            model = load(path, pool, device='cpu')
            clip, frames, seconds = model(waves, rate)
            np.testing.assert_allclose(clip, stored[pool], atol=1e-6)
            assert clip.dtype == np.float32 and clip.shape == (len(waves), model.clip_size)
    floats = [wave / np.float32(32768) for wave in waves]
    np.testing.assert_array_equal(model.clips(floats, rate), clip)
    assert frames.shape == (*seconds.shape, model.row_size) and frames.dtype == np.float32


@pytest.mark.parametrize('samples', [400, 1400, 1401, 2560, 10000, 10640, 30001, 64000])
def test_time_stamped_embeddings(pretrained, samples):          # noqa: F811
    """Of one window: the encoder's own output; of more: whole windows side by side. Times rise by 160 ms, within the
    sound; the last row is at most 160 ms from the end."""
    model, loaded = load(pretrained, device='cpu', layer=2), open_checkpoint(pretrained)
    wave = np.rint(noise(samples) * 32767).astype(np.int16)
    frames, seconds = model.rows(wave, 16000)
    ends = samples / 16000
    assert frames.shape == (1, seconds.shape[1], 8 * 32) and np.isfinite(frames).all()
    assert 0 < seconds[0, 0] and seconds[0, -1] < ends and ends - seconds[0, -1] <= 0.1601
    np.testing.assert_allclose(np.diff(seconds[0]), 0.16)
    assert seconds[0, 0] == pytest.approx(0.0875 if samples > 1400 else ends / 2)
    rows = seconds.shape[1]
    every = -(-((samples - 400) // 160 + 1) // 16)                          # with that whose centre is behind the end
    for first in {0, max(every - 4, 0)}:                                    # the input is 4 rows long
        part = wave[first * 2560:][:samples_for(64)]
        pcm = np.zeros((1, samples_for(64)), np.int16)
        pcm[0, :len(part)] = part
        spec = data.log_mel(torch.from_numpy(pcm), torch.tensor([len(part)]), **loaded.spectrum)
        with torch.no_grad():
            want = loaded.encoder.eval()(spec)[0, 1:].reshape(4, 8 * 32)    # the last block's output
        new, last = (every - 1) // 4 * 4 if first else 0, min(rows, first + 4)
        np.testing.assert_allclose(frames[0, new:last], want[new - first:last - first], atol=1e-5)


def test_time_stamped_embeddings_of_different_lengths(pretrained):          # noqa: F811
    model = load(pretrained, device='cpu')
    waves = [noise(n, n) for n in (3000, 40000, 12000)]
    frames, seconds = model.rows(waves, 16000)
    for wave, of_wave, times in zip(waves, frames, seconds):
        alone, alone_seconds = model.rows(wave, 16000)
        n = alone.shape[1]
        np.testing.assert_allclose(of_wave[:n], alone[0], atol=1e-5)
        np.testing.assert_array_equal(times[:n], alone_seconds[0])
        assert np.isnan(of_wave[n:]).all() and np.isnan(times[n:]).all()
    _, at_48k = model.rows(noise(36000), 48000)
    np.testing.assert_array_equal(at_48k, model.rows(noise(12000), 16000)[1])


def test_forms_of_sounds(pretrained):           # noqa: F811
    model, two = load(pretrained, device='cpu', pool='mean'), np.stack([noise(8000, 1), noise(8000, 2)])
    want = model.clips(two, 16000)
    for same in (list(two), torch.from_numpy(two), two.astype(np.float64), [torch.from_numpy(wave) for wave in two]):
        np.testing.assert_array_equal(model.clips(same, 16000), want)
    np.testing.assert_allclose(model.clips(two[1], 16000), want[1:], atol=1e-6)


@pytest.mark.parametrize('waves, rate, word', [
    ([], 16000, 'no s'), (np.zeros((2, 2, 800)), 16000, 'sound 0'), ([noise(800), noise(300)], 16000, 'sound 1'),
    (np.full(800, np.nan), 16000, 'sound 0'), (np.zeros(800, np.int32), 16000, 'int32'), (np.zeros(800), 10, 'rate'),
    (np.full(800, 3000.0), 16000, 'scale'), (np.zeros(800), '16 kHz', 'rate'), ([np.zeros((1, 800))], 16000, 'sound 0'),
    (np.zeros(0), 16000, 'sound 0')])
def test_bad_sounds(pretrained, waves, rate, word):          # noqa: F811
    with pytest.raises(DataError, match=word):
        load(pretrained, device='cpu')(waves, rate)


def test_bad_checkpoints_and_settings(pretrained, tmp_path):          # noqa: F811
    for arguments, error in (({'pool': 'max'}, ConfigError), ({'layer': 3}, ConfigError), ({'layer': 1.0}, ConfigError),
                             ({'device': 'tpu'}, ConfigError), ({'path': 'none.pt'}, CheckpointError)):
        with pytest.raises(error):
            load(**{'path': pretrained, **arguments})
    state = torch.load(pretrained, weights_only=False)
    state['model']['encoder.norm.weight'][:] = torch.inf
    torch.save(state, tmp_path / 'bad.pt')
    with pytest.raises(CheckpointError, match='bad.pt'):
        load(str(tmp_path / 'bad.pt'), device='cpu').clips(noise(8000), 16000)


def test_files_and_arrays_alike(pretrained, tmp_path):          # noqa: F811
    """decode_file and load's model, as docs/embeddings.md says."""
    soundfile.write(tmp_path / 'a.flac', noise(30000), 22050)
    wave, rate = soundfile.read(tmp_path / 'a.flac')
    model = load(pretrained, device='cpu')
    np.testing.assert_array_equal(model.clips(decode_file(str(tmp_path / 'a.flac')), 16000), model.clips(wave, rate))
