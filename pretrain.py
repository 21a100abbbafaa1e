"""Stage 1: pre-train ASDA, 16 masked students per clip against one EMA teacher that sees everything.

    python pretrain.py config/demo.py
    torchrun --nproc_per_node=4 pretrain.py config/as2m.py

Settings are the names below and the fields of model.ASDAConfig; override them in a config file or with --key=value.
Every number of a run is a function of its settings and data: a resumed run, or one on another number of processes,
computes the same. Saved, every save_interval steps and at the end, are student, teacher, decoder, AdamW's moments, the
step, settings, data statistics (engine/run.py: save).
"""
import dataclasses
import math
import os

import torch
from torch.nn.parallel import DistributedDataParallel

import configurator
import data
from audio import N_MELS, SAMPLE_RATE, WINDOWS
from audio.clips import open_clips
from engine import processes, randomness, ranges
from engine import run as running
from engine.errors import ROOT, ConfigError, RunError
from fast import forms
from model import ASDA, ASDAConfig, count_parameters, n_kept
from scoring.monitor import labelled_clips, watch
from tools.learned import conclude

out_dir = 'out/pretrain'        # checkpoints and log.jsonl go here
resume = False                  # go on with the run in out_dir
overwrite = False               # start again, over the run in out_dir
dataset = 'demo'                # prepared sets, separated by commas
data_dir = 'data'               # where they are
splits = 'train'                # their splits to train on
leave_out = ''                  # SET/FOLD or SET/SPLIT parts of them to leave out, separated by commas
norm_mean = None                # log-mel mean; None: of the chosen clips
norm_std = None                 # log-mel standard deviation; None: of the chosen clips
window = 'hamming'              # analysis window: hamming (paper) or hanning (authors' code)
short_clips = 'pad'             # clips shorter than the input: pad with zeros, or join with other clips
                                # until it is full
init = ''                       # begin with this pre-trained checkpoint, ours or the authors', not at random
seed = 1                        # decides on everything random
max_steps = 400000              # updates
batch_size = 48                 # clips of one update, over all processes and accumulated parts
accumulate = 1                  # parts that each process cuts its clips into, one forward and backward each
lr = 5e-4                       # peak learning rate
warmup_steps = 20000            # updates of linear warm-up from 0; then cosine to 0
beta1 = 0.9                     # AdamW
beta2 = 0.95                    # AdamW
weight_decay = 0.05             # AdamW, decoupled
decay_vectors = False           # decay biases, norms and CLS too (authors' code, in effect)
grad_clip = 4.0                 # largest gradient norm; 0: no clipping
ema_start = 0.9998              # decay of the teacher at the first update ...
ema_end = 0.99999               # ... and after ema_steps, linear between
ema_steps = 100000              # updates
min_target_var = 0.0            # stop when the variance of the targets falls below this (collapse); 0: only warn
max_bad_steps = 10              # updates in a row with a loss or gradient that is not finite, before the run stops
eval_dataset = ''               # a labelled set to probe as training goes, 2,000 clips at most, or SET/FOLD to test on
                                # that fold, which leave_out should name too; '': none
eval_interval = 1000            # updates between two such evaluations; 0: at the end only
log_interval = 10               # updates between two lines of the log
loggers = ''                    # beside log.jsonl: tensorboard, wandb or both, separated by commas
save_interval = 1000            # updates between two checkpoints
keep = 2                        # checkpoints to keep
device = 'auto'                 # cuda, mps or cpu; auto: the best there is
dtype = 'auto'                  # float32 or bfloat16 (autocast); auto: bfloat16 where the hardware has it, but
                                # not for tiny models on a CPU
compile = False                 # torch.compile
compile_mode = 'default'        # its mode: default, reduce-overhead (CUDA graphs, for small models and batches),
                                # max-autotune-no-cudagraphs (tries more kernels, starts slowly) or max-autotune (both)
kernels = 'auto'                # Triton kernels: auto (on a GPU those that are right and faster), torch (none),
                                # triton (all), or a list of conv and attention, as checkpoints note it
workers = 2                     # processes that read clips ahead; 0: none
threads = 0                     # CPU threads of one process; 0: PyTorch's choice
deterministic = False           # the same bits in every run on a GPU too, at some cost (on a CPU they always are)
other_data = False              # go on although the data are not those that the run began with

COMPILE_MODES = {'default': False, 'reduce-overhead': True, 'max-autotune-no-cudagraphs': False,
                 'max-autotune': True}                      # whether they record CUDA graphs
MODEL_SETTINGS = os.path.join(ROOT, 'model.py'), 'ASDAConfig'
COLLAPSED = 0.05                # a variance of the targets, 1 when all is well, that deserves a warning


