"""Recipes on miniature data sets in their true layouts, and on damaged and hostile files.
   python -m pytest tests/test_prepare.py"""
import errno
import io
import json
import os
import struct
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
import soundfile
import torch

import prepare
from audio import decoding, making
from audio import sources as audio_sources
from audio.clips import open_clips, task_splits
from audio.sources import content_of
from recipes import plan as plan_file
from recipes.demo import synthesise

from .conftest import SHARED, call, is_one_line_error, needs_shared, write_wav


def sound(seconds, rate=16000, pitch=440.0, channels=1):
    t = np.arange(int(rate * seconds)) / rate
    wave = 0.4 * np.sin(2 * np.pi * pitch * t)
    return wave if channels == 1 else np.stack([wave] * channels, axis=1)


def audio_file(name, seconds=0.3, rate=16000, channels=1, **kind):
    """The bytes of an audio file in the format of the name's suffix."""
    out = io.BytesIO()
    kind = {'.mp3': dict(format='MP3'), '.ogg': dict(format='OGG', subtype='VORBIS'), '.flac': dict(format='FLAC'),
            '.wav': dict(format='WAV', subtype=kind.get('subtype', 'PCM_16'))}[os.path.splitext('x' + name)[1]]
    soundfile.write(out, sound(seconds, rate, channels=channels), rate, **kind)
    return out.getvalue()


def write_tree(root, files):
    for name, content in files.items():
        os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
        with open(os.path.join(root, name), 'wb') as f:
            f.write(content)
    return str(root)


def run(recipe, *argv):
    return call(prepare.run, recipe, '--workers=0', *argv)


def contents(folder):
    found = {}
    for file in sorted(os.listdir(folder)):
        with open(os.path.join(folder, file), 'rb') as f:
            found[file] = f.read()
    return found


# -------------------------------------------------------------------------------------------------------------- recipes

def fsdd_files(speakers=('jackson', 'theo'), takes=7, suffix='.wav'):
    return {f'free-spoken-digit-dataset-master/recordings/{digit}_{speaker}_{take}{suffix}':
            audio_file(suffix, 0.2 + take / 50, 8000)
            for digit in range(10) for speaker in speakers for take in range(takes)}


def zipped(path, files):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


def tarred(path, files, mode='w'):
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize('pack', ['zip', 'tar', 'tar.gz', 'folder'])
def test_fsdd_in_every_packing(tmp_path, pack):
    files = fsdd_files()
    source = {'zip': lambda: zipped(tmp_path / 'x.zip', files), 'tar': lambda: tarred(tmp_path / 'x.tar', files),
              'tar.gz': lambda: tarred(tmp_path / 'x.tgz', files, 'w:gz'),
              'folder': lambda: write_tree(tmp_path / 'x', files)}[pack]()
    out = tmp_path / 'fsdd'
    result = run('fsdd', f'--source={source}', f'--out_dir={out}')
    assert result.code == 0 and 'the data set has 3000' in result.out, result.err
    clips = open_clips(['fsdd'], str(tmp_path))
    test = open_clips(['fsdd'], str(tmp_path), ['test'])
    assert (len(clips), len(test)) == (10 * 2 * 2, 10 * 2 * 5)  # recordings 0-4 of each speaker and digit are the test
    assert clips.metas[0]['folds'] == ['jackson', 'theo'] and clips.classes == [str(digit) for digit in range(10)]
    for clip, key in enumerate(clips.keys()):
        digit, speaker, take = key.removesuffix('.wav').split('/')[-1].split('_')
        assert (clips.label[clip] == int(digit) and clips.metas[0]['folds'][clips.fold[clip]] == speaker
                and int(take) >= 5)
        assert abs(clips.length[clip] - 16000 * (0.2 + int(take) / 50)) < 3
    assert sorted(os.listdir(out)) == ['meta.json', 'test-00000.npz', 'test-00000.pcm', 'train-00000.npz',
                                       'train-00000.pcm']
    theo = open_clips(['fsdd'], str(tmp_path), only_fold='theo')
    assert len(theo) == 20 == len(open_clips(['fsdd'], str(tmp_path), leave_out=['fsdd/jackson']))


