"""Folders, archives, text tables and audio files as people have them: hidden, linked, from Windows, cut short, piped.
python -m pytest tests/test_sources.py"""

import errno
import io
import os
import struct
import subprocess
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from audio import decoding
from audio.clips import open_clips
from audio.headers import frame_length, missing_bytes, mp3_start
from audio.sources import kind_of, list_source, open_text
from data import fbank
from engine.errors import DataError
from engine.files import replacing

from .conftest import is_one_line_error
from .test_datasets import ffmpeg, speech_commands, without_decoder  # noqa: F401  (fixtures)
from .test_prepare import audio_file, noises, run, sound, tarred, write_tree, zipped


def names(source, work_dir):
    return [name for _, name in list_source(str(source), str(work_dir)).audio()]


def written(samples, rate=16000, **kind):
    out = io.BytesIO()
    soundfile.write(out, samples, rate, **kind)
    return out.getvalue()


def skipped(folder):
    return dict(line.split('\t') for line in (folder / 'skipped.tsv').read_text().splitlines())


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize('number', [errno.EIO, errno.EACCES])
def test_a_subfolder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch, number):
    source, scandir = write_tree(tmp_path / 'x', noises(6)), os.scandir

    def failing(path='.'):
        if os.fspath(path).endswith('/b'):
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', failing)
    result = run('folder', f'--source={source}', f'--out_dir={tmp_path}/set')
    assert is_one_line_error(result, f'{source}/b', os.strerror(number)) and not os.path.exists(tmp_path / 'set')


@pytest.mark.parametrize('pack', ['folder', 'zip', 'tar'])
def test_hidden_files_are_left_out_and_counted(tmp_path, pack, capsys):
    hidden = ['.ipynb_checkpoints/d 1-checkpoint.wav', 'dog/.ipynb_checkpoints/a.wav', 'dog/.a.wav',
              '__MACOSX/dog/b.wav', 'cat/.x/y/c.wav', '..odd/d.wav', 'cat/@eaDir/e.wav']
    files = {name: audio_file('.wav') for name in ['dog/a.wav', 'cat/b.wav', *hidden]}
    files['.git/config'] = b'no audio'
    source = {'folder': write_tree, 'zip': zipped, 'tar': tarred}[pack](tmp_path / 'x', files)
    result = run('folder', f'--source={source}', f'--out_dir={tmp_path}/set', '--test_part=0')
    assert result.code == 0 and '7 audio files under hidden names' in result.out
    clips = open_clips(['set'], str(tmp_path))
    assert clips.classes == ['cat', 'dog'] and sorted(clips.keys()) == ['cat/b.wav', 'dog/a.wav']


def test_a_source_below_a_hidden_folder_is_not_hidden(tmp_path):
    assert names(write_tree(tmp_path / '.cache' / 'x', {'a/1.wav': b''}), tmp_path) == ['a/1.wav']
    archive = tarred(tmp_path / 'x.tar', {'./a/1.wav': b'', '../b/2.wav': b''})
    assert names(archive, tmp_path) == ['a/1.wav', '../b/2.wav']


def test_linked_folders_are_followed_once_and_loops_end(tmp_path, capsys):
    write_tree(tmp_path / 'elsewhere', {'1.wav': b'', 'deep/2.wav': b''})
    source = write_tree(tmp_path / 'x', {'cat/3.wav': b'', 'cat/4.wav': b''})
    for link, target in (('dog', '../elsewhere'), ('copy', 'cat'), ('cat/loop', '..'), ('up', '../..'),
                         ('self', 'self'), ('gone', '/nowhere'), ('.hidden', '../elsewhere')):
        os.symlink(target, os.path.join(source, link))
    os.symlink('..', tmp_path / 'elsewhere' / 'deep' / 'back')
    os.symlink('3.wav', os.path.join(source, 'cat/5.wav'))
    os.symlink('/nowhere', os.path.join(source, 'cat/6.wav'))           # is named when it is read
    os.mkfifo(os.path.join(source, 'cat/7.wav'))                        # to open it would wait for ever
    assert names(source, tmp_path) == [f'cat/{i}.wav' for i in (3, 4, 5, 6)] + ['dog/1.wav', 'dog/deep/2.wav']
    said = capsys.readouterr().out
    assert '4 linked folders that lead to one that is listed' in said and '1 pipes' in said
    assert '2 links that lead nowhere' in said and len(said.splitlines()) == 1