def model_config(settings):
    """The model's part of the settings, checked against the masks that pre-training draws."""
    config = ranges.check_model(ASDAConfig(**{field.name: getattr(settings, field.name)
                                              for field in dataclasses.fields(ASDAConfig)}))
    for name, allowed in {'n_mels': (N_MELS,), 'drop_path': (0,), 'pooling': ('cls', 'mean')}.items():
        if (value := getattr(config, name)) not in allowed:
            raise ConfigError(f'{name} = {value} must be {" or ".join(map(str, allowed))} in pre-training')
    rows, columns = config.grid
    patches = rows * columns
    if config.mask_block > min(rows, columns):
        raise ConfigError(f'mask_block = {config.mask_block} does not fit the {rows} x {columns} grid of patches of '
                          f'{config.frames} frames')
    blocks = int(patches * (1 - config.mask_ratio + config.mask_adjust) / config.mask_block ** 2)
    kept = n_kept(patches, config.mask_ratio)
    if blocks < 1 or kept < 1:
        raise ConfigError(f'{patches} patches keep {kept} at mask_ratio = {config.mask_ratio}: no block of '
                          f'{config.mask_block} x {config.mask_block} fits; set a smaller mask_block or longer frames')
    return config


def check(settings, world):
    """Raise ConfigError for settings that cannot work."""
    running.check(settings, world, ranges.PRETRAIN, window=WINDOWS, short_clips=('pad', 'join'),
                  compile_mode=COMPILE_MODES)
    if COMPILE_MODES[settings.compile_mode] and (world > 1 or settings.accumulate > 1):
        raise ConfigError(f'compile_mode = {settings.compile_mode} takes one process and accumulate = 1: a CUDA graph '
                          'overwrites its gradients when it runs again')


def lr_at(step, settings):
    """Linear warm-up from 0, then half a cosine to 0."""
    if step < settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (settings.max_steps - settings.warmup_steps)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay_at(step, settings):
    """Linear from ema_start to ema_end over ema_steps."""
    return settings.ema_start + (settings.ema_end - settings.ema_start) * min(step / settings.ema_steps, 1)


def make_optimizer(model, settings, process):
    """AdamW with weight decay on matrices, and on vectors (biases, norms, CLS) as decay_vectors says."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    vectors = [p for p in parameters.values() if p.squeeze().ndim <= 1]
    matrices = [p for p in parameters.values() if p.squeeze().ndim > 1]
    process.print(f'AdamW: {len(matrices)} matrices ({sum(p.numel() for p in matrices):,} parameters) decay, '
                  f'{len(vectors)} vectors ({sum(p.numel() for p in vectors):,}) '
                  f'{"decay too" if settings.decay_vectors else "do not"}')
    groups = [{'params': matrices, 'weight_decay': settings.weight_decay},
              {'params': vectors, 'weight_decay': settings.weight_decay if settings.decay_vectors else 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(settings.beta1, settings.beta2), eps=1e-8, fused=True)


def training_clips(settings, process):
    """The clips to train on; the demo's are made if they are missing."""
    names = configurator.words(settings.dataset)
    demo = os.path.join(settings.data_dir, 'demo')
    if names == ['demo'] and not os.path.exists(os.path.join(demo, 'meta.json')):
        import prepare  # with all its recipes, for nothing else
        process.once(lambda: prepare.run(['demo', f'--out_dir={demo}', '--workers=0']))
    return open_clips(names, settings.data_dir, configurator.words(settings.splits),
                      configurator.words(settings.leave_out))


def forward_backward(network, spec, mask, noise, settings, autocast):
    """Forward and backward over this process's clips in `accumulate` parts -> mean measures, {name: scalar tensor}.

    Both losses are means over equally many places of each part, so that the mean over parts is that of the whole.
    """
    parts = settings.accumulate
    totals = {}
    for i, (part_spec, part_mask, part_noise) in enumerate(
            zip(spec.chunk(parts), mask.chunk(parts), noise.chunk(parts))):
        if isinstance(network, DistributedDataParallel):
            network.require_backward_grad_sync = i == parts - 1             # the processes average their gradients once
        with autocast():
            loss, measures = network(part_spec, part_mask, part_noise)
        (loss / parts).backward()
        for name, value in {'loss': loss.detach(), **measures}.items():
            totals[name] = totals.get(name, 0) + value / parts
    return totals


def update(model, optimizer, step, settings):
    """One update of the student from the gradients -> their norm before clipping, a tensor on the device.

    If that is not finite, which every process sees alike, the student stays as it is: without asking the device.
    """
    for group in optimizer.param_groups:
        group['lr'] = lr_at(step, settings)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf)
    optimizer.found_inf = (~norm.isfinite()).float()                        # the fused AdamW then changes nothing
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def masks(settings, config, step, device):
    """(batch_size, n_students, P) bool of the global batch, True = masked."""
    return data.block_masks(settings.batch_size, config.n_students, config.grid, config.mask_ratio, config.mask_block,
                            randomness.torch_random(device, settings.seed, 'mask', step), config.mask_adjust)


