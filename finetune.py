"""Stage 2: a classifier on a pre-trained encoder.

    python finetune.py config/finetune_esc50.py --ckpt=out/as2m/ckpt.pt --fold=all
    python finetune.py config/finetune_fsdd.py --ckpt=asda_authors.pt --labels_per_class=10
    python finetune.py config/finetune_fsdd.py --init=scratch --ckpt=out/real/ckpt.pt
                                                                # its architecture, random weights

--ckpt reads our checkpoints and the authors', EAT's and SSLAM's; window, frames and architecture come from it. Without
one (--init=scratch) they come from the settings, which are the names below and the fields of model.ASDAConfig.
The best checkpoint is chosen on a validation part of the training split; the test split is looked at once, at the end.
"""
import dataclasses
import math
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import configurator
import data
from audio import N_MELS, WINDOWS
from audio.clips import read_meta, sampling_weights, task_splits
from checkpoints import saving
from checkpoints.opening import open_checkpoint
from engine import logs, processes
from engine.errors import ROOT, ConfigError
from model import ASDAConfig, Classifier, count_parameters
from scoring.metrics import describe, metrics
from scoring.probes import predict

out_dir = 'out/finetune'        # checkpoints and log.jsonl go here
resume = False                  # go on with the run in out_dir
overwrite = False               # start again, over the run in out_dir
ckpt = ''                       # pre-trained checkpoint to start from
init = 'checkpoint'             # checkpoint, or scratch: random weights
dataset = 'demo'                # a prepared labelled set
test_dataset = ''               # another prepared set with the same classes to test on; '': dataset's own test split
data_dir = 'data'               # where it is
fold = ''                       # test on this fold; all: on each in turn; '': on the test split
labels_per_class = 0            # train on so many clips of each class; 0: all
validation_part = 0.1           # share of the training split that chooses the best checkpoint; 0: none, the last counts
weighted = False                # draw clips of rare classes more often: weights 1000 / clips of the label, summed
epoch_clips = 200000            # weighted: clips of an epoch, drawn without replacement
seed = 1                        # decides on everything random
frames = 0                      # input length; 0: the checkpoint's
window = 'hamming'              # analysis window without a checkpoint: hamming or hanning
repeat = False                  # repeat clips shorter than the input instead of padding; on if the checkpoint was
                                # pre-trained on joined clips
max_steps = 4000                # updates
batch_size = 48                 # clips of one update, over all processes and accumulated parts
accumulate = 1                  # parts that each process cuts its clips into
lr = 5e-5                       # peak learning rate
min_lr = 1e-6                   # learning rate at the start of the warm-up and at the end
warmup_steps = 400              # updates of linear warm-up; then cosine to min_lr
layer_decay = 0.65              # block i of L learns at lr * layer_decay^(L - i)
beta1 = 0.9                     # AdamW
beta2 = 0.95                    # AdamW
weight_decay = 0.05             # AdamW, decoupled
decay_vectors = False           # decay biases, norms and CLS too
drop_path = 0.1                 # stochastic depth of the last block, rising linearly from 0
roll = True                     # random circular shift and gain of the waveform
noise = False                   # add noise to the spectrogram and shift it by up to 10 frames
input_mask = 0.2                # largest share of bands, and of frames, that one mask each hides
mixup = 0.0                     # Beta(mixup, mixup) decides how a clip and its partner are mixed; 0: no mixup
mixup_probability = 0.9         # share of the batches that are mixed
label_smoothing = 0.0           # single labels only, in training only
loss = 'auto'                   # cross_entropy or bce; auto: bce for a multi-label set
max_bad_steps = 10              # updates in a row with a gradient that is not finite, before the run stops
eval_interval = 200             # updates between two evaluations on the validation part
log_interval = 20               # updates between two lines of the log
save_interval = 200             # updates between two checkpoints
keep = 2                        # checkpoints to keep, beside the best
device = 'auto'                 # cuda, mps or cpu; auto: the best there is
dtype = 'auto'                  # float32 or bfloat16 (autocast); auto: bfloat16 where the hardware has it, but
                                # not for tiny models on a CPU
