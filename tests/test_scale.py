"""What two million clips, long files and many workers cost: memory, starts, restarts.
   python -m pytest tests/test_scale.py"""
import collections
import contextlib
import errno
import io
import multiprocessing
import os
import struct
import sys
import tempfile
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

import data
import prepare
from audio import decoding, workers
from audio import sources as audio_sources
from audio.clips import Clips
from audio.sources import Section, content_of, list_source, read_bytes
from audio.workers import AHEAD, CRASHED, Worker, in_order
from engine import machine
from engine.errors import ConfigError, DataError
from engine.loading import batches_ahead
from recipes import plan as plan_file

from .conftest import call, is_one_line_error
from .test_prepare import audio_file, contents, noises, run, sound, tarred, write_tree, zipped


@contextlib.contextmanager
def pool(count, folder=None):
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(contextlib.closing(Worker(folder))) for _ in range(count)]


def noise_file(path, seconds, rate=16000, channels=1, kind='WAV'):
    """White noise, written a minute at a time."""
    rng = np.random.default_rng(0)
    with soundfile.SoundFile(path, 'w', rate, channels, format=kind) as f:
        for first in range(0, seconds, 60):
            f.write(rng.uniform(-0.3, 0.3, (min(60, seconds - first) * rate, channels)))
    return 'file', str(path)


# ------------------------------------------------------------------------------------------------------------- workers

def twice(number, how):
    return number * how


def slow_twice(number, how):
    time.sleep(0.05)
    return number * how


def die_on_three(number, how):
    if number == 3:
        os._exit(139)
    return slow_twice(number, how)


def pid(number):
    time.sleep(0.2)
    return os.getpid()


def seconds_of_process(number):
    return time.process_time()


def test_a_crash_restarts_one_process_within_two_seconds():
    """Of its own time: others may keep the machine busy. To import PyTorch alone takes as long."""
    with pool(3) as several:
        list(in_order(slow_twice, range(9), (2,), several))
        before = [worker.process.pid for worker in several]
        assert list(in_order(die_on_three, range(9), (2,), several)) == [0, 2, 4, CRASHED, 8, 10, 12, 14, 16]
        after = {worker.process.pid for worker in several if worker.process}
        assert len(set(before) - after) <= 2                                # it died twice, the others were left alone
        several[0].close()
        assert list(in_order(seconds_of_process, [0], (), several))[0] < 1.5


def test_a_worker_killed_from_outside_costs_nothing():
    with pool(2) as several:
        results = in_order(slow_twice, range(40), (2,), several)
        got = [next(results)]
        several[0].process.kill()
        assert got + list(results) == [2 * i for i in range(40)]


def test_no_more_processes_start_than_there_is_work_for():
    with pool(8) as several:
        assert len(set(in_order(pid, range(3), (), several))) == 3
        assert sum(worker.process is not None for worker in several) == 3


def fail(number):
    raise OSError(errno.EIO, 'Input/output error', 'disk')


def test_an_exception_in_a_worker_is_raised_here():
    with pool(2) as several, pytest.raises(OSError, match='disk'):
        list(in_order(fail, range(3), (), several))


class Simulated:
    """A worker that makes an hour of sound at once, and keeps of it what may stay in memory; all count what they keep.
    """
    kept = most = 0

    def __init__(self):
        self.jobs, self.connection = collections.deque(), self

    def give(self, number, function, item, max_seconds, most):
        self.jobs.append(number)
        self.clip = min(most, 115_200_000)
        Simulated.kept += self.clip
        Simulated.most = max(Simulated.most, Simulated.kept)

    def recv(self):
        return self.clip


def test_64_workers_on_hour_long_files_stay_below_eight_gigabytes(monkeypatch):
    """Simulated workers; what one takes beside clips is measured below."""
    settings = type('Settings', (), dict(workers=64, memory=8.0))
    most = prepare.bytes_per_clip(settings)
    several, order = [Simulated() for _ in range(64)], np.random.default_rng(0)
    monkeypatch.setattr(workers.multiprocessing.connection, 'wait', lambda busy: [
        list(busy)[i] for i in order.permutation(len(busy))[:3]])
    for clip in in_order(None, range(2000), (3600, most), several):
        Simulated.kept -= clip
    assert 0.5 * 64 * AHEAD * most < Simulated.most <= 64 * AHEAD * most    # some use of it, and no more
    assert Simulated.most + (2 * 64 + 1) * most + 64 * prepare.PROCESS_BYTES + prepare.OWN_BYTES <= 8e9


