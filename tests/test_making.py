"""A prepared set's folder: what is replaced, kept, refused, gone on with, locked; and how a preparation is ended.
   python -m pytest tests/test_making.py"""
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile

import prepare
from audio.clips import open_clips
from engine.files import locked
from recipes import plan as plan_file

from .conftest import ROOT, call, is_one_line_error
from .test_prepare import audio_file, contents, corrupt_files, interrupted, noises, run, sound, tarred, write_tree
from .test_prepare import zipped as zipped_file


def peaks(root, splits=('train', 'test')):
    """{clip: the pitch of its strongest tone in Hz}, of the set in root/set."""
    found = {}
    for split in splits:
        clips = open_clips(['set'], str(root), [split])
        for clip, key in enumerate(clips.keys()):
            wave = clips.read(clip) / 32768 * np.hanning(clips.length[clip])
            found[key] = round(np.argmax(np.abs(np.fft.rfft(wave))) * 16000 / len(wave) / 10) * 10
    return found


def tones(pitch, count=8):
    files = {}
    for i in range(count):
        out = io.BytesIO()
        wave = sound(0.3, pitch=pitch)
        soundfile.write(out, wave + 0.01 * np.random.default_rng(i).standard_normal(len(wave)), 16000, format='WAV')
        files[f'{("a", "b")[i % 2]}/{i}.wav'] = out.getvalue()
    return files


# ------------------------------------------------------------------------------------------------------------ overwrite

@pytest.mark.parametrize('wrong', [
    ['--source={0}/TYPO'], ['--source={0}/empty'], ['--source={0}/x', '--label=nonsense'],
    ['--source={0}/damaged.zip'], ['--source={0}/bad'], ['--source={0}/x', '--nonsense=1']])
def test_overwrite_that_fails_leaves_the_old_set_as_it_was(tmp_path, wrong):
    write_tree(tmp_path / 'x', tones(440))
    write_tree(tmp_path / 'bad', {f'a/{name}': content for name, content in corrupt_files().items()
                                  if name != 'long.wav'})
    os.makedirs(tmp_path / 'empty')
    (tmp_path / 'damaged.zip').write_bytes(b'PK\3\4' + bytes(100))
    run('folder', f'--source={tmp_path}/x', f'--out_dir={tmp_path}/set')
    before = contents(tmp_path / 'set')
    result = run('folder', *[word.format(tmp_path) for word in wrong], f'--out_dir={tmp_path}/set', '--overwrite')
    assert is_one_line_error(result) and contents(tmp_path / 'set') == before


def test_the_old_set_stays_until_the_new_one_is_whole_and_an_interrupted_overwrite_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_file, 'SHARD_CLIPS', 2)
    for name, pitch, count in (('x', 440, 12), ('y', 1000, 8)):
        write_tree(tmp_path / name, tones(pitch, count))
    base = [f'--out_dir={tmp_path}/set', '--test_part=0.5']
    run('folder', f'--source={tmp_path}/x', *base)
    (tmp_path / 'set/mine.txt').write_text('mine')
    before = {name: content for name, content in contents_of_files(tmp_path / 'set').items()}
    interrupted(monkeypatch, 'folder', f'--source={tmp_path}/y', *base, '--overwrite', after=5)
    assert contents_of_files(tmp_path / 'set') == before                    # to be used meanwhile
    assert len(os.listdir(tmp_path / 'set/.unfinished')) == 4               # two shards of two clips each
    calls, original = [], prepare.pack_clip
    monkeypatch.setattr(prepare, 'pack_clip', lambda *place: calls.append(1) or original(*place))
    assert run('folder', f'--source={tmp_path}/y', *base, '--overwrite').code == 0
    assert len(calls) == 4 and set(peaks(tmp_path).values()) == {1000}
    assert (tmp_path / 'set/mine.txt').read_text() == 'mine' and not os.path.exists(tmp_path / 'set/.unfinished')
    assert len([name for name in os.listdir(tmp_path / 'set') if name.endswith('.pcm')]) == 4   # none of the old six


