"""The experiments' script on a tiny task.   python -m pytest tests/test_results.py"""
import json
import os
import shutil
import types

import numpy as np
import pytest
import torch

from audio.clips import open_clips
from tools import results, stages

from .conftest import ROOT, call, is_one_line_error
from .test_finetune import RUN as FINETUNE
from .test_finetune import pretrained  # noqa: F401  (a fixture)

ACCURACY = {0.002: 0.6, 0.001: 0.9, 0.0005: 0.5}            # of the pretended runs, by learning rate


@pytest.fixture
def task(tmp_path, monkeypatch):
    """One task of three updates in place of the README's."""
    words = [argument[2:].split('=') for argument in FINETUNE if '=' in argument]
    (tmp_path / 'tiny.py').write_text(
        ''.join(f'{name} = {value if value[0].isdigit() else repr(value)}\n' for name, value in words)
        + "pooling = 'mean'\n")
    monkeypatch.setattr(results, 'TASKS', {'noises': ([str(tmp_path / 'tiny.py')], 3)})


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """finetune.py commands that write a log at once -> the commands that were run."""
    commands = []

    def run(command, **_):
        commands.append(command)
        given = dict(word[2:].split('=') for word in command if word.startswith('--') and '=' in word)
        accuracy = ACCURACY[float(given['lr'])] - 0.01 * (int(given['max_steps']) > 3)
        lines = [{'start': 0, 'commit': 'c0ffee', 'device': 'a CPU'}, {'step': 1, 'valid': {'accuracy': accuracy}},
                 {'test': {'best': {'accuracy': 1 - accuracy, 'right': round(10 - 10 * accuracy), 'clips': 10}}}]
        os.makedirs(given['out_dir'], exist_ok=True)
        with open(os.path.join(given['out_dir'], 'log.jsonl'), 'w') as f:
            f.writelines(json.dumps(line) + '\n' for line in lines)
        return types.SimpleNamespace(returncode=0, stderr='')
    monkeypatch.setattr(stages.subprocess, 'run', run)
    monkeypatch.setattr(results, 'LENGTHS', (1, 2))
    return commands


def rows_of(path):
    with open(path) as f:
        return json.load(f)['rows']


def test_every_arm_is_tuned_run_and_found_again(pretrained, data_dir, tmp_path, task):          # noqa: F811
    base = [f'--ckpt={pretrained}', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out', '--jobs=2',
            '--seeds=2', f'--json_file={tmp_path}/results/tiny.json']
    first = call(results.run, *base)
    assert first.code == 0, first.err
    shown = [line for line in first.out.splitlines() if line.startswith('| ')]
    rows = rows_of(tmp_path / 'results' / 'tiny.json')
    assert len(rows) == 8 and shown[0] == '| | noises | mean |' and len(shown) == 9
    for name, cells in rows.items():
        mean = sum(100 * score['accuracy'] for score in cells['noises']) / 2
        assert len(cells['noises']) == 2 and f'| {name} | {results.cell(cells["noises"])} | {mean:.1f} |' in shown
        assert all(score['commit'] is not None and score['device'] for score in cells['noises'])
    best = rows['fine-tuned, pretrained']['noises'][0]
    folder = best['command'][-1].removeprefix('--out_dir=')
    log = results.log_lines(folder)
    assert log[-1]['test']['best'].items() <= best.items()
    assert best['validation'] == max(line['valid']['accuracy'] for line in log if 'valid' in line)
    made = {folder: os.path.getmtime(f'{tmp_path}/out/{folder}/log.jsonl')
            for folder in os.listdir(tmp_path / 'out') if not folder.endswith('.pt')}
    again = call(results.run, *base)
    assert again.out.splitlines()[-9:] == first.out.splitlines()[-9:]       # the same table, and nothing was run again
    assert made == {folder: os.path.getmtime(f'{tmp_path}/out/{folder}/log.jsonl') for folder in made}
    assert call(results.run, '--show', f'--json_file={tmp_path}/results/tiny.json').out == '\n' + '\n'.join(
        first.out.splitlines()[-10:]) + '\n'


