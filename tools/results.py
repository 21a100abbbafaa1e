"""The results' tables: five tasks from pre-trained checkpoints, beside the same model from scratch, the features of
random weights, and log-mel statistics.

    python -m tools.results --ckpt=out/real{seed}/ckpt.pt            # everything; finished runs are not run again
    python -m tools.results --ckpt=out/real/ckpt.pt --arms=scratch   # one checkpoint; pretrained, scratch or probes
    python -m tools.results --ckpt=out/real{seed}/ckpt.pt --tasks=labels --arms=probes --json_file=results/labels.json
    python -m tools.results --features_file=theirs-{set}.npz --json_file=results/others.json     # of another program
    python -m tools.results --show                                   # the table of results/real.json again

A {seed} in --ckpt stands for 1, 2, ...: every seed then has a pre-training of its own, beside labels of its own.

The learning rate and then the length are chosen by the validation accuracy of the first seed; each seed is run with
the choice, and the table shows the test accuracy of its best checkpoint by validation. Every run is a finetune.py
command with a folder of its own, named after all that decides on its result: the checkpoint's and the data's content
and every setting.
"""
import concurrent.futures
import hashlib
import json
import os
import statistics
import threading

import configurator
import eval as evaluation
import finetune as tuning
from audio.clips import task_splits
from engine import processes
from engine.errors import ROOT, ConfigError, RunError
from engine.files import replacing
from engine.ranges import FREE_IN_FINETUNE
from scoring.metrics import describe
from scoring.outputs import check_output
from tools.stages import log_lines, to_its_end

ckpt = 'out/real/ckpt.pt'               # the pre-trained checkpoint, or one for each {seed}
features_file = ''                      # probe these features of every {set} instead, see eval.py
out_dir = 'out/results'                 # one folder per run goes here
data_dir = 'data'                       # prepared demo, fsdd, wakewords and esc10
arms = 'pretrained,scratch,probes'      # what to run
tasks = 'main'                          # on which tasks: main, labels (how few labels do) or folds (of ESC-10)
pool = 'bands'                          # features that the probes see: bands, cepstra, mean, cls, or several
seeds = 3                               # seeds per task: other labels, other random numbers
jobs = 2                                # runs at a time, one CPU thread each
json_file = 'results/real.json'         # what came out: commands, commit, device and scores of every seed
show = False                            # run nothing, print the table of json_file

TASKS = {                               # name: (finetune.py arguments, updates)
    'FSDD, 10 labels per class': (['config/finetune_fsdd.py', '--labels_per_class=10'], 300),
    'FSDD, unheard speaker': (['config/finetune_fsdd.py', '--fold=theo'], 300),
    'wakewords, 10 labels per class': (['config/finetune_wakewords.py'], 200),
    'ESC-10, fold 5': (['config/finetune_esc10.py'], 200),
    'demo, 10 labels per class': (['config/finetune_demo.py'], 200),
}
LABELS = {
    f'{title}, {number or "all"}':
        ([f'config/finetune_{name}.py', f'--labels_per_class={number}'], updates)
    for title, name, updates in (('FSDD', 'fsdd', 300), ('wakewords', 'wakewords', 200))
    for number in (1, 5, 10, 50, 0)}
FOLDS = {f'ESC-10, fold {fold}': (['config/finetune_esc10.py', f'--fold={fold}'], 200) for fold in range(1, 6)}
ONE_AT_A_TIME = threading.Lock()         # Python's parser of Python (ast) fails now and then in several threads
ARMS = {'pretrained': [], 'scratch': ['--init=scratch']}                # further arguments of finetune.py
LEARNING_RATES, LENGTHS = (2e-3, 1e-3, 5e-4), (1, 3)                    # to choose from; multiples of the updates


def finetune(settings, task, arm, lr, length, seed):
    """Run one finetune.py command to its end, or find it finished -> (validation accuracy, test scores) of its best."""
    (config, *arguments), updates = (TASKS | LABELS | FOLDS)[task]
    ckpt = settings.ckpt[seed - 1]
    arguments = [os.path.join(ROOT, config), *arguments, *ARMS[arm], f'--ckpt={ckpt}',
                 f'--data_dir={settings.data_dir}', f'--lr={lr}',
                 f'--max_steps={updates * length}', f'--seed={seed}', '--threads=1']
    name = ''.join(c if c.isalnum() else '_' for c in f'{task} {arm}')
    folder = os.path.join(settings.out_dir, f'{name}-seed{seed}-{identity(configured(arguments), ckpt)}')
    command = [os.path.join(ROOT, 'finetune.py'), *arguments, f'--out_dir={folder}']
    valid, scores = to_its_end(command, folder, finished)
    print(f'{task}, {arm}, lr {lr:g}, x{length}, seed {seed}: validation {valid:.1%}, '
          f'test {describe(scores)}', flush=True)
    began = log_lines(folder)[0]
    return valid, {**scores, 'validation': valid, 'command': command, 'commit': began['commit'],
                   'device': began['device']}


def configured(arguments):
    """The settings of a finetune.py command."""
    with ONE_AT_A_TIME:
        for _ in range(20):
            try:
                return configurator.configure(tuning.__file__, arguments,
                                              (os.path.join(ROOT, 'model.py'), 'ASDAConfig'))
            except SystemError:             # CPython's ast loses count when another thread runs meanwhile: again
                pass
        raise RunError('Python could not parse the settings: run again')


