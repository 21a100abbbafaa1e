"""Metrics against scikit-learn, probes, and every mode of eval.py.   python -m pytest tests/test_eval.py"""
import csv
import functools
import json
import math
import os
import pickle
import shutil
import time
from statistics import NormalDist

import numpy as np
import pytest
import scipy.fft
import soundfile
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import data
import eval as evaluation
import finetune
from audio import HOP_SAMPLES, decoding, frames_in, samples_for
from audio.clips import Clips, open_clips, open_test
from audio.files import named_files
from checkpoints.opening import open_checkpoint
from engine import processes
from engine.errors import CheckpointError, ConfigError, DataError
from scoring import probes
from scoring.features import POOLS, features, log_mel_statistics, predict, real_frames, states, width
from scoring.metrics import NotFiniteError, describe, metrics, ranking_scores
from scoring.outputs import check_output, write_arrays
from scoring.probes import PROBE_L2, effective_rank, fit_logistic, knn_accuracy, knn_scores, linear_probe, standardised

from .conftest import ROOT, SHARED, bars_of, call, is_one_line_error, needs_shared, on_a_terminal, script, write_wav
from .test_finetune import pretrained, straight  # noqa: F401  (fixtures)
from .test_pretrain import log_of

FIXTURES = os.path.join(ROOT, 'tests', 'fixtures')
CPU = processes.Process(0, 1, torch.device('cpu'))


# -------------------------------------------------------------------------------------------------------------- metrics

@pytest.mark.parametrize('levels', [2, 5, 1000])
def test_ranking_scores_are_scikit_learns(levels):
    rng = np.random.default_rng(levels)
    for positives in (1, 3, 50, 200):
        labels = np.zeros(200, bool)
        labels[rng.permutation(200)[:positives]] = True
        scores = rng.integers(levels, size=200) / levels                    # few levels: many ties
        want = average_precision_score(labels, scores), roc_auc_score(labels, scores) if positives < 200 else np.nan
        assert ranking_scores(labels, scores) == pytest.approx(want, abs=1e-12, nan_ok=True)


def test_ranking_scores_of_audioset_take_no_time():
    """20,000 clips x 527 classes in under 2 s of one core, and the right mean."""
    rng = np.random.default_rng(0)
    labels, scores = rng.random((20000, 527)) < 0.004, rng.standard_normal((20000, 527)).astype(np.float32)
    scores += labels
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.process_time()
    result, rows = metrics(scores, labels, True)
    assert time.process_time() - began < 2
    torch.set_num_threads(threads)
    for c in (0, 100, 526):
        assert rows[c] == pytest.approx((labels[:, c].sum(), average_precision_score(labels[:, c], scores[:, c]),
                                         roc_auc_score(labels[:, c], scores[:, c])))
    assert result['mAUC'] == pytest.approx(np.mean([row[2] for row in rows]))


def test_map_leaves_out_classes_without_a_positive():
    rng = np.random.default_rng(0)
    labels, scores = rng.random((100, 6)) < 0.2, rng.standard_normal((100, 6))
    labels[:, 2] = False
    result, rows = metrics(scores, labels, True)
    want = np.mean([average_precision_score(labels[:, c], scores[:, c]) for c in (0, 1, 3, 4, 5)])
    assert result['mAP'] == pytest.approx(want) and result['classes'] == 5
    assert rows[2][0] == 0 and np.isnan(rows[2][1:]).all()
    area = np.mean([roc_auc_score(labels[:, c], scores[:, c]) for c in (0, 1, 3, 4, 5)])
    assert result['mAUC'] == pytest.approx(area)
    assert result['d_prime'] == pytest.approx(2 ** 0.5 * NormalDist().inv_cdf(area))


def test_d_prime_of_a_perfect_ranking_is_finite():
    """And of the worst: the quantile of 1 - 1e-9, and of 1e-9; of a half it is 0."""
    targets = np.eye(2)[[0, 1, 0, 1]]
    for logits, area in ((targets, 1 - 1e-9), (-targets, 1e-9), (np.ones((4, 2)), 0.5)):
        wanted = math.sqrt(2) * NormalDist().inv_cdf(area)
        assert metrics(logits, targets, True)[0]['d_prime'] == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_accuracy_counts():
    logits, labels = np.eye(4)[[0, 1, 2, 3, 3]], np.eye(4)[[0, 1, 2, 2, 3]]
    result, rows = metrics(logits, labels, False)
    assert (result['right'], result['clips'], result['accuracy']) == (4, 5, 0.8)
    assert rows == [(1, 1.0), (1, 1.0), (2, 0.5), (1, 1.0)]
    alone, other = metrics(logits[:1], labels[:1], False)[1][:2]            # all clips of one class, none of another
    assert alone == (1, 1.0) and other[0] == 0 and math.isnan(other[1])
    assert describe(result) == 'accuracy 80.0% (4 of 5)'


def table(path):
    with open(path, newline='', encoding='utf-8', errors='surrogateescape') as f:
        return list(csv.DictReader(f))


def blobs(seed, n=150, classes=4, d=10, spread=2.0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((classes, d)) * 1.2
    labels = rng.integers(classes, size=n)
    return (centres[labels] + spread * rng.standard_normal((n, d))).astype(np.float32), labels


def test_knn_is_scikit_learns_but_for_ties():
    (x, y), (t, z) = blobs(0), blobs(1)
    ours = knn_scores(x, y, t, 4)
    theirs = KNeighborsClassifier(10, metric='cosine').fit(x, y).predict_proba(t)
    np.testing.assert_allclose(np.floor(ours + 1e-3), theirs * 10, atol=1e-6)
    theirs = KNeighborsClassifier(10, metric='cosine').fit((x - x.mean(0)) / x.std(0), y)
    assert knn_accuracy(x, y, t, z) == pytest.approx(theirs.score((t - x.mean(0)) / x.std(0), z), abs=0.02)     # ties
    scaled = x * np.array([1000] + [1] * 9), t * np.array([1000] + [1] * 9)
    np.testing.assert_allclose(np.concatenate(standardised(*scaled)), np.concatenate(standardised(x, t)), atol=1e-3)
    assert knn_accuracy(x, y, x, y, k=1) == 1.0


@pytest.mark.parametrize('clips, width', [(300, 10), (40, 60)])
def test_neighbours_and_probe_work_in_blocks(monkeypatch, clips, width):
    """The same numbers as in one block; no similarity matrix and no copy of features in float64 is larger than one."""
    (x, y), (t, _) = blobs(0, clips, d=width), blobs(2, 500, d=width)
    want = knn_scores(x, y, t, 4), linear_probe((x, np.eye(4)[y]), t, False)
    sizes = []

    def seen(name, plain):
        def call_of(self, *args, **how):
            found = plain(self, *args, **how)
            if name == 'topk' or found.dtype is torch.float64 is not self.dtype:
                sizes.append(self.numel())
            return found
        monkeypatch.setattr(torch.Tensor, name, call_of)
    seen('topk', torch.Tensor.topk)
    seen('to', torch.Tensor.to)
    monkeypatch.setattr(probes, 'BLOCK', 1000)
    got = knn_scores(x, y, t, 4), linear_probe((x, np.eye(4)[y]), t, False)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-9)         # a product of fewer rows may add up otherwise
    np.testing.assert_allclose(got[1][0], want[1][0], atol=1e-5)
    assert got[1][1] == want[1][1] and 500 < max(sizes) <= 1000


