"""The numbers of log.jsonl in TensorBoard and Weights & Biases too, where a run asks for it (loggers = 'tensorboard').

A logger is made of (out_dir, the step that goes on or None, settings, a text that is the run's own) and has write(step,
{name: number}) and close(). What fails costs a warning and never the run. W&B takes its project, entity and mode from
its own environment variables (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline).
"""
import hashlib
import importlib.util
import os

from engine.errors import ConfigError, first_line


class TensorBoard:
    """Event files in out_dir, so that `tensorboard --logdir=out` shows its runs by their folders."""

    def __init__(self, out_dir, resume_at, settings, own):
        from torch.utils.tensorboard import SummaryWriter
        purge = None if resume_at is None else resume_at + 1                # what was written from here on is hidden
        self.writer = SummaryWriter(out_dir, purge_step=purge)
        self.close = self.writer.close

    def write(self, step, numbers):
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)
        self.writer.flush()


class WandB:
    """One W&B run for a run, however often it goes on: its steps are a number beside the others, since W&B's own count
    takes none twice, and those after the last checkpoint come twice, with the same numbers."""

    def __init__(self, out_dir, resume_at, settings, own):
        import wandb
        self.run = wandb.init(
            project=os.environ.get('WANDB_PROJECT', 'asda'), dir=out_dir,
            name=os.path.basename(os.path.abspath(out_dir)),
            id=hashlib.sha256(own.encode()).hexdigest()[:16], resume='allow', config=settings, allow_val_change=True,
            settings=wandb.Settings(console='off'))
        self.run.define_metric('*', step_metric='step')
        self.close = self.run.finish

    def write(self, step, numbers):
        self.run.log({'step': step, **numbers})


LOGGERS = {'tensorboard': TensorBoard, 'wandb': WandB}                      # by their packages' names
UNTOLD = 'step', 'time', 'seconds_left'


def check(names):
    """Raise ConfigError for a logger that there is not, or whose package is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f'loggers = {name!r} is none of {", ".join(LOGGERS)}')
        if not getattr(importlib.util.find_spec(name), 'origin', None):     # a mere folder of that name has none
            raise ConfigError(f'loggers = {name} needs a package that is not installed: pip install {name}, or leave '
                              'it out; log.jsonl has the same numbers')


class Loggers:
    """Those of these names that work; the first failure of each is its last."""

    def __init__(self, names, *of_run, warn=print):
        self.working, self.warn = {}, warn
        for name in names:
            self.attempt(name, lambda name=name: self.working.update({name: LOGGERS[name](*of_run)}))

    def attempt(self, name, action):
        try:
            action()
        except Exception as error:                                          # of a package that is not ours
            self.working.pop(name, None)
            self.warn(f'warning: {name} failed ({type(error).__name__}: {first_line(error)}); going on without it, '
                      'log.jsonl has all numbers')

    def write(self, values):
        """One line of the log, if it is of a step."""
        if 'step' in values:
            numbers = dict(numbers_in({name: value for name, value in values.items() if name not in UNTOLD}))
            for name, logger in list(self.working.items()):
                self.attempt(name, lambda logger=logger: logger.write(values['step'], numbers))

    def close(self):
        for name, logger in list(self.working.items()):
            self.attempt(name, logger.close)


def numbers_in(values, prefix=''):
    """(name, number) of a line of the log; valid/accuracy for the accuracy in valid."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from numbers_in(value, f'{prefix}{name}/')
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield prefix + name, value
