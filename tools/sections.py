"""What tools.bench measures: each a function from a Bench to {figure: value}, by name in SECTIONS."""
import dataclasses
import functools
import itertools
import os
import sys
import tempfile
import time

import numpy as np
import soundfile
import torch
from tqdm import tqdm

import configurator
import data
import finetune
import prepare
import pretrain
from audio import N_MELS, SAMPLE_RATE, samples_for
from engine import processes
from engine.errors import ConfigError
from engine.machine import cores
from engine.run import ahead as read_ahead
from fast import forms, kernels
from fast.spectrogram import fbank
from model import ASDA, Classifier
from tools import authors_arrangement as authors
from tools.describe import flops
from tools.measuring import noise_pcm, peak_flops, threads, write_noise

CLIP_SECONDS = 10               # of synthetic clips, as AudioSet's
TARGETS = {'mono_clips_per_second_per_core': 'at least 30', 'stereo_clips_per_second_per_core': 'at least 30',
           'percent_of_step': 'at most 15', 'with_data_over_without': 'at most 1.03',
           'waiting_over_ideal': 'at most 1.03'}
FED_CLIPS, FED_RATE = 48, 400   # a step that only waits: its clips, and how many of them a second


# -------------------------------------------------------------------------------------------------------- clips to use

def pretrain_loader(bench, clips, items):
    settings = bench.settings
    batches = data.PretrainBatches(clips, bench.config.frames, settings.batch_size, range(settings.batch_size),
                                   settings.seed, settings.short_clips == 'join')
    return data.loader(batches, items, settings.workers, pin=bench.is_cuda)


def packed_clips(bench, folder):
    """Those of --dataset, or synthetic ones, put into the folder."""
    if bench.settings.dataset:
        return pretrain.training_clips(bench.settings, bench.process)
    return write_noise(folder, 64, CLIP_SECONDS * SAMPLE_RATE)


def spectrograms(bench, clips=None):
    """-> a function that gives a batch (B, frames, 128): the next of the clips or of --dataset, through the loader and
    data.log_mel, or the same random numbers every time"""
    settings, config = bench.settings, bench.config
    if clips is None and not settings.dataset:
        spec = torch.randn(settings.batch_size, config.frames, N_MELS, device=bench.process.device)
        return lambda: spec
    clips = clips or pretrain.training_clips(settings, bench.process)
    spectrum = pretrain.spectrum_of(clips, config, settings)
    batches = read_ahead(pretrain_loader(bench, clips, range(sys.maxsize)), bench.process)

    def following():
        batch = next(batches)
        return data.log_mel(batch['pcm'], batch['lengths'], **spectrum)
    return following


# ------------------------------------------------------------------------------------------------------------- sections

def training_step(bench, names=None):
    """-> a function that does one step of pretrain.train: input, masks, noise, forward, backward, clip, AdamW, EMA; it
    may be given another source of spectrograms -> the loss. names: faster forms; None: those that pretrain.py takes"""
    settings, config, process = bench.settings, bench.config, bench.process
    torch.manual_seed(settings.seed)
    model = ASDA(config).to(process.device)
    optimizer = pretrain.make_optimizer(model, settings, dataclasses.replace(process, rank=1))      # prints nothing
    forms.apply(model, forms.choose(settings, config, {}, process) if names is None else names)
    if settings.compile and processes.can_compile(process):
        model.compile(mode=settings.compile_mode)
    spec, count = spectrograms(bench), itertools.count()

    def step(spec=spec):
        number = next(count)
        mask = pretrain.masks(settings, config, number, process.device)
        noise = pretrain.mask_noise(settings, config, number, range(settings.batch_size), process.device)
        measures = pretrain.forward_backward(model, spec(), mask, noise, settings, bench.autocast)
        pretrain.update(model, optimizer, number, settings)
        model.update_teacher(pretrain.ema_decay_at(number, settings))
        return measures['loss']
    return step