def test_another_folder_is_not_fsdd(tmp_path):
    source = write_tree(tmp_path / 'x', {'recordings/1_x.wav': b'', 'recordings/bark.wav': b'', '1_theo_3.wav': b''})
    assert is_one_line_error(run('fsdd', f'--source={source}', f'--out_dir={tmp_path}/set'), str(source),
                             'holds no recordings/DIGIT_SPEAKER_NUMBER.wav')
    assert not os.path.exists(tmp_path / 'set')


def esc_files(suffix='.ogg', clips=10):
    rows = ['filename,fold,target,category,esc10,src_file,take']
    files = {}
    for i in range(clips):
        target, fold = (0, 'dog', 10, 'rain')[i % 2 * 2:i % 2 * 2 + 2], i % 5 + 1
        rows.append(f'{fold}-{i}-A-{target[0]}.wav,{fold},{target[0]},{target[1]},True,{i},A')
        files[f'ESC-50-abc/audio/{fold}-{i}-A-{target[0]}{suffix}'] = audio_file(suffix, 0.4, 44100)
    files['ESC-50-abc/meta/esc50.csv'] = '\n'.join(rows).encode()
    return files


@pytest.mark.parametrize('suffix', ['.ogg', '.wav', '.flac'])
def test_esc50_layout_with_any_extension(tmp_path, suffix):
    result = run('esc50', f'--source={zipped(tmp_path / "x.zip", esc_files(suffix))}', f'--out_dir={tmp_path}/esc')
    assert result.code == 0 and 'the whole ESC-50 has 2,000 of 50' in result.out
    clips = open_clips(['esc'], str(tmp_path))
    assert clips.classes == ['dog', 'rain'] and clips.metas[0]['folds'] == list('12345')
    assert [len(open_clips(['esc'], str(tmp_path), only_fold=fold)) for fold in '12345'] == [2] * 5
    train, valid, test, _ = task_splits('esc', str(tmp_path), fold='3', validation_part=0.5)
    assert len(test) == 2 and len(train) + len(valid) == 8 and not (train.fold == 2).any()


def test_esc10_is_the_part_that_the_table_names(tmp_path):
    files = esc_files()
    files['ESC-50-abc/meta/esc50.csv'] = files['ESC-50-abc/meta/esc50.csv'].replace(b'rain,True', b'rain,False')
    source = zipped(tmp_path / 'x.zip', files)
    assert run('esc50', f'--source={source}', f'--out_dir={tmp_path}/esc', '--esc10').code == 0
    clips = open_clips(['esc'], str(tmp_path))
    assert len(clips) == 5 and clips.classes == ['dog']


@pytest.mark.parametrize('change, message', [
    (lambda files: files.pop('ESC-50-abc/audio/1-0-A-0.ogg'), '1-0-A-0'),
    (lambda files: files.pop('ESC-50-abc/meta/esc50.csv'), 'meta/esc50.csv'),
    (lambda files: files.update({'ESC-50-abc/meta/esc50.csv': b'a,b\n1,2\n'}), 'table'),
    (lambda files: files.update({'ESC-50-abc/meta/esc50.csv': b'\xff\xfe\x00'}), 'table')])
def test_esc50_with_something_missing(tmp_path, change, message):
    files = esc_files()
    change(files)
    result = run('esc50', f'--source={zipped(tmp_path / "x.zip", files)}', f'--out_dir={tmp_path}/esc')
    assert is_one_line_error(result, message) and not os.path.exists(tmp_path / 'esc')


def folder_files():
    files = {f'{label}/{name}': audio_file(name, 0.3) for label in ('bird', 'train')
             for name in ('a b.wav', '-c.flac', 'dé.ogg', 'e.mp3')}
    return {**files, 'bird/notes.txt': b'no audio', 'bird/._a b.wav': b'litter', 'bird/deep/g.wav': audio_file('.wav')}


