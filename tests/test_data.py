"""Spectrograms against torchaudio, masks against a loop, order and augmentation.
   python -m pytest tests/test_data.py"""
import io
import json
import os
import pickle
import shutil
import tarfile
import time
import zipfile

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from torchaudio.compliance import kaldi

import data
import eval as evaluation
import finetune
import prepare
import pretrain
from audio import WINDOWS, frames_in, samples_for
from audio import clips as clips_file
from audio.clips import Clips, carve_validation, open_clips, sampling_weights, task_splits
from engine.errors import ConfigError, DataError
from engine.randomness import STREAMS, random
from fast import spectrogram
from model import ASDAConfig

from .conftest import SHARED, call, is_one_line_error, needs_shared


def reference_fbank(wave, window):
    return kaldi.fbank(wave[None], htk_compat=True, sample_frequency=16000, use_energy=False, window_type=window,
                       num_mel_bins=128, dither=0.0, frame_shift=10)


def check_batch(waves, window):
    lengths = torch.tensor([len(wave) for wave in waves])
    batch = torch.zeros(len(waves), int(lengths.max()))
    for row, wave in zip(batch, waves):
        row[:len(wave)] = wave
    plain, fast = data.fbank(batch, lengths, window), spectrogram.fbank(batch, lengths, window)
    for result in (plain, fast):
        assert result.shape == (len(waves), frames_in(int(lengths.max())), 128)
        for row, wave in zip(result, waves):
            want = reference_fbank(wave, window)
            assert (row[:len(want)] - want).abs().max() < 1e-3
            assert not row[len(want):].any()                                # padding is 0 in the log-mel domain
    assert (plain - fast).abs().max() < 1e-3 and (plain - fast).abs().mean() < 1e-6
    for wave in waves:                                                      # alone: the very bits
        assert torch.equal(data.fbank(wave[None], torch.tensor([len(wave)]), window)[0], reference_fbank(wave, window))


@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize('rate', [8000, 11025, 16000, 22050, 44100, 48000])
def test_fbank_equals_kaldi_on_a_padded_batch(window, rate):
    rng = np.random.default_rng(rate)
    waves = []
    for seconds in (0.03, 0.5, 1.3):
        t = np.arange(int(rate * seconds)) / rate
        wave = 0.3 * np.sin(2 * np.pi * 440 * t) + 0.1 * rng.standard_normal(len(t)) * (t > 0.2) + 0.05
        waves.append(torchaudio.functional.resample(torch.tensor(wave, dtype=torch.float32), rate, 16000))
    check_batch([wave for wave in waves if len(wave) >= 400] + [torch.zeros(1000)], window)


@needs_shared
@pytest.mark.parametrize('window', WINDOWS)
def test_fbank_equals_kaldi_on_real_clips_of_every_rate(window):
    files = []
    with zipfile.ZipFile(os.path.join(SHARED, 'audio', 'free-spoken-digit-dataset-master.zip')) as archive:
        files += [archive.read(name) for name in sorted(archive.namelist())[5:3000:300]]
    for name, step in (('esc10.tar', 60), ('wakewords.tar', 300)):
        with tarfile.open(os.path.join(SHARED, 'audio', name)) as archive:
            members = [member for member in archive.getmembers() if member.name.endswith('.ogg')]
            files += [archive.extractfile(member).read() for member in members[::step]]
    waves, rates = [], set()
    for content in files:
        wave, rate = soundfile.read(io.BytesIO(content), dtype='float32')
        rates.add(rate)
        wave = torchaudio.functional.resample(torch.from_numpy(wave), rate, 16000)
        waves.append(wave - wave.mean())
    assert rates == {8000, 16000, 44100}
    check_batch(waves, window)


