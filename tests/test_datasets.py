"""AudioSet, Speech Commands, ESC-50 and FSDD in their true layouts, in miniature, from file names to results.
python -m pytest tests/test_datasets.py"""

import csv
import hashlib
import http.server
import io
import os
import re
import shutil
import socket
import subprocess
import threading
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluation
import finetune
import prepare
import pretrain
from audio import decoding
from audio.clips import open_clips
from audio.sources import Files
from checkpoints.opening import open_checkpoint
from recipes import audioset as audioset_recipe
from recipes import esc50, fsdd, speechcommands
from recipes import plan as plan_file
from recipes.plan import SHARD_CLIPS

from .conftest import ROOT, TINY, call, is_one_line_error
from .test_finetune import pretrained  # noqa: F401  (fixture)
from .test_prepare import audio_file, contents, esc_files, fsdd_files, run, tarred, write_tree, zipped

TUNE = [
    '--max_steps=2',
    '--warmup_steps=1',
    '--batch_size=4',
    '--workers=0',
    '--device=cpu',
    '--log_interval=1',
    '--compile=False',
    '--frames=64',
]


def tune_and_evaluate(config, dataset, ckpt, root, *options):
    """finetune.py with one of our recipes, a few steps, then eval.py -> what the latter prints."""
    out = f'{root}/tuned'
    result = call(
        finetune.run,
        os.path.join(ROOT, 'config', config),
        *TUNE,
        f'--ckpt={ckpt}',
        f'--data_dir={root}',
        f'--dataset={dataset}',
        f'--out_dir={out}',
        *options,
    )
    assert result.code == 0, result.err
    if 'fold-1' in os.listdir(out):
        out += '/fold-1'
    evaluated = call(evaluation.run, f'--ckpt={out}/best.pt', f'--data_dir={root}', '--device=cpu')
    assert evaluated.code == 0, evaluated.err
    return result.out, evaluated.out


# ------------------------------------------------------------------------------------------------------------- AudioSet

LABELS = ['Speech', 'Male speech, man speaking', 'Dog', 'Gush', 'Ukulele']
MIDS = ['/m/09x0r', '/m/05zppz', '/m/0bt9lr', '/t/dd00088', '/m/07xzm']
# id, start, classes, file name in the source (None: not there)
BALANCED = [
    ('--PJHxphWEs', 30, (0, 3), 'bal_train/--PJHxphWEs.flac'),
    ('-0RWZT-miFs', 420, (2,), 'a/Y-0RWZT-miFs.wav'),
    ('_0xAxjKvgoE', 0, (4,), '3f/_0xAxjKvgoE_0_10000.ogg'),
    ('a_30_40-50_', 30, (0, 1), 'x/y/a_30_40-50__30000.wav'),
    ('Yabcdefghij', 10, (1,), 'Yabcdefghij_10.000.wav'),
    ('abcdefghijk', 40, (2, 4), 'Yabcdefghijk_40000_50000.wav'),
    ('missing-one', 10, (0,), None),
    ('torn_to_bit', 20, (3,), 'torn_to_bit.flac'),
]
UNBALANCED = [
    ('AAAAAAAAAA1', 100, (0,), 'u/AAAAAAAAAA1-100-110.wav'),
    ('AAAAAAAAAA2', 5, (0, 2), 'u/AAAAAAAAAA2_000005.wav'),
    ('AAAAAAAAAA3', 7, (3,), 'u/AAAAAAAAAA3_8000_18000.wav'),
]  # another start: not the segment
EVAL = [(f'evaluation{i}', i, (i % 5,), f'eval/evaluation{i}.wav') for i in range(6)]


def segment_list(path, segments):
    lines = [
        '# Segments csv created Sun Mar  5 10:54:31 2017',
        f'# num_ytids={len(segments)}, num_segs={len(segments)}',
        '# YTID, start_seconds, end_seconds, positive_labels',
    ]
    lines += [
        f'{name}, {start:.3f}, {start + 10:.3f}, "{",".join(MIDS[c] for c in classes)}"'
        for name, start, classes, _ in segments
    ]
    path.write_text('\n'.join(lines) + '\n')
    return str(path)


