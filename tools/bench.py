"""How fast it is: the pre-training step and every part of the way from an audio file to it, on this machine.

    python -m tools.bench                               # config/as2m.py, 12 clips, on a GPU; config/demo.py elsewhere
    python -m tools.bench config/demo.py --what=step,data --json=figures.json
    python -m tools.bench config/as2m.py --batch_size=12 --dataset=as2m               # on real clips
    python -m tools.bench config/as2m.py --batch_size=12 --baseline                   # beside the authors' arrangement
    python -m tools.bench config/demo.py --what= --profile=trace.json                 # for chrome://tracing or perfetto

Settings are the names below, those of pretrain.py and the fields of model.ASDAConfig, so that its config files serve as
they are. Clips are synthetic unless --dataset names prepared sets: the sets of a config file are not read. Every time
is the median of several calls, each waited for, after some that warm up; what is compared is called in turn. Where
other processes keep cores busy (the `load` in the table), threads wait for each other: give --threads=1.
"""
import dataclasses
import itertools
import os
import platform
import re
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from json import dump

import numpy as np
import soundfile
import torch
from tqdm import tqdm

import configurator
import data
import finetune
import prepare
import pretrain
from audio import N_MELS, SAMPLE_RATE, WINDOWS, samples_for
from audio.clips import FORMAT_VERSION, open_clips
from engine import processes, randomness
from engine.errors import ROOT, ConfigError, RunError
from engine.files import replacing
from engine.machine import cores
from engine.run import ahead as read_ahead
from fast import forms
from fast.spectrogram import fbank
from model import ASDA, ASDAConfig, Classifier
from tools import authors_arrangement as authors
from tools.describe import MODEL, flops

what = 'step,data,fbank,masks,growth,prepare,finetune_data'     # what to measure, separated by commas
baseline = False                # measure only the step beside the authors' arrangement (tools/authors_arrangement.py)
steps = 10                      # timed calls of everything; their median counts
warmup = 3                      # calls before them
json = ''                       # write all figures to this file
profile = ''                    # write a trace of three steps to this file and print the longest operators

CLIP_SECONDS = 10               # of synthetic clips, as AudioSet's
CLASSES = 50                    # of synthetic labels, as ESC-50's
TARGETS = {'mono_clips_per_second_per_core': 'at least 30', 'stereo_clips_per_second_per_core': 'at least 30',
           'percent_of_step': 'at most 15'}

# Dense peaks in TFLOP/s from the vendor's data sheets: words of the device's name, bfloat16 with float32 accumulation,
# float32 without TF32. The first match counts; None: the device has none.
PEAKS = ((('H200', 'NVL'), 836, 60), (('H200',), 989, 67), (('H100', 'PCIe'), 756, 51), (('H100', 'NVL'), 836, 60),
         (('H100',), 989, 67), (('A100',), 312, 19.5), (('L40S',), 362, 91.6), (('L4',), 121, 30.3),
         (('RTX', '4090'), 165, 82.6), (('RTX', '3090'), 71, 35.6), (('V100',), None, 15.7), (('T4',), None, 8.1))


@dataclass
class Bench:
    """What every section is given."""
    settings: configurator.Settings
    config: ASDAConfig
    process: processes.Process
    autocast: object                # a context maker

    def to_device(self, batch):
        return {name: value if name == 'noise_seed' else value.to(self.process.device, non_blocking=True)
                for name, value in batch.items()}


def make_bench(settings, config, process):
    """In the precision that the settings name, or in what 'auto' chooses."""
    autocast, dtype = processes.autocast(process, settings.dtype, config.n_embd)
    return Bench(settings.but(dtype=dtype), config, process, autocast)


# ----------------------------------------------------------------------------------------------- counting and measuring

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


def synchronise(process):
    if process.device.type != 'cpu':
        torch.accelerator.synchronize()