def test_embeddings_are_written_a_batch_at_a_time(tmp_path):
    """Nothing is asked of the batches ahead; a failure on the way leaves the file that was there and nothing else."""
    (tmp_path / 'x.npz').write_bytes(b'before')
    asked = []

    def batches(fail):
        for k in range(4):
            asked.append(k)
            if fail and k == 2:
                raise NotFiniteError('x')
            yield np.arange(3) + 3 * k, {'bands': np.full((3, 5), float(k)), 'patches': np.full((3, 2, 2), k / 3)}
    shapes = {'bands': ((12, 5), np.float32), 'patches': ((12, 2, 2), np.float16)}
    with pytest.raises(NotFiniteError):
        write_arrays(f'{tmp_path}/x.npz', shapes, batches(True), {'names': np.array(['a'] * 12)}, True)
    assert os.listdir(tmp_path) == ['x.npz'] and (tmp_path / 'x.npz').read_bytes() == b'before' and asked == [0, 1, 2]
    write_arrays(f'{tmp_path}/x.npz', shapes, batches(False), {'names': np.array(['a'] * 12)}, True)
    assert os.listdir(tmp_path) == ['x.npz']
    with np.load(tmp_path / 'x.npz') as stored:
        assert stored['bands'].dtype == np.float32 and stored['patches'].dtype == np.float16
        np.testing.assert_array_equal(stored['bands'][:, 0], np.arange(12) // 3)
        assert stored['names'].shape == (12,)
    write_arrays(f'{tmp_path}/of_another_rank.npz', shapes, batches(False), {}, False)
    assert os.listdir(tmp_path) == ['x.npz']


def test_features_that_no_memory_holds_are_refused(pretrained, data_dir, monkeypatch):       # noqa: F811
    assert evaluation.MAX_FEATURE_BYTES == 16 * 2 ** 30
    size = 512 * 4 * len(open_clips(['demo'], data_dir, ['train', 'test']))          # of all clips, and one byte less
    monkeypatch.setattr(evaluation, 'MAX_FEATURE_BYTES', size - 1)
    result = call(evaluation.run, f'--ckpt={pretrained}', '--dataset=demo', f'--data_dir={data_dir}')
    assert is_one_line_error(result, 'pool = bands', '--pool=mean')
    monkeypatch.setattr(evaluation, 'MAX_FEATURE_BYTES', size)
    evaluation.check_size(size // 2048, 512, 'bands')
    assert call(evaluation.run, f'--ckpt={pretrained}', '--dataset=demo', f'--data_dir={data_dir}',
                '--pool=mean').code == 0


def test_accuracy_is_that_of_ten_neighbours():
    """On labels that mean nothing, where nine or eleven say something else."""
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((400, 6)), rng.standard_normal((300, 6))
    y, z = rng.integers(0, 3, 400), rng.integers(0, 3, 300)
    near, far = standardised(x, t)
    by = {k: float((knn_scores(near, y, far, 3, k).argmax(axis=1) == z).mean()) for k in (9, 10, 11)}
    assert knn_accuracy(x, y, t, z) == by[10] and by[10] not in (by[9], by[11])


@pytest.mark.parametrize('strength', [1e-3, 1e-1])
def test_logistic_regression_is_scikit_learns(strength):
    x, y = blobs(0)
    ours = fit_logistic(x.astype(np.float64), np.eye(4)[y], strength, False)
    theirs = LogisticRegression(C=1 / (strength * len(x)), tol=1e-10, max_iter=10000).fit(x.astype(np.float64), y)
    np.testing.assert_allclose(x @ ours[1:].numpy() + ours[0].numpy()
                               - (x @ ours[1:].numpy() + ours[0].numpy()).mean(1, keepdims=True),
                               theirs.decision_function(x) - theirs.decision_function(x).mean(1, keepdims=True),
                               atol=2e-3)


def loss_by_scikit_learn(x, y, part, held_out, strength):
    """Sum over held-out parts of the mean loss, where each is judged by what the others were fitted to."""
    total = 0
    for k in held_out:
        fit, rest = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (strength * (part != k).sum()),
                                                                       max_iter=5000)), part != k
        total += log_loss(y[part == k], fit.fit(x[rest], y[rest]).predict_proba(x[part == k]), labels=range(4))
    return total


@pytest.mark.parametrize('clips, width', [(40, 60), (120, 12), (121, 12)])
def test_probe_chooses_its_strength_by_cross_validation(clips, width, monkeypatch):
    """Reference: scikit-learn's pipeline on every fifth; fewer clips than features, which are fitted in their span, and
    more. Of over 120 clips one fifth is enough."""
    monkeypatch.setattr(probes, 'MANY_CLIPS', 120)
    (x, y), (t, z) = (blobs(seed, n, d=width, spread=3.0) for seed, n in ((3, clips), (2, 400)))
    part = np.empty(clips, int)
    for label in range(4):                                                  # five by five, class after class
        part[y == label] = (np.arange((y == label).sum()) + (y < label).sum()) % 5
    fits, plain = [], probes.minimised
    monkeypatch.setattr(probes, 'minimised', lambda x, y, strength, *how: (
        fits.append((*x.shape, strength)), plain(x, y, strength, *how))[1])
    logits, strength = linear_probe((x, np.eye(4, dtype=np.float32)[y]), t, False)
    held_out = range(5 if clips <= 120 else 1)
    losses = {s: loss_by_scikit_learn(x, y, part, held_out, s) for s in sorted(PROBE_L2, reverse=True)}
    tried = [s for n, _, s in fits if n < clips]
    falling = list(losses.values())
    last = next((i for i in range(2, 7) if falling[i] > falling[i - 1] > falling[i - 2]), 6)    # it has risen twice
    assert tried == [s for s in list(losses)[:last + 1] for _ in held_out]
    assert all(columns == min(n, width) for n, columns, _ in fits)
    assert strength == min(losses, key=losses.get) and strength != PROBE_L2[0]
    fit = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (strength * clips), max_iter=5000)).fit(x, y)
    np.testing.assert_allclose(logits - logits.mean(1, keepdims=True), fit.decision_function(t), atol=2e-2)
    assert (logits.argmax(1) == fit.predict(t)).mean() > 0.995


@pytest.mark.parametrize('clips', [1, 2, 3, 7])
@pytest.mark.parametrize('multi_label', [False, True])
def test_of_one_clip_a_class_nothing_is_learned_about_the_strength(clips, multi_label):
    """Then it is the strongest; no fifth is empty."""
    x, t = np.random.default_rng(0).standard_normal((2, 7, 10), dtype=np.float32)
    logits, strength = linear_probe((x[:clips], np.eye(7, dtype=np.float32)[:clips]), t, multi_label)
    assert logits.shape == (7, 7) and np.isfinite(logits).all()
    if not multi_label or clips == 1:                                       # else the absence of the others counts
        assert strength == max(PROBE_L2)


def test_a_class_of_one_clip_does_not_choose_the_probes_strength():
    """Held out, it is of a class that the rest has never seen: its loss would grow as long as one looks."""
    (x, y), (t, _) = blobs(3, 120, d=12, spread=3.0), blobs(2, 9, d=12)
    found = {}
    for alone in (0, 1):
        one = np.full((alone, 12), 30, np.float32) * np.sign(x[:1])
        targets = np.eye(4 + alone, dtype=np.float32)[[*y, *[4] * alone]]
        found[alone] = linear_probe((np.concatenate([x, one]), targets), t, False)[1]
    assert found[0] == found[1] not in (min(PROBE_L2), max(PROBE_L2))


def test_effective_rank():
    rng = np.random.default_rng(0)
    assert effective_rank(np.outer(rng.standard_normal(500), rng.standard_normal(8))) == pytest.approx(
        1, abs=1e-3)
    assert effective_rank(rng.standard_normal((5000, 8))) > 7.9


@pytest.mark.parametrize('layer', [0, 1])
def test_features_ignore_padding_and_do_not_depend_on_the_batch(data_dir, pretrained, layer):      # noqa: F811
    loaded = open_checkpoint(pretrained)
    clips = open_clips(['noises'], data_dir)
    shortest = int(np.argmin(clips.length))
    batch = data.stack([clips.read(shortest, count=samples_for(64))], samples_for(64))
    frames = min(int(frames_in(clips.length[shortest])), 64)
    with torch.no_grad():
        patches, cls = states(loaded.encoder.eval(), data.log_mel(batch['pcm'], batch['lengths'], **loaded.spectrum),
                              layer)
    rows = patches[0].repeat_interleave(16, dim=0)[:frames].flatten(1)          # of every frame
    want = {'cls': cls[0], 'mean': rows.view(frames, 8, -1).mean((0, 1)),
            'bands': torch.cat([rows.mean(0), rows.std(0, correction=0)])}
    shapes = scipy.fft.dct(rows.view(frames, 8, -1).numpy(), axis=1, norm='ortho').reshape(frames, -1)
    want['cepstra'] = np.concatenate([want['bands'], shapes.std(axis=0)])
    for pool in POOLS:
        big, small = (features(loaded.encoder, clips, loaded.spectrum, CPU, torch.no_grad, pool, layer,
                               batch_size=size) for size in (64, 3))
        assert big.shape == (len(clips), width(loaded.config, pool))
        np.testing.assert_allclose(big, small, atol=1e-5)
        np.testing.assert_allclose(big[shortest], want[pool], atol=2e-5)


