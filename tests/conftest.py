"""Small prepared sets and settings that the tests share. Everything is generated;
../shared is used only where it exists."""
import contextlib
import io
import os
import re
import subprocess
import sys
import types
import wave

import numpy as np
import pytest
import torch

from engine import processes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHARED = os.path.join(os.path.dirname(ROOT), 'shared')
needs_shared = pytest.mark.skipif(not os.path.isdir(os.path.join(SHARED, 'audio')),
                                  reason='no ../shared/audio with real recordings')

TINY = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--frames=64', '--decoder_layers=1', '--decoder_groups=4',
        '--n_students=2', '--mask_block=2', '--workers=0', '--device=cpu']


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def write_wav(path, samples, rate=16000):
    """samples (n,) or (n, channels) in [-1, 1] as 16-bit PCM."""
    samples = np.asarray(samples)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with wave.open(str(path), 'wb') as f:
        f.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        f.setsampwidth(2)
        f.setframerate(rate)
        f.writeframes((samples * 32767).astype('<i2').tobytes())


def call(run, *argv):
    """run(argv) as the script would -> (exit code, stdout, stderr); a traceback fails the test."""
    out, err = io.StringIO(), io.StringIO()
    argv_before, sys.argv = sys.argv, ['script', *map(str, argv)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            processes.main(run)
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv_before
    return types.SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_a_terminal(monkeypatch):
    """What call() runs from here on believes that a person looks on."""
    monkeypatch.setattr(io, 'StringIO', Terminal)


def bars_of(result):
    """The titles of the progress bars on stderr."""
    return set(re.findall(r'([\w-]*):? *\d+%\|', result.err))


def is_one_line_error(result, *words):
    """Exit code 2 and exactly one line on stderr that starts with 'error:' and holds the words (progress bars
    apart)."""
    lines = [line for line in result.err.replace('\r', '\n').splitlines()
             if line.strip() and 'it/s]' not in line and 'clip/s]' not in line and '?clip' not in line]
    assert result.code == 2, (result.code, result.err)
    assert len(lines) == 1 and lines[0].startswith('error: '), lines
    assert all(word in lines[0] for word in words), lines
    return True


def script(*argv, timeout=120, cwd=ROOT, **environment):
    """A script of this repository in a process of its own."""
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=timeout, cwd=cwd,
                          env={**os.environ, 'OMP_NUM_THREADS': '1', **environment})


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A folder of prepared sets: demo (200 clips) and two folders of noises, one of them with odd lengths."""
    import prepare
    root = tmp_path_factory.mktemp('prepared')
    assert call(prepare.run, 'demo', '--clips=200', '--workers=0', f'--out_dir={root}/demo').code == 0
    rng = np.random.default_rng(0)
    for i in range(24):
        name = ('low', 'high')[i % 2]
        t = np.arange(rng.integers(6000, 30000)) / 16000
        write_wav(f'{root}/source/{name}/{i}.wav',
                  0.3 * np.sin(2 * np.pi * (300, 2000)[i % 2] * t) + 0.05 * rng.standard_normal(len(t)))
    assert call(prepare.run, 'folder', f'--source={root}/source', '--workers=0', f'--out_dir={root}/noises').code == 0
    return str(root)