def test_every_suffix_of_audio_counts_and_the_rest_is_counted(tmp_path, capsys):
    audio = ['1.wave', '2.aifc', '3.sph', '4.SND', '5.nist', '6.mp2', '7.m4b', '8.3gp', '9.ac3', 'a.amr', 'b.WAV']
    source = write_tree(tmp_path / 'x', dict.fromkeys([*audio, 'n.txt', 'm.txt', 'README'], b''))
    assert names(source, tmp_path) == audio
    said = capsys.readouterr().out
    assert '3 files whose names are not those of audio (.txt 2, without a suffix 1)' in said


@pytest.mark.parametrize('suffix, kind', [('wave', dict(format='WAV')), ('aifc', dict(format='AIFF', subtype='FLOAT')),
                                          ('sph', dict(format='NIST')), ('snd', dict(format='AU'))])
def test_rare_suffixes_are_read(tmp_path, suffix, kind):
    source = write_tree(tmp_path / 'x', {f'a.{suffix}': written(sound(0.3), **kind)})
    assert run('folder', f'--source={source}', f'--out_dir={tmp_path}/set', '--test_part=0').code == 0
    wave = open_clips(['set'], str(tmp_path)).read(0) / 32768
    assert np.abs(wave - sound(0.3)).max() < 1e-3


# ------------------------------------------------------------------------------------------------------------ archives


def test_a_tar_that_ends_with_a_zip_is_a_tar(tmp_path):
    inner = zipped(tmp_path / 'inner.zip', {'wrong/9.wav': audio_file('.wav')})
    with open(inner, 'rb') as f:
        files = {**noises(4), 'more.zip': f.read()}
    for mode, kind in (('w', 'tar'), ('w:gz', 'compressed tar'), ('w:xz', 'compressed tar')):
        path = tarred(tmp_path / f'x.{mode[2:]}', files, mode)
        assert kind_of(path) == kind and names(path, tmp_path) == ['a/0.wav', 'b/1.wav', 'a/2.wav', 'b/3.wav']
    with open(inner, 'rb') as f:
        (tmp_path / 'program').write_bytes(b'MZ' + bytes(3000) + f.read())      # a zip that unpacks itself
    assert kind_of(str(tmp_path / 'program')) == 'zip' and names(tmp_path / 'program', tmp_path) == ['wrong/9.wav']
    (tmp_path / 'x.bin').write_bytes(b'neither' * 999)
    with pytest.raises(DataError, match='x.bin is neither'):
        kind_of(str(tmp_path / 'x.bin'))


@pytest.mark.parametrize('pack', ['zip', 'tar'])
def test_names_with_backslashes_keep_their_folders(tmp_path, pack):
    files = {name.replace('/', '\\'): content for name, content in noises(6).items()}
    source = {'zip': zipped, 'tar': tarred}[pack](tmp_path / 'x', {'sounds\\' + name: files[name] for name in files})
    if pack == 'zip':
        with zipfile.ZipFile(source, 'a') as archive:
            archive.writestr('sounds\\a\\', b'')                            # a folder
    assert run('folder', f'--source={source}', f'--out_dir={tmp_path}/set', '--test_part=0').code == 0
    clips = open_clips(['set'], str(tmp_path))
    assert clips.classes == ['a', 'b'] and sorted(clips.keys()) == sorted(noises(6))
    assert {key: len(clips.read(i)) for i, key in enumerate(clips.keys())}['b/3.wav'] == 2080


def test_a_name_twice_in_a_zip_is_its_last(tmp_path):
    with zipfile.ZipFile(tmp_path / 'x.zip', 'w') as archive:
        for name in ('a/1.wav', 'a\\1.wav', 'b/2.wav'):
            archive.writestr(name, audio_file('.wav', 0.2 + len(archive.namelist()) / 10))
    assert run('folder', f'--source={tmp_path}/x.zip', f'--out_dir={tmp_path}/set', '--test_part=0').code == 0
    clips = open_clips(['set'], str(tmp_path))
    assert list(clips.keys()) == ['a/1.wav', 'b/2.wav'] and clips.length.tolist() == [4800, 6400]
    files = list_source(f'{tmp_path}/x.zip', str(tmp_path))
    assert files.place(1)[-1] == zlib.crc32(audio_file('.wav', 0.3))


