"""Metrics against scikit-learn, probes, and every mode of eval.py.   python -m pytest tests/test_eval.py"""
import csv
import os
import shutil
import time
from statistics import NormalDist

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

import data
import eval as evaluation
from audio import frames_in, samples_for
from audio.clips import Clips, open_clips
from checkpoints.opening import open_checkpoint
from engine import processes
from scoring.metrics import describe, metrics, ranking_scores
from scoring.probes import (
    PROBE_L2,
    effective_rank,
    features,
    fit_logistic,
    knn_accuracy,
    knn_scores,
    linear_probe,
    log_mel_statistics,
)

from .conftest import ROOT, SHARED, call, is_one_line_error, needs_shared, write_wav
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


def test_accuracy_counts():
    logits, labels = np.eye(4)[[0, 1, 2, 3, 3]], np.eye(4)[[0, 1, 2, 2, 3]]
    result, rows = metrics(logits, labels, False)
    assert (result['right'], result['clips'], result['accuracy']) == (4, 5, 0.8) and rows[2] == (2, 0.5)
    assert describe(result) == 'accuracy 80.0% (4 of 5)'


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
    assert knn_accuracy(x, y, t, z) == pytest.approx((ours.argmax(1) == z).mean())
    assert knn_accuracy(x, y, x, y, k=1) == 1.0


@pytest.mark.parametrize('strength', [1e-3, 1e-1])
def test_logistic_regression_is_scikit_learns(strength):
    x, y = blobs(0)
    ours = fit_logistic(torch.from_numpy(x).double(), torch.eye(4)[y].double(), strength, False,
                                   torch.zeros(11, 4, dtype=torch.float64))
    theirs = LogisticRegression(C=1 / (strength * len(x)), tol=1e-10, max_iter=10000).fit(x.astype(np.float64), y)
    np.testing.assert_allclose(x @ ours[1:].numpy() + ours[0].numpy()
                               - (x @ ours[1:].numpy() + ours[0].numpy()).mean(1, keepdims=True),
                               theirs.decision_function(x) - theirs.decision_function(x).mean(1, keepdims=True),
                               atol=2e-3)


def test_probe_chooses_its_strength_on_the_validation_part():
    (x, y), (v, w), (t, z) = blobs(0, 40, d=40), blobs(1, 400, d=40), blobs(2, 400, d=40)
    logits, strength = linear_probe((x, np.eye(4)[y]), (v, np.eye(4)[w]), t, False)
    mean, std = x.mean(0), x.std(0) + 1e-6
    best = max(LogisticRegression(C=1 / (s * 40), max_iter=5000).fit((x - mean) / std, y).score((v - mean) / std, w)
               for s in PROBE_L2)
    chosen = LogisticRegression(C=1 / (strength * 40), max_iter=5000).fit((x - mean) / std, y)
    assert chosen.score((v - mean) / std, w) == pytest.approx(best, abs=0.01)
    assert (logits.argmax(1) == z).mean() == pytest.approx(chosen.score((t - mean) / std, z), abs=0.02)
    many = linear_probe((x, np.eye(4)[y]), (v, np.eye(4)[w]), t, True)[0]
    assert metrics(many, np.eye(4)[z], True)[0]['mAP'] > 0.5


def test_effective_rank():
    rng = np.random.default_rng(0)
    assert effective_rank(np.outer(rng.standard_normal(500), rng.standard_normal(8))) == pytest.approx(
        1, abs=1e-3)
    assert effective_rank(rng.standard_normal((5000, 8))) > 7.9


