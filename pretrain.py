"""Stage 1: pre-train ASDA, 16 masked students per clip against one EMA teacher that sees everything.

    python pretrain.py config/demo.py
    torchrun --nproc_per_node=4 pretrain.py config/as2m.py

Settings are the names below and the fields of model.ASDAConfig; override them in a config file or with --key=value.
Every number of a run is a function of its settings and data: a resumed run, or one on another number of processes,
computes the same.
"""
import dataclasses
import math
import os
import time

import torch
from torch.nn.parallel import DistributedDataParallel

import configurator
import data
import kernels as triton_kernels
import prepare
from audio import N_MELS, SAMPLE_RATE, WINDOWS
from audio.clips import carve_validation, open_clips, read_meta
from checkpoints import saving
from engine import logs, processes, randomness
from engine.errors import ROOT, ConfigError, RunError
from model import ASDA, ASDAConfig, count_parameters, kernel_shapes, n_kept, use_kernels
from scoring.probes import effective_rank, features, knn_accuracy

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
eval_dataset = ''               # a prepared labelled set for the kNN accuracy; '': none
eval_interval = 1000            # updates between two such evaluations; 0: at the end only
eval_clips = 2000               # clips of that set to use at most
log_interval = 10               # updates between two lines of the log
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

# Settings that may differ when a run goes on, since they do not change its numbers.
FREE_SETTINGS = ('out_dir', 'resume', 'overwrite', 'other_data', 'min_target_var', 'max_bad_steps', 'data_dir',
                 'eval_dataset', 'eval_interval', 'eval_clips', 'log_interval', 'save_interval', 'keep', 'workers',
                 'accumulate', 'kernels')
COMPILE_MODES = {'default': False, 'reduce-overhead': True, 'max-autotune-no-cudagraphs': False,
                 'max-autotune': True}                      # whether they record CUDA graphs
COLLAPSED = 0.05                # a variance of the targets, 1 when all is well, that deserves a warning


def model_config(settings):
    """The model's part of the settings, checked against the masks that pre-training draws."""
    try:
        config = ASDAConfig(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(ASDAConfig)})
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.n_mels != N_MELS or config.drop_path:
        raise ConfigError(f'n_mels = {config.n_mels} must be {N_MELS} and drop_path = '
                                       f'{config.drop_path} must be 0 in pre-training')
    rows, columns = config.grid
    patches = rows * columns
    if config.mask_block > min(rows, columns):
        raise ConfigError(f'mask_block = {config.mask_block} does not fit the {rows} x {columns} grid '
                                       f'of patches of {config.frames} frames')
    blocks = int(patches * (1 - config.mask_ratio + config.mask_adjust) / config.mask_block ** 2)
    kept = n_kept(patches, config.mask_ratio)
    if blocks < 1 or kept < 1:
        raise ConfigError(f'{patches} patches keep {kept} at mask_ratio = {config.mask_ratio}: '
                                       f'no block of {config.mask_block} x {config.mask_block} fits; '
                                       'set a smaller mask_block or longer frames')
    return config


