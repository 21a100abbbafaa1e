"""Logs of runs: read, compared in words, and thinned to be committed as references.

    python -m tools.reference out/demo --out=results/logs/demo.jsonl         # thins out/demo/log.jsonl
    python -m tools.viz curves out/mine --reference=results/logs/demo.jsonl  # draws and compares

A thinned log has every n-th line, all evaluations, the settings and versions; no folders, no dates, nothing that names
a machine but its kind of processor. Settings are the names below.
"""
import itertools
import os

import configurator
from engine import processes
from engine.errors import ConfigError, DataError
from engine.files import replacing
from engine.logs import as_line, lines_of, log_of
from engine.ranges import FREE_IN_FINETUNE, FREE_IN_PRETRAIN

log = ''                # the log.jsonl, or its folder; may stand without its name
out = ''                # the thinned log, NAME.jsonl
max_kb = 50             # its size at most

FREE = {*FREE_IN_PRETRAIN, *FREE_IN_FINETUNE} - {'kernels', 'ckpt'}          # settings that change no number
LOCAL = 'out_dir', 'data_dir', 'resume', 'overwrite'
PROVENANCE = 'torch', 'python', 'device', 'processes', 'threads', 'commit'
UNKEPT = 'seconds_left', 'time'
COMPARED = 'loss', 'explained', 'content', 'knn', 'probe', 'knn_cls', 'effective_rank', 'valid accuracy', 'valid mAP'


def with_paths(argv, name):
    """The command line with the words that are neither options, their values nor Python files put into --name=."""
    rest, paths, is_value = [], [], False
    for word in argv:
        is_path = not (word.startswith('--') or word.endswith('.py') or is_value)
        (paths if is_path else rest).append(word)
        is_value = word.startswith('--') and '=' not in word
    return rest + ([f'--{name}={",".join(paths)}'] if paths else [])


def run_lines(path):
    """The lines of a log as dictionaries. Raises DataError if it is none."""
    try:
        lines = list(lines_of(path))
    except OSError as error:
        raise DataError(f'cannot read the log {path}: {error.strerror}') from None
    if not any(isinstance(line.get('step'), int) for line in lines):
        raise DataError(f'{path} is not the log of a run: it has no steps')
    return lines


def read_log(path):
    """A log.jsonl -> its settings with where it ran, {measure: (steps, values)}, {step: seconds since the start}.
    Raises DataError."""
    lines = run_lines(path)
    began = next((line for line in lines if isinstance(line.get('settings'), dict)), {'settings': {}})
    series, seconds = {}, {}
    for line in lines:
        if not isinstance(step := line.get('step'), int):
            continue
        if all(isinstance(each.get('time'), int | float) for each in (line, began)):
            seconds[step] = line['time'] - began['time']
        valid = line.get('valid') if isinstance(line.get('valid'), dict) else {}
        for name, value in {**line, **{f'valid {name}': value for name, value in valid.items()}}.items():
            if name not in ('step', 'time') and isinstance(value, int | float):
                steps, values = series.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    where = {{'device': 'processor'}.get(name, name): began[name] for name in PROVENANCE if name in began}
    return {**began['settings'], **where}, series, seconds


def where_they_part(one, other, tolerance=0.02):
    """In words, one's numbers before the other's: the first step both have whose losses differ by more than the
    tolerance, the last measures that both have, and what differs in settings, versions and processors."""
    (settings, series, _), (settings2, series2, _) = one, other
    both = in_common(series, series2, 'loss')
    unlike = [f'{name} {value!r} / {settings2[name]!r}' for name, value in settings.items()
              if name not in FREE | {'commit'} and name in settings2 and settings2[name] != value]
    differs = f'what differs: {", ".join(unlike)}' if unlike else 'no setting differs'
    if not both:
        return f'no step in common, so that no loss can be compared (log_interval); {differs}'
    share, last = f'{100 * tolerance:g} %', max(both)
    apart = [step for step, (a, b) in both.items() if abs(a - b) > tolerance * abs(a)]
    text = f'losses agree to {share} at all {len(both)} steps that both logged, up to {last:,}'
    if apart:
        a, b = both[apart[0]]
        text = (f'losses part by more than {share} at step {apart[0]:,}: {a:.4g} / {b:.4g}, and do so at {len(apart)} '
                f'of the {len(both)} steps that both logged, up to {last:,}')
    found = {name: in_common(series, series2, name) for name in COMPARED}
    newest = {name: values[max(values)] for name, values in found.items() if values}
    measures = ', '.join(f'{name.replace("_", " ")} {a:.4g} / {b:.4g}' for name, (a, b) in newest.items())
    return f'{text}; last in common: {measures}; {differs}'