def test_deviations_are_in_float32_whatever_autocast_says(pretrained, monkeypatch):         # noqa: F811
    """Of bfloat16's 8 bits the mean of squares less the squared mean would leave nothing: 3 +- 0.1."""
    loaded, autocast = open_checkpoint(pretrained), functools.partial(torch.autocast, 'cpu', torch.bfloat16)
    x = 3 + 0.1 * torch.randn(5, 4, 8, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr('scoring.features.states', lambda *_: (x, x[:, 0, 0]))
    clips = Clips.of_waves([np.zeros(samples_for(64), np.int16)] * 5, list('abcde'))
    for pool, rows in (('bands', x), ('cepstra', torch.from_numpy(scipy.fft.dct(x.numpy(), axis=2, norm='ortho')))):
        got = features(loaded.encoder, clips, loaded.spectrum, CPU, autocast, pool)
        np.testing.assert_allclose(got[:, -256:], rows.flatten(2).std(dim=1, correction=0), atol=2e-3)


@pytest.mark.parametrize('batch_size', [1, 2, 7])
def test_long_clips_are_seen_whole_and_every_frame_once(pretrained, batch_size):            # noqa: F811
    """Clips of one to many windows, cut anywhere; each is what it is alone."""
    loaded, rng = open_checkpoint(pretrained), np.random.default_rng(0)
    lengths = [400, *(samples_for(n) for n in (64, 65, 128, 200)), samples_for(64) + 159, 900]
    clips = Clips.of_waves([rng.integers(-9000, 9000, n).astype(np.int16) for n in lengths], [str(n) for n in lengths])
    got = features(loaded.encoder.eval(), clips, loaded.spectrum, CPU, torch.no_grad, batch_size=batch_size)
    alone = np.concatenate([features(loaded.encoder, clips.select([i]), loaded.spectrum, CPU, torch.no_grad)
                            for i in range(len(clips))])
    np.testing.assert_allclose(got, alone, atol=1e-5)
    halves = clips.select([3]).windows(samples_for(64), 64 * HOP_SAMPLES)
    of_two = features(loaded.encoder, halves, loaded.spectrum, CPU, torch.no_grad, 'mean')
    np.testing.assert_allclose(of_two.mean(axis=0), features(
        loaded.encoder, clips.select([3]), loaded.spectrum, CPU, torch.no_grad, 'mean')[0], atol=1e-5)
    assert real_frames(torch.tensor([samples_for(40), samples_for(64)]), torch.tensor([0, 37]), 4, 16).tolist() == [
        [16, 16, 8, 0], [0, 0, 11, 16]]


def test_log_mel_statistics_are_over_real_frames(data_dir):
    clips = open_clips(['noises'], data_dir)
    frames = int(frames_in(clips.length.max()))
    spectrum = {'frames': frames, 'window': 'hamming', 'mean': 0.0, 'std': 0.5, 'repeat': False}
    got, more = (log_mel_statistics(clips, spectrum, CPU, with_cepstra, batch_size=5) for with_cepstra in (False, True))
    assert got.shape[1] == 256 and more.shape[1] == 296
    for i in (0, 3):
        wave = torch.from_numpy(clips.read(i).astype(np.float32) / 32768)[None]
        x = data.fbank(wave - wave.mean(), torch.tensor([wave.shape[1]]))[0]
        np.testing.assert_allclose(got[i], torch.cat([x.mean(0), x.std(0, unbiased=False)]), atol=1e-3)
        cepstra = scipy.fft.dct(x.double().numpy(), axis=1, norm='ortho')[:, :40]
        np.testing.assert_allclose(more[i], np.concatenate([got[i], cepstra.std(axis=0)]), atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------- modes

def test_a_finetuned_checkpoint_on_its_test_split(straight, data_dir, tmp_path):            # noqa: F811
    result = call(evaluation.run, f'--ckpt={straight}/best.pt', f'--data_dir={data_dir}',
                  f'--csv_file={tmp_path}/classes.csv')
    assert result.code == 0 and 'accuracy' in result.out, result.err
    with open(tmp_path / 'classes.csv') as f:
        rows = list(csv.DictReader(f))
    test = open_clips(['noises'], data_dir, ['test'])
    assert [row['class'] for row in rows] == ['high', 'low'] and sum(int(row['clips']) for row in rows) == len(test)
    right = sum(round(float(row['accuracy'] or 0) * int(row['clips'])) for row in rows)
    assert f'({right} of {len(test)})' in result.out


def test_probes_of_a_pretrained_checkpoint(pretrained, data_dir):                           # noqa: F811
    result = call(evaluation.run, f'--ckpt={pretrained}', '--dataset=demo', f'--data_dir={data_dir}',
                  '--labels_per_class=5', '--pool=bands,cepstra')
    assert result.code == 0, result.err
    for name in ('log-mel statistics', 'log-mel statistics, cepstra',
                 *(f'{weights}{pool}' for pool in ('bands', 'cepstra') for weights in ('random weights, ', ''))):
        line = next(line for line in result.out.splitlines() if line.startswith(name + ' '))
        assert 'kNN: accuracy' in line and 'linear probe: accuracy' in line and 'of 40)' in line


def test_probes_use_given_statistics_else_the_sets(pretrained, data_dir, monkeypatch):       # noqa: F811
    seen = []

    def spectrum_of(name, wrapped):
        def recorded(*args, **how):
            seen.append((args[2] if name == 'features' else args[1], how['batch_size']))
            return wrapped(*args, **how)
        monkeypatch.setattr(evaluation, name, recorded)
    spectrum_of('features', features)
    spectrum_of('log_mel_statistics', log_mel_statistics)
    mean, std = open_clips(['noises'], data_dir).statistics('hamming')
    for options, want in (([], (mean, std)), (['--norm_mean=-5'], (-5.0, std)), (['--norm_std=2'], (mean, 2.0))):
        seen.clear()
        result = call(evaluation.run, f'--ckpt={pretrained}', '--dataset=noises', f'--data_dir={data_dir}',
                      '--batch_size=5', *options)
        assert result.code == 0, result.err
        assert [(spectrum['mean'], spectrum['std'], size) for spectrum, size in seen] == [(*want, 5)] * 6


def test_features_of_a_file_are_probed_as_a_checkpoints(pretrained, data_dir, tmp_path):        # noqa: F811
    """What --embed has written, in any order and beside other arrays, scores as the encoder itself; other numbers, of
    which a classifier knows all, score by them."""
    same = [f'--ckpt={pretrained}', '--dataset=demo', f'--data_dir={data_dir}', '--norm_mean=-7', '--norm_std=3']
    assert call(evaluation.run, *same, f'--embed={tmp_path}/x.npz', '--pool=bands,mean').code == 0
    with np.load(tmp_path / 'x.npz') as stored:
        order = np.random.default_rng(0).permutation(len(stored['names']))
        arrays = {name: stored[name][order] for name in ('names', 'bands', 'mean', 'labels', 'start', 'splits')}
    arrays['told'] = np.eye(10)[arrays['labels']]
    np.savez(tmp_path / 'x.npz', **arrays)
    ours = call(evaluation.run, *same, '--pool=bands,mean', '--labels_per_class=5')
    theirs = call(evaluation.run, f'--features_file={tmp_path}/x.npz', *same[1:3], '--labels_per_class=5')
    assert theirs.code == 0, theirs.err
    lines = theirs.out.splitlines()
    assert len(lines) == 4 and set(lines[1:3]) <= set(ours.out.splitlines()) and lines[1] != lines[2]
    assert lines[3].split() == ('told kNN: accuracy 100.0% (40 of 40) linear probe: accuracy 100.0% (40 of 40)').split()


@pytest.mark.parametrize('damage, words', [
    ('absent', ['there is no features_file']), ('junk', ['is not an .npz']), ('objects', ['is not an .npz']),
    ('no names', ['no array `names`']), ('names twice', ['no array `names`', 'once']),
    ('bytes as names', ['no array `names`']), ('clip', ['lacks 1 of the clips', 'e.g. ']),
    ('nan', ['x holds numbers that are not finite']), ('rows', ['no array of', 'real numbers']),
    ('integers', ['no array of', 'real numbers']), ('no columns', ['no array of', 'real numbers']),
    ('too large', ['x holds numbers that are not finite']), ('names in rows', ['no array `names`']),
    ('one array', ['is not an .npz']), ('csv_file', ['--csv_file']), ('ckpt', ['leave out --ckpt']),
    ('dataset', ['--dataset'])])
def test_a_bad_file_of_features_is_named(data_dir, tmp_path, damage, words):
    path, names = tmp_path / 'theirs.npz', np.array(open_clips(['demo'], data_dir, ['train', 'test']).keys())
    arrays, more = {'names': names, 'x': np.random.default_rng(0).standard_normal((len(names), 3))}, ['--dataset=demo']
    if damage == 'objects':
        arrays['x'] = arrays['x'].astype(object)
    elif damage == 'no names':
        del arrays['names']
    elif damage == 'names twice':
        arrays['names'][0] = arrays['names'][1]
    elif damage == 'bytes as names':
        arrays['names'] = names.astype('S')
    elif damage == 'clip':
        arrays = {name: array[1:] for name, array in arrays.items()}
    elif damage == 'nan':
        arrays['x'][:, 1] = np.nan
    elif damage == 'rows':
        arrays['x'] = arrays['x'][1:]
    elif damage == 'integers':
        arrays['x'] = arrays['x'].astype(int)
    elif damage == 'no columns':
        arrays['x'] = arrays['x'][:, :0]
    elif damage == 'too large':
        arrays['x'][0, 0] = 1e300
        arrays['x'][1:, 0] = -1e300
    elif damage == 'names in rows':
        arrays['names'] = names[:, None]
    elif damage == 'csv_file':
        more.append('--csv_file=x.csv')
    elif damage == 'ckpt':
        more.append('--ckpt=x.pt')
    elif damage == 'dataset':
        more.clear()
    if damage == 'junk':
        path.write_bytes(b'nothing of use' * 9)
    elif damage == 'one array':
        with open(path, 'wb') as f:
            np.save(f, arrays['x'])
    elif damage != 'absent':
        np.savez(path, **arrays)
    result = call(evaluation.run, f'--features_file={path}', f'--data_dir={data_dir}', *more)
    assert is_one_line_error(result, *words)


def test_a_finetuned_checkpoint_needs_only_a_test_split(straight, data_dir, tmp_path):       # noqa: F811
    """And scores on it what fine-tuning's log says."""
    shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'noises')
    for file in ('train-00000.npz', 'train-00000.pcm'):
        os.remove(tmp_path / 'noises' / file)
    result = call(evaluation.run, f'--ckpt={straight}/best.pt', f'--data_dir={tmp_path}',
                  f'--csv_file={tmp_path}/x.csv')
    logged = next(line for line in log_of(straight) if 'test' in line)['test']['best']
    assert result.code == 0 and f'({logged["right"]} of {logged["clips"]})' in result.out, result.err


def test_wav_prints_the_top_classes(straight, tmp_path):                                    # noqa: F811
    for name in ('a', 'b=c d'):
        write_wav(str(tmp_path / f'{name}.wav'), 0.3 * np.sin(np.arange(40000) / 5), 44100)
    result = call(evaluation.run, f'--ckpt={straight}/best.pt', f'--wav={tmp_path}/a.wav,{tmp_path}/b=c d.wav',
                  '--top_k=2')
    assert result.code == 0, result.err
    lines = result.out.strip().splitlines()
    assert len(lines) == 2 and all('low 0.' in line and 'high 0.' in line for line in lines)
    assert sum(float(word.strip(',')) for word in lines[0].split() if word.startswith('0.')) == pytest.approx(
        1, abs=0.002)


@pytest.mark.parametrize('file', ['authors_tiny_finetune.pt', 'eat_tiny_finetune.pt'])
def test_wav_with_the_authors_classifier(tmp_path, file):
    write_wav(str(tmp_path / 'a.wav'), 0.3 * np.sin(np.arange(20000) / 5))
    for options, shown in (([], 5), (['--top_k=3'], 3), (['--top_k=99'], 10)):
        result = call(evaluation.run, f'--ckpt={FIXTURES}/{file}', f'--wav={tmp_path}/a.wav', *options)
        assert result.code == 0 and result.out.count('class ') == shown, result.err


def test_long_files_are_windowed_averaged_and_timed(straight, tmp_path):                    # noqa: F811
    """A low tone, then a high one: the windows' probabilities are those of the pieces alone, the file's their mean."""
    t = np.arange(24000) / 16000
    wave = np.concatenate([0.3 * np.sin(2 * np.pi * pitch * t) for pitch in (300, 2000)])
    write_wav(str(tmp_path / 'long.wav'), wave)
    options = [f'--ckpt={straight}/best.pt', f'--wav={tmp_path}/long.wav', f'--csv_file={tmp_path}/windows.csv']
    result = call(evaluation.run, *options, '--window=0.6', '--hop=0.5')
    assert result.code == 0, result.err
    with open(tmp_path / 'windows.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    starts = [float(row['start']) for row in rows]
    assert starts == [0, 0.5, 1.0, 1.5, 2.0, 2.4] and float(rows[-1]['end']) == 3.0
    for row in rows:
        start = round(float(row['start']) * 16000)
        write_wav(str(tmp_path / 'piece.wav'), wave[start:start + 9600])
        alone = call(evaluation.run, f'--ckpt={straight}/best.pt', f'--wav={tmp_path}/piece.wav', '--window=0.6').out
        for name in ('low', 'high'):
            assert float(alone.split(f'{name} ')[1][:5]) == pytest.approx(float(row[name]), abs=6e-4)
    for name in ('low', 'high'):
        assert float(result.out.split(f'{name} ')[1][:5]) == pytest.approx(
            np.mean([float(row[name]) for row in rows]), abs=6e-4)
    assert call(evaluation.run, *options).code == 0                        # by default windows of the input length
    with open(tmp_path / 'windows.csv', newline='') as f:
        assert [float(row['start']) for row in csv.DictReader(f)] == pytest.approx([0, 0.655, 1.31, 1.965, 2.345])


def test_a_set_is_windowed_when_asked(straight, data_dir, tmp_path):                        # noqa: F811
    test = open_clips(['noises'], data_dir, ['test'])
    common = [f'--ckpt={straight}/best.pt', f'--data_dir={data_dir}', f'--csv_file={tmp_path}/classes.csv']
    first = call(evaluation.run, *common)
    longer = (test.length > samples_for(64) + 2560).sum()
    assert longer and f'{longer} clips are longer than the input' in first.out
    result = call(evaluation.run, *common, '--hop=0.3')
    assert result.code == 0 and 'are longer' not in result.out, result.err
    with open(tmp_path / 'classes-windows.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert {row['clip'] for row in rows} == set(test.keys()) and len(rows) > len(test)
    right = 0
    for key, label in zip(test.keys(), test.label):
        own = [row for row in rows if row['clip'] == key]
        means = {name: np.mean([float(row[name]) for row in own]) for name in test.classes}
        right += max(means, key=means.get) == test.classes[label]
        assert float(own[-1]['end']) * 16000 >= test.length[test.keys().index(key)] - 2560
    assert f'({right} of {len(test)})' in result.out


@pytest.mark.parametrize('length, hop, starts', [
    (900, 4000, [0]), (3500, 4000, [0]), (3600, 4000, [0, 2600]), (10000, 4000, [0, 4000, 8000]),
    (12000, 4000, [0, 4000, 8000, 11000]), (7000, 2560, [0, 2560, 5120]), (6120, 2560, [0, 2560]),
    (6121, 2560, [0, 2560, 5120]),
    (900, 1000, [0]), (1000, 500, [0]), (1010, 500, [0, 10]), (3500, 1000, [0, 1000, 2000, 2500]),
    (3000, 800, [0, 800, 1600, 2000]), (3559, 2559, [0, 2559])])
def test_windows_cover_a_clip_but_for_a_tail_shorter_than_a_patch(length, hop, starts):
    """With a hop that is finer than a patch (2,560 samples) they cover all of it."""
    clips = Clips.of_waves([np.arange(length, dtype=np.int16), np.arange(10, dtype=np.int16)], ['a', 'b'])
    windows = clips.windows(1000, hop)
    assert windows.start.tolist() == [*starts, 0] and windows.clip.tolist() == [0] * len(starts) + [1]
    assert windows.length.tolist() == [min(length, 1000)] * len(starts) + [10]
    assert [windows.read(i)[0] for i in range(len(windows))] == windows.start.tolist()


def test_a_hop_finer_than_a_patch_reaches_the_end(straight, tmp_path):                      # noqa: F811
    """1.15 s, window 1 s, hop 0.05 s: four windows, not one."""
    write_wav(str(tmp_path / 'a.wav'), 0.3 * np.sin(np.arange(18400) / 5))
    result = call(evaluation.run, f'--ckpt={straight}/best.pt', f'--wav={tmp_path}/a.wav', '--window=1', '--hop=0.05',
                  f'--csv_file={tmp_path}/when.csv')
    assert result.code == 0, result.err
    assert [(row['start'], row['end']) for row in table(tmp_path / 'when.csv')] == [
        ('0.000', '1.000'), ('0.050', '1.050'), ('0.100', '1.100'), ('0.150', '1.150')]


def test_clips_in_memory_can_be_selected_cut_pickled_and_named():
    rng = np.random.default_rng(0)
    waves = [rng.integers(-9, 9, n).astype(np.int16) for n in (500, 700, 3000)]
    clips = pickle.loads(pickle.dumps(Clips.of_waves(waves, ['a', 'b/\udcff', 'c'])))
    chosen = pickle.loads(pickle.dumps(clips.select([2, 0])))
    assert chosen.keys() == ['c', 'a'] and clips.select(clips.length == 700).keys() == ['b/\udcff']
    np.testing.assert_array_equal(chosen.read(0, 100, 50), waves[2][100:150])
    windows = pickle.loads(pickle.dumps(chosen.windows(1000, 1000)))
    assert windows.keys() == ['c', 'c', 'c', 'a']
    np.testing.assert_array_equal(windows.read(1), waves[2][1000:2000])
    np.testing.assert_array_equal(windows.read(3), waves[0])


@pytest.mark.parametrize('file', ['authors_tiny_finetune.pt', 'eat_tiny_finetune.pt'])
def test_class_names_for_the_authors_classifier(tmp_path, file):
    write_wav(str(tmp_path / 'a.wav'), 0.3 * np.sin(np.arange(20000) / 5))
    names = [f'Sound, number {i}' for i in range(10)]
    for count in (10, 9):
        with open(tmp_path / 'labels.csv', 'w', newline='') as f:
            csv.writer(f).writerows([['index', 'mid', 'display_name'],
                                     *([i, f'/m/{i}', name] for i, name in enumerate(names[:count]))])
        result = call(evaluation.run, f'--ckpt={FIXTURES}/{file}', f'--wav={tmp_path}/a.wav',
                      f'--labels={tmp_path}/labels.csv')
        if count == 10:
            assert result.code == 0 and result.out.count('Sound, number') == 5, result.err
    assert is_one_line_error(result, 'labels.csv', '9 classes', '10')


def test_embeddings_of_windows(pretrained, tmp_path):                                       # noqa: F811
    write_wav(str(tmp_path / 'a.wav'), 0.3 * np.sin(np.arange(32000) / 5))
    assert call(evaluation.run, f'--ckpt={pretrained}', f'--wav={tmp_path}/a.wav', '--hop=0.5', '--window=0.64',
                f'--embed={tmp_path}/x.npz', '--pool=cls,bands').code == 0
    with np.load(tmp_path / 'x.npz') as stored:
        assert stored['start'].tolist() == [0, 0.5, 1.0, 1.36] and stored['cls'].shape == (4, 32)
        assert stored['bands'].shape == (4, 2 * 8 * 32) and len(stored['names']) == 4


@pytest.mark.parametrize('ckpt', ['pretrained', 'finetuned', 'authors', 'eat'])
def test_embeddings_of_files_and_sets(straight, pretrained, data_dir, tmp_path, ckpt):      # noqa: F811
    path = {'pretrained': pretrained, 'finetuned': f'{straight}/best.pt',
            'authors': f'{FIXTURES}/authors_tiny_pretrain.pt', 'eat': f'{FIXTURES}/eat_tiny_finetune.pt'}[ckpt]
    D, P = (32, 32) if ckpt in ('pretrained', 'finetuned') else (64, 64)
    clips = open_clips(['noises'], data_dir, ['test', 'train'])
    keys = [str(key) for key in clips.keys()]
    os.makedirs(tmp_path / 'wav')
    for i in range(5):
        soundfile.write(tmp_path / 'wav' / f'{i}.wav', clips.read(i), 16000)
    result = call(evaluation.run, f'--ckpt={path}', f'--wav={tmp_path}/wav', f'--embed={tmp_path}/files.npz',
                  '--patches', '--pool=bands,mean')
    assert result.code == 0, result.err
    assert call(evaluation.run, f'--ckpt={path}', '--dataset=noises', f'--data_dir={data_dir}', '--pool=mean,bands',
                f'--embed={tmp_path}/set.npz').code == 0
    with np.load(tmp_path / 'files.npz') as files, np.load(tmp_path / 'set.npz') as stored:
        assert files['patches'].shape[1:] == (P, D) and files['patches'].dtype == np.float16
        frames = np.minimum(files['sound'], 2 * P)
        for i, (mean, patches) in enumerate(zip(files['mean'], files['patches'].astype(float))):
            of_frame = patches.reshape(P // 8, 8, D).repeat(16, axis=0)[:frames[i]]
            np.testing.assert_allclose(mean, of_frame.mean(axis=(0, 1)), atol=2e-3)                     # float16
        assert stored['names'].tolist() == keys and 'patches' not in stored
        one_window = clips.length[:5] <= samples_for(2 * P)
        for i in np.flatnonzero(one_window):        # of files and of a set alike
            row = files['names'].tolist().index(f'{tmp_path}/wav/{i}.wav')
            np.testing.assert_allclose(files['bands'][row], stored['bands'][i], atol=1e-4)
        assert one_window.any()
        assert stored['splits'].tolist() == ['test'] * (stored['splits'] == 'test').sum() + ['train'] * (
            stored['splits'] == 'train').sum() and stored['labels'].tolist() == clips.label.tolist()


@needs_shared
def test_a_damaged_real_file_is_named(straight, tmp_path):                                  # noqa: F811
    import tarfile
    with tarfile.open(os.path.join(SHARED, 'audio', 'damaged.tar')) as archive:
        for member in archive.getmembers():
            (tmp_path / os.path.basename(member.name)).write_bytes(archive.extractfile(member).read())
    for file in sorted(os.listdir(tmp_path)):
        assert is_one_line_error(call(evaluation.run, f'--ckpt={straight}/best.pt', f'--wav={tmp_path}/{file}'), file)


@pytest.mark.parametrize('argv, words', [
    ([], ['--ckpt']), (['--ckpt=/absent.pt'], ['/absent.pt']), (['--ckpt={tmp}'], ['folder']),
    (['--ckpt={tmp}/junk.pt'], ['junk.pt']), (['--ckpt={pretrained}'], ['--dataset']),
    (['--ckpt=README.md'], ['README.md is not a checkpoint that can be read safely (UnpicklingError)']),
    (['--ckpt={pretrained}', '--dataset=absent'], ['absent']), (['--ckpt={pretrained}', '--wav=a.wav'], ['fine-tune']),
    (['--ckpt={tuned}', '--wav=/absent.wav'], ['/absent.wav']),
    (['--ckpt={tuned}', '--wav={tmp}/junk.pt'], ['junk.pt']), (['--ckpt={tuned}', '--dataset=demo'], ['classes']),
    (['--ckpt={pretrained}', '--embed=x.npz'], ['--dataset']),
    (['--ckpt={pretrained}', '--embed=x.npz', '--wav={tmp}', '--dataset=noises'], ['--wav', '--dataset', 'give one']),
    (['--ckpt={tuned}', '--wav={tmp}/empty.wav'], ['empty.wav', 'an empty file']),
    (['--ckpt={pretrained}', '--dataset=noises', '--frames=50'], ['frames = 50']),
    (['--ckpt={tuned}', '--wav=,'], ['names no file']), (['--ckpt={tuned}', '--top_k=-1', '--wav=x'], ['top_k']),
    (['--ckpt={tuned}', '--norm_std=0', '--wav=x'], ['norm_std']),
    (['--ckpt={tuned}', '--batch_size=0'], ['batch_size']),
    (['--ckpt={tuned}', '--window=1', '--frames=64'], ['--window', '--frames']),
    (['--ckpt={tuned}', '--window=0.001'], ['window = 0.001']), (['--ckpt={tuned}', '--hop=-1'], ['hop']),
    (['--ckpt={tuned}', '--csv_file={tmp}/x.csv'], ['x.csv', 'folder']),
    (['--ckpt={pretrained}', '--dataset=noises', '--csv_file=x.csv'], ['csv_file']),
    (['--ckpt={pretrained}', '--dataset=noises', '--embed=y.npz', '--csv_file=x.csv'], ['csv_file']),
    (['--ckpt={pretrained}', '--dataset=noises', '--pool=x'], ['pool', 'bands']),
    (['--ckpt={pretrained}', '--dataset=noises', '--pool=cls,cls'], ['pool', 'once']),
    (['--ckpt={pretrained}', '--dataset=noises', '--pool='], ['pool']),
    (['--ckpt={pretrained}', '--dataset=noises', '--layer=3'], ['layer', '2 blocks']),
    (['--ckpt={tuned}', '--wav={tmp}/short.wav', '--max_minutes=0'], ['max_minutes']),
    (['--ckpt={tuned}', '--wav={tmp}/x.csv'], ['x.csv holds no audio file']),
    (['--ckpt={tuned}', '--wav={tmp}/short.wav'], ['short.wav', 'shorter than one window'])])
def test_bad_input(straight, pretrained, data_dir, tmp_path, argv, words):                  # noqa: F811
    (tmp_path / 'junk.pt').write_bytes(b'nothing of use' * 100)
    write_wav(str(tmp_path / 'short.wav'), np.zeros(300))
    (tmp_path / 'empty.wav').touch()
    (tmp_path / 'x.csv').mkdir()
    argv = [argument.format(tmp=tmp_path, pretrained=pretrained, tuned=f'{straight}/best.pt') for argument in argv]
    words = [word.format(tmp=tmp_path) for word in words]
    assert is_one_line_error(call(evaluation.run, f'--data_dir={data_dir}', *argv), *words)


@pytest.mark.parametrize('mode, bars', [('probe', {'log-mel', 'encoding', 'probing'}),
                                        ('embed', {'decoding', 'encoding'}), ('classify', {'decoding', 'classifying'})])
def test_what_takes_long_shows_progress(
        straight, pretrained, data_dir, tmp_path, monkeypatch, mode, bars):                 # noqa: F811
    """On a terminal, and of the main process alone."""
    write_wav(f'{tmp_path}/a.wav', np.random.default_rng(0).uniform(-0.5, 0.5, 16000))
    how = {'probe': [f'--ckpt={pretrained}', '--dataset=noises', f'--data_dir={data_dir}'],
           'embed': [f'--ckpt={pretrained}', f'--wav={tmp_path}/a.wav', f'--embed={tmp_path}/x.npz'],
           'classify': [f'--ckpt={straight}/best.pt', f'--wav={tmp_path}/a.wav']}[mode]

    def shown():
        result = call(evaluation.run, *how, '--device=cpu')
        assert result.code == 0, result.err
        return bars_of(result)
    assert shown() == set()
    on_a_terminal(monkeypatch)
    assert shown() == bars
    monkeypatch.setattr(processes.Process, 'is_main', False)
    assert shown() == set()


# ------------------------------------------------------------------------------------------- what is read and written

def tones(folder, *names):
    for k, name in enumerate(names):
        write_wav(f'{folder}/{name}', 0.3 * np.sin(np.arange(20000 + 1000 * k) / 5))


def test_every_set_fold_and_checkpoint_has_its_own_tables(straight, pretrained, data_dir, tmp_path):     # noqa: F811
    """Beside the checkpoint: classes-SET[-fold-FOLD]-CKPT.csv, and -windows.csv; none is overwritten by another."""
    shutil.copytree(straight, tmp_path / 'run')
    for name in ('noises', 'others/1'):
        shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'data' / name)
    for folder, folds in (('noises', 2), ('others/1', 1)):
        for file in ('train-00000.npz', 'test-00000.npz'):
            path = tmp_path / 'data' / folder / file
            index = dict(np.load(path))
            np.savez(path, **{**index, 'folds': (np.arange(len(index['folds'])) % folds).astype(index['folds'].dtype)})
        meta = tmp_path / 'data' / folder / 'meta.json'
        meta.write_text(meta.read_text().replace('"folds": []', '"folds": ["a/1", "b"]'))
    seen = {}
    for ckpt in ('best', 'ckpt'):
        for options in ([], ['--fold=a/1'], ['--fold=b'], ['--dataset=others/1'], ['--dataset=others/1', '--fold=a/1'],
                        ['--hop=0.3']):
            result = call(evaluation.run, f'--ckpt={tmp_path}/run/{ckpt}.pt', f'--data_dir={tmp_path}/data', *options)
            assert result.code == 0, result.err
            path = result.out.split('per class: ')[1].split('\n')[0].split('; of ')[0]
            seen[path] = sum(int(row['clips']) for row in table(path))
    names = sorted({os.path.basename(path) for path in seen})
    assert names == sorted(f'classes-{part}-{ckpt}.csv' for ckpt in ('best', 'ckpt') for part in (
        'noises', 'noises-fold-a%2F1', 'noises-fold-b', 'others%2F1', 'others%2F1-fold-a%2F1'))
    files = sorted(file for file in os.listdir(tmp_path / 'run') if file.endswith('.csv'))
    assert files == sorted([*names, 'classes-noises-best-windows.csv', 'classes-noises-ckpt-windows.csv'])
    assert len(set(seen.values())) > 2
    assert seen == {path: sum(int(row['clips']) for row in table(path)) for path in seen}
    state = torch.load(tmp_path / 'run' / 'best.pt', weights_only=True)
    state['settings']['fold'] = 'b'                                         # tuned without this fold: tested on it
    torch.save(state, tmp_path / 'run' / 'of_b.pt')
    result = call(evaluation.run, f'--ckpt={tmp_path}/run/of_b.pt', f'--data_dir={tmp_path}/data')
    assert f'of {seen[f"{tmp_path}/run/classes-noises-fold-b-best.csv"]})' in result.out, result.err
    assert os.path.exists(tmp_path / 'run' / 'classes-noises-fold-b-of_b.csv')
    result = call(evaluation.run, f'--ckpt={pretrained}', f'--data_dir={tmp_path}/data', '--dataset=noises', '--fold=b')
    assert f'{seen[f"{tmp_path}/run/classes-noises-fold-b-best.csv"]} test clips' in result.out, result.err


def test_the_score_is_printed_before_its_table_is_written(straight, data_dir, tmp_path, monkeypatch):   # noqa: F811
    def full(*_):
        raise OSError(28, 'No space left on device', 'classes.csv')
    monkeypatch.setattr(evaluation, 'write_classes', full)
    result = call(evaluation.run, f'--ckpt={straight}/best.pt', f'--data_dir={data_dir}',
                  f'--csv_file={tmp_path}/classes.csv')
    assert is_one_line_error(result, 'classes.csv', 'No space left') and 'on noises: accuracy ' in result.out


@pytest.mark.parametrize('mode', ['embed', 'csv_file', 'csv_of_set'])
def test_outputs_never_overwrite_inputs_nor_fail_late(straight, data_dir, tmp_path, mode, monkeypatch):     # noqa: F811
    """Refused in one line before anything is encoded, whatever the name by which the input is called."""
    ending = '.npz' if mode == 'embed' else '.csv'
    ckpt, sound = tmp_path / f'ckpt{ending}', tmp_path / f'sound{ending}'
    shutil.copy(f'{straight}/best.pt', ckpt)
    tones(tmp_path, 'a.wav')
    os.replace(tmp_path / 'a.wav', sound)
    shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'noises')
    (tmp_path / 'folder').mkdir()
    (tmp_path / f'made{ending}').mkdir()
    os.symlink(tmp_path, tmp_path / 'link')
    os.symlink(ckpt, tmp_path / f'linked{ending}')
    os.link(sound, tmp_path / f'hard{ending}')
    shutil.copy(ckpt, tmp_path / f'x{ending}.tmp')
    source = ['--dataset=noises', f'--data_dir={tmp_path}'] if mode == 'csv_of_set' else [f'--wav={sound}']
    bad = {str(ckpt): 'overwrite', f'{tmp_path}/folder/../ckpt{ending}': 'overwrite',
           f'{tmp_path}/link/ckpt{ending}': 'overwrite', f'{tmp_path}/linked{ending}': 'overwrite',
           f'{tmp_path}/made{ending}': 'folder', f'{tmp_path}/x.txt': f'must end in {ending}',
           str(tmp_path / 'ckpt.pt'): f'must end in {ending}', f'{sound}/x{ending}': 'cannot be written',
           f'{tmp_path}/{"n" * 300}{ending}': 'cannot be written'}
    if mode == 'csv_of_set':
        bad.update({f'{tmp_path}/noises/x.csv': 'overwrite', f'{tmp_path}/link/noises/new/x.csv': 'overwrite'})
    else:
        bad.update({str(sound): 'overwrite', f'{tmp_path}/hard{ending}': 'overwrite'})
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}

    def encoded(*_, **__):
        raise AssertionError('something was encoded')
    for name in ('predict', 'feature_batches'):
        monkeypatch.setattr(evaluation, name, encoded)
    option = '--embed' if mode == 'embed' else '--csv_file'
    for path, word in bad.items():
        assert is_one_line_error(call(evaluation.run, f'--ckpt={ckpt}', *source, f'{option}={path}'), word), path
    assert is_one_line_error(call(evaluation.run, f'--ckpt={tmp_path}/x{ending}.tmp', *source,
                                  f'{option}={tmp_path}/x{ending}'), 'overwrite')
    assert before == {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}


def test_the_labels_are_not_overwritten(tmp_path):
    tones(tmp_path, 'a.wav')
    (tmp_path / 'labels.csv').write_text('index,mid,display_name\n'
                                         + ''.join(f'{i},/m/{i},sound {i}\n' for i in range(10)))
    before = (tmp_path / 'labels.csv').read_bytes()
    result = call(evaluation.run, f'--ckpt={FIXTURES}/eat_tiny_finetune.pt', f'--wav={tmp_path}/a.wav',
                  f'--labels={tmp_path}/labels.csv', f'--csv_file={tmp_path}/labels.csv')
    assert is_one_line_error(result, 'labels.csv', 'overwrite')
    assert (tmp_path / 'labels.csv').read_bytes() == before


def test_embeddings_of_a_set_stay_out_of_its_folder(straight, data_dir, tmp_path):           # noqa: F811
    shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'noises')
    before = (tmp_path / 'noises' / 'train-00000.npz').read_bytes()
    for name in ('train-00000.npz', 'train-00001.npz'):
        assert is_one_line_error(call(evaluation.run, f'--ckpt={straight}/best.pt', '--dataset=noises',
                                      f'--data_dir={tmp_path}', f'--embed={tmp_path}/noises/{name}'), name, 'overwrite')
    assert (tmp_path / 'noises' / 'train-00000.npz').read_bytes() == before