def test_a_run_is_found_by_content_and_settings(pretrained, data_dir, tmp_path, task, pretended):       # noqa: F811
    """Other weights or clips under the same path, or another setting in the config file, are other runs."""
    shutil.copy(pretrained, tmp_path / 'ckpt.pt')
    shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'data' / 'noises')
    base = [f'--ckpt={tmp_path}/ckpt.pt', f'--data_dir={tmp_path}/data', f'--out_dir={tmp_path}/out', '--seeds=1',
            f'--json_file={tmp_path}/x.json', '--arms=pretrained']

    def runs():
        before = len(pretended)
        result = call(results.run, *base)
        assert result.code == 0, result.err
        return len(pretended) - before
    assert runs() == 4 and runs() == 0                                      # three rates, then the longer of one
    state = torch.load(tmp_path / 'ckpt.pt', weights_only=True)
    state['model']['encoder.cls'] += 1
    torch.save(state, tmp_path / 'ckpt.pt')
    assert runs() == 4 and runs() == 0
    copy = [word for word in pretended[-1] if word.startswith('--ckpt=')][0][7:]
    assert torch.load(copy, weights_only=True)['model']['encoder.cls'].equal(state['model']['encoder.cls'])
    index = dict(np.load(tmp_path / 'data' / 'noises' / 'train-00000.npz'))
    index['stats'] = index['stats'] * 1.001                                 # other sounds of the same names
    np.savez(tmp_path / 'data' / 'noises' / 'train-00000.npz', **index)
    assert runs() == 4 and runs() == 0
    with open(tmp_path / 'tiny.py', 'a') as f:
        f.write('weight_decay = 0.25\n')
    assert runs() == 4 and runs() == 0
    with open(tmp_path / 'tiny.py', 'a') as f:
        f.write('save_interval = 2\n')                                      # changes no number
    assert runs() == 0


def test_validation_chooses_and_the_file_says_what_was_run(pretrained, data_dir, tmp_path, task, pretended):  # noqa: F811
    """The pretended runs are best by validation at 1e-3 and three updates, and worst there by the test part."""
    result = call(results.run, f'--ckpt={pretrained}', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out',
                  f'--json_file={tmp_path}/x.json', '--arms=pretrained', '--seeds=3')
    assert result.code == 0, result.err
    scores = rows_of(tmp_path / 'x.json')['fine-tuned, pretrained']['noises']
    assert [score['validation'] for score in scores] == [0.9] * 3 and [score['right'] for score in scores] == [1] * 3
    for seed, score in enumerate(scores, 1):
        assert {'--lr=0.001', '--max_steps=3', f'--seed={seed}'} <= set(score['command'])
        assert (score['commit'], score['device']) == ('c0ffee', 'a CPU')
    assert '| fine-tuned, pretrained | 10.0 % (1 of 10) | 10.0 |' in result.out


def test_probes_are_told_what_the_task_says(tmp_path, monkeypatch):
    """Set, fold, labels and seed of the fine-tuning reach the probes."""
    (tmp_path / 'tiny.py').write_text("dataset = 'digits'\nfold = 'theo'\nlabels_per_class = 7\n")
    monkeypatch.setattr(results, 'TASKS', {'digits': ([str(tmp_path / 'tiny.py'), '--frames=96'], 3)})
    commands = []
    monkeypatch.setattr(results.evaluation, 'run', lambda command: commands.append(command) or {
        'CLS': {'kNN': {'accuracy': 0.5, 'right': len(commands), 'clips': 2}}})
    settings = types.SimpleNamespace(ckpt=['x1.pt', 'x2.pt'], data_dir='sets', seeds=2, pool='bands', features_file='')
    found = results.probes(settings, 'digits')
    assert [set(command) for command in commands] == [
        {f'--ckpt=x{seed}.pt', '--dataset=digits', '--data_dir=sets', '--fold=theo', '--labels_per_class=7',
         '--pool=bands', f'--seed={seed}', '--device=cpu', '--threads=1'} for seed in (1, 2)]
    assert list(found) == ['kNN, CLS'] and [score['right'] for score in found['kNN, CLS']] == [1, 2]
    assert [score['command'] for score in found['kNN, CLS']] == [['eval.py', *command] for command in commands]
    commands.clear()
    settings.features_file, settings.ckpt = 'of-{set}.npz', []
    results.probes(settings, 'digits')
    assert [command[:2] + command[5:6] for command in commands] == [
        ['--features_file=of-digits.npz', '--dataset=digits', f'--seed={seed}'] for seed in (1, 2)]