compile = False                 # torch.compile
workers = 2                     # processes that read clips ahead; 0: none
threads = 0                     # CPU threads of one process; 0: PyTorch's choice
deterministic = False           # the same bits in every run on a GPU too, at some cost (on a CPU they always are)
other_data = False              # go on although the data are not those that the run began with

FREE_SETTINGS = ('out_dir', 'resume', 'overwrite', 'other_data', 'max_bad_steps', 'data_dir', 'ckpt', 'log_interval',
                 'save_interval', 'keep', 'workers', 'accumulate')
HEAD_CHOICES = ('cls_position', 'pooling')      # fields of ASDAConfig that fine-tuning may change (Table 2)


def check(settings, world):
    """Raise ConfigError for settings that cannot work."""
    def refuse(text):
        raise ConfigError(text)
    configurator.check_ranges(
        settings, batch_size=(1, 1e6), accumulate=(1, 1e6), max_steps=(1, 1e9), log_interval=(1, 1e9),
        save_interval=(1, 1e9), eval_interval=(1, 1e9), keep=(1, 100), seed=(0, 2 ** 62), lr=(0, 1e30),
        min_lr=(0, 1e30), layer_decay=(0, 1), weight_decay=(0, 1e3), beta1=(0, 0.9999), beta2=(0, 0.999999),
        max_bad_steps=(1, 1e9), workers=(0, 1000), threads=(0, 1000), warmup_steps=(0, 1e9),
        labels_per_class=(0, 1e9), mixup=(0, 1e3), mixup_probability=(0, 1), input_mask=(0, 1),
        label_smoothing=(0, 1), validation_part=(0, 1), frames=(0, 1e6), epoch_clips=(1, 1e9))
    parts = world * settings.accumulate
    if settings.batch_size % (2 * parts) and parts > 1:
        refuse(f'batch_size = {settings.batch_size} is not divisible by 2 x {world} processes x accumulate '
               f'= {settings.accumulate}, which mixing pairs of clips needs')
    for name, allowed in (('init', ('checkpoint', 'scratch')), ('loss', ('auto', 'cross_entropy', 'bce')),
                          ('window', WINDOWS)):
        if getattr(settings, name) not in allowed:
            refuse(f'{name} = {getattr(settings, name)!r} is none of {", ".join(allowed)}')
    if settings.init == 'checkpoint' and not settings.ckpt:
        refuse('name a pre-trained checkpoint, --ckpt=PATH, or start from random weights, --init=scratch')
    if not settings.warmup_steps < settings.max_steps:
        refuse(f'warmup_steps = {settings.warmup_steps} must be less than max_steps = {settings.max_steps}')


def initial_model(settings, n_classes):
    """A Classifier with the encoder of --ckpt, or random weights -> model, analysis window, repeat"""
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(ASDAConfig)}
    window, repeat, encoder = settings.window, settings.repeat, None
    if settings.ckpt:
        loaded = open_checkpoint(settings.ckpt)
        set_here = [name for name in fields if name in settings.given
                    and name not in ('frames', 'drop_path', *HEAD_CHOICES)]
        if set_here:
            raise ConfigError(f'{set_here[0]} comes from the checkpoint {settings.ckpt}: leave it out')
        chosen = {name: fields[name] for name in HEAD_CHOICES if name in settings.given}
        fields = {**dataclasses.asdict(loaded.config), **chosen}
        window, repeat, encoder = loaded.spectrum['window'], loaded.spectrum['repeat'] or repeat, loaded.encoder
    fields['frames'] = settings.frames or (fields['frames'] if settings.ckpt else ASDAConfig.frames)
    fields['drop_path'] = settings.drop_path
    try:
        config = ASDAConfig(**fields)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if config.n_mels != N_MELS:
        raise ConfigError(f'n_mels = {config.n_mels} must be {N_MELS}')
    torch.manual_seed(settings.seed)
    model = Classifier(config, n_classes)
    if settings.init == 'checkpoint':
        saving.load_weights(model.encoder, encoder.state_dict(), settings.ckpt)
    return model, window, repeat