def test_folder_of_every_format_with_classes(tmp_path):
    assert run('folder', f'--source={write_tree(tmp_path / "x", folder_files())}', f'--out_dir={tmp_path}/set',
               '--test_part=0.4').code == 0
    both = [open_clips(['set'], str(tmp_path), [split]) for split in ('train', 'test')]
    assert both[0].classes == ['bird', 'deep', 'train'] and sum(map(len, both)) == 9
    for clips in both:
        for clip, key in enumerate(clips.keys()):
            assert clips.classes[clips.label[clip]] == key.split('/')[-2]
            wave = clips.read(clip).astype(np.float32) / 32768
            spectrum = np.abs(np.fft.rfft(wave[:4096]))
            assert abs(np.argmax(spectrum) * 16000 / 4096 - 440) < 8       # the tone that was written


def test_folder_without_labels_and_with_a_split_file(tmp_path):
    source = write_tree(tmp_path / 'x', {f'{i}.wav': audio_file('.wav') for i in range(6)})
    (tmp_path / 'split.csv').write_text('0.wav,train\n1.wav,valid\n2.wav,test\n3.wav,test\n')
    assert run('folder', f'--source={source}', f'--out_dir={tmp_path}/set',
               f'--split_file={tmp_path}/split.csv').code == 0
    assert [len(open_clips(['set'], str(tmp_path), [split])) for split in ('train', 'valid', 'test')] == [1, 1, 2]
    assert open_clips(['set'], str(tmp_path)).classes == []
    for text, word in (('0.wav,nowhere', 'nowhere'), ('9.wav,test', '9.wav'), ('0.wav', '0.wav')):
        (tmp_path / 'split.csv').write_text(text)
        assert is_one_line_error(run('folder', f'--source={source}', f'--out_dir={tmp_path}/other',
                                     f'--split_file={tmp_path}/split.csv'), word)


@pytest.mark.parametrize('rate', [8000, 11025, 22050, 32000, 44100, 44101, 48000, 96000, 192000])
@pytest.mark.parametrize('channels', [1, 2, 6])
def test_any_rate_and_channel_count(rate, channels):
    wave = decoding.decode(audio_file('.wav', 0.5, rate, channels, subtype='FLOAT'), 60)
    assert wave.dtype == np.float32 and abs(len(wave) - 8000) <= 1
    want = sound(0.5)[:len(wave)]
    assert np.abs(wave[200:-200] - want[200:len(wave) - 200]).max() < 0.02


def test_demo_is_a_function_of_the_seed_and_hard_enough(tmp_path):
    from engine.processes import Process
    from scoring.features import log_mel_statistics
    from scoring.metrics import metrics
    from scoring.probes import linear_probe
    run('demo', '--clips=1200', f'--out_dir={tmp_path}/demo')
    for name, options in (('one', ['--seed=1']), ('two', ['--seed=2']), ('three', ['--seed=1'])):
        run('demo', '--clips=30', *options, f'--out_dir={tmp_path}/{name}')
    one, two, three = (contents(tmp_path / name)['train-00000.pcm'] for name in ('one', 'two', 'three'))
    assert one == three != two and contents(tmp_path / 'demo')['train-00000.pcm'].startswith(one[:2 * 20720])
    train, _, test, _ = task_splits('demo', str(tmp_path))
    assert np.bincount(test.label).tolist() == [24] * 10
    process, spectrum = (Process(0, 1, torch.device('cpu')),
                         {'frames': 128, 'window': 'hamming', 'mean': 0.0, 'std': 0.5, 'repeat': False})
    x, t = (log_mel_statistics(part, spectrum, process) for part in (train, test))
    targets, wanted = (part.targets(np.arange(len(part))) for part in (train, test))
    logits, _ = linear_probe((x, targets), t, False)
    accuracy = metrics(logits, wanted, False)[0]['accuracy']
    assert 0.2 < accuracy < 0.8, accuracy                                   # learnable, yet not by statistics


# ------------------------------------------------------------------------------------- restarting, workers, what is bad

def noises(count=40):
    return {f'{("a", "b")[i % 2]}/{i}.wav': audio_file('.wav', 0.1 + i / 100) for i in range(count)}


