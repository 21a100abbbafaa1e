"""Numbers from the audio file to the loss and the score, each computed here by another way than in the code.

References: the int16 samples that a wav file was written from; torchaudio's kaldi.fbank, clip by clip; distributions by
numpy's own samplers and by counting; scikit-learn; plain loops. Sounds go in as files and command lines where that is
possible.   python -m pytest tests/test_numbers.py
"""
import collections
import contextlib
import csv
import functools
import hashlib
import json
import os
import types

import numpy as np
import pytest
import scipy.fft
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from sklearn.linear_model import LogisticRegression
from torchaudio.compliance import kaldi

import data
import eval as evaluation
import finetune
import prepare
import pretrain
from audio.clips import Clips, carve_validation, few_labels, key_hash, open_clips, task_splits
from audio.decoding import decode_file
from audio.workers import Worker, in_order
from checkpoints.opening import open_checkpoint
from configurator import configure
from engine import processes, randomness, saving
from engine.errors import DataError
from model import ASDA, ASDAConfig, Encoder
from recipes import demo
from scoring.features import features, log_mel_statistics
from scoring.metrics import describe
from scoring.monitor import labelled_clips, watch
from scoring.probes import PROBE_L2, effective_rank, knn_accuracy, knn_scores, linear_probe
from tools import results

from .conftest import ROOT, TINY, call

CPU = processes.Process(0, 1, torch.device('cpu'))
RAMPS = (9000, 12000, 1500, 5361, 5360)         # samples of clips in which every value occurs once
FRAMES = 32                                     # of the input that crops and rolls are tested with: 5,360 samples


# ----------------------------------------------------------------------------------------------------------- the sounds

def prepare_folder(root, name, sounds, splits, *options):
    """{path: int16 samples (n,) or (n, channels), or (samples, rate)} -> a set that prepare.py makes of wav files."""
    for path, wave in sounds.items():
        wave, rate = wave if isinstance(wave, tuple) else (wave, 16000)
        os.makedirs(os.path.dirname(f'{root}/{name}_source/{path}'), exist_ok=True)
        soundfile.write(f'{root}/{name}_source/{path}', wave, rate,
                        subtype='PCM_16' if wave.dtype == np.int16 else 'FLOAT')
    with open(f'{root}/{name}.csv', 'w') as f:
        f.writelines(f'{path},{split}\n' for path, split in zip(sounds, splits))
    made = call(prepare.run, 'folder', f'--source={root}/{name}_source', f'--out_dir={root}/{name}',
                f'--split_file={root}/{name}.csv', '--workers=0', *options)
    assert made.code == 0, made.err


def noise(rng, label, samples, level):
    """int16 noise through a one-pole filter whose colour depends on the class, but varies more within it."""
    pole, white = np.clip(0.3 * label + 0.25 * rng.standard_normal(), -0.9, 0.9), rng.standard_normal(samples)
    for _ in range(3):
        white[1:] += pole * white[:-1]
    return np.rint(level * 10 ** rng.uniform(-1, 0) * white / np.abs(white).max() + 20).astype(np.int16)


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    """A folder of prepared sets.

    ramps: class a or b, sample values that tell clip and place; noises: three classes, all shorter than 64 frames;
    whispers: another set with the same classes, far quieter and longer than 64 frames.
    """
    root, rng, first = tmp_path_factory.mktemp('numbers'), np.random.default_rng(0), -32000
    ramps = {}
    for i, length in enumerate(RAMPS):
        ramps[f'{"ab"[i > 2]}/{i}.wav'] = np.arange(first, first + length).astype(np.int16)
        first += length + 100
    noises = {f'{"xyz"[i % 3]}/{i:02d}.wav': noise(rng, i % 3, rng.integers(2000, 10000), 9000) for i in range(90)}
    whispers = {f'{"xyz"[i % 3]}/w{i}.wav': noise(rng, i % 3, rng.integers(11000, 20000), 60) for i in range(12)}
    prepare_folder(root, 'ramps', ramps, ['train'] * 5)
    prepare_folder(root, 'noises', noises, ['test' if i % 10 > 5 else 'train' for i in range(90)])
    prepare_folder(root, 'whispers', whispers, ['test' if i > 8 else 'train' for i in range(12)])
    return types.SimpleNamespace(root=str(root), ramps=ramps, noises=noises, whispers=whispers)


def kaldi_log_mel(pcm, window='hamming'):
    """(frames, 128) of one clip, the slow way: int16 -> [-1, 1), minus its mean, torchaudio's kaldi.fbank."""
    return kaldi_of(pcm.astype(np.float64).tobytes(), window)


@functools.lru_cache(maxsize=1000)
def kaldi_of(samples, window):
    wave = torch.from_numpy(np.frombuffer(samples) / 2 ** 15)
    return kaldi.fbank((wave - wave.mean()).float()[None], htk_compat=True, sample_frequency=16000, use_energy=False,
                       window_type=window, num_mel_bins=128, dither=0.0, frame_shift=10).numpy()


def training_values(sets, name):
    """Every log-mel value of a set's training split."""
    return np.concatenate([kaldi_log_mel(getattr(sets, name)[key])
                           for key in open_clips([name], sets.root).keys()]).astype(np.float64)


def network_input(pcm, frames, window, mean, std, gain=1.0):
    """(frames, 128): zeros behind the clip's last frame, before (x - mean) / (2 std)."""
    whole = np.zeros((frames, 128), np.float32)
    x = kaldi_log_mel(pcm * np.float64(gain), window)[:frames]
    whole[:len(x)] = x
    return torch.from_numpy((whole - mean) / (2 * std)).float()


def kolmogorov(found, cdf):
    """Largest distance of the empirical distribution from a cdf, times sqrt(n): above 1.95 once in a thousand."""
    found = np.sort(np.asarray(found, np.float64))
    n, want = len(found), cdf(found)
    return np.sqrt(n) * max((np.arange(1, n + 1) / n - want).max(), (want - np.arange(n) / n).max())


def uniform(low, high):
    return lambda x: np.clip((x - low) / (high - low), 0, 1)


def sampled(draws):
    """The cdf of a hundred thousand numbers that numpy drew itself."""
    draws = np.sort(draws)
    return lambda x: np.searchsorted(draws, x, 'right') / len(draws)


def chi_square(counts, expected):
    counts, expected = np.asarray(counts, float), np.broadcast_to(expected, np.shape(counts))
    return ((counts - expected) ** 2 / expected).sum()


# ----------------------------------------------------------------------------------------------- file -> packed samples

def stored(root, name, split):
    """[(key, int16 samples)] of a set's only shard, read without our reader."""
    pcm = np.fromfile(f'{root}/{name}/{split}-00000.pcm', np.int16)
    with np.load(f'{root}/{name}/{split}-00000.npz') as index:
        return [(str(key), pcm[start:start + n])
                for key, start, n in zip(index['keys'], index['offsets'], index['lengths'])]


def test_a_16_khz_mono_file_is_packed_sample_by_sample(sets):
    """Reference: the samples that the wav files were written from."""
    for name in ('ramps', 'noises', 'whispers'):
        written = getattr(sets, name)
        found = [pair for split in ('train', 'test') if (name, split) != ('ramps', 'test')
                 for pair in stored(sets.root, name, split)]
        assert sorted(key for key, _ in found) == sorted(written)
        assert all(np.array_equal(pcm, written[key]) for key, pcm in found)
        clips = open_clips([name], sets.root)
        for i, key in enumerate(clips.keys()):
            assert np.array_equal(clips.read(i), written[key])
            assert np.array_equal(clips.read(i, 5, 700), written[key][5:705])
            assert clips.classes[clips.label[i]] == key[0]