def peak_of_process():
    with open('/proc/self/status') as f:
        kib = next(int(line.split()[1]) for line in f if line.startswith('VmHWM'))
    raise ValueError(f'{kib}')                                              # as the reason why there is no clip


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='no /proc')
@pytest.mark.parametrize('minutes, rate, channels, kind', [
    (20, 44100, 2, 'WAV'), (30, 16000, 1, 'FLAC')])
def test_a_long_file_takes_a_worker_no_more_memory_than_is_counted(tmp_path, minutes, rate, channels, kind):
    short, long = noise_file(tmp_path / 'short', 1), noise_file(tmp_path / 'long', 60 * minutes, rate, channels, kind)
    with pool(1, str(tmp_path)) as one:
        how = 1e9, 1 << 20
        (_, _), first = in_order(prepare.pack_clip, [short, (peak_of_process,)], how, one)
        (pcm, _), last = in_order(prepare.pack_clip, [long, (peak_of_process,)], how, one)
    assert isinstance(pcm, decoding.Spilled) and len(pcm) == minutes * 60 * 16000
    assert (int(last) - int(first)) << 10 < prepare.PROCESS_BYTES, (first, last)


@pytest.mark.parametrize('rate', [8000, 44100, 44101, 48000, 192000, 11025])
def test_resampling_in_pieces_is_resampling_whole(monkeypatch, rate):
    """Reference: torchaudio on the whole wave."""
    monkeypatch.setattr(decoding, 'PIECE', 20000)
    wave = np.random.default_rng(0).uniform(-1, 1, 5 * 20000 + 1234).astype(np.float32)
    ratio = decoding.fractions.Fraction(rate, 16000).limit_denominator(4000)
    want = torchaudio.functional.resample(torch.from_numpy(wave), ratio.numerator, ratio.denominator).numpy()
    for cuts in ([20000] * 5, [1, 7, 15000, 30000, 29999]):
        pieces = list(decoding.resampled(iter(np.split(wave, np.cumsum(cuts))), rate))
        np.testing.assert_allclose(np.concatenate(pieces), want, atol=2e-6)
        assert len(pieces) > 2
    assert list(decoding.resampled(iter([]), rate)) == []


def test_channels_that_cancel_in_a_long_file(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, 'PIECE', 4000)
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))                 # where the long one is spilled
    wave = np.stack([-0.995 * sound(4), sound(4)], axis=1)
    soundfile.write(tmp_path / 'x.wav', wave, 16000)
    for most in (1e9, 1000):
        pcm, _ = prepare.pack_clip(('file', str(tmp_path / 'x.wav')), 60, most)
        assert len(pcm) == 64000 and np.abs(pcm[0:64000] - wave[:, 1] * 32768).max() <= 1


PACKS = {'folder': write_tree, 'zip': zipped, 'tar': tarred}
FORMATS = ['.wav', '.flac', '.ogg', '.mp3']


@pytest.mark.parametrize('pack', ['folder', 'zip', 'tar'])
def test_large_files_are_read_where_they_lie(tmp_path, monkeypatch, pack):
    """Reference: the same files, read at once."""
    files = {f'a/{i}{suffix}': b'junk' * 999 * (suffix == '.mp3') + audio_file(suffix, 0.5, 44100, 2)
             for i, suffix in enumerate(FORMATS)}
    files['b/torn.flac'], files['b/torn.ogg'] = (audio_file(suffix)[:-500] for suffix in ('.flac', '.ogg'))
    source = PACKS[pack](tmp_path / f'x.{pack}', files)
    command = ['folder', f'--source={source}', '--max_bad=0.5', '--test_part=0']
    assert run(*command, f'--out_dir={tmp_path}/one/set').code == 0
    monkeypatch.setattr(audio_sources, 'WHOLE', 1500)
    assert run(*command, f'--out_dir={tmp_path}/two/set').code == 0
    assert contents(tmp_path / 'one/set') == contents(tmp_path / 'two/set')
    assert len((tmp_path / 'one/set/skipped.tsv').read_text().splitlines()) == 2