@pytest.fixture
def audioset(tmp_path):
    files = {}
    for i, (_, _, _, name) in enumerate([*BALANCED, *UNBALANCED, *EVAL]):
        if name:
            files[name] = audio_file(os.path.splitext(name)[1], 0.5 + i / 50, (44100, 48000, 16000)[i % 3])
    files['torn_to_bit.flac'] = files['torn_to_bit.flac'][:300]
    files['u/notes.txt'], files['u/nothing to do with it.wav'] = b'x', audio_file('.wav')
    with open(tmp_path / 'labels.csv', 'w', newline='') as f:
        writer = csv.writer(f)
        writer.writerow(['index', 'mid', 'display_name'])
        writer.writerows([i, mid, name] for i, (mid, name) in enumerate(zip(MIDS, LABELS)))
    write_tree(tmp_path / 'audio', files)
    for name, segments in (('balanced_train', BALANCED), ('unbalanced_train', UNBALANCED), ('eval', EVAL)):
        segment_list(tmp_path / f'{name}_segments.csv', segments)
    return tmp_path


def prepare_audioset(root, lists, *options):
    return run(
        'audioset',
        f'--source={root}/audio',
        f'--labels={root}/labels.csv',
        f'--segments={",".join(f"{root}/{name}_segments.csv" for name in lists)}',
        *options,
    )


