"""Which files become which clips of which split and class, and which settings a recipe has.
   python -m pytest tests/test_recipes.py"""
import hashlib
import os
import re

import numpy as np
import pytest

import prepare
from audio.clips import open_clips
from audio.sources import Files
from recipes import folder
from recipes.plan import Plan

from .conftest import is_one_line_error
from .test_datasets import EVAL, MIDS, UNBALANCED, audioset, segment_list, speech_commands  # noqa: F401  (a fixture)
from .test_prepare import audio_file, contents, esc_files, noises, run, tarred, write_tree, zipped

SOUND = audio_file('.wav')


def parts(root):
    """{clip: (split, class or '')} of the set in root/set."""
    found = {}
    for split in ('train', 'valid', 'test', 'eval'):
        if os.path.exists(root / f'set/{split}-00000.npz'):
            clips = open_clips(['set'], str(root), [split])
            found.update((key, (split, clips.classes[label] if label >= 0 else ''))
                         for key, label in zip(clips.keys(), clips.label))
    return found


def planned(names, monkeypatch, test_part=0.2, label='parent'):
    """{clip: split} of the folder recipe for files of these names, without reading any."""
    files = Files('folder', '/absent')
    for name in names:
        files.add(name)
    with monkeypatch.context() as patch:
        patch.setattr(folder, 'list_source', lambda *_: files)
        _, settings = prepare.configured(['folder', '--source=/absent', f'--test_part={test_part}', f'--label={label}'])
        made = folder.plan(settings)
    return {made.key(i): base.split('-')[0] for base, numbers in made.shards() for i in numbers}


# ------------------------------------------------------------------------------------------------------------ the split

def test_a_folder_and_its_archives_split_the_same(tmp_path):
    files = noises(20)
    sources = [write_tree(tmp_path / 'x', files), zipped(tmp_path / 'x.zip', files),
               tarred(tmp_path / 'x.tar', {f'./{name}': content for name, content in files.items()}),
               zipped(tmp_path / 'y.zip', {f'my sounds/of/{name}': content for name, content in files.items()}),
               tarred(tmp_path / 'y.tgz', {f'top/{name}': content for name, content in files.items()}, 'w:gz'),
               zipped(tmp_path / 'z.zip', {name.replace('/', '\\'): content for name, content in files.items()}),
               write_tree(tmp_path / 'deep', {f'er/{name}': content for name, content in files.items()})]
    found = []
    for i, source in enumerate(sources):
        assert run('folder', f'--source={source}', f'--out_dir={tmp_path}/{i}/set').code == 0
        found.append(parts(tmp_path / str(i)))
        assert contents(tmp_path / f'{i}/set')['train-00000.pcm'] == contents(tmp_path / '0/set')['train-00000.pcm']
    assert all(one == found[0] for one in found) and len(found[0]) == 20


@pytest.mark.parametrize('test_part', [0.2, 0.5, 0.91, 0.01])
def test_every_class_is_split_alike(monkeypatch, test_part):
    sizes = {'one': 1, 'two': 2, 'three': 3, 'ten': 10, 'hundred': 100}
    names = [f'{label}/{i}.wav' for label, size in sizes.items() for i in range(size)]
    splits = planned(names, monkeypatch, test_part)
    for label, size in sizes.items():
        tested = sum(split == 'test' for name, split in splits.items() if name.startswith(label + '/'))
        assert tested == min(max(int(size * test_part + 0.5), 1), size - 1), label
    assert planned(names, monkeypatch, 0) == dict.fromkeys(names, 'train')
    for label in sizes:                                                     # by the hash of the name, nothing else
        of_class = [name for name in names if name.startswith(label + '/')]
        by_hash = sorted(of_class, key=lambda name: hashlib.sha1(name.encode()).digest()[4:12])
        tested = [splits[name] == 'test' for name in by_hash]
        assert tested == sorted(tested, reverse=True)


def test_a_file_that_is_added_moves_one_other_at_most(monkeypatch):
    names = [f'{label}/{i}.wav' for label in 'ab' for i in range(30)]
    before = planned(names, monkeypatch)
    for i in range(20):
        after = planned([*names, f'a/new {i}.wav'], monkeypatch)
        assert sum(after[name] != split for name, split in before.items()) <= 1
        assert all(after[name] == split for name, split in before.items() if name.startswith('b/'))


def test_test_and_validation_are_carved_by_different_digits(monkeypatch):
    """As many of the clips that are left have a small validation hash as of all."""
    from audio.clips import key_hash
    splits = planned([f'{i % 2}/{i}.wav' for i in range(4000)], monkeypatch, 0.9)
    left = [name for name, split in splits.items() if split == 'train']
    assert len(left) == 400 and 20 < sum(key_hash(name) % 1000 < 100 for name in left) < 65     # 40 expected


