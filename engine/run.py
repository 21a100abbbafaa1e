"""What pretrain.py and finetune.py share around their loops: a run's folder, its checkpoints and log, precision,
signals, and the numbers of a step, which come late from a GPU.

    with Run(settings, process, FREE_IN_PRETRAIN, report) as run:
        autocast = run.precision(width)
        ...
        run.load(model, optimizer, spectrum, fingerprint)
        network = run.network()
        for step, batch in run.steps(batches):
            ...
            if run.finish(step, measures, evaluate):
                return

This file must not know networks, audio or losses.
"""
import contextlib
import dataclasses
import math
import os
import time

import torch

import configurator
from engine import loggers, logs, processes, saving
from engine.errors import ConfigError, RunError
from engine.files import locked
from engine.loading import loader

ON_CPU = ('noise_seed',)        # of a batch, what Python reads: it does not go to the device


class Run:
    """settings.out_dir, held for this process alone, with what is written to it; see above."""

    def __init__(self, settings, process, free, report, stop=None):
        """free: names of settings that may differ when a run goes on. report(values, run) -> words for the terminal: it
        may add to what the log is told of a step. stop: who watches for signals, if somebody does already.
        """
        self.settings, self.process, self.free, self.report, self.stop = settings, process, free, report, stop
        self.kept = {}              # what the checkpoint holds beside: plain values
        self.metrics = {}           # the newest measures and scores

    def __enter__(self):
        """Raises ConfigError for a folder that is in use, or that holds a run which is neither to go on nor to go."""
        settings, process = self.settings, self.process
        with contextlib.ExitStack() as closing:
            process.once(lambda: closing.enter_context(locked(settings.out_dir)))
            logs.check_out_dir(settings.out_dir, settings.resume, settings.overwrite)
            self.resuming = settings.resume
            self.state = saving.latest_checkpoint(settings.out_dir, process) if self.resuming else {}
            self.provenance = processes.provenance(process)
            self.stop = self.stop or closing.enter_context(processes.Stop(process))
            self.closing = closing.pop_all()
        return self

    def __exit__(self, *error):
        if error[0]:
            return self.closing.__exit__(*error)                            # what closes is told of it
        with self.closing:
            self.process.gather(None)                                       # no signal may end one while another saves

    @property
    def where(self):
        """Versions, device, processes and commit, in words."""
        return ', '.join(f'{name} {value}' for name, value in self.provenance.items() if value)

    def precision(self, width):
        """A context maker for the forward pass; the settings name from now on what 'auto' has become."""
        settings = self.settings
        autocast, settings.dtype = processes.autocast(self.process, settings.dtype, width)
        settings.device = self.process.device.type
        return autocast

    def load(self, model, optimizer, spectrum, fingerprint):
        """Begin with this model, or put the run's checkpoint into it -> the settings that it was made with, or {}.
        spectrum: what data.log_mel is told; fingerprint: of the training clips."""
        self.model, self.optimizer, state = model, optimizer, self.state
        self.config = dataclasses.asdict(model.config)
        self.input = {**{name: spectrum[name] for name in ('frames', 'window', 'mean', 'std', 'repeat')},
                      'fingerprint': fingerprint}
        if self.resuming:                   # fields that are younger than the checkpoint have their defaults
            state['config'] = {**dataclasses.asdict(type(model.config)()), **state['config']}
            saving.resume(state, self.settings.out_dir, model, optimizer, self.config, self.input, self.settings,
                          self.free, self.process)
        self.first = self.done = state.get('step', 0)
        self.is_saved = self.resuming
        self.metrics = dict(state.get('metrics', {}))
        self.kept = {name: state.get(name, value) for name, value in self.kept.items()}
        self.bad_steps = torch.tensor(float(state.get('bad_steps', 0)), device=self.process.device)
        self.state = {}                                                     # its memory
        return state.get('settings', {})

    def network(self, **how):
        """The model as it is called in training: one of several processes', compiled."""
        network = processes.distribute(self.model, self.process)
        if self.settings.compile and processes.can_compile(self.process):
            network.compile(**how)
        return network

    def steps(self, batches, evaluate=None):
        """Yield (step, batch on the device) up to max_steps; the log begins. evaluate(): called before the first."""
        settings, process, self.batches = self.settings, self.process, batches
        self.log = self.closing.enter_context(contextlib.closing(
            logs.Log(settings.out_dir, process, self.first if self.resuming else None)))
        self.log.write(start=self.first, settings=vars(settings), **self.provenance, time=time.time())
        self.log.share(configurator.words(settings.loggers), vars(settings), process.print)
        if evaluate and not self.done:
            evaluate()
        self.began, self.late = time.time(), Late(process)
        items = range(self.first, settings.max_steps)
        reading = self.closing.enter_context(contextlib.closing(
            loader(batches, items, settings.workers, pin=process.device.type == 'cuda')))
        yield from zip(items, ahead(reading, process))

    def finish(self, step, measures, evaluate=None):
        """After a step: log, evaluate, save, each if it is due. -> whether to stop here, since a signal asked for it

        measures: {name: scalar tensor} with loss and grad_norm, whose means over the processes count. evaluate():
        called every eval_interval steps (0: never) and at the end.
        """
        settings, process, self.done = self.settings, self.process, step + 1
        last, stopping = self.done == settings.max_steps, self.stop.agreed()
        evaluating = evaluate and (last or settings.eval_interval and self.done % settings.eval_interval == 0)
        logging = last or self.done % settings.log_interval == 0
        is_saving = last or stopping or self.done % settings.save_interval == 0

        self.bad_steps = (self.bad_steps + 1) * ~measures['grad_norm'].isfinite()
        values = torch.stack([value.float() for value in measures.values()])
        own = torch.stack([self.bad_steps, (~measures['loss'].isfinite()).float()])
        if logging or is_saving or evaluating:
            values = process.mean(values)
        for (done, names, is_logged), numbers in self.late.swap((self.done, list(measures), logging),
                                                                torch.cat([values, own]), evaluating or is_saving):
            self.settle(done, dict(zip(names, numbers)), is_logged, *numbers[-2:])
        if evaluating:
            evaluate()
        if is_saving:
            self.save('ckpt.pt', settings.keep, optimizer=self.optimizer.state_dict())
        if stopping and not last:
            process.print(f'stopped after step {self.done:,} and saved; to go on, run the same command with --resume')
        return stopping and not last

    def settle(self, done, values, is_logged, bad_steps, own_loss_is_bad):
        """What the numbers of a step say, once they are here."""
        self.metrics.update(values)
        if bad_steps:
            self.skipped(done, int(bad_steps), own_loss_is_bad)
        if not is_logged:
            return
        values, settings = {**values, 'step': done}, self.settings
        words, per_step = self.report(values, self), (time.time() - self.began) / (done - self.first)
        speed, left = settings.batch_size / max(per_step, 1e-9), per_step * (settings.max_steps - done)
        self.process.print(f'step {done:,}/{settings.max_steps:,}  {words}  {speed:,.1f} clips/s  '
                           f'{logs.duration(left)} left')
        self.log.write(**values, clips_per_second=speed, seconds_left=left, time=time.time())

    def skipped(self, done, in_a_row, own_loss_is_bad):
        """Say that a step was skipped, its gradient not being finite; after max_bad_steps in a row end the run, naming
        clips of the processes whose loss was not finite; of all, if it was only the gradient."""
        settings, batches = self.settings, self.batches
        self.process.print(f'warning: step {done} has a gradient that is not finite; skipped ({in_a_row} in a row)')
        self.log.write(step=done, skipped_in_a_row=in_a_row)
        if in_a_row < settings.max_bad_steps:
            return
        seen = [batches.order.at((done - 1) * settings.batch_size + place) for place in list(batches.places)[:8]]
        found = self.process.gather((bool(own_loss_is_bad), batches.clips.select(seen).keys()))
        guilty = [keys for is_bad, keys in found if is_bad] or [keys for _, keys in found]
        keys = [key for some in zip(*guilty) for key in some][:8]                       # some of each
        raise RunError(f'{in_a_row} steps in a row were not finite; the last saw {", ".join(keys)}, ...; lower lr, or '
                       f'look at these clips; {self.what_is_saved()}')

    def what_is_saved(self):
        return f'{self.settings.out_dir} holds {"the last" if self.is_saved else "no"} checkpoint'

    def note(self, scores, **logged):
        """Scores of an evaluation, for the next checkpoint and the log."""
        self.metrics.update(scores)
        self.log.write(step=self.done, **logged)

    def logged(self, key):
        """What the log says of this key at this step already, NaN where it has null; None if it does not."""
        def numbers(value):
            return ({name: numbers(inner) for name, inner in value.items()} if isinstance(value, dict)
                    else math.nan if value is None else value)
        found = self.process.once(lambda: logs.last_logged(self.settings.out_dir, key, self.done))
        return None if found is None else numbers(found)

    def save(self, file, keep, **more):
        """Write a checkpoint of now."""
        self.is_saved = True
        if self.process.is_main:
            saving.save_checkpoint(os.path.join(self.settings.out_dir, file), {
                'model': self.model.state_dict(), 'config': self.config, 'step': self.done,
                'settings': vars(self.settings), 'metrics': self.metrics, 'input': self.input,
                'bad_steps': float(self.bad_steps), **self.kept, **more}, keep)


