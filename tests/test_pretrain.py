"""Pre-training as a run: schedules, processes and accumulation, resuming, refusals.
   python -m pytest tests/test_pretrain.py"""
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import data
import prepare
import pretrain
from audio.clips import open_clips
from checkpoints import authors
from configurator import configure
from engine import processes, saving
from engine.errors import ConfigError, DataError, RunError
from fast import kernels
from scoring import monitor
from tools import bench, learned

from .conftest import ROOT, TINY, call, is_one_line_error, script
from .test_prepare import fsdd_files, zipped

RUN = [*TINY, '--dataset=noises', '--batch_size=8', '--max_steps=6', '--warmup_steps=2', '--log_interval=1',
       '--save_interval=3', '--lr=1e-2']


def settings(*argv):
    return configure(os.path.join(ROOT, 'pretrain.py'), list(argv), (os.path.join(ROOT, 'model.py'), 'ASDAConfig'))


def log_of(out_dir):
    """The training lines of a log, without what is measured by the clock."""
    with open(os.path.join(out_dir, 'log.jsonl')) as f:
        lines = [json.loads(line) for line in f]
    return [{key: value for key, value in line.items() if key not in ('time', 'clips_per_second', 'seconds_left')}
            for line in lines if 'step' in line]


def weights_of(out_dir):
    return saving.load_checkpoint(os.path.join(out_dir, 'ckpt.pt'))


def same_state(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_state(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_state, a, b))
    return a == b


@pytest.fixture(scope='module')
def straight(data_dir, tmp_path_factory):
    """An uninterrupted run in one process."""
    out = str(tmp_path_factory.mktemp('straight'))
    result = call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={out}')
    assert result.code == 0, result.err
    return out


@pytest.fixture(scope='module')
def begun(data_dir, straight, tmp_path_factory):
    """A run of one step at no learning rate that began with the weights of another."""
    out = str(tmp_path_factory.mktemp('begun'))
    result = call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={out}', f'--init={straight}/ckpt.pt',
                  '--lr=0', '--ema_start=1', '--ema_end=1', '--max_steps=1', '--warmup_steps=0', '--dataset=demo',
                  '--seed=9')
    assert result.code == 0, result.err
    return out


def test_a_run_begins_with_the_weights_of_another(straight, begun, data_dir, tmp_path):
    """Encoder, decoder and teacher; of the authors' checkpoints too; on other sounds; resumed without that file."""
    assert same_state(weights_of(begun)['model'], weights_of(straight)['model'])
    theirs = os.path.join(ROOT, 'tests', 'fixtures', 'authors_tiny_pretrain.pt')
    want = authors.load_pretrained(theirs)
    sizes = [f'--{name}={value}' for name, value in dataclasses.asdict(want.config).items()]
    how = [*sizes, '--dataset=noises', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/theirs', '--batch_size=2',
           f'--init={tmp_path}/theirs.pt', '--lr=0', '--ema_start=1', '--ema_end=1', '--warmup_steps=0', '--workers=0',
           '--mask_block=2']
    shutil.copy(theirs, tmp_path / 'theirs.pt')
    made = call(pretrain.run, *how, '--max_steps=1')
    assert made.code == 0, made.err
    assert same_state(weights_of(tmp_path / 'theirs')['model'], want.state_dict())
    os.remove(tmp_path / 'theirs.pt')
    resumed = call(pretrain.run, *how, '--max_steps=2', '--resume')
    assert resumed.code == 0 or 'max_steps' in resumed.err, resumed.err


@pytest.mark.parametrize('options, words', [
    (['--init=/absent.pt'], ['/absent.pt']), (['--n_layer=1'], ['n_layer']), (['--head_norm=all'], ['head_norm']),
    (['--diff_lambda=0.5'], ['diff_lambda']), (['--n_embd=64'], ['n_embd'])])
def test_what_a_run_cannot_begin_with(straight, data_dir, tmp_path, options, words):
    result = call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out',
                  f'--init={straight}/ckpt.pt', *options)
    assert is_one_line_error(result, *words)
    fine_tuned = os.path.join(ROOT, 'tests', 'fixtures', 'eat_tiny_finetune.pt')
    assert is_one_line_error(call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out',
                                  f'--init={fine_tuned}'), 'eat_tiny_finetune.pt', 'fine-tuned')
    assert not os.path.exists(tmp_path / 'out' / 'ckpt.pt')


def test_schedules():
    s = settings('--lr=1.0', '--warmup_steps=10', '--max_steps=110', '--ema_start=0.5', '--ema_end=0.9',
                 '--ema_steps=4')
    assert [pretrain.lr_at(step, s) for step in (0, 5, 10)] == [0.0, 0.5, 1.0]
    assert pretrain.lr_at(60, s) == pytest.approx(0.5) and pretrain.lr_at(110, s) == pytest.approx(0.0, abs=1e-12)
    assert [pretrain.ema_decay_at(step, s) for step in (0, 2, 4, 99)] == pytest.approx([0.5, 0.7, 0.9, 0.9])
    s = settings('--lr=1.0', '--warmup_steps=0', '--max_steps=100')
    assert [pretrain.lr_at(step, s) for step in (0, 50)] == pytest.approx([1.0, 0.5])


