"""What happens when something goes wrong: each fault is really made.   python -m pytest tests/test_faults.py [-m slow]

The same tests run a few times by default and many times when slow ones are asked for.
"""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile

import numpy as np
import pytest
import torch

import eval as evaluation
import finetune
import pretrain
from audio.clips import Clips, open_clips, task_splits
from checkpoints.opening import open_checkpoint
from engine import processes
from engine.errors import CheckpointError, ConfigError, DataError, RunError
from engine.files import locked
from engine.run import Run
from scoring import judge

from .conftest import ROOT, call, is_one_line_error, script
from .test_finetune import RUN as FINETUNE
from .test_finetune import pretrained  # noqa: F401  (a fixture)
from .test_prepare import audio_file, contents, noises, write_tree
from .test_pretrain import RUN, log_of, same_state, settings, weights_of

LONG = [*RUN, '--max_steps=40', '--save_interval=1', '--threads=1']  # half of its time goes into writing checkpoints


def start(*argv):
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )


def torchrun(*argv):
    return ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *argv)


def equal_runs(a, b):
    assert log_of(a) == log_of(b)
    assert same_state(weights_of(a)['model'], weights_of(b)['model'])
    assert same_state(weights_of(a)['optimizer'], weights_of(b)['optimizer'])


# -------------------------------------------------------------------------------------------------- exact resuming


def resumed_in_the_middle(run, straight, out):
    """Copy a finished run of 6 steps back to what it was after step 3, and go on."""
    shutil.copytree(straight, out)
    os.replace(os.path.join(out, 'ckpt.1.pt'), os.path.join(out, 'ckpt.pt'))
    assert weights_of(out)['step'] == 3
    run(out, '--resume')
    equal_runs(out, straight)


@pytest.mark.parametrize('stage', ['pretrain', 'finetune'])
@pytest.mark.parametrize('how', ['accumulated', 'two processes'])
def test_exact_resume(stage, how, pretrained, data_dir, tmp_path):  # noqa: F811
    base = [*(RUN if stage == 'pretrain' else [*FINETUNE, f'--ckpt={pretrained}']), f'--data_dir={data_dir}']

    def run(out, *more):
        if how == 'accumulated':
            result = call({'pretrain': pretrain, 'finetune': finetune}[stage].run, *base, f'--out_dir={out}', *more,
                          '--accumulate=2')
            assert result.code == 0, result.err
            return
        result = script(*torchrun(f'{stage}.py', *base, f'--out_dir={out}', *more))
        assert result.returncode == 0, result.stderr

    run(tmp_path / 'straight')
    resumed_in_the_middle(run, str(tmp_path / 'straight'), str(tmp_path / 'resumed'))


def test_resuming_with_another_number_of_processes(data_dir, tmp_path):
    base = [*RUN, f'--data_dir={data_dir}']
    assert call(pretrain.run, *base, f'--out_dir={tmp_path}/one').code == 0
    shutil.copytree(tmp_path / 'one', tmp_path / 'two')
    os.replace(tmp_path / 'two' / 'ckpt.1.pt', tmp_path / 'two' / 'ckpt.pt')
    result = script(*torchrun('pretrain.py', *base, f'--out_dir={tmp_path}/two', '--resume'))
    assert result.returncode == 0 and 'warning: changed' not in result.stdout, result.stderr
    for ours, theirs in zip(log_of(tmp_path / 'two'), log_of(tmp_path / 'one'), strict=True):
        assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-5)
    with pytest.raises(ConfigError, match='batch_size = 7 is not divisible by 2 processes'):
        pretrain.check(settings(*base, '--batch_size=7'), 2)


# ------------------------------------------------------------------------------------------------ killed and stopped


@pytest.fixture(scope='module')
def long_run(data_dir, tmp_path_factory):
    out = str(tmp_path_factory.mktemp('long'))
    assert call(pretrain.run, *LONG, f'--data_dir={data_dir}', f'--out_dir={out}').code == 0
    return out


def go_on(out):
    """--resume, or --overwrite where the kill came before the first checkpoint."""
    written = [name for name in ('ckpt.pt', 'ckpt.1.pt') if os.path.exists(os.path.join(out, name))]
    return '--resume' if written else '--overwrite'


