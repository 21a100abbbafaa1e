"""The folder of a run and its log.jsonl."""
import json
import math
import os
import re

from engine.errors import ConfigError
from engine.files import names_in, replacing
from engine.loggers import Loggers


def check_out_dir(out_dir, resume, overwrite):
    """Refuse a folder that holds a run unless it is to go on or to go, and one to go on that holds none."""
    found = [name for name in ('ckpt.pt', 'ckpt.1.pt', 'log.jsonl') if os.path.exists(os.path.join(out_dir, name))]
    if resume and overwrite:
        raise ConfigError('--resume and --overwrite contradict each other: give one')
    if resume and found in ([], ['log.jsonl']):
        raise ConfigError(f'nothing to resume in {out_dir}, no checkpoint was written: run without --resume'
                          + (', with --overwrite' if found else ''))
    if found and not resume and not overwrite:
        raise ConfigError(f'{out_dir} holds a run: add --resume to go on, --overwrite to start again, '
                          'or choose another --out_dir')


def clear_out_dir(out_dir):
    """Remove the run that --overwrite replaces, so that none of its checkpoints can be taken for the new run's."""
    for file in names_in(out_dir):
        if re.fullmatch(r'(ckpt(\.\d+)?|best)\.pt|log\.jsonl|learned\.png|events\.out\.tfevents\..*', file):
            os.remove(os.path.join(out_dir, file))


class Log:
    """out_dir/log.jsonl, one JSON object a line, written by the main process and flushed at each; from share on, the
    numbers go to other loggers too."""

    def __init__(self, out_dir, process, resume_at=None):
        """resume_at: the step of the checkpoint that goes on; lines of later steps are dropped. None: a new run, which
        removes the one in out_dir."""
        self.file, self.others, self.resume_at = None, Loggers([]), resume_at
        if not process.is_main:
            return
        if resume_at is None:
            clear_out_dir(out_dir)
        os.makedirs(out_dir, exist_ok=True)
        path = os.path.join(out_dir, 'log.jsonl')
        if resume_at is not None and os.path.exists(path):
            with replacing(path) as f:
                f.writelines(as_line(values) for values in lines_of(path) if values.get('step', 0) <= resume_at)
        self.file = open(path, 'w' if resume_at is None else 'a', encoding='utf-8')

    def write(self, **values):
        if self.file:
            self.file.write(as_line(values))
            self.file.flush()
            self.others.write(values)

    def share(self, names, settings, warn):
        """Tell loggers of these names what is written from now on. A run is known by the first line of its log."""
        if self.file and names:
            first = as_line(next(lines_of(self.file.name)))
            self.others = Loggers(names, os.path.dirname(self.file.name), self.resume_at, settings, first, warn=warn)

    def close(self):
        self.others.close()
        if self.file:
            self.file.close()


def as_line(values):
    """JSON, with null for what it does not know: NaN and infinity."""
    def known(value):
        if isinstance(value, dict):
            return {key: known(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [known(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value
    return json.dumps(known(values), allow_nan=False) + '\n'


def log_of(path):
    """A run's folder stands for the log in it."""
    return os.path.join(path, 'log.jsonl') if os.path.isdir(path) else path


def lines_of(path):
    """The lines of a log, or of a run's folder, that are JSON objects, as dictionaries; a crash can leave the last one
    torn."""
    with open(log_of(path), encoding='utf-8', errors='replace') as f:
        for line in f:
            try:
                if line.endswith('\n') and isinstance(values := json.loads(line), dict):
                    yield values
            except ValueError:
                pass


def last_logged(out_dir, key, step):
    """What a log says of this key at this step, the last time; None if it does not."""
    path, found = os.path.join(out_dir, 'log.jsonl'), None
    for values in lines_of(path) if os.path.exists(path) else ():
        if values.get('step') == step:
            found = values.get(key, found)
    return found


def history(out_dir, name):
    """What a run's log.jsonl says, over all its starts -> {measure: {step: value}}, scores being those on the labelled
    set of that name; what the weights of step 0 are, in words."""
    found, scored_on, began = {}, None, None
    for line in lines_of(out_dir):
        if 'settings' in line:
            scored_on = line['settings'].get('eval_dataset')
            began = began or (f'the weights of {line["settings"]["init"]}' if line['settings'].get('init') else
                              'random weights')
        if 'step' in line and (scored_on == name or 'chance' not in line):
            for measure, value in line.items():
                if isinstance(value, int | float):                          # null: it was not finite
                    found.setdefault(measure, {})[line['step']] = value
    return found, began


def duration(seconds):
    """'2d 3h', '3h 12m', '5m 20s' or '45s'"""
    seconds = int(seconds)
    for unit, size, smaller, small in (('d', 86400, 'h', 3600), ('h', 3600, 'm', 60), ('m', 60, 's', 1)):
        if seconds >= size:
            return f'{seconds // size}{unit} {seconds % size // small}{smaller}'
    return f'{seconds}s'