def test_the_demo_is_made_where_it_is_missing(data_dir, tmp_path, monkeypatch):
    made = []

    def fake(argv):
        made.append(argv)
        shutil.copytree(os.path.join(data_dir, 'demo'), tmp_path / 'demo')
    monkeypatch.setattr(prepare, 'run', fake)
    process = processes.Process(0, 1, torch.device('cpu'))
    for _ in range(2):                                                      # the second time it is there
        assert len(pretrain.training_clips(settings('--dataset=demo', f'--data_dir={tmp_path}'), process)) > 100
        assert made == [['demo', f'--out_dir={tmp_path}/demo', '--workers=0']]
    with pytest.raises(DataError, match='noises'):                          # no other set is made
        pretrain.training_clips(settings('--dataset=noises', f'--data_dir={tmp_path}'), process)


def test_optimizer_decays_matrices_only_unless_told(capsys):
    from model import ASDA
    process = processes.Process(0, 1, torch.device('cpu'))
    for flag, vectors in (('--decay_vectors=False', 0.0), ('--decay_vectors=True', 0.05)):
        s = settings(*TINY, flag)
        model = ASDA(pretrain.model_config(s))
        decay = {id(p): group['weight_decay'] for group in pretrain.make_optimizer(model, s, process).param_groups
                 for p in group['params']}
        for name, p in model.named_parameters():
            if not name.startswith('teacher'):
                is_vector = name.endswith('.bias') or 'norm' in name or name == 'encoder.cls'
                assert decay.pop(id(p)) == (vectors if is_vector else 0.05), name
        assert not decay
        assert ('decay too' if vectors else 'do not') in capsys.readouterr().out


@pytest.mark.parametrize('argv, why', [
    (['--mask_block=4', '--mask_ratio=0.75', '--mask_adjust=0.0'], None),                   # one block of 16 patches
    (['--mask_block=4', '--mask_ratio=0.78', '--mask_adjust=0.0'], 'keep 14 at mask_ratio = 0.78: no block of 4 x 4'),
    (['--mask_block=1', '--mask_ratio=0.98', '--mask_adjust=0.0'], None),                   # one patch of 64
    (['--mask_block=1', '--mask_ratio=0.99', '--mask_adjust=0.5'], 'keep 0 at'),
    (['--mask_block=9'], 'mask_block = 9 does not fit the 8 x 8 grid'), (['--mask_block=8', '--mask_ratio=0.1',
                                                                          '--mask_adjust=0.2'], None),
    (['--drop_path=0.1'], 'drop_path = 0.1 must be 0'), (['--n_mels=64'], 'n_mels = 64 must be 128'),
    (['--pooling=bands'], 'pooling = bands must be cls or mean')])
def test_masks_need_a_block_and_a_patch(argv, why):
    given = settings(*TINY, '--frames=128', *argv)
    if why is None:
        assert pretrain.model_config(given).frames == 128
        return
    with pytest.raises(ConfigError, match=re.escape(why)):
        pretrain.model_config(given)


def test_cuda_graphs_take_one_process_and_one_part():
    for mode, graphs in (('default', False), ('reduce-overhead', True), ('max-autotune-no-cudagraphs', False),
                         ('max-autotune', True)):
        for world, parts in ((1, 1), (2, 1), (1, 2)):
            given = settings(*TINY, f'--compile_mode={mode}', f'--accumulate={parts}')
            if graphs and world * parts > 1:
                with pytest.raises(ConfigError, match=f'{mode} takes one process and accumulate = 1'):
                    pretrain.check(given, world)
            else:
                pretrain.check(given, world)


def test_a_collapse_is_a_variance_below_a_twentieth(capsys):
    def said(variance, lowest):
        given = settings(*TINY, f'--min_target_var={lowest}', '--lr=1.0', '--warmup_steps=10', '--ema_steps=4',
                         '--ema_start=0.5', '--ema_end=0.9')
        run = types.SimpleNamespace(settings=given, process=processes.Process(0, 1, torch.device('cpu')),
                                    what_is_saved=lambda: 'nothing is saved')
        values = {'step': 4, 'target_std': variance ** 0.5, 'loss': 1.5, 'content': 0.25, 'place': 0.5}
        words = pretrain.report(values, run)
        assert words == 'loss 1.500  content 25.0%  place 50.0%'
        assert pretrain.report({**values, 'content': math.nan}, run) == 'loss 1.500'        # of one clip
        assert values['lr'] == pytest.approx(0.3) and values['ema'] == pytest.approx(0.8)       # of the third update
        return capsys.readouterr().out
    assert said(0.051, 0.0) == '' and said(0.051, 0.05) == ''
    assert said(0.049, 0.048).startswith('warning: the variance of the targets is 0.049, the teacher is collapsing')
    with pytest.raises(RunError, match='fell to 0.049, below min_target_var = 0.05: .* nothing is saved'):
        said(0.049, 0.05)