def identity(how, checkpoint):
    """A short text that changes with whatever decides on the result of a fine-tuning: the content of the checkpoint
    (named after it), the clips and labels of every part, all settings but those that change no number."""
    parts = task_splits(how.dataset, how.data_dir, how.fold, how.labels_per_class, how.seed, how.validation_part,
                        how.test_dataset)
    named = {name: value for name, value in vars(how).items() if name not in FREE_IN_FINETUNE}
    content = [os.path.basename(checkpoint), [clips.fingerprint() for clips in parts], sorted(named.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def finished(lines):
    """(best validation accuracy, test scores of that checkpoint) from the log of a finished run, else None."""
    test = [line['test']['best'] for line in lines if 'test' in line]
    return (max(line['valid']['accuracy'] for line in lines if 'valid' in line), test[-1]) if test else None


def tuned(settings, task, arm, pool):
    """[test scores of each seed] with the learning rate, then the length, that the first seed's validation prefers."""
    first = list(pool.map(lambda lr: finetune(settings, task, arm, lr, 1, 1), LEARNING_RATES))
    best = max(range(len(first)), key=lambda i: first[i][0])
    lr, runs = LEARNING_RATES[best], {1: first[best]}
    runs |= {length: finetune(settings, task, arm, lr, length, 1) for length in LENGTHS if length > 1}
    length = max(LENGTHS, key=lambda length: runs[length][0])
    others = pool.map(lambda seed: finetune(settings, task, arm, lr, length, seed), range(2, settings.seeds + 1))
    return [runs[length][1]] + [scores for _, scores in others]


def probes(settings, task):
    """{probe and features: [test scores of each seed]}"""
    (config, *arguments), _ = (TASKS | LABELS | FOLDS)[task]
    how, found = configured([os.path.join(ROOT, config), *arguments]), {}
    where = processes.provenance(processes.start('cpu'))
    for seed in range(1, settings.seeds + 1):
        what = (f'--features_file={settings.features_file.replace("{set}", how.dataset)}' if settings.features_file else
                f'--ckpt={settings.ckpt[seed - 1]}')
        command = [what, f'--dataset={how.dataset}', f'--data_dir={settings.data_dir}',
                   f'--fold={how.fold}', f'--labels_per_class={how.labels_per_class}', f'--seed={seed}',
                   f'--pool={settings.pool}', '--device=cpu', '--threads=1']
        for kind, scores in evaluation.run(command).items():
            for probe, score in scores.items():
                found.setdefault(f'{probe}, {kind}', []).append(
                    {**score, 'command': ['eval.py', *command], 'commit': where['commit'], 'device': where['device']})
    return found


def snapshot(path, folder):
    """A copy of the checkpoint named after its content, since a training may overwrite the file -> path of the copy."""
    digest, temporary = hashlib.sha256(), os.path.join(folder, 'ckpt.tmp')
    with open(path, 'rb') as f, replacing(temporary, 'wb') as copy:
        while block := f.read(1 << 20):
            digest.update(block)
            copy.write(block)
    copied = os.path.join(folder, f'{digest.hexdigest()}.pt')
    os.replace(temporary, copied)
    return copied


def table(rows):
    """{row: {task: [scores of each seed]}} as Markdown."""
    tasks = list(dict.fromkeys(task for cells in rows.values() for task in cells))
    lines = ['| | ' + ' | '.join(tasks) + ' | mean |', '|' + '---|' * (len(tasks) + 2)]
    for row, cells in rows.items():
        means = [100 * statistics.mean(score['accuracy'] for score in cells[task]) for task in tasks if task in cells]
        lines.append(f'| {row} | ' + ' | '.join(cell(cells[task]) if task in cells else '' for task in tasks)
                     + f' | {statistics.mean(means):.1f} |')
    return '\n'.join(lines)


def cell(scores):
    """Mean and standard deviation over the seeds, then the counts of each: '80.0 ± 1.8 % (65 / 63 of 80)'. Of scores
    that no seed changes, one: '60.2 % (301 of 500)'."""
    right = [score['right'] for score in scores]
    values, right = [100 * score['accuracy'] for score in scores], right if len(set(right)) > 1 else right[:1]
    spread = f' ± {statistics.stdev(values):.1f}' if len(right) > 1 else ''
    return f'{statistics.mean(values):.1f}{spread} % ({" / ".join(map(str, right))} of {scores[0]["clips"]})'


def run(argv):
    settings = configurator.configure(__file__, argv)
    configurator.check_ranges(settings, seeds=(1, 1000), jobs=(1, 1000))
    if not set(settings.arms.split(',')) <= {*ARMS, 'probes'}:
        raise ConfigError(f'arms = {settings.arms!r} must be of {", ".join(ARMS)}, probes')
    chosen = {'main': TASKS, 'labels': LABELS, 'folds': FOLDS}
    if settings.tasks not in chosen:
        raise ConfigError(f'tasks = {settings.tasks!r} is none of {", ".join(chosen)}')
    if not settings.show:
        originals = [] if settings.features_file else [
            settings.ckpt.replace('{seed}', str(seed)) for seed in range(1, settings.seeds + 1)]
        settings.arms = 'probes' if settings.features_file else settings.arms
        check_output(settings.json_file, '.json', *originals)
        settings.ckpt = [snapshot(path, settings.out_dir) for path in originals]
        rows = {}
        with concurrent.futures.ThreadPoolExecutor(settings.jobs) as pool:
            for arm in settings.arms.split(','):
                for task in chosen[settings.tasks]:
                    found = (probes(settings, task) if arm == 'probes' else
                             {f'fine-tuned, {arm}': tuned(settings, task, arm, pool)})
                    for row, scores in found.items():
                        rows.setdefault(row, {})[task] = scores
        with replacing(settings.json_file) as f:
            json.dump({'checkpoints': originals, 'sha256': [os.path.basename(path)[:-3] for path in settings.ckpt],
                       'rows': rows}, f, indent=1)
    with open(settings.json_file, encoding='utf-8') as f:
        print('\n' + table(json.load(f)['rows']))


if __name__ == '__main__':
    processes.main(run)