def test_links_and_sparse_files_in_tars_are_counted(tmp_path, capsys):
    with tarfile.open(tmp_path / 'x.tar', 'w') as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f'{kind.decode()}.wav')
            info.type, info.linkname = kind, '/etc/passwd'
            archive.addfile(info)
    assert names(tmp_path / 'x.tar', tmp_path) == [] and '3 links, devices or sparse files' in capsys.readouterr().out


@pytest.mark.parametrize('stop', [KeyboardInterrupt, SystemExit, ValueError])
def test_what_is_stopped_while_it_is_written_leaves_the_old_file(tmp_path, stop):
    (tmp_path / 'x').write_text('old')
    with pytest.raises(stop), replacing(str(tmp_path / 'x')) as f:
        f.write('new')
        f.flush()
        raise stop
    assert os.listdir(tmp_path) == ['x'] and (tmp_path / 'x').read_text() == 'old'


# --------------------------------------------------------------------------------------------------------- text tables


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16', 'utf-16-be'])
def test_a_table_of_any_unicode_encoding(tmp_path, encoding):
    content = 'dé,1\r\nb,2\r\n'.encode(encoding)
    content = b'\xfe\xff' + content if encoding == 'utf-16-be' else content
    (tmp_path / 'x.csv').write_bytes(content)
    files = list_source(zipped(tmp_path / 'x.zip', {'x.csv': content}), str(tmp_path))
    for place in (str(tmp_path / 'x.csv'), files.place(0)):
        with open_text(place) as f:
            assert list(f) == ['dé,1\r\n', 'b,2\r\n']


def test_a_byte_order_mark_moves_no_clip_to_training(tmp_path):
    files = speech_commands()
    marked = {name: b'\xef\xbb\xbf' * name.endswith('_list.txt') + content for name, content in files.items()}
    for name, content in (('plain', files), ('marked', marked)):
        source = write_tree(tmp_path / name, content)
        assert run('speechcommands', f'--source={source}', f'--out_dir={tmp_path}/{name}-set').code == 0
    for split, count in (('train', 15), ('valid', 3), ('test', 6)):
        plain, marked = (open_clips([f'{name}-set'], str(tmp_path), [split]) for name in ('plain', 'marked'))
        assert sorted(plain.keys()) == sorted(marked.keys()) and len(marked) == count


def test_a_split_file_from_a_spreadsheet(tmp_path):
    source = write_tree(tmp_path / 'x', {f'{i}.wav': audio_file('.wav') for i in range(3)})
    for encoding in ('utf-8-sig', 'utf-16'):
        (tmp_path / 'split.csv').write_bytes('0.wav,train\r\n1.wav,valid\r\n2.wav,test\r\n'.encode(encoding))
        out = f'{tmp_path}/{encoding}'
        assert run('folder', f'--source={source}', f'--out_dir={out}', f'--split_file={tmp_path}/split.csv').code == 0
        assert [list(open_clips([encoding], str(tmp_path), [split]).keys()) for split in ('train', 'valid', 'test')] \
            == [['0.wav'], ['1.wav'], ['2.wav']]


# ------------------------------------------------------------------------------------------------- samples that mislead


def test_floats_on_another_scale_are_skipped_with_their_peak(tmp_path):
    quiet = {'a/hot.wav': 3.5, 'a/usual.wav': 1.0, 'b/int16.wav': 32768.0, 'b/huge.wav': 2.5e30, 'b/int8.wav': 128.0}
    files = {name: written(scale * sound(0.3), format='WAV', subtype='FLOAT') for name, scale in quiet.items()}
    files['b/double.wav'] = written(1e300 * sound(0.3), format='WAV', subtype='DOUBLE')
    source = write_tree(tmp_path / 'x', files)
    assert run('folder', f'--source={source}', f'--out_dir={tmp_path}/set', '--test_part=0', '--max_bad=0.9').code == 0
    assert sorted(open_clips(['set'], str(tmp_path)).keys()) == ['a/hot.wav', 'a/usual.wav']
    reasons = skipped(tmp_path / 'set')
    assert set(reasons) == {'b/int16.wav', 'b/huge.wav', 'b/int8.wav', 'b/double.wav'}
    assert 'peak of 13107.' in reasons['b/int16.wav'] and 'peak of 1e+30' in reasons['b/huge.wav']
    with pytest.raises(DataError, match='x/b/int8.wav: a peak of 51.2'):
        decoding.decode_file(f'{source}/b/int8.wav')


