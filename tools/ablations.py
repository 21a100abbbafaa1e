"""What each part of the method is worth: short pre-trainings that differ in one setting, several seeds each.

    python -m tools.ablations                                   # every table; finished runs are not run again
    python -m tools.ablations --tables=lambda,students          # some of them
    python -m tools.ablations --show                            # the tables of results/ablations.json again

Each run is a pretrain.py command with a folder of its own. Its last evaluation is what counts: the linear probe of the
frozen features on the labels of --eval_dataset. Beside it stand what random weights and log-mel statistics have, which
the log's step 0 holds. A difference is called one if it exceeds the spread over seeds: twice the standard deviation of
the difference of two means.
"""
import concurrent.futures
import json
import math
import os
import statistics

import configurator
from engine import processes
from engine.errors import ROOT, ConfigError
from engine.files import replacing
from scoring.outputs import check_output
from tools.stages import to_its_end

config = 'config/ablation.py'           # what all runs share ...
max_steps = 300                         # ... but for their length,
warmup_steps = 30                       # warm-up
eval_dataset = 'fsdd/theo'              # and the labels that they are looked at with: digits of an unheard speaker
out_dir = 'out/ablations'               # one folder per run goes here
data_dir = 'data'                       # prepared sets
tables = ''                             # some of the tables, separated by commas; '': all
seeds = 3                               # runs of each setting
jobs = 2                                # runs at a time, one CPU thread each
json_file = 'results/ablations.json'    # what came out: commands, commit, device and scores of every run
show = False                            # run nothing, print the tables of json_file

# name: (title, {row: further arguments}); the first row is the base of each. x0.5: half of its updates; of the time of
# its step (tools.bench) one student takes 0.52, 16 students 3.12, patches of 8 frames 2.05, width 256 2.53.
TABLES = {
    'lambda': ('Weight of the second map (Table 3)', {
        '0.3': [], '0': ['--diff_lambda=0'], '0.1': ['--diff_lambda=0.1'], '0.5': ['--diff_lambda=0.5']}),
    'alpha': ('Weight of the utterance loss, its pooling, place of the CLS (Table 2)', {
        'alpha 0.5, CLS, head': [], 'alpha 1': ['--alpha=1'], 'alpha 2': ['--alpha=2'], 'mean': ['--pooling=mean'],
        'CLS in the middle': ['--cls_position=middle']}),
    'utterance': ('Utterance loss: its scale and target', {
        '1, normed': [], '192, normed': ['--utterance_scale=192'], '1, raw': ['--utterance_target=raw']}),
    'students': ('Students of a clip, at equal clips and at equal time', {
        '4': [], '1': ['--n_students=1'], '16': ['--n_students=16'],
        '1, time of 4': ['--n_students=1', 'x1.94'], '16, time of 4': ['--n_students=16', 'x0.32']}),
    'input': ('Window, positions, LayerNorm of the heads', {
        'hamming, 2d, per head': [], 'hanning': ['--window=hanning'], '1d': ['--pos_embed=1d'],
        'all heads': ['--head_norm=all'], 'no norm': ['--head_norm=none']}),
    'recipe': ('What is not in the paper: targets, masks, positions, teacher', {
        'base': [], 'targets: last block': ['--target_layers=1'], 'see 40 %': ['--mask_ratio=0.6'],
        'blocks of 3': ['--mask_block=3'], 'positions x 1': ['--pos_scale=1'],
        'teacher 0.99 to 0.999': ['--ema_start=0.99', '--ema_end=0.999'],
        'teacher 0.9998 to 0.99999': ['--ema_start=0.9998', '--ema_end=0.99999'],
        'learning rate 1e-3': ['--lr=1e-3'], 'learning rate 4e-3': ['--lr=4e-3']}),
    'size': ('Patches, input and width; the same seconds of sound an update', {
        'base': [], 'patches of 8 frames': ['--patch_frames=8'], 'at equal time': ['--patch_frames=8', 'x0.49'],
        'width 256': ['--n_embd=256'], 'width 256 at equal time': ['--n_embd=256', 'x0.4'],
        '2.56 s': ['--frames=256', '--batch_size=16'], '5.12 s': ['--frames=512', '--batch_size=8']}),
}


def pretrain(settings, arguments, seed):
    """Run one pretrain.py command to its end, or find it finished -> {'probe', 'knn', 'content', 'place', 'seconds',
    'updates', 'random', 'log_mel', 'command', 'commit', 'device'}"""
    part = next((float(word[1:]) for word in arguments if word[0] == 'x'), 1)
    arguments, steps = [word for word in arguments if word[0] != 'x'], round(settings.max_steps * part)
    name = '-'.join([f'{steps}', settings.eval_dataset.replace('/', '_'),
                     *(argument.lstrip('-') for argument in arguments), f'seed{seed}'])
    folder = os.path.join(settings.out_dir, name)
    command = [os.path.join(ROOT, 'pretrain.py'), os.path.join(ROOT, settings.config), f'--max_steps={steps}',
               f'--warmup_steps={round(settings.warmup_steps * part)}', f'--ema_steps={steps}',
               f'--eval_interval={steps}', f'--eval_dataset={settings.eval_dataset}',
               f'--data_dir={settings.data_dir}', '--threads=1',
               f'--seed={seed}', f'--out_dir={folder}', *arguments]
    found = to_its_end(command, folder, lambda lines: finished(lines, steps))
    print(f'{name}: probe {found["probe"]:.1%}, kNN {found["knn"]:.1%}, content {found["content"]:.1%}, '
          f'{found["seconds"]:.0f} s', flush=True)
    return {**found, 'command': [os.path.relpath(word, ROOT) if os.path.isabs(word) else word for word in command]}