def in_common(series, series2, name):
    """{step: (value, other value)} of a measure, in rising order, where both have it."""
    values, values2 = (dict(zip(*each.get(name, ((), ())))) for each in (series, series2))
    return {step: (values[step], values2[step]) for step in sorted(values.keys() & values2.keys())}


# ------------------------------------------------------------------------------------------------------------ thinning

def thinned(lines, max_bytes):
    """A log to commit -> its lines, n: of the training lines the first, the last and every n-th stay, all evaluations
    stay, and of the lines with settings those that say something new. Raises DataError if that is too long."""
    began, kept, settings, trained = None, [], None, 0
    for line in lines:
        if 'settings' in line:
            began = line.get('time', 0) if began is None else began
            new = start_line(line, began)
            if settings != new['settings']:
                kept.append((None, as_line(new)))
                settings = new['settings']
        elif isinstance(line.get('step'), int):
            is_training = 'loss' in line or 'skipped_in_a_row' in line
            trained += is_training
            kept.append((trained if is_training else None, as_line(step_line(line, began))))
    for n in itertools.count(1):
        text = [line for number, line in kept if number is None or number in (1, trained) or number % n == 0]
        if sum(map(len, text)) <= max_bytes:
            return text, n
        if n > trained:
            raise DataError(f'its {len(text):,} evaluations and settings alone take more than {max_bytes:,} bytes: '
                            'raise max_kb')


def start_line(line, began):
    """Settings without folders: of a path that leads out of here, the last part."""
    def plain(word):
        leads_out = os.path.isabs(word) or word[:1] == '~' or '..' in word or '\\' in word or '://' in word
        return word.replace('\\', '/').rstrip('/').rpartition('/')[2] if leads_out else word
    settings = {name: ','.join(plain(word.strip()) for word in value.split(',')) if isinstance(value, str) else value
                for name, value in line['settings'].items() if name not in LOCAL}
    return {'start': line.get('start', 0), 'settings': settings,
            **{name: line[name] for name in PROVENANCE if name in line}, 'time': round(line.get('time', 0) - began, 1)}


def step_line(line, began):
    """Numbers alone, to five digits; seconds since the start instead of the date."""
    def short(values):
        return {name: short(value) if isinstance(value, dict) else float(f'{value:.5g}') if isinstance(value, float)
                else value for name, value in values.items() if isinstance(value, dict | int | float | None)}
    time = {'time': round(line['time'] - began, 1)} if began is not None and isinstance(line.get('time'), float) else {}
    return {**short({name: value for name, value in line.items() if name not in UNKEPT}), **time}


def run(argv):
    settings = configurator.configure(__file__, with_paths(argv, 'log'))
    configurator.check_ranges(settings, max_kb=(1, 1e6))
    if not settings.log or not settings.out.endswith('.jsonl'):
        raise ConfigError('name a run and the thinned log: python -m tools.reference out/demo '
                          '--out=results/logs/demo.jsonl')
    path = log_of(settings.log)
    if os.path.realpath(path) == os.path.realpath(settings.out):
        raise ConfigError(f'out = {settings.out!r} is the log itself, which must stay whole')
    lines = run_lines(path)
    text, n = thinned(lines, settings.max_kb * 1000)
    with replacing(settings.out) as f:
        f.writelines(text)
    print(f'{settings.out}: {len(text):,} of {len(lines):,} lines, {"all" if n == 1 else f"one in {n}"} of those of '
          f'training and all evaluations, {sum(map(len, text)):,} bytes')


if __name__ == '__main__':
    processes.main(run)