def median_seconds(bench, title, **functions):
    """{name: median seconds of a call}; the functions are called in turn, A B A B ..., so that whatever else the
    machine does falls on all of them."""
    times = {name: [] for name in functions}
    rounds = bench.settings.warmup + bench.settings.steps
    with tqdm(total=rounds * len(functions), desc=title, leave=False, delay=1) as bar:
        for _ in range(rounds):
            for name, function in functions.items():
                synchronise(bench.process)
                began = time.perf_counter()
                function()
                synchronise(bench.process)
                times[name].append(time.perf_counter() - began)
                bar.update()
    return {name: statistics.median(seconds[bench.settings.warmup:]) for name, seconds in times.items()}


def on_threads(number, function, *arguments):
    """function(*arguments) to be called later, with that number of CPU threads."""
    def call():
        before = torch.get_num_threads()
        torch.set_num_threads(number)
        function(*arguments)
        torch.set_num_threads(before)
    return call


def peak_memory(process):
    """Bytes: most that PyTorch had allocated on a GPU at a time, or most that this process has ever held in RAM."""
    if process.device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def device_name(process):
    """The GPU's name, or the CPU's as Linux tells it."""
    if process.device.type == 'cpu' and os.path.exists('/proc/cpuinfo'):
        with open('/proc/cpuinfo', encoding='utf-8') as f:
            named = re.search(r'^model name\s*: (.+)$', f.read(), re.M)
        return named[1].strip() if named else platform.machine()
    return processes.provenance(process)['device']


# -------------------------------------------------------------------------------------------------------- clips to use

def write_noise(folder, clips, samples):
    """A prepared set of white noise as prepare.py would pack it, without decoding. -> Clips"""
    rng = np.random.default_rng(0)
    base, lengths = os.path.join(folder, 'noise', 'train-00000'), np.full(clips, samples, np.int64)
    os.makedirs(os.path.dirname(base))
    with open(base + '.pcm', 'wb') as f:
        for _ in range(clips):
            rng.integers(-3000, 3000, samples, dtype=np.int16).tofile(f)
    np.savez(base + '.npz', offsets=np.cumsum(lengths) - lengths, lengths=lengths, keys=np.arange(clips).astype(str),
             labels=np.arange(clips, dtype=np.int32) % CLASSES, folds=np.full(clips, -1, np.int16),
             hashes=np.arange(clips, dtype=np.uint32), stats=np.zeros((clips, len(WINDOWS), 2)))
    with open(os.path.join(folder, 'noise', 'meta.json'), 'w', encoding='utf-8') as f:
        dump({'name': 'noise', 'version': FORMAT_VERSION, 'sample_rate': SAMPLE_RATE, 'folds': [],
              'classes': [str(i) for i in range(CLASSES)], 'multi_label': False, 'splits': {'train': {}}}, f)
    return open_clips(['noise'], folder)


def pretrain_loader(bench, clips, items):
    settings = bench.settings
    batches = data.PretrainBatches(clips, bench.config.frames, settings.batch_size, range(settings.batch_size),
                                   settings.seed, settings.short_clips == 'join')
    return data.loader(batches, items, settings.workers, pin=bench.process.device.type == 'cuda')