def test_features_ignore_padding_and_do_not_depend_on_the_batch(data_dir, pretrained):      # noqa: F811
    loaded = open_checkpoint(pretrained)
    clips = open_clips(['noises'], data_dir)
    big, small = (features(loaded.encoder.eval(), clips, loaded.spectrum, CPU, torch.no_grad,
                                      batch_size=size) for size in (64, 3))
    for a, b in zip(big, small):
        np.testing.assert_allclose(a, b, atol=1e-5)
    shortest = int(np.argmin(clips.length))
    rows = -(-int(frames_in(clips.length[shortest])) // 16)
    batch = data.stack([clips.read(shortest, count=samples_for(64))], samples_for(64))
    with torch.no_grad():
        x = loaded.encoder(data.log_mel(batch['pcm'], batch['lengths'], **loaded.spectrum))
    np.testing.assert_allclose(big[1][shortest], x[0, 1:1 + min(rows, 4) * 8].mean(0), atol=1e-5)


def test_log_mel_statistics_are_over_real_frames(data_dir):
    clips = open_clips(['noises'], data_dir)
    frames = int(frames_in(clips.length.max()))
    got = log_mel_statistics(clips, {'frames': frames, 'window': 'hamming', 'mean': 0.0, 'std': 0.5,
                                                'repeat': False}, CPU, batch_size=5)
    for i in (0, 3):
        wave = torch.from_numpy(clips.read(i).astype(np.float32) / 32768)[None]
        x = data.fbank(wave - wave.mean(), torch.tensor([wave.shape[1]]))[0]
        np.testing.assert_allclose(got[i], torch.cat([x.mean(0), x.std(0, unbiased=False)]), atol=1e-3)


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
                  '--labels_per_class=5')
    assert result.code == 0, result.err
    for name in ('log-mel statistics', 'CLS', 'mean of patches'):
        line = next(line for line in result.out.splitlines() if line.startswith(name))
        assert 'kNN: accuracy' in line and 'linear probe: accuracy' in line and 'of 40)' in line


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
    result = call(evaluation.run, f'--ckpt={FIXTURES}/{file}', f'--wav={tmp_path}/a.wav')
    assert result.code == 0 and result.out.count('class ') == 5, result.err


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
    with open(tmp_path / 'windows.csv', newline='') as f:
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
    (900, 1000, [0]), (3500, 1000, [0]), (3600, 1000, [0, 1000]), (10000, 4000, [0, 4000, 8000]),
    (12000, 4000, [0, 4000, 8000, 11000]), (7000, 500, [0, 500, 1000, 1500, 2000, 2500, 3000, 3500])])
def test_windows_cover_a_clip_but_for_a_tail_shorter_than_a_patch(length, hop, starts):
    clips = Clips([], {'offset': np.array([0, 50]), 'length': np.array([length, 10])}, [])
    windows = clips.windows(1000, hop)
    assert windows.start.tolist() == [*starts, 0] and windows.clip.tolist() == [0] * len(starts) + [1]
    assert windows.length.tolist() == [min(length, 1000)] * len(starts) + [10]
    assert windows.offset.tolist() == [*starts, 50]


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
                f'--embed={tmp_path}/x.npz').code == 0
    with np.load(tmp_path / 'x.npz') as stored:
        assert stored['start'].tolist() == [0, 0.5, 1.0, 1.36] and stored['cls'].shape == (4, 32)


