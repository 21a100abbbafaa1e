"""The README's table: five tasks from one pre-trained checkpoint, beside the same model from scratch and log-mel
statistics.

    python -m tools.results --ckpt=out/real/ckpt.pt                  # everything; finished runs are not run again
    python -m tools.results --ckpt=out/real/ckpt.pt --arms=scratch   # only one of pretrained, scratch, probes

Learning rate or pooling, and then the length, are chosen by the validation accuracy of the first seed; each
seed is run with the choice, and the table shows the test accuracy of its best checkpoint by validation. Every run is
a finetune.py command, with a folder and log of its own.
"""

import concurrent.futures
import json
import os
import subprocess
import sys

import configurator
import eval as evaluation
from checkpoints.opening import open_checkpoint
from engine import logs, processes
from engine.errors import ROOT, ConfigError, RunError
from scoring.metrics import describe

ckpt = 'out/real/ckpt.pt'               # the pre-trained checkpoint
out_dir = 'out/results'                 # one folder per run goes here
data_dir = 'data'                       # prepared demo, fsdd, wakewords and esc10
arms = 'pretrained,scratch,probes'      # what to run
seeds = 2                               # seeds per task: other labels, other random numbers
jobs = 2                                # runs at a time, one CPU thread each

TASKS = {                               # name: (finetune.py arguments, updates, multiples of them to choose from)
    'FSDD, 10 labels per class': (['config/finetune_fsdd.py', '--labels_per_class=10'], 300, {'*': (1, 3)}),
    'FSDD, unheard speaker': (['config/finetune_fsdd.py', '--fold=theo'], 600, {'*': (1, 3)}),
    'wakewords, 10 labels per class': (['config/finetune_wakewords.py'], 200, {'*': (1, 2)}),
    'ESC-10, fold 5': (['config/finetune_esc10.py'], 200, {}),
    'demo, 10 labels per class': (['config/finetune_demo.py'], 200, {'*': (1, 2)}),
}
ARMS = {                                # arm: (further arguments, choices of learning rate and pooling)
    'pretrained': ([], ((1e-3, 'mean'), (5e-4, 'mean'))),
    'scratch': (['--init=scratch'], ((1e-3, 'cls'), (1e-3, 'mean'))),
}