def test_a_run_logs_learns_and_can_be_read(straight):
    lines = log_of(straight)
    assert [line['step'] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]['loss'] < lines[0]['loss']
    for key in ('loss', 'frame', 'utterance', 'target_std', 'pred_std', 'explained', 'content', 'place', 'grad_norm',
                'lr', 'ema'):
        assert all(key in line for line in lines)
    assert sorted(os.listdir(straight)) == ['ckpt.1.pt', 'ckpt.pt', 'log.jsonl']
    state = weights_of(straight)
    assert ({'model', 'config', 'optimizer', 'step', 'settings', 'metrics', 'version', 'commit'} <= set(state)
            and state['step'] == 6)
    assert state['metrics']['loss'] == lines[-1]['loss'] and state['config']['n_embd'] == 32


def test_the_same_run_again_gives_the_same_bits_with_workers_too(straight, data_dir, tmp_path):
    assert call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/again', '--workers=2').code == 0
    assert log_of(straight) == log_of(tmp_path / 'again')
    assert same_state(weights_of(straight)['model'], weights_of(tmp_path / 'again')['model'])


def test_accumulated_and_distributed_runs_equal_one_process(straight, data_dir, tmp_path):
    accumulated, distributed = str(tmp_path / 'accumulated'), str(tmp_path / 'distributed')
    assert call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={accumulated}', '--accumulate=2').code == 0
    result = script('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'pretrain.py', *RUN,
                    f'--data_dir={data_dir}', f'--out_dir={distributed}')
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    want = log_of(straight)
    for out in (accumulated, distributed):
        got = log_of(out)
        assert len(got) == len(want)
        stored = weights_of(out)['metrics']                                 # of all processes, as the log has them
        assert [stored[key] for key in ('loss', 'explained')] == [got[-1][key] for key in ('loss', 'explained')]
        for ours, theirs in zip(got, want):
            for key in ('loss', 'frame', 'utterance', 'grad_norm'):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (out, ours['step'], key)
        for name, tensor in weights_of(out)['model'].items():
            if name.endswith('attn.qk.bias'):
                tensor, other = tensor[:64], weights_of(straight)['model'][name][:64]   # Q; K's true gradient is zero
            else:
                other = weights_of(straight)['model'][name]
            torch.testing.assert_close(tensor, other, atol=2e-5, rtol=1e-4, msg=name)


def test_two_launchers_are_one_run(straight, data_dir, tmp_path):
    """torchrun once per node, as over a network, here twice on one machine: the same losses as one process."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    command = [sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--rdzv_id=1',
               '--rdzv_backend=c10d', f'--rdzv_endpoint=127.0.0.1:{port}', 'pretrain.py', *RUN,
               f'--data_dir={data_dir}', f'--out_dir={tmp_path}/nodes']
    nodes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env={**os.environ, 'OMP_NUM_THREADS': '1'}) for _ in range(2)]
    said = [node.communicate(timeout=120)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sum('step 6/6' in text for text in said) == 1                    # one of all processes speaks
    for ours, theirs in zip(log_of(tmp_path / 'nodes'), log_of(straight), strict=True):
        assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-5)


@pytest.mark.parametrize('processes', [1, 2])
def test_no_step_waits_for_the_device(data_dir, tmp_path, processes):
    """Once a run is under way, a step reads no number from a tensor; of several processes each reads one, whether any
    of them was asked to stop, which lies on the CPU wherever the model is."""
    result = script('-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}',
                    'tests/count_reads.py', *RUN, '--max_steps=10', '--save_interval=100', f'--data_dir={data_dir}',
                    f'--out_dir={tmp_path}/out')
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    counts = [list(map(int, line.split()[1:])) for line in result.stdout.splitlines() if line.startswith('reads')]
    assert len(counts) == processes
    for steps in counts:
        assert {after - before for before, after in zip(steps[1:9], steps[2:10])} == {processes - 1}, counts
    assert max(steps[-1] - steps[-2] for steps in counts) > 0               # the checkpoint at the end reads some


def test_kernels_change_nothing_and_the_checkpoint_remembers_them(straight, data_dir, tmp_path, monkeypatch):
    """The plain expressions in the kernels' place: the same run, with the layers that were chosen, after a stop too."""
    used = set()

    def noting(name):
        def plain(*arguments):
            used.add(name)
            return kernels.EXPRESSIONS[name][0](*arguments)
        return plain
    monkeypatch.setattr(kernels, 'grouped_conv', noting('conv'))
    monkeypatch.setattr(kernels, 'diff_attention', noting('attention'))
    monkeypatch.setattr(kernels, 'diff_attention_fits', lambda N, d, dtype: N <= 7)         # 1 + 6 of 32 patches
    monkeypatch.setattr(kernels, 'unusable', lambda device: None)
    monkeypatch.setattr(kernels, 'examine', lambda name, *_: (2.0, {'conv': 1.0, 'attention': 3.0}[name]))
    base = [*RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out']
    result = call(pretrain.run, *base, '--max_steps=3', '--warmup_steps=2')
    assert result.code == 0 and used == {'conv'}, result.err
    assert 'conv by Triton: forward and backward 1.00 ms' in result.out and 'attention by PyTorch' in result.out
    assert weights_of(tmp_path / 'out')['settings']['kernels'] == 'conv'
    used.clear()
    monkeypatch.setattr(kernels, 'choose', None)                            # what goes on does not choose again
    assert call(pretrain.run, *base, '--max_steps=4', '--resume').code == 0 and used == {'conv'}
    result = call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/both',
                  '--kernels=conv,attention')
    assert result.code == 0 and used == {'conv', 'attention'}
    for ours, theirs in zip(log_of(tmp_path / 'both'), log_of(straight), strict=True):
        assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-5)


