"""How fast it is: the pre-training step and every part of the way from an audio file to it, on this machine.

    python -m tools.bench                               # config/as2m.py, 12 clips, on a GPU; config/demo.py elsewhere
    python -m tools.bench config/demo.py --what=step,data --json=figures.json
    python -m tools.bench config/as2m.py --batch_size=12 --dataset=as2m               # on real clips
    python -m tools.bench config/as2m.py --batch_size=12 --baseline                   # beside the authors' arrangement
    python -m tools.bench config/demo.py --what= --profile=trace.json                 # for chrome://tracing or perfetto
    python -m tools.bench --everything --json=figures.json --tables=tables.md         # all of it: tools/everything.py

Settings are the names below, those of pretrain.py and the fields of model.ASDAConfig, so that its config files serve as
they are. Clips are synthetic unless --dataset names prepared sets: the sets of a config file are not read. Every time
is the median of several calls, each waited for, after some that warm up; what is compared is called in turn. Where
other processes keep cores busy (the `load` in the table), threads wait for each other: give --threads=1.
"""
import os
import re

import torch

import configurator
import pretrain
from engine import processes
from engine.errors import ROOT, ConfigError, RunError
from engine.files import replacing
from engine.machine import cores
from tools.everything import run as measure_everything
from tools.measuring import Bench, in_words, shown, write_json
from tools.sections import SECTIONS, TARGETS, profiled

what = 'step,forms,operators,with_data,data,fbank,masks,growth,prepare,finetune_data'      # what to measure
everything = False              # measure all of it and more, each part in a process of its own, as tables in Markdown
budget = 480                    # seconds for --everything; what no longer fits is named
pretraining_seconds = 120       # of it, for a short pre-training
baseline = False                # measure only the step beside the authors' arrangement (tools/authors_arrangement.py)
steps = 10                      # timed calls of everything; their median counts
warmup = 3                      # calls before them
json = ''                       # write all figures to this file
tables = ''                     # write the tables of --everything to this file instead of printing them
profile = ''                    # write a trace of three steps to this file and print the longest operators

MINIATURE = '--batch_size=4', '--steps=3', '--warmup=1', '--pretraining_seconds=10'


def write_profile(bench):
    """A trace of three steps in Chrome's format, and the operators that took longest."""
    profiler, clock = profiled(bench), 'cuda' if bench.is_cuda else 'cpu'
    with replacing(bench.settings.profile) as f:
        profiler.export_chrome_trace(f.name)                                # writes the temporary file itself
    bench.process.print(profiler.key_averages().table(sort_by=f'self_{clock}_time_total', row_limit=12,
                                                      max_name_column_width=50))


def where_of(bench):
    """What figures depend on beside the code."""
    settings, provenance = bench.settings, processes.provenance(bench.process)
    return {'device': provenance['device'], 'cores': cores(), 'threads': provenance['threads'],
            'load': round(os.getloadavg()[0], 1),                           # other processes slow this one down
            'torch': provenance['torch'], 'dtype': settings.dtype, 'compile': settings.compile,
            'batch_size': settings.batch_size, 'clips': settings.dataset or 'synthetic',
            'commit': provenance['commit']}


def print_table(where, figures):
    print(f'\n{in_words(where)}')
    for section, values in figures.items():
        print(section)
        for name, value in values.items():
            print(f'  {name.replace("_", " "):<44}{shown(value):>10}   {TARGETS.get(name, "")}'.rstrip())


def configure(argv):
    """The settings, on top of config/as2m.py (a GPU's 12 of its 48 clips) or config/demo.py if argv names no file; on a
    CPU everything is measured in miniature then."""
    settings = configurator.configure(__file__, argv, (pretrain.__file__,), pretrain.MODEL_SETTINGS)
    if not any(argument.endswith('.py') for argument in argv):
        cuda = settings.device == 'cuda' or settings.device == 'auto' and torch.cuda.is_available()
        default = ['as2m.py', '--batch_size=12'] if cuda else ['demo.py', *MINIATURE * settings.everything]
        argv = [os.path.join(ROOT, 'config', default[0]), *default[1:], *argv]
        settings = configurator.configure(__file__, argv, (pretrain.__file__,), pretrain.MODEL_SETTINGS)
    if not any(re.match(r'--dataset(=|$)', argument) for argument in argv):
        settings.dataset = ''                                               # a config file's set may not be here
    return settings


def check(settings, process):
    """-> names of the sections to measure. Raises ConfigError for settings that cannot work."""
    pretrain.check(settings, process.world)
    configurator.check_ranges(settings, steps=(1, 1e6), warmup=(0, 1e6), budget=(1, 1e6), pretraining_seconds=(1, 1e6))
    if process.world > 1:
        raise ConfigError(f'bench.py measures one process, not {process.world}: run it without torchrun')
    for name in ('json', 'profile', 'tables'):
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
    sections, bench, figures = check(settings, process), Bench(settings, process), {}
    settings, where = bench.settings, where_of(bench)
    process.print(bench.config)
    if settings.everything:
        return measure_everything(bench, where)
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
    write_json(settings, where, figures)


if __name__ == '__main__':
    processes.main(run)