def check(settings, world):
    """Raise ConfigError for settings that cannot work."""
    configurator.check_ranges(
        settings, batch_size=(1, 1e6), accumulate=(1, 1e6), max_steps=(1, 1e9), log_interval=(1, 1e9),
        save_interval=(1, 1e9), keep=(1, 100), seed=(0, 2 ** 62), lr=(0, 1e30), weight_decay=(0, 1e3),
        beta1=(0, 0.9999), beta2=(0, 0.999999), grad_clip=(0, 1e9), ema_start=(0, 1), ema_end=(0, 1),
        ema_steps=(1, 1e9), eval_interval=(0, 1e9), eval_clips=(10, 1e9), max_bad_steps=(1, 1e9),
        min_target_var=(0, 1), workers=(0, 1000), threads=(0, 1000), norm_mean=(-100, 100), norm_std=(1e-3, 100),
        warmup_steps=(0, 1e9))
    if settings.batch_size % (world * settings.accumulate):
        raise ConfigError(f'batch_size = {settings.batch_size} is not divisible by {world} processes '
                                       f'x accumulate = {settings.accumulate}')
    if settings.window not in WINDOWS:
        raise ConfigError(f'window = {settings.window!r} is none of {", ".join(WINDOWS)}')
    if settings.short_clips not in ('pad', 'join'):
        raise ConfigError(f'short_clips = {settings.short_clips!r} is neither pad nor join')
    if settings.compile_mode not in COMPILE_MODES:
        raise ConfigError(f'compile_mode = {settings.compile_mode!r} is none of '
                                       f'{", ".join(COMPILE_MODES)}')
    if COMPILE_MODES[settings.compile_mode] and (world > 1 or settings.accumulate > 1):
        raise ConfigError(f'compile_mode = {settings.compile_mode} takes one process and accumulate = 1: '
                                       'a CUDA graph overwrites its gradients when it runs again')
    if not settings.warmup_steps < settings.max_steps:
        raise ConfigError(f'warmup_steps = {settings.warmup_steps} must be less than max_steps '
                                       f'= {settings.max_steps}')


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
    assert sum(p.numel() for p in vectors + matrices) == count_parameters(model)
    process.print(f'AdamW: {len(matrices)} matrices ({sum(p.numel() for p in matrices):,} parameters) decay, '
                  f'{len(vectors)} vectors ({sum(p.numel() for p in vectors):,}) '
                  f'{"decay too" if settings.decay_vectors else "do not"}')
    groups = [{'params': matrices, 'weight_decay': settings.weight_decay},
              {'params': vectors, 'weight_decay': settings.weight_decay if settings.decay_vectors else 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(settings.beta1, settings.beta2), eps=1e-8,
                             fused=True)


def choose_kernels(model, config, settings, resumed, process):
    """Layers that Triton computes, and how it launches them, as settings.kernels says: the choice of one process, or of
    the checkpoint that goes on, holds for all."""
    dtype = getattr(torch, settings.dtype)
    clips = settings.batch_size // process.world // settings.accumulate
    if settings.kernels == 'auto' and resumed:
        settings.kernels = resumed['settings'].get('kernels', 'torch')
    elif settings.kernels in ('auto', 'torch', 'triton'):
        if settings.kernels != 'torch' and not triton_kernels.unusable(process.device):
            process.print('compiling and timing the Triton kernels ...')    # a minute, unless Triton remembers them
        try:
            choice, reasons = triton_kernels.choose(settings.kernels if process.is_main else 'torch',
                                                    kernel_shapes(config, clips), process.device, dtype,
                                                    timed=not settings.deterministic)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if len(set(reasons.values())) > 1:                                  # else no kernel was tried, for one reason
            for name, reason in reasons.items():
                process.print(f'{name} by {"Triton" if choice[name] == "triton" else "PyTorch"}: {reason}')
        names = [triton_kernels.tuned_name(name) for name in choice if choice[name] == 'triton']
        settings.kernels = ','.join(process.gather(names)[0]) or 'torch'
    names = configurator.words(settings.kernels)
    if names != ['torch']:
        try:
            names, missing = [triton_kernels.recall(name) for name in names], triton_kernels.unusable(process.device)
        except ValueError as error:
            missing = error
        if missing:
            raise ConfigError(f'kernels = {settings.kernels!r}, but {missing}: write --kernels=torch')
    use_kernels(model, names)


def training_clips(settings, process):
    """The clips to train on; the demo's are made if they are missing."""
    names = configurator.words(settings.dataset)
    if names == ['demo'] and not os.path.exists(os.path.join(settings.data_dir, 'demo', 'meta.json')):
        if process.is_main:
            prepare.run(['demo', f'--out_dir={os.path.join(settings.data_dir, "demo")}', '--workers=0'])
        process.gather(None)                                                # the others wait
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
    """One update of student and teacher from the gradients -> their norm before clipping, a tensor on the device.

    If that is not finite, which every process sees alike, the student stays as it is: without asking the device.
    """
    for group in optimizer.param_groups:
        group['lr'] = lr_at(step, settings)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf)
    optimizer.found_inf = (~norm.isfinite()).float()                        # the fused AdamW then changes nothing
    optimizer.step()
    model.update_teacher(ema_decay_at(step, settings))
    optimizer.zero_grad(set_to_none=True)
    return norm


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
    resuming = logs.check_out_dir(settings.out_dir, settings.resume, settings.overwrite)
    clips = training_clips(settings, process)
    labelled = monitor_clips(settings)
    mean, std = clips.statistics(settings.window)
    mean = mean if settings.norm_mean is None else settings.norm_mean
    std = std if settings.norm_std is None else settings.norm_std
    join = settings.short_clips == 'join'
    input_info = {'window': settings.window, 'mean': mean, 'std': std, 'repeat': join,
                  'fingerprint': clips.fingerprint()}
    autocast, settings.dtype = processes.autocast(process, settings.dtype, config.n_embd)
    settings.device = process.device.type                                   # as it is, for the checkpoint
    process.print(configurator.show(settings))
    process.print(f'{len(clips):,} clips, {clips.length.sum() / SAMPLE_RATE / 3600:.2f} hours, '
                  f'log-mel mean {mean:.3f}, std {std:.3f}; {processes.provenance(process)}')

    torch.manual_seed(settings.seed)
    model = ASDA(config).to(process.device)
    process.print(f'{count_parameters(model):,} trainable parameters; {config.grid[0]} x {config.grid[1]} patches, '
                  f'{n_kept(math.prod(config.grid), config.mask_ratio)} of them kept by each '
                  f'of {config.n_students} students')
    optimizer = make_optimizer(model, settings, process)
    resumed = {}
    if resuming:
        resumed = saving.resume(settings.out_dir, model, optimizer, dataclasses.asdict(config), input_info, settings,
                                 FREE_SETTINGS, process)
    first = resumed.get('step', 0)
    choose_kernels(model, config, settings, resumed, process)
    network = processes.distribute(model, process)
    if settings.compile and processes.can_compile(process):
        network.compile(mode=settings.compile_mode)

    per_process = settings.batch_size // process.world
    places = range(process.rank * per_process, (process.rank + 1) * per_process)
    batches = data.PretrainBatches(clips, config.frames, settings.batch_size, places, settings.seed, join)
    loader = data.loader(batches, range(first, settings.max_steps), settings.workers, pin=process.device.type == 'cuda')
    log = logs.Log(settings.out_dir, process, first if resuming else None)
    log.write(start=first, settings=vars(settings), **processes.provenance(process), time=time.time())
    stop, clock = processes.Stop(process), logs.Clock(first, settings.max_steps)
    measures, done = {}, first
    bad_steps = torch.tensor(float(resumed.get('bad_steps', 0)), device=process.device)
    late = processes.Late(process)

    def settle(done, names, is_logged, values):
        """What the numbers of a step say, once they are here."""
        values = dict(zip(names, values))
        processes.check_bad_steps(done, int(values.pop('bad_steps')), settings, batches, places, process, log)
        if is_logged:
            report(done, values, settings, process, log, clock)

    def save():
        if process.is_main:
            saving.save_checkpoint(os.path.join(settings.out_dir, 'ckpt.pt'), {
                'model': model.state_dict(), 'config': dataclasses.asdict(config), 'optimizer': optimizer.state_dict(),
                'step': done, 'settings': vars(settings),
                'bad_steps': float(bad_steps), 'metrics': {name: float(value) for name, value in measures.items()},
                'input': input_info}, settings.keep)

    for step, batch in zip(range(first, settings.max_steps), processes.ahead(loader, process)):
        spec = data.log_mel(batch['pcm'], batch['lengths'], config.frames, settings.window, mean, std)
        mask = data.block_masks(settings.batch_size, config.n_students, config.grid, config.mask_ratio,
                                config.mask_block, randomness.torch_random(process.device, settings.seed, 'mask', step),
                                config.mask_adjust)[places.start:places.stop]
        noise = mask_noise(settings, config, step, places, process.device)

        measures = forward_backward(network, spec, mask, noise, settings, autocast)
        measures['grad_norm'] = update(model, optimizer, step, settings)
        measures['bad_steps'] = bad_steps = (bad_steps + 1) * ~measures['grad_norm'].isfinite()
        done = step + 1

        last = done == settings.max_steps
        evaluating = labelled and (last or settings.eval_interval and done % settings.eval_interval == 0)
        is_logged, stopping = last or done % settings.log_interval == 0, stop.agreed()
        is_saving = last or stopping or done % settings.save_interval == 0
        values = torch.stack([value.float() for value in measures.values()])
        if is_logged:
            values = process.mean(values)                           # of the accumulated parts, now of the processes
        for item, numbers in late.swap((done, list(measures), is_logged), values, wait=evaluating or is_saving):
            settle(*item, numbers)
        if evaluating:
            scores = monitor(model, labelled, settings, config, process, autocast)
            measures.update(scores)
            process.print(f'step {done:,}: kNN accuracy on {settings.eval_dataset} (chance {scores["chance"]:.1%}): '
                          f'CLS {scores["knn_cls"]:.1%}, patches {scores["knn_patches"]:.1%}; '
                          f'effective rank {scores["effective_rank"]:.1f} of {config.n_embd}')
            log.write(step=done, **scores)
        if is_saving:
            save()
        if stopping and not last:
            process.print(f'stopped after step {done:,} and saved; to go on, run the same command with --resume')
            return
    process.print(f'done: {settings.out_dir}/ckpt.pt\n{settings_next(settings)}')


