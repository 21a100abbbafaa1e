"""What measuring takes: clocks that wait for the device, its peaks and memory, clips of noise to measure on, and a
file of figures.

This file must not know what is measured.
"""
import contextlib
import os
import re
import resource
import statistics
import sys
import time
from json import dump

import numpy as np
import torch
from tqdm import tqdm

import pretrain
from audio import N_MELS, SAMPLE_RATE, WINDOWS, frames_in
from audio.clips import FORMAT_VERSION, open_clips
from engine import processes
from engine.files import replacing

CLASSES = 50                    # of synthetic labels, as ESC-50's

# Dense peaks in TFLOP/s from the vendor's data sheets: words of the device's name, bfloat16 with float32 accumulation,
# float32 without TF32. The first match counts; None: the device has none.
PEAKS = ((('H200', 'NVL'), 836, 60), (('H200',), 989, 67), (('H100', 'PCIe'), 756, 51), (('H100', 'NVL'), 836, 60),
         (('H100',), 989, 67), (('A100',), 312, 19.5), (('L40S',), 362, 91.6), (('L4',), 121, 30.3),
         (('RTX', '4090'), 165, 82.6), (('RTX', '3090'), 71, 35.6), (('V100',), None, 15.7), (('T4',), None, 8.1))


class Bench:
    """What every measurement is given: settings, whose dtype is what 'auto' chooses, the model's config, process,
    and autocast, a context maker."""

    def __init__(self, settings, process):
        self.config, self.process = pretrain.model_config(settings), process
        self.autocast, dtype = processes.autocast(process, settings.dtype, self.config.n_embd)
        self.settings, self.is_cuda = settings.but(dtype=dtype), process.device.type == 'cuda'

    def but(self, **changes):
        """The same with some settings changed."""
        return Bench(self.settings.but(**changes), self.process)

    def synchronise(self):
        if self.process.device.type != 'cpu':
            torch.accelerator.synchronize()

    def seconds(self, title, **functions):
        """{name: median seconds of a call}; the functions are called in turn, A B A B ..., so that whatever else the
        machine does falls on all of them."""
        times = {name: [] for name in functions}
        rounds = self.settings.warmup + self.settings.steps
        with tqdm(total=rounds * len(functions), desc=title, leave=False, delay=1) as bar:
            for _ in range(rounds):
                for name, function in functions.items():
                    self.synchronise()
                    began = time.perf_counter()
                    function()
                    self.synchronise()
                    times[name].append(time.perf_counter() - began)
                    bar.update()
        return {name: statistics.median(values[self.settings.warmup:]) for name, values in times.items()}

    def peak_memory(self):
        """Bytes: most that PyTorch had allocated on a GPU at a time, or most that this process has ever held in RAM."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def peak_flops(device_name, dtype):
    """The device's dense peak in FLOP/s at that precision, None if it is not known."""
    found = set(re.split(r'\W+', device_name))
    if found & {'MIG', 'Laptop'}:                                           # a part of the device, a weaker one
        return None
    for words, bfloat16, float32 in PEAKS:
        if found >= set(words):
            tera = bfloat16 if dtype == 'bfloat16' else float32
            return tera and tera * 1e12
    return None


@contextlib.contextmanager
def threads(number):
    """In its `with`, so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shown(value):
    """A figure, or words instead of one, as tables have it."""
    if isinstance(value, str):
        return value
    return f'{value:,.0f}' if value >= 1000 else f'{value:.4g}'


def write_noise(folder, clips, samples):
    """A prepared set of white noise as prepare.py would pack it, without decoding; its statistics, mean 0 and deviation
    0.5, are not the noise's. -> Clips"""
    rng = np.random.default_rng(0)
    base, lengths = os.path.join(folder, 'noise', 'train-00000'), np.full(clips, samples, np.int64)
    os.makedirs(os.path.dirname(base))
    with open(base + '.pcm', 'wb') as f:
        for _ in range(clips):
            rng.integers(-3000, 3000, samples, dtype=np.int16).tofile(f)
    np.savez(base + '.npz', offsets=np.cumsum(lengths) - lengths, lengths=lengths, keys=np.arange(clips).astype(str),
             labels=np.arange(clips, dtype=np.int32) % CLASSES, folds=np.full(clips, -1, np.int16),
             hashes=np.arange(clips, dtype=np.uint32), stats=np.tile([0, frames_in(samples) * N_MELS / 4],
                                                                    (clips, len(WINDOWS), 1)))
    with open(os.path.join(folder, 'noise', 'meta.json'), 'w', encoding='utf-8') as f:
        dump({'name': 'noise', 'version': FORMAT_VERSION, 'sample_rate': SAMPLE_RATE, 'folds': [],
              'classes': [str(i) for i in range(CLASSES)], 'multi_label': False, 'splits': {'train': {}}}, f)
    return open_clips(['noise'], folder)


def noise_pcm(clips, samples):
    """(clips, samples) int16 of white noise, and lengths (clips,)"""
    pcm = torch.randint(-3000, 3000, (clips, samples), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    return pcm, torch.full((clips,), samples)


def in_words(where):
    return '  '.join(f'{name} {value}' for name, value in where.items() if value != '')


def write_json(settings, where, figures, **more):
    if settings.json:
        with replacing(settings.json) as f:
            dump({**where, 'settings': vars(settings), 'figures': figures, **more}, f, indent=1)