def test_embeddings_keep_their_name(straight, tmp_path):                                     # noqa: F811
    tones(tmp_path, 'a.wav')
    result = call(evaluation.run, f'--ckpt={straight}/best.pt', f'--wav={tmp_path}/a.wav',
                  f'--embed={tmp_path}/new/b.c.NPZ')
    assert result.code == 0, result.err
    assert os.listdir(tmp_path / 'new') == ['b.c.NPZ']
    assert np.load(tmp_path / 'new' / 'b.c.NPZ')['bands'].shape == (1, 512)


def test_names_with_commas_folders_and_both(tmp_path):
    tones(tmp_path, 'a.wav', 'b,c.wav', 'd,e,f.wav', 'in, here/z.wav', 'in, here/deep/y.wav')
    (tmp_path / 'in, here' / 'no audio.txt').write_text('x')
    root = str(tmp_path)
    inside = [f'{root}/in, here/deep/y.wav', f'{root}/in, here/z.wav']
    for text, want in ((f'{root}/b,c.wav', [f'{root}/b,c.wav']),
                       (f'{root}/a.wav, {root}/b,c.wav,{root}/d,e,f.wav ,',
                        [f'{root}/a.wav', f'{root}/b,c.wav', f'{root}/d,e,f.wav']),
                       (f'{root}/in, here', inside), (f'{root}/in, here,{root}/a.wav', [*inside, f'{root}/a.wav']),
                       (f'{root}/absent.wav,{root}/b,c.wav', [f'{root}/absent.wav', f'{root}/b,c.wav']),
                       (f'{root}/b,d.wav', [f'{root}/b', 'd.wav'])):
        assert named_files(text) == want, text
    tones(tmp_path, 'a.wav,b.wav', 'b.wav')                                 # all of it is a name
    assert named_files(f'{root}/a.wav,b.wav') == [f'{root}/a.wav,b.wav']