def test_a_section_is_read_like_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(audio_sources, 'WHOLE', 100)
    content = np.random.default_rng(0).bytes(1000)
    (tmp_path / 'x').write_bytes(b'before' + content + b'after')
    with content_of(('tar', str(tmp_path / 'x'), 6, 1000)) as section:
        assert isinstance(section, Section) and len(section) == 1000
        for part in (slice(0, 5), slice(990, 2000), slice(5, 3), slice(-3, 999)):
            assert section[part] == content[part]
        assert section[7:][3:8] == content[10:15] and len(section[7:]) == 993
        assert io.BufferedReader(section).read() == content


def test_a_disk_that_fails_in_a_large_file_is_not_the_files_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(audio_sources, 'WHOLE', 1000)
    write_tree(tmp_path / 'x', noises(3))
    reads, original = [], os.pread

    def failing(*where):
        reads.append(where)
        if len(reads) > 8:
            raise OSError(errno.EIO, 'Input/output error')
        return original(*where)
    monkeypatch.setattr(os, 'pread', failing)
    result = run('folder', f'--source={tmp_path}/x', f'--out_dir={tmp_path}/set')
    assert result.code == 2 and 'Input/output error' in result.err.splitlines()[-1]


@pytest.mark.parametrize('processes', [0, 2])
def test_clips_too_large_for_memory_go_by_way_of_the_disk(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(plan_file, 'SHARD_CLIPS', 10)
    source = write_tree(tmp_path / 'x', {**noises(20), 'a/torn.flac': audio_file('.flac', 2.0)[:-500]})
    command = ['folder', f'--source={source}', f'--workers={processes}', '--max_bad=0.1']
    assert call(prepare.run, *command, f'--out_dir={tmp_path}/one/set').code == 0
    monkeypatch.setattr(prepare, 'bytes_per_clip', lambda settings: 5000)
    left = []
    monkeypatch.setattr(prepare, 'write_shard', lambda *given, original=prepare.write_shard: (
        original(*given), left.extend((tmp_path / 'two/set/.unfinished').glob('temporary-*/*'))))
    os.makedirs(tmp_path / 'two/set/.unfinished/temporary-of a killed one')
    assert call(prepare.run, *command, f'--out_dir={tmp_path}/two/set').code == 0
    assert contents(tmp_path / 'one/set') == contents(tmp_path / 'two/set') and left == []


def test_too_little_memory_is_said_in_a_line(tmp_path, monkeypatch):
    source = write_tree(tmp_path / 'x', noises(2))
    command = ['folder', f'--source={source}', f'--out_dir={tmp_path}/set']
    assert is_one_line_error(call(prepare.run, *command, '--workers=4', '--memory=0.2'), 'memory', '4', '1.07')
    assert prepare.configured([*command, '--memory=0.84'])[1].workers == 1      # as many as fit, at least one
    assert prepare.configured([*command, '--memory=100'])[1].workers == machine.cores()
    monkeypatch.setattr(machine, 'memory', lambda: 1e9)                     # a small machine is never refused
    assert prepare.configured(command)[1].workers == 1
    assert prepare.configured([*command, '--workers=3'])[1].memory == prepare.least_memory(3)


# --------------------------------------------------------------------------------------------------------- the machine

@pytest.mark.parametrize('own, files, cores, memory', [
    ('0::/a/b\n', {'a/b/cpu.max': '300000 100000', 'a/memory.max': '2000000', 'a/b/memory.max': 'max'}, 3, 2000000),
    ('0::/\n', {'cpu.max': 'max 100000', 'memory.high': '5000'}, 8, 5000),
    ('3:memory:/x\n1:cpu,cpuacct:/y\n', {'memory/memory.limit_in_bytes': '700', 'cpu/y/cpu.cfs_quota_us': '150000',
                                         'cpu/y/cpu.cfs_period_us': '100000'}, 1, 700),
    ('1:cpu:/y\n', {'cpu/y/cpu.cfs_quota_us': '-1', 'cpu/y/cpu.cfs_period_us': '100000'}, 8, 1 << 62)])
def test_cores_and_memory_are_those_of_the_container(tmp_path, monkeypatch, own, files, cores, memory):
    for name, text in files.items():
        os.makedirs(os.path.dirname(tmp_path / name), exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / 'own').write_text(own)
    monkeypatch.setattr(machine.cgroups, '__defaults__', (str(tmp_path), str(tmp_path / 'own')))
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(8))
    monkeypatch.setattr(os, 'sysconf', lambda name: 1 << 31)
    assert (machine.cores(), machine.memory()) == (cores, memory)