@pytest.mark.parametrize('ckpt', ['pretrained', 'finetuned', 'authors', 'eat'])
def test_embeddings_of_files_and_sets(straight, pretrained, data_dir, tmp_path, ckpt):      # noqa: F811
    path = {'pretrained': pretrained, 'finetuned': f'{straight}/best.pt',
            'authors': f'{FIXTURES}/authors_tiny_pretrain.pt', 'eat': f'{FIXTURES}/eat_tiny_finetune.pt'}[ckpt]
    D, P = (32, 32) if ckpt in ('pretrained', 'finetuned') else (64, 64)
    for name, seconds in (('a', 0.3), ('b', 2.0)):
        write_wav(str(tmp_path / f'{name}.wav'), 0.3 * np.sin(np.arange(int(16000 * seconds)) / 5))
    result = call(evaluation.run, f'--ckpt={path}', f'--wav={tmp_path}/a.wav,{tmp_path}/b.wav',
                  f'--embed={tmp_path}/files.npz')
    assert result.code == 0, result.err
    with np.load(tmp_path / 'files.npz') as stored:
        assert (stored['names'].tolist() == [f'{tmp_path}/a.wav', f'{tmp_path}/b.wav']
                and stored['cls'].shape == stored['mean'].shape == (2, D))
        assert (stored['patches'].shape == (2, P, D) and stored['patches'].dtype == np.float16
                and stored['sound'][0] == 28)
    assert call(evaluation.run, f'--ckpt={path}', '--dataset=noises', f'--data_dir={data_dir}',
                f'--embed={tmp_path}/set.npz').code == 0
    with np.load(tmp_path / 'set.npz') as stored:
        assert len(set(stored['names'].tolist())) == 24 == len(stored['cls'])
        seen = (stored['sound'] + 15) // 16 * 8                             # patches that hold sound
        for mean, patches, count in zip(stored['mean'], stored['patches'].astype(float), seen):
            np.testing.assert_allclose(mean, patches[:count].mean(axis=0), atol=2e-3)       # float16


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
    (['--ckpt={pretrained}', '--dataset=absent'], ['absent']), (['--ckpt={pretrained}', '--wav=a.wav'], ['fine-tune']),
    (['--ckpt={tuned}', '--wav=/absent.wav'], ['/absent.wav']),
    (['--ckpt={tuned}', '--wav={tmp}/junk.pt'], ['junk.pt']), (['--ckpt={tuned}', '--dataset=demo'], ['classes']),
    (['--ckpt={pretrained}', '--embed=x.npz'], ['--dataset']),
    (['--ckpt={pretrained}', '--dataset=noises', '--frames=50'], ['frames = 50']),
    (['--ckpt={tuned}', '--wav=,'], ['names no file']), (['--ckpt={tuned}', '--top_k=-1', '--wav=x'], ['top_k']),
    (['--ckpt={tuned}', '--norm_std=0', '--wav=x'], ['norm_std']),
    (['--ckpt={tuned}', '--batch_size=0'], ['batch_size']),
    (['--ckpt={tuned}', '--window=1', '--frames=64'], ['--window', '--frames']),
    (['--ckpt={tuned}', '--window=0.001'], ['window = 0.001']), (['--ckpt={tuned}', '--hop=-1'], ['hop']),
    (['--ckpt={tuned}', '--csv_file={tmp}'], ['{tmp}']),
    (['--ckpt={tuned}', '--wav={tmp}/short.wav'], ['short.wav', 'shorter than one window'])])
def test_bad_input(straight, pretrained, data_dir, tmp_path, argv, words):                  # noqa: F811
    (tmp_path / 'junk.pt').write_bytes(b'nothing of use' * 100)
    write_wav(str(tmp_path / 'short.wav'), np.zeros(300))
    argv = [argument.format(tmp=tmp_path, pretrained=pretrained, tuned=f'{straight}/best.pt') for argument in argv]
    words = [word.format(tmp=tmp_path) for word in words]
    assert is_one_line_error(call(evaluation.run, f'--data_dir={data_dir}', *argv), *words)


# -------------------------------------------------------------------------------------------------- hostile checkpoints

WORDS = {'later version': 'version 99', 'text for a number': 'diff_lambda', 'unknown field': 'surprise'}


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
    elif kind == 'number for a name':
        state['model'][7] = torch.zeros(3)
    elif kind == 'sparse weight':
        state['model'][name] = state['model'][name].to_sparse()
    return state


@pytest.mark.parametrize('kind', ['missing weight', 'extra weight', 'other shape', 'integers', 'no tensor',
                                  'other config', 'odd config', 'unknown field', 'no config', 'no input',
                                  'later version', 'version of tensors', 'absurd size', 'text for a number',
                                  'no spread', 'number for a name', 'sparse weight'])
def test_a_tampered_checkpoint_is_named(pretrained, data_dir, tmp_path, kind):              # noqa: F811
    state = tampered(torch.load(pretrained, weights_only=True), kind)
    torch.save(state, tmp_path / 'odd.pt')
    assert is_one_line_error(call(evaluation.run, f'--ckpt={tmp_path}/odd.pt', '--dataset=noises',
                                  f'--data_dir={data_dir}'), 'odd.pt', *([WORDS[kind]] if kind in WORDS else []))