def test_a_folder_is_classified_file_by_file(straight, tmp_path):                           # noqa: F811
    tones(tmp_path, 'b.wav', 'a.wav', 'more/c,d.wav')
    (tmp_path / 'list.txt').write_text('x')
    result = call(evaluation.run, f'--ckpt={straight}/best.pt', f'--wav={tmp_path}', f'--csv_file={tmp_path}/x.csv',
                  '--workers=1')
    assert result.code == 0, result.err
    want = [f'{tmp_path}/{name}' for name in ('a.wav', 'b.wav', 'more/c,d.wav')]
    lines = [line for line in result.out.splitlines() if ':  ' in line]
    assert [line.split(':  ')[0] for line in lines] == want
    alone = call(evaluation.run, f'--ckpt={straight}/best.pt', f'--wav={want[2]}').out.strip()
    assert alone == lines[2] and sorted({row['clip'] for row in table(tmp_path / 'x.csv')}) == want


@pytest.mark.parametrize('mode', ['classes', 'embed'])
def test_a_bad_file_does_not_end_the_call_for_the_others(straight, tmp_path, mode):          # noqa: F811
    """It is named where it stands; the exit code is 2 and the last line counts."""
    tones(tmp_path, 'a.wav', 'c.wav')
    (tmp_path / 'b.wav').write_bytes(b'nothing of use')
    option = f'--embed={tmp_path}/x.npz' if mode == 'embed' else f'--csv_file={tmp_path}/x.csv'
    result = call(evaluation.run, f'--ckpt={straight}/best.pt',
                  f'--wav={tmp_path}/a.wav,{tmp_path}/b.wav,{tmp_path}/absent.wav,{tmp_path}/c.wav', option)
    assert is_one_line_error(result, '2 of 4 files could not be read', f'{tmp_path}/b.wav')
    lines = result.out.splitlines()
    assert [f'{tmp_path}/{name}' in line for line, name in zip(lines, ('b.wav', 'absent.wav'))] == [True, True]
    assert all(line.startswith('left out: cannot read ') for line in lines[:2])
    want = [f'{tmp_path}/a.wav', f'{tmp_path}/c.wav']
    if mode == 'embed':
        assert np.load(tmp_path / 'x.npz')['names'].tolist() == want
    else:
        assert [line.split(':  ')[0] for line in lines[2:4]] == want
        assert list(dict.fromkeys(row['clip'] for row in table(tmp_path / 'x.csv'))) == want
    none = call(evaluation.run, f'--ckpt={straight}/best.pt', f'--wav={tmp_path}/b.wav,{tmp_path}/absent.wav',
                option.replace('/x.', '/y.'))
    assert is_one_line_error(none, '2 of 2 files') and not [file for file in os.listdir(tmp_path) if file[:2] == 'y.']


