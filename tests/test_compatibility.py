"""What earlier code wrote, read by the code of today: a prepared set, checkpoints, logs.

tests/fixtures/v1 holds a prepared set of 22 clips (prepared/sounds), a pre-training run and a fine-tuning run that a
signal ended after step 3 of 6 (pretrained, finetuned), and in expected.json and expected.npz the command lines and what
the same code made of them in the rest of an uninterrupted run, on a CPU with one thread. The numbers are the code's
own: that they are right, other tests say; here they must stay.
    python -m pytest tests/test_compatibility.py

Tolerance: the same sums in another order differ by 1e-7 of a value. AdamW's first steps are near lr * sign(gradient),
which enlarges that where a gradient is near zero. (Measured: with two threads, or with a LayerNorm's weight multiplied
in another place, weights move by less than 1e-6, losses by 3e-7.) Steps of other batches, masks or settings differ
by 1e-3 and more. The keys' biases have no gradient but rounding, and may be anything.
"""
import contextlib
import csv
import json
import os
import shutil
import wave

import numpy as np
import pytest
import torch

import eval as evaluation
import finetune
import pretrain
from audio import frames_in
from audio.clips import task_splits
from checkpoints.opening import open_checkpoint
from engine import processes
from scoring.features import features, log_mel_statistics
from scoring.probes import PROBE_L2, fit_logistic, outputs, standardised

from .conftest import ROOT, call

V1 = os.path.join(ROOT, 'tests', 'fixtures', 'v1')
PLAIN = ['--workers=0', '--threads=1', '--dtype=float32', '--device=cpu']


@pytest.fixture(scope='module')
def expected():
    with open(os.path.join(V1, 'expected.json')) as f, np.load(os.path.join(V1, 'expected.npz')) as arrays:
        return {**json.load(f), **arrays}


@pytest.fixture
def old(tmp_path):
    """A copy of the fixture, since runs go on in their folders."""
    return shutil.copytree(V1, tmp_path / 'v1')


def log_after(folder, step):
    """Lines of log.jsonl after a step -> [{name: number}] without what is measured by the clock."""
    with open(os.path.join(folder, 'log.jsonl')) as f:
        return [line for line in map(json.loads, f) if line.get('step', 0) > step]


def assert_same_weights(path, want):
    """A checkpoint's model equals the vector of all its weights in the order of their names, keys' biases apart."""
    model = torch.load(path, weights_only=True)['model']
    assert sum(tensor.numel() for tensor in model.values()) == len(want)
    first = 0
    for name in sorted(model):
        ours = model[name].numpy().ravel()
        theirs, first = want[first:first + len(ours)], first + len(ours)
        if name.endswith('attn.qk.bias'):
            ours, theirs = ours[:len(ours) // 2], theirs[:len(ours) // 2]
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=name)


def assert_same_lines(lines, wanted):
    """Every number that the old log had, nested ones too; new ones may have come."""
    def compare(ours, theirs, where):
        if isinstance(theirs, dict):
            for name in theirs:
                compare(ours[name], theirs[name], f'{where} {name}')
        else:
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), where
    assert len(lines) == len(wanted)
    for ours, theirs in zip(lines, wanted):
        compare(ours, theirs, f'step {theirs["step"]}')


def test_a_pretraining_run_goes_on(old, expected):
    """Steps 4 to 6 after the old checkpoint: the old run's losses, and every weight of student, teacher, decoder."""
    result = call(pretrain.run, *expected['pretrain'], '--resume', f'--data_dir={old}/prepared',
                  f'--out_dir={old}/pretrained')
    assert result.code == 0 and 'going on after step 3' in result.out and 'warning' not in result.out, result.err
    assert_same_lines(log_after(old / 'pretrained', 3), expected['pretrain_log'])
    assert_same_weights(old / 'pretrained' / 'ckpt.pt', expected['pretrained'])


def test_a_finetuning_run_goes_on(old, expected):
    """The same of the classifier, with its validation and its test."""
    result = call(finetune.run, *expected['finetune'], '--resume', f'--ckpt={old}/pretrained/ckpt.pt',
                  f'--data_dir={old}/prepared', f'--out_dir={old}/finetuned')
    assert result.code == 0 and 'going on after step 3' in result.out and 'warning' not in result.out, result.err
    assert_same_lines(log_after(old / 'finetuned', 3), expected['finetune_log'])
    assert_same_weights(old / 'finetuned' / 'ckpt.pt', expected['finetuned'])


