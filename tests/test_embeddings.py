"""Embeddings in Python, neighbours, the HEAR interface, the exported encoder.
python -m pytest tests/test_embeddings.py"""
import json
import os
import re
import shutil
import sys
import types

import numpy as np
import pytest
import soundfile
import torch

import data
import eval as evaluation
from audio import samples_for
from audio.decoding import decode_file
from checkpoints.opening import open_checkpoint
from engine.errors import CheckpointError, ConfigError, DataError
from scoring.features import states
from tools import export, hear_asda, neighbours
from tools.embeddings import load

from .conftest import ROOT, bars_of, call, is_one_line_error, on_a_terminal, write_wav
from .test_finetune import pretrained  # noqa: F401  (a fixture)

FIXTURES = os.path.join(ROOT, 'tests', 'fixtures')


def noise(samples, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ in Python

@pytest.mark.parametrize('ckpt', ['ours', 'authors_tiny_pretrain.pt', 'eat_tiny_finetune.pt'])
@pytest.mark.parametrize('rate, lengths', [(16000, [500, 9000, 10640, 47777]), (44100, [30000, 100001])])
def test_clip_embeddings_are_those_of_eval(pretrained, tmp_path, ckpt, rate, lengths):      # noqa: F811
    """Of the same samples, at their rate and resampled, shorter and longer than the input."""
    path = pretrained if ckpt == 'ours' else os.path.join(FIXTURES, ckpt)
    waves = [np.rint(noise(n, n) * 32767).astype(np.int16) for n in lengths]
    for i, wave in enumerate(waves):
        soundfile.write(tmp_path / f'{i}.wav', wave, rate)
    named = ','.join(f'{tmp_path}/{i}.wav' for i in range(len(waves)))
    assert call(evaluation.run, f'--ckpt={path}', f'--wav={named}', f'--embed={tmp_path}/x.npz', '--device=cpu',
                '--pool=bands,cepstra,mean,cls').code == 0
    with np.load(tmp_path / 'x.npz') as stored:
        for pool in ('bands', 'cepstra', 'mean', 'cls'):
            model = load(path, pool, device='cpu')
            clip, frames, seconds = model(waves, rate)
            np.testing.assert_allclose(clip, stored[pool], atol=1e-6)
            assert clip.dtype == np.float32 and clip.shape == (len(waves), model.clip_size)
    floats = [wave / np.float32(32768) for wave in waves]
    np.testing.assert_array_equal(model.clips(floats, rate), clip)
    assert frames.shape == (*seconds.shape, model.row_size) and frames.dtype == np.float32


@pytest.mark.parametrize('samples', [400, 1400, 1401, 2560, 10000, 10640, 30001, 64000])
def test_time_stamped_embeddings(pretrained, samples):          # noqa: F811
    """Of one window: the encoder's own output; of more: whole windows side by side. Times rise by 160 ms, within the
    sound; the last row is at most 160 ms from the end."""
    model, loaded = load(pretrained, device='cpu', layer=2), open_checkpoint(pretrained)
    wave = np.rint(noise(samples) * 32767).astype(np.int16)
    frames, seconds = model.rows(wave, 16000)
    ends = samples / 16000
    assert frames.shape == (1, seconds.shape[1], 8 * 32) and np.isfinite(frames).all()
    assert 0 < seconds[0, 0] and seconds[0, -1] < ends and ends - seconds[0, -1] <= 0.1601
    np.testing.assert_allclose(np.diff(seconds[0]), 0.16)
    assert seconds[0, 0] == pytest.approx(0.0875 if samples > 1400 else ends / 2)
    rows = seconds.shape[1]
    every = -(-((samples - 400) // 160 + 1) // 16)                          # with that whose centre is behind the end
    for first in {0, max(every - 4, 0)}:                                    # the input is 4 rows long
        part = wave[first * 2560:][:samples_for(64)]
        pcm = np.zeros((1, samples_for(64)), np.int16)
        pcm[0, :len(part)] = part
        spec = data.log_mel(torch.from_numpy(pcm), torch.tensor([len(part)]), **loaded.spectrum)
        with torch.no_grad():
            want = loaded.encoder.eval()(spec)[0, 1:].reshape(4, 8 * 32)    # the last block's output
        new, last = (every - 1) // 4 * 4 if first else 0, min(rows, first + 4)
        np.testing.assert_allclose(frames[0, new:last], want[new - first:last - first], atol=1e-5)


def test_time_stamped_embeddings_of_different_lengths(pretrained):          # noqa: F811
    model = load(pretrained, device='cpu')
    waves = [noise(n, n) for n in (3000, 40000, 12000)]
    frames, seconds = model.rows(waves, 16000)
    for wave, of_wave, times in zip(waves, frames, seconds):
        alone, alone_seconds = model.rows(wave, 16000)
        n = alone.shape[1]
        np.testing.assert_allclose(of_wave[:n], alone[0], atol=1e-5)
        np.testing.assert_array_equal(times[:n], alone_seconds[0])
        assert np.isnan(of_wave[n:]).all() and np.isnan(times[n:]).all()
    _, at_48k = model.rows(noise(36000), 48000)
    np.testing.assert_array_equal(at_48k, model.rows(noise(12000), 16000)[1])


def test_forms_of_sounds(pretrained):           # noqa: F811
    model, two = load(pretrained, device='cpu', pool='mean'), np.stack([noise(8000, 1), noise(8000, 2)])
    want = model.clips(two, 16000)
    for same in (list(two), torch.from_numpy(two), two.astype(np.float64), [torch.from_numpy(wave) for wave in two]):
        np.testing.assert_array_equal(model.clips(same, 16000), want)
    np.testing.assert_allclose(model.clips(two[1], 16000), want[1:], atol=1e-6)


@pytest.mark.parametrize('waves, rate, word', [
    ([], 16000, 'no s'), (np.zeros((2, 2, 800)), 16000, 'sound 0'), ([noise(800), noise(300)], 16000, 'sound 1'),
    (np.full(800, np.nan), 16000, 'sound 0'), (np.zeros(800, np.int32), 16000, 'int32'), (np.zeros(800), 10, 'rate'),
    (np.full(800, 3000.0), 16000, 'scale'), (np.zeros(800), '16 kHz', 'rate'), ([np.zeros((1, 800))], 16000, 'sound 0'),
    (np.zeros(0), 16000, 'sound 0')])
def test_bad_sounds(pretrained, waves, rate, word):          # noqa: F811
    with pytest.raises(DataError, match=word):
        load(pretrained, device='cpu')(waves, rate)


def test_bad_checkpoints_and_settings(pretrained, tmp_path):          # noqa: F811
    for arguments, error in (({'pool': 'max'}, ConfigError), ({'layer': 3}, ConfigError), ({'layer': 1.0}, ConfigError),
                             ({'device': 'tpu'}, ConfigError), ({'path': 'none.pt'}, CheckpointError)):
        with pytest.raises(error):
            load(**{'path': pretrained, **arguments})
    state = torch.load(pretrained, weights_only=False)
    state['model']['encoder.norm.weight'][:] = torch.inf
    torch.save(state, tmp_path / 'bad.pt')
    with pytest.raises(CheckpointError, match='bad.pt'):
        load(str(tmp_path / 'bad.pt'), device='cpu').clips(noise(8000), 16000)


def test_the_snippets_of_the_page_run(pretrained, tmp_path, monkeypatch):          # noqa: F811
    with open(os.path.join(ROOT, 'docs', 'embeddings.md'), encoding='utf-8') as f:
        snippets = re.findall(r'```python\n(.*?)```', f.read(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    os.makedirs('out/demo')
    shutil.copy(pretrained, 'out/demo/ckpt.pt')
    write_wav('./dog.wav', noise(20000))
    assert call(export.run, '--ckpt=out/demo/ckpt.pt', '--out=encoder.pt2').code == 0 and len(snippets) == 2
    for snippet in snippets:
        exec(snippet, {})


def test_files_and_arrays_alike(pretrained, tmp_path):          # noqa: F811
    """decode_file and load's model, as docs/embeddings.md says."""
    soundfile.write(tmp_path / 'a.flac', noise(30000), 22050)
    wave, rate = soundfile.read(tmp_path / 'a.flac')
    model = load(pretrained, device='cpu')
    np.testing.assert_array_equal(model.clips(decode_file(str(tmp_path / 'a.flac')), 16000), model.clips(wave, rate))


# ----------------------------------------------------------------------------------------------------------- neighbours

@pytest.fixture
def sounds(tmp_path):
    """A folder of low and high tones, and a low tone beside it."""
    def tone(hertz, seed):
        return 0.3 * np.sin(2 * np.pi * hertz * np.arange(16000) / 16000) + 0.05 * noise(16000, seed)
    for i in range(4):
        write_wav(f'{tmp_path}/sounds/low/{i}.wav', tone(300 + i, i))
        write_wav(f'{tmp_path}/sounds/high/{i}.wav', tone(3000 + i, 4 + i))
    write_wav(f'{tmp_path}/asked.wav', tone(310, 9))
    return tmp_path


def search(pretrained, sounds, *options):          # noqa: F811
    return call(neighbours.run, f'--ckpt={pretrained}', f'--folder={sounds}/sounds', f'--wav={sounds}/asked.wav',
                f'--index={sounds}/index.npz', '--device=cpu', *options)


def table(result):
    """[(similarity, name)] of what was printed."""
    assert result.code == 0, result.err
    rows = [line.split(None, 2) for line in result.out.splitlines() if line.split()[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    return [(float(row[1]), row[2]) for row in rows]


def test_neighbours_are_the_nearest(pretrained, sounds):          # noqa: F811
    """By the cosine of standardised embeddings, computed here anew, in order."""
    found = table(search(pretrained, sounds, '--top_k=5'))
    names = [f'{kind}/{i}.wav' for kind in ('low', 'high') for i in range(4)]
    model = load(pretrained, device='cpu')
    known = model.clips([decode_file(f'{sounds}/sounds/{name}') for name in names], 16000).astype(np.float64)
    asked = model.clips(decode_file(f'{sounds}/asked.wav'), 16000).astype(np.float64)
    known, asked = ((x - known.mean(axis=0)) / known.std(axis=0) for x in (known, asked))
    cosine = {name: row @ asked[0] / np.sqrt(row @ row * (asked[0] @ asked[0])) for name, row in zip(names, known)}
    assert [name for _, name in found] == sorted(cosine, key=cosine.get, reverse=True)[:5]
    assert [value for value, _ in found] == pytest.approx([cosine[name] for _, name in found], abs=2e-3)
    assert {name.split('/')[0] for _, name in found[:4]} == {'low'}


def test_a_folder_that_takes_long_shows_progress(pretrained, sounds, monkeypatch):          # noqa: F811
    assert search(pretrained, sounds).err == ''
    on_a_terminal(monkeypatch)
    assert bars_of(search(pretrained, sounds, f'--index={sounds}/other.npz')) == {'decoding', 'encoding'}


def test_the_index_is_updated(pretrained, sounds, monkeypatch):          # noqa: F811
    """Only new and changed files are read again, gone ones leave; the table is that of an index made anew."""
    read = []

    def decode(path, *seconds):
        read.append(os.path.relpath(path, sounds))
        return decode_file(path, *seconds)
    monkeypatch.setattr(neighbours, 'decode_file', decode)

    def reads(*options):
        read.clear()
        found = table(search(pretrained, sounds, '--top_k=99', *options))
        return set(read) - {'asked.wav'}, found
    folder = sounds / 'sounds'
    assert len(reads()[0]) == 8
    before = (sounds / 'index.npz').read_bytes()
    assert reads()[0] == set() and (sounds / 'index.npz').read_bytes() == before
    (folder / 'low' / '0.wav').unlink()
    write_wav(f'{folder}/new/ü, x.wav', noise(20000))
    write_wav(f'{folder}/high/1.wav', noise(16000))                                         # of the same size
    os.utime(folder / 'high' / '1.wav', ns=(5, 5))
    now, found = reads()
    assert now == {'sounds/new/ü, x.wav', 'sounds/high/1.wav'} and 'low/0.wav' not in [name for _, name in found]
    anew, same = reads(f'--index={sounds}/other.npz')
    assert len(anew) == 8 and [name for _, name in same] == [name for _, name in found]
    (folder / 'low' / '1.wav').unlink()                                                     # gone only
    assert reads()[0] == set() and 'low/1.wav' not in np.load(sounds / 'index.npz')['names']
    assert len(reads('--pool=mean')[0]) == 7 and reads('--pool=mean')[0] == set()           # bound to its settings
    state = torch.load(pretrained, weights_only=False)
    state['model']['encoder.norm.weight'][0] += 0.1
    torch.save(state, sounds / 'other.pt')
    assert len(reads('--pool=mean', f'--ckpt={sounds}/other.pt')[0]) == 7                   # and to the weights
    (sounds / 'index.npz').write_bytes(before[:len(before) // 2])
    result = search(pretrained, sounds)
    assert 'damaged' in result.out and len(table(result)) == 7
    np.savez(sounds / 'index.npz', binding=np.array(['x', 'y']), names=1, stamps=2, features=3)
    assert 'damaged' in search(pretrained, sounds).out


def test_neighbours_of_a_sound_of_the_folder(pretrained, sounds):          # noqa: F811
    """It is not its own. Without --index, the index lies beside the checkpoint."""
    ckpt = sounds / 'copy.pt'
    ckpt.write_bytes(open(pretrained, 'rb').read())
    found = table(call(neighbours.run, f'--ckpt={ckpt}', f'--folder={sounds}/sounds', '--device=cpu',
                       f'--wav={sounds}/sounds/low/2.wav'))
    assert len(found) == 7 and 'low/2.wav' not in [name for _, name in found] and found[0][1].startswith('low')
    assert [name for name in os.listdir(sounds) if name.startswith('neighbours-sounds-') and name.endswith('-copy.npz')]


def test_unreadable_files_are_named(pretrained, sounds):          # noqa: F811
    (sounds / 'sounds' / 'broken.wav').write_bytes(b'RIFF no sound')
    os.symlink('nowhere.wav', sounds / 'sounds' / 'link.wav')
    result = search(pretrained, sounds)
    assert len(table(result)) == 8 and result.out.count('left out: ') == 2
    assert 'broken.wav' in result.out and 'link.wav' in result.out


@pytest.mark.parametrize('options, words', [
    (['--ckpt=none.pt'], ['none.pt']), (['--ckpt='], ['--ckpt']), (['--wav='], ['--wav']),
    (['--folder='], ['--folder']),
    (['--folder={0}/asked.wav'], ['asked.wav', 'folder']), (['--wav={0}/none.wav'], ['none.wav']),
    (['--top_k=0'], ['top_k']), (['--index={0}/x.csv'], ['.npz']), (['--picture={0}/x.jpg'], ['.png']),
    (['--pool=max'], ['pool']), (['--layer=9'], ['layer']), (['--folder={0}/one'], ['one', 'two']),
    (['--folder={0}/empty'], ['empty'])])
def test_bad_searches(pretrained, sounds, options, words):          # noqa: F811
    os.makedirs(sounds / 'empty')
    write_wav(f'{sounds}/one/a.wav', noise(16000))
    before = sorted(os.listdir(sounds))
    assert is_one_line_error(search(pretrained, sounds, *(option.format(sounds) for option in options)), *words)
    assert sorted(os.listdir(sounds)) == before


def test_a_failing_index_leaves_the_old_one(pretrained, sounds, monkeypatch):          # noqa: F811
    search(pretrained, sounds)
    before = (sounds / 'index.npz').read_bytes()
    write_wav(f'{sounds}/sounds/new.wav', noise(16000))

    def full(*_, **__):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(np, 'savez', full)
    assert is_one_line_error(search(pretrained, sounds), 'No space')
    assert (sounds / 'index.npz').read_bytes() == before and not (sounds / 'index.npz.tmp').exists()


def test_the_picture(pretrained, sounds):          # noqa: F811
    pytest.importorskip('matplotlib')
    result = search(pretrained, sounds, f'--picture={sounds}/near.png', '--top_k=3')
    assert len(table(result)) == 3
    assert (sounds / 'near.png').read_bytes().startswith(b'\x89PNG')


# ----------------------------------------------------------------------------------------------- HEAR's interface

@pytest.mark.parametrize('ckpt', ['ours', 'eat'])
def test_hear_interface(pretrained, ckpt):          # noqa: F811
    """What the HEAR 2021 rules say: attributes, shapes, float32, times in milliseconds that rise evenly within the
    sound; a sound's embedding does not depend on the batch; no gradient, audio unchanged."""
    path = pretrained if ckpt == 'ours' else os.path.join(FIXTURES, 'eat_tiny_pretrain.pt')
    model = hear_asda.load_model(path)
    assert isinstance(model, torch.nn.Module) and model.sample_rate == 16000
    assert type(model.scene_embedding_size) is type(model.timestamp_embedding_size) is int
    audio = torch.rand(5, 30000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = audio.clone()
    scene = hear_asda.get_scene_embeddings(audio, model)
    rows, times = hear_asda.get_timestamp_embeddings(audio, model)
    assert scene.shape == (5, model.scene_embedding_size) and scene.dtype == torch.float32
    assert rows.shape == (5, times.shape[1], model.timestamp_embedding_size) and rows.dtype == torch.float32
    assert torch.equal(audio, before) and not (scene.requires_grad or rows.requires_grad)
    assert torch.isfinite(scene).all() and torch.isfinite(rows).all() and times.dtype == torch.float32
    assert torch.allclose(times.diff(), torch.tensor(160.0), atol=1e-3) and (times == times[0]).all()
    assert (times > 0).all() and (times < 30000 / 16).all() and times.shape[1] == 12
    for i in range(5):
        assert torch.allclose(hear_asda.get_scene_embeddings(audio[i:i + 1], model), scene[i:i + 1], atol=1e-5)
        alone, _ = hear_asda.get_timestamp_embeddings(audio[i:i + 1], model)
        assert torch.allclose(alone, rows[i:i + 1], atol=1e-5)
    own = load(path, device='cpu')
    np.testing.assert_allclose(scene.numpy(), own.clips(audio.numpy(), 16000), atol=1e-6)
    np.testing.assert_allclose(times.numpy() / 1000, own.rows(audio.numpy(), 16000)[1], atol=1e-6)


@pytest.mark.parametrize('audio', [torch.zeros(16000), torch.zeros(1, 2, 800), torch.zeros(1, 800, dtype=torch.int16)])
def test_hear_refuses_other_shapes(pretrained, audio):          # noqa: F811
    with pytest.raises(DataError, match='n_sounds'):
        hear_asda.get_scene_embeddings(audio, hear_asda.load_model(pretrained))


def test_hearvalidator(pretrained, monkeypatch, capsys):          # noqa: F811
    """The published validator itself, with nothing in TensorFlow's place: it asks only whether the model is one of its
    modules."""
    monkeypatch.setitem(sys.modules, 'tensorflow', types.SimpleNamespace(Module=type('Module', (), {})))
    validate = pytest.importorskip('hearvalidator.validate', reason='needs hearvalidator (pip install --no-deps)')
    with pytest.warns(UserWarning, match='50ms'):                           # ours are 160 ms apart
        validate.ValidateModel('tools.hear_asda', pretrained, device='cpu')()
    assert 'Interval between timestamps is 160' in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ the exported encoder

@pytest.mark.parametrize('ckpt, layer', [('ours', 0), ('authors_tiny_pretrain.pt', 1), ('eat_tiny_finetune.pt', 0)])
def test_the_exported_encoder_computes_the_same(pretrained, tmp_path, ckpt, layer):         # noqa: F811
    """Of another number of clips than it was exported with, read anew from its file."""
    path = pretrained if ckpt == 'ours' else os.path.join(FIXTURES, ckpt)
    result = call(export.run, f'--ckpt={path}', f'--out={tmp_path}/e.pt2', f'--layer={layer}')
    assert result.code == 0, result.err
    files = {'input.json': ''}
    program = torch.export.load(tmp_path / 'e.pt2', extra_files=files).module()
    loaded = open_checkpoint(path)
    assert json.loads(files['input.json']) == loaded.spectrum
    for batch in (1, 2, 5):
        spec = torch.randn(batch, loaded.spectrum['frames'], 128, generator=torch.Generator().manual_seed(batch))
        rows, cls = program(spec)
        with torch.no_grad():
            want, want_cls = states(loaded.encoder.eval(), spec, layer)
        assert torch.allclose(rows, want.flatten(2), atol=1e-5) and torch.allclose(cls, want_cls, atol=1e-5)


@pytest.mark.parametrize('options, words', [
    (['--ckpt=none.pt'], ['none.pt']), (['--ckpt='], ['--ckpt']), (['--layer=9'], ['9']),
    (['--out={0}/x.pt'], ['.pt2']), (['--out={0}'], ['.pt2'])])
def test_bad_exports(pretrained, tmp_path, options, words):          # noqa: F811
    result = call(export.run, f'--ckpt={pretrained}', f'--out={tmp_path}/x.pt2', *(o.format(tmp_path) for o in options))
    assert is_one_line_error(result, *words) and not os.listdir(tmp_path)