def test_audioset_is_found_labelled_tuned_on_and_evaluated(audioset, pretrained):  # noqa: F811
    result = prepare_audioset(
        audioset, ['balanced_train', 'unbalanced_train'], f'--out_dir={audioset}/as2m', '--max_bad=0.2'
    )
    assert result.code == 0, result.err
    assert (
        'balanced_train_segments.csv: 7 of its 8 segments found' in result.out
        and 'unbalanced_train_segments.csv: 2 of its 3 segments found' in result.out
        and 'warning: 5 classes' in result.out
    )
    clips = open_clips(['as2m'], str(audioset))
    assert clips.multi_label and clips.classes == LABELS and len(clips) == 8
    found = dict(zip(clips.keys(), clips.targets(np.arange(8))))
    for name, start, classes, file in [*BALANCED, *UNBALANCED[:2]]:
        if file and name != 'torn_to_bit':
            assert np.flatnonzero(found[f'{name}_{start * 1000}']).tolist() == list(classes)
    assert (audioset / 'as2m/skipped.tsv').read_text().startswith('torn_to_bit_20000\t')
    assert prepare_audioset(audioset, ['eval'], f'--out_dir={audioset}/as_eval').code == 0
    told, evaluated = tune_and_evaluate(
        'finetune_as2m.py', 'as2m', pretrained, audioset, '--epoch_clips=5', '--validation_part=0.3'
    )
    assert 'mAP' in told and 'mAUC' in evaluated and 'd-prime' in evaluated and 'on as_eval' in evaluated
    with open(audioset / 'tuned/classes-as_eval-best.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert [row['class'] for row in rows] == LABELS and set(rows[0]) == {'class', 'clips', 'average_precision', 'auc'}
    tested = open_clips(['as_eval'], str(audioset), ['eval'])
    assert [int(row['clips']) for row in rows] == tested.targets(np.arange(len(tested))).sum(axis=0).tolist()
    scores = [float(row['average_precision']) for row in rows if int(row['clips'])]
    assert f'mAP {np.mean(scores):.4f}' in evaluated
    told, _ = tune_and_evaluate(
        'finetune_as20k.py', 'as2m', pretrained, audioset, '--validation_part=0.3', '--overwrite'
    )
    assert 'test, best' in told
    result = call(
        finetune.run,
        os.path.join(ROOT, 'config/finetune_as20k.py'),
        *TUNE,
        f'--ckpt={pretrained}',
        f'--data_dir={audioset}',
        '--dataset=as2m',
        f'--out_dir={audioset}/all',
        '--validation_part=0',
    )
    assert result.code == 0 and 'test, last' in result.out and 'best' not in result.out.split('test, last')[1]


def test_the_default_names_of_the_parts(audioset, monkeypatch):
    monkeypatch.chdir(audioset)
    for lists, name in (
        (['balanced_train'], 'as20k'),
        (['eval'], 'as_eval'),
        (['balanced_train', 'unbalanced_train'], 'as2m'),
    ):
        assert prepare_audioset(audioset, lists, '--max_bad=0.2').code == 0 and os.path.exists(f'data/{name}/meta.json')


@settings(max_examples=200, deadline=None)
@given(
    name=st.text('abzAZ019-_', min_size=11, max_size=11),
    start=st.integers(0, 9999),
    prefix=st.sampled_from(['', 'Y']),
    form=st.sampled_from(['', '_{0}', '_{0}_{1}', '_{2}', '_{2}_{3}', '_{0}.000', '-{0}-{1}', '_{0:06d}_{1:06d}']),
    folder=st.sampled_from(['', 'a/', '0f/3c/']),
)
def test_every_way_to_name_a_file_leads_to_its_segment(name, start, prefix, form, folder):
    files = Files('folder', '/')
    files.add('x/unrelated_30.wav')
    files.add(folder + prefix + name + form.format(start, start + 10, start * 1000, start * 1000 + 10000) + '.flac')
    ids, starts = np.array([b'-----------', name.encode(), b'zzzzzzzzzzz'], 'S11'), np.array([1, start * 1000, 2])
    assert audioset_recipe.match_segments(ids, starts, files).tolist() == [-1, 1, -1]
    other = audioset_recipe.match_segments(ids, starts + 3000, files).tolist()  # a start that is written must agree
    assert other == ([-1, -1, -1] if form else [-1, 1, -1])


def test_one_id_with_two_segments_is_told_apart_by_its_start():
    files = Files('folder', '/')
    for name in ('abcdefghijk_40.wav', 'abcdefghijk.wav', 'abcdefghijk_30000.wav', 'abcdefghijk_30.wav'):
        files.add(name)
    ids, starts = np.array([b'abcdefghijk'] * 2, 'S11'), np.array([30000, 40000])
    assert audioset_recipe.match_segments(ids, starts, files).tolist() == [2, 0]  # the first of two for the same one
    files = Files('folder', '/')
    files.add('abcdefghijk_16.1.wav')  # 16.1 * 1000 is not 16100 in floating point
    assert audioset_recipe.match_segments(ids[:1], np.array([16100]), files).tolist() == [0]


@pytest.mark.parametrize(
    'damage, words',
    [
        (lambda root: (root / 'labels.csv').write_text('a,b\n1,2\n'), ['labels.csv', 'index,mid,display_name']),
        (lambda root: os.remove(root / 'labels.csv'), ['labels.csv', 'class_labels_indices.csv']),
        (lambda root: os.remove(root / 'eval_segments.csv'), ['eval_segments.csv']),
        (
            lambda root: (root / 'eval_segments.csv').write_text('# x\nabcdefghijk, 1.0, 2.0, "/m/unknown"\n'),
            ['line 2', '/m/unknown'],
        ),
        (lambda root: (root / 'eval_segments.csv').write_text('short, 1.0, 2.0, "/m/09x0r"\n'), ['line 1', 'short']),
        (lambda root: (root / 'eval_segments.csv').write_text('abcdefghijk, 1.0\n'), ['line 1']),
        (
            lambda root: (root / 'eval_segments.csv').write_text('abcdefghijk, one, 2.0, "/m/09x0r"\n'),
            ['line 1', 'one'],
        ),
        (lambda root: (root / 'eval_segments.csv').write_bytes(b'\xff\xfe\x00'), ['eval_segments.csv']),
        (
            lambda root: (root / 'eval_segments.csv').write_text('zzzzzzzzzzz, 1.0, 2.0, "/m/09x0r"\n'),
            ['no segment', 'ID.wav'],
        ),
    ],
)
def test_damaged_lists_are_named(audioset, damage, words):
    damage(audioset)
    assert is_one_line_error(prepare_audioset(audioset, ['eval'], f'--out_dir={audioset}/set'), *words)
    assert not os.path.exists(audioset / 'set')


def test_several_machines_make_the_bytes_of_one(audioset, monkeypatch):
    monkeypatch.setattr(plan_file, 'SHARD_CLIPS', 2)
    lists, options = ['balanced_train', 'eval'], ['--max_bad=0.2']
    assert prepare_audioset(audioset, lists, *options, f'--out_dir={audioset}/one/set').code == 0
    for part in (2, 3, 1):
        result = prepare_audioset(audioset, lists, *options, f'--out_dir={audioset}/many/set', f'--shards={part}/3')
        assert (
            result.code == 0
            and f'share {part}/3' in result.out
            and 'meta.json' not in os.listdir(audioset / 'many/set')
        )
    assert prepare_audioset(audioset, lists, *options, f'--out_dir={audioset}/many/set').code == 0
    assert (
        contents(audioset / 'one/set') == contents(audioset / 'many/set') and len(contents(audioset / 'one/set')) > 10
    )
    again = [*options, '--overwrite', '--shards=1/3', f'--out_dir={audioset}/many/set']
    assert is_one_line_error(prepare_audioset(audioset, lists, *again), '--overwrite', 'other machines')
    other = run('folder', '--source=/absent', '--shards=1/2', f'--out_dir={audioset}/new')
    assert is_one_line_error(other, '/absent') and contents(audioset / 'one/set') == contents(audioset / 'many/set')
    for wrong in ('3', '0/3', '4/3', 'a/b'):
        assert is_one_line_error(
            prepare_audioset(audioset, lists, f'--shards={wrong}', f'--out_dir={audioset}/x'), 'shards'
        )


def memory_of_plan(n, monkeypatch, tmp_path):
    """-> bytes that a plan of n clips keeps, its peak, the plan and its shards."""
    names = [hashlib.sha1(str(i).encode()).hexdigest()[:11] for i in range(n)]
    with open(tmp_path / 'unbalanced_segments.csv', 'w') as f:
        f.writelines(f'{name}, 30.000, 40.000, "{MIDS[0]},{MIDS[2]}"\n' for name in names)

    def many(*_):
        files = Files('folder', '/audio')
        for name in names:
            files.add(f'{name[:2]}/{name}_30000_40000.flac')
        return files

    monkeypatch.setattr(audioset_recipe, 'list_source', many)
    lists = [f'--segments={tmp_path}/unbalanced_segments.csv', f'--labels={tmp_path}/labels.csv']
    _, options = prepare.configured(['audioset', f'--source={tmp_path}', *lists, f'--out_dir={tmp_path}/set'])
    tracemalloc.start()
    try:
        plan = audioset_recipe.plan(options)
        kept, _ = tracemalloc.get_traced_memory()
        shards = plan.shards()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return kept, peak, plan, shards, min(names)


def test_a_plan_of_many_clips_takes_little_memory(monkeypatch, tmp_path, capsys):
    """Index and plan take 80 bytes a clip once made, and 100 while they are made and sorted: of two million, 200 MB.
    Measured as what 30,000 take more than 10,000, since a few megabytes are the same for any number."""
    monkeypatch.setattr(plan_file, 'SORTED_AT_ONCE', 2048)
    (tmp_path / 'labels.csv').write_text(
        'index,mid,display_name\n' + ''.join(f'{i},{mid},{i}\n' for i, mid in enumerate(MIDS))
    )
    few_kept, few_peak, *_ = memory_of_plan(10_000, monkeypatch, tmp_path)
    kept, peak, plan, shards, first_name = memory_of_plan(30_000, monkeypatch, tmp_path)
    assert '30,000 of its 30,000 segments found' in capsys.readouterr().out
    kept, peak = (kept - few_kept) / 20_000, (peak - few_peak) / 20_000
    assert kept < 80 and peak < 100, (kept, peak)
    assert len(shards) == -(-30_000 // SHARD_CLIPS)
    first = plan.entry(shards[0][1][0])
    assert first.key == f'{first_name}_30000' and first.label == (0, 2)
    assert first.place == ('file', f'/audio/{first_name[:2]}/{first_name}_30000_40000.flac')


# --------------------------------------------------------------------------------- formats that soundfile does not know


@pytest.fixture(scope='module')
def ffmpeg(tmp_path_factory):
    program = shutil.which('ffmpeg')
    if not program:
        program = pytest.importorskip('imageio_ffmpeg', reason='neither ffmpeg nor imageio-ffmpeg').get_ffmpeg_exe()
    folder = tmp_path_factory.mktemp('bin')
    os.symlink(program, folder / 'ffmpeg')
    return str(folder)


def encoded(ffmpeg, suffix, seconds=0.5):
    source, out = os.path.join(ffmpeg, f'in{seconds}.wav'), os.path.join(ffmpeg, f'out{seconds}{suffix}')
    with open(source, 'wb') as f:
        f.write(audio_file('.wav', seconds, 44100, 2))
    subprocess.run([f'{ffmpeg}/ffmpeg', '-y', '-v', 'error', '-i', source, out], check=True)
    with open(out, 'rb') as f:
        return f.read()


@pytest.fixture
def without_decoder(monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path / 'empty'))


@pytest.mark.parametrize('suffix', ['.m4a', '.webm', '.aac', '.wma', '.mkv', '.mp4'])
def test_ffmpeg_decodes_what_soundfile_cannot(ffmpeg, suffix, without_decoder, monkeypatch):
    content = encoded(ffmpeg, suffix)
    with pytest.raises(ValueError, match='ffmpeg program, which is not'):
        decoding.decode(content, 60)
    monkeypatch.setenv('PATH', ffmpeg)
    wave = decoding.decode(content, 60)
    assert abs(len(wave) - 8000) < 1500
    middle = wave[2000:6096]
    assert abs(np.argmax(np.abs(np.fft.rfft(middle * np.hanning(4096)))) * 16000 / 4096 - 440) < 4
    with pytest.raises(ValueError, match='longer than'):
        decoding.decode(encoded(ffmpeg, suffix, 2.0), 0.5)
    with pytest.raises(ValueError, match='ffmpeg'):
        decoding.decode(content[:40], 60)


def test_files_without_a_decoder_are_counted_and_the_message_says_what_to_install(
    ffmpeg, without_decoder, monkeypatch, tmp_path
):
    files = {f'a/{i}.wav': audio_file('.wav') for i in range(6)}
    files.update({f'b/{i}.m4a': encoded(ffmpeg, '.m4a') for i in range(2)})
    source = write_tree(tmp_path / 'x', files)
    refused = run('folder', f'--source={source}', f'--out_dir={tmp_path}/set')
    assert is_one_line_error(refused, '2 need ffmpeg', '2 of 8 files')
    accepted = run('folder', f'--source={source}', f'--out_dir={tmp_path}/set', '--max_bad=0.3')
    assert accepted.code == 0 and '2 of the skipped files need the ffmpeg program' in accepted.out
    monkeypatch.setenv('PATH', ffmpeg)
    assert run('folder', f'--source={source}', f'--out_dir={tmp_path}/set', '--overwrite', '--test_part=0').code == 0
    assert len(open_clips(['set'], str(tmp_path))) == 8


def test_a_playlist_cannot_make_ffmpeg_open_other_files(ffmpeg, without_decoder, monkeypatch, tmp_path):
    (tmp_path / 'secret.aac').write_bytes(encoded(ffmpeg, '.aac'))
    monkeypatch.setenv('PATH', ffmpeg)
    for head in (b'', b'\x00\x00\x00\x18ftypM4A ', b'\x1a\x45\xdf\xa3'):
        with pytest.raises((ValueError, RuntimeError)):
            decoding.decode(head + f'#EXTM3U\n#EXTINF:1,\n{tmp_path}/secret.aac\n'.encode(), 60)


# ------------------------------------------------------------------------------------------------------ Speech Commands


def noise_file(seconds, seed):
    out = io.BytesIO()
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, int(16000 * seconds))
    soundfile.write(out, noise, 16000, format='WAV', subtype='PCM_16')
    return out.getvalue()