def test_names_that_the_terminal_cannot_show(straight, tmp_path):                            # noqa: F811
    """Latin script only, and bytes that are no UTF-8: shown as escapes; the table holds them as they are."""
    tones(tmp_path, 'звук.wav')
    os.rename(tmp_path / 'звук.wav', os.fsencode(tmp_path) + b'/odd\xff.wav')
    tones(tmp_path, 'звук.wav')
    result = script('eval.py', f'--ckpt={straight}/best.pt', f'--wav={tmp_path}', f'--csv_file={tmp_path}/x.csv',
                    PYTHONIOENCODING='cp1252')
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert '\\udcff.wav:  ' in result.stdout and '\\u0437\\u0432\\u0443\\u043a.wav:  ' in result.stdout
    assert {os.path.basename(row['clip']) for row in table(tmp_path / 'x.csv')} == {'odd\udcff.wav', 'звук.wav'}


def test_float_audio_on_another_scale_is_refused_with_its_peak(straight, tmp_path):          # noqa: F811
    wave = np.sin(np.arange(20000) / 5).astype(np.float32)
    for peak, code in ((1.4, 0), (12000, 2), (1e30, 2)):
        soundfile.write(tmp_path / 'a.wav', peak * wave, 16000, subtype='FLOAT')
        result = call(evaluation.run, f'--ckpt={straight}/best.pt', f'--wav={tmp_path}/a.wav')
        assert result.code == code, result.err
        assert code == 0 or is_one_line_error(result, 'a.wav', 'peak', f'{np.abs(peak * wave).max():g}')