def test_resuming_goes_on_with_the_very_same_run(straight, data_dir, tmp_path):
    out = str(tmp_path / 'resumed')
    shutil.copytree(straight, out)
    os.replace(os.path.join(out, 'ckpt.1.pt'), os.path.join(out, 'ckpt.pt'))                # as it was after step 3
    assert weights_of(out)['step'] == 3
    with open(os.path.join(out, 'log.jsonl'), 'a') as f:
        f.write('{"step": 9, "lo')                                                          # a line torn by a crash
    result = call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={out}', '--resume')
    assert result.code == 0 and 'going on after step 3' in result.out and 'warning' not in result.out
    assert log_of(out) == log_of(straight)
    assert same_state(weights_of(out)['model'], weights_of(straight)['model'])
    assert same_state(weights_of(out)['optimizer'], weights_of(straight)['optimizer'])


def test_sigterm_saves_and_says_how_to_go_on(straight, data_dir, tmp_path):
    out = str(tmp_path / 'stopped')
    command = [sys.executable, 'pretrain.py', *RUN, '--max_steps=100000', f'--data_dir={data_dir}', f'--out_dir={out}',
               '--save_interval=100000']
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'})
    for line in running.stdout:
        if line.startswith('step 3/'):
            break
    running.send_signal(signal.SIGTERM)
    rest, errors = running.communicate(timeout=60)
    assert running.returncode == 0 and 'saved; to go on, run the same command with --resume' in rest, errors
    assert weights_of(out)['step'] == log_of(out)[-1]['step'] >= 3


def test_a_truncated_checkpoint_is_replaced_by_the_one_before(straight, data_dir, tmp_path):
    out = str(tmp_path / 'truncated')
    shutil.copytree(straight, out)
    os.truncate(os.path.join(out, 'ckpt.pt'), 5000)
    result = call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={out}', '--resume')
    assert result.code == 0 and 'warning' in result.out and 'going on after step 3' in result.out
    assert log_of(out) == log_of(straight) and same_state(weights_of(out)['model'], weights_of(straight)['model'])


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    path = str(tmp_path / 'ckpt.pt')
    saving.save_checkpoint(path, {'model': {}, 'config': {}, 'settings': {}, 'step': 1})

    def full(*_):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(RunError, match='No space left.*one before it is intact'):
        saving.save_checkpoint(path, {'model': {}, 'config': {}, 'settings': {}, 'step': 2})
    assert saving.load_checkpoint(path)['step'] == 1 and os.listdir(tmp_path) == ['ckpt.pt']