def speech_commands(words=('backward', 'bed', 'zero'), prefix='speech_commands_v0.02/'):
    files = {f'{prefix}_background_noise_/pink_noise.wav': audio_file('.wav'), f'{prefix}LICENSE': b'CC BY'}
    lists = {'validation_list.txt': [], 'testing_list.txt': []}
    for word in words:
        for i in range(8):
            name = f'{word}/{hashlib.sha1(f"{word}{i}".encode()).hexdigest()[:8]}_nohash_{i % 3}.wav'
            files[prefix + name] = noise_file(1.0 - i / 20, [i, words.index(word)])
            if i < 3:
                lists['validation_list.txt' if i == 0 else 'testing_list.txt'].append(name)
    for name, rows in lists.items():
        files[prefix + name] = '\n'.join(rows).encode() + b'\n'
    return files


@pytest.mark.parametrize('packing', ['torchaudio', 'tar.gz'])
def test_speech_commands_split_is_torchaudios(tmp_path, packing, pretrained):  # noqa: F811
    if packing == 'torchaudio':
        source = write_tree(tmp_path / 'x', speech_commands(prefix='SpeechCommands/speech_commands_v0.02/'))
    else:
        source = tarred(tmp_path / 'x.tar.gz', speech_commands(prefix='./'), 'w:gz')  # as the official archive
    result = run('speechcommands', f'--source={source}', f'--out_dir={tmp_path}/spc')
    assert result.code == 0 and 'warning: 15 / 3 / 6 clips of 3 words' in result.out, result.err
    write_tree(tmp_path / 'reference', speech_commands(prefix='SpeechCommands/speech_commands_v0.02/'))
    for split, subset in (('train', 'training'), ('valid', 'validation'), ('test', 'testing')):
        theirs = torchaudio.datasets.SPEECHCOMMANDS(tmp_path / 'reference', subset=subset)
        want = {
            theirs.get_metadata(i)[0].split('speech_commands_v0.02/')[1]: theirs.get_metadata(i)[2]
            for i in range(len(theirs))
        }
        clips = open_clips(['spc'], str(tmp_path), [split])
        assert {key: clips.classes[label] for key, label in zip(clips.keys(), clips.label)} == want
    told, evaluated = tune_and_evaluate('finetune_spc2.py', 'spc', pretrained, tmp_path)
    assert '15 training, 3 validation, 6 test clips' in told and 'accuracy' in evaluated


