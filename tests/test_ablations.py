"""The tables of short pre-trainings: from commands to words.   python -m pytest tests/test_ablations.py"""
import json
import statistics
import types

import pytest

import pretrain
from engine import processes
from tools import ablations, stages

from .conftest import TINY, call, is_one_line_error


@pytest.fixture
def how(data_dir, tmp_path, monkeypatch):
    """Options of a tiny table; commands run in this process and are counted."""
    words = [option[2:].split('=') for option in TINY]
    values = ''.join(f'{name} = {value if value[0].isdigit() else repr(value)}\n' for name, value in words)
    (tmp_path / 'tiny.py').write_text(values + 'dataset = "noises"\nbatch_size = 8\nlog_interval = 1\n')
    commands = []

    def run(command, **_):
        commands.append(command)
        made = call(pretrain.run, *command[2:])
        return types.SimpleNamespace(returncode=made.code, stderr=made.err)
    monkeypatch.setattr(stages, 'subprocess', types.SimpleNamespace(run=run))
    monkeypatch.setattr(processes.Stop, '__enter__', lambda self: self)     # signals are the main thread's alone
    monkeypatch.setattr(processes.Stop, '__exit__', lambda *_: None)
    return commands, ['--jobs=1', f'--config={tmp_path}/tiny.py', '--max_steps=3', '--warmup_steps=1',
                      '--eval_dataset=noises', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/runs',
                      f'--json_file={tmp_path}/a.json']


def test_a_table_is_made_once_from_what_the_logs_say(how, tmp_path):
    commands, options = how
    made = call(ablations.run, *options, '--tables=utterance', '--seeds=2')
    assert made.code == 0 and len(commands) == 6, made.err
    stored = json.loads((tmp_path / 'a.json').read_text())['utterance']
    assert list(stored) == ['1, normed', '192, normed', '1, raw'] and all(len(runs) == 2 for runs in stored.values())
    assert str(tmp_path) not in json.dumps([run['commit'] for runs in stored.values() for run in runs])
    for row, runs in stored.items():
        for seed, run in enumerate(runs, 1):
            assert f'--seed={seed}' in run['command'] and run['updates'] == 3 and run['seconds'] > 0
        logged = json.loads((tmp_path / 'runs' / sorted(p.name for p in (tmp_path / 'runs').iterdir())[0] /
                             'log.jsonl').read_text().splitlines()[-1])
        assert 'probe' in logged
        mean = 100 * statistics.mean(run['probe'] for run in runs)
        own = 100 * statistics.mean(run['random'] for run in runs)
        line = next(line for line in made.out.splitlines() if line.startswith(f'| {row} | '))
        assert f'| {row} | {mean:.1f} ± ' in line and f'| {own:.1f} ± ' in line
    assert 'random weights' in made.out and 'log-mel' in made.out
    again = call(ablations.run, *options, '--tables=utterance', '--seeds=2')
    assert again.code == 0 and len(commands) == 6
    assert call(ablations.run, f'--json_file={tmp_path}/a.json', '--show').out.strip() in again.out
    (tmp_path / 'b.json').write_text(json.dumps({'lambda': stored}))       # made before
    assert call(ablations.run, *options[:-1], f'--json_file={tmp_path}/b.json', '--tables=utterance',
                '--seeds=2').code == 0
    assert json.loads((tmp_path / 'b.json').read_text()) == {'lambda': stored, 'utterance': stored}


def test_equal_time_is_as_many_updates_as_fit(how, monkeypatch):
    commands, options = how
    monkeypatch.setitem(ablations.TABLES, 'students', ('Students', {
        '3': [], '1': ['--n_students=1'], '1, time of 3': ['--n_students=1', 'x2']}))
    made = call(ablations.run, *options, '--tables=students', '--seeds=1')
    assert made.code == 0, made.err
    steps = [part for command in commands for part in command if part.startswith('--max_steps')]
    assert steps == ['--max_steps=3', '--max_steps=3', '--max_steps=6']
    assert [word for word in commands[2] if word.startswith(('--warmup', '--ema', '--eval_i', '--n_st'))] == [
        '--warmup_steps=2', '--ema_steps=6', '--eval_interval=6', '--n_students=1']


def test_differences_are_called_so_only_beyond_the_spread():
    assert ablations.difference([0.5, 0.52, 0.54], [0.6, 0.62, 0.64]) == '+10.0'
    assert ablations.difference([0.6, 0.62, 0.64], [0.5, 0.52, 0.54]) == '-10.0'
    assert ablations.difference([0.5, 0.6, 0.7], [0.55, 0.65, 0.75]) == 'none seen'
    assert ablations.difference([0.5], [0.9]) == 'one seed'
    assert ablations.spread([0.5, 0.6]) == '55.0 ± 7.1' and ablations.spread([0.5]) == '50.0'
    lines = [{'time': time, 'step': step} for step, time in enumerate([10.0, 12.0, 112.0, 114.0])]
    assert ablations.seconds_per_step(lines) == 2.0


@pytest.mark.parametrize('option, word', [('--tables=x', 'tables'), ('--seeds=0', 'seeds'), ('--jobs=0', 'jobs'),
                                          ('--max_steps=1', 'max_steps'), ('--config=absent.py', 'absent.py')])
def test_bad_options(option, word):
    assert is_one_line_error(call(ablations.run, option), word)
    assert is_one_line_error(call(ablations.run, '--show', '--json_file=absent.json'), 'absent.json')


def test_a_run_that_fails_is_named(how, monkeypatch, tmp_path):
    monkeypatch.setattr(stages, 'subprocess', types.SimpleNamespace(
        run=lambda *_, **__: types.SimpleNamespace(returncode=3, stderr='error: a reason')))
    made = call(ablations.run, *how[1], '--tables=utterance', '--seeds=1')
    assert made.code == 1 and 'a reason' in made.err and made.err.count('\n') == 1
    monkeypatch.undo()                                                      # a process, whose mistake is the user's
    assert is_one_line_error(call(ablations.run, *how[1], '--tables=utterance', '--seeds=1', f'--data_dir={tmp_path}'),
                             'noises')
