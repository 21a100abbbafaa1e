"""`python -m tools.bench --everything`: all of it in one command, within `budget` seconds, as JSON and Markdown tables.

Every part has a process of its own, forked from a server that has imported PyTorch: what ends one, an error, too little
memory or the end of the budget, takes no other's figures, and each begins with an empty device. Parts come in the order
of what they are worth. What was not measured is named with the reason; files are written anew after every part.
"""
import contextlib
import os
import statistics
import tempfile
import time

import torch

import configurator
import prepare
import pretrain
from audio.workers import PROCESSES
from engine import processes
from engine.errors import ROOT, ConfigError
from engine.files import replacing
from engine.machine import cores
from fast import forms, kernels
from tools.measuring import Bench, in_words, shown, write_json
from tools.reference import read_log
from tools.sections import SECTIONS, TARGETS, training_step

DEMO = os.path.join(ROOT, 'config', 'demo.py')
SPARE = 0.95                    # of a GPU's memory, to find the largest batch: the allocator needs some for itself
AROUND = 1.5                    # times what pre-training takes: with its clips, which are made first, and its start


# ---------------------------------------------------------------------------------- parts that sections.py has not

def measure_kernels(bench):
    """Every kernel against its plain expression on this batch's shapes: errors of result and gradients against float32,
    relative to their norms, and time forward and backward; then the launches that were fastest, in words."""
    figures, dtype = {}, getattr(torch, bench.settings.dtype)
    for name, shape in forms.kernel_shapes(bench.config, bench.settings.batch_size).items():
        if shape is None or name == 'attention' and not kernels.diff_attention_fits(shape[1], shape[3], dtype):
            figures[f'{name}, not measured'] = 'no such layer, or beyond what the kernel holds'
            continue
        plain, kernel = kernels.compare(name, shape, bench.process.device, dtype)
        for form, (errors, ms) in (('plain', plain), ('kernel', kernel)):
            figures |= {f'error of {name}, {form}: result': errors[0],
                        f'error of {name}, {form}: largest of gradients': max(errors[1:]),
                        f'ms of {name}, {form}': ms}
        figures |= {f'{name} is right': 'yes' if all(map(kernels.is_right, kernel[0], plain[0])) else 'no',
                    f'launch of {name}': kernels.tuned_name(name)}
    return figures


def measure_precision(bench):
    """Losses of the first steps in bfloat16 and in float32, from the same weights, clips, masks and noise."""
    losses = {}
    for dtype in ('float32', 'bfloat16'):
        step = training_step(bench.but(dtype=dtype, warmup_steps=100))          # weights change, and not wildly
        losses[dtype] = [float(step()) for _ in range(bench.settings.steps)]
    off = [abs(half - full) / full for full, half in zip(*losses.values())]
    return {'last loss in float32': losses['float32'][-1], 'last loss in bfloat16': losses['bfloat16'][-1],
            'relative difference, first step': off[0], 'relative difference, largest of all steps': max(off)}


def measure_largest(bench):
    """The step with as many clips as fit into the GPU: a line through the memory of batch_size clips and of twice as
    many says how many that are, less a tenth until it is true."""
    def measure(clips, repeats):
        step = training_step(bench.but(batch_size=clips, accumulate=1))
        torch.cuda.reset_peak_memory_stats()
        seconds = bench.seconds(f'{clips} clips', step=step)['step'] if repeats else [step(), step()]
        return seconds, bench.peak_memory()
    few = bench.settings.batch_size
    (_, first), (_, second) = (measure(clips, False) for clips in (few, 2 * few))
    room = SPARE * torch.cuda.get_device_properties(bench.process.device).total_memory
    torch.cuda.set_per_process_memory_fraction(SPARE)                       # the rest is for libraries that load late
    clips = few + int((room - first) / max((second - first) / few, 1))
    while clips > 2 * few:
        torch.cuda.empty_cache()
        try:
            seconds, memory = measure(clips, True)
            return {'clips': clips, 'ms': seconds * 1e3, 'clips_per_second': clips / seconds,
                    'peak_memory_GiB': memory / 2 ** 30}
        except RuntimeError as error:                                       # torch.OutOfMemoryError is one
            if 'out of memory' not in str(error):
                raise
            clips = int(clips * 0.9)
    raise ConfigError(f'not even {2 * few} clips fit')