def test_speech_commands_without_its_lists(tmp_path):
    files = speech_commands()
    del files['speech_commands_v0.02/testing_list.txt']
    source = write_tree(tmp_path / 'x', files)
    assert is_one_line_error(
        run('speechcommands', f'--source={source}', f'--out_dir={tmp_path}/spc'), 'testing_list.txt'
    )
    files = speech_commands()
    files['speech_commands_v0.02/testing_list.txt'] += b'zero/absent_nohash_0.wav\n'
    result = run('speechcommands', f'--source={write_tree(tmp_path / "y", files)}', f'--out_dir={tmp_path}/spc')
    assert result.code == 0 and '1 files of the two lists are not in' in result.out


# ------------------------------------------------------------------------------------------------------------ downloads


@pytest.fixture
def server(tmp_path):
    """A local HTTP server over tmp_path/web; /short/NAME ends half-way, /NAME of nothing is 404."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            short = self.path.startswith('/short/')
            path = tmp_path / 'web' / self.path.removeprefix('/short').lstrip('/')
            if not path.is_file():
                self.send_error(404)
                return
            content = path.read_bytes()
            self.send_response(200)
            self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if short else content)

        def log_message(self, *_):
            pass

    (tmp_path / 'web').mkdir()
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{web.server_port}'
        web.shutdown()


def whole_esc50():
    """2,000 clips of 50 classes in five folds, of which many share their sound."""
    rows, files, sounds = (
        ['filename,fold,target,category,esc10,src_file,take'],
        {},
        [audio_file('.wav', 0.06 + i / 100) for i in range(4)],
    )
    for i in range(2000):
        target, fold = i % 50, i // 50 % 5 + 1
        name = f'{fold}-{i}-A-{target}.wav'
        rows.append(f'{name},{fold},{target},sound {target},{target < 10},{i},A')
        files[f'ESC-50-33c8/audio/{name}'] = sounds[i % 4]
    return {**files, 'ESC-50-33c8/meta/esc50.csv': '\n'.join(rows).encode()}


def test_esc50_is_downloaded_checked_and_tuned_on_in_five_folds(tmp_path, server, monkeypatch, pretrained):  # noqa: F811
    monkeypatch.setattr(esc50, 'ESC50_URL', f'{server}/esc50.zip')
    zipped(tmp_path / 'web/esc50.zip', esc_files())
    refused = run('esc50', f'--out_dir={tmp_path}/esc50')
    assert is_one_line_error(refused, '10 clips instead of 2,000') and not os.path.exists(tmp_path / 'esc50')
    zipped(tmp_path / 'web/esc50.zip', whole_esc50())
    assert run('esc50', f'--out_dir={tmp_path}/esc50').code == 0
    assert sorted(os.listdir(tmp_path / 'esc50')) == ['meta.json', 'train-00000.npz', 'train-00000.pcm']  # no archive
    assert len(open_clips(['esc50'], str(tmp_path), only_fold='3')) == 400
    told, _ = tune_and_evaluate('finetune_esc50.py', 'esc50', pretrained, tmp_path, '--fold=all', '--batch_size=8')
    last = told.splitlines()[-1]
    values = [float(value) for value in re.findall(r'fold \d ([\d.]+)%', last)]
    assert len(values) == 5 and 'standard deviation' in last
    assert f'mean {np.mean(values):.1f}%' in last


def test_fsdd_and_speech_commands_are_downloaded(tmp_path, server, monkeypatch):
    zipped(tmp_path / 'web/fsdd.zip', fsdd_files())
    monkeypatch.setattr(fsdd, 'FSDD_URL', f'{server}/fsdd.zip')
    assert run('fsdd', f'--out_dir={tmp_path}/fsdd').code == 0 and len(open_clips(['fsdd'], str(tmp_path))) == 40
    archive = tarred(tmp_path / 'web/spc.tar.gz', speech_commands(prefix='./'), 'w:gz')
    monkeypatch.setattr(speechcommands, 'SPEECHCOMMANDS_URL', f'{server}/spc.tar.gz')
    assert is_one_line_error(run('speechcommands', f'--out_dir={tmp_path}/spc'), 'checksum')
    assert not os.path.exists(tmp_path / 'spc')
    with open(archive, 'rb') as f:
        monkeypatch.setattr(speechcommands, 'SPEECHCOMMANDS_SHA256', hashlib.sha256(f.read()).hexdigest())
    assert run('speechcommands', f'--out_dir={tmp_path}/spc').code == 0
    assert 'meta.json' in os.listdir(tmp_path / 'spc') and not any(
        'source' in name for name in os.listdir(tmp_path / 'spc')
    )


def test_labels_of_audioset_are_downloaded(audioset, server, monkeypatch):
    shutil.move(audioset / 'labels.csv', audioset / 'web/class_labels_indices.csv')
    monkeypatch.setattr(audioset_recipe, 'AUDIOSET_URL', f'{server}/')
    options = [f'--source={audioset}/audio', f'--segments={audioset}/eval_segments.csv']
    assert is_one_line_error(run('audioset', *options, f'--out_dir={audioset}/few'), '5 classes instead of 527')
    with open(audioset / 'web/class_labels_indices.csv', 'a', newline='') as f:
        csv.writer(f).writerows([i, f'/m/{i}', f'sound {i}'] for i in range(5, 527))
    assert run('audioset', *options, f'--out_dir={audioset}/as_eval').code == 0
    os.remove(audioset / 'web/class_labels_indices.csv')
    assert is_one_line_error(
        run('audioset', *options, f'--out_dir={audioset}/again'), 'class_labels_indices.csv', '404', '--labels=PATH'
    )


def test_a_server_that_speaks_nonsense(tmp_path, monkeypatch):
    with socket.create_server(('127.0.0.1', 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b'nonsense\r\n\r\n')

        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setattr(fsdd, 'FSDD_URL', f'http://127.0.0.1:{listening.getsockname()[1]}/x.zip')
        assert is_one_line_error(run('fsdd', f'--out_dir={tmp_path}/set'), 'cannot download', '--source=PATH')


@pytest.mark.parametrize(
    'recipe, name', [('fsdd', 'FSDD_URL'), ('esc50', 'ESC50_URL'), ('speechcommands', 'SPEECHCOMMANDS_URL')]
)
def test_a_download_that_fails_is_one_line_and_leaves_nothing(tmp_path, server, monkeypatch, recipe, name):
    zipped(tmp_path / 'web/x.zip', fsdd_files())
    for address, words in (
        (f'{server}/short/x.zip', []),
        (f'{server}/absent.zip', ['404']),
        ('http://127.0.0.1:9/x.zip', ['refused']),
    ):
        monkeypatch.setattr({'fsdd': fsdd, 'esc50': esc50, 'speechcommands': speechcommands}[recipe], name, address)
        assert is_one_line_error(
            run(recipe, f'--out_dir={tmp_path}/set'), address, '--source=PATH' if words else 'run again', *words
        )
        assert not os.path.exists(tmp_path / 'set')


# ------------------------------------------------------------------------------------------ lengths of clips, windows


@pytest.mark.parametrize('seconds', [1, 5, 10])
def test_one_ten_second_checkpoint_serves_every_length(tmp_path, data_dir, seconds):
    ckpt = tmp_path / 'pre/ckpt.pt'
    options = [option for option in TINY if not option.startswith('--frames')] + ['--frames=1008', '--batch_size=2']
    assert (
        call(
            pretrain.run,
            *options,
            '--dataset=noises',
            '--max_steps=1',
            '--warmup_steps=0',
            f'--data_dir={data_dir}',
            f'--out_dir={tmp_path}/pre',
        ).code
        == 0
    )
    frames = {1: 96, 5: 496, 10: 1008}[seconds]
    result = call(
        finetune.run,
        *TUNE[:-1],
        f'--frames={frames}',
        '--dataset=noises',
        f'--data_dir={data_dir}',
        f'--ckpt={ckpt}',
        f'--out_dir={tmp_path}/tuned',
        '--validation_part=0.3',
    )
    assert result.code == 0 and f'{frames} frames' in result.out, result.err
    assert call(evaluation.run, f'--ckpt={tmp_path}/tuned/best.pt', f'--data_dir={data_dir}').code == 0
    loaded = open_checkpoint(str(tmp_path / 'tuned/best.pt'))
    pre = open_checkpoint(str(ckpt))
    assert loaded.config.frames == frames
    torch.testing.assert_close(loaded.encoder.positions, pre.encoder.positions)  # regenerated, the same at each place