def measure_forms(bench):
    """The step with each faster form alone, in times of the plain step, called in turn with it."""
    names = [name for name in forms.FORMS if name in forms.ALWAYS or not kernels.unusable(bench.process.device)]
    seconds = bench.seconds('forms', plain=training_step(bench, ()), **{
        name: training_step(bench, (name,)) for name in names})
    return {'plain_ms': 1e3 * seconds['plain'], **{
        f'{name}_over_plain': seconds[name] / seconds['plain'] for name in names}}


def measure_step(bench):
    """The whole step: time, memory, operations per second and their share of what a large matrix product, called in
    turn with it, reaches and of the device's peak."""
    step, parts = training_step(bench), flops(bench.config)
    step()                                                                  # torch.compile tries what it likes
    if bench.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    step()                                                                  # and has the optimizer's averages
    memory, side = bench.peak_memory(), 8192 if bench.is_cuda else 2048
    pair = torch.randn(2, side, side, device=bench.process.device)
    products = {dtype: functools.partial(torch.matmul, *pair.to(getattr(torch, dtype)))
                for dtype in ('float32', 'bfloat16')}
    measured = bench.seconds('step', step=step, **products)
    seconds = measured.pop('step')
    speed = sum(parts.values()) * bench.settings.batch_size / seconds
    matmul = {dtype: 2 * side ** 3 / its_seconds for dtype, its_seconds in measured.items()}
    peak = peak_flops(processes.device_name(bench.process.device), bench.settings.dtype)
    return {'ms': seconds * 1e3, 'clips_per_second': bench.settings.batch_size / seconds,
            'peak_memory_GiB': memory / 2 ** 30, 'TFLOP_per_second': speed / 1e12,
            **{f'matmul_TFLOP_per_second, {dtype}': its_speed / 1e12 for dtype, its_speed in matmul.items()},
            'percent_of_matmul': speed / matmul[bench.settings.dtype] * 100,
            **({'percent_of_peak': speed / peak * 100} if peak else {}),
            'GFLOP_per_clip': sum(parts.values()) / 1e9,
            **{f'GFLOP_per_clip: {part}': number / 1e9 for part, number in parts.items()}}


def profiled(bench):
    """The profile of three steps after those that warm up."""
    step = training_step(bench)
    for _ in range(max(bench.settings.warmup, 1)):
        step()
    with torch.profiler.profile() as profiler:                              # of the CPU, and of a GPU where one is
        for _ in range(3):
            step()
        bench.synchronise()
    return profiler


def measure_operators(bench):
    """The five operators (on a GPU: kernels) that take most time of their own, in percent of all of a step."""
    times = {event.key: event.self_device_time_total if bench.is_cuda else event.self_cpu_time_total
             for event in profiled(bench).key_averages()
             if not bench.is_cuda or event.device_type == torch.autograd.DeviceType.CUDA
             and not event.is_user_annotation}                              # a span around kernels, which count
    return {f'percent in {name[:60]}': times[name] / sum(times.values()) * 100
            for name in sorted(times, key=times.get, reverse=True)[:5]}


def measure_with_data(bench):
    """The step on batches that the loader reads from packed clips, with their copy and log_mel, beside the same step on
    a spectrogram that lies on the device; then a step that only waits, fed alike, beside the time it waits. In blocks,
    as in training, each after the batches that the loader had ready, which say nothing of its speed."""
    settings, ready, seconds = bench.settings, 4 * bench.settings.workers + 2, {'without_data': 0, 'with_data': 0}
    with tempfile.TemporaryDirectory() as folder:
        clips, still = packed_clips(bench, folder), bench.but(dataset='')
        step, sources = training_step(still), {'without_data': spectrograms(still),
                                               'with_data': spectrograms(bench, clips)}
        for name in [*sources] * 2:
            for _ in range(max(ready if name == 'with_data' else 1, settings.warmup)):
                step(sources[name])
            bench.synchronise()
            began = time.perf_counter()
            for _ in range(settings.steps):
                step(sources[name])
            bench.synchronise()
            seconds[name] += (time.perf_counter() - began) / 2 / settings.steps
        batches = iter(pretrain_loader(bench.but(batch_size=FED_CLIPS), clips, range(sys.maxsize)))
        wait = FED_CLIPS / FED_RATE
        for _ in range(ready):
            next(batches)
        free = began = time.perf_counter()
        for _ in range(settings.steps):
            next(batches)
            time.sleep(max(free - time.perf_counter(), 0))                  # until the step before, which runs, ends
            free = time.perf_counter() + wait
    return {**{f'{name}_ms': value * 1e3 for name, value in seconds.items()},
            'with_data_over_without': seconds['with_data'] / seconds['without_data'],
            'waiting_over_ideal': (free - began) / (wait * settings.steps)}