@pytest.mark.parametrize('names', [
    ('train', 'test'), ('Training', 'Testing'), ('train', 'val'), ('train', 'dev', 'test'),
    ('train', 'validation', 'evaluation')])
@pytest.mark.parametrize('layout', ['{split}/{label}/{i}.wav', '{label}/{split}/{i}.wav', 'top/{split}/{i}.wav'])
def test_folders_named_after_splits_are_the_splits(tmp_path, names, layout):
    meant = {'train': 'train', 'training': 'train', 'test': 'test', 'testing': 'test', 'val': 'valid', 'dev': 'valid',
             'validation': 'valid', 'evaluation': 'eval'}
    files = {layout.format(split=split, label=label, i=f'{split}{label}{i}'): SOUND for split in names
             for label in ('cat', 'dog') for i in range(2)}
    result = run('folder', f'--source={write_tree(tmp_path / "x", files)}', f'--out_dir={tmp_path}/set')
    assert result.code == 0 and 'splits by folder' in result.out, result.err
    found = parts(tmp_path)
    assert len(found) == len(files)
    for key, (split, label) in found.items():
        of, kind = re.fullmatch(r'(.*)(cat|dog)\d', os.path.basename(key)[:-4]).groups()
        assert label == (kind if '{label}' in layout else '')
        want = meant[of.lower()]
        assert split == want or 'val' in names and (want, split) == ('train', 'test')     # no test folder: carved
    assert 'test' in {split for split, _ in found.values()} or 'eval' in {split for split, _ in found.values()}


@pytest.mark.parametrize('other', ['dog/5.wav', '5.wav'])
def test_files_beside_folders_named_after_splits_are_an_error(tmp_path, other):
    source = write_tree(tmp_path / 'x', {'train/cat/1.wav': SOUND, 'test/cat/2.wav': SOUND, other: SOUND})
    assert is_one_line_error(run('folder', f'--source={source}', f'--out_dir={tmp_path}/set'), other, '--split_file')
    assert not os.path.exists(tmp_path / 'set')


@pytest.mark.parametrize('prefix', ['', 'top/'])
def test_audio_beside_the_folders_of_classes_is_named(tmp_path, prefix):
    source = write_tree(tmp_path / 'x', {f'{prefix}{name}': SOUND for name in ('dog/1.wav', 'cat/2.wav', 'stray.wav')})
    command = ['folder', f'--source={source}', f'--out_dir={tmp_path}/set']
    assert is_one_line_error(run(*command), 'stray.wav', '--label=none') and not os.path.exists(tmp_path / 'set')
    assert run(*command, '--label=none').code == 0 and len(parts(tmp_path)) == 3


def test_classes_that_cannot_be_learnt_or_tested_are_mentioned(tmp_path):
    names = ['one/1.wav', *(f'two/{i}.wav' for i in range(2)), *(f'bad/{i}.wav' for i in range(2)),
             *(f'good/{i}.wav' for i in range(9))]
    files = {name: b'torn' if name.startswith('bad') else SOUND for name in names}
    splits = ['test' if name.endswith('/1.wav') and 'two' not in name else 'train' for name in names]
    (tmp_path / 'split.csv').write_text(''.join(f'{name},{split}\n' for name, split in zip(names, splits)))
    result = run('folder', f'--source={write_tree(tmp_path / "x", files)}', f'--out_dir={tmp_path}/set',
                 '--max_bad=0.5', f'--split_file={tmp_path}/split.csv')
    assert result.code == 0 and [line for line in result.out.splitlines() if line.startswith('note')] == [
        'note: classes of a single clip: one', 'note: classes without a clip: bad', 'note: classes without a clip in '
        'test: two']


# --------------------------------------------------------------------------------------------------------------- tables

@pytest.mark.parametrize('written', [
    'a/1.wav,train\nb/2.wav,test\n', '\ufeffa/1.wav,train\nb/2.wav,test\n', '\ufeff./a/1.wav,train\n.\\b\\2.wav,test\n',
    'path,split\n\na\\1.wav, train \n   \nb//2.wav,test', 'top/a/1.wav,train\r\ntop/b/2.wav,test\r\n',
    'a/1.wav,train\na/1.wav,train\nb/2.wav,test\n', '"a/1.wav","train"\n"b/2.wav","test"\n'])
def test_every_way_to_write_a_split_file(tmp_path, written):
    source = zipped(tmp_path / 'x.zip', {f'top/{name}': SOUND for name in ('a/1.wav', 'b/2.wav', 'b/3.wav')})
    (tmp_path / 'split.csv').write_text(written, encoding='utf-8')
    result = run('folder', f'--source={source}', f'--out_dir={tmp_path}/set', f'--split_file={tmp_path}/split.csv')
    assert result.code == 0 and '1 audio files are in no line' in result.out, result.err
    assert parts(tmp_path) == {'a/1.wav': ('train', 'a'), 'b/2.wav': ('test', 'b')}