@pytest.mark.parametrize('seconds', [0.5, 40])
@pytest.mark.parametrize('gain', [-1.0, -0.995])
def test_channels_that_cancel_become_the_louder_one(seconds, gain):
    wave = np.stack([gain * sound(seconds), sound(seconds)], axis=1) + 0.01     # with a constant offset
    got = decoding.decode(written(wave, format='WAV', subtype='FLOAT'), 60)
    errors = [np.abs(got - sign * sound(seconds) - 0.01).max() for sign in ((1, -1) if gain == -1 else (1,))]
    assert min(errors) < 1e-6


def test_channels_of_which_one_has_sound_are_averaged():
    wave = np.zeros((8000, 64))
    wave[:, 5] = sound(0.5)
    assert np.abs(decoding.decode(written(wave, format='WAV', subtype='FLOAT'), 60) - sound(0.5) / 64).max() < 1e-6


# --------------------------------------------------------------------------------- cut short, from a pipe, junk ahead

WHOLE = [('WAV', 'PCM_16'), ('WAV', 'FLOAT'), ('WAV', 'IMA_ADPCM'), ('WAVEX', 'PCM_24'), ('RF64', 'PCM_16'),
         ('AIFF', 'PCM_16'), ('AU', 'PCM_16'), ('W64', 'PCM_16'), ('CAF', 'PCM_16'), ('NIST', 'PCM_16'),
         ('SVX', 'PCM_16'), ('FLAC', 'PCM_16'), ('OGG', 'VORBIS'), ('OGG', 'OPUS'), ('MP3', 'MPEG_LAYER_III')]