def check_targets(target_std, settings, process):
    """Warn of a collapse, a teacher that gives every place the same target; end the run if min_target_var says so."""
    variance = target_std ** 2
    if variance < settings.min_target_var:
        raise RunError(f'the variance of the targets fell to {variance:.2g}, below min_target_var = '
                               f'{settings.min_target_var:g}: the teacher has collapsed; lower lr or raise ema_start; '
                               f'{settings.out_dir} holds the last checkpoint')
    if variance < COLLAPSED:
        process.print(f'warning: the variance of the targets is {variance:.2g}, the teacher is collapsing: lower lr or '
                      'raise ema_start')


def report(done, values, settings, process, log, clock):
    """One line to the terminal and to log.jsonl: means over the accumulated parts and processes. (Losses and the
    gradient are those of the whole batch; standard deviations and the explained share are means over the parts.)"""
    values = {**values, 'step': done, 'lr': lr_at(done - 1, settings), 'ema': ema_decay_at(done - 1, settings)}
    check_targets(values['target_std'], settings, process)
    speed, weight = clock.per_second(done, settings.batch_size), settings.alpha * settings.utterance_scale
    process.print(f'step {done:,}/{settings.max_steps:,}  loss {values["loss"]:.3f} = frame {values["frame"]:.3f} + '
                  f'{weight:g} x utterance {values["utterance"]:.3f}  explained {values["explained"]:.1%}  '
                  f'std {values["target_std"]:.2f} target {values["pred_std"]:.2f} prediction  lr {values["lr"]:.1e}  '
                  f'ema {values["ema"]:.5f}  gradient {values["grad_norm"]:.2f}  {speed:.0f} clips/s  '
                  f'{clock.left(done)} left')
    log.write(**values, clips_per_second=speed, seconds_left=clock.seconds_left(done), time=time.time())