def layer_scales(model, layer_decay):
    """{parameter name: factor on the learning rate}: block i of L gets layer_decay^(L - i), all else 1."""
    L = model.config.n_layer
    scales = {}
    for name, _ in model.named_parameters():
        parts = name.split('.')
        scales[name] = layer_decay ** (L - int(parts[2])) if parts[:2] == ['encoder', 'blocks'] else 1.0
    return scales


def make_optimizer(model, settings, process):
    """AdamW with a group for every layer's scale, with and without weight decay."""
    groups = {}
    for (_, p), scale in zip(model.named_parameters(), layer_scales(model, settings.layer_decay).values()):
        decays = settings.decay_vectors or p.squeeze().ndim > 1
        group = groups.setdefault((scale, decays), {'params': [], 'scale': scale,
                                                    'weight_decay': settings.weight_decay if decays else 0.0})
        group['params'].append(p)
    assert sum(p.numel() for group in groups.values() for p in group['params']) == count_parameters(model)
    process.print(f'AdamW: {count_parameters(model):,} parameters in {len(groups)} groups, learning rate scaled from '
                  f'{min(g["scale"] for g in groups.values()):.2g} to {max(g["scale"] for g in groups.values()):g}')
    return torch.optim.AdamW(groups.values(), lr=0.0, betas=(settings.beta1, settings.beta2), eps=1e-8,
                             fused=True)


def lr_at(step, settings):
    """Linear from min_lr to the peak, cosine back to min_lr. (The authors do not scale min_lr by layer;
    here all of it is.)"""
    if step < settings.warmup_steps:
        return settings.min_lr + (settings.lr - settings.min_lr) * step / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (settings.max_steps - settings.warmup_steps)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def classification_loss(logits, labels, label_sum, settings, multi_label):
    """The part's share of the loss over the global batch: the sum over all parts is that loss.

    cross_entropy: mean over clips, with label smoothing. bce of a multi-label set: sum / sum of the (mixed) labels of
    the global batch (AudioSet). bce of single labels: sum over classes, mean over clips (Speech Commands).
    logits, labels (B, classes); label_sum: sum of the global batch's labels,
    which mixing with the reversed batch keeps.
    """
    kind = settings.loss if settings.loss != 'auto' else 'bce' if multi_label else 'cross_entropy'
    if kind == 'cross_entropy':
        smooth = settings.label_smoothing
        labels = labels * (1 - smooth) + smooth / labels.shape[1]
        return -(labels * F.log_softmax(logits, dim=1)).sum() / settings.batch_size
    total = F.binary_cross_entropy_with_logits(logits, labels, reduction='sum')
    return total / label_sum if multi_label else total / settings.batch_size


def forward_backward(network, batch, spectrum, settings, multi_label, process, autocast):
    """Forward and backward over this process's clips in parts of mirrored places -> the process's share of the loss."""
    parts = settings.accumulate
    clips = len(batch['lengths'])
    total = 0
    for i in range(parts):
        first, last = i * clips // (2 * parts), (i + 1) * clips // (2 * parts)      # and the places they are mixed with
        part = batch if parts == 1 else {
            name: torch.cat([value[first:last], value[clips - last:clips - first]]) if value.ndim else value
            for name, value in batch.items()}
        spec = data.log_mel(part['pcm'], part['lengths'], **spectrum, gain=part['gain'])
        spec, labels = data.augment(spec, part)
        if isinstance(network, DistributedDataParallel):
            network.require_backward_grad_sync = i == parts - 1
        with autocast():
            logits = network(spec, part['draws'])
        loss = classification_loss(logits.float(), labels, part['label_sum'], settings, multi_label)
        (loss * process.world).backward()                       # DDP takes the mean over processes, the loss is a sum
        total = total + loss.detach()
    return total