def contents_of_files(folder):
    return {name: (folder / name).read_bytes() for name in os.listdir(folder) if (folder / name).is_file()}


@pytest.mark.parametrize('after', range(0, 11))
def test_a_crash_while_the_new_set_is_moved_into_its_place(tmp_path, monkeypatch, after):
    """At any of its steps; the same command finishes it, or any other that looks at the set."""
    for name, pitch in (('x', 440), ('y', 1000)):
        write_tree(tmp_path / name, tones(pitch))
    base = [f'--out_dir={tmp_path}/set']
    run('folder', f'--source={tmp_path}/x', *base)
    steps = []
    with monkeypatch.context() as patch:
        def counted(change):
            def step(*paths):
                if (tmp_path / 'set/.unfinished/meta.json').exists():
                    steps.append(paths)
                    if len(steps) == after + 1:
                        raise KeyboardInterrupt
                return change(*paths)
            return step
        patch.setattr(os, 'remove', counted(os.remove))
        patch.setattr(os, 'replace', counted(os.replace))
        assert run('folder', f'--source={tmp_path}/y', *base, '--overwrite').code == (130 if after < 10 else 0)
    result = run('folder', f'--source={tmp_path}/y', *base)
    assert result.code == 0, result.err
    assert set(peaks(tmp_path).values()) == {1000}
    assert sorted(os.listdir(tmp_path / 'set')) == ['meta.json', 'test-00000.npz', 'test-00000.pcm', 'train-00000.npz',
                                                    'train-00000.pcm']


def test_a_linked_folder_is_overwritten_too(tmp_path):
    write_tree(tmp_path / 'x', tones(440))
    os.makedirs(tmp_path / 'disk')
    os.symlink(tmp_path / 'disk', tmp_path / 'set')
    for _ in range(2):
        assert run('folder', f'--source={tmp_path}/x', f'--out_dir={tmp_path}/set', '--overwrite').code == 0
        assert len(peaks(tmp_path)) == 8 and os.path.islink(tmp_path / 'set')


@pytest.mark.parametrize('out', ['own', 'own/dog', 'own/new', '.', 'link', 'own/../own'])
@pytest.mark.parametrize('overwrite', [[], ['--overwrite']])
def test_a_set_is_not_made_in_its_source_or_around_it(tmp_path, out, overwrite):
    write_tree(tmp_path / 'own', {'dog/1.wav': audio_file('.wav'), 'cat/2.wav': audio_file('.wav'),
                                  'meta.json': b'{"mine": 1}', 'skipped.tsv': b'mine', 'train-00000.pcm': b'mine'})
    os.symlink(tmp_path / 'own', tmp_path / 'link')
    before = sorted(tmp_path.rglob('*')), contents_of_files(tmp_path / 'own')
    result = run('folder', f'--source={tmp_path}/own', f'--out_dir={tmp_path}/{out}', *overwrite)
    assert is_one_line_error(result, 'lies in the source', '--out_dir')
    assert (sorted(tmp_path.rglob('*')), contents_of_files(tmp_path / 'own')) == before


@pytest.mark.parametrize('name, content', [
    ('meta.json', b'{"mine": 1}'), ('meta.json', b'not JSON'), ('meta.json', b'[]'), ('skipped.tsv', b'mine'),
    ('train-00000.pcm', b'mine'), ('test-00003.npz', b'mine')])
@pytest.mark.parametrize('overwrite', [[], ['--overwrite']])
def test_files_of_others_under_our_names_are_never_touched(tmp_path, name, content, overwrite):
    write_tree(tmp_path / 'x', tones(440))
    write_tree(tmp_path / 'set', {name: content})
    result = run('folder', f'--source={tmp_path}/x', f'--out_dir={tmp_path}/set', *overwrite)
    assert is_one_line_error(result, name, 'belongs to no prepared set')
    assert contents(tmp_path / 'set') == {name: content}


# ------------------------------------------------------------------------------------------ going on, and with what