def test_how_long_a_file_may_be_is_a_setting(straight, tmp_path, monkeypatch):               # noqa: F811
    write_wav(str(tmp_path / 'a.wav'), 0.3 * np.sin(np.arange(32000) / 5))
    base = [f'--ckpt={straight}/best.pt', f'--wav={tmp_path}/a.wav']
    assert is_one_line_error(call(evaluation.run, *base, '--max_minutes=0.03'), 'a.wav', 'max_minutes = 0.03')
    assert call(evaluation.run, *base, '--max_minutes=0.04').code == 0
    monkeypatch.setattr(decoding, 'MAX_SAMPLES', 1000)                      # of memory, whatever the setting allows
    assert call(evaluation.run, *base, '--max_minutes=0.04').code == 0
    write_wav(str(tmp_path / 'a.wav'), 0.3 * np.sin(np.arange(384000) / 5), rate=192000)
    assert is_one_line_error(call(evaluation.run, *base, '--max_minutes=0.04'), 'a.wav', 'more than')


def test_a_label_file_may_begin_with_a_byte_order_mark(tmp_path):
    tones(tmp_path, 'a.wav')
    with open(tmp_path / 'labels.csv', 'w', newline='', encoding='utf-8-sig') as f:
        csv.writer(f).writerows([['index', 'mid', 'display_name'], *([i, f'/m/{i}', f'Grün {i}'] for i in range(10))])
    result = call(evaluation.run, f'--ckpt={FIXTURES}/eat_tiny_finetune.pt', f'--wav={tmp_path}/a.wav',
                  f'--labels={tmp_path}/labels.csv')
    assert result.code == 0 and result.out.count('Grün ') == 5, result.err


def test_a_set_without_test_split_and_folds_says_so(straight, data_dir):                    # noqa: F811
    with pytest.raises(DataError, match='no test split and no folds') as error:
        open_test('demo_train', os.path.dirname(make_without_test(data_dir)))
    assert '?' not in str(error.value)


def make_without_test(data_dir):
    folder = os.path.join(data_dir, 'no_test', 'demo_train')
    shutil.copytree(os.path.join(data_dir, 'noises'), folder, dirs_exist_ok=True)
    with open(os.path.join(folder, 'meta.json')) as f:
        meta = json.load(f)
    del meta['splits']['test']
    with open(os.path.join(folder, 'meta.json'), 'w') as f:
        json.dump(meta, f)
    return folder


# ------------------------------------------------------------------------------ prefixes, precision, what is not finite

@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', '_orig_mod.module.', 'module._orig_mod.'])
def test_wrapped_names_are_read(straight, pretrained, tmp_path, prefix):                    # noqa: F811
    """Ours and the authors', of either stage: the weights of the plain file."""
    for number, path in enumerate((pretrained, f'{straight}/best.pt', f'{FIXTURES}/authors_tiny_pretrain.pt',
                                   f'{FIXTURES}/eat_tiny_finetune.pt')):
        state = torch.load(path, weights_only=True)
        state['model'] = {prefix + name: weight for name, weight in state['model'].items()}
        torch.save(state, tmp_path / 'wrapped.pt')
        plain, wrapped = open_checkpoint(path), open_checkpoint(str(tmp_path / 'wrapped.pt'))
        assert (plain.classifier is None) == (wrapped.classifier is None) == (number in (0, 2))
        for a, b in zip((plain.classifier or plain.encoder).state_dict().items(),
                        (wrapped.classifier or wrapped.encoder).state_dict().items()):
            assert a[0] == b[0] and torch.equal(a[1], b[1])
    state['model']['x'] = state['model'][f'{prefix}x'] = torch.zeros(1)
    torch.save(state, tmp_path / 'wrapped.pt')
    with pytest.raises(CheckpointError, match='wrapped.pt'):
        open_checkpoint(str(tmp_path / 'wrapped.pt'))


NAN_WEIGHTS = {'pretrained': 'encoder.blocks.0.attn.qk.weight', 'tuned': 'head.bias',
               'authors_tiny_pretrain.pt': 'blocks.1.mlp.fc1.weight', 'eat_tiny_finetune.pt': 'head.weight',
               'authors_tiny_finetune.pt': 'model.modality_encoders.IMAGE.extra_tokens',
               'eat_tiny_pretrain.pt': 'blocks.0.attn.qkv.bias'}
OURS = {'blocks.1.mlp.fc1.weight': 'blocks.1.mlp.0.weight', 'blocks.0.attn.qkv.bias': 'blocks.0.attn.qk.bias',
        'model.modality_encoders.IMAGE.extra_tokens': 'encoder.cls'}


@pytest.mark.parametrize('value', [float('nan'), float('-inf')])
@pytest.mark.parametrize('kind', NAN_WEIGHTS)
def test_a_weight_that_is_not_finite_is_named(straight, pretrained, data_dir, tmp_path, kind, value):       # noqa: F811
    """In every mode, and in a fine-tuning from it; nothing is written."""
    path, weight = {'pretrained': pretrained, 'tuned': f'{straight}/best.pt'}.get(kind, f'{FIXTURES}/{kind}'), None
    weight = NAN_WEIGHTS[kind]
    state = torch.load(path, weights_only=True)
    state['model'][weight].view(-1)[3 % state['model'][weight].numel()] = value
    torch.save(state, tmp_path / 'odd.pt')
    tones(tmp_path, 'a.wav')
    for run, options in ((evaluation.run, ['--dataset=noises']), (evaluation.run, [f'--wav={tmp_path}/a.wav']),
                         (evaluation.run, [f'--wav={tmp_path}/a.wav', f'--embed={tmp_path}/x.npz']),
                         (finetune.run, ['--dataset=noises', '--device=cpu', f'--out_dir={tmp_path}/out'])):
        result = call(run, f'--ckpt={tmp_path}/odd.pt', f'--data_dir={data_dir}', *options)
        assert is_one_line_error(result, 'odd.pt', OURS.get(weight, weight), 'finite')
    assert not [file for file in os.listdir(tmp_path) if file not in ('odd.pt', 'a.wav', 'out')]
    assert not [file for _, _, files in os.walk(tmp_path / 'out') for file in files if file != '.lock']