def train(settings, process):
    """One fine-tuning run -> {'best': scores, 'last': scores} on the test split; None if a signal ended it."""
    resuming = logs.check_out_dir(settings.out_dir, settings.resume, settings.overwrite)
    train_clips, valid, test, whole = task_splits(
        settings.dataset, settings.data_dir, settings.fold, settings.labels_per_class, settings.seed,
        settings.validation_part, settings.test_dataset)
    multi_label, classes = train_clips.multi_label, train_clips.classes
    model, window, repeat = initial_model(settings, len(classes))
    config = model.config
    mean, std = whole.statistics(window)
    spectrum = {'frames': config.frames, 'window': window, 'mean': mean, 'std': std, 'repeat': repeat}
    input_info = {'window': window, 'mean': mean, 'std': std, 'repeat': repeat,
                  'fingerprint': train_clips.fingerprint()}
    autocast, settings.dtype = processes.autocast(process, settings.dtype, config.n_embd)
    settings.device = process.device.type                                   # as it is, for the checkpoint
    process.print(f'{configurator.show(settings, leave_out=dataclasses.asdict(config))}\n{config}')
    process.print(f'{len(train_clips):,} training, {len(valid):,} validation, {len(test):,} test clips; '
                  f'{len(classes)} classes; {config.frames} frames; log-mel mean {mean:.3f}, std {std:.3f}; '
                  f'{processes.provenance(process)}')
    model.to(process.device)
    optimizer = make_optimizer(model, settings, process)
    resumed = {}
    if resuming:
        resumed = saving.resume(settings.out_dir, model, optimizer, dataclasses.asdict(config), input_info, settings,
                                 FREE_SETTINGS, process)
    first, best = resumed.get('step', 0), float(resumed.get('best', -math.inf))
    network = processes.distribute(model, process)
    if settings.compile and processes.can_compile(process):
        network.compile()

    places = data.mirrored_places(settings.batch_size, process.rank, process.world)
    batches = data.FinetuneBatches(train_clips, config.frames, settings.batch_size, places, settings.seed,
                                   config.n_layer, settings.roll, settings.noise, settings.input_mask, settings.mixup,
                                   settings.mixup_probability,
                                   sampling_weights(train_clips) if settings.weighted else None,
                                   settings.epoch_clips)
    loader = data.loader(batches, range(first, settings.max_steps), settings.workers, pin=process.device.type == 'cuda')
    log = logs.Log(settings.out_dir, process, first if resuming else None)
    log.write(start=first, settings=vars(settings), **processes.provenance(process), time=time.time())
    stop, clock = processes.Stop(process), logs.Clock(first, settings.max_steps)
    scores, done = {}, first
    bad_steps = torch.tensor(float(resumed.get('bad_steps', 0)), device=process.device)
    late = processes.Late(process)

    def settle(done, is_logged, value, in_a_row):
        """What the numbers of a step say, once they are here."""
        processes.check_bad_steps(done, int(in_a_row), settings, batches, places, process, log)
        if is_logged:
            rate = lr_at(done - 1, settings)
            process.print(f'step {done:,}/{settings.max_steps:,}  loss {value:.4f}  lr {rate:.1e}  '
                          f'{clock.per_second(done, settings.batch_size):.0f} clips/s  {clock.left(done)} left')
            log.write(step=done, loss=value, lr=rate, time=time.time())

    def contents():
        return {'model': model.state_dict(), 'config': dataclasses.asdict(config), 'step': done,
                'settings': vars(settings), 'metrics': scores, 'input': input_info, 'classes': classes,
                'multi_label': multi_label, 'best': best, 'bad_steps': float(bad_steps)}

    def evaluate(clips, title):
        return metrics(predict(model, clips, spectrum, process, autocast, title=title),
                       clips.targets(np.arange(len(clips))), multi_label)[0]

    for step, batch in zip(range(first, settings.max_steps), processes.ahead(loader, process, stay=('noise_seed',))):
        for group in optimizer.param_groups:
            group['lr'] = lr_at(step, settings) * group['scale']
        model.train()
        loss = forward_backward(network, batch, spectrum, settings, multi_label, process, autocast)
        is_bad = ~torch.isfinite(torch.nn.utils.get_total_norm(p.grad for p in model.parameters()))
        optimizer.found_inf = is_bad.float()                        # the fused AdamW leaves everything as it is, if so
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bad_steps = (bad_steps + 1) * is_bad
        done = step + 1

        last = done == settings.max_steps
        evaluating = len(valid) and (last or done % settings.eval_interval == 0)
        is_logged, stopping = last or done % settings.log_interval == 0, stop.agreed()
        is_saving = last or stopping or done % settings.save_interval == 0
        if is_logged:
            loss = process.mean(loss.clone()) * process.world
        for item, numbers in late.swap((done, is_logged), torch.stack([loss, bad_steps]), wait=evaluating or is_saving):
            settle(*item, *numbers)
        if evaluating:
            scores = evaluate(valid, 'validation')
            process.print(f'step {done:,}: validation {describe(scores)}')
            log.write(step=done, valid=scores)
            score = scores.get('mAP', scores.get('accuracy'))
            if not score < best:                                            # of equals the later, which has seen more
                best = score
                if process.is_main:
                    saving.save_checkpoint(os.path.join(settings.out_dir, 'best.pt'), contents(), keep=1)
        if process.is_main and is_saving:
            saving.save_checkpoint(os.path.join(settings.out_dir, 'ckpt.pt'),
                                    {**contents(), 'optimizer': optimizer.state_dict()}, settings.keep)
        if stopping and not last:
            process.print(f'stopped after step {done:,} and saved; to go on, run the same command with --resume')
            return None

    results = {'last': evaluate(test, 'test')}
    if len(valid):
        process.gather(None)                                                # best.pt is whole before the others read it
        best_path = os.path.join(settings.out_dir, 'best.pt')
        saving.load_weights(model, saving.load_checkpoint(best_path)['model'], best_path)
        results['best'] = evaluate(test, 'test')
    log.write(step=done, test=results)
    for name, scores in results.items():
        path = os.path.join(settings.out_dir, 'ckpt.pt' if name == 'last' else 'best.pt')
        process.print(f'test, {name} checkpoint ({path}): {describe(scores)}')
    return results