def test_a_loss_that_stays_nan_stops_the_run_and_names_the_clips(data_dir, tmp_path):
    result = call(pretrain.run, *RUN, '--lr=1e30', '--warmup_steps=1', '--grad_clip=0', '--max_bad_steps=2',
                  '--max_steps=30', '--save_interval=100', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/nan')
    assert (result.code == 1 and '2 steps in a row' in result.err and '.wav' in result.err
            and f'{tmp_path}/nan holds no checkpoint' in result.err and 'Traceback' not in result.err)
    assert result.out.count('has a gradient that is not finite; skipped') == 2


def test_the_mode_of_compilation_is_passed_on(data_dir, tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, mode=None: modes.append(mode))
    monkeypatch.setattr(processes, 'can_compile', lambda process: True)
    assert call(pretrain.run, *RUN, '--max_steps=3', '--compile', '--compile_mode=max-autotune',
                f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out').code == 0
    assert call(bench.run, *RUN, '--what=step', '--steps=1', '--warmup=0', '--compile',
                '--compile_mode=reduce-overhead', f'--data_dir={data_dir}').code == 0
    assert modes == ['max-autotune', 'reduce-overhead']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_noise_belongs_to_a_place_in_the_batch(dtype):
    s = settings(*TINY, f'--dtype={dtype}')
    config, cpu = pretrain.model_config(s), torch.device('cpu')
    noise = pretrain.mask_noise(s, config, 3, range(4), cpu)
    assert noise.shape == (4 * config.n_students, math.prod(config.grid), config.n_embd)
    assert noise.dtype == getattr(torch, dtype) and noise.float().std().item() == pytest.approx(0.01, rel=0.05)
    first, second = (pretrain.mask_noise(s, config, 3, places, cpu) for places in (range(2), range(2, 4)))
    assert torch.equal(noise, torch.cat([first, second])) and not torch.equal(first, second)
    assert not torch.equal(noise, pretrain.mask_noise(s, config, 4, range(4), cpu))


@pytest.mark.parametrize('argv, words', [
    (['--frames=64', '--mask_block=5'], ['mask_block = 5', '4 x 8']),
    (['--frames=128', '--mask_block=5'], ['64 patches', 'mask_block']), (['--frames=50'], ['frames = 50']),
    (['--frames=123200'], ['frames = 123200', 'too long']), (['--n_head=3'], ['n_embd = 32', 'n_head = 3']),
    (['--decoder_groups=3'], ['decoder_groups = 3']), (['--accumulate=3'], ['batch_size = 8', 'accumulate = 3']),
    (['--dataset=absent'], ['absent', 'prepare']), (['--dataset='], ['dataset']),
    (['--window=hann'], ['hann', 'hamming']), (['--device=tpu'], ['tpu']), (['--dtype=float8'], ['float8']),
    (['--leave_out=noises/5'], ['leave_out']), (['--max_steps=0'], ['max_steps']),
    (['--warmup_steps=6'], ['warmup_steps = 6']), (['--seed=-1'], ['seed']), (['--resume'], ['nothing to resume']),
    (['--kernels=triton'], ['kernels = triton', 'CUDA']), (['--kernels=conv'], ['--kernels=torch']),
    (['--kernels=fast'], ['fast is no kernel']), (['--compile_mode=fast'], ['compile_mode', 'fast']),
    (['--compile_mode=reduce-overhead', '--accumulate=2'], ['reduce-overhead', 'accumulate = 1']),
    (['config/absent.py'], ['config/absent.py']), (['--mask_ratio=1.5'], ['mask_ratio']), (['--keep=0'], ['keep']),
    (['--ema_steps=0'], ['ema_steps']), (['--n_mels=64'], ['n_mels = 64']), (['--mask_adjust=-0.5'], ['mask_block']),
    (['--ffn_ratio=-1'], ['ffn_ratio']), (['--beta1=1.5'], ['beta1']), (['--norm_std=abc'], ['norm_std']),
    (['--norm_std=0'], ['norm_std']), (['--mask_ratio=0'], ['mask_ratio']), (['--grad_clip=-1'], ['grad_clip']),
    (['--lr=-1'], ['lr']), (['--drop_path=0.5'], ['drop_path']), (['--workers=-1'], ['workers']),
    (['--dataset=noises,noises'], ['each once']), (['--eval_dataset=absent'], ['absent'])])
def test_refusals_at_the_start(data_dir, tmp_path, argv, words):
    result = call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out', *argv)
    assert is_one_line_error(result, *words)
    assert not os.path.exists(tmp_path / 'out')


def test_a_folder_with_a_run_is_not_overwritten(straight, data_dir):
    before = {file: os.path.getmtime(os.path.join(straight, file)) for file in os.listdir(straight)}
    base = [*RUN, f'--data_dir={data_dir}', f'--out_dir={straight}']
    assert is_one_line_error(call(pretrain.run, *base), '--resume', '--overwrite')
    assert is_one_line_error(call(pretrain.run, *base, '--resume', '--overwrite'), 'contradict')
    assert is_one_line_error(call(pretrain.run, *base, '--resume', '--n_embd=64'), 'n_embd 32 -> 64')
    assert is_one_line_error(call(pretrain.run, *base, '--resume', '--dataset=demo'), 'other clips')
    assert {file: os.path.getmtime(os.path.join(straight, file)) for file in os.listdir(straight)} == before


def test_optimizer_settings_of_now_count_when_going_on(straight, data_dir, tmp_path):
    out = str(tmp_path / 'changed')
    shutil.copytree(straight, out)
    base = [*RUN, f'--data_dir={data_dir}', f'--out_dir={out}', '--resume', '--max_steps=8']
    result = call(pretrain.run, *base, '--weight_decay=0.5', '--beta2=0.9')
    assert result.code == 0 and 'weight_decay 0.05 -> 0.5' in result.out
    groups = weights_of(out)['optimizer']['param_groups']
    assert [group['weight_decay'] for group in groups] == [0.5, 0.0] and groups[0]['betas'] == (0.9, 0.9)
    os.remove(os.path.join(out, 'ckpt.1.pt'))
    state = weights_of(out)
    del state['optimizer']
    torch.save(state, os.path.join(out, 'ckpt.pt'))
    assert is_one_line_error(call(pretrain.run, *base), 'optimizer')


@pytest.mark.parametrize('out', ['{tmp}/a_file', '{tmp}/a_file/inner', '/proc/x'])
def test_a_folder_that_cannot_be_written_is_named(data_dir, tmp_path, out):
    (tmp_path / 'a_file').write_text('')
    out = out.format(tmp=tmp_path)
    assert is_one_line_error(call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={out}'), out.split('/')[-1])


def test_without_a_compiler_there_is_a_line_and_no_compilation(data_dir, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError('no compiler\nand more')
    monkeypatch.setattr(torch, 'compile', broken)
    result = call(pretrain.run, *RUN, '--compile', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out')
    assert result.code == 0 and result.out.count('warning: torch.compile does not work here (no compiler)') == 1


@pytest.mark.parametrize('width, has_it, wanted', [(768, True, 'bfloat16'), (128, True, 'bfloat16'),
                                                  (64, True, 'float32'), (768, False, 'float32')])
def test_precision_that_auto_chooses_on_a_cpu(monkeypatch, width, has_it, wanted):
    monkeypatch.setattr(processes, 'cpu_has_bfloat16', lambda: has_it)
    process = processes.Process(0, 1, torch.device('cpu'))
    context, name = processes.autocast(process, 'auto', width)
    assert name == wanted and processes.autocast(process, 'auto')[1] == 'float32'            # without a width: as it is
    with context():
        assert torch.is_autocast_enabled('cpu') == (wanted == 'bfloat16')


@pytest.mark.slow
@pytest.mark.parametrize('launcher', [[], ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']])
def test_compiled_losses_equal_eager_ones(straight, data_dir, tmp_path, launcher):
    result = script(*launcher, 'pretrain.py', *RUN, '--compile', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out',
                    timeout=600)
    assert result.returncode == 0 and 'does not work here' not in result.stdout, result.stderr
    for ours, theirs in zip(log_of(tmp_path / 'out'), log_of(straight), strict=True):
        assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-4)


def test_a_changed_setting_is_said_when_going_on(straight, data_dir, tmp_path):
    out = str(tmp_path / 'changed')
    shutil.copytree(straight, out)
    result = call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={out}', '--resume', '--max_steps=7',
                  '--log_interval=2')
    assert (result.code == 0 and 'max_steps 6 -> 7' in result.out
            and 'log_interval' not in result.out.split('changed since')[1].splitlines()[0])


def test_monitor_and_next_step(data_dir, tmp_path):
    result = call(pretrain.run, *RUN, '--dataset=demo', '--eval_dataset=demo', '--eval_interval=3',
                  f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out')
    assert result.code == 0, result.err
    scores = [line for line in log_of(tmp_path / 'out') if 'knn_cls' in line]
    assert ([line['step'] for line in scores] == [0, 3, 6]
            and all(0 <= line['knn_cls'] <= 1 and line['effective_rank'] > 1 for line in scores))
    steps = [line for line in result.out.splitlines() if re.match(r'step \d/6  loss', line)]
    assert 'demo, log-mel statistics: kNN' in result.out
    assert len(steps) == 6 and all(re.search(r' clips/s  (\d+m )?\d+s left$', line) for line in steps)
    assert steps[-1].endswith(' 0s left')
    hours = open_clips(['demo'], data_dir).length.sum() / 16000 / 3600
    assert f' clips, {hours:.2f} hours, log-mel mean ' in result.out
    assert '; 4 x 8 patches, 6 of them kept by each of 2 students\n' in result.out
    assert f'next:    python eval.py --ckpt={tmp_path}/out/ckpt.pt --dataset=demo ' in result.out
    assert f'         python finetune.py config/finetune_demo.py --ckpt={tmp_path}/out/ckpt.pt' in result.out
    other = learned.what_next(settings('--eval_dataset=noises', f'--data_dir={data_dir}', '--out_dir=x'))
    assert other == 'next:    python eval.py --ckpt=x/ckpt.pt --dataset=noises      # kNN and linear probe'


LOG = {'probe': 0.54, 'knn': 0.4, 'chance': 0.12}


@pytest.mark.parametrize('end, words', [
    ({'probe': 0.62, 'knn': 0.47}, [
        'a linear probe of the frozen features names 62.0% of held-out x clips: above random weights (54.0%), '
        'above log-mel statistics (40.0%), above chance (12.0%)',
        'their ten nearest neighbours name 47.0%: above random weights (40.0%), '
        'above log-mel statistics (45.0%), above chance (12.0%)']),
    ({'probe': 0.4, 'knn': 0.1}, [
        'a linear probe of the frozen features names 40.0% of held-out x clips: below random weights (54.0%), '
        'level with log-mel statistics (40.0%), above chance (12.0%)',
        'their ten nearest neighbours name 10.0%: below random weights (40.0%), '
        'below log-mel statistics (45.0%), below chance (12.0%)',
        'below: for these sounds that was no gain yet; train longer (--max_steps) or on more sounds']),
    (None, [])])
def test_what_was_learned_is_what_the_log_says(tmp_path, end, words):
    """Of several starts: a set that was scored before another does not count, nor what was not finite at the end."""
    def lines_of(*lines, content=0.457):
        (tmp_path / 'log.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines + (
            {'step': 5, 'loss': 9.0, 'content': 0.1, 'place': 0.2}, {'settings': {'eval_dataset': 'x'}, 'start': 5},
            {'step': 6, 'loss': 3.0, 'content': content, 'place': 0.742},
            *([{'step': 6, 'chance': 0.12, **end}] if end else []))))
        return learned.what_was_learned(str(tmp_path), 'x')
    start, first = {'settings': {'eval_dataset': 'x'}, 'start': 0}, {'step': 0, **LOG}
    log_mel = {'step': 0, 'x_log_mel_probe': 0.4, 'x_log_mel_knn': 0.45}
    said, is_scored = lines_of(start, log_mel, first)
    assert said[0] == ('learned: the place of a patch tells 74.2% of what the teacher says of it; of the rest the '
                       'students predict 45.7% (0%: the place alone)')
    assert said[1:] == [9 * ' ' + line for line in words] and is_scored == bool(end)
    assert learned.what_was_learned(str(tmp_path), '')[0] == said[:1]       # without a set: what needs none
    other, _ = lines_of({**start, 'settings': {'eval_dataset': 'y'}}, first, content=None)
    assert 'random weights' not in ' '.join(other) and not any('teacher' in line for line in other)
    begun, _ = lines_of({**start, 'settings': {'eval_dataset': 'x', 'init': 'a.pt'}}, first)
    assert 'random' not in ' '.join(begun) and ('the weights of a.pt (54.0%)' in ' '.join(begun)) == bool(end)


def test_a_picture_that_cannot_be_drawn_is_a_line(straight, data_dir, tmp_path, monkeypatch):
    """The run ends well, in words, and says what draws the picture later; drawn it goes when the run is replaced."""
    how = [*RUN, '--max_steps=3', '--eval_dataset=noises', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/o u t']
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    result = call(pretrain.run, *how)
    assert result.code == 0 and 'learned: ' in result.out and not result.err, result.err
    later = f"python -m tools.viz learned '--ckpt={tmp_path}/o u t/ckpt.pt' --data_dir={data_dir}"
    assert f'no picture (pictures need matplotlib: pip install matplotlib); to draw it later: {later}\n' in result.out
    (tmp_path / 'o u t' / 'learned.png').write_text('of the run before')
    assert call(pretrain.run, *how, '--overwrite', '--eval_dataset=').code == 0
    assert sorted(os.listdir(tmp_path / 'o u t')) == ['ckpt.pt', 'log.jsonl']


@pytest.mark.parametrize('kind, why', [('classes', 'no labels'), ('multi_label', 'several labels a clip'),
                                       ('few', 'too few clips')])
def test_a_set_that_has_no_knn_accuracy_stops_nothing(data_dir, tmp_path, monkeypatch, kind, why):
    """README's second command on a folder of one's own without classes; other sets that are not for it."""
    shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'mine')
    plain = monitor.open_clips

    def changed(*arguments):
        clips = plain(*arguments)
        if kind == 'few':
            return clips.select(np.arange(1))
        clips.metas = [{**clips.metas[0], **{'classes': {'classes': []}, 'multi_label': {'multi_label': True}}[kind]}]
        return clips
    monkeypatch.setattr(monitor, 'open_clips', changed)
    result = call(pretrain.run, *RUN, '--max_steps=3', '--dataset=mine', '--eval_dataset=mine',
                  f'--data_dir={tmp_path}', f'--out_dir={tmp_path}/out')
    assert result.code == 0 and result.out.count(f'no kNN accuracy: mine has {why}\n') == 1, result.err
    assert not any('knn_cls' in line for line in log_of(tmp_path / 'out'))


def test_unlabelled_clips_among_labelled_ones_do_not_count(data_dir, tmp_path, monkeypatch):
    plain = monitor.open_clips

    def changed(*arguments):
        clips = plain(*arguments)
        clips.label = np.where(np.arange(len(clips)) % 3 == 0, -1, clips.label)
        return clips
    monkeypatch.setattr(monitor, 'open_clips', changed)
    parts = monitor.labelled_clips('noises', data_dir, 1, processes.Process(0, 1, torch.device('cpu')))
    assert 0 < sum(map(len, parts)) < 24 and all((part.label >= 0).all() for part in parts)


def test_a_fold_is_what_the_monitor_tests_on(tmp_path):
    """FSDD's speakers are its folds: the training split of the others, and all that this one said."""
    source = zipped(tmp_path / 'x.zip', fsdd_files(('george', 'jackson', 'theo')))
    assert call(prepare.run, 'fsdd', f'--source={source}', f'--out_dir={tmp_path}/fsdd', '--workers=0').code == 0
    train, valid = monitor.labelled_clips('fsdd/theo', str(tmp_path), 1, processes.Process(0, 1, torch.device('cpu')))
    said = [sorted(key.split('/')[-1].removesuffix('.wav').split('_')[1:] for key in part.keys())
            for part in (train, valid)]
    assert said == [sorted(10 * [[who, take] for who in ('george', 'jackson') for take in '56']),
                    sorted(10 * [['theo', take] for take in '0123456'])]
    run = [*RUN, '--max_steps=2', '--warmup_steps=1', '--dataset=fsdd', f'--data_dir={tmp_path}',
           f'--out_dir={tmp_path}/out', '--overwrite']
    made = call(pretrain.run, *run, '--leave_out=fsdd/theo', '--eval_dataset=fsdd/theo')
    assert made.code == 0 and 'held-out fsdd/theo clips' in made.out, made.err
    assert '--dataset=fsdd ' in made.out                                    # what to type next
    assert is_one_line_error(call(pretrain.run, *run, '--eval_dataset=fsdd/nobody'), "fold 'nobody' is not in", 'theo')


def test_evaluation_reads_with_the_workers_of_the_settings(data_dir, tmp_path, monkeypatch):
    asked, plain = [], data.loader
    monkeypatch.setattr(data, 'loader', lambda *a, **k: asked.append(a[2]) or plain(*a, **k))
    assert call(pretrain.run, *RUN, '--max_steps=3', '--eval_dataset=noises', '--workers=1', f'--data_dir={data_dir}',
                f'--out_dir={tmp_path}/out').code == 0
    assert asked[:6] == [1] * 6                                             # log-mel, step 0 and the end


def test_the_commit_is_that_of_the_start(data_dir, tmp_path, monkeypatch):
    """Not of the moment when a checkpoint is written: what was committed meanwhile is not what runs."""
    heads = iter(['first', 'second', 'third', 'fourth'])

    def git(command, **_):
        return types.SimpleNamespace(returncode=0, stdout=next(heads) if 'describe' in command else '')
    processes.commit.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(processes.subprocess, 'run', git)
            assert call(pretrain.run, *RUN, '--max_steps=3', '--save_interval=1', f'--data_dir={data_dir}',
                        f'--out_dir={tmp_path}/out').code == 0
    finally:
        processes.commit.cache_clear()
    with open(tmp_path / 'out' / 'log.jsonl') as f:
        assert json.loads(f.readline())['commit'] == 'first'
    assert weights_of(tmp_path / 'out')['commit'] == 'first'


def test_fewer_checkpoints_to_keep_leave_none_behind(tmp_path):
    def save(step, keep):
        state = {'model': {}, 'config': {}, 'settings': {}, 'step': step}
        saving.save_checkpoint(str(tmp_path / 'ckpt.pt'), state, keep)
    for step in range(1, 5):
        save(step, 3)
    (tmp_path / 'ckpt.x.pt').write_text('')
    (tmp_path / 'best.1.pt').write_text('')
    assert sorted(os.listdir(tmp_path)) == ['best.1.pt', 'ckpt.1.pt', 'ckpt.2.pt', 'ckpt.pt', 'ckpt.x.pt']
    save(5, 2)
    assert sorted(os.listdir(tmp_path)) == ['best.1.pt', 'ckpt.1.pt', 'ckpt.pt', 'ckpt.x.pt']
    assert [saving.load_checkpoint(str(tmp_path / file))['step'] for file in ('ckpt.pt', 'ckpt.1.pt')] == [5, 4]
    save(6, 1)
    assert sorted(os.listdir(tmp_path)) == ['best.1.pt', 'ckpt.pt', 'ckpt.x.pt']


def test_a_step_is_a_line_of_a_terminal(straight, data_dir, tmp_path):
    result = call(pretrain.run, *RUN, '--max_steps=3', '--eval_dataset=noises', f'--data_dir={data_dir}',
                  f'--out_dir={tmp_path}/out')
    steps = [line for line in result.out.splitlines() if line.startswith('step ')]
    assert len(steps) == 3 and max(map(len, steps)) <= 80
    assert re.fullmatch(r'step 1/3  loss \d+\.\d{3}  content -?\d+\.\d%  place -?\d+\.\d%  [\d,]+\.\d clips/s  '
                        r'\d+s left', steps[0])


def test_importing_the_stage_loads_neither_recipes_nor_decoders():
    code = 'import sys, pretrain; print(*sorted(name for name in sys.modules if name.split(".")[0] in ' \
           '("prepare", "recipes", "finetune", "eval", "tools", "soundfile") or name.startswith("audio.")))'
    assert script('-c', code).stdout.split() == ['audio.clips', 'tools', 'tools.learned']


def test_parts_of_a_union_are_left_out(data_dir, tmp_path):
    result = call(pretrain.run, *RUN, '--dataset=noises,demo', '--splits=train,test', '--max_steps=3',
                  f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out')
    assert result.code == 0 and '224 clips' in result.out
    result = call(pretrain.run, *RUN, '--dataset=noises,demo', '--splits=train,test', '--leave_out=demo/train',
                  '--max_steps=3', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/part')
    assert result.code == 0 and '64 clips' in result.out


@pytest.mark.slow
def test_bf16_follows_float32(data_dir, tmp_path):
    """bfloat16 autocast on the demo: the losses of 60 steps stay within 2 %."""
    logs = []
    for dtype in ('float32', 'bfloat16'):
        out = str(tmp_path / dtype)
        assert call(pretrain.run, *RUN, '--lr=1e-3', '--max_steps=60', '--dataset=demo', f'--dtype={dtype}',
                    f'--data_dir={data_dir}', f'--out_dir={out}').code == 0
        logs.append([line['loss'] for line in log_of(out)])
    assert logs[1] == pytest.approx(logs[0], rel=0.02)


@pytest.mark.slow
def test_bf16_follows_float32_to_the_end_of_the_demo(tmp_path):
    """config/demo.py in both precisions: the same final kNN accuracy within two points, CLS and bands."""
    scores = []
    for dtype in ('float32', 'bfloat16'):
        result = script('pretrain.py', 'config/demo.py', f'--dtype={dtype}', f'--data_dir={tmp_path}/data',
                        '--device=cpu', f'--out_dir={tmp_path}/{dtype}', timeout=3000)
        assert result.returncode == 0, result.stderr
        scores.append(next(line for line in reversed(log_of(tmp_path / dtype)) if 'knn_cls' in line))
    for name in ("knn_cls", "knn"):
        assert scores[1][name] == pytest.approx(scores[0][name], abs=0.02), scores