def test_a_finetuning_run_starts_from_the_old_checkpoint(old, expected, tmp_path):
    """From the beginning: architecture, window and weights come from the old file, and the old run comes out."""
    result = call(finetune.run, *expected['finetune'], f'--ckpt={old}/pretrained/ckpt.pt', f'--data_dir={old}/prepared',
                  f'--out_dir={tmp_path}/again')
    assert result.code == 0, result.err
    assert_same_lines(log_after(tmp_path / 'again', 3), expected['finetune_log'])
    assert_same_weights(tmp_path / 'again' / 'ckpt.pt', expected['finetuned'])


@pytest.mark.parametrize('kind, file', [('pretrained', 'ckpt.pt'), ('finetuned', 'best.pt')])
def test_old_checkpoints_embed_alike(old, expected, kind, file):
    """CLS of the last block for the first window of every clip; mean of its patches with sound, which are float16."""
    layers = torch.load(old / kind / file, weights_only=True)['config']['n_layer']
    result = call(evaluation.run, f'--ckpt={old}/{kind}/{file}', '--dataset=sounds', f'--embed={old}/out.npz',
                  f'--data_dir={old}/prepared', '--pool=cls', f'--layer={layers}', '--patches', *PLAIN)
    assert result.code == 0, result.err
    with np.load(old / 'out.npz') as found:
        first = found['start'] == 0
        assert found['names'][first].tolist() == expected['names']
        np.testing.assert_allclose(found['cls'][first], expected[f'embedded_{kind}_cls'], rtol=1e-4, atol=1e-5)
        means = [patches[:-(-int(sound) // 16) * 8].astype(float).mean(axis=0)
                 for patches, sound in zip(found['patches'][first], found['sound'][first])]
        np.testing.assert_allclose(means, expected[f'embedded_{kind}_mean'], atol=2e-3)


def scores_of(text):
    """Every 'accuracy ... (3 of 5)' -> [[3, 5], ...]"""
    return [[int(word) for word in part.split(')')[0].split(' of ')] for part in text.split('(')[1:] if ' of ' in part]


def test_probes_of_the_old_checkpoint(old, expected):
    """Linear probes of log-mel statistics and of the last block's CLS, their strength chosen as it was then: the one of
    best accuracy on validation clips, of equals the strongest. (kNN is of standardised features since.)"""
    loaded, process = open_checkpoint(f'{old}/pretrained/ckpt.pt'), processes.start('cpu', 1)
    *parts, whole = task_splits('sounds', f'{old}/prepared')
    mean, std = whole.statistics(loaded.spectrum['window'])
    spectrum = {**loaded.spectrum, 'mean': mean, 'std': std}
    longest = max(int(frames_in(part.length).max()) for part in parts)

    def right(of_part):
        x, v, t = standardised(*(of_part(part) for part in parts))
        targets, label, wanted = (part.targets(np.arange(len(part))) for part in parts)
        weight, best = None, (-1, 0)
        for strength in sorted(PROBE_L2, reverse=True):
            weight = fit_logistic(x, targets, strength, False, weight)
            valid, test = (int((outputs(part, weight).argmax(1) == of.argmax(1)).sum())
                           for part, of in ((v, label), (t, wanted)))
            best = max(best, (valid, test), key=lambda pair: pair[0])       # the first of equals
        return [best[1], len(wanted)]
    assert right(lambda part: log_mel_statistics(part, {**spectrum, 'frames': longest, 'repeat': False}, process)
                 ) == expected['probe'][1]
    assert right(lambda part: features(loaded.encoder, part, spectrum, process, contextlib.nullcontext, 'cls',
                                       loaded.config.n_layer)) == expected['probe'][3]


def test_the_old_classifier_classifies_alike(old, expected):
    """Its accuracy on the test split, and the probabilities of that split's clips as files (four digits in the CSV)."""
    base = [f'--ckpt={old}/finetuned/best.pt', f'--data_dir={old}/prepared', *PLAIN]
    result = call(evaluation.run, *base, f'--csv_file={old}/classes.csv')
    assert result.code == 0 and scores_of(result.out) == expected['classifier'], result.err
    folder = os.path.join(old, 'prepared', 'sounds')
    pcm, files = np.fromfile(os.path.join(folder, 'test-00000.pcm'), '<i2'), []
    with np.load(os.path.join(folder, 'test-00000.npz')) as index:
        for i, (offset, length) in enumerate(zip(index['offsets'], index['lengths'])):
            files.append(os.path.join(old, f'{i}.wav'))
            with wave.open(files[-1], 'wb') as f:
                f.setnchannels(1)
                f.setsampwidth(2)
                f.setframerate(16000)
                f.writeframes(pcm[offset:offset + length].tobytes())
    result = call(evaluation.run, *base, f'--wav={",".join(files)}', f'--csv_file={old}/windows.csv')
    assert result.code == 0, result.err
    with open(old / 'windows.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    found = [[float(row['noise']), float(row['tone'])] for row in rows]
    np.testing.assert_allclose(found, expected['probabilities'], atol=1.5e-4)