def monitor_clips(settings):
    """(train, valid) clips of eval_dataset's training split, at most eval_clips together; None without such a set."""
    if not settings.eval_dataset:
        return None
    clips = open_clips([settings.eval_dataset], settings.data_dir)
    if clips.multi_label or not clips.classes:
        raise ConfigError(f'eval_dataset = {settings.eval_dataset!r} needs one label per clip for its kNN '
                                       'accuracy: leave it out')
    chosen = randomness.random(settings.seed, 'few_labels').permutation(len(clips))[:settings.eval_clips]
    train, valid = carve_validation(clips.select(chosen), 0.3)
    if not len(train) or not len(valid):
        raise ConfigError(f'eval_dataset = {settings.eval_dataset!r} has too few clips for a kNN accuracy')
    return train, valid


def monitor(model, labelled, settings, config, process, autocast):
    """kNN accuracy of the student's frozen features from train to valid clips, and the rank of the features."""
    train, valid = labelled
    mean, std = train.statistics(settings.window)
    spectrum = {'frames': config.frames, 'window': settings.window, 'mean': mean, 'std': std,
                'repeat': settings.short_clips == 'join'}
    (train_cls, train_patches), (valid_cls, valid_patches) = (
        features(model.encoder, part, spectrum, process, autocast) for part in labelled)
    return {'knn_cls': knn_accuracy(train_cls, train.label, valid_cls, valid.label),
            'knn_patches': knn_accuracy(train_patches, train.label, valid_patches, valid.label),
            'chance': float((valid.label == torch.from_numpy(valid.label).mode().values.item()).mean()),
            'effective_rank': effective_rank(valid_cls)}


def settings_next(settings):
    """What to type next."""
    name = settings.eval_dataset or configurator.words(settings.dataset)[0]
    if not read_meta(os.path.join(settings.data_dir, name))['classes']:
        return f'next:  python eval.py --ckpt={settings.out_dir}/ckpt.pt --dataset={name} --embed=embeddings.npz'
    lines = [f'next:  python eval.py --ckpt={settings.out_dir}/ckpt.pt --dataset={name}      # kNN and linear probe']
    config = f'config/finetune_{name}.py'
    if os.path.exists(os.path.join(ROOT, config)):
        lines.append(f'       python finetune.py {config} --ckpt={settings.out_dir}/ckpt.pt')
    return '\n'.join(lines)


def run(argv):
    train(configurator.configure(__file__, argv, (os.path.join(ROOT, 'model.py'), 'ASDAConfig')))


if __name__ == '__main__':
    processes.main(run)