@pytest.mark.parametrize('written', ['a/1.wav,train\na/1.wav,test\n', './a/1.wav,train\nb/2.wav,test\na\\1.wav,test\n'])
def test_a_split_file_that_names_a_path_twice(tmp_path, written):
    source = write_tree(tmp_path / 'x', {'a/1.wav': SOUND, 'b/2.wav': SOUND})
    (tmp_path / 'split.csv').write_text(written)
    result = run('folder', f'--source={source}', f'--out_dir={tmp_path}/set', f'--split_file={tmp_path}/split.csv')
    assert is_one_line_error(result, 'twice', 'train', 'test', '1.wav')


@pytest.mark.parametrize('change', [
    lambda text: b'\xef\xbb\xbf' + text, lambda text: b''.join(b'./' + line + b'\n' for line in text.split()),
    lambda text: text.replace(b'/', b'\\').replace(b'\n', b'\r\n\r\n'), lambda text: text.decode().encode('utf-16')])
def test_speech_commands_lists_however_they_are_written(tmp_path, change):
    files = speech_commands(words=('bed', 'zero'))
    run('speechcommands', f'--source={write_tree(tmp_path / "x", files)}', f'--out_dir={tmp_path}/one/set')
    files.update({name: change(content) for name, content in files.items() if name.endswith('_list.txt')})
    result = run('speechcommands', f'--source={write_tree(tmp_path / "y", files)}', f'--out_dir={tmp_path}/two/set')
    assert result.code == 0 and 'not in' not in result.out, result.err
    assert parts(tmp_path / 'two') == parts(tmp_path / 'one')
    assert [split for split, _ in parts(tmp_path / 'one').values()].count('test') == 4


@pytest.mark.parametrize('name, content, words', [
    ('testing_list.txt', b'bad/1.wav\nbad/2.wav\n', ['none of the 2', 'testing_list.txt', 'bad/1.wav']),
    ('validation_list.txt', b'\n', ['validation_list.txt', 'empty']), ('validation_list.txt', None, ['both lists'])])
def test_speech_commands_lists_that_match_nothing_or_each_other(tmp_path, name, content, words):
    files = speech_commands(words=('bed', 'zero'), prefix='')
    files[name] = files['testing_list.txt'] if content is None else content
    result = run('speechcommands', f'--source={write_tree(tmp_path / "x", files)}', f'--out_dir={tmp_path}/set')
    assert is_one_line_error(result, *words) and not os.path.exists(tmp_path / 'set')


def prepare_lists(root, *options):
    return run('audioset', f'--source={root}/audio', f'--labels={root}/labels.csv', f'--out_dir={root}/set', *options)


def test_only_the_official_eval_list_is_one_by_its_name(audioset):  # noqa: F811
    segment_list(audioset / 'retrieval_train.csv', UNBALANCED)
    segment_list(audioset / 'mine.csv', EVAL[:2])
    result = prepare_lists(audioset, f'--segments={audioset}/retrieval_train.csv',
                           f'--eval_segments={audioset}/mine.csv')
    assert result.code == 0, result.err
    assert 'retrieval_train.csv: 2 of its 3 segments found, to train' in result.out
    assert 'mine.csv: 2 of its 2 segments found, to eval' in result.out
    assert [len(open_clips(['set'], str(audioset), [split])) for split in ('train', 'eval')] == [2, 2]


def test_lists_that_overlap_lose_nothing(audioset):  # noqa: F811
    """A file without a start in its name is found too, and its labels in either list are put together."""
    name, start, classes, file = EVAL[0]
    write_tree(audioset / 'audio', {'plain/evaluation9.wav': SOUND})
    both = [(name, start, (0,), file), ('evaluation9', 7, (2,), None)]
    segment_list(audioset / 'one.csv', both)
    segment_list(audioset / 'two.csv', [(name, start, (3,), file), *both[1:], EVAL[1]])
    result = prepare_lists(audioset, f'--segments={audioset}/one.csv,{audioset}/two.csv')
    assert result.code == 0 and 'one.csv: 2 of its 2' in result.out and 'two.csv: 3 of its 3' in result.out, result.err
    clips = open_clips(['set'], str(audioset))
    found = dict(zip(clips.keys(), map(np.flatnonzero, clips.targets(np.arange(len(clips))))))
    assert {key: labels.tolist() for key, labels in found.items()} == {
        f'{name}_0': [0, 3], 'evaluation9_7000': [2], f'{EVAL[1][0]}_1000': [1]}