def mask_noise(settings, config, step, places, device):
    """(clips * n_students, P, D) N(0, mask_noise^2), for masked places, drawn for each clip's place, in the type that
    the decoder works in."""
    shape = (config.n_students, math.prod(config.grid), config.n_embd)
    noise = torch.empty(len(places), *shape, dtype=getattr(torch, settings.dtype), device=device)
    for clip, place in zip(noise, places):                                  # one at a time: it stays in the cache
        generator = randomness.torch_random(device, settings.seed, 'noise', step, place)
        clip.copy_(torch.randn(shape, generator=generator, device=device).mul_(config.mask_noise))
    return noise.flatten(0, 1)


def train(settings):
    """Run pre-training as the settings say, to its end or to a signal."""
    process = processes.start(settings.device, settings.threads, settings.deterministic)
    check(settings, process.world)
    config = model_config(settings)
    with running.Run(settings, process, ranges.FREE_IN_PRETRAIN, report) as run:
        clips = training_clips(settings, process)
        labelled = labelled_clips(settings.eval_dataset, settings.data_dir, settings.seed, process)
        spectrum = spectrum_of(clips, config, settings)
        autocast = run.precision(config.n_embd)
        process.print(configurator.show(settings, (__file__,), MODEL_SETTINGS))
        process.print(f'{len(clips):,} clips, {clips.length.sum() / SAMPLE_RATE / 3600:.2f} hours, log-mel mean '
                      f'{spectrum["mean"]:.3f}, std {spectrum["std"]:.3f}; {run.where}')

        torch.manual_seed(settings.seed)
        model = ASDA(config).to(process.device)
        if settings.init and not run.resuming:
            from checkpoints.opening import begin_with
            begin_with(model, settings.init)
        process.print(f'{count_parameters(model):,} trainable parameters; {config.grid[0]} x {config.grid[1]} patches, '
                      f'{n_kept(math.prod(config.grid), config.mask_ratio)} of them kept by each of '
                      f'{config.n_students} students')
        optimizer = make_optimizer(model, settings, process)
        stored = run.load(model, optimizer, spectrum, clips.fingerprint())
        process.print(forms.apply(model, forms.choose(settings, config, stored, process)))
        network = run.network(mode=settings.compile_mode)

        per_process = settings.batch_size // process.world
        places = range(process.rank * per_process, (process.rank + 1) * per_process)    # of the global batch
        batches = data.PretrainBatches(clips, config.frames, settings.batch_size, places, settings.seed,
                                       join=spectrum['repeat'])
        evaluate = labelled and (lambda: watch(run, labelled, spectrum, autocast))

        for step, batch in run.steps(batches, evaluate):
            spec = data.log_mel(batch['pcm'], batch['lengths'], **spectrum)
            mask = masks(settings, config, step, process.device)[places.start:places.stop]
            noise = mask_noise(settings, config, step, places, process.device)
            measures = forward_backward(network, spec, mask, noise, settings, autocast)     # students against teacher
            measures['grad_norm'] = update(model, optimizer, step, settings)                # AdamW moves the students
            model.update_teacher(ema_decay_at(step, settings))              # and the teacher follows: their EMA
            if run.finish(step, measures, evaluate):                        # log, monitor, save, each when it is due
                return
    process.once(lambda: conclude(settings))


def spectrum_of(clips, config, settings):
    """What data.log_mel is told: the statistics are those of the clips unless the settings have others."""
    mean, std = clips.statistics(settings.window)
    return {'frames': config.frames, 'window': settings.window,
            'mean': mean if settings.norm_mean is None else settings.norm_mean,
            'std': std if settings.norm_std is None else settings.norm_std, 'repeat': settings.short_clips == 'join'}


def report(values, run):
    """The words of a step's line, and what the log is told beside the measures. Warns of a collapse, a teacher that
    gives every place the same target; ends the run if min_target_var says so.

    Losses and the gradient are those of the whole batch; standard deviations and shares are means over its parts.
    """
    settings, step, variance = run.settings, values['step'] - 1, values['target_std'] ** 2
    values.update(lr=lr_at(step, settings), ema=ema_decay_at(step, settings))
    if variance < settings.min_target_var:
        raise RunError(f'the variance of the targets fell to {variance:.2g}, below min_target_var = '
                       f'{settings.min_target_var:g}: the teacher has collapsed; lower lr or raise ema_start; '
                       f'{run.what_is_saved()}')
    if variance < COLLAPSED:
        run.process.print(f'warning: the variance of the targets is {variance:.2g}, the teacher is collapsing: lower '
                          'lr or raise ema_start')
    return (f'loss {values["loss"]:.3f}  content {values["content"]:.1%}  place {values["place"]:.1%}'
            if math.isfinite(values['content']) else f'loss {values["loss"]:.3f}')


def run(argv):
    train(configurator.configure(__file__, argv, MODEL_SETTINGS))


if __name__ == '__main__':
    processes.main(run)
