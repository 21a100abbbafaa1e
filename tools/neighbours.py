"""The sounds of a folder that are nearest to a sound, as a table and a picture.

    python -m tools.neighbours --ckpt=out/demo/ckpt.pt --folder=SOUNDS --wav=dog.wav
    python -m tools.neighbours --ckpt=out/demo/ckpt.pt --folder=SOUNDS --wav=dog.wav --top_k=5 --picture=near.png

Nearest by the cosine of clip embeddings, each number of which has the folder's mean and deviation taken out. They are
kept in an index file; later calls encode only files that are new or have changed (size or time), and forget those that
are gone. Settings are the names below.
"""
import contextlib
import hashlib
import os
from urllib.parse import quote

import numpy as np
import torch
from tqdm import tqdm

import configurator
from audio import SAMPLE_RATE
from audio.decoding import decode_file
from audio.sources import ARCHIVE_ERRORS, list_source
from engine import processes, ranges
from engine.errors import ConfigError, DataError
from engine.files import printable, replacing
from scoring.outputs import check_output
from scoring.probes import standardised
from tools import viz
from tools.embeddings import clips_of, load

ckpt = ''               # the checkpoint
folder = ''             # the sounds to search, with those in folders inside
wav = ''                # the sound whose neighbours are wanted; if it lies in the folder, it is not its own
top_k = 10              # how many neighbours
index = ''              # the index file; '': neighbours-FOLDER-CKPT.npz beside the checkpoint
picture = ''            # draw the log-mels of the sound and of its neighbours to this .png; needs matplotlib
pool = 'bands'          # features: bands, cepstra, mean or cls
layer = 0               # of this block (1, 2, ...); 0: the mean of all blocks' outputs
max_minutes = 60.0      # longer files are left out
device = 'auto'         # cuda, mps or cpu; auto: the best there is
threads = 0             # CPU threads; 0: PyTorch's choice

TOGETHER = 1 << 26      # samples that are decoded, then encoded: 70 minutes, or one file


# ----------------------------------------------------------------------------------------------------------- the index

def index_path(settings):
    """Beside the checkpoint; every folder and checkpoint has its own."""
    place, file = os.path.split(os.path.splitext(settings.ckpt)[0])
    name = os.path.basename(os.path.realpath(settings.folder))
    whole = hashlib.sha256(os.fsencode(os.path.realpath(settings.folder))).hexdigest()[:8]
    return os.path.join(place, f'neighbours-{quote(name, safe="")[:80]}-{whole}-{file}.npz')


def bound_to(settings):
    """A text that changes with the checkpoint's content, the folder and what else decides the features."""
    content = hashlib.sha256(np.memmap(settings.ckpt, mode='r'))
    return repr((content.hexdigest(), os.path.realpath(settings.folder), settings.pool, settings.layer, 'float32 sums'))