def train_folds(settings, process):
    """Fine-tune once per fold and report each, mean and spread."""
    folds = read_meta(os.path.join(settings.data_dir, settings.dataset))['folds']
    if not folds:
        raise ConfigError(f'{settings.dataset} has no folds')
    results = {}
    for name in folds:
        out = os.path.join(settings.out_dir, f'fold-{name}')
        begun = any(os.path.exists(os.path.join(out, ckpt)) for ckpt in ('ckpt.pt', 'ckpt.1.pt'))
        resume, overwrite = settings.resume and begun, settings.overwrite or settings.resume and not begun
        process.print(f'fold {name}')
        results[name] = train(settings.but(fold=name, out_dir=out, resume=resume, overwrite=overwrite), process)
        if results[name] is None:
            return
    for which in results[folds[0]]:
        values = [result[which].get('mAP', result[which].get('accuracy')) for result in results.values()]
        process.print(f'{which} checkpoints: '
                      + ', '.join(f'fold {name} {value:.1%}' for name, value in zip(folds, values))
                      + f'; mean {np.mean(values):.1%}, '
                        f'standard deviation {np.std(values, ddof=1) if len(values) > 1 else 0:.1%}')


def run(argv):
    settings = configurator.configure(__file__, argv, (os.path.join(ROOT, 'model.py'), 'ASDAConfig'))
    process = processes.start(settings.device, settings.threads, settings.deterministic)
    check(settings, process.world)
    if settings.fold == 'all':
        train_folds(settings, process)
    else:
        train(settings, process)


if __name__ == '__main__':
    processes.main(run)