@pytest.mark.parametrize('kind', ['weight of 1e30', 'lambda', 'mean'])
def test_outputs_that_are_not_finite_give_no_score_and_no_file(straight, pretrained, data_dir, tmp_path, kind):  # noqa: F811
    """Finite weights can be too large, and a checkpoint holds other numbers than weights."""
    tones(tmp_path, 'a.wav')
    for path in (pretrained, f'{straight}/best.pt'):
        state = torch.load(path, weights_only=True)
        if kind == 'weight of 1e30':
            state['model']['encoder.norm.weight'].fill_(1e30)
            state['model']['encoder.norm.bias'].fill_(3e38)
            state['model']['encoder.norm.weight'][:2] = 3.4e38
            state['model'].update({name: weight.fill_(3e38) for name, weight in state['model'].items()
                                   if name in ('head.weight', 'head_norm.weight')})
        elif kind == 'lambda':
            state['config']['attn_scale'] = float('nan')
        else:
            state['input']['mean'] = float('nan')
        torch.save(state, tmp_path / 'odd.pt')
        base = [f'--ckpt={tmp_path}/odd.pt', f'--data_dir={data_dir}']
        if 'best' in path:
            csv_file = f'--csv_file={tmp_path}/x.csv'
            for options in (['--dataset=noises'], ['--dataset=noises', '--hop=0.3'], [f'--wav={tmp_path}/a.wav']):
                result = call(evaluation.run, *base, *options, csv_file)
                assert is_one_line_error(result, 'odd.pt') and ' nan' not in result.out
        else:
            assert is_one_line_error(call(evaluation.run, *base, '--dataset=noises'), 'odd.pt')
        for options in ([f'--wav={tmp_path}/a.wav'], ['--dataset=noises']):
            assert is_one_line_error(call(evaluation.run, *base, *options, f'--embed={tmp_path}/x.npz'), 'odd.pt')
        assert sorted(os.listdir(tmp_path)) == ['a.wav', 'odd.pt']


def test_patches_that_float16_cannot_hold_are_not_written(pretrained, tmp_path):            # noqa: F811
    state = torch.load(pretrained, weights_only=True)
    state['model']['encoder.blocks.1.norm2.weight'] *= 1e6
    torch.save(state, tmp_path / 'odd.pt')
    tones(tmp_path, 'a.wav')
    assert is_one_line_error(call(evaluation.run, f'--ckpt={tmp_path}/odd.pt', f'--wav={tmp_path}/a.wav',
                                  f'--embed={tmp_path}/x.npz', '--patches'), 'odd.pt', 'float16')
    assert sorted(os.listdir(tmp_path)) == ['a.wav', 'odd.pt']


@pytest.mark.parametrize('value, fits', [(65504, True), (-65504, True), (65600, False), (-65600, False)])
def test_the_largest_number_of_float16_fits(tmp_path, value, fits):
    """In one patch of one clip."""
    x = np.zeros((3, 5, 4), np.float32)
    x[1, 4, 2] = value
    arguments = f'{tmp_path}/x.npz', {'patches': (x.shape, np.float16)}, [(np.arange(3), {'patches': x})], {}, True
    if not fits:
        with pytest.raises(NotFiniteError, match='float16 cannot hold'):
            write_arrays(*arguments)
        return
    write_arrays(*arguments)
    assert np.load(tmp_path / 'x.npz')['patches'][1, 4, 2] == value


@pytest.mark.parametrize('multi_label', [False, True])
@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_no_metric_of_outputs_that_are_not_finite(multi_label, value):
    logits, targets = np.zeros((4, 3), np.float32), np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    logits[2, 1] = value
    with pytest.raises(NotFiniteError, match='not finite'):
        metrics(logits, targets, multi_label)


def test_the_head_computes_in_float32(straight, data_dir, tmp_path):                        # noqa: F811
    """In bfloat16 logits have 8 bits, and rank otherwise: here all clips tie but for float32."""
    loaded = open_checkpoint(f'{straight}/best.pt')
    with torch.no_grad():
        loaded.classifier.head.bias.fill_(1000.0)
    clips = open_clips(['noises'], data_dir, ['train', 'test'])
    autocast = processes.autocast(CPU, 'bfloat16')[0]
    logits = predict(loaded.classifier, clips, loaded.spectrum, CPU, autocast)
    assert logits.dtype == np.float32 and len(np.unique(logits[:, 0])) > len(clips) // 2
    features = []
    handle = loaded.classifier.head_norm.register_forward_hook(lambda module, args, x: features.append((args[0], x)))
    predict(loaded.classifier, clips, loaded.spectrum, CPU, autocast, batch_size=len(clips))
    handle.remove()
    (pooled, normed), = features
    classifier = loaded.classifier
    want = torch.nn.functional.layer_norm(pooled.float(), pooled.shape[1:], classifier.head_norm.weight,
                                          classifier.head_norm.bias, classifier.head_norm.eps)
    torch.testing.assert_close(normed, want)
    with torch.no_grad():
        want = normed @ classifier.head.weight.T + classifier.head.bias
    torch.testing.assert_close(torch.from_numpy(logits), want)
    labels = np.eye(2)[clips.label]
    result, _ = metrics(logits, labels, True)
    assert result['mAP'] == pytest.approx(average_precision_score(labels, logits), abs=1e-9)


# -------------------------------------------------------------------------------------------------- hostile checkpoints

WORDS = {'later version': 'version 99', 'text for a number': 'diff_lambda',
         'unknown field': 'newer code, whose model has surprise'}


def tampered(state, kind):
    name = 'encoder.blocks.0.attn.qk.weight'
    if kind == 'missing weight':
        del state['model'][name]
    elif kind == 'extra weight':
        state['model']['encoder.extra'] = torch.zeros(3)
    elif kind == 'other shape':
        state['model'][name] = torch.zeros(3, 3)
    elif kind == 'integers':
        state['model'][name] = state['model'][name].to(torch.int64)
    elif kind == 'more than is stored':
        state['model'][name] = torch.zeros(1).expand(state['model'][name].shape)
    elif kind == 'complex numbers':
        state['model'][name] = state['model'][name].to(torch.complex64)
    elif kind == 'no tensor':
        state['model'][name] = 'text'
    elif kind == 'other config':
        state['config']['n_embd'] = 64
    elif kind == 'odd config':
        state['config'] = {'n_layer': 'many'}
    elif kind == 'unknown field':
        state['config']['surprise'] = 1
    elif kind == 'no config':
        del state['config']
    elif kind == 'no input':
        del state['input']
    elif kind == 'later version':
        state['version'] = 99
    elif kind == 'version of tensors':
        state['version'] = torch.ones(2)
    elif kind == 'absurd size':
        state['config']['ffn_ratio'] = 3e4
    elif kind == 'text for a number':
        state['config']['diff_lambda'] = 'a'
    elif kind == 'no spread':
        state['input']['std'] = 0.0
    elif kind == 'no mean':
        state['input']['mean'] = float('nan')
    elif kind == 'odd repeat':
        state['input']['repeat'] = torch.ones(3)
    elif kind == 'number for a name':
        state['model'][7] = torch.zeros(3)
    elif kind == 'sparse weight':
        state['model'][name] = state['model'][name].to_sparse()
    return state


@pytest.mark.parametrize('kind', ['missing weight', 'extra weight', 'other shape', 'integers', 'no tensor',
                                  'more than is stored', 'complex numbers', 'other config', 'odd config',
                                  'unknown field', 'no config',
                                  'no input', 'later version', 'version of tensors', 'absurd size', 'text for a number',
                                  'no spread', 'no mean', 'odd repeat', 'number for a name', 'sparse weight'])
def test_a_tampered_checkpoint_is_named(pretrained, data_dir, tmp_path, kind):              # noqa: F811
    state = tampered(torch.load(pretrained, weights_only=True), kind)
    torch.save(state, tmp_path / 'odd.pt')
    assert is_one_line_error(call(evaluation.run, f'--ckpt={tmp_path}/odd.pt', '--dataset=noises',
                                  f'--data_dir={data_dir}'), 'odd.pt', *([WORDS[kind]] if kind in WORDS else []))


def test_a_file_below_the_present_folder_may_be_written(tmp_path, monkeypatch):
    """An input that is not named, '', is not the present folder."""
    monkeypatch.chdir(tmp_path)
    os.mkdir('out')
    check_output('out/x.csv', '.csv', 'out/ckpt.pt', '')
    with pytest.raises(ConfigError, match='would overwrite out'):
        check_output('out/x.csv', '.csv', 'out', '')