def measure_pretraining(bench):
    """pretrain.py with config/demo.py, its schedule made as long as pretraining_seconds of this device allow; its
    measures are means over the last tenth. Its clips are made if they are not in data_dir."""
    settings = bench.settings
    here = [DEMO, f'--device={bench.process.device.type}', f'--threads={settings.threads}', '--workers=0',
            f'--kernels={settings.kernels}']
    demo = vars(configurator.configure(pretrain.__file__, here, pretrain.MODEL_SETTINGS)) | {'dataset': ''}
    demo = Bench(settings.but(**demo), bench.process)
    seconds = demo.seconds('pre-training', step=training_step(demo))['step']
    updates = max(int(settings.pretraining_seconds / seconds), 10)
    with tempfile.TemporaryDirectory() as folder:
        data_dir = settings.data_dir
        if not os.path.exists(os.path.join(data_dir, 'demo', 'meta.json')):
            data_dir = folder
            prepare.run(['demo', '--clips=1000', f'--workers={cores()}', f'--out_dir={folder}/demo'])
        pretrain.run([*here, f'--max_steps={updates}', f'--warmup_steps={updates // 10}', '--eval_dataset=',
                      f'--log_interval={max(updates // 100, 1)}', f'--save_interval={updates}',
                      f'--data_dir={data_dir}', f'--out_dir={folder}/run'])
        _, series, times = read_log(f'{folder}/run/log.jsonl')
    steps, _ = series['content']
    last = slice(-max(len(steps) // 10, 1), None)
    return {'updates': updates,
            'updates_per_second': (steps[-1] - steps[0]) / (times[steps[-1]] - times[steps[0]]),
            **{name: statistics.mean(series[name][1][last]) for name in ('loss', 'content', 'place')}}


FUNCTIONS = {**SECTIONS, 'kernels': measure_kernels, 'precision': measure_precision, 'largest': measure_largest,
             'pretraining': measure_pretraining}


# ------------------------------------------------------------------------------------------------------ which, and when

def parts(settings):
    """[(table, column, its function's name, the settings that differ)] in the order of what they are worth."""
    plain, both = {'compile': False, 'kernels': 'torch'}, {'compile': False, 'kernels': 'conv,attention'}
    compiled = {'compile': True, 'compile_mode': 'default'}
    few, many = ({'batch_size': clips, 'accumulate': 1} for clips in (settings.batch_size, 4 * settings.batch_size))
    on_few, on_many = (f'The step of {size["batch_size"]} clips' for size in (few, many))
    fed = {**many, **plain, 'workers': min(settings.workers, 4)}            # 2,000 clips/s each
    return [('Kernels', 'measured', 'kernels', few),
            (on_few, 'plain', 'step', {**few, **plain}),
            (on_many, 'plain', 'step', {**many, **plain}),
            (on_few, 'compiled, both kernels', 'step', {**few, **both, **compiled}),
            (on_many, 'compiled, both kernels', 'step', {**many, **both, **compiled}),
            ('Losses', 'measured', 'precision', {**few, **plain}),
            ('A short pre-training', 'measured', 'pretraining', plain),
            *((title, names.replace('conv,attention', 'both kernels'), 'step', {**size, **plain, 'kernels': names})
              for title, size in ((on_few, few), (on_many, many)) for names in ('conv', 'attention', 'conv,attention')),
            ('Operators of the plain step', 'measured', 'operators', {**few, **plain}),
            ('Steps with data', 'measured', 'with_data', fed),
            ('Data path', 'measured', 'data', fed),
            ('Filterbank', 'measured', 'fbank', {**many, **plain}),
            ('Masks', 'measured', 'masks', {**many, **plain}),
            (on_many, 'compiled', 'step', {**many, **plain, **compiled}),
            ('The largest batch', 'both kernels, not compiled', 'largest', {**few, **both}),
            ('Growth', 'measured', 'growth', {**few, **plain}),
            *((on_few, f'{mode}, both kernels', 'step', {**few, **both, 'compile': True, 'compile_mode': mode})
              for mode in pretrain.COMPILE_MODES if mode != 'default')]


def why_not(name, changes, process, compiles):
    """Why this device cannot measure the part of a function and settings, or None."""
    no_kernels, cuda = kernels.unusable(process.device), process.device.type == 'cuda'
    if no_kernels and (name == 'kernels' or changes.get('kernels') not in ('torch', None)):
        return no_kernels
    if changes.get('compile') and not compiles:
        return 'torch.compile does not work'
    if not cuda and (name == 'largest' or pretrain.COMPILE_MODES[changes.get('compile_mode', 'default')]):
        return 'no CUDA'
    return None


def in_a_process(name, settings, limit):
    """Call a part's function with these settings in a process of its own, which has `limit` seconds.
    -> its figures, or a str that says why there are none"""
    PROCESSES.set_forkserver_preload(['tools.everything'])
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=work, args=(sender, name, vars(settings)))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(limit) else f'stopped after {limit:.0f} s: the budget was used up'
    except EOFError:
        process.join()
        return f'its process ended with exit code {process.exitcode}'
    finally:
        process.kill()
        process.join()
        receiver.close()


def work(sender, name, values):
    """In the process, which ends with the one that started it."""
    processes.shield_worker()
    settings = configurator.Settings(**values)
    settings.given = set()
    try:
        with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
            process = processes.start(settings.device, settings.threads, settings.deterministic)
            sender.send(FUNCTIONS[name](Bench(settings, process)))
    except torch.OutOfMemoryError:
        sender.send('too little memory on the device')
    except Exception as error:                                              # whatever it is, the others go on
        sender.send(f'{type(error).__name__}: {processes.first_line(error) if str(error) else ""}')


def run(bench, where):
    """Measure every part, and write what there is after each."""
    settings, process, began = bench.settings, bench.process, time.perf_counter()
    figures, seconds, reasons, compiles = {}, {}, {}, processes.can_compile(process)
    long = AROUND * settings.pretraining_seconds
    kept = long if long < settings.budget else 0                            # until it has run no part may take these
    for table, column, name, changes in parts(settings):
        part, left = f'{table}: {column}', settings.budget - (time.perf_counter() - began)
        needed, kept = (long, 0) if name == 'pretraining' else (0, kept)
        if reason := why_not(name, changes, process, compiles):
            reasons[part] = f'not on this device ({reason})'
        elif left - kept <= needed:
            reasons[part] = f'left out: {max(left, 0):.0f} s of the budget of {settings.budget:g} s were left'
        else:
            process.print(f'measuring {part} ...')
            launches = figures.get('Kernels: measured', {})                 # those that were fastest
            if changes.get('kernels', 'torch') != 'torch':
                changes['kernels'] = ','.join(launches.get(f'launch of {kernel}', kernel)
                                              for kernel in changes['kernels'].split(','))
            start = time.perf_counter()
            result = in_a_process(name, settings.but(**changes), left - kept)
            seconds[part] = time.perf_counter() - start
            if isinstance(result, str):
                reasons[part] = f'failed: {result}'
            else:
                figures[part] = {name: value for name, value in result.items() if not name.startswith('GFLOP')}
        if part in reasons:
            process.print(f'{part}: {reasons[part]}')
        write_json(settings, where, figures, seconds=seconds, not_measured=reasons)
        text = markdown(where, parts(settings), figures, seconds, reasons)
        if settings.tables:
            with replacing(settings.tables) as f:
                f.write(text)
    process.print(f'{time.perf_counter() - began:.0f} s' if settings.tables else text)


# --------------------------------------------------------------------------------------------------------------- tables

def markdown(where, all_parts, figures, seconds, reasons):
    """A table for every group of parts, a row for every figure, a column for every part that has some."""
    lines = [in_words(where), '']
    for title in dict.fromkeys(table for table, *_ in all_parts):
        columns = {column: figures[f'{title}: {column}'] for table, column, *_ in all_parts
                   if table == title and f'{title}: {column}' in figures}
        if not columns:
            continue
        lines += [f'### {title}', '', f'| | {" | ".join(columns)} |', '|---|' + '---|' * len(columns)]
        for name in dict.fromkeys(name for values in columns.values() for name in values):
            asked = f' ({TARGETS[name]})' if name in TARGETS else ''
            cells = [shown(values.get(name, '')) for values in columns.values()]
            lines += [f'| {name.replace("_", " ")}{asked} | {" | ".join(cells)} |']
        times = [f'{seconds[f"{title}: {column}"]:.0f}' for column in columns]
        lines += [f'| measuring it, s | {" | ".join(times)} |', '']
    lines += [f'* {part}: {reason}.' for part, reason in reasons.items()]
    return '\n'.join(lines) + '\n'