def finetune(settings, task, arm, choice, multiple, seed):
    """Run one finetune.py command to its end, or find it finished -> (validation accuracy, test scores) of its best."""
    arguments, updates, _ = TASKS[task]
    lr, pooling = choice
    name = ''.join(c if c.isalnum() else '_' for c in task)
    suffix = '-mean' if pooling == 'mean' else ''
    folder = os.path.join(settings.out_dir, f'{name}-{arm}-{lr:g}-x{multiple}-seed{seed}{suffix}')
    lines = log_of(folder, updates * multiple, settings.ckpt)
    if (found := finished(lines)) is None:
        command = [
            sys.executable,
            os.path.join(ROOT, 'finetune.py'),
            os.path.join(ROOT, arguments[0]),
            *arguments[1:],
            *ARMS[arm][0],
            f'--ckpt={settings.ckpt}',
            f'--data_dir={settings.data_dir}',
            f'--out_dir={folder}',
            f'--lr={lr}',
            f'--pooling={pooling}',
            '--layer_decay=1',
            f'--max_steps={updates * multiple}',
            f'--seed={seed}',
            '--threads=1',
            '--resume' if lines and os.path.exists(f'{folder}/ckpt.pt') else '--overwrite',
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RunError(
                f'{" ".join(command)} ended with {result.returncode}: {result.stderr.strip()[-300:]}'
            )
        found = finished(log_of(folder, updates * multiple, settings.ckpt))
    scores, chosen = describe(found[1]), f'lr {lr:g}, {pooling}, x{multiple}'
    print(f'{task}, {arm}, {chosen}, seed {seed}: validation {found[0]:.1%}, test {scores}', flush=True)
    return found


def finished(lines):
    """(best validation accuracy, test scores of that checkpoint) from the log of a finished run, else None."""
    test = [line['test']['best'] for line in lines if 'test' in line]
    return (max(line['valid']['accuracy'] for line in lines if 'valid' in line), test[-1]) if test else None


def log_of(folder, max_steps, ckpt):
    """The lines of a run's log, if it is a run of so many steps from that checkpoint; else none."""
    path = os.path.join(folder, 'log.jsonl')
    lines = [json.loads(line) for line in logs.whole_lines(path)] if os.path.exists(path) else []
    began = lines[0].get('settings', {}) if lines else {}
    return lines if began.get('max_steps') == max_steps and began.get('ckpt') == ckpt else []


def tuned(settings, task, arm, pool):
    """[test scores of each seed] with the choice, then the length, that validation prefers for the first seed."""
    choices, lengths = ARMS[arm][1], TASKS[task][2]
    multiples = lengths.get(arm, lengths.get('*', (1,)))
    first = dict(zip(choices, pool.map(lambda choice: finetune(settings, task, arm, choice, 1, 1), choices)))
    choice = max(choices, key=lambda choice: first[choice][0])
    runs = {multiple: first[choice] if multiple == 1 else finetune(settings, task, arm, choice, multiple, 1)
            for multiple in multiples}
    multiple = max(multiples, key=lambda multiple: runs[multiple][0])
    others = pool.map(lambda seed: finetune(settings, task, arm, choice, multiple, seed), range(2, settings.seeds + 1))
    return [runs[multiple][1]] + [scores for _, scores in others]


def probes(settings, task):
    """{features and probe: [test scores of each seed]}"""
    arguments, *_ = TASKS[task]
    tune = configurator.configure(
        os.path.join(ROOT, 'finetune.py'),
        [os.path.join(ROOT, arguments[0]), *arguments[1:]],
        (os.path.join(ROOT, 'model.py'), 'ASDAConfig'),
    )
    found = {}
    for seed in range(1, settings.seeds + 1):
        how = configurator.configure(
            evaluation.__file__,
            [
                f'--ckpt={settings.ckpt}',
                f'--dataset={tune.dataset}',
                f'--data_dir={settings.data_dir}',
                f'--fold={tune.fold}',
                f'--labels_per_class={tune.labels_per_class}',
                f'--seed={seed}',
                '--device=cpu',
            ],
        )
        process = processes.start(how.device)
        autocast, _ = processes.autocast(process, how.dtype)
        loaded = open_checkpoint(settings.ckpt)
        loaded.encoder.eval()
        loaded.spectrum['frames'] = tune.frames or loaded.spectrum['frames']
        for kind, scores in evaluation.probe_pretrained(loaded, how, process, autocast).items():
            for probe, score in scores.items():
                found.setdefault(f'{probe}, {kind}', []).append(score)
    return found


def cell(scores):
    """'81.2 / 78.8 % (65 / 63 of 80)'"""
    return (
        ' / '.join(f'{100 * score["accuracy"]:.1f}' for score in scores)
        + ' % ('
        + ' / '.join(str(score['right']) for score in scores)
        + f' of {scores[0]["clips"]})'
    )


def run(argv):
    settings = configurator.configure(__file__, argv)
    configurator.check_ranges(settings, seeds=(1, 1000), jobs=(1, 1000))
    if not set(settings.arms.split(',')) <= {*ARMS, 'probes'}:
        raise ConfigError(f'arms = {settings.arms!r} must be of {", ".join(ARMS)}, probes')
    table = {}
    with concurrent.futures.ThreadPoolExecutor(settings.jobs) as pool:
        for arm in settings.arms.split(','):
            for task in TASKS:
                rows = (
                    probes(settings, task)
                    if arm == 'probes'
                    else {f'fine-tuned, {arm}': tuned(settings, task, arm, pool)}
                )
                for row, scores in rows.items():
                    table.setdefault(row, {})[task] = scores
    print('\n| | ' + ' | '.join(TASKS) + ' |\n|' + '---|' * (len(TASKS) + 1))
    for row, cells in table.items():
        print(f'| {row} | ' + ' | '.join(cell(cells[task]) for task in TASKS) + ' |')


if __name__ == '__main__':
    processes.main(run)