@pytest.mark.parametrize('pack', ['folder', 'zip', 'tar', 'tgz'])
def test_another_source_of_the_same_names_is_not_mixed_in(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(plan_file, 'SHARD_CLIPS', 2)
    packs = {'folder': write_tree, 'zip': zipped_file, 'tar': tarred,
             'tgz': lambda path, files: tarred(path, files, 'w:gz')}
    sources = [packs[pack](tmp_path / f'{name}.{pack}', tones(pitch)) for name, pitch in (('x', 440), ('y', 1000))]
    interrupted(monkeypatch, 'folder', f'--source={sources[0]}', f'--out_dir={tmp_path}/set', after=5)
    other = ['folder', f'--source={sources[1]}', f'--out_dir={tmp_path}/set']
    assert is_one_line_error(run(*other), '--overwrite', 'npz')
    assert run(*other, '--overwrite').code == 0 and set(peaks(tmp_path).values()) == {1000}


def test_a_file_that_changes_between_two_runs_is_seen(tmp_path, monkeypatch):
    write_tree(tmp_path / 'x', tones(440))
    interrupted(monkeypatch, 'folder', f'--source={tmp_path}/x', f'--out_dir={tmp_path}/set')
    write_tree(tmp_path / 'x', {'a/0.wav': tones(1000)['a/0.wav']})         # as long as before
    again = ['folder', f'--source={tmp_path}/x', f'--out_dir={tmp_path}/set']
    assert is_one_line_error(run(*again), '--overwrite')
    assert run(*again, '--overwrite').code == 0 and peaks(tmp_path)['a/0.wav'] == 1000


def test_the_same_command_sees_that_a_bad_file_was_mended(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_file, 'SHARD_CLIPS', 4)
    write_tree(tmp_path / 'x', {**tones(440), 'a/0.wav': b'torn', 'b/7.wav': b'torn'})
    command = ['folder', f'--source={tmp_path}/x', f'--out_dir={tmp_path}/set', '--test_part=0']
    assert is_one_line_error(run(*command), '2 of 8', 'skipped.tsv', 'mend')
    write_tree(tmp_path / 'x', {'a/0.wav': tones(1000)['a/0.wav']})
    calls, original = [], prepare.pack_clip
    monkeypatch.setattr(prepare, 'pack_clip', lambda *place: calls.append(1) or original(*place))
    assert is_one_line_error(run(*command), '1 of 8') and len(calls) == 4   # the shard with the mended file alone
    assert run(*command, '--max_bad=0.2').code == 0 and len(calls) == 4
    assert peaks(tmp_path, ['train']) == {f'{"ab"[i % 2]}/{i}.wav': 440 if i else 1000 for i in range(7)}
    assert (tmp_path / 'set/skipped.tsv').read_text().startswith('b/7.wav\t')


def test_fewer_files_than_before_the_interruption(tmp_path, monkeypatch):
    """A shard of the plan before, which the new plan does not have, must not get into the set."""
    monkeypatch.setattr(plan_file, 'SHARD_CLIPS', 4)
    write_tree(tmp_path / 'x', tones(440))
    command = ['folder', f'--source={tmp_path}/x', f'--out_dir={tmp_path}/set', '--test_part=0']
    interrupted(monkeypatch, *command)
    for i in (1, 3, 5, 7):
        os.remove(tmp_path / f'x/b/{i}.wav')
    assert is_one_line_error(run(*command), 'train-00001', '--overwrite')
    assert run(*command, '--overwrite').code == 0
    assert len(peaks(tmp_path, ['train'])) == 4 and not os.path.exists(tmp_path / 'set/train-00001.pcm')


def test_a_set_of_before_is_read_and_replaced(tmp_path):
    """Sets of earlier versions have two columns of skipped files and other plans."""
    write_tree(tmp_path / 'x', tones(440))
    run('folder', f'--source={tmp_path}/x', f'--out_dir={tmp_path}/set')
    for split in ('train', 'test'):
        path = tmp_path / f'set/{split}-00000.npz'
        with np.load(path) as stored:
            arrays = {**stored, 'plan': np.array('of before'), 'skipped': np.zeros((0, 2), str)}
        np.savez(path, **arrays)
    before = contents(tmp_path / 'set')
    again = run('folder', f'--source={tmp_path}/x', f'--out_dir={tmp_path}/set')
    assert again.code == 0 and 'there already' in again.out and contents(tmp_path / 'set') == before
    assert len(peaks(tmp_path)) == 8
    assert run('folder', f'--source={tmp_path}/x', f'--out_dir={tmp_path}/set', '--overwrite').code == 0
    assert contents(tmp_path / 'set') != before


# --------------------------------------------------------------------------------------------------------------- locks

def test_two_preparations_in_one_folder(tmp_path):
    write_tree(tmp_path / 'x', tones(440))
    command = ['folder', f'--source={tmp_path}/x', f'--out_dir={tmp_path}/set']
    hold = ('import sys, time; from engine.files import locked\n'
            'with locked(sys.argv[1]): print("held", flush=True); sys.stdin.read()')

    def held(folder):
        other = subprocess.Popen([sys.executable, '-c', hold, str(folder)], cwd=ROOT, stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == 'held\n'
        return other
    with held(tmp_path / 'set') as other:                                   # makes all: nobody else may
        assert is_one_line_error(run(*command), 'in use')
        assert is_one_line_error(run(*command, '--shards=1/2'), 'in use')
        other.stdin.close()
    with held(tmp_path / 'set/.unfinished/share-1-of-2') as other:          # a share: other shares may
        assert is_one_line_error(run(*command), 'in use')
        assert is_one_line_error(run(*command, '--shards=1/2'), 'in use')
        assert run(*command, '--shards=2/2').code == 0
        other.stdin.close()
    assert run(*command, '--shards=1/2').code == 0 and run(*command).code == 0
    assert len(peaks(tmp_path)) == 8 and '.lock' not in os.listdir(tmp_path / 'set')
    with locked(str(tmp_path / 'set')):                                     # to look at a whole set is free
        assert 'there already' in run(*command).out


# ------------------------------------------------------------------------------------------------------ ends by signals

SLOW = '''
import time, prepare
from engine import processes
original = prepare.pack_clip
def pack_clip(*arguments):
    time.sleep(0.2)
    return original(*arguments)
prepare.pack_clip = pack_clip
processes.main(prepare.run)
'''


def started(*argv):
    return subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, start_new_session=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})