def test_same_bytes_for_any_number_of_workers_and_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_file, 'SHARD_CLIPS', 10)
    source = write_tree(tmp_path / 'x', noises())
    run('folder', f'--source={source}', f'--out_dir={tmp_path}/one/set')
    call(prepare.run, 'folder', '--workers=2', f'--source={source}', f'--out_dir={tmp_path}/two/set')
    assert contents(tmp_path / 'one/set') == contents(tmp_path / 'two/set') and len(contents(tmp_path / 'one/set')) > 6
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 17:
            raise KeyboardInterrupt
        return original(*arguments)
    original = prepare.pack_clip
    monkeypatch.setattr(prepare, 'pack_clip', interrupted)
    assert run('folder', f'--source={source}', f'--out_dir={tmp_path}/three/set').code == 130
    left = os.listdir(tmp_path / 'three/set/.unfinished')
    assert os.listdir(tmp_path / 'three/set') == ['.unfinished'] and 'test-00000.npz' in left
    assert 'meta.json' not in left and not any(name.endswith('.tmp') for name in left)
    assert is_one_line_error(call(lambda _: open_clips(['set'], str(tmp_path / 'three'))), 'meta.json')
    assert run('folder', f'--source={source}', f'--out_dir={tmp_path}/three/set').code == 0
    assert contents(tmp_path / 'one/set') == contents(tmp_path / 'three/set')
    finished = len(open_clips(['set'], str(tmp_path / 'three'), ['test']))
    assert len(calls) == 17 + 40 - finished                                 # the finished shard was not done again


def test_a_finished_set_stays_and_another_source_is_refused(tmp_path, monkeypatch):
    source, other = write_tree(tmp_path / 'x', noises(8)), write_tree(tmp_path / 'y', noises(9))
    run('folder', f'--source={source}', f'--out_dir={tmp_path}/set')
    before = contents(tmp_path / 'set')
    again = run('folder', f'--source={other}', f'--out_dir={tmp_path}/set')
    assert again.code == 0 and 'there already' in again.out and contents(tmp_path / 'set') == before
    os.remove(tmp_path / 'set' / 'meta.json')                               # as an earlier version left what it began
    assert is_one_line_error(run('folder', f'--source={other}', f'--out_dir={tmp_path}/set'), '--overwrite')
    assert contents(tmp_path / 'set').items() < before.items()
    (tmp_path / 'set' / 'mine.txt').write_text('not theirs to delete')
    assert run('folder', f'--source={other}', f'--out_dir={tmp_path}/set', '--overwrite').code == 0
    assert 'mine.txt' in os.listdir(tmp_path / 'set')