def noise_pcm(clips, samples):
    """(clips, samples) int16 of white noise, and lengths (clips,)"""
    pcm = torch.randint(-3000, 3000, (clips, samples), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    return pcm, torch.full((clips,), samples)


def spectrograms(bench):
    """-> a function that gives a batch (B, frames, 128): the next of --dataset, through the loader and data.log_mel, or
    the same random numbers every time"""
    settings, config = bench.settings, bench.config
    if not settings.dataset:
        spec = torch.randn(settings.batch_size, config.frames, N_MELS, device=bench.process.device)
        return lambda: spec
    clips = pretrain.training_clips(settings, bench.process)
    mean, std = clips.statistics(settings.window)
    batches = iter(pretrain_loader(bench, clips, range(sys.maxsize)))

    def following():
        batch = bench.to_device(next(batches))
        return data.log_mel(batch['pcm'], batch['lengths'], config.frames, settings.window, mean, std)
    return following


# ------------------------------------------------------------------------------------------------------------- sections

def training_step(bench):
    """-> a function that does one step of pretrain.train: input, masks, noise, forward, backward, clip, AdamW, EMA"""
    settings, config, process = bench.settings, bench.config, bench.process
    torch.manual_seed(settings.seed)
    model = ASDA(config).to(process.device)
    optimizer = pretrain.make_optimizer(model, settings, dataclasses.replace(process, rank=1))      # prints nothing
    forms.apply(model, forms.choose(settings, config, {}, process))
    if settings.compile and processes.can_compile(process):
        model.compile(mode=settings.compile_mode)
    spec, count = spectrograms(bench), itertools.count()

    def step():
        number = next(count)
        noise = pretrain.mask_noise(settings, config, number, range(settings.batch_size), process.device)
        pretrain.forward_backward(model, spec(), masks_of(bench, number), noise, settings, bench.autocast)
        pretrain.update(model, optimizer, number, settings)
        model.update_teacher(pretrain.ema_decay_at(number, settings))
    return step


def masks_of(bench, number):
    config = bench.config
    generator = randomness.torch_random(bench.process.device, bench.settings.seed, 'mask', number)
    return data.block_masks(bench.settings.batch_size, config.n_students, config.grid, config.mask_ratio,
                            config.mask_block, generator, config.mask_adjust)


def measure_step(bench):
    """The whole step: time, operations per second and their share of the device's peak, memory."""
    step = training_step(bench)
    if bench.process.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(bench, 'step', step=step)['step']
    parts = flops(bench.config)
    speed = sum(parts.values()) * bench.settings.batch_size / seconds
    peak = peak_flops(device_name(bench.process), bench.settings.dtype)
    return {'ms': seconds * 1e3, 'clips_per_second': bench.settings.batch_size / seconds,
            'peak_memory_GiB': peak_memory(bench.process) / 2 ** 30, 'TFLOP_per_second': speed / 1e12,
            **({'percent_of_peak': speed / peak * 100} if peak else {}),
            'GFLOP_per_clip': sum(parts.values()) / 1e9,
            **{f'GFLOP_per_clip: {part}': number / 1e9 for part, number in parts.items()}}


def measure_data(bench):
    """The data path alone, from packed clips in the page cache to batches in this process."""
    settings = bench.settings
    items = range(1 + 5 * settings.steps + 8 * settings.workers)
    with tempfile.TemporaryDirectory() as folder:
        clips = (pretrain.training_clips(settings, bench.process) if settings.dataset
                 else write_noise(folder, 64, CLIP_SECONDS * SAMPLE_RATE))
        for title in ('data, filling the page cache', 'data'):
            batches = iter(tqdm(pretrain_loader(bench, clips, items), title, len(items), leave=False, delay=1))
            next(batches)                                                   # the workers have started
            began = time.perf_counter()
            received = sum(len(batch['lengths']) for batch in batches)
            speed = received / (time.perf_counter() - began)
    return {'clips_per_second': speed, 'clips_per_second_per_core': speed / min(max(settings.workers, 1), cores())}


def measure_fbank(bench):
    """fbank of a batch against torchaudio's clip by clip, on one and on all threads; on a GPU ours there too."""
    pcm, lengths = noise_pcm(min(bench.settings.batch_size, 8), CLIP_SECONDS * SAMPLE_RATE)
    wave, window, device, figures = pcm.float() / 32768, bench.settings.window, bench.process.device, {}

    def clip_by_clip():
        for clip in wave:
            authors.clip_fbank(clip, window)
    for number in sorted({1, torch.get_num_threads()}):
        contenders = {f'kaldi_ms_per_clip, threads = {number}': on_threads(number, clip_by_clip),
                      f'ours_ms_per_clip, threads = {number}': on_threads(number, fbank, wave, lengths, window)}
        measured = median_seconds(bench, f'fbank, threads = {number}', **contenders)
        figures |= {name: seconds / len(wave) * 1e3 for name, seconds in measured.items()}
        kaldi, ours = measured.values()
        figures[f'kaldi_over_ours, threads = {number}'] = kaldi / ours
    if device.type != 'cpu':
        there = wave.to(device), lengths.to(device), window
        figures['ours_ms_per_clip, on the device'] = median_seconds(
            bench, 'fbank', ours=lambda: fbank(*there))['ours'] / len(wave) * 1e3
    return figures


def measure_masks(bench):
    """The block masks of a batch."""
    return {'ms_per_batch': median_seconds(bench, 'masks', masks=lambda: masks_of(bench, 0))['masks'] * 1e3}


def measure_growth(bench):
    """The step with half, as many and twice the clips, students and frames, without torch.compile."""
    measured, figures = {}, {}
    units = {'batch_size': bench.settings.accumulate, 'n_students': 1, 'frames': bench.config.patch_frames}
    for name, factor in itertools.product(units, (0.5, 1, 2)):
        value = max(int(getattr(bench.settings, name) * factor) // units[name], 1) * units[name]
        try:
            settings = bench.settings.but(**{name: value}, compile=False, dataset='')
            key = settings.batch_size, settings.n_students, settings.frames         # factor 1 is the same for all names
            if key not in measured:
                step = training_step(dataclasses.replace(bench, settings=settings,
                                                         config=pretrain.model_config(settings)))
                measured[key] = median_seconds(bench, f'growth, {name} = {value}', step=step)['step']
            figures[f'ms, {name} = {value}'] = measured[key] * 1e3
        except (ConfigError, torch.OutOfMemoryError) as error:
            bench.process.print(f'growth: left out {name} = {value} ({str(error).splitlines()[0][:80]} ...)')
    return figures


def measure_prepare(bench):
    """prepare.pack_clip of ten-second FLACs at 44.1 kHz, tones with noise, on one thread."""
    rng, t, figures = np.random.default_rng(0), np.arange(CLIP_SECONDS * 44100) / 44100, {}
    tones = sum(0.1 * np.sin(2 * np.pi * pitch * t) for pitch in (220, 1300, 5000))
    with tempfile.TemporaryDirectory() as folder:
        for channels, name in ((1, 'mono'), (2, 'stereo')):
            path = os.path.join(folder, name + '.flac')
            soundfile.write(path, tones[:, None] + 0.05 * rng.standard_normal((len(t), channels)), 44100)
            assert not isinstance(prepare.pack_clip(('file', path), 3600), str)         # a str says why it failed
            seconds = median_seconds(bench, f'prepare, {name}', pack=on_threads(
                1, prepare.pack_clip, ('file', path), 3600))['pack']
            figures[f'{name}_clips_per_second_per_core'] = 1 / seconds
    return figures


def measure_finetune_data(bench):
    """A fine-tuning batch, made in this process (read, roll, then log_mel and augment), beside the step on it (forward,
    backward, AdamW), with the defaults of finetune.py and noise-filled clips as long as the input. Then the step with
    all of it, read ahead by the workers, which on a GPU should cost no more than the step and log_mel."""
    config, process = bench.config, bench.process
    size = bench.settings.batch_size
    settings = configurator.configure(finetune.__file__, [], MODEL).but(batch_size=size, mixup=0.8)
    with tempfile.TemporaryDirectory() as folder:
        clips = write_noise(folder, 2 * size, samples_for(config.frames))
        batches = data.FinetuneBatches(clips, config.frames, size, range(size), settings.seed, config.n_layer,
                                       settings.roll, settings.noise, settings.input_mask, settings.mixup)
        torch.manual_seed(settings.seed)
        model = Classifier(dataclasses.replace(config, drop_path=settings.drop_path), CLASSES).to(process.device)
        forms.apply(model)
        optimizer = finetune.make_optimizer(model, settings, dataclasses.replace(process, rank=1))
        if bench.settings.compile and processes.can_compile(process):
            model.compile()
        count, latest = itertools.count(), {}

        def read():
            latest['batch'] = bench.to_device(batches[next(count)])

        def spectrograms():
            batch = latest['batch']
            spec = data.log_mel(batch['pcm'], batch['lengths'], config.frames, bench.settings.window, 0.0, 0.5,
                                batch['gain'])
            latest['spec'], latest['labels'] = data.augment(spec, batch)

        def step():
            with bench.autocast():
                logits = model(latest['spec'], latest['batch']['draws'])
            finetune.classification_loss(logits.float(), latest['labels'], latest['batch']['label_sum'], settings,
                                         multi_label=False).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = median_seconds(bench, 'finetune_data', read=read, spectrograms=spectrograms, step=step)
        loader = data.loader(batches, range(bench.settings.warmup + bench.settings.steps), bench.settings.workers,
                             pin=process.device.type == 'cuda')
        times = [time.perf_counter()]
        for latest['batch'] in read_ahead(loader, process):
            spectrograms()
            step()
            synchronise(process)
            times.append(time.perf_counter())
        ahead = statistics.median(np.diff(times)[bench.settings.warmup:])
    return {'read_and_roll_ms': seconds['read'] * 1e3, 'log_mel_and_augment_ms': seconds['spectrograms'] * 1e3,
            'step_ms': seconds['step'] * 1e3, 'step_with_data_read_ahead_ms': ahead * 1e3,
            'percent_of_step': (seconds['read'] + seconds['spectrograms']) / seconds['step'] * 100}


def measure_baseline(bench):
    """One step of the authors' arrangement in float32, of ours in float32, and of ours as `auto` and the settings have
    it, from the same kind of spectrograms; and the spectrograms of a batch as they and as we make them."""
    settings, config, process = bench.settings.but(dataset=''), bench.config, bench.process
    plain = make_bench(settings.but(compile=False, kernels='torch', dtype='float32'), config, process)
    auto = make_bench(settings.but(dtype='auto'), config, process)
    try:
        model = authors.Arrangement(config).to(process.device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    model.load_state_dict(ASDA(config).state_dict())
    optimizer, spec, count = authors.make_optimizer(model, settings), spectrograms(plain)(), itertools.count()
    pcm, lengths = noise_pcm(settings.batch_size, samples_for(config.frames))
    spectrum = {'frames': config.frames, 'window': settings.window, 'mean': 0.0, 'std': 0.5}

    def theirs():
        number = next(count)
        authors.train_step(model, optimizer, spec, masks_of(bench, number), settings,
                           pretrain.ema_decay_at(number, settings))
    seconds = median_seconds(
        bench, 'baseline', authors_float32=theirs, ours_float32=training_step(plain), ours_auto=training_step(auto),
        authors_spectrograms=lambda: authors.spectrograms(pcm, lengths, **spectrum).to(process.device),
        ours_spectrograms=lambda: data.log_mel(pcm.to(process.device), lengths.to(process.device), **spectrum))
    pairs = (('authors_float32', 'ours_float32'), ('authors_float32', 'ours_auto'),
             ('authors_spectrograms', 'ours_spectrograms'))
    return {**{f'{name}_ms': value * 1e3 for name, value in seconds.items()},
            **{f'{one}_over_{other}': seconds[one] / seconds[other] for one, other in pairs}}


SECTIONS = {'step': measure_step, 'data': measure_data, 'fbank': measure_fbank, 'masks': measure_masks,
            'growth': measure_growth, 'prepare': measure_prepare, 'finetune_data': measure_finetune_data,
            'baseline': measure_baseline}


# --------------------------------------------------------------------------------------------------------------- output

def write_profile(bench):
    """A trace of three steps in Chrome's format, and the operators that took longest."""
    step, cuda = training_step(bench), bench.process.device.type == 'cuda'
    for _ in range(max(bench.settings.warmup, 1)):
        step()
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            step()
        synchronise(bench.process)
    with replacing(bench.settings.profile) as f:
        profiler.export_chrome_trace(f.name)                                # writes the temporary file itself
    bench.process.print(profiler.key_averages().table(
        sort_by='self_cuda_time_total' if cuda else 'self_cpu_time_total', row_limit=12, max_name_column_width=50))


def print_table(where, figures):
    print('\n' + '  '.join(f'{name} {value}' for name, value in where.items() if value != ''))
    for section, values in figures.items():
        print(section)
        for name, value in values.items():
            shown = f'{value:,.0f}' if value >= 1000 else f'{value:.4g}'
            print(f'  {name.replace("_", " "):<44}{shown:>10}   {TARGETS.get(name, "")}'.rstrip())


def configure(argv):
    """The settings, on top of config/as2m.py (a GPU's 12 of its 48 clips) or config/demo.py if argv names no file."""
    settings = configurator.configure(__file__, argv, (pretrain.__file__,), MODEL)
    if not any(argument.endswith('.py') for argument in argv):
        cuda = settings.device == 'cuda' or settings.device == 'auto' and torch.cuda.is_available()
        default = ['as2m.py', '--batch_size=12'] if cuda else ['demo.py']
        argv = [os.path.join(ROOT, 'config', default[0]), *default[1:], *argv]
        settings = configurator.configure(__file__, argv, (pretrain.__file__,), MODEL)
    if not any(re.match(r'--dataset(=|$)', argument) for argument in argv):
        settings.dataset = ''                                               # a config file's set may not be here
    return settings


def check(settings, process):
    """-> names of the sections to measure. Raises ConfigError for settings that cannot work."""
    pretrain.check(settings, process.world)
    configurator.check_ranges(settings, steps=(1, 1e6), warmup=(0, 1e6))
    if process.world > 1:
        raise ConfigError(f'bench.py measures one process, not {process.world}: run it without torchrun')
    for name in ('json', 'profile'):
        if os.path.isdir(getattr(settings, name)):
            raise ConfigError(f'{name} = {getattr(settings, name)!r} is a folder: name a file in it')
    sections = ['baseline'] if settings.baseline else configurator.words(settings.what)
    for name in sections:
        if name not in SECTIONS:
            raise ConfigError(f'what = {name!r} is none of {", ".join(SECTIONS)}')
    if not sections and not settings.profile:
        raise ConfigError(f'nothing to measure: name some of {", ".join(SECTIONS)} with --what=')
    return sections


def run(argv):
    settings = configure(argv)
    process = processes.start(settings.device, settings.threads, settings.deterministic)
    sections, config = check(settings, process), pretrain.model_config(settings)
    bench, figures = make_bench(settings, config, process), {}
    settings, provenance = bench.settings, processes.provenance(process)
    where = {'device': device_name(process), 'cores': cores(), 'threads': provenance['threads'],
             'load': round(os.getloadavg()[0], 1),                          # other processes slow this one down
             'torch': provenance['torch'], 'dtype': settings.dtype, 'compile': settings.compile,
             'batch_size': settings.batch_size, 'clips': settings.dataset or 'synthetic',
             'commit': provenance['commit']}
    process.print(config)
    for name in sections:
        process.print(f'measuring {name} ...')
        try:
            figures[name] = SECTIONS[name](bench)
        except torch.OutOfMemoryError:
            raise RunError(f'{name}: too little memory on the device for batch_size = {settings.batch_size}: '
                                   'lower it') from None
    if settings.profile:
        write_profile(bench)
    if figures:
        print_table(where, figures)
    if settings.json:
        with replacing(settings.json) as f:
            dump({**where, 'settings': vars(settings), 'figures': figures}, f, indent=1)


if __name__ == '__main__':
    processes.main(run)