# ---------------------------------------------------------------------------------------------------------------- zips

def test_no_worker_reads_a_zips_directory(tmp_path, monkeypatch):
    source = zipped(tmp_path / 'x.zip', noises(20))
    files = list_source(source, '')
    monkeypatch.setattr(zipfile, 'ZipFile', None)
    with open(source, 'r+b') as f:
        f.truncate(os.path.getsize(source) - 300)                           # nor could it
    waves = {name: prepare.pack_clip(files.place(i), 60)[0] for i, name in files.audio()}
    for name, content in noises(20).items():
        assert np.abs(waves[name] - decoding.decode(content, 60) * 32768).max() <= 0.5


def test_a_directory_of_many_members_takes_little_memory(tmp_path):
    """zipfile's list takes 590 bytes a member; of a plan its place, 22 bytes, and its name are kept."""
    n = 20000
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as archive:
        for i in range(n):
            archive.writestr(f'unbalanced/Y{i:011d}_30000.flac', b'')
    tracemalloc.start()
    try:
        files = list_source(str(tmp_path / 'x.zip'), '')
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert plan_file.Entry('', files.place(3), -1, -1).stamp() == repr(zlib.crc32(b''))     # as it always was
    assert len(files.names) == n and kept < 75 * n and peak < 250 * n, (kept / n, peak / n)


def test_a_zip_inside_a_program_or_behind_junk_has_its_members_where_they_are(tmp_path):
    zipped(tmp_path / 'x.zip', noises(4))
    (tmp_path / 'y.zip').write_bytes(b'MZ' + bytes(777) + (tmp_path / 'x.zip').read_bytes())
    one, other = (list_source(str(tmp_path / name), '') for name in ('x.zip', 'y.zip'))
    for i in range(4):
        assert read_bytes(one.place(i)) == read_bytes(other.place(i)) != b''


def central(path, change):
    """Change every record of a zip's directory: change(record of 46 bytes and more)."""
    content = bytearray(path.read_bytes())
    place = content.find(b'PK\1\2')
    while place >= 0:
        change(memoryview(content)[place:place + 46])
        place = content.find(b'PK\1\2', place + 46)
    path.write_bytes(content)
    return str(path)


def put(code, offset, value):
    return lambda record: struct.pack_into(code, record, offset, value)


@pytest.mark.parametrize('change, reason', [
    (put('<I', 42, 0), 'Bad CRC'), (put('<I', 42, 5), 'no member where'), (put('<I', 42, 1 << 30), 'no member where'),
    (put('<I', 16, 1), 'Bad CRC'), (put('<I', 24, 100), 'Bad CRC'), (put('<I', 20, 3), ''),
    (put('<H', 10, 9), 'compression'), (put('<H', 10, 0), 'Bad CRC')])
@pytest.mark.parametrize('whole', [1 << 20, 1000])
def test_zips_that_lie_cost_the_members_that_they_lie_about(tmp_path, monkeypatch, change, reason, whole):
    monkeypatch.setattr(audio_sources, 'WHOLE', whole)
    zipped(tmp_path / 'x.zip', {f'a/{i}.wav': audio_file('.wav', 0.5 + i / 10) for i in range(3)})
    files = list_source(central(tmp_path / 'x.zip', change), '')
    results = [prepare.pack_clip(files.place(i), 60) for i in range(3)]
    assert all(isinstance(result, str) and reason in result for result in results[1:]), results


def test_an_encrypted_member_is_no_sound(tmp_path):
    path = tmp_path / 'x.zip'
    zipped(path, {'a/1.wav': audio_file('.wav')})
    content = bytearray(path.read_bytes())
    content[6] |= 1                                                         # of the member's own header
    path.write_bytes(content)
    assert 'encrypted' in prepare.pack_clip(list_source(str(path), '').place(0), 60)