def check(settings, world, ranges, parts=1, **choices):
    """Raise ConfigError for what no run can do. parts: what batch_size must be a multiple of, beside the processes and
    accumulated parts, if there are several; choices: {name: allowed values}."""
    configurator.check_ranges(settings, **ranges)
    loggers.check(configurator.words(settings.loggers))
    divisor = world * settings.accumulate
    if divisor > 1 and settings.batch_size % (divisor * parts):
        raise ConfigError(f'batch_size = {settings.batch_size} is not divisible by {f"{parts} x " if parts > 1 else ""}'
                          f'{world} processes x accumulate = {settings.accumulate}')
    for name, allowed in choices.items():
        if getattr(settings, name) not in allowed:
            raise ConfigError(f'{name} = {getattr(settings, name)!r} is none of {", ".join(allowed)}')
    if not settings.warmup_steps < settings.max_steps:
        raise ConfigError(f'warmup_steps = {settings.warmup_steps} must be less than max_steps = {settings.max_steps}')


def ahead(batches, process):
    """Yield dictionaries of tensors on the device, each copied there while the step before it runs."""
    def copied(batch):
        return {name: value if name in ON_CPU else value.to(process.device, non_blocking=True)
                for name, value in batch.items()}
    if process.device.type != 'cuda':
        yield from map(copied, batches)
        return
    beside, waiting = torch.cuda.Stream(), []

    def arrived(batch, copy):
        here = torch.cuda.current_stream()
        here.wait_event(copy)                                               # the device waits, not Python
        for value in batch.values():
            if value.is_cuda:
                value.record_stream(here)                                   # its memory is not given away before use
        return batch
    for batch in batches:
        with torch.cuda.stream(beside):
            waiting.append((copied(batch), beside.record_event()))
        if len(waiting) == 2:
            yield arrived(*waiting.pop(0))
    for pair in waiting:
        yield arrived(*pair)


class Late:
    """Numbers of a step, read a step late from a GPU, so that it never waits for Python; at once from a CPU."""

    def __init__(self, process):
        self.process, self.pending = process, []

    def swap(self, item, values, wait=False):
        """Take an item with its values (n,), a tensor on the device -> [(earlier item, its numbers)] that have arrived;
        with wait, this one too."""
        arrived = None
        if self.process.device.type == 'cuda':
            values, arrived = values.to('cpu', non_blocking=True), torch.cuda.Event()
            arrived.record()
        self.pending.append((item, values, arrived))
        ready = self.pending if wait or not arrived else self.pending[:-1]
        self.pending = self.pending[len(ready):]
        for _, _, arrived in ready:
            if arrived:
                arrived.synchronize()
        return [(item, values.tolist()) for item, values, _ in ready]