def test_channels_are_averaged_rates_converted_and_peaks_clipped(tmp_path):
    """References: the mean by numpy, torchaudio's resampling, and the sine itself at the new rate."""
    rng = np.random.default_rng(1)
    stereo = rng.integers(-20000, 20000, (4000, 2)).astype(np.int16)
    three = rng.integers(-20000, 20000, (4000, 3)).astype(np.int16)
    sine = {rate: (0.5 * np.sin(2 * np.pi * 440 * np.arange(rate // 2) / rate)).astype(np.float32)
            for rate in (8000, 11025, 44100, 48000)}
    loud = (1.3 * np.sin(np.arange(4000) / 7)).astype(np.float32)
    sounds = {'s/stereo.wav': stereo, 's/three.wav': three, 's/loud.wav': loud,
              **{f's/{rate}.wav': (wave, rate) for rate, wave in sine.items()}}
    prepare_folder(tmp_path, 'mixed', sounds, ['train'] * len(sounds))
    found = dict(stored(tmp_path, 'mixed', 'train'))
    assert np.abs(found['stereo.wav'] - stereo.astype(float).mean(axis=1)).max() <= 0.51
    assert np.abs(found['three.wav'] - three.astype(float).mean(axis=1)).max() <= 0.51
    assert np.abs(found['loud.wav'] - np.clip(loud.astype(float) * 2 ** 15, -2 ** 15, 2 ** 15 - 1)).max() <= 0.51
    for rate, wave in sine.items():
        want = torchaudio.functional.resample(torch.from_numpy(wave), rate, 16000).numpy() * 2 ** 15
        pcm = found[f'{rate}.wav']
        assert len(pcm) == len(want) and np.abs(pcm - want).max() <= 0.51
        true = 2 ** 14 * np.sin(2 * np.pi * 440 * np.arange(len(pcm)) / 16000)
        assert np.abs(pcm - true)[200:-200].max() < 30                      # of 16,384
        assert np.array_equal(np.rint(decode_file(f'{tmp_path}/mixed_source/s/{rate}.wav') * 2 ** 15), pcm)


def test_statistics_are_those_of_the_training_splits_real_frames(sets):
    """Reference: kaldi.fbank of every clip, mean and standard deviation of all values by numpy in float64.

    Each clip's sums, the set's meta.json, and a union, whose frames (not whose sets or clips) count alike.
    """
    pooled = {}
    for name in ('noises', 'whispers'):
        clips = open_clips([name], sets.root)
        with open(f'{sets.root}/{name}/meta.json') as f:
            meta = json.load(f)
        for k, window in enumerate(('hamming', 'hanning')):
            parts = [kaldi_log_mel(getattr(sets, name)[key], window).astype(np.float64) for key in clips.keys()]
            for sums, part in zip(clips.stats, parts):
                np.testing.assert_allclose(sums[k], [part.sum(), (part ** 2).sum()], rtol=1e-4)
            values = np.concatenate(parts).ravel()
            assert clips.statistics(window) == pytest.approx((values.mean(), values.std()), abs=1e-3)
            assert meta['statistics'][window] == pytest.approx([values.mean(), values.std()], abs=1e-3)
            pooled.setdefault(window, []).append(values)
        samples = sum(map(len, getattr(sets, name).values()))
        assert meta['hours'] == pytest.approx(samples / 16000 / 3600)
        train = sum(len(getattr(sets, name)[key]) for key in clips.keys())
        assert meta['splits']['train'] == {'clips': len(clips), 'seconds': pytest.approx(train / 16000)}
    for window, values in pooled.items():
        union, values = open_clips(['noises', 'whispers'], sets.root), np.concatenate(values)
        assert union.statistics(window) == pytest.approx((values.mean(), values.std()), abs=1e-3)
        some = union.select(np.arange(0, len(union), 7))
        keys, both = some.keys(), {**sets.noises, **sets.whispers}
        values = np.concatenate([kaldi_log_mel(both[key], window) for key in keys]).astype(np.float64)
        assert some.statistics(window) == pytest.approx((values.mean(), values.std()), abs=1e-3)


def test_clips_come_from_workers_in_order_and_as_from_one_process():
    """Reference: the same places packed one by one, and kaldi's sums."""
    places = [(demo.synthesise, 1, i) for i in range(60)]
    with contextlib.closing(Worker()) as one, contextlib.closing(Worker()) as other:
        found = list(in_order(prepare.pack_clip, places, (60,), [one, other]))
    for place, (pcm, sums) in zip(places, found, strict=True):
        wave = demo.synthesise(*place[1:])
        assert np.array_equal(pcm, np.rint(np.clip(wave * 2.0 ** 15, -2 ** 15, 2 ** 15 - 1)).astype(np.int16))
        x = kaldi_log_mel(pcm, 'hanning').astype(np.float64)
        np.testing.assert_allclose(sums[1], [x.sum(), (x ** 2).sum()], rtol=1e-4)


def test_the_demo_stays_the_demo():
    """Reference: levels (dB) of the first ten clips and the share of sign changes, noted when the set was made."""
    waves = [demo.synthesise(1, i).astype(np.float64) for i in range(10)]
    assert all(wave.shape == (20720,) for wave in waves)
    levels = [20 * np.log10(np.sqrt((wave ** 2).mean())) for wave in waves]
    changes = [(np.diff(np.sign(wave)) != 0).mean() for wave in waves]
    np.testing.assert_allclose(levels, [-23.39, -21.29, -24.21, -15.79, -25.86, -19.04, -22.99, -24.18, -27.85, -19.83],
                               atol=0.01)
    np.testing.assert_allclose(changes, [0.0358, 0.2361, 0.1868, 0.1855, 0.1885, 0.2254, 0.5038, 0.1693, 0.271, 0.05],
                               atol=1e-3)
    many = np.array([20 * np.log10(np.sqrt((demo.synthesise(2, i).astype(float) ** 2).mean())) for i in range(150)])
    assert kolmogorov(many, uniform(-30, -12)) < 1.95
    assert not np.array_equal(waves[0], demo.synthesise(2, 0)) and np.array_equal(waves[0], demo.synthesise(1, 0))


@pytest.mark.parametrize('rate', [8000, 44100])
def test_a_set_of_another_rate_is_refused(sets, tmp_path, rate):
    with open(f'{sets.root}/ramps/meta.json') as f:
        meta = json.load(f)
    os.makedirs(tmp_path / 'odd')
    for file in ('train-00000.npz', 'train-00000.pcm'):
        os.symlink(f'{sets.root}/ramps/{file}', tmp_path / 'odd' / file)
    with open(tmp_path / 'odd' / 'meta.json', 'w') as f:
        json.dump({**meta, 'sample_rate': rate}, f)
    with pytest.raises(DataError, match=f'{rate} Hz'):
        open_clips(['odd'], str(tmp_path))


# --------------------------------------------------------------------------------------------------------------- splits

def soundless(label, **arrays):
    return Clips([], [{'name': 'made', 'classes': ['a', 'b', 'c'], 'multi_label': False}],
                 offset=np.zeros(len(label), int), label=label, **arrays)


def test_validation_is_chosen_by_the_hash_of_the_key():
    """Reference: the same clips in another order, or fewer of them, have the same validation part, of the size asked
    for. The hash is the first 32 bits of SHA-1, by hashlib."""
    keys, n = [f'{"abc"[i % 3]}/{i}.wav' for i in range(30000)], 30000
    assert key_hash('a/ü\udcff.wav') == int(hashlib.sha1(b'a/\xc3\xbc\xff.wav').hexdigest()[:8], 16)
    names = np.array([key_hash(key) for key in keys], np.uint32)

    def validation(chosen, part):
        rest, valid = carve_validation(soundless(label=chosen % 3, hash=names[chosen], row=chosen), part)
        assert sorted([*rest.row, *valid.row]) == sorted(chosen)
        return set(valid.row.tolist())
    shuffled = np.random.default_rng(0).permutation(n)
    for part in (0.1, 0.3):
        whole = validation(np.arange(n), part)
        assert len(whole) == pytest.approx(n * part, abs=4 * np.sqrt(n * part * (1 - part)))
        assert validation(shuffled, part) == whole
        assert validation(np.sort(shuffled[:1000]), part) == whole & set(shuffled[:1000].tolist())
    assert validation(np.arange(n), 0.1) < validation(np.arange(n), 0.3)
    assert not validation(np.arange(n), 0.0)


def test_few_labels_are_drawn_by_the_seed_alike_for_every_clip():
    """Reference: counting how often each clip of a class is drawn, over many seeds."""
    label = np.repeat([0, 1, 2], [12, 20, 5])
    clips = soundless(label, row=np.arange(37))
    counts = np.zeros(37)
    for seed in range(600):
        drawn = few_labels(clips, 4, seed)
        assert np.bincount(drawn.label).tolist() == [4, 4, 4] and (np.diff(drawn.row) > 0).all()
        counts[drawn.row] += 1
    for c, degrees in ((0, 32.9), (1, 45.3), (2, 20.5)):                    # p = 0.001 of 11, 19 and 4 + slack
        expected = 600 * 4 / (label == c).sum()
        assert chi_square(counts[label == c], expected) < degrees
    assert len({tuple(few_labels(clips, 4, seed).row) for seed in range(30)}) == 30


def test_a_fold_is_tested_on_whole_and_trained_without(tmp_path):
    """Reference: the folds in the table that the set was made from."""
    rng, rows = np.random.default_rng(2), []
    for i in range(20):
        path = tmp_path / 'esc' / 'audio' / f'{i}.wav'
        os.makedirs(path.parent, exist_ok=True)
        soundfile.write(path, rng.integers(-999, 999, 3000).astype(np.int16), 16000)
        rows.append((f'{i}.wav', 1 + i * 7 % 5, i % 2, 'xy'[i % 2], 'False', i, 'A'))
    os.makedirs(tmp_path / 'esc' / 'meta')
    with open(tmp_path / 'esc' / 'meta' / 'esc50.csv', 'w', newline='') as f:
        csv.writer(f).writerows([('filename', 'fold', 'target', 'category', 'esc10', 'src_file', 'take'), *rows])
    assert call(prepare.run, 'esc50', f'--source={tmp_path}/esc', f'--out_dir={tmp_path}/set', '--workers=0').code == 0
    fold_of = {str(i): str(1 + i * 7 % 5) for i in range(20)}
    for fold in '135':
        train, valid, test, whole = task_splits('set', str(tmp_path), fold=fold, validation_part=0.4)
        assert sorted(test.keys()) == sorted(key for key in fold_of if fold_of[key] == fold)
        assert sorted(whole.keys()) == sorted(key for key in fold_of if fold_of[key] != fold)
        assert sorted(train.keys() + valid.keys()) == sorted(whole.keys())
        for part in (train, valid, test):
            assert [part.classes[c] for c in part.label] == ['xy'[int(key) % 2] for key in part.keys()]


# ------------------------------------------------------------------------------------------------------ crops and joins

@functools.lru_cache
def ramp_table():
    """value -> clip and place in it, of every sample of the ramps; -1 where there is none."""
    clip, place, first = np.full(2 ** 16, -1), np.full(2 ** 16, -1), -32000
    for i, length in enumerate(RAMPS):
        clip[first + 2 ** 15:first + 2 ** 15 + length] = i
        place[first + 2 ** 15:first + 2 ** 15 + length] = np.arange(length)
        first += length + 100
    return clip, place


def runs(row):
    """[(clip, start, length)] of a row of ramps cut and put together."""
    clip, place = (table[row.astype(int) + 2 ** 15] for table in ramp_table())
    assert (clip >= 0).all()
    breaks = np.flatnonzero(np.diff(row.astype(int)) != 1) + 1
    return [(clip[part[0]], place[part[0]], len(part)) for part in np.split(np.arange(len(row)), breaks)]


def pretrain_rows(sets, steps, batch_size=6, seed=5, **options):
    """[(position in training, int16 samples of the row without padding)]"""
    clips = open_clips(['ramps'], sets.root)
    assert clips.length.tolist() == list(RAMPS)
    batches = data.PretrainBatches(clips, FRAMES, batch_size, range(batch_size), seed, **options)
    rows = []
    for step in range(steps):
        batch = batches[step]
        for place, (pcm, length) in enumerate(zip(batch['pcm'].numpy(), batch['lengths'])):
            assert not pcm[length:].any() and len(pcm) == 5360
            rows.append((step * batch_size + place, pcm[:length]))
    return rows


def test_crops_are_slices_from_anywhere_of_the_clips_of_each_epoch(sets):
    """Reference: the ramps' values say which clip a row is of and where it was cut; uniform by Kolmogorov's test."""
    starts, clips_of_epoch, orders = collections.defaultdict(list), collections.Counter(), []
    for position, row in pretrain_rows(sets, 250):
        (clip, start, length), = runs(row)
        assert length == min(RAMPS[clip], 5360)
        starts[clip].append(int(start))
        clips_of_epoch[position // 5, int(clip)] += 1
        orders.append(int(clip))
    assert set(clips_of_epoch.values()) == {1}                              # each clip once an epoch, in another order
    assert len({tuple(orders[i:i + 5]) for i in range(0, 1500, 5)}) > 80    # of 120
    for clip in (0, 1):
        spare = RAMPS[clip] - 5360
        assert kolmogorov(np.array(starts[clip]) + 0.5, uniform(0, spare + 1)) < 1.95
    assert set(starts[2]) == set(starts[4]) == {0}
    assert chi_square(np.bincount(starts[3]), 150) < 10.8                   # one sample to spare: first or last
    shares, others = ({position: start / (RAMPS[clip] - 5360) for position, (clip, start, _) in
                       ((position, runs(row)[0]) for position, row in pretrain_rows(sets, steps, seed=seed))
                       if clip < 2} for steps, seed in ((250, 5), (40, 6)))
    assert len({round(share, 4) for share in shares.values()}) > 550        # of 600: each place and step draws anew
    both = shares.keys() & others.keys()                                    # and so does each seed
    assert len(both) > 20 and np.mean([abs(shares[i] - others[i]) < 1e-3 for i in both]) < 0.1


def test_short_clips_are_joined_with_crops_of_any_clip(sets):
    """Reference: as above; the clips that follow are drawn alike from all (chi-square)."""
    followers, starts = collections.Counter(), []
    for _, row in pretrain_rows(sets, 200, join=True):
        assert len(row) == 5360
        parts, filled = runs(row), 0
        assert parts[0][2] == min(RAMPS[parts[0][0]], 5360)
        for clip, start, length in parts:
            assert length == min(RAMPS[clip], 5360 - filled)                # whole, or what is left to fill
            spare = RAMPS[clip] - length
            if filled:
                followers[int(clip)] += 1
                if spare > 100:
                    starts.append((start + 0.5) / (spare + 1))
            filled += length
    assert sum(followers.values()) > 200
    assert chi_square([followers[i] for i in range(5)], sum(followers.values()) / 5) < 18.5
    assert kolmogorov(starts, uniform(0, 1)) < 1.95


# ----------------------------------------------------------------------------------------------------------- log-mel

@pytest.mark.parametrize('window', ['hamming', 'hanning'])
def test_the_networks_input_is_kaldis_padded_cut_and_normalised(sets, window):
    """Reference: kaldi.fbank per clip, then zeros, then (x - mean) / (2 std), in numpy; with gain, and repeated."""
    waves = [*list(sets.noises.values())[:4], *list(sets.whispers.values())[:2]]
    batch = data.stack([wave[:10480] for wave in waves], 10480)
    gain = torch.tensor([0.5, 0.9, 1.0, 1.1, 1.5, 0.7])
    for frames in (48, 64, 96):
        got = data.log_mel(batch['pcm'], batch['lengths'], frames, window, -3.0, 2.5, gain)
        for row, wave, factor in zip(got, waves, gain.tolist()):
            want = network_input(wave[:10480], min(frames, 64), window, -3.0, 2.5, factor)
            want = F.pad(want, (0, 0, 0, frames - len(want)), value=3.0 / 5.0)
            torch.testing.assert_close(row, want, atol=1e-3, rtol=0)
            assert abs(float((row - want).mean())) < 4e-6                   # no other scale, not even 1 / 32767
    got = data.log_mel(batch['pcm'], batch['lengths'], 64, window, -3.0, 2.5, gain, repeat=True)
    for row, wave, factor in zip(got, waves, gain.tolist()):
        wave = wave[:10480].astype(np.float64)
        again = np.tile(wave - wave.mean(), 6)[:10480] * factor
        torch.testing.assert_close(row, network_input(again, 64, window, -3.0, 2.5), atol=1e-3, rtol=0)


# --------------------------------------------------------------------------------------------------------- augmentation

def finetune_batches(sets, batch_size=6, seed=7, name='ramps', frames=FRAMES, **options):
    clips = open_clips([name], sets.root)
    return clips, data.FinetuneBatches(clips, frames, batch_size, range(batch_size), seed, 3, **options)


def test_rolls_are_circular_over_the_whole_clip_and_from_anywhere(sets):
    """Reference: the ramps' values; the first sample's place is uniform in the clip (Kolmogorov)."""
    clips, batches = finetune_batches(sets, roll=True)
    starts, seen = [], []
    for step in range(120):
        batch = batches[step]
        for pcm, length, label in zip(batch['pcm'].numpy(), batch['lengths'], batch['labels']):
            clip, start, _ = runs(pcm[:1])[0]
            whole = sets.ramps[f'{"ab"[int(clip > 2)]}/{clip}.wav']
            assert np.array_equal(pcm[:length], np.concatenate([whole[start:], whole[:start]])[:5360])
            assert length == min(len(whole), 5360) and not pcm[length:].any()
            assert label.tolist() == [float(clip <= 2), float(clip > 2)]
            starts.append((start + 0.5) / len(whole))
            seen.append(int(clip))
        assert batch['label_sum'] == 6
    assert kolmogorov(starts, uniform(0, 1)) < 1.95 and len(set(starts)) > 690
    assert all(sorted(seen[i:i + 5]) == list(range(5)) for i in range(0, 720, 5))
    _, plain = finetune_batches(sets)
    batch = plain[3]
    assert [[run[1] for run in runs(row[:n])] for row, n in zip(batch['pcm'].numpy(), batch['lengths'])] == [[0]] * 6
    assert batch['gain'].tolist() == [1.0] * 6 and batch['mix'] == 1 and 'noise_seed' not in batch


def test_draws_have_the_distributions_of_the_method(sets):
    """References: numpy's beta and uniform samplers, torchaudio's masking of one axis, by Kolmogorov's test."""
    _, batches = finetune_batches(sets, 8, roll=True, noise=True, mask_ratio=0.25, mixup=3.0, mixup_probability=0.7)
    items = [batches[step] for step in range(250)]
    drawn = {name: torch.cat([item[name].reshape(8, -1) for item in items]).numpy().squeeze()
             for name in ('gain', 'noise', 'shift', 'bands', 'times', 'draws', 'noise_seed')}
    rng = np.random.default_rng(0)
    assert kolmogorov(drawn['gain'], sampled(rng.beta(10, 10, 100000) + 0.5)) < 1.95
    assert kolmogorov(drawn['noise'], uniform(0, 0.1)) < 1.95
    assert chi_square(np.bincount(drawn['shift'] + 10, minlength=20), 100) < 43.9 and drawn['shift'].max() == 9
    assert drawn['draws'].shape == (2000, 6) and drawn['draws'].dtype == np.float32
    for column in drawn['draws'].T:
        assert kolmogorov(column, uniform(0, 1)) < 1.95
    assert len(set(drawn['noise_seed'].tolist())) == 2000
    torch.manual_seed(0)
    for name, size in (('bands', 128), ('times', FRAMES)):
        start, stop = drawn[name].T
        masked = 1 - torchaudio.functional.mask_along_axis_iid(
            torch.ones(4000, 1, size, size), size // 4, 0.0, 2)[:, 0, :, 0].numpy()
        widths = masked.sum(axis=1)
        assert 0 <= start.min() and stop.max() <= size and (stop - start).max() == size // 4 - 1
        assert two_samples(stop - start, widths) < 1.95
        wide = stop - start >= size // 8                                    # torchaudio's empty masks have no place
        assert two_samples(start[wide], masked[widths >= size // 8].argmax(axis=1)) < 1.95
    mixes = np.array([float(item['mix']) for item in items])
    mixed = mixes < 1
    assert abs(mixed.mean() - 0.7) < 4 * np.sqrt(0.7 * 0.3 / 250)
    assert kolmogorov(mixes[mixed], sampled(rng.beta(3, 3, 100000))) < 1.95
    assert len(set(mixes[mixed].tolist())) == mixed.sum()
    every = [float(finetune_batches(sets, mixup=0.8, mixup_probability=1.0)[1][step]['mix']) for step in range(40)]
    assert max(every) < 1 and {float(finetune_batches(sets)[1][step]['mix']) for step in range(20)} == {1.0}


def two_samples(a, b):
    """Kolmogorov and Smirnov's statistic of two samples of whole numbers, times its root."""
    values = np.unique(np.concatenate([a, b]))
    distance = np.abs([(a <= value).mean() - (b <= value).mean() for value in values]).max()
    return distance * np.sqrt(len(a) * len(b) / (len(a) + len(b)))


def augmented_by_loops(x, batch):
    """Noise, shift, mixup, frequency mask, time mask, in this order, an element at a time."""
    x, mix = x.double().numpy(), float(batch['mix'])
    B, frames, bands = x.shape
    moved, labels = np.zeros_like(x), np.zeros(batch['labels'].shape)
    for b in range(B):
        noisy = x[b]
        if 'noise_seed' in batch:
            drawn = torch.rand(frames, bands, generator=torch.Generator().manual_seed(int(batch['noise_seed'][b])))
            noisy = noisy + float(batch['noise'][b]) * drawn.double().numpy()
        for t in range(frames):
            moved[b, (t + int(batch['shift'][b])) % frames] = noisy[t]
    result = np.zeros_like(x)
    for b in range(B):
        partner = B - 1 - b
        result[b] = mix * moved[b] + (1 - mix) * moved[partner]
        labels[b] = mix * batch['labels'][b].numpy() + (1 - mix) * batch['labels'][partner].numpy()
        for f in range(int(batch['bands'][b, 0]), int(batch['bands'][b, 1])):
            result[b, :, f] = 0
        for t in range(int(batch['times'][b, 0]), int(batch['times'][b, 1])):
            result[b, t] = 0
    return torch.from_numpy(result).float(), torch.from_numpy(labels).float()


def test_augmentation_equals_loops_in_its_order(sets):
    _, batches = finetune_batches(sets, roll=True, noise=True, mask_ratio=0.4, mixup=0.8)
    torch.manual_seed(0)
    mixes = []
    for step in range(6):
        batch, x = batches[step], torch.randn(6, FRAMES, 128)
        want, labels = augmented_by_loops(x, batch)
        got, got_labels = data.augment(x, batch)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got_labels, labels)
        mixes.append(float(batch['mix']))
    assert min(mixes) < 0.7


def test_weighted_draws_have_the_chances_of_numpys():
    """Reference: numpy's choice without replacement with the same weights; the first drawn, and each pair."""
    weights, n = np.array([5.0, 3.0, 1.0, 0.5, 0.5]), 3000
    rng = np.random.default_rng(3)
    ours, theirs = collections.Counter(), collections.Counter()
    for i in range(n):
        ours[tuple(sorted(data.weighted_draw(weights, 2, np.random.default_rng([9, i])).tolist()))] += 1
        theirs[tuple(sorted(rng.choice(5, 2, replace=False, p=weights / 10).tolist()))] += 1
    assert len(ours) == len(theirs) == 10
    assert sum((ours[pair] - theirs[pair]) ** 2 / (ours[pair] + theirs[pair]) for pair in ours) < 27.9


# --------------------------------------------------------------------------------------------------------------- losses

def stage(name, *argv):
    return configure(os.path.join(ROOT, f'{name}.py'), list(argv), (os.path.join(ROOT, 'model.py'), 'ASDAConfig'))


def first_line_with(folder, key):
    with open(f'{folder}/log.jsonl') as f:
        return next(line for line in map(json.loads, f) if key in line)


@pytest.mark.parametrize('options', [
    ['--norm_mean=-5.5', '--norm_std=2.25', '--window=hanning'], ['--short_clips=join', '--dataset=noises,whispers']])
def test_the_first_loss_of_pretraining_from_the_files(sets, tmp_path, options):
    """Reference: kaldi.fbank of the step's samples, normalised by numpy, through a model of the same seed."""
    argv = [*TINY, '--dataset=noises', f'--data_dir={sets.root}', '--batch_size=4', '--max_steps=1', '--warmup_steps=0',
            '--log_interval=1', '--seed=3', f'--out_dir={tmp_path}/out', *options]
    made = call(pretrain.run, *argv)
    assert made.code == 0, made.err
    settings = stage('pretrain', *argv)
    config = ASDAConfig(**{name: getattr(settings, name) for name in ASDAConfig.__dataclass_fields__})
    clips = open_clips(settings.dataset.split(','), sets.root)
    both = {**sets.noises, **sets.whispers}
    values = np.concatenate([kaldi_log_mel(both[key], settings.window) for key in clips.keys()]).astype(np.float64)
    mean, std = ((settings.norm_mean, settings.norm_std) if settings.norm_mean else (values.mean(), values.std()))
    batch = data.PretrainBatches(clips, 64, 4, range(4), 3, settings.short_clips == 'join')[0]
    spec = torch.stack([network_input(pcm[:n], 64, settings.window, mean, std)
                        for pcm, n in zip(batch['pcm'].numpy(), batch['lengths'])])
    mask = data.block_masks(4, config.n_students, config.grid, config.mask_ratio, config.mask_block,
                            randomness.torch_random('cpu', 3, 'mask', 0), config.mask_adjust)
    noise = torch.cat([config.mask_noise * torch.randn(
        config.n_students, 32, config.n_embd, generator=randomness.torch_random('cpu', 3, 'noise', 0, place))
        for place in range(4)])
    torch.manual_seed(3)
    loss, measures = ASDA(config)(spec, mask, noise)
    line = first_line_with(tmp_path / 'out', 'loss')
    for name, value in {'loss': loss, **{name: measures[name] for name in ('frame', 'utterance')}}.items():
        assert line[name] == pytest.approx(float(value.detach()), rel=2e-4)
    state = saving.load_checkpoint(f'{tmp_path}/out/ckpt.pt')
    assert state['input']['mean'] == pytest.approx(mean, abs=1e-3)
    assert state['input']['std'] == pytest.approx(std, abs=1e-3)


@pytest.mark.parametrize('options', [['--label_smoothing=0.2', '--weighted', '--epoch_clips=30'], ['--loss=bce'],
                                     ['--roll=False', '--accumulate=3', '--repeat'],
                                     ['--mixup_probability=0']])
def test_the_first_loss_of_finetuning_from_the_files(sets, tmp_path, options):
    """Reference: kaldi.fbank, the augmentation by loops, a model of the same seed, cross-entropy by numpy."""
    argv = [*TINY, '--dataset=noises', f'--data_dir={sets.root}', '--batch_size=6', '--max_steps=1', '--warmup_steps=0',
            '--log_interval=1', '--init=scratch', '--mixup=0.8', '--mixup_probability=1', '--noise', '--drop_path=0.4',
            '--input_mask=0.3', '--seed=4', f'--out_dir={tmp_path}/out', *options]
    made = call(finetune.run, *argv)
    assert made.code == 0, made.err
    settings = stage('finetune', *argv)
    train = task_splits('noises', sets.root)[0]
    values = training_values(sets, 'noises')
    weights = None
    if settings.weighted:
        weights = np.array([1000 / ((train.label == c).sum() + 0.01) for c in train.label])
    batch = data.FinetuneBatches(train, 64, 6, range(6), 4, 2, settings.roll, True, 0.3, 0.8,
                                 settings.mixup_probability, weights, 30)[0]
    assert (batch['mix'] < 1) == (settings.mixup_probability == 1)
    assert settings.roll == bool((batch['gain'] != 1).any())
    waves = [pcm[:n].astype(np.float64) for pcm, n in zip(batch['pcm'].numpy(), batch['lengths'])]
    if settings.repeat:
        waves = [np.tile(wave - wave.mean(), 6)[:10480] for wave in waves]
    spec, labels = augmented_by_loops(torch.stack([
        network_input(wave, 64, 'hamming', values.mean(), values.std(), gain)
        for wave, gain in zip(waves, batch['gain'])]), batch)
    model = finetune.initial_model(settings, 3)[0].train()
    with torch.no_grad():
        logits = model(spec, batch['draws']).double().numpy()
    want = 0.0
    for row, target in zip(logits, labels.double().numpy()):
        for c in range(3):
            if settings.loss == 'bce':
                chance = 1 / (1 + np.exp(-row[c]))
                want -= target[c] * np.log(chance) + (1 - target[c]) * np.log(1 - chance)
            else:
                smooth = target[c] * (1 - settings.label_smoothing) + settings.label_smoothing / 3
                want -= smooth * np.log(np.exp(row[c]) / np.exp(row).sum())
    assert first_line_with(tmp_path / 'out', 'loss')['loss'] == pytest.approx(want / 6, rel=2e-4)
    state = saving.load_checkpoint(f'{tmp_path}/out/ckpt.pt')
    assert (state['input']['mean'], state['input']['std']) == pytest.approx((values.mean(), values.std()), abs=1e-3)


class Linear(torch.nn.Module):
    """A network of one layer, that sees the drawn numbers too."""

    def __init__(self, classes):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(129, classes, generator=torch.Generator().manual_seed(1)))

    def forward(self, spec, draws):
        return torch.cat([spec.mean(dim=1), draws.mean(dim=(1, 2))[:, None]], dim=1) @ self.weight


@pytest.mark.parametrize('multi_label', [False, True])
@pytest.mark.parametrize('world, accumulate', [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_parts_and_processes_add_up_to_the_loss_over_the_batch(sets, multi_label, world, accumulate):
    """Reference: the loss over all eight clips at once, by torch's own functions on labels mixed by loops, and its
    gradient by autograd. What the processes return and leave counts as its mean over them, as in a run."""
    argv = ['--batch_size=8', f'--accumulate={accumulate}', '--label_smoothing=0.1']
    settings = stage('finetune', *argv)
    _, batches = finetune_batches(sets, 8, roll=True, noise=True, mask_ratio=0.3, mixup=0.8, mixup_probability=1.0)
    whole = batches[1]
    if multi_label:
        whole['labels'] = (torch.rand(8, 5, generator=torch.Generator().manual_seed(0)) > 0.6).float()
        whole['label_sum'] = whole['labels'].sum()
    classes = whole['labels'].shape[1]
    spectrum = {'frames': FRAMES, 'window': 'hamming', 'mean': -8.0, 'std': 3.0, 'repeat': False}
    spec, labels = augmented_by_loops(
        data.log_mel(whole['pcm'], whole['lengths'], **spectrum, gain=whole['gain']), whole)
    network = Linear(classes)
    logits = network(spec, whole['draws'])
    if multi_label:
        want = F.binary_cross_entropy_with_logits(logits, labels, reduction='sum') / labels.sum()
    else:
        want = F.cross_entropy(logits, labels, label_smoothing=0.1)
    want_gradient, = torch.autograd.grad(want, network.weight)
    loss, gradient = 0.0, 0.0
    for rank in range(world):
        places = data.mirrored_places(8, rank, world)
        part = {name: value[places] if value.ndim else value for name, value in whole.items()}
        network = Linear(classes)
        loss += float(finetune.forward_backward(network, part, spectrum, settings, multi_label,
                                                processes.Process(rank, world, torch.device('cpu')),
                                                processes.autocast(CPU, 'float32')[0])) / world
        gradient = gradient + network.weight.grad / world
    assert loss == pytest.approx(float(want), rel=1e-5)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- probes

def with_large_weights(path, out):
    """The checkpoint with matrices drawn at random, so large that features tell clips apart."""
    state, generator = torch.load(path, weights_only=True), torch.Generator().manual_seed(0)
    for name, weight in state['model'].items():
        if weight.ndim > 1 and not name.endswith('cls'):
            weight.copy_(0.4 * torch.randn(weight.shape, generator=generator))
    torch.save(state, out)
    return out


@pytest.fixture(scope='module')
def pretrained(sets):
    """A checkpoint that was pre-trained on quiet sounds, and so holds their statistics."""
    made = call(pretrain.run, *TINY, '--dataset=whispers', f'--data_dir={sets.root}', '--batch_size=4', '--max_steps=1',
                '--warmup_steps=0', f'--out_dir={sets.root}/pretrained')
    assert made.code == 0, made.err
    return with_large_weights(f'{sets.root}/pretrained/ckpt.pt', f'{sets.root}/pretrained.pt')


@pytest.fixture(scope='module')
def tuned(sets, pretrained):
    """A checkpoint that was fine-tuned on the noises."""
    made = call(finetune.run, '--dataset=noises', f'--data_dir={sets.root}', f'--ckpt={pretrained}', '--batch_size=4',
                '--max_steps=1', '--warmup_steps=0', '--workers=0', '--device=cpu', '--pooling=mean',
                f'--out_dir={sets.root}/tuned')
    assert made.code == 0, made.err
    return with_large_weights(f'{sets.root}/tuned/ckpt.pt', f'{sets.root}/tuned.pt')


def reference_features(encoder, waves, mean, std, frames=64):
    """{pool: (clips, F)} as the docstrings promise, one window and one frame at a time: every real frame of a clip is
    given the patches of its row, of the first window that sees it; means and deviations over those frames."""
    found = {'cls': [], 'mean': [], 'bands': [], 'cepstra': []}
    for wave in waves:
        total = 1 + (len(wave) - 400) // 160
        of_frame, cls = [], []
        while len(of_frame) < total:
            first = max(min(len(of_frame), total - frames), 0)              # the last window ends with the clip
            spec = network_input(wave[first * 160:(first + frames - 1) * 160 + 400], frames, 'hamming', mean, std)
            with torch.no_grad():
                x, states = encoder.norm(torch.cat([encoder.cls[0], encoder.embed(spec[None])[0]])[None]), []
                for block in encoder.blocks:
                    x, _ = block(x)
                    states.append(x[0].double().numpy())
            state = np.mean(states, axis=0)                                 # (1 + P, D)
            new = range(len(of_frame), min(first + frames, total))
            of_frame += [state[1 + (frame - first) // 16 * 8:][:8].reshape(-1) for frame in new]
            cls += [state[0]] * len(new)
        of_frame = np.array(of_frame)
        found['cls'].append(np.mean(cls, axis=0))
        found['mean'].append(of_frame.mean(axis=0).reshape(8, -1).mean(axis=0))
        found['bands'].append(np.concatenate([of_frame.mean(axis=0), of_frame.std(axis=0)]))
        cepstra = scipy.fft.dct(of_frame.reshape(total, 8, -1), axis=1, norm='ortho').reshape(total, -1)
        found['cepstra'].append(np.concatenate([found['bands'][-1], cepstra.std(axis=0)]))
    return {pool: np.array(values, np.float32) for pool, values in found.items()}


def right_by_knn(train, train_labels, test, test_labels, k=10, standardise=True):
    """How many of test a loop gets right: features standardised by train if asked, k nearest by cosine, most votes,
    then the larger sum of similarities."""
    mean, std = (train.mean(axis=0), train.std(axis=0) + 1e-6) if standardise else (0, 1)
    parts = [(part - mean) / std for part in (train, test)]
    unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
    right = 0
    for row, label in zip(unit[1], test_labels):
        near = sorted(range(len(train)), key=lambda i: -(row @ unit[0][i]))[:k]
        votes = {c: (sum(train_labels[i] == c for i in near), sum(row @ unit[0][i] for i in near
                                                                  if train_labels[i] == c)) for c in set(train_labels)}
        right += max(votes, key=votes.get) == label
    return right


def right_by_scikit_learn(x, labels, t, wanted, strength):
    """Right on test, of logistic regression on features that are standardised by the training part."""
    mean, std = x.mean(axis=0), x.std(axis=0)
    x, t = ((part.astype(np.float64) - mean) / (std + 1e-6) for part in (x, t))
    fit = LogisticRegression(C=1 / (strength * len(x)), tol=1e-8, max_iter=5000).fit(x, labels)
    return int((fit.predict(t) == wanted).sum())


@pytest.mark.parametrize('seed, few', [(2, 8), (1, 0)])
def test_probes_see_the_sets_own_statistics_and_only_its_sound(sets, pretrained, seed, few):
    """Reference: kaldi.fbank normalised by the probed set's training split (not by the checkpoint's statistics), the
    encoder clip by clip, a loop of nearest neighbours, scikit-learn; with few labels that the seed draws, of those
    that a fine-tuning draws from, or with all, none kept back for validation."""
    settings = configure(evaluation.__file__, [f'--ckpt={pretrained}', '--dataset=noises', f'--data_dir={sets.root}',
                                               f'--labels_per_class={few}', f'--seed={seed}',
                                               '--pool=cls,bands,mean,cepstra'])
    train, valid, test, whole = task_splits('noises', sets.root, labels_per_class=few, seed=seed)
    parts = train if few else whole, test
    assert len(valid) and not set(train.keys()) & set(valid.keys())
    values = training_values(sets, 'noises')
    loaded = open_checkpoint(pretrained)
    loaded.encoder.eval()
    assert abs(loaded.spectrum['mean'] - values.mean()) > 2
    found = evaluation.probe_pretrained(loaded, settings, CPU, processes.autocast(CPU, 'float32')[0])
    waves = [[sets.noises[key] for key in part.keys()] for part in parts]
    torch.manual_seed(seed)
    untrained = Encoder(loaded.config).eval()

    labels = [np.array(['xyz'.index(key[0]) for key in part.keys()]) for part in parts]
    encoded, random = ([reference_features(encoder, part, values.mean(), values.std()) for part in waves]
                       for encoder in (loaded.encoder, untrained))
    mels = [[(kaldi_log_mel(wave) - values.mean()) / (2 * values.std()) for wave in part] for part in waves]
    kinds = {**{pool: [part[pool] for part in encoded] for pool in encoded[0]},
             **{f'random weights, {pool}': [part[pool] for part in random] for pool in random[0]},
             'log-mel statistics': [np.array([[*x.mean(axis=0), *x.std(axis=0)] for x in part]) for part in mels],
             'log-mel statistics, cepstra': [np.array([
                 [*x.mean(axis=0), *x.std(axis=0), *scipy.fft.dct(x, axis=1, norm='ortho')[:, :40].std(axis=0)]
                 for x in part]) for part in mels]}
    for kind, (x, t) in kinds.items():
        assert found[kind]['kNN']['right'] == right_by_knn(x, labels[0], t, labels[1]), kind
        scores = found[kind]['linear probe']
        assert scores['right'] == right_by_scikit_learn(x, labels[0], t, labels[1], scores['l2']), kind
        assert scores['clips'] == len(labels[1])
    assert found.keys() == kinds.keys()


def test_the_seed_of_the_probe_draws_its_labels(sets, pretrained):
    outputs = {seed: call(evaluation.run, f'--ckpt={pretrained}', '--dataset=noises', f'--data_dir={sets.root}',
                          '--labels_per_class=2', f'--seed={seed}').out for seed in (1, 2)}
    assert len(set(outputs.values())) == 2
    keys = {tuple(task_splits('noises', sets.root, labels_per_class=2, seed=seed)[0].keys()) for seed in (1, 2)}
    assert len(keys) == 2


def test_the_monitor_uses_the_statistics_of_its_own_set(sets, monkeypatch):
    """Reference: kaldi.fbank normalised by the monitored set's training part; neighbours by a loop; the rank from the
    eigenvalues of the covariance."""
    torch.manual_seed(0)
    encoder = Encoder(ASDAConfig(n_layer=2, n_head=2, n_embd=32, frames=64, decoder_groups=4)).eval()
    train, valid = labelled_clips('noises', sets.root, 1, CPU)
    assert not set(train.keys()) & set(valid.keys())
    values = np.concatenate([kaldi_log_mel(sets.noises[key]) for key in train.keys()]).astype(np.float64)
    said, noted = [], {}
    run = types.SimpleNamespace(
        settings=types.SimpleNamespace(eval_dataset='noises', workers=0), done=0, process=CPU,
        model=types.SimpleNamespace(encoder=encoder), note=lambda scores, **logged: noted.update(logged))
    monkeypatch.setattr(processes.Process, 'print', lambda self, text: said.append(text))
    watch(run, (train, valid), {'frames': 64, 'window': 'hamming', 'repeat': False},
          processes.autocast(CPU, 'float32')[0])
    found, encoded = noted, []
    mels = []
    for part in (train, valid):
        mels.append([(kaldi_log_mel(sets.noises[key]) - values.mean()) / (2 * values.std()) for key in part.keys()])
        encoded.append(reference_features(encoder, [sets.noises[key] for key in part.keys()], values.mean(),
                                          values.std()))
    for pool in ('cls', 'bands'):
        right = right_by_knn(encoded[0][pool], train.label, encoded[1][pool], valid.label)
        assert found[{'cls': 'knn_cls', 'bands': 'knn'}[pool]] == pytest.approx(right / len(valid))
    right = right_by_scikit_learn(encoded[0]['bands'], train.label, encoded[1]['bands'], valid.label, 0.1)
    assert found['probe'] == pytest.approx(right / len(valid))
    x, t = (np.array([[*mel.mean(axis=0), *mel.std(axis=0)] for mel in part]) for part in mels)
    assert found['noises_log_mel_knn'] == pytest.approx(right_by_knn(x, train.label, t, valid.label) / len(valid))
    assert len(said) == 2 and 'log-mel' in said[0] and 'step 0' in said[1]
    run.done = 5
    watch(run, (train, valid), {'frames': 64, 'window': 'hamming', 'repeat': False},
          processes.autocast(CPU, 'float32')[0])
    assert len(said) == 3                                                   # the baseline does not change
    assert found['chance'] == pytest.approx(np.bincount(valid.label).max() / len(valid))
    assert found['effective_rank'] == pytest.approx(rank_by_eigenvalues(encoded[1]['cls']), rel=1e-2)


def rank_by_eigenvalues(x):
    values = np.sqrt(np.clip(np.linalg.eigvalsh(np.cov(x.astype(np.float64), rowvar=False)), 0, None))
    shares = values[values > 1e-7 * values.max()] / values.sum()
    return np.prod(shares ** -shares)


def test_effective_rank_of_known_spectra():
    """Reference: exp of the entropy of the shares of singular values that the matrix was made of."""
    rng = np.random.default_rng(0)
    left = np.linalg.qr(np.c_[np.ones(60), rng.standard_normal((60, 6))])[0][:, 1:]         # centred columns
    right = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    for values in ([1, 1, 1, 1, 1, 1], [8, 4, 2, 1, 1e-3, 1e-3], [1, 0.5, 0, 0, 0, 0]):
        x = (left * np.array(values)) @ right + 3.0
        shares = np.array([value for value in values if value]) / sum(values)
        assert effective_rank(x) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
        assert effective_rank(x) == pytest.approx(rank_by_eigenvalues(x), rel=1e-4)


def test_ties_of_neighbours_go_to_the_closer_ones():
    """Reference: a loop that sorts; angles at which two classes have five votes each."""
    angles = np.deg2rad([*range(2, 12, 2), *range(-3, -13, -2), 90, 100, -90, -100])
    train = np.c_[np.cos(angles), np.sin(angles)].astype(np.float32) * np.linspace(0.1, 30, 14)[:, None]
    labels = np.array([0] * 5 + [1] * 5 + [2, 2, 2, 2])
    tests = np.deg2rad([0.0, 2.0, -2.0, 5.0, -5.0, 60.0, -120.0, 85.0])
    test = np.c_[np.cos(tests), np.sin(tests)].astype(np.float32)
    guesses = knn_scores(train, labels, test, 3).argmax(axis=1)
    assert guesses[:3].tolist() == [0, 0, 1]
    nearly = np.r_[angles[:10] / 50, angles[10:]]                           # votes alike, sums that differ by 1e-4
    train_nearly = np.c_[np.cos(nearly), np.sin(nearly)].astype(np.float32)
    assert knn_scores(train_nearly, labels, test[1:3], 3).argmax(axis=1).tolist() == [0, 1]
    assert knn_scores(train_nearly, 1 - labels.clip(max=1), test[1:3], 2).argmax(axis=1).tolist() == [1, 0]
    for k in (1, 3, 10):
        for row, label in zip(test, knn_scores(train, labels, test, 3, k).argmax(axis=1)):
            assert right_by_knn(train, labels, row[None], [label], k, standardise=False) == 1
    wanted = np.array([0, 1, 1])
    assert knn_accuracy(train, labels, test[:3], wanted) == right_by_knn(train, labels, test[:3], wanted) / 3


def test_the_probe_knows_nothing_of_the_test_clips():
    """Reference: scikit-learn, on a test part that prefers another strength and varies less; fewer test clips score
    alike."""
    rng, centres = np.random.default_rng(0), np.random.default_rng(6).standard_normal((3, 20))
    labels = [rng.integers(3, size=n) for n in (60, 150)]
    x, t = ((centres[label] + spread * rng.standard_normal((len(label), 20))) * np.logspace(-2, 2, 20) + 5
            for label, spread in zip(labels, (2.0, 0.7)))
    x, t, targets = x.astype(np.float32), t.astype(np.float32), np.eye(3)[labels[0]]
    logits, strength = linear_probe((x, targets), t, False)
    right = {s: right_by_scikit_learn(x, labels[0], t, labels[1], s) for s in PROBE_L2}
    assert int((logits.argmax(axis=1) == labels[1]).sum()) == right[strength] != max(right.values())
    few, _ = linear_probe((x, targets), t[:9], False)
    np.testing.assert_allclose(few, logits[:9], rtol=1e-6)                  # a clip's score is its own


def test_the_probe_of_several_labels_a_clip():
    """Reference: a regression of scikit-learn for every class, the strength by the mean loss of held-out fifths."""
    rng, weight = np.random.default_rng(8), np.random.default_rng(9).standard_normal((12, 4))
    x, t = (rng.standard_normal((n, 12)).astype(np.float32) for n in (80, 60))
    targets = (x @ weight + 2 * rng.standard_normal((80, 4)) > 0.8).astype(np.float32)
    first = targets.argmax(axis=1)                                          # of a clip's labels; 0 if it has none
    part = np.empty(80, int)
    for label in range(4):
        part[first == label] = (np.arange((first == label).sum()) + (first < label).sum()) % 5

    def fitted(x, targets, strength, others):
        mean, std = x.mean(axis=0), x.std(axis=0)
        fits = [LogisticRegression(C=1 / (strength * len(x)), tol=1e-8, max_iter=5000).fit((x - mean) / std, of_class)
                for of_class in targets.T]
        return np.stack([fit.decision_function((others - mean) / std) for fit in fits], axis=1)

    def loss(k, strength):
        logits, wanted = fitted(x[part != k], targets[part != k], strength, x[part == k]), targets[part == k]
        return (np.log1p(np.exp(logits)) - wanted * logits).mean()
    losses = {strength: sum(loss(k, strength) for k in range(5)) for strength in PROBE_L2}
    got, strength = linear_probe((x, targets), t, True)
    assert strength == min(losses, key=losses.get) and strength not in (PROBE_L2[0], PROBE_L2[-1])
    np.testing.assert_allclose(got, fitted(x, targets, strength, t), atol=1e-2)


def test_the_baseline_is_over_a_clips_real_frames(sets):
    """Reference: kaldi.fbank, mean and standard deviation of every band by numpy; a clip longer than the input too."""
    clips = open_clips(['noises', 'whispers'], sets.root)
    waves = [{**sets.noises, **sets.whispers}[key] for key in clips.keys()]
    got = log_mel_statistics(clips, {'frames': 64, 'window': 'hanning', 'mean': -7.0, 'std': 2.0, 'repeat': False},
                             CPU, batch_size=7)
    for row, wave in zip(got, waves):
        x = (kaldi_log_mel(wave[:10480], 'hanning') + 7.0) / 4.0
        np.testing.assert_allclose(row, [*x.mean(axis=0), *x.std(axis=0)], atol=2e-3)
    assert len(got) == len(clips) and {len(wave) > 10480 for wave in waves} == {True, False}


# ------------------------------------------------------------------------------------------ scores, windows, embeddings

def test_embeddings_are_means_over_sound_not_over_padding(sets, pretrained, tmp_path):
    """Reference: kaldi.fbank normalised by the checkpoint's statistics, or by --norm_mean and --norm_std, and the
    encoder block by block, clip by clip, frame by frame."""
    loaded = open_checkpoint(pretrained)
    loaded.encoder.eval()
    values = training_values(sets, 'whispers')
    for options, (mean, std) in (([], (values.mean(), values.std())),
                                 (['--norm_mean=-6.5', '--norm_std=3.5'], (-6.5, 3.5))):
        made = call(evaluation.run, f'--ckpt={pretrained}', '--dataset=noises', f'--data_dir={sets.root}',
                    f'--embed={tmp_path}/x.npz', '--batch_size=13', '--dtype=float32', '--pool=bands,cls,mean,cepstra',
                    *options)
        assert made.code == 0, made.err
        with np.load(tmp_path / 'x.npz') as stored:
            waves = [sets.noises[key] for key in stored['names']]
            assert sorted(stored['names']) == sorted(sets.noises) and not stored['start'].any()
            for pool, want in reference_features(loaded.encoder, waves, mean, std).items():
                np.testing.assert_allclose(stored[pool], want, atol=2e-3)
            assert [str(stored['classes'][label]) for label in stored['labels']] == [
                str(key)[0] for key in stored['names']]
    clips = open_clips(['noises'], sets.root)
    waves = [sets.noises[key] for key in clips.keys()]
    spectrum = {'frames': 64, 'window': 'hamming', 'mean': -6.5, 'std': 3.5, 'repeat': False}
    for pool, want in reference_features(loaded.encoder, waves, -6.5, 3.5).items():
        got = features(loaded.encoder, clips, spectrum, CPU, torch.no_grad, pool, batch_size=11)
        np.testing.assert_allclose(got, want, atol=2e-3)


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


def test_probabilities_of_windows_and_their_mean(sets, tuned, tmp_path):
    """Reference: windows cut by slicing, kaldi.fbank, the classifier one window at a time, softmax and mean by numpy;
    with the statistics of the fine-tuning set, or given ones."""
    rng = np.random.default_rng(11)
    wave = np.concatenate([noise(rng, 2, 9600, 4000), 8000 * np.sin(np.arange(9600) / 3), noise(rng, 0, 9600, 40)])
    wave = wave.astype(np.int16)
    soundfile.write(tmp_path / 'long.wav', wave, 16000)
    classifier = open_checkpoint(tuned).classifier.eval()
    values = training_values(sets, 'noises')
    for options, (mean, std) in (([], (values.mean(), values.std())),
                                 (['--norm_mean=-9.5', '--norm_std=1.5'], (-9.5, 1.5))):
        made = call(evaluation.run, f'--ckpt={tuned}', f'--wav={tmp_path}/long.wav', '--window=0.655', '--hop=0.25',
                    f'--csv_file={tmp_path}/windows.csv', '--dtype=float32', *options)
        assert made.code == 0, made.err
        with open(tmp_path / 'windows.csv', newline='') as f:
            rows = list(csv.DictReader(f))
        want = []
        for row in rows:
            start = round(float(row['start']) * 16000)
            with torch.no_grad():
                spec = network_input(wave[start:start + 10480], 64, 'hamming', mean, std)
                want.append(softmax(classifier(spec[None])[0].double().numpy()))
            assert [float(row[name]) for name in 'xyz'] == pytest.approx(want[-1].tolist(), abs=2e-3)
        assert len(rows) == 1 + np.ceil((28800 - 10480 - 2560) / 4000)
        means = np.mean(want, axis=0)
        assert np.ptp(np.array(want), axis=0).max() > 0.05                  # the windows differ
        line = made.out.splitlines()[0].split(':  ')[1].split(', ')
        assert [word.split()[0] for word in line] == ['xyz'[c] for c in np.argsort(-means)]
        assert [float(word.split()[1]) for word in line] == pytest.approx(sorted(means, reverse=True), abs=2e-3)


def test_the_score_of_a_finetuned_checkpoint_is_that_of_its_test_split(sets, tuned, tmp_path):
    """Reference: kaldi.fbank, the classifier one clip at a time, counting."""
    classifier, test = open_checkpoint(tuned).classifier.eval(), open_clips(['noises'], sets.root, ['test'])
    for options, (mean, std) in (([], open_clips(['noises'], sets.root).statistics('hamming')),
                                 (['--norm_mean=-9.5', '--norm_std=1.5'], (-9.5, 1.5))):
        made = call(evaluation.run, f'--ckpt={tuned}', f'--data_dir={sets.root}', f'--csv_file={tmp_path}/classes.csv',
                    '--dtype=float32', '--batch_size=7', *options)
        assert made.code == 0, made.err
        right = {name: [] for name in 'xyz'}
        for key in test.keys():
            with torch.no_grad():
                spec = network_input(sets.noises[key], 64, 'hamming', mean, std)
                right[key[0]].append('xyz'[int(classifier(spec[None])[0].argmax())] == key[0])
        with open(tmp_path / 'classes.csv', newline='') as f:
            for row in csv.DictReader(f):
                own = right[row['class']]
                assert int(row['clips']) == len(own) and float(row['accuracy']) == pytest.approx(np.mean(own), abs=1e-6)
        total = sum(map(sum, right.values()))
        assert f'accuracy {100 * total / len(test):.1f}% ({total} of {len(test)})' in made.out


def test_means_of_windows_and_probabilities():
    """Reference: loops in numpy."""
    rng = np.random.default_rng(0)
    clip = np.repeat(np.arange(6), [1, 4, 2, 1, 1, 7])
    values = rng.standard_normal((16, 3)).astype(np.float32)
    want = [np.mean([value for value, c in zip(values, clip) if c == k], axis=0) for k in range(6)]
    np.testing.assert_allclose(evaluation.mean_of_windows(values, clip), want, rtol=1e-5)
    exact = values.astype(float)
    np.testing.assert_allclose(evaluation.probabilities(values, False), softmax(exact), rtol=1e-5)
    np.testing.assert_allclose(evaluation.probabilities(values, True), 1 / (1 + np.exp(-exact)), rtol=1e-5)


def test_scores_are_described_in_their_units():
    assert describe({'accuracy': 0.8125, 'right': 1300, 'clips': 1600}) == 'accuracy 81.2% (1,300 of 1,600)'
    assert describe({'mAP': 0.41502, 'mAUC': 0.97249, 'd_prime': 2.71349, 'classes': 527, 'clips': 20550}) == (
        'mAP 0.4150, mAUC 0.9725, d-prime 2.713 (527 classes, 20,550 clips)')


# ---------------------------------------------------------------------------------------------------- the results table

def test_the_table_takes_what_validation_prefers(monkeypatch):
    """Reference: a table of made-up scores in which the best by validation, the last and the best by test differ."""
    asked = []

    def made_up(settings, task, arm, lr, multiple, seed):
        asked.append((lr, multiple, seed))
        valid = {('a', 1): 0.5, ('b', 1): 0.8, ('c', 1): 0.7, ('b', 2): 0.6, ('b', 3): 0.9, ('b', 4): 0.85}
        return valid[lr, multiple], {'test': (lr, multiple, seed)}
    monkeypatch.setattr(results, 'finetune', made_up)
    monkeypatch.setattr(results, 'LEARNING_RATES', ('a', 'b', 'c'))
    monkeypatch.setattr(results, 'LENGTHS', (1, 2, 3, 4))
    settings, pool = types.SimpleNamespace(seeds=3), types.SimpleNamespace(map=lambda f, xs: [f(x) for x in xs])
    assert results.tuned(settings, 'one', 'arm', pool) == [{'test': ('b', 3, seed)} for seed in (1, 2, 3)]
    assert {(lr, multiple) for lr, multiple, seed in asked if seed > 1} == {('b', 3)}
    monkeypatch.setattr(results, 'LENGTHS', (1,))
    assert results.tuned(settings, 'one', 'arm', pool) == [{'test': ('b', 1, seed)} for seed in (1, 2, 3)]


def test_a_finished_run_is_read_from_its_log():
    """The best validation accuracy, and the test scores of that checkpoint, not of the last."""
    lines = [{'start': 0}, {'valid': {'accuracy': 0.4}}, {'valid': {'accuracy': 0.75}}, {'valid': {'accuracy': 0.7}},
             {'step': 9, 'test': {'last': {'accuracy': 0.9}, 'best': {'accuracy': 0.6}}}]
    assert results.finished(lines) == (0.75, {'accuracy': 0.6}) and results.finished(lines[:-1]) is None
    scores = [{'accuracy': 0.8125, 'right': 65, 'clips': 80}, {'accuracy': 0.7875, 'right': 63, 'clips': 80}]
    spread = np.std([81.25, 78.75], ddof=1)
    assert results.cell(scores) == f'80.0 ± {spread:.1f} % (65 / 63 of 80)'