def children(pid):
    return subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True).stdout.split()


def group_of(pid):
    return subprocess.run(['pgrep', '-g', str(pid)], capture_output=True, text=True).stdout.split()


def wait_for(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError('never')


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_and_leaves_nothing_half_written(tmp_path, number, code):
    write_tree(tmp_path / 'x', noises(40))
    running = started('-c', SLOW, 'folder', f'--source={tmp_path}/x', f'--out_dir={tmp_path}/set', '--workers=0')
    wait_for(lambda: os.path.exists(tmp_path / 'set/.unfinished/test-00000.pcm.tmp'))
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == code and 'interrupted; 0 finished shards' in errors and 'Traceback' not in errors
    assert not os.path.exists(tmp_path / 'set')


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_whole_group_while_the_workers_start(tmp_path, number, code):
    """As a terminal and a batch system send it."""
    write_tree(tmp_path / 'x', noises(40))
    running = started('prepare.py', 'folder', f'--source={tmp_path}/x', f'--out_dir={tmp_path}/set', '--workers=2')
    wait_for(lambda: len(children(running.pid)) >= 2 or running.poll() is not None)
    time.sleep(0.3)                                                         # Python is up, its imports are not
    if number == signal.SIGINT:
        os.killpg(running.pid, number)
    else:
        running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == code and 'interrupted' in errors and 'Traceback' not in errors, errors
    wait_for(lambda: not group_of(running.pid))                             # no worker is left


def test_the_preparation_of_the_demo_from_inside_a_run_keeps_its_signals(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert call(prepare.run, 'demo', '--clips=10', '--workers=0', f'--out_dir={tmp_path}/demo').code == 0
    assert signal.getsignal(signal.SIGTERM) == before
    assert json.loads((tmp_path / 'demo/meta.json').read_text())['name'] == 'demo'