def corrupt_files():
    nan = io.BytesIO()
    soundfile.write(nan, np.array([0.1, np.nan] * 4000, np.float32), 16000, format='WAV', subtype='FLOAT')
    good = audio_file('.wav', 0.3)
    fast = good[:24] + struct.pack('<I', 2_000_000) + good[28:]
    slow = good[:24] + struct.pack('<I', 10) + good[28:]
    flac = audio_file('.flac', 1.0)
    return {'empty.wav': b'', 'text.wav': b'this is no audio', 'nan.wav': nan.getvalue(), 'fast.wav': fast,
            'slow.wav': slow, 'short.wav': audio_file('.wav', 0.02), 'torn.flac': flac[:len(flac) // 2],
            'torn.mp3': b'\xff\xfb\x90\x00' + bytes(50), 'nothing.wav': audio_file('.wav', 0.0),
            'long.wav': audio_file('.wav', 3.0)}


def test_bad_files_are_skipped_named_and_counted(tmp_path):
    bad = corrupt_files()
    source = write_tree(tmp_path / 'x', {**{f'bad/{name}': content for name, content in bad.items()}, **noises(10)})
    refused = run('folder', f'--source={source}', f'--out_dir={tmp_path}/set', '--max_minutes=0.04')
    assert (is_one_line_error(refused, '10 of 20 files', 'max_bad', '--max_bad=0.5')
            and not os.path.exists(tmp_path / 'set/meta.json'))
    assert run('folder', f'--source={source}', f'--out_dir={tmp_path}/set', '--max_minutes=0.04',
               '--max_bad=0.5').code == 0
    rows = dict(line.split('\t') for line in (tmp_path / 'set/skipped.tsv').read_text().splitlines())
    assert set(rows) == {f'bad/{name}' for name in bad}
    for name, reason in (('empty.wav', 'an empty file'), ('nan.wav', 'NaN'), ('fast.wav', '2000000 Hz'),
                         ('slow.wav', '10 Hz'), ('short.wav', 'shorter than one window'), ('long.wav', 'longer than')):
        assert reason in rows[f'bad/{name}'], rows
    with open(tmp_path / 'set/meta.json') as f:
        assert json.load(f)['skipped'] == 10
    assert sum(len(open_clips(['set'], str(tmp_path), [split])) for split in ('train', 'test')) == 10


def test_nothing_readable_leaves_nothing(tmp_path):
    source = write_tree(tmp_path / 'x', corrupt_files())
    assert is_one_line_error(run('folder', f'--source={source}', f'--out_dir={tmp_path}/set', '--max_minutes=0.04'),
                             'none of the 10 files')
    assert not os.path.exists(tmp_path / 'set')
    os.makedirs(tmp_path / 'hollow')
    assert is_one_line_error(run('folder', f'--source={tmp_path}/hollow', f'--out_dir={tmp_path}/set'), 'no audio file')
    assert not os.path.exists(tmp_path / 'set')


@needs_shared
def test_real_damaged_files_are_skipped(tmp_path):
    files = {f'good/{i}.wav': audio_file('.wav') for i in range(3)}
    with tarfile.open(os.path.join(SHARED, 'audio', 'damaged.tar')) as archive:
        files.update({member.name: archive.extractfile(member).read() for member in archive.getmembers()})
    source = tarred(tmp_path / 'x.tar', files)
    assert run('folder', f'--source={source}', f'--out_dir={tmp_path}/set', '--max_bad=0.8', '--test_part=0').code == 0
    assert (len((tmp_path / 'set/skipped.tsv').read_text().splitlines()) == 9
            and len(open_clips(['set'], str(tmp_path))) == 3)


def crash_on(place, *how):
    """Stands for a decoder that takes its process down."""
    if place[1].endswith('13.wav'):
        os._exit(139)
    return real_pack_clip(place, *how)


real_pack_clip = prepare.pack_clip


def test_a_decoder_that_crashes_costs_its_file_only(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, 'pack_clip', crash_on)
    source = write_tree(tmp_path / 'x', noises(40))
    result = call(prepare.run, 'folder', '--workers=2', f'--source={source}', f'--out_dir={tmp_path}/set',
                  '--max_bad=0.1')
    assert result.code == 0, result.err
    assert (tmp_path / 'set/skipped.tsv').read_text() == 'b/13.wav\tits decoder crashed\n'
    assert sum(len(open_clips(['set'], str(tmp_path), [split])) for split in ('train', 'test')) == 39


# -------------------------------------------------------------------------------------------------------------- hostile

def test_names_in_archives_are_never_paths(tmp_path):
    names = ['../../escape/a.wav', '/absolute/b.wav', 'ok/c.wav', 'ok/../../d.wav']
    files = {name: audio_file('.wav') for name in names}
    for pack in (zipped(tmp_path / 'x.zip', files), tarred(tmp_path / 'x.tar', files)):
        out = tmp_path / ('set-' + pack[-3:])
        assert run('folder', f'--source={pack}', f'--out_dir={out}').code == 0
        assert {name for name in os.listdir(out)} <= {'meta.json', 'train-00000.npz', 'train-00000.pcm',
                                                      'test-00000.npz', 'test-00000.pcm'}
    assert sorted(os.listdir(tmp_path)) == ['set-tar', 'set-zip', 'x.tar', 'x.zip'] and not os.path.exists('/absolute')


def test_one_damaged_member_costs_that_member(tmp_path):
    for kind, method in (('deflated', zipfile.ZIP_DEFLATED), ('lzma', zipfile.ZIP_LZMA), ('bzip2', zipfile.ZIP_BZIP2)):
        path = tmp_path / f'{kind}.zip'
        with zipfile.ZipFile(path, 'w', method) as archive:
            for name, content in noises(8).items():
                archive.writestr(name, content)
            middle = archive.getinfo('b/5.wav').header_offset + 200
        content = bytearray(path.read_bytes())
        content[middle:middle + 300] = bytes(300)
        path.write_bytes(content)
        assert run('folder', f'--source={path}', f'--out_dir={tmp_path}/{kind}', '--max_bad=0.2').code == 0
        assert (tmp_path / kind / 'skipped.tsv').read_text().startswith('b/5.wav\t')


def test_a_decompressed_archive_of_before_is_not_taken_for_another(tmp_path, monkeypatch):
    first, second = (tarred(tmp_path / f'{n}.tgz', noises(n), 'w:gz') for n in (9, 6))
    monkeypatch.setattr(prepare, 'prepare', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run('folder', f'--source={first}', f'--out_dir={tmp_path}/set').code == 130
    monkeypatch.undo()
    assert run('folder', f'--source={second}', f'--out_dir={tmp_path}/set', '--test_part=0').code == 0
    assert len(open_clips(['set'], str(tmp_path))) == 6
    assert not any(name.startswith('source') for name in os.listdir(tmp_path / 'set'))


def test_links_in_tars_are_not_followed(tmp_path):
    (tmp_path / 'secret.wav').write_bytes(audio_file('.wav'))
    with tarfile.open(tmp_path / 'x.tar', 'w') as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo(f'{kind.decode()}.wav')
            info.type, info.linkname = kind, str(tmp_path / 'secret.wav')
            archive.addfile(info)
    assert is_one_line_error(run('folder', f'--source={tmp_path}/x.tar', f'--out_dir={tmp_path}/set'), 'no audio file')


def test_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(audio_sources, 'MAX_FILE_BYTES', 1 << 20)
    files = {'bomb.wav': bytes(1 << 22), 'good.wav': audio_file('.wav')}
    assert run('folder', f'--source={zipped(tmp_path / "x.zip", files)}', f'--out_dir={tmp_path}/set',
               '--max_bad=0.5').code == 0
    assert 'larger than 1 MiB' in (tmp_path / 'set/skipped.tsv').read_text()
    monkeypatch.setattr(audio_sources, 'HARMLESS_BYTES', 1 << 19)             # by ratio: a zip grows a thousand times
    monkeypatch.setattr(audio_sources, 'MAX_FILE_BYTES', 1 << 30)
    assert run('folder', f'--source={tmp_path}/x.zip', f'--out_dir={tmp_path}/set', '--max_bad=0.5',
               '--overwrite').code == 0
    assert (tmp_path / 'set/skipped.tsv').read_text() == 'bomb.wav\tgrows more than 100 times when decompressed\n'
    bomb = tarred(tmp_path / 'x.tgz', {'bomb.wav': bytes(1 << 26)}, 'w:gz')
    assert is_one_line_error(run('folder', f'--source={bomb}', f'--out_dir={tmp_path}/other'), 'grows more than')
    assert not os.path.exists(tmp_path / 'other')


@pytest.mark.parametrize('damage', [lambda content: content[:len(content) // 2],
                                    lambda content: b'PK' + content[2:300], lambda content: bytes(5000)])
def test_damaged_archives_are_named(tmp_path, damage):
    for pack in (zipped(tmp_path / 'x.zip', noises(4)), tarred(tmp_path / 'x.tgz', noises(4), 'w:gz')):
        with open(pack, 'rb') as f:
            content = damage(f.read())
        with open(pack, 'wb') as f:
            f.write(content)
        assert is_one_line_error(run('folder', f'--source={pack}', f'--out_dir={tmp_path}/set'), os.path.basename(pack))
        assert not os.path.exists(tmp_path / 'set')


@pytest.mark.parametrize('argv, words', [
    ([], ['name a recipe']), (['--clips=3'], ['name a recipe']), (['fsd'], ["unknown recipe 'fsd'"]),
    (['folder'], ['--source']), (['folder', '--source=/nowhere/at/all'], ['/nowhere/at/all']),
    (['demo', '--klips=3'], ['klips', 'clips']), (['folder', '--source=.', '--label=x'], ['label']),
    (['folder', '--source=.', '--test_part=2'], ['test_part'])])
def test_wrong_commands(tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    assert is_one_line_error(call(prepare.run, *argv), *words)
    assert os.listdir(tmp_path) == []


def test_a_failing_disk_stops_and_loses_nothing(tmp_path, monkeypatch):
    source = write_tree(tmp_path / 'x', noises(8))
    original = content_of

    def failing(place):
        if place[1].endswith('5.wav'):
            raise OSError(errno.EIO, 'Input/output error', place[1])
        return original(place)
    monkeypatch.setattr(prepare, 'content_of', failing)
    assert is_one_line_error(run('folder', f'--source={source}', f'--out_dir={tmp_path}/set'), '5.wav', 'Input/output')
    monkeypatch.undo()
    assert run('folder', f'--source={source}', f'--out_dir={tmp_path}/set', '--test_part=0', '--overwrite').code == 0
    assert len(open_clips(['set'], str(tmp_path))) == 8


def interrupted(monkeypatch, *argv, after=None):
    """A preparation that is stopped before its set is whole, or after so many clips."""
    with monkeypatch.context() as patch:
        original, calls = prepare.pack_clip, []

        def counting(*arguments):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return original(*arguments)

        def stop(*_):
            raise KeyboardInterrupt
        if after is None:
            patch.setattr(making, 'finish', stop)
        else:
            patch.setattr(prepare, 'pack_clip', counting)
        result = run(*argv)
    assert result.code == 130 and 'run the same command again' in result.err, result.err
    return result


def test_a_shard_of_another_seed_is_not_taken_for_this_one(tmp_path, monkeypatch):
    interrupted(monkeypatch, 'demo', '--clips=30', f'--out_dir={tmp_path}/demo')
    other = ['demo', '--clips=30', '--seed=2', f'--out_dir={tmp_path}/demo']
    assert is_one_line_error(run(*other), '--overwrite')
    assert run(*other, '--overwrite').code == 0
    run('demo', '--clips=30', '--seed=2', f'--out_dir={tmp_path}/two/demo')
    assert contents(tmp_path / 'demo') == contents(tmp_path / 'two/demo')


def test_long_clips_are_counted_in_pieces(tmp_path, monkeypatch):
    whole = prepare.pack_clip((synthesise, 1, 3), 60)[1]
    monkeypatch.setattr(prepare, 'FRAMES', 37)
    np.testing.assert_allclose(prepare.pack_clip((synthesise, 1, 3), 60)[1], whole, rtol=1e-6)


def test_a_damaged_table_is_named(tmp_path):
    path = zipped(tmp_path / 'x.zip', esc_files())
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo('ESC-50-abc/meta/esc50.csv').header_offset + 60
    with open(path, 'r+b') as f:
        f.seek(place)
        f.write(bytes(40))
    assert is_one_line_error(run('esc50', f'--source={path}', f'--out_dir={tmp_path}/esc'), 'esc50.csv')


def test_a_tar_with_an_endless_name_takes_no_memory(tmp_path):
    header = tarfile.TarInfo('././@LongLink')
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 600 << 20
    (tmp_path / 'x.tar').write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b'x' * 5000)
    tracemalloc.start()
    result = run('folder', f'--source={tmp_path}/x.tar', f'--out_dir={tmp_path}/set')
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert is_one_line_error(result, 'x.tar', '600 MiB') and peak < 50e6


def test_a_header_that_lies_about_its_length_takes_no_memory():
    content = bytearray(audio_file('.wav', 0.5))
    content[40:44] = struct.pack('<I', 0xfffffff0)                          # the data chunk claims 4 GiB
    assert len(decoding.decode(bytes(content), 60)) == 8000


def test_stereo_is_averaged(tmp_path):
    left, right = sound(0.2), 0.25 * sound(0.2, pitch=1000)
    write_wav(str(tmp_path / 'x.wav'), np.stack([left, right], axis=1))
    assert np.abs(decoding.decode_file(str(tmp_path / 'x.wav')) - (left + right) / 2).max() < 1e-4