def read_index(path, binding, width):
    """{name: ((size, time), features (F,))}; empty, after a line that says why, if the file is of no use."""
    if not os.path.exists(path):
        return {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            names, stamps, features = stored['names'], stored['stamps'], stored['features']
            if stored['binding'].item() != binding:
                print(f'{printable(path)} is of another checkpoint, folder or setting: it is made anew')
                return {}
            if (features.shape != (len(names), width) or stamps.shape != (len(names), 2) or names.dtype.kind != 'U'
                    or features.dtype != np.float32 or not np.isfinite(features).all()):
                raise ValueError('shapes')
    except (ValueError, KeyError, RuntimeError, NotImplementedError, *ARCHIVE_ERRORS):
        print(f'{printable(path)} is damaged: it is made anew')
        return {}
    return {name: (tuple(stamp), row) for name, stamp, row in zip(names.tolist(), stamps.tolist(), features)}


def updated(held, settings, model):
    """The index of the folder as it is now -> the same form, how many files were encoded. Those that cannot be read are
    named and left out. Raises DataError."""
    names = [name for _, name in list_source(settings.folder, '').audio()]
    stamps = {}
    for name in names:
        with contextlib.suppress(OSError):                                  # gone, or a link that leads nowhere
            info = os.stat(os.path.join(settings.folder, name))
            stamps[name] = info.st_size, info.st_mtime_ns
    fresh = {name: held[name] for name in names if name in held and held[name][0] == stamps.get(name)}
    waves, encoded, to_do = {}, 0, [name for name in names if name not in fresh]
    for name in tqdm(to_do, desc='decoding', leave=False, disable=None):
        try:
            wave = decode_file(os.path.join(settings.folder, name), 60 * settings.max_minutes)
            waves[name] = clips_of(wave, SAMPLE_RATE).read(0)               # int16, half the memory
        except DataError as error:
            tqdm.write(f'left out: {printable(error)}')                     # above the bar
        if waves and (name == to_do[-1] or sum(map(len, waves.values())) > TOGETHER):
            rows = model.clips(list(waves.values()), title='encoding')
            fresh.update({name: (stamps[name], row) for name, row in zip(waves, rows)})
            encoded += len(waves)
            waves = {}
    if len(fresh) < 2:
        raise DataError(f'{settings.folder} holds {len(fresh)} sounds that can be read: two are the fewest to compare')
    return {name: fresh[name] for name in sorted(fresh)}, encoded


def write_index(path, binding, held):
    with replacing(path, 'wb') as f:
        np.savez(f, binding=np.array(binding), names=np.array(list(held)),
                 stamps=np.array([stamp for stamp, _ in held.values()], np.int64),
                 features=np.stack([row for _, row in held.values()]))


# ----------------------------------------------------------------------------------------------- neighbours and picture

def nearest(held, features, top_k, not_this=None):
    """[(similarity, name)] of the top_k names whose features have the largest cosine with these (1, F), both
    standardised by the folder's."""
    known, asked = standardised(np.stack([row for _, row in held.values()]), features)
    lengths = np.linalg.norm(known, axis=1) * np.linalg.norm(asked)
    similarity = known @ asked[0] / np.maximum(lengths, 1e-12)
    found = [(float(similarity[i]), name) for i, name in enumerate(held) if name != not_this]
    return sorted(found, key=lambda pair: -pair[0])[:top_k]


def draw(path, sounds, spectrum):
    """A picture of log-mels, one below another, at most the first frames of each. sounds: (title, path) of each."""
    figure, axes = viz.pyplot().subplots(len(sounds), 1, figsize=(viz.NARROW, 0.4 + 0.9 * len(sounds)), squeeze=False,
                                         sharex=True)
    for (title, file), axis in zip(sounds, axes[:, 0]):
        spec = viz.real_log_mel(clips_of(decode_file(file), SAMPLE_RATE), 0, spectrum, spectrum['frames'])
        axis.imshow(spec.T.numpy(), origin='lower', aspect='auto', extent=(0, len(spec) / 100, 0, 128))
        axis.set(yticks=[], facecolor='0.9', xlim=(0, spectrum['frames'] / 100))
        axis.set_title(title, loc='left')
    axes[-1, 0].set_xlabel('seconds; 128 mel bands upwards')
    viz.save(figure, path)


def run(argv):
    settings = configurator.configure(__file__, argv)
    configurator.check_ranges(settings, **{name: ranges.EVALUATE[name] for name in ('top_k', 'max_minutes', 'threads')})
    if not settings.wav or not settings.folder:
        raise ConfigError('name the sound, --wav=FILE, and the folder to search, --folder=FOLDER')
    if not os.path.isdir(settings.folder):
        raise ConfigError(f'folder = {settings.folder} is no folder')
    path = settings.index or index_path(settings)
    check_output(path, '.npz', settings.ckpt, settings.wav)
    if settings.picture:
        check_output(settings.picture, '.png', settings.ckpt, settings.wav)
        viz.pyplot()                                                        # says what is missing before the work
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model = load(settings.ckpt, settings.pool, settings.layer, settings.device)
    asked = model.clips(decode_file(settings.wav, 60 * settings.max_minutes))
    binding = bound_to(settings)
    before = read_index(path, binding, model.clip_size)
    held, encoded = updated(before, settings, model)
    if encoded or held.keys() != before.keys():
        write_index(path, binding, held)
    gone = len(before.keys() - held.keys())
    print(f'{printable(path)}: {len(held):,} sounds, {encoded:,} of them encoded now'
          + (f', {gone:,} gone' if gone else ''))
    own = os.path.relpath(os.path.realpath(settings.wav), os.path.realpath(settings.folder)).replace(os.sep, '/')
    found = nearest(held, asked, settings.top_k, own)
    print(f'nearest to {printable(settings.wav)}:\n  rank  similarity  sound')
    for rank, (similarity, name) in enumerate(found, 1):
        print(f'  {rank:4}  {similarity:10.3f}  {printable(name)}')
    if settings.picture:
        draw(settings.picture, [(printable(settings.wav), settings.wav)] + [
            (f'{similarity:.3f}  {printable(name)}', os.path.join(settings.folder, name))
            for similarity, name in found], model.spectrum)
        print(settings.picture)


if __name__ == '__main__':
    processes.main(run)