def test_log_mel_pads_cuts_and_normalises():
    rng = np.random.default_rng(0)
    pcm = torch.zeros(2, 8000, dtype=torch.int16)
    pcm[0] = torch.from_numpy((rng.standard_normal(8000) * 3000 + 500).astype(np.int16))
    pcm[1, :3000] = pcm[0, :3000]
    lengths = torch.tensor([8000, 3000])
    for frames in (16, 64):
        x = data.log_mel(pcm, lengths, frames, 'hamming', -4.0, 2.0)
        assert x.shape == (2, frames, 128)
        for row, length in zip(range(2), lengths):
            wave = pcm[row, :length].float() / 32768
            want = (reference_fbank(wave - wave.mean(), 'hamming')[:frames] + 4.0) / 4.0
            torch.testing.assert_close(x[row, :len(want)], want, atol=1e-3, rtol=0)
            assert torch.equal(x[row, len(want):], torch.full((frames - len(want), 128), 1.0))      # (0 + 4) / 4
    quiet = data.log_mel(pcm, lengths, 16, 'hamming', 0.0, 0.5)
    louder = data.log_mel(pcm, lengths, 16, 'hamming', 0.0, 0.5, gain=torch.tensor([2.0, 2.0]))
    heard = quiet > -15                                             # the lowest bands hold no FFT bin: always the floor
    assert heard.float().mean() > 0.95
    torch.testing.assert_close(louder[heard], quiet[heard] + 2 * np.log(2), atol=2e-3, rtol=0)