def finished(lines, steps):
    """What the log of a run says at its end, or None if it has not got there."""
    scores = [line for line in lines if 'probe' in line]
    if not scores or scores[-1]['step'] != steps:
        return None
    measured, began = [line for line in lines if 'content' in line], next(line for line in lines if 'start' in line)
    log_mel = next(value for line in lines for name, value in line.items() if name.endswith('_log_mel_probe'))
    return {'probe': scores[-1]['probe'], 'knn': scores[-1]['knn'], 'random': scores[0]['probe'], 'log_mel': log_mel,
            **{name: statistics.mean(line[name] for line in measured[-10:]) for name in ('content', 'place')},
            'updates': steps, 'seconds': steps * seconds_per_step(measured), 'commit': began['commit'],
            'device': began['device']}


def seconds_per_step(measured):
    """The median over pairs of lines: evaluations and saving do not count."""
    return statistics.median((b['time'] - a['time']) / (b['step'] - a['step']) for a, b in zip(measured, measured[1:]))


def table(title, rows):
    """{row: [runs]} as Markdown, with the base's difference said where the spread over seeds lets it be seen."""
    base = [run['probe'] for run in next(iter(rows.values()))]
    one_run = next(iter(rows.values()))[0]
    where = next(word.partition('=')[2] for word in one_run['command'] if word.startswith('--eval_dataset='))
    lines = [f'**{title}**, probed on {where}\n', '| ' + ' | '.join(
        ['', 'linear probe, %', 'its random weights, %', 'kNN, %', 'content, %', 'place, %', 'updates',
         'difference']) + ' |', '|' + 8 * '---|']
    for row, runs in rows.items():
        cells = [spread([run[name] for run in runs]) for name in ('probe', 'random', 'knn', 'content', 'place')]
        probes = [run['probe'] for run in runs]
        said = '' if row == next(iter(rows)) else difference(base, probes)
        lines.append(f'| {row} | {" | ".join(cells)} | {runs[0]["updates"]:,} | {said} |')
    log_mel = spread([run['log_mel'] for run in next(iter(rows.values()))])
    lines.append(f'| log-mel mean and deviation | {log_mel} | | | | | | |')
    return '\n'.join(lines)


def spread(values):
    """'61.3 ± 1.2': mean and standard deviation over seeds, in percent."""
    mean = 100 * statistics.mean(values)
    return f'{mean:.1f} ± {100 * statistics.stdev(values):.1f}' if len(values) > 1 else f'{mean:.1f}'


def difference(base, other):
    """'+2.1', or 'none seen' if it does not exceed twice its standard error over seeds."""
    if min(len(base), len(other)) < 2:
        return 'one seed'
    gain = statistics.mean(other) - statistics.mean(base)
    error = math.sqrt(statistics.variance(base) / len(base) + statistics.variance(other) / len(other))
    return f'{100 * gain:+.1f}' if abs(gain) > 2 * error else 'none seen'


def stored(path):
    """{table: {row: [runs]}} of a file, if there is one."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding='utf-8') as f:
        return json.load(f)


def run(argv):
    settings = configurator.configure(__file__, argv)
    configurator.check_ranges(settings, seeds=(1, 1000), jobs=(1, 1000), max_steps=(2, 1e9), warmup_steps=(0, 1e9))
    names = configurator.words(settings.tables) or list(TABLES)
    if not set(names) <= set(TABLES):
        raise ConfigError(f'tables = {settings.tables!r} must be of {", ".join(TABLES)}')
    if not os.path.isfile(os.path.join(ROOT, settings.config)):
        raise ConfigError(f'config = {settings.config}: there is no such file')
    if settings.show and not stored(settings.json_file):
        raise ConfigError(f'json_file = {settings.json_file}: no table is in it: leave out --show to make them')
    if not settings.show:
        check_output(settings.json_file, '.json', settings.config)
        found = stored(settings.json_file)
        wanted = {(tuple(extra), seed): None for seed in range(1, settings.seeds + 1) for name in names
                  for extra in TABLES[name][1].values()}
        with concurrent.futures.ThreadPoolExecutor(settings.jobs) as pool:
            wanted.update(zip(wanted, pool.map(lambda pair: pretrain(settings, list(pair[0]), pair[1]), wanted)))
        for name in names:
            found[name] = {row: [wanted[tuple(extra), seed] for seed in range(1, settings.seeds + 1)]
                           for row, extra in TABLES[name][1].items()}
        with replacing(settings.json_file) as f:
            json.dump(found, f, indent=1)                                   # the other tables stay
    print('\n\n'.join(table(TABLES[name][0], rows) for name, rows in stored(settings.json_file).items()))


if __name__ == '__main__':
    processes.main(run)