@pytest.mark.parametrize('kind, subtype', WHOLE)
def test_a_file_cut_short_is_damaged(kind, subtype):
    content = written(sound(1.0), format=kind, subtype=subtype)
    assert abs(len(decoding.decode(content, 60)) - 16000) < 600
    tagged = content + b'TAG' + bytes(125)                                  # an ID3 tag behind it does no harm
    assert abs(len(decoding.decode(tagged, 60)) - 16000) < 600
    for size in (len(content) // 2, len(content) - 500, len(content) - (200 if kind == 'MP3' else 2)):
        with pytest.raises((ValueError, RuntimeError), match='cut short|lost sync|malformed'):
            decoding.decode(content[:size], 60)


@pytest.mark.parametrize('suffix', ['.m4a', '.webm', '.oga', '.wv', '.aac'])
def test_a_file_for_ffmpeg_cut_short_is_damaged(ffmpeg, suffix, without_decoder, monkeypatch):  # noqa: F811
    monkeypatch.setenv('PATH', ffmpeg)
    fast = ['-movflags', 'faststart'] if suffix == '.m4a' else ['-c:a', 'flac'] if suffix == '.oga' else []
    content = by_ffmpeg(ffmpeg, f'cut{suffix}', *fast)
    assert abs(len(decoding.decode(content, 60)) - 8000) < 1500
    with pytest.raises(ValueError, match='cut short|ffmpeg'):
        decoding.decode(content[:len(content) * 2 // 3], 60)


def by_ffmpeg(folder, name, *options, rate=16000):
    """The bytes of a tone that ffmpeg wrote, into a pipe if the name is '-'."""
    with open(f'{folder}/tone.wav', 'wb') as f:
        f.write(audio_file('.wav', 0.5, rate))
    out = name if name == '-' else f'{folder}/{name}'
    result = subprocess.run([f'{folder}/ffmpeg', '-y', '-v', 'error', '-i', f'{folder}/tone.wav', *options, out],
                            check=True, capture_output=True)
    if name == '-':
        return result.stdout
    with open(out, 'rb') as f:
        return f.read()


@pytest.mark.parametrize('options', [['wav'], ['flac'], ['aiff'], ['au'], ['mp3'], ['mp2'],
                                     ['ogg', '-c:a', 'libvorbis']])
def test_what_was_written_into_a_pipe_is_whole(ffmpeg, options):  # noqa: F811
    wave = decoding.decode(by_ffmpeg(ffmpeg, '-', '-f', *options), 60)
    assert 7990 < len(wave) < 9500 and np.abs(wave[2000:6000]).max() == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize('options', [['caf'], ['ogg', '-c:a', 'flac'], ['webm'], ['ac3'], ['tta'],
                                     ['mp4', '-movflags', 'frag_keyframe+empty_moov']])
def test_what_soundfile_cannot_open_goes_to_ffmpeg(ffmpeg, options, without_decoder, monkeypatch):  # noqa: F811
    content = by_ffmpeg(ffmpeg, '-', '-f', *options)
    with pytest.raises(ValueError, match='installed'):
        decoding.decode(content, 60)
    monkeypatch.setenv('PATH', ffmpeg)
    wave = decoding.decode(content, 60)
    assert 7990 < len(wave) < 9500 and np.abs(wave[2000:6000]).max() == pytest.approx(0.4, abs=0.1)


@pytest.mark.parametrize('size', [0x7fffffff, 0x7ffff000, 0xfffffff0, 0xffffffff])
def test_sizes_that_a_pipe_writes_are_no_promise(size):
    content = audio_file('.wav', 0.5)
    content = b'RIFF' + struct.pack('<I', size) + content[8:40] + struct.pack('<I', size) + content[44:]
    assert len(decoding.decode(content, 60)) == 8000


def test_a_size_of_zero_that_a_crashed_recorder_left(ffmpeg, without_decoder, monkeypatch):  # noqa: F811
    content = audio_file('.wav', 0.5)
    monkeypatch.setenv('PATH', ffmpeg)
    assert len(decoding.decode(content[:4] + bytes(4) + content[8:40] + bytes(4) + content[44:], 60)) == 8000


JUNK = [bytes(5000), b'ID3\x04\x00\x00\x00\x00\x10\x00 torn', b'ID3\x03\x00\x00\x7f\x7f\x7f\x7f',
        b'HTTP/1.0 200 OK\r\n\r\n', np.random.default_rng(0).bytes(50000)]


@pytest.mark.parametrize('junk', JUNK, ids=range(5))
@pytest.mark.parametrize('rate', [11025, 16000, 44100])
def test_an_mp3_with_junk_ahead(junk, rate):
    content = audio_file('.mp3', 0.5, rate)
    assert frame_length(content) and mp3_start(junk + content) == len(junk)
    want = decoding.decode(content, 60)
    assert np.array_equal(decoding.decode(junk + content, 60), want) and len(want) == 8000


# ------------------------------------------------------------------------------------------------------------------ mp3


@pytest.mark.parametrize('rate', [8000, 11025, 16000, 44100])
def test_an_mp3_is_what_soundfile_and_torchaudio_make_of_it(rate):
    """To the last bit: a tone leaves only rounding noise in the upper bands, which any other bit shows."""
    content = audio_file('.mp3', 2.3, rate)
    wave, _ = soundfile.read(io.BytesIO(content), dtype='float32')
    want = torchaudio.functional.resample(torch.from_numpy(wave), rate, 16000)
    got = torch.from_numpy(decoding.decode(content, 60))
    assert torch.equal(got, want)
    x, y = (fbank(torch.round(part[None] * 32768) / 32768, torch.tensor([len(part)]), 'hanning')
            for part in (got, want))
    assert torch.equal(x, y)


def test_a_long_mp3_has_no_wrong_samples_between_two_blocks():
    """soundfile's own read in blocks has an error of 0.3 for 1,000 samples and more after 2^20 of them."""
    content = audio_file('.mp3', 26.0, 44100)
    whole, _ = soundfile.read(io.BytesIO(content), dtype='float32')
    with decoding.Stream(io.BytesIO(content)) as file:
        [(got, rate)] = [(np.concatenate(list(got)), rate) for got, rate in decoding.by_soundfile(file, content, 60)]
    assert rate == 44100 and len(got) > 1 << 20 and np.array_equal(got, whole)


def test_a_flac_of_unknown_length_is_read_to_its_end(ffmpeg):  # noqa: F811
    content = by_ffmpeg(ffmpeg, '-', '-f', 'flac')
    with soundfile.SoundFile(io.BytesIO(content)) as file:
        assert file.frames > 1 << 60                                        # unknown
    assert np.abs(decoding.decode(content, 60) - sound(0.5)).max() < 1e-4


@settings(max_examples=300, deadline=None)
@given(start=st.sampled_from([b'', *{written(sound(0.1), format=kind, subtype=subtype)[:60] for kind, subtype in WHOLE},
                              b'\0\0\0\x18ftypM4A ']), rest=st.binary(max_size=200), cut=st.integers(0, 60))
def test_any_bytes_have_a_number_of_missing_ones(start, rest, cut):
    content = start[:cut] + rest
    assert missing_bytes(content) >= 0
    assert mp3_start(content) is None or content[mp3_start(content)] == 255
