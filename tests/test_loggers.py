"""TensorBoard and Weights & Biases beside log.jsonl.   python -m pytest tests/test_loggers.py"""
import glob
import importlib
import json
import math
import os
import sys

import pytest
import torch

import finetune
import pretrain
from engine import loggers, logs, processes
from engine.errors import RunError

from .conftest import call, is_one_line_error
from .test_pretrain import RUN, log_of

# What the code uses of wandb, as its documentation has it (wandb.init, Settings; Run.define_metric, log, finish).
WANDB = '''
runs = []


class Settings:
    def __init__(self, console):
        self.console = console


class Run:
    def __init__(self, named):
        self.named, self.lines, self.finished, self.axes = named, [], False, {}

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, data):
        self.lines.append(dict(data))

    def finish(self):
        self.finished = True


def init(project, name, dir, id, resume, config, allow_val_change, settings):
    runs.append(Run(dict(project=project, name=name, dir=dir, id=id, resume=resume, config=dict(config))))
    return runs[-1]
'''


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A stand-in that notes what it is told."""
    (tmp_path / 'packages').mkdir()
    (tmp_path / 'packages' / 'wandb.py').write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / 'packages')
    monkeypatch.delitem(sys.modules, 'wandb', raising=False)
    yield importlib.import_module('wandb')
    sys.modules.pop('wandb', None)


def interrupted_and_resumed(data_dir, out, monkeypatch, *argv):
    """A run that ends in its fifth step, two after a checkpoint, and goes on."""
    plain = pretrain.update

    def update(model, optimizer, step, settings):
        if step == 4:
            raise RunError('the power went')
        return plain(model, optimizer, step, settings)
    with monkeypatch.context() as patched:
        patched.setattr(pretrain, 'update', update)
        assert call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={out}', *argv).code == 1
    assert [line['step'] for line in log_of(out)] == [1, 2, 3, 4]
    result = call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={out}', *argv, '--resume')
    assert result.code == 0 and 'warning' not in result.out, result


def test_wandb_has_what_the_log_has_in_one_run(wandb, data_dir, tmp_path, monkeypatch):
    out = str(tmp_path / 'nightly')
    interrupted_and_resumed(data_dir, out, monkeypatch, '--loggers=wandb')
    first, second = wandb.runs
    assert first.named['id'] == second.named['id'] and second.named['resume'] == 'allow'
    assert first.finished and second.finished and first.axes == {'*': 'step'}
    assert first.named['name'] == 'nightly' and first.named['dir'] == out and first.named['config']['lr'] == 1e-2
    assert [line['step'] for line in first.lines + second.lines] == [1, 2, 3, 4, 4, 5, 6]
    assert first.lines[3]['loss'] == second.lines[0]['loss']                # the same run: the same number twice
    for line, logged in zip(first.lines[:3] + second.lines, log_of(out)):
        assert {**logged, 'clips_per_second': line['clips_per_second']} == line
    assert call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={out}', '--loggers=wandb',
                '--overwrite').code == 0
    assert wandb.runs[2].named['id'] != first.named['id'] and len(wandb.runs[2].lines) == 6


def scalars(folder):
    """{name: [(step, value)]} of the event files in a folder, as TensorBoard itself reads them."""
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    found = reader.EventAccumulator(str(folder))
    found.Reload()
    return {name: [(each.step, each.value) for each in found.Scalars(name)] for name in found.Tags()['scalars']}


def test_tensorboard_has_what_the_log_has_each_step_once(data_dir, tmp_path, monkeypatch):
    pytest.importorskip('tensorboard')
    interrupted_and_resumed(data_dir, tmp_path / 'run', monkeypatch, '--loggers=tensorboard')
    shown, lines = scalars(tmp_path / 'run'), log_of(tmp_path / 'run')
    assert {'loss', 'frame', 'lr', 'grad_norm', 'clips_per_second'} <= set(shown) and 'step' not in shown
    for name in ('loss', 'utterance', 'ema'):
        assert shown[name] == [(line['step'], pytest.approx(line[name], rel=1e-6)) for line in lines]
    assert len(glob.glob(f'{tmp_path}/run/events.out.tfevents.*')) == 2
    assert call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/run', '--overwrite').code == 0
    assert not glob.glob(f'{tmp_path}/run/events*')                         # none of the run that is gone


def test_evaluations_and_both_at_once(wandb, data_dir, tmp_path):
    argv = ['--init=scratch', '--dataset=demo', '--max_steps=2', '--warmup_steps=1', '--batch_size=4', '--workers=0',
            '--n_layer=1', '--n_head=2', '--n_embd=32', '--frames=64', '--eval_interval=2', '--log_interval=1',
            '--loggers=wandb', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/tuned', '--device=cpu']
    result = call(finetune.run, *argv)
    assert result.code == 0, result.err
    with open(tmp_path / 'tuned' / 'log.jsonl') as f:
        valid = [line['valid'] for line in map(json.loads, f) if 'valid' in line]
    told = [line for line in wandb.runs[0].lines if 'valid/accuracy' in line]
    assert valid and [line['valid/accuracy'] for line in told] == [each['accuracy'] for each in valid]


def test_which_numbers_of_a_line_are_told():
    line = {'loss': 1.5, 'valid': {'accuracy': 0.5, 'names': ['a'], 'more': {'mAP': 1}}, 'is_best': True, 'why': 'x',
            'nothing': None, 'lost': math.nan}
    found = dict(loggers.numbers_in(line))
    assert math.isnan(found.pop('lost')) and found == {'loss': 1.5, 'valid/accuracy': 0.5, 'valid/more/mAP': 1}


@pytest.mark.parametrize('fault', ['def init(**_): raise OSError("no route to the server\\nsecond line")',
                                   'Run.log = lambda self, data: 1 / 0', 'Run.finish = lambda self: 1 / 0', 'del init'])
def test_a_logger_that_fails_costs_one_warning(wandb, data_dir, tmp_path, fault):
    exec(fault, vars(wandb))
    result = call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/run', '--loggers=wandb')
    assert result.code == 0 and result.out.count('warning: wandb failed') == 1, result
    assert 'second line' not in result.out and [line['step'] for line in log_of(tmp_path / 'run')] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize('names, words', [('wandb', ['wandb', 'pip install wandb']), ('tensorbord', ['tensorbord']),
                                          ('wandb,mlflow', ['wandb'])])
def test_one_that_is_missing_is_one_line(data_dir, tmp_path, monkeypatch, names, words):
    (tmp_path / 'wandb').mkdir()                                            # as W&B itself leaves one behind
    monkeypatch.setattr(sys, 'path', [str(tmp_path), *(path for path in sys.path
                                                       if not os.path.exists(f'{path}/wandb/sdk'))])
    importlib.invalidate_caches()
    for stage in (pretrain, finetune):
        result = call(stage.run, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/run', f'--loggers={names}')
        assert is_one_line_error(result, *words) and not os.path.exists(tmp_path / 'run')


def test_none_is_touched_unless_asked_for(wandb, data_dir, tmp_path):
    assert call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/run').code == 0
    assert wandb.runs == [] and not glob.glob(f'{tmp_path}/run/events*')


def test_only_the_first_process_tells(wandb, tmp_path):
    for rank in (1, 0):
        log = logs.Log(str(tmp_path), processes.Process(rank, 2, torch.device('cpu')))
        log.write(start=0)
        log.share(['wandb'], {}, print)
        log.write(step=1, loss=2.0)
        log.close()
        assert len(wandb.runs) == 1 - rank
    assert wandb.runs[0].lines == [{'step': 1, 'loss': 2.0}]