def test_features_of_other_programs_in_the_table(data_dir, tmp_path, task):
    """Every array is a row of each probe, without a checkpoint and whatever --arms says."""
    clips = open_clips(['noises'], data_dir, ['train', 'test'])
    np.savez(tmp_path / 'of-noises.npz', names=np.array(clips.keys()), told=np.eye(4)[clips.label])
    result = call(results.run, f'--features_file={tmp_path}/of-{{set}}.npz', f'--data_dir={data_dir}', '--seeds=2',
                  f'--json_file={tmp_path}/x.json', f'--out_dir={tmp_path}/out')
    assert result.code == 0, result.err
    rows = rows_of(tmp_path / 'x.json')
    assert list(rows) == ['kNN, told', 'linear probe, told']
    assert all(score['accuracy'] == 1 for row in rows.values() for score in row['noises'])


def test_each_seed_has_its_checkpoint(pretrained, data_dir, tmp_path, task, pretended):          # noqa: F811
    for seed in (1, 2):
        state = torch.load(pretrained, weights_only=True)
        state['model']['encoder.cls'] += seed
        torch.save(state, tmp_path / f'c{seed}.pt')
    result = call(results.run, f'--ckpt={tmp_path}/c{{seed}}.pt', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out',
                  f'--json_file={tmp_path}/x.json', '--arms=pretrained', '--seeds=2')
    assert result.code == 0, result.err
    given = {(word['seed'], word['ckpt']) for word in
             (dict(word[2:].split('=') for word in command if '=' in word) for command in pretended)}
    clss = {seed: torch.load(path, weights_only=True)['model']['encoder.cls'] for seed, path in given}
    assert len(given) == 2 and (clss['2'] - clss['1'] - 1).abs().max() < 1e-6
    with open(tmp_path / 'x.json') as f:
        stored = json.load(f)
    assert stored['checkpoints'] == [f'{tmp_path}/c1.pt', f'{tmp_path}/c2.pt'] and len(set(stored['sha256'])) == 2


def test_cells_hold_mean_spread_and_counts():
    """Reference: numpy."""
    scores = [{'accuracy': right / 80, 'right': right, 'clips': 80} for right in (65, 63, 70)]
    spread = np.std([100 * 65 / 80, 100 * 63 / 80, 100 * 70 / 80], ddof=1)
    assert results.cell(scores) == f'82.5 ± {spread:.1f} % (65 / 63 / 70 of 80)'
    assert results.cell(scores[:1]) == results.cell([scores[0]] * 2) == '81.2 % (65 of 80)'
    assert results.table({'a': {'x': scores[:1]}, 'b': {'y': scores[:1]}}).splitlines() == [
        '| | x | y | mean |', '|---|---|---|---|', '| a | 81.2 % (65 of 80) |  | 81.2 |',
        '| b |  | 81.2 % (65 of 80) | 81.2 |']


def test_every_task_is_a_command_that_finetune_takes():
    found = {}
    for task, ((config, *arguments), updates) in (results.TASKS | results.LABELS | results.FOLDS).items():
        how = results.configured([os.path.join(ROOT, config), *arguments])
        assert how.max_steps == updates, task
        found[task] = how.dataset, how.fold, how.labels_per_class
    assert [found[task] for task in results.FOLDS] == [('esc10', str(fold), 0) for fold in range(1, 6)]
    assert found['FSDD, unheard speaker'] == ('fsdd', 'theo', 0) and found['wakewords, 50'] == ('wakewords', '', 50)


@pytest.mark.parametrize('argv, word', [(['--arms=all'], 'arms'), (['--tasks=all'], 'tasks'), (['--jobs=0'], 'jobs'),
                                        (['--seed=3'], 'seeds'), (['--json_file=x.md'], 'x.md'),
                                        (['--ckpt=/absent.pt'], '/absent.pt'),
                                        (['--show', '--json_file=/absent.json'], '/absent.json')])
def test_wrong_settings(argv, word, tmp_path):
    assert is_one_line_error(call(results.run, f'--out_dir={tmp_path}', *argv), word)