def test_offsets_of_64_bits(tmp_path):
    """A directory that says that its member lies beyond what a file can hold."""
    path = tmp_path / 'x.zip'
    zipped(path, {'a/1.wav': audio_file('.wav')})
    content = path.read_bytes()
    first, end = content.find(b'PK\1\2'), content.find(b'PK\5\6')
    record = bytearray(content[first:end]) + struct.pack('<HHQ', 1, 8, 1 << 63)
    struct.pack_into('<H', record, 30, 12)                                  # the length of its further fields
    struct.pack_into('<I', record, 42, 0xffffffff)
    last = bytearray(content[end:])
    struct.pack_into('<I', last, 12, len(record))
    path.write_bytes(content[:first] + record + last)
    assert isinstance(prepare.pack_clip(list_source(str(path), '').place(0), 60), str)


# ------------------------------------------------------------------------------------------------------------- loading

def many_clips(folder, shards, per_shard, samples=1600):
    """Clips of a set of many sparse shards; only the first samples of a few clips are not zero."""
    for shard in range(shards):
        with open(folder / f'{shard}.pcm', 'wb') as f:
            f.truncate(2 * per_shard * samples)
            f.seek(2 * samples * (shard % per_shard))
            f.write(np.full(5, shard + 1, np.int16).tobytes())
    row = np.tile(np.arange(per_shard, dtype=np.int32), shards)
    return Clips([str(folder / str(shard)) for shard in range(shards)], [], offset=row.astype(np.int64) * samples,
                 length=np.full(len(row), samples), shard=np.repeat(np.arange(shards, dtype=np.int32), per_shard),
                 row=row)


def test_clips_of_934_shards_take_no_open_files(tmp_path):
    """More than a process may open by default on some systems; each read is of the right place."""
    clips, before = many_clips(tmp_path, 934, 7), len(os.listdir('/proc/self/fd'))
    for i in np.random.default_rng(0).permutation(len(clips))[:2500]:
        shard, row = divmod(int(i), 7)
        assert clips.read(i, 2, 4).tolist() == ([shard + 1] * 3 + [0] if row == shard % 7 else [0] * 4)
    assert len(os.listdir('/proc/self/fd')) == before
    assert len(clips.read(0)) == 1600 and len(clips.read(0, 1500, 900)) == 100 and len(clips.read(0, 1700)) == 0


def test_a_shard_that_was_cut_short_meanwhile_is_named(tmp_path):
    clips = many_clips(tmp_path, 2, 3)
    os.truncate(tmp_path / '1.pcm', 5000)
    with pytest.raises(DataError, match='1.pcm is shorter'):
        clips.read(5)


class NeverCopied(Clips):
    def __getstate__(self):
        raise AssertionError('the index of two million clips was pickled')


@pytest.mark.skipif(sys.platform != 'linux', reason='workers are forked on Linux alone')
def test_workers_share_the_index_of_two_million_clips(tmp_path):
    """Whatever way Python starts processes by default: by forkserver since 3.14."""
    few = many_clips(tmp_path, 2, 3)
    clips = NeverCopied(few.shards, [], **{name: np.resize(getattr(few, name), 2_000_000)
                                           for name in ('offset', 'length', 'shard', 'row')})
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method('spawn', force=True)
    try:
        batches = list(data.loader(data.PretrainBatches(clips, 8, 4, range(4), 1), range(3), workers=2))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert len(batches) == 3 and batches[0]['pcm'].shape == (4, 1520)


def test_batches_that_do_not_fit_in_shared_memory(tmp_path, monkeypatch):
    size, free = 2 * 48 * 160240, 0
    monkeypatch.setattr(os, 'statvfs', lambda _: type('Free', (), dict(f_bavail=free >> 12, f_frsize=4096)))
    for free, count, ahead in ((10 << 30, 8, 4), (472 << 20, 8, 3), (200 << 20, 8, 1), (64 << 20, 1, 2)):
        assert batches_ahead(size, count, tmp_path) == ahead
        assert (ahead * count + 2) * size <= free
    with pytest.raises(ConfigError, match='8 workers need 146 MiB of shared memory.*has 64 free: give fewer --workers'):
        batches_ahead(size, 8, tmp_path)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    assert batches_ahead(size, 2, tmp_path / 'none') == 4                  # no such folder: another system
    with pytest.raises(ConfigError, match='2 workers'):
        batches_ahead(size, 2, tmp_path)