def kill_at_random(long_run, data_dir, out, times, seed):  # noqa: F811
    """SIGKILL at random moments, in the middle of steps and of checkpoint writes, so often; then finish."""
    rng = np.random.default_rng(seed)
    killed = torn = 0
    while killed < times:
        running = start('pretrain.py', *LONG, f'--data_dir={data_dir}', f'--out_dir={out}', go_on(out))
        for line in running.stdout:
            if line.startswith('step '):
                break
        time.sleep(rng.uniform(0, 0.3))
        running.kill()
        running.communicate()
        if running.returncode != -signal.SIGKILL:  # it was at its end already: once more from the start
            shutil.rmtree(out)
        killed += 1
        torn += os.path.exists(os.path.join(out, 'ckpt.pt.tmp'))
    result = call(pretrain.run, *LONG, f'--data_dir={data_dir}', f'--out_dir={out}', go_on(out))
    assert result.code == 0, result.err
    equal_runs(out, long_run)
    return torn


def test_sigkill_at_random_moments(long_run, data_dir, tmp_path):
    kill_at_random(long_run, data_dir, str(tmp_path / 'killed'), 5, seed=0)


@pytest.mark.slow
def test_sigkill_at_random_moments_many_times(long_run, data_dir, tmp_path):
    assert kill_at_random(long_run, data_dir, str(tmp_path / 'killed'), 50, seed=1) > 0  # some in mid-write


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('stage', ['pretrain', 'finetune'])
def test_signals_finish_the_step_save_and_say_how_to_go_on(stage, number, pretrained, data_dir, tmp_path):  # noqa: F811
    base = RUN if stage == 'pretrain' else [*FINETUNE, f'--ckpt={pretrained}']
    base = [
        f'{stage}.py',
        *base,
        f'--data_dir={data_dir}',
        f'--out_dir={tmp_path}/out',
        '--save_interval=100000',
        '--eval_interval=100000',
        '--max_steps=100000',
        '--workers=1',
    ]
    running = start(*base)
    for line in running.stdout:
        if line.startswith('step 3/'):
            break
    running.send_signal(number)
    rest, errors = running.communicate(timeout=60)
    assert running.returncode == 0 and 'saved; to go on, run the same command with --resume' in rest, errors
    assert 'Traceback' not in errors
    assert weights_of(tmp_path / 'out')['step'] == log_of(tmp_path / 'out')[-1]['step'] >= 3


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_although_there_are_workers(number, data_dir, tmp_path):
    """As terminals and batch systems send it: to the workers too."""
    command = [sys.executable, 'pretrain.py', *RUN, '--max_steps=100000', '--save_interval=100000', '--workers=2',
               f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out']
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    for line in running.stdout:
        if line.startswith('step 3/'):
            break
    os.killpg(running.pid, number)
    rest, errors = running.communicate(timeout=60)
    assert running.returncode == 0 and 'saved; to go on' in rest, errors
    assert weights_of(tmp_path / 'out')['step'] >= 3


def test_one_process_dying_stops_the_others_without_a_save(data_dir, tmp_path):
    running = start(
        *torchrun(
            'pretrain.py',
            *RUN,
            f'--data_dir={data_dir}',
            f'--out_dir={tmp_path}/out',
            '--max_steps=100000',
            '--save_interval=100000',
        )
    )
    for line in running.stdout:
        if line.startswith('step 3/'):
            break
    children = subprocess.run(['pgrep', '-P', str(running.pid)], capture_output=True, text=True).stdout.split()
    ranks = {}
    for pid in children:
        with open(f'/proc/{pid}/environ') as f:
            ranks[re.search('\0RANK=(\\d)', f.read())[1]] = int(pid)
    began = time.time()
    os.kill(ranks['1'], signal.SIGKILL)
    _, errors = running.communicate(timeout=60)
    assert running.returncode != 0 and time.time() - began < 60
    assert 'process 0 lost contact with another one' in errors, errors
    assert not os.path.exists(tmp_path / 'out' / 'ckpt.pt')


ENDED_ON_ITS_WAY = '''
import os, signal
import {stage}
from engine import processes
from engine.run import Run
def finish(*_, **__):
    raise RuntimeError('[gloo] Connection closed by peer')
def run(argv):
    try:
        {stage}.run(argv)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
Run.finish = finish
processes.main(run)
'''


@pytest.mark.parametrize('stage', ['pretrain', 'finetune'])
def test_the_launchers_signal_does_not_cut_off_the_line_of_who_has_lost_contact(
        stage, pretrained, data_dir, tmp_path):                             # noqa: F811
    """It comes at any moment: here between the loop that has failed and what says so."""
    (tmp_path / 'ended.py').write_text(ENDED_ON_ITS_WAY.format(stage=stage))
    arguments = RUN if stage == 'pretrain' else [*FINETUNE, f'--ckpt={pretrained}']
    result = script(*torchrun(tmp_path / 'ended.py', *arguments, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out'),
                    PYTHONPATH=ROOT)
    assert result.returncode != 0 and 'exitcode  : -15' not in result.stderr, result.stderr
    assert re.search(r'error: process \d lost contact with another one', result.stderr), result.stderr


# ----------------------------------------------------------------------------------------------------- who reads clips


def failing(monkeypatch, how, after):
    """Let every process's reading of clips fail once it has read so many: the disk's error, or the end by a signal."""
    plain, reads = Clips.read, []

    def read(clips, *arguments, **options):
        reads.append(1)
        if len(reads) > after and how == 'killed':
            os.kill(os.getpid(), signal.SIGKILL)
        if len(reads) > after:
            raise OSError(5, 'Input/output error', *(['a/shard.pcm'] if how == 'named' else []))
        return plain(clips, *arguments, **options)
    monkeypatch.setattr(Clips, 'read', read)


@pytest.mark.parametrize('how, code, words', [('named', 2, 'a/shard.pcm: '), ('unnamed', 2, '{data}/noises: '),
                                              ('killed', 1, 'a process that reads clips has died')])
@pytest.mark.parametrize('stage', ['pretrain', 'finetune', 'eval'])
def test_a_reader_that_fails_ends_all(stage, how, code, words, pretrained, data_dir, tmp_path,  # noqa: F811
                                      monkeypatch):
    """One line with the file, within seconds, no process left, the last checkpoint as it was."""
    out = str(tmp_path / 'out')
    more = [f'--data_dir={data_dir}', '--workers=2']
    if stage == 'eval':
        run, argv = evaluation.run, [f'--ckpt={pretrained}', '--dataset=noises', '--device=cpu', *more]
        failing(monkeypatch, how, 1)
    else:
        run, argv = (pretrain.run, RUN) if stage == 'pretrain' else (finetune.run, [*FINETUNE, f'--ckpt={pretrained}'])
        argv = [*argv, *more, f'--out_dir={out}']
        assert call(run, *argv, '--max_steps=3').code == 0
        before = weights_of(out)
        argv = [*argv, '--max_steps=10000', '--save_interval=10000', '--eval_interval=10000', '--resume']
        failing(monkeypatch, how, 8 * 5)
    began = time.time()
    result = call(run, *argv)
    assert time.time() - began < 20 and not multiprocessing.active_children()
    lines = [line for line in result.err.replace('\r', '\n').splitlines() if line.startswith('error: ')]
    assert result.code == code and len(lines) == 1 and 'Traceback' not in result.err
    assert words.format(data=data_dir) in lines[0] and 'what was saved is intact' in lines[0]
    if stage != 'eval':
        assert same_state(weights_of(out), before) and not os.path.exists(os.path.join(out, '.lock'))


FAILS_IN_ONE = '''
import os, sys
import pretrain
from audio.clips import Clips
from engine import processes
plain, reads = Clips.read, []
def read(clips, *arguments, **options):
    reads.append(1)
    if len(reads) > 40 and os.environ['RANK'] == '1':
        raise OSError(5, 'Input/output error', 'a/shard.pcm')
    return plain(clips, *arguments, **options)
Clips.read = read
processes.main(pretrain.run)
'''


def processes_of(word):
    """Command lines that hold this word, of the processes of now."""
    return subprocess.run(['pgrep', '-fa', word], capture_output=True, text=True).stdout.splitlines()


def test_a_reader_of_one_of_several_processes_that_fails_ends_all(data_dir, tmp_path):
    (tmp_path / 'failing.py').write_text(FAILS_IN_ONE)
    out = str(tmp_path / 'out')
    result = script(*torchrun(tmp_path / 'failing.py', *RUN, f'--data_dir={data_dir}', f'--out_dir={out}',
                              '--workers=1', '--max_steps=10000', '--save_interval=1'), PYTHONPATH=ROOT)
    lines = [line for line in result.stderr.splitlines() if line.startswith('error: ')]
    assert result.returncode != 0 and lines[0].startswith('error: process 1: a/shard.pcm: a batch could not be read')
    assert len(lines) == 1 or len(lines) == 2 and 'process 0 lost contact' in lines[1]
    assert 'failing.py", line' not in result.stderr and not processes_of(out)
    assert weights_of(out)['step'] >= 1


def children_of(pid):
    return list(map(int, subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True).stdout.split()))


def test_readers_die_with_the_process_that_they_work_for(data_dir, tmp_path):
    running = start('pretrain.py', *RUN, '--max_steps=100000', '--workers=2', f'--data_dir={data_dir}',
                    f'--out_dir={tmp_path}/out')
    for line in running.stdout:
        if line.startswith('step 3/'):
            break
    readers = children_of(running.pid)
    assert len(readers) == 2
    running.kill()
    running.communicate()
    deadline = time.time() + 4                                              # PyTorch's own look is every five seconds
    while any(os.path.exists(f'/proc/{pid}') for pid in readers) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(os.path.exists(f'/proc/{pid}') for pid in readers)


# ------------------------------------------------------------------------------------------------ signals, once more


def test_signals_are_answered_as_before_when_a_run_has_returned(data_dir, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert call(pretrain.run, *RUN, '--max_steps=3', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out').code == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    result = call(pretrain.run, *RUN, '--resume', '--n_embd=64', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out')
    assert is_one_line_error(result, 'n_embd 32 -> 64')
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_interrupt_ends_at_once_unless_it_is_the_same_one(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(processes.time, 'monotonic', lambda: now[0])
    with processes.Stop(processes.Process(0, 1, torch.device('cpu'))) as stop:
        assert not stop.agreed()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):      # a launcher passes on what a terminal sent
            os.kill(os.getpid(), number)
        assert stop.agreed()
        now[0] += 2
        os.kill(os.getpid(), signal.SIGTERM)                                # asks again for what is under way
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)


def test_ctrl_c_reaches_every_process_of_a_launcher(data_dir, tmp_path):
    """As a terminal sends it, to the whole group; torchrun itself then ends with 1, as it does at any signal."""
    command = [sys.executable, *torchrun('pretrain.py', *RUN, '--max_steps=100000', '--save_interval=100000',
                                         '--workers=1', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out')]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    for line in running.stdout:
        if line.startswith('step 3/'):
            break
    os.killpg(running.pid, signal.SIGINT)
    rest, errors = running.communicate(timeout=60)
    assert 'saved; to go on, run the same command with --resume' in rest and 'interrupted' not in errors
    assert weights_of(tmp_path / 'out')['step'] == log_of(tmp_path / 'out')[-1]['step'] >= 3
    assert not processes_of(str(tmp_path / 'out'))


def test_a_signal_during_a_folds_test_ends_the_folds(data_dir, pretrained, tmp_path, monkeypatch):  # noqa: F811
    shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'folded')
    meta = json.loads((tmp_path / 'folded' / 'meta.json').read_text())
    (tmp_path / 'folded' / 'meta.json').write_text(json.dumps({**meta, 'folds': ['x', 'y']}))
    for split in ('train', 'test'):
        path = tmp_path / 'folded' / f'{split}-00000.npz'
        with np.load(path) as stored:
            arrays = {**stored, 'folds': (np.arange(len(stored['folds'])) // 2 % 2).astype(np.int16)}
        np.savez(path, **arrays)
    test, folds = judge.Judge.test, []

    def signalled(self):
        folds.append(self.run.settings.fold)
        if len(folds) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return test(self)
    monkeypatch.setattr(judge.Judge, 'test', signalled)
    base = [*FINETUNE, '--dataset=folded', '--fold=all', '--max_steps=3', f'--ckpt={pretrained}',
            f'--data_dir={tmp_path}', f'--out_dir={tmp_path}/out']
    result = call(finetune.run, *base)
    assert result.code == 0 and 'stopped before fold y; to go on' in result.out and folds == ['x'], result.err
    assert not os.path.exists(tmp_path / 'out' / 'fold-y')
    result = call(finetune.run, *base, '--resume')
    assert result.code == 0 and 'last checkpoints: fold x' in result.out and folds == ['x', 'x', 'y'], result.err
    assert ['test' in line for line in log_of(tmp_path / 'out' / 'fold-x')].count(True) == 1


# --------------------------------------------------------------------------------------------------- one run a folder


def test_a_folder_in_use_is_refused_until_its_process_is_gone(data_dir, tmp_path):
    holder = start('-c', 'import sys, time; from engine.files import locked\n'
                         'with locked(sys.argv[1]): print("held", flush=True); time.sleep(60)', f'{tmp_path}/out')
    assert holder.stdout.readline() == 'held\n'
    base = [*RUN, '--max_steps=3', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out']
    assert is_one_line_error(call(pretrain.run, *base), f'{tmp_path}/out is in use', '--out_dir')
    assert os.listdir(tmp_path / 'out') == ['.lock']
    holder.kill()                                                           # the file stays, the lock does not
    holder.communicate()
    assert os.listdir(tmp_path / 'out') == ['.lock'] and call(pretrain.run, *base).code == 0
    assert sorted(os.listdir(tmp_path / 'out')) == ['ckpt.pt', 'log.jsonl']
    with locked(f'{tmp_path}/out'):
        assert is_one_line_error(call(pretrain.run, *base, '--overwrite'), 'is in use')
    with pytest.raises(ConfigError, match='in use'), locked(f'{tmp_path}/new'), locked(f'{tmp_path}/new'):
        pass
    assert not os.path.exists(tmp_path / 'new')


# ------------------------------------------------------------------------------------------- disk, numbers, data


def test_a_full_disk_ends_the_run_with_a_line_and_the_checkpoint_before(data_dir, tmp_path):
    """A limit on the size of files (RLIMIT_FSIZE) makes real writes fail in the middle."""
    out = str(tmp_path / 'out')
    base = [*RUN, f'--data_dir={data_dir}', f'--out_dir={out}']
    assert call(pretrain.run, *base, '--max_steps=3').code == 0
    before = weights_of(out)
    code = (
        'import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
        'resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000)); '
        'import pretrain; from engine import processes; processes.main(pretrain.run)'
    )
    result = script('-c', code, *base, '--resume')
    assert result.returncode == 1 and 'could not write the checkpoint' in result.stderr and 'intact' in result.stderr
    assert 'Traceback' not in result.stderr and same_state(weights_of(out), before)
    assert not any(file.endswith('.tmp') for file in os.listdir(out))


def test_one_bad_step_is_skipped_and_counted(data_dir, tmp_path, monkeypatch):
    original, calls = pretrain.forward_backward, []

    def sometimes_nan(network, spec, *rest):
        calls.append(1)
        return original(network, spec * float('nan') if len(calls) == 3 else spec, *rest)

    monkeypatch.setattr(pretrain, 'forward_backward', sometimes_nan)
    result = call(pretrain.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out')
    assert result.code == 0 and 'step 3 has a gradient that is not finite; skipped (1 in a row)' in result.out
    assert [line['step'] for line in log_of(tmp_path / 'out') if 'skipped_in_a_row' in line] == [3]
    assert all(torch.isfinite(tensor).all() for tensor in weights_of(tmp_path / 'out')['model'].values())


def test_a_streak_of_bad_steps_is_counted_across_a_stop(data_dir, tmp_path, monkeypatch):
    original = pretrain.forward_backward
    monkeypatch.setattr(pretrain, 'forward_backward',
                        lambda network, spec, *rest: original(network, spec * float('nan'), *rest))
    base = [*RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out', '--max_bad_steps=5', '--max_steps=9']
    assert call(pretrain.run, *base, '--max_steps=4').code == 0
    result = call(pretrain.run, *base, '--resume')
    assert result.code == 1 and '5 steps in a row' in result.err
    assert f'{tmp_path}/out holds the last checkpoint' in result.err


def test_a_bad_step_of_finetuning_is_skipped_counted_and_its_clips_named(data_dir, tmp_path, monkeypatch):
    original = finetune.forward_backward

    def nan(network, batch, *rest):
        return original(network, {**batch, 'gain': batch['gain'] * float('nan')}, *rest)
    monkeypatch.setattr(finetune, 'forward_backward', nan)
    result = call(finetune.run, '--init=scratch', '--n_layer=1', '--n_head=2', '--n_embd=32', '--frames=64',
                  '--dataset=noises', '--max_steps=9', '--warmup_steps=1', '--batch_size=4', '--workers=0',
                  '--validation_part=0.3', '--max_bad_steps=3', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out')
    assert result.code == 1 and '3 steps in a row' in result.err and '.wav' in result.err
    assert [line['skipped_in_a_row'] for line in log_of(tmp_path / 'out') if 'skipped_in_a_row' in line] == [1, 2, 3]


def test_collapse_is_warned_of_and_stops_the_run_if_asked(data_dir, tmp_path, monkeypatch):
    original = pretrain.forward_backward

    def collapsed(*arguments):
        return {**original(*arguments), 'target_std': torch.tensor(0.1)}

    monkeypatch.setattr(pretrain, 'forward_backward', collapsed)
    base = [*RUN, f'--data_dir={data_dir}']
    warned = call(pretrain.run, *base, f'--out_dir={tmp_path}/a')
    assert warned.code == 0 and 'the teacher is collapsing' in warned.out
    stopped = call(pretrain.run, *base, f'--out_dir={tmp_path}/b', '--min_target_var=0.02')
    assert stopped.code == 1 and 'below min_target_var = 0.02' in stopped.err
    assert f'{tmp_path}/b holds no checkpoint' in stopped.err


def test_the_clips_that_are_named_are_those_of_the_process_that_had_them():
    """Three processes of which the second alone had a loss that is not finite; then none had: only the gradient."""
    found = [[False, ['a1', 'a2']], [True, ['b1', 'b2']], [False, ['c1', 'c2']]]
    run = Run(types.SimpleNamespace(max_bad_steps=2, batch_size=2, out_dir='x'), types.SimpleNamespace(
        print=print, gather=lambda own: [tuple(part) for part in found]), (), None)
    run.log = types.SimpleNamespace(write=lambda **_: None)
    run.is_saved, run.batches = False, types.SimpleNamespace(
        places=[0, 1], order=types.SimpleNamespace(at=lambda place: place),
        clips=types.SimpleNamespace(select=lambda seen: types.SimpleNamespace(keys=lambda: ['own'] * len(seen))))
    run.skipped(7, 1, own_loss_is_bad=False)
    with pytest.raises(RunError, match='the last saw b1, b2, ...;.*x holds no checkpoint'):
        run.skipped(8, 2, own_loss_is_bad=False)
    found[1][0] = False
    with pytest.raises(RunError, match='the last saw a1, b1, c1, a2, b2, c2, ...;'):
        run.skipped(8, 2, own_loss_is_bad=False)


def test_a_log_is_json_whatever_the_numbers(data_dir, tmp_path, monkeypatch):
    """NaN and infinity are null; lines of earlier code that had NaN are mended when the run goes on."""
    original = pretrain.forward_backward
    monkeypatch.setattr(pretrain, 'forward_backward',
                        lambda network, spec, *rest: original(network, spec * float('nan'), *rest))
    base = [*RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out']
    assert call(pretrain.run, *base, '--max_steps=3').code == 0

    def refuse(constant):
        raise AssertionError(constant)

    def lines():
        with open(tmp_path / 'out' / 'log.jsonl') as f:
            return [json.loads(line, parse_constant=refuse) for line in f]
    assert [line['loss'] for line in lines() if 'loss' in line] == [None] * 3
    with open(tmp_path / 'out' / 'log.jsonl', 'a') as f:
        f.write('{"step": 3, "loss": NaN, "scores": [{"a": -Infinity}, 1.5]}\n')
    assert call(pretrain.run, *base, '--max_steps=4', '--resume').code == 0
    assert {'step': 3, 'loss': None, 'scores': [{'a': None}, 1.5]} in lines()


def test_weights_that_are_not_finite_are_refused(data_dir, pretrained, tmp_path):  # noqa: F811
    base = [*RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out']
    assert call(pretrain.run, *base, '--max_steps=3').code == 0
    state, path, name = weights_of(tmp_path / 'out'), tmp_path / 'out' / 'ckpt.pt', 'encoder.blocks.0.mlp.0.weight'
    state['model'][name][3, 4] = float('nan')
    torch.save(state, path)
    assert is_one_line_error(call(pretrain.run, *base, '--resume'), str(path), name, 'not finite')
    tuning = [*FINETUNE, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/tuned']
    assert is_one_line_error(call(finetune.run, *tuning, f'--ckpt={path}'), str(path), name, 'not finite')
    assert not os.path.exists(tmp_path / 'tuned')
    state['model'][name][3, 4] = 0.0
    state['optimizer']['state'][2]['exp_avg'].view(-1)[0] = float('inf')
    torch.save(state, path)
    assert is_one_line_error(call(pretrain.run, *base, '--resume'), str(path), 'optimizer', 'not finite')


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'utf-8'])
def test_names_that_the_terminal_cannot_show(encoding, data_dir, tmp_path):
    name = '犬\udcff'                                                        # no latin, and no UTF-8
    shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'data' / name)
    result = script('pretrain.py', *RUN, '--max_steps=3', f'--data_dir={tmp_path}/data', f'--dataset={name}',
                    f'--eval_dataset={name}', f'--out_dir={tmp_path}/{name}', PYTHONIOENCODING=encoding)
    shown = name.encode(encoding, 'backslashreplace').decode(encoding) if encoding == 'utf-8' else r'\u72ac\udcff'
    assert result.returncode == 0 and f'done:    {tmp_path}/{shown}/ckpt.pt' in result.stdout, result.stderr
    assert f'{shown}, step 0: kNN ' in result.stdout and 'Traceback' not in result.stderr
    again = script('pretrain.py', *RUN, f'--data_dir={tmp_path}/data', f'--dataset={name}',
                   f'--out_dir={tmp_path}/{name}', PYTHONIOENCODING=encoding)
    assert again.returncode == 2 and again.stderr.startswith(f'error: {tmp_path}/{shown} holds a run')


def test_a_changed_data_set_is_refused_unless_told(data_dir, tmp_path):
    shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'data' / 'noises')
    base = [*RUN, f'--data_dir={tmp_path}/data', f'--out_dir={tmp_path}/out']
    assert call(pretrain.run, *base, '--max_steps=3').code == 0
    path = tmp_path / 'data' / 'noises' / 'train-00000.npz'
    with np.load(path) as stored:
        arrays = {**stored, 'stats': stored['stats'] + 1}  # the same names and lengths, other sound
    np.savez(path, **arrays)
    assert is_one_line_error(call(pretrain.run, *base, '--resume'), '--other_data')
    assert call(pretrain.run, *base, '--resume', '--other_data').code == 0


# --------------------------------------------------------------------------------------------------------- prepare


def kill_prepare(tmp_path, times, seed):
    source = write_tree(tmp_path / 'x', noises(60))
    shards = ('import prepare; from recipes import plan; from engine import processes; plan.SHARD_CLIPS = 7; '
              'processes.main(prepare.run)')
    command = ['-c', shards, 'folder', f'--source={source}', '--workers=0']
    assert script(*command, f'--out_dir={tmp_path}/one/set').returncode == 0
    rng, out = np.random.default_rng(seed), tmp_path / 'two' / 'set'
    began = time.time()
    assert script(*command, f'--out_dir={tmp_path}/timing/set').returncode == 0
    whole = time.time() - began
    for _ in range(times):
        running = start(*command, f'--out_dir={out}')
        time.sleep(rng.uniform(0.75, 1.0) * whole)  # the first part is Python starting
        running.kill()
        running.communicate()
        if os.path.exists(out / 'meta.json'):
            shutil.rmtree(out)
    finished = (
        script('-c', shards, 'folder', f'--source={source}', '--workers=2', f'--out_dir={out}')
        if times < 5
        else script(*command, f'--out_dir={out}')
    )
    assert finished.returncode == 0, finished.stderr
    assert contents(out) == contents(tmp_path / 'one' / 'set')


def test_prepare_killed_at_random_then_finished_is_byte_identical(tmp_path):
    kill_prepare(tmp_path, 3, seed=0)


@pytest.mark.slow
def test_prepare_killed_many_times(tmp_path):
    kill_prepare(tmp_path, 20, seed=1)


# ------------------------------------------------------------------------------------------------------ odd files


def mutations(content, count, seed):
    """Copies with random bytes, mostly in the header, changed, removed or doubled."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.integers(1, 6)):
            place = int(rng.integers(min(len(changed), 200 if rng.random() < 0.8 else len(changed))))
            kind = rng.integers(4)
            if kind < 2:
                changed[place] = rng.integers(256)
            elif kind == 2:
                del changed[place : place + int(rng.integers(1, 20))]
            else:
                changed[place:place] = bytes(rng.integers(256, size=rng.integers(1, 20), dtype=np.uint8))
        yield bytes(changed)


FUZZ = '''
import contextlib, resource, sys, torch
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
import prepare
from tests.test_faults import audio_file, mutations
prepare.content_of = lambda place: contextlib.nullcontext(place[1])
good = bad = 0
for suffix in ('.wav', '.flac', '.ogg', '.mp3'):
    for content in mutations(audio_file(suffix, 0.3), {count}, seed=1):
        result = prepare.pack_clip(('bytes', content), 60)
        good, bad = good + (not isinstance(result, str)), bad + isinstance(result, str)
print('good', good, 'bad', bad, 'peak MiB', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
'''


def test_mutated_audio_headers_give_a_clip_or_a_reason():
    """In one process, with a limit on its memory: no exception, no crash."""
    result = script('-c', FUZZ.format(root=ROOT, count=700), timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    words = result.stdout.split()
    assert int(words[1]) + int(words[3]) == 2800 and int(words[3]) > 300 and int(words[-1]) < 4000, result.stdout


def test_mutated_checkpoints_are_refused_or_read(data_dir, pretrained, tmp_path):  # noqa: F811
    with zipfile.ZipFile(pretrained) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = next(name for name in members if name.endswith('data.pkl'))
    refused = 0
    for content in mutations(members[pickled], 300, seed=2):
        with zipfile.ZipFile(tmp_path / 'x.pt', 'w') as archive:
            for name, member in {**members, pickled: content}.items():
                archive.writestr(name, member)
        try:
            open_checkpoint(str(tmp_path / 'x.pt'))
        except CheckpointError:
            refused += 1
    assert refused > 100
    with open(pretrained, 'rb') as f:
        whole = f.read()
    for size in (0, 10, 1000, len(whole) // 2, len(whole) - 10):
        (tmp_path / 'torn.pt').write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match='torn.pt'):
            open_checkpoint(str(tmp_path / 'torn.pt'))


def test_names_that_are_not_utf8(tmp_path):
    os.makedirs(tmp_path / 'x')
    with open(os.path.join(os.fsencode(tmp_path / 'x'), b'caf\xe9.wav'), 'wb') as f:
        f.write(audio_file('.wav'))
    with open(os.path.join(os.fsencode(tmp_path / 'x'), b'bad\xff\tname.wav'), 'wb') as f:
        f.write(b'nothing')
    result = script(
        'prepare.py',
        'folder',
        f'--source={tmp_path}/x',
        f'--out_dir={tmp_path}/set',
        '--workers=0',
        '--max_bad=0.5',
        '--test_part=0',
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / 'set' / 'skipped.tsv').read_text() == 'bad\\udcff name.wav\tFormat not recognised.\n'
    assert len(open_clips(['set'], str(tmp_path))) == 1


def test_a_meta_json_cannot_name_files_elsewhere(data_dir, tmp_path):
    shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'inner' / 'noises')
    shutil.copytree(os.path.join(data_dir, 'demo'), tmp_path / 'demo')
    path = tmp_path / 'inner' / 'noises' / 'meta.json'
    meta = json.loads(path.read_text())
    path.write_text(
        json.dumps({**meta, 'name': '../../demo', 'splits': {'../../demo/train': {}, '../../demo/test': {}}})
    )
    with pytest.raises(DataError, match='noises'):
        task_splits('noises', str(tmp_path / 'inner'))
    with pytest.raises(DataError, match='no clips left'):
        open_clips(['noises'], str(tmp_path / 'inner'), ['../../demo/train'])


# ------------------------------------------------------------------------------------------------ long and precise


def open_files(pid):
    return len(os.listdir(f'/proc/{pid}/fd'))


def resident(pid):
    with open(f'/proc/{pid}/statm') as f:
        return int(f.read().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.slow
def test_two_thousand_steps_keep_memory_and_files_flat(data_dir, tmp_path):
    running = start(
        'pretrain.py',
        *RUN,
        '--dataset=demo',
        '--max_steps=2000',
        '--workers=2',
        '--save_interval=100',
        f'--data_dir={data_dir}',
        f'--out_dir={tmp_path}/out',
    )
    seen = {}
    for line in running.stdout:
        if match := re.match(r'step ([\d,]+)/', line):
            step = int(match[1].replace(',', ''))
            if step % 100 == 50:
                seen[step] = resident(running.pid), open_files(running.pid)
    assert running.wait() == 0
    memory, files = zip(*[seen[step] for step in sorted(seen) if step >= 250])
    assert max(memory) - memory[0] < 40, memory  # MiB; the allocator's own noise
    assert max(files) <= files[0] + 2, files
    assert [line['step'] for line in log_of(tmp_path / 'out')] == list(range(1, 2001))


def test_deterministic_mode_gives_the_same_bits(data_dir, tmp_path):
    base = [*RUN, f'--data_dir={data_dir}', '--deterministic']
    for name in ('a', 'b'):
        result = script('pretrain.py', *base, f'--out_dir={tmp_path}/{name}')
        assert result.returncode == 0, result.stderr
    equal_runs(tmp_path / 'a', tmp_path / 'b')