def test_log_mel_takes_the_fast_form(monkeypatch):
    """What is trained on does not change with it: the same numbers as data.fbank's to rounding."""
    pcm = torch.randint(-3000, 3000, (2, 6000), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    arguments = pcm, torch.tensor([6000, 4000]), 32, 'hamming', -4.0, 2.0
    fast, asked = data.log_mel(*arguments), []
    monkeypatch.setattr(spectrogram, 'fbank', lambda *a: asked.append(a) or data.fbank(*a))
    torch.testing.assert_close(data.log_mel(*arguments), fast, atol=1e-5, rtol=0)
    assert len(asked) == 1


def test_a_clip_of_one_window_or_of_silence():
    x = data.log_mel(torch.zeros(1, 400, dtype=torch.int16), torch.tensor([400]), 16, 'hanning', 0.0, 0.5)
    assert torch.isfinite(x).all() and float(x[0, 0, 0]) == pytest.approx(np.log(torch.finfo(torch.float32).eps))


@pytest.mark.parametrize('samples', [1, 399])
def test_a_clip_shorter_than_a_window_has_no_frame(samples):
    """Nor has it when its row is no longer than it: all is padding, (0 - mean) / (2 std)."""
    pcm = torch.full((2, samples), 1000, dtype=torch.int16)
    x = data.log_mel(pcm, torch.tensor([samples, 1]), 16, 'hamming', -4.0, 2.0)
    assert torch.equal(x, torch.full((2, 16, 128), 1.0))


# ---------------------------------------------------------------------------------------------------------------- masks

def masks(grid, n_students=16, batch=4, ratio=0.8, block=5, seed=0, adjust=0.07):
    return data.block_masks(batch, n_students, grid, ratio, block, torch.Generator().manual_seed(seed), adjust)


@pytest.mark.parametrize('grid, kept', [((64, 8), 102), ((63, 8), 100), ((40, 8), 63), ((8, 8), 12)])
def test_exact_count_in_every_view(grid, kept):
    mask = masks(grid)
    assert mask.shape == (4, 16, grid[0] * grid[1]) and mask.dtype == torch.bool
    assert ((~mask).sum(-1) == kept).all()


def test_the_extra_share_of_blocks_is_the_models_default():
    plain = data.block_masks(4, 16, (63, 8), 0.8, 5, torch.Generator().manual_seed(0))
    assert torch.equal(plain, masks((63, 8), adjust=ASDAConfig().mask_adjust))
    assert not torch.equal(plain, masks((63, 8), adjust=ASDAConfig().mask_adjust + 0.1))


def test_views_differ_and_a_seed_repeats():
    mask = masks((63, 8))
    assert len({tuple(view.tolist()) for view in mask.flatten(0, 1)}) == 64
    assert torch.equal(mask, masks((63, 8))) and not torch.equal(mask, masks((63, 8), seed=1))


@pytest.mark.parametrize('grid, block, ratio', [((63, 8), 5, 0.8), ((8, 8), 3, 0.8), ((8, 8), 2, 0.8),
                                                ((32, 8), 4, 0.6), ((20, 8), 5, 0.5)])
def test_block_structure_equals_a_loop(grid, block, ratio):
    """The same draws, block by block: what is kept lies inside the blocks, or the blocks lie inside it."""
    rows, columns = grid
    n_blocks = int(rows * columns * (1 - ratio + 0.07) / block ** 2)
    centres = torch.randint(rows * columns, (64, n_blocks), generator=torch.Generator().manual_seed(3))
    mask = masks(grid, ratio=ratio, block=block, seed=3)
    fuller = thinner = 0
    for view, kept in zip(centres.tolist(), ~mask.flatten(0, 1)):
        inside = torch.zeros(rows, columns, dtype=torch.bool)
        for centre in view:
            for i in range(block):
                for j in range(block):
                    row = min(max(centre // columns + i - block // 2, 0), rows - 1)
                    column = min(max(centre % columns + j - block // 2, 0), columns - 1)
                    inside[row, column] = True
        inside = inside.flatten()
        if inside.sum() >= kept.sum():
            thinner += 1
            assert not (kept & ~inside).any()
        else:
            fuller += 1
            assert not (inside & ~kept).any()
    assert thinner + fuller == 64


def test_masks_of_a_base_batch_take_less_than_50_ms_on_one_core():
    torch.set_num_threads(1)
    generator, times = torch.Generator().manual_seed(0), []
    for _ in range(5):
        began = time.process_time()                                         # whatever else the machine has to do
        data.block_masks(48, 16, (63, 8), 0.8, 5, generator)
        times.append(time.process_time() - began)
    assert min(times) < 0.05, times


# ------------------------------------------------------------------------------------------------------------ the clips

def test_order_is_a_permutation_per_epoch_from_any_start():
    order = [data.Order(7, seed=1).at(position) for position in range(21)]
    assert [sorted(order[i:i + 7]) for i in (0, 7, 14)] == [list(range(7))] * 3
    assert order[:7] != order[7:14] and order != [data.Order(7, seed=2).at(position) for position in range(21)]


def test_an_epoch_of_a_weighted_order_is_at_most_all_clips_with_a_weight():
    """Small weights too: those of classes with more than 1,000 clips are below 1."""
    order = data.Order(5, 1, np.array([0.5, 0.0, 1e-3, 2.0, 1.0]), 10)
    epochs = [[order.at(4 * epoch + place) for place in range(4)] for epoch in range(20)]
    assert all(sorted(epoch) == [0, 2, 3, 4] for epoch in epochs) and len(set(map(tuple, epochs))) > 5
    fewer = data.Order(5, 1, np.array([0.5, 0.0, 1e-3, 2.0, 1.0]), 3)
    assert all(len({fewer.at(3 * epoch + place) for place in range(3)}) == 3 for epoch in range(20))


def test_batches_do_not_depend_on_the_number_of_processes_or_workers(data_dir):
    clips = open_clips(['noises', 'demo'], data_dir)
    assert clips.length.max() > samples_for(64)                        # so that there are crops
    whole = data.PretrainBatches(clips, 64, 8, range(8), seed=3)
    halves = [data.PretrainBatches(clips, 64, 8, places, seed=3) for places in (range(4), range(4, 8))]
    for step in (0, 5, 60):
        assert torch.equal(whole[step]['pcm'], torch.cat([half[step]['pcm'] for half in halves]))
    from_workers = list(data.loader(whole, range(3, 6), workers=2))
    assert all(torch.equal(batch['pcm'], whole[step]['pcm']) for step, batch in zip(range(3, 6), from_workers))


def finetune_batches(clips, places, **options):
    return data.FinetuneBatches(clips, 64, 8, places, seed=3, n_layer=2, roll=True, noise=True, mask_ratio=0.3,
                                mixup=0.5, **options)


def test_augmented_batches_do_not_depend_on_the_number_of_processes(data_dir):
    clips = open_clips(['noises'], data_dir)
    whole = finetune_batches(clips, data.mirrored_places(8, 0, 1))
    for step in range(4):
        batch = whole[step]
        spec, labels = data.augment(data.log_mel(batch['pcm'], batch['lengths'], 64, 'hamming', -4, 4, batch['gain']),
                                    batch)
        for part in range(2):
            places = data.mirrored_places(8, part, 2)
            one = finetune_batches(clips, places)[step]
            assert one['label_sum'] == batch['label_sum'] and one['mix'] == batch['mix']
            spec1, labels1 = data.augment(data.log_mel(one['pcm'], one['lengths'], 64, 'hamming', -4, 4, one['gain']),
                                          one)
            assert torch.equal(spec1, spec[places]) and torch.equal(labels1, labels[places])


def test_mirrored_places_share_the_batch_and_hold_their_partners():
    for parts in (1, 2, 4):
        shares = [data.mirrored_places(16, part, parts) for part in range(parts)]
        assert sorted(sum(shares, [])) == list(range(16))
        for share in shares:
            assert [15 - place for place in share] == share[::-1]


def plain_draws(n, frames, **changes):
    batch = {'mix': torch.tensor(1.0), 'labels': torch.eye(n), 'bands': torch.zeros(n, 2, dtype=torch.int64),
             'times': torch.zeros(n, 2, dtype=torch.int64), 'noise': torch.zeros(n), 'noise_seed': torch.arange(n),
             'shift': torch.zeros(n, dtype=torch.int64)}
    return {**batch, **changes}


def test_augmentations_one_by_one():
    x = torch.randn(3, 32, 128)
    same, labels = data.augment(x, plain_draws(3, 32))
    assert torch.equal(same, x) and torch.equal(labels, torch.eye(3))
    masked, _ = data.augment(x, plain_draws(3, 32, bands=torch.tensor([[0, 5], [7, 7], [100, 128]]),
                                            times=torch.tensor([[2, 4], [0, 0], [31, 32]])))
    want = x.clone()
    want[0, :, :5] = want[0, 2:4] = want[2, :, 100:] = want[2, 31:] = 0
    assert torch.equal(masked, want)
    mixed, labels = data.augment(x, plain_draws(3, 32, mix=torch.tensor(0.25)))
    torch.testing.assert_close(mixed[0], 0.25 * x[0] + 0.75 * x[2])
    torch.testing.assert_close(labels[0], torch.tensor([0.25, 0.0, 0.75]))
    noisy, _ = data.augment(x, plain_draws(3, 32, noise=torch.tensor([0.1, 0.1, 0.1]), shift=torch.tensor([3, 0, -10])))
    added = noisy[0] - x[0].roll(3, 0)
    assert 0 <= added.min() and added.max() <= 0.1 + 1e-6 and added.std() > 0.02
    assert (noisy[2] - x[2].roll(-10, 0)).abs().max() <= 0.1 + 1e-6


def test_without_settings_nothing_is_augmented(data_dir):
    clips = open_clips(['noises'], data_dir)
    batches = data.FinetuneBatches(clips, 64, 8, range(8), 1, n_layer=2)
    batch, order = batches[0], data.Order(len(clips), 1)
    plain = data.stack([clips.read(order.at(place), count=batches.samples) for place in range(8)], batches.samples)
    assert torch.equal(batch['pcm'], plain['pcm']) and batch['mix'] == 1 and 'noise_seed' not in batch
    assert (batch['gain'] == 1).all() and not batch['noise'].any() and not batch['shift'].any()
    assert all((start == stop).all() for start, stop in (batch['bands'].T, batch['times'].T))
    assert batches.mixup_probability == finetune.mixup_probability
    one = data.FinetuneBatches(clips, 64, 8, [3], 1, n_layer=2)[0]          # a place alone is itself
    assert all(torch.equal(value, batch[name][3:4]) for name, value in one.items() if value.ndim)


def test_evaluation_takes_each_clip_once_in_their_order(data_dir):
    clips = open_clips(['noises'], data_dir).select(np.arange(7))
    for size, sizes in ((3, [3, 3, 1]), (7, [7]), (8, [7])):
        batches = data.OrderedBatches(clips, 48, size)
        found = [batches[k] for k in range(len(batches))]
        assert [len(batch['pcm']) for batch in found] == sizes
        rows = zip(torch.cat([batch['pcm'] for batch in found]), torch.cat([batch['lengths'] for batch in found]))
        for i, (row, length) in enumerate(rows):
            assert row.shape == (47 * 160 + 400,) and np.array_equal(row[:length], clips.read(i)[:47 * 160 + 400])
            assert length == min(int(clips.length[i]), 47 * 160 + 400) and not row[length:].any()


def test_draws_have_the_stated_ranges(data_dir):
    batches = finetune_batches(open_clips(['noises'], data_dir), [0])
    draws = [batches.draw(np.random.default_rng(i)) for i in range(2000)]
    widths = np.array([[d['bands'][1] - d['bands'][0], d['times'][1] - d['times'][0]] for d in draws])
    assert widths.min(axis=0).tolist() == [0, 0] and widths.max() <= 0.3 * 128
    assert widths[:, 0].max() in (37, 38) and widths[:, 1].max() in (18, 19)    # floors of U[0, 38.4) and U[0, 19.2)
    assert abs(widths[:, 0].mean() - (0.3 * 64 - 0.5)) < 1
    assert min(d['bands'][0] for d in draws) == 0 and max(d['bands'][1] for d in draws) >= 126
    gains = [d['gain'] for d in draws]
    assert abs(np.mean(gains) - 1) < 0.02 and 0.5 < min(gains) and max(gains) < 1.5
    assert ({d['shift'] for d in draws} == set(range(-10, 10))
            and 0 <= min(d['noise'] for d in draws) and max(d['noise'] for d in draws) < 0.1)


def test_statistics_pool_the_real_frames_of_a_union(data_dir):
    clips = open_clips(['demo', 'noises'], data_dir)
    values = []
    for i in range(len(clips)):
        wave = torch.from_numpy(clips.read(i).astype(np.float32) / 32768)
        values.append(reference_fbank(wave - wave.mean(), 'hanning').flatten())
    values = torch.cat(values).double()
    mean, std = clips.statistics('hanning')
    assert abs(mean - float(values.mean())) < 1e-3 and abs(std - float(values.std(unbiased=False))) < 1e-3


def test_splits_are_disjoint_stable_and_counted(data_dir):
    train, valid, test, whole = task_splits('demo', data_dir, labels_per_class=3, seed=1)
    assert len(whole) == 160 and set(train.keys()) | set(valid.keys()) < set(whole.keys())
    assert np.bincount(train.label).tolist() == [3] * 10
    sets = [set(part.keys()) for part in (train, valid, test)]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    again, other = (task_splits('demo', data_dir, labels_per_class=3, seed=seed)[0] for seed in (1, 2))
    assert again.keys() == train.keys() != other.keys()
    assert set(task_splits('demo', data_dir, labels_per_class=3, seed=2)[1].keys()) == sets[1]
    assert (train.fingerprint() != other.fingerprint()
            == task_splits('demo', data_dir, labels_per_class=3, seed=2)[0].fingerprint())


# ------------------------------------------------------------------------------------------------------------ bad input

def rewrite_meta(folder, **changes):
    path = os.path.join(folder, 'meta.json')
    with open(path) as f:
        meta = json.load(f)
    with open(path, 'w') as f:
        json.dump({**meta, **changes}, f)


def rewrite_shard(folder, **changes):
    path = os.path.join(folder, 'train-00000.npz')
    with np.load(path) as stored:
        arrays = {**stored, **changes}
    np.savez(path, **arrays)


def damage(kind, folder):
    shard = os.path.join(folder, 'train-00000')
    if kind == 'no meta':
        os.remove(os.path.join(folder, 'meta.json'))
    elif kind == 'torn meta':
        with open(os.path.join(folder, 'meta.json'), 'w') as f:
            f.write('{"name": "noi')
    elif kind == 'old version':
        rewrite_meta(folder, version=0)
    elif kind == 'no classes':
        rewrite_meta(folder, classes=None)
    elif kind == 'fewer classes':
        rewrite_meta(folder, classes=['low'])
    elif kind == 'no pcm':
        os.remove(shard + '.pcm')
    elif kind == 'short pcm':
        os.truncate(shard + '.pcm', 1000)
    elif kind == 'torn npz':
        os.truncate(shard + '.npz', 300)
    elif kind == 'objects':
        rewrite_shard(folder, labels=np.array([{}], dtype=object))
    elif kind == 'negative offset':
        rewrite_shard(folder, offsets=np.array([-5] * 20))
    elif kind == 'text lengths':
        rewrite_shard(folder, lengths=np.array(['9'] * 20))
    elif kind == 'flat stats':
        rewrite_shard(folder, stats=np.zeros((20, 2)))
    elif kind == 'no dimension':
        rewrite_shard(folder, offsets=np.array(0))
    elif kind == 'nan stats':
        rewrite_shard(folder, stats=np.full((20, 2, 2), np.nan))
    elif kind == 'no shard':
        os.remove(shard + '.npz')
    elif kind == 'huge length':
        rewrite_shard(folder, lengths=np.array([2 ** 62] * 20))


@pytest.mark.parametrize('kind', ['no meta', 'torn meta', 'old version', 'no classes', 'fewer classes', 'no pcm',
                                  'short pcm', 'torn npz', 'objects', 'negative offset', 'huge length',
                                  'text lengths', 'flat stats', 'no dimension', 'nan stats', 'no shard'])
def test_a_damaged_set_is_named(data_dir, tmp_path, kind):
    shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'noises')
    damage(kind, str(tmp_path / 'noises'))
    with pytest.raises(DataError, match='noises'):
        open_clips(['noises'], str(tmp_path))


@pytest.mark.parametrize('options, message', [
    ({'names': []}, 'must name prepared sets'), ({'names': ['noises', 'noises']}, 'each once'),
    ({'names': ['absent']}, 'absent'),
    ({'names': ['noises'], 'splits': ['valid']}, 'noises has no split valid, only test, train'),
    ({'names': ['noises'], 'splits': []}, 'noises has no split'),
    ({'names': ['noises', 'demo'], 'splits': ['train', 'tset']}, 'none of noises, demo has tset, only test, train'),
    ({'names': ['noises'], 'splits': ['train', 'vaild', 'eval']}, 'has eval or vaild, only test, train'),
    ({'names': ['noises'], 'leave_out': ['noises/train']}, 'no clips left'),
    ({'names': ['noises'], 'leave_out': ['noises']}, 'leave_out'),
    ({'names': ['noises'], 'leave_out': ['demo/1']}, 'leave_out'),
    ({'names': ['noises'], 'leave_out': ['noises/9']}, "no fold or split '9'"),
    ({'names': ['noises'], 'only_fold': '3'}, "fold '3'")])
def test_wrong_selections_are_named(data_dir, options, message):
    with pytest.raises(DataError, match=message):
        open_clips(data_dir=data_dir, **options)


def test_a_set_that_has_none_of_the_splits_is_named_and_one_that_lacks_some_is_not(data_dir, tmp_path):
    shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'noises')
    shutil.copytree(os.path.join(data_dir, 'demo'), tmp_path / 'demo')
    rewrite_meta(tmp_path / 'noises', splits={'test': {}})
    both = open_clips(['demo', 'noises'], str(tmp_path), ['train', 'test'])
    assert len(both) == sum(len(open_clips([name], str(tmp_path), splits))
                            for name, splits in (('demo', ['train', 'test']), ('noises', ['test'])))
    with pytest.raises(DataError, match='noises has no split train, only test'):
        open_clips(['demo', 'noises'], str(tmp_path), ['train'])


def test_validation_and_test_of_sets_prepared_before_do_not_exclude_each_other():
    """They had a test part carved by hash % 10000, of which validation takes the last three digits."""
    hashes = np.random.default_rng(0).integers(2 ** 32, size=40000).astype(np.uint32)
    for test_part in (0, 0.2, 0.5, 0.91, 0.95, 0.99):
        kept = hashes[hashes % 10000 >= test_part * 10000]
        clips = Clips([], [], np.arange(len(kept)), hash=kept, label=np.arange(len(kept)) % 3)
        rest, valid = carve_validation(clips, 0.1)
        assert sorted([*rest.offset, *valid.offset]) == clips.offset.tolist()
        assert abs(len(valid) - len(kept) / 10) < 4 * np.sqrt(len(kept) * 0.09), test_part
        if test_part <= 0.5:
            assert set(valid.hash % 1000) == set(range(100))                # as runs that go on have it


def test_a_class_never_loses_its_last_training_clip_to_validation():
    hashes = np.array([5, 99, 7, 1500, 2, 150, 250, 350, 450], np.uint32)
    clips = Clips([], [], np.arange(9), hash=hashes, label=np.array([0, 0, 1, 1, 2, 3, 3, -1, -1]))
    rest, valid = carve_validation(clips, 0.1)
    assert valid.offset.tolist() == [0, 2] and rest.offset.tolist() == [1, 3, 4, 5, 6, 7, 8]
    for part, counts in ((0, (9, 0)), (1, (0, 9))):
        assert tuple(map(len, carve_validation(clips, part))) == counts
    bits = Clips([], [], np.arange(9), hash=hashes, label=np.zeros((9, 1), np.uint8))
    assert carve_validation(bits, 0.1)[1].offset.tolist() == [0, 1, 2, 4]   # several labels: by the hash alone


def test_clips_without_a_label_among_labelled_ones_are_no_class(data_dir, tmp_path):
    shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'noises')
    with np.load(tmp_path / 'noises' / 'train-00000.npz') as stored:
        labels = stored['labels'].copy()
    labels[[2, 5]] = -1
    rewrite_shard(tmp_path / 'noises', labels=labels)
    with pytest.raises(DataError, match='noises holds 2 clips without a label'):
        task_splits('noises', str(tmp_path))
    clips = open_clips(['noises'], str(tmp_path))                           # pre-training needs none
    for indices in ([2], [0, 5], slice(0, 3)):
        with pytest.raises(DataError, match='noises: clips without a label'):
            clips.targets(indices)
    assert clips.targets([0, 1]).tolist() == np.eye(2)[labels[:2]].tolist()
    with pytest.raises(DataError, match='without a label'):                 # nor have the classes of two sets an order
        open_clips(['noises', 'demo'], data_dir).targets([0])


def test_clips_are_selected_and_pickled_with_all_their_arrays(data_dir):
    clips = open_clips(['noises'], data_dir)
    chosen = pickle.loads(pickle.dumps(clips.select([5, 1])))
    assert chosen.keys() == [clips.keys()[5], clips.keys()[1]]
    for name in ('shard', 'row', 'offset', 'length', 'fold', 'hash', 'label', 'stats'):
        np.testing.assert_array_equal(getattr(chosen, name), getattr(clips, name)[[5, 1]])
    np.testing.assert_array_equal(chosen.read(0), clips.read(5))
    windows = chosen.windows(4000, 2000)
    assert windows.select(windows.clip == 1).start.tolist() == list(windows.start[windows.clip == 1])


@pytest.mark.parametrize('name, value', [('labels', np.zeros((4, 2), np.uint8)), ('labels', np.zeros((4, 1), np.int64)),
                                         ('labels', np.zeros(4, np.uint8)), ('hashes', np.zeros(4, np.int64)),
                                         ('stats', np.zeros((4, 2, 3))), ('folds', np.zeros(3, np.int16)),
                                         ('folds', np.zeros(4, np.int16)), ('lengths', np.full(4, 399)),
                                         ('offsets', np.array([0, 0, 0, 101])), ('offsets', np.array(0))])
def test_a_shard_is_checked_against_one_table(name, value):
    sound = {'offsets': np.zeros(4, np.int64), 'lengths': np.full(4, 400), 'labels': np.zeros((4, 1), np.uint8),
             'folds': np.full(4, -1, np.int16), 'hashes': np.zeros(4, np.uint32), 'stats': np.zeros((4, 2, 2))}

    def check(arrays):
        return clips_file.shard_is_sound({clips_file.STORED[name][0]: array for name, array in arrays.items()}, 500,
                                         {'classes': list('abc'), 'folds': [], 'multi_label': True})
    assert check(sound) and not check({**sound, name: value})


def test_seeds_of_more_bits_than_the_numbers_know_are_refused():
    """numpy cuts 2^32 into words 0 and 1, so that seed 2^32 would order clips as seed 0 crops; torch forgets the 1."""
    for seed in (0, 7, 2 ** 32 - 1):
        assert (random(seed, 'crop', 3, 5).integers(2 ** 60)
                == np.random.default_rng([seed, 1, 3, 5]).integers(2 ** 60))
    for seed in (2 ** 32, 2 ** 33 + 1, 2 ** 62, -1):
        with pytest.raises(ConfigError, match=f'seed = {seed} must be from 0 to 4294967295'):
            random(seed, 'order', 0)
    for run, first in ((prepare.run, ['demo']), (pretrain.run, []), (finetune.run, []), (evaluation.run, [])):
        result = call(run, *first, '--seed=4294967296')
        assert is_one_line_error(result, 'seed = 4294967296', '4.29497e+09'), result.err
    streams = [random(seed, stream, *where).integers(2 ** 60) for seed in (0, 1, 2 ** 32 - 1)
               for stream in STREAMS for where in ((1, 2), (2, 1), (3, 4))]
    assert len(set(streams)) == len(streams)


def test_silence_has_no_statistics(data_dir):
    clips = open_clips(['noises'], data_dir)
    values = frames_in(clips.length)[:, None] * 128.0
    clips.stats = np.stack([values * -15, values * 225], axis=2).repeat(2, axis=1)
    with pytest.raises(DataError, match='noises do not vary'):
        clips.statistics('hamming')


def test_too_few_labels_are_named(data_dir):
    with pytest.raises(DataError, match='labels_per_class = 500'):
        task_splits('demo', data_dir, labels_per_class=500)


# ---------------------------------------------------------------------------------------------------- weighted sampling

@pytest.mark.parametrize('count', [1, 2, 37, 1000])
def test_a_weighted_draw_holds_the_smallest_waiting_times(count):
    weights = np.random.default_rng(0).uniform(0, 2, 1000)
    drawn = data.weighted_draw(weights, count, np.random.default_rng(1))
    waiting = np.random.default_rng(1).standard_exponential(1000) / weights
    assert sorted(drawn) == sorted(np.argsort(waiting)[:count])


def test_weighted_draws_are_those_of_multinomial():
    """How often each set of three comes up agrees with torch.multinomial without replacement (chi-square)."""
    weights, n = np.array([8.0, 4.0, 2.0, 1.0, 0.5]), 20000
    ours = [tuple(sorted(data.weighted_draw(weights, 3, np.random.default_rng(i)))) for i in range(n)]
    torch.manual_seed(0)
    theirs = torch.multinomial(torch.tensor(weights).float().expand(n, 5), 3).sort(dim=1).values.tolist()
    counts = {chosen: [ours.count(chosen), [tuple(row) for row in theirs].count(chosen)] for chosen in set(ours)}
    assert len(counts) == 10
    chi_square = sum((a - b) ** 2 / (a + b) for a, b in counts.values())
    assert chi_square < 27.9                                                # 9 degrees of freedom, p = 0.001
    rare = {tuple(sorted(data.weighted_draw(np.array([1.0, 0, 1, 0, 1]), 3, np.random.default_rng(i))))
            for i in range(9)}
    assert rare == {(0, 2, 4)} and data.Order(5, 1, np.array([1.0, 0, 1, 0, 1]), 4).per_epoch == 3
    firsts = np.bincount([data.weighted_draw(weights, 3, np.random.default_rng(i))[0] for i in range(3000)])
    assert firsts[4] > 0.03 * 3000                                          # shuffled: the rare are not always last


def test_weighted_draws_of_audioset_take_little_time_and_memory():
    weights = np.random.default_rng(0).random(1_912_134, dtype=np.float32) + 1e-3
    order = data.Order(len(weights), 1, weights, 200_000)
    began = time.process_time()
    first = order.at(0)
    assert time.process_time() - began < 2
    drawn = order.drawn.copy()
    assert len(np.unique(drawn)) == 200_000 and order.drawn.nbytes < 2e6
    assert weights[drawn].mean() > weights.mean() * 1.2
    again = data.Order(len(weights), 1, weights, 200_000)
    assert [again.at(position) for position in (200_000, 0, 199_999)] == [order.at(200_000), first, int(drawn[-1])]


def test_sampling_weights_are_audiomaes_formula():
    labels = np.random.default_rng(0).random((40000, 12)) < np.linspace(0.001, 0.5, 12)
    clips = Clips([], [{'classes': list(range(12)), 'multi_label': True}], np.zeros(40000),
                  label=np.packbits(labels, axis=1))
    want = (labels * (1000 / (labels.sum(axis=0) + 0.01))).sum(axis=1)
    np.testing.assert_allclose(sampling_weights(clips), want, rtol=1e-5)
    one = Clips([], [{'classes': ['a', 'b', 'c'], 'multi_label': False}], np.zeros(6),
                label=np.array([0, 0, 0, 1, 1, 2]))
    np.testing.assert_allclose(sampling_weights(one), 1000 / (np.array([3, 3, 3, 2, 2, 1]) + 0.01), rtol=1e-6)


def test_every_process_takes_its_share_of_one_weighted_draw():
    """The clips of two processes are, place by place, those of one."""
    weights = np.linspace(1, 2, 50)
    clips = Clips([], [], np.arange(50))
    parts = [data.FinetuneBatches(clips, 64, 8, data.mirrored_places(8, rank, 2), 3, 1, weights=weights, epoch_clips=20)
             for rank in (0, 1)]
    whole = data.FinetuneBatches(clips, 64, 8, range(8), 3, 1, weights=weights, epoch_clips=20)
    chosen = [whole.order.at(position) for position in range(40)]
    assert len(set(chosen[:20])) == len(set(chosen[20:])) == 20 and chosen[:20] != chosen[20:]
    assert all([part.order.at(position) for position in range(40)] == chosen for part in parts)