def measure_data(bench):
    """The data path alone, from packed clips in the page cache to batches in this process."""
    settings = bench.settings
    items = range(1 + 5 * settings.steps + 8 * settings.workers)
    with tempfile.TemporaryDirectory() as folder:
        clips = packed_clips(bench, folder)
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
        with threads(number):
            seconds = bench.seconds(f'fbank, threads = {number}', kaldi=clip_by_clip,
                                    ours=lambda: fbank(wave, lengths, window))
        figures |= {f'{name}_ms_per_clip, threads = {number}': each / len(wave) * 1e3 for name, each in seconds.items()}
        figures[f'kaldi_over_ours, threads = {number}'] = seconds['kaldi'] / seconds['ours']
    if device.type != 'cpu':
        there = wave.to(device), lengths.to(device), window
        figures['ours_ms_per_clip, on the device'] = bench.seconds(
            'fbank', ours=lambda: fbank(*there))['ours'] / len(wave) * 1e3
    return figures


def measure_masks(bench):
    """The block masks of a batch."""
    seconds = bench.seconds('masks', masks=functools.partial(
        pretrain.masks, bench.settings, bench.config, 0, bench.process.device))
    return {'ms_per_batch': seconds['masks'] * 1e3}


def measure_growth(bench):
    """The step with half, as many and twice the clips, students and frames, without torch.compile."""
    measured, figures = {}, {}
    units = {'batch_size': bench.settings.accumulate, 'n_students': 1, 'frames': bench.config.patch_frames}
    for name, factor in itertools.product(units, (0.5, 1, 2)):
        value = max(int(getattr(bench.settings, name) * factor) // units[name], 1) * units[name]
        try:
            changed = bench.but(**{name: value}, compile=False, dataset='')
            key = tuple(getattr(changed.settings, unit) for unit in units)  # factor 1 is the same for all names
            if key not in measured:
                step = training_step(changed)
                measured[key] = bench.seconds(f'growth, {name} = {value}', step=step)['step']
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
            with threads(1):
                seconds = bench.seconds(name, pack=lambda path=path: prepare.pack_clip(('file', path), 3600))
            figures[f'{name}_clips_per_second_per_core'] = 1 / seconds['pack']
    return figures


def measure_finetune_data(bench):
    """A fine-tuning batch, made in this process (read, roll, then log_mel and augment), beside the step on it (forward,
    backward, AdamW), with the defaults of finetune.py and noise-filled clips as long as the input. Then the step with
    all of it, read ahead by the workers, which on a GPU should cost no more than the step and log_mel."""
    config, process, size, latest = bench.config, bench.process, bench.settings.batch_size, {}
    settings = configurator.configure(finetune.__file__, [], pretrain.MODEL_SETTINGS).but(batch_size=size, mixup=0.8)
    with tempfile.TemporaryDirectory() as folder:
        clips = write_noise(folder, 2 * size, samples_for(config.frames))
        spectrum = pretrain.spectrum_of(clips, config, bench.settings)
        batches = data.FinetuneBatches(clips, config.frames, size, range(size), settings.seed, config.n_layer,
                                       settings.roll, settings.noise, settings.input_mask, settings.mixup)
        torch.manual_seed(settings.seed)
        model = Classifier(dataclasses.replace(config, drop_path=settings.drop_path), len(clips.classes))
        forms.apply(model.to(process.device))
        optimizer = finetune.make_optimizer(model, settings, dataclasses.replace(process, rank=1))
        if bench.settings.compile and processes.can_compile(process):
            model.compile()
        loader = data.loader(batches, range(bench.settings.warmup + bench.settings.steps), bench.settings.workers,
                             pin=bench.is_cuda)
        count, ahead = itertools.count(), read_ahead(loader, process)

        def read():
            latest.update(next(read_ahead([batches[next(count)]], process)))

        def spectrograms():
            spec = data.log_mel(latest['pcm'], latest['lengths'], **spectrum, gain=latest['gain'])
            latest['spec'], latest['mixed'] = data.augment(spec, latest)

        def step():
            with bench.autocast():
                logits = model(latest['spec'], latest['draws'])
            finetune.classification_loss(logits.float(), latest['mixed'], latest['label_sum'], settings,
                                         multi_label=False).backward()
            finetune.update(model, optimizer, 0, settings)

        def step_with_data():
            latest.update(next(ahead))
            spectrograms()
            step()
        ms = {name: 1e3 * seconds for name, seconds in {
            **bench.seconds('finetune_data', read=read, spectrograms=spectrograms, step=step),
            **bench.seconds('finetune_data, read ahead', ahead=step_with_data)}.items()}
    return {'read_and_roll_ms': ms['read'], 'log_mel_and_augment_ms': ms['spectrograms'], 'step_ms': ms['step'],
            'step_with_data_read_ahead_ms': ms['ahead'],
            'percent_of_step': (ms['read'] + ms['spectrograms']) / ms['step'] * 100}


def measure_baseline(bench):
    """One step of the authors' arrangement in float32, of ours in float32, and of ours as `auto` and the settings have
    it, from the same kind of spectrograms; and the spectrograms of a batch as they and as we make them."""
    still, config, process = bench.but(dataset=''), bench.config, bench.process
    settings, plain = still.settings, still.but(compile=False, kernels='torch', dtype='float32')
    try:
        model = authors.Arrangement(config).to(process.device)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    model.load_state_dict(ASDA(config).state_dict())
    optimizer, spec, count = authors.make_optimizer(model, settings), spectrograms(still)(), itertools.count()
    pcm, lengths = noise_pcm(settings.batch_size, samples_for(config.frames))
    spectrum = {'frames': config.frames, 'window': settings.window, 'mean': 0.0, 'std': 0.5}

    def theirs():
        number = next(count)
        authors.train_step(model, optimizer, spec, pretrain.masks(settings, config, number, process.device), settings,
                           pretrain.ema_decay_at(number, settings))
    seconds = bench.seconds(
        'baseline', authors_float32=theirs, ours_float32=training_step(plain),
        ours_auto=training_step(still.but(dtype='auto')),
        authors_spectrograms=lambda: authors.spectrograms(pcm, lengths, **spectrum).to(process.device),
        ours_spectrograms=lambda: data.log_mel(pcm.to(process.device), lengths.to(process.device), **spectrum))
    pairs = (('authors_float32', 'ours_float32'), ('authors_float32', 'ours_auto'),
             ('authors_spectrograms', 'ours_spectrograms'))
    return {**{f'{name}_ms': value * 1e3 for name, value in seconds.items()},
            **{f'{one}_over_{other}': seconds[one] / seconds[other] for one, other in pairs}}


SECTIONS = {'step': measure_step, 'forms': measure_forms, 'operators': measure_operators,
            'with_data': measure_with_data, 'data': measure_data, 'fbank': measure_fbank, 'masks': measure_masks,
            'growth': measure_growth, 'prepare': measure_prepare, 'finetune_data': measure_finetune_data,
            'baseline': measure_baseline}