def test_a_segment_in_a_list_of_train_and_one_of_eval_is_an_error(audioset):  # noqa: F811
    segment_list(audioset / 'mine.csv', [*UNBALANCED, EVAL[2], EVAL[4]])
    result = prepare_lists(audioset, f'--segments={audioset}/mine.csv,{audioset}/eval_segments.csv')
    assert is_one_line_error(result, '2 segments', 'train', 'eval', EVAL[2][0]) and not os.path.exists(audioset / 'set')


@pytest.mark.parametrize('table', ['labels.csv', 'eval_segments.csv'])
def test_a_byte_order_mark_in_audiosets_tables(audioset, table):  # noqa: F811
    text = (audioset / table).read_bytes()
    (audioset / table).write_bytes(b'\xef\xbb\xbf' + text)
    assert prepare_lists(audioset, f'--segments={audioset}/eval_segments.csv').code == 0
    assert len(open_clips(['set'], str(audioset), ['eval'])) == 6 and len(MIDS) == 5


def test_esc50_table_with_a_mark_or_a_clip_named_twice(tmp_path):
    files, table = esc_files(), 'ESC-50-abc/meta/esc50.csv'
    marked = {**files, table: b'\xef\xbb\xbf' + files[table]}
    assert run('esc50', f'--source={zipped(tmp_path / "x.zip", marked)}', f'--out_dir={tmp_path}/set').code == 0
    twice = {**files, table: files[table] + b'\n' + files[table].split(b'\n')[1].replace(b'.wav,1,', b'.wav,2,')}
    result = run('esc50', f'--source={zipped(tmp_path / "y.zip", twice)}', f'--out_dir={tmp_path}/other')
    assert is_one_line_error(result, 'esc50.csv', 'twice')


# ------------------------------------------------------------------------------------------------------------- settings

@pytest.mark.parametrize('recipe, option', [
    ('demo', '--source=/nonexistent'), ('demo', '--esc10'), ('demo', '--label=nonsense'), ('demo', '--max_minutes=3'),
    ('fsdd', '--esc10'), ('fsdd', '--clips=20'), ('esc50', '--test_part=0.5'), ('speechcommands', '--segments=x.csv'),
    ('folder', '--seed=3'), ('folder', '--labels=x.csv'), ('audioset', '--split_file=x.csv')])
def test_an_option_of_another_recipe_is_refused(tmp_path, recipe, option):
    result = run(recipe, option, f'--out_dir={tmp_path}/set')
    assert is_one_line_error(result, option[2:].split('=')[0]) and os.listdir(tmp_path) == []


@pytest.mark.parametrize('recipe, own', [
    ('demo', {'clips', 'seed'}), ('fsdd', {'source'}), ('esc50', {'source', 'esc10'}), ('speechcommands', {'source'}),
    ('audioset', {'source', 'segments', 'eval_segments', 'labels'}),
    ('folder', {'source', 'label', 'test_part', 'split_file'})])
def test_help_lists_the_settings_of_a_recipe(recipe, own):
    result = run(recipe, '--help')
    every = {'out_dir', 'workers', 'memory', 'shards', 'overwrite'}
    every |= {'max_bad', 'max_minutes'} if 'source' in own else set()
    assert result.code == 0 and set(re.findall(r'^  --(\w+)=', result.out, re.M)) == every | own


def test_esc10_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = zipped(tmp_path / 'x.zip', esc_files())
    assert run('esc50', f'--source={source}', '--esc10').code == 0 and os.listdir('data') == ['esc10']
    assert run('esc50', f'--source={source}').code == 0 and sorted(os.listdir('data')) == ['esc10', 'esc50']


# ----------------------------------------------------------------------------------------------------------------- plan

def test_the_order_of_many_keys_is_that_of_sorting_them_at_once(monkeypatch):
    from recipes import plan as plan_file
    monkeypatch.setattr(plan_file, 'SORTED_AT_ONCE', 16)
    monkeypatch.setattr(plan_file, 'SHARD_CLIPS', 30)
    rng = np.random.default_rng(0)
    keys = [f'{"äz😀A"[rng.integers(4)]}{rng.integers(60)}' for _ in range(200)]          # some of them twice
    made = Plan([], lambda i: ('file', str(i)), keys.__getitem__)
    for i in range(len(keys)):
        made.add(i)
    shards = made.shards()
    found = [made.entry(i) for _, numbers in shards for i in numbers]
    assert [entry.key for entry in found] == sorted(set(keys))
    assert {entry.key: int(entry.place[1]) for entry in found} == {key: i for i, key in enumerate(keys)}
    assert [name for name, _ in shards] == [f'train-{i:05d}' for i in range(len(shards))]
    assert [len(rows) for _, rows in shards[:-1]] == [30] * (len(shards) - 1)
