"""Stage 2: a classifier on a pre-trained encoder.

    python finetune.py config/finetune_esc50.py --ckpt=out/as2m/ckpt.pt --fold=all
    python finetune.py config/finetune_fsdd.py --ckpt=asda_authors.pt --labels_per_class=10
    python finetune.py config/finetune_fsdd.py --init=scratch --ckpt=out/real/ckpt.pt
                                                                # its architecture, random weights

--ckpt reads our checkpoints and the authors', EAT's and SSLAM's; window, frames and architecture come from it. Without
one (--init=scratch) the architecture comes from the settings, which are the names below and the fields of ASDAConfig.
The best checkpoint is chosen on a validation part of the training split; the test split is looked at after the last
update only, with that checkpoint and the last one.
"""
import dataclasses
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import configurator
import data
from audio import N_MELS
from audio.clips import read_meta, sampling_weights, task_splits
from checkpoints.opening import open_checkpoint
from engine import processes, ranges, saving
from engine import run as running
from engine.errors import ROOT, ConfigError
from fast import forms
from model import ASDAConfig, Classifier, count_parameters
from scoring.judge import Judge, begin_as_probe, main_score

out_dir = 'out/finetune'        # checkpoints and log.jsonl go here
resume = False                  # go on with the run in out_dir
overwrite = False               # start again, over the run in out_dir
ckpt = ''                       # pre-trained checkpoint to start from
init = 'checkpoint'             # checkpoint, or scratch: random weights
dataset = 'demo'                # a prepared labelled set
test_dataset = ''               # another prepared set with the same classes to test on; '': dataset's own test split
data_dir = 'data'               # where it is
head = 'random'                 # begin with random weights of the head, or with those of a linear probe: probe
fold = ''                       # test on this fold; all: on each in turn; '': on the test split
labels_per_class = 0            # train on so many clips of each class; 0: all
validation_part = 0.1           # share of the training split that chooses the best checkpoint; 0: none, the last counts
weighted = False                # draw clips of rare classes more often: weights 1000 / clips of the label, summed
epoch_clips = 200000            # weighted: clips of an epoch, drawn without replacement
seed = 1                        # decides on everything random
frames = 0                      # input length; 0: the checkpoint's
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
loggers = ''                    # beside log.jsonl: tensorboard, wandb or both, separated by commas
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

HEAD_CHOICES = ('cls_position', 'pooling')      # fields of ASDAConfig that fine-tuning may change (Table 2)


def check(settings, world):
    """Raise ConfigError for settings that cannot work."""
    running.check(settings, world, ranges.FINETUNE, parts=2, init=('checkpoint', 'scratch'),
                  loss=('auto', 'cross_entropy', 'bce'), head=('random', 'probe'))
    if settings.init == 'checkpoint' and not settings.ckpt and not settings.resume:
        raise ConfigError('name a pre-trained checkpoint, --ckpt=PATH, or start from random weights, --init=scratch')
    if settings.min_lr > settings.lr:
        raise ConfigError(f'min_lr = {settings.min_lr:g} must not be above lr = {settings.lr:g}')


def check_labels(settings, clips, valid):
    """Raise ConfigError for a loss and clips that do not go together, and where validation has none of them."""
    if settings.validation_part and not len(valid):
        raise ConfigError(f'validation_part = {settings.validation_part:g} of {settings.dataset} is no clip: a larger '
                          'part, or 0')
    kind = loss_kind(settings, clips.multi_label)
    if clips.multi_label and kind == 'cross_entropy':
        raise ConfigError(f'loss = cross_entropy takes one label a clip, {settings.dataset} has several: --loss=bce')
    if settings.label_smoothing and kind == 'bce':
        raise ConfigError(f'label_smoothing = {settings.label_smoothing:g} belongs to cross_entropy, the loss is bce: '
                          'leave it out')
    if len(clips.classes) < 2 and not clips.multi_label:
        raise ConfigError(f'{settings.dataset} has one class, {clips.classes[0]}: there is nothing to tell apart')


def initial_model(settings, n_classes, state=None):
    """A Classifier with the encoder of --ckpt, or random weights; of a run that goes on (state: its checkpoint) that
    one's architecture, whose weights come later -> model, what data.log_mel is told but for the statistics"""
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(ASDAConfig)}
    given = {name: fields[name] for name in settings.given & fields.keys() - {'frames'}}
    fields['frames'] = settings.frames or ASDAConfig.frames
    told, encoder = {'frames': fields['frames'], 'window': 'hamming', 'repeat': settings.repeat}, None
    if state:
        fields = {**state['config'], **given}
        told = {name: {**fields, **state['input']}[name] for name in told}
    elif settings.ckpt:
        loaded = open_checkpoint(settings.ckpt)
        if others := sorted(given.keys() - {'drop_path', *HEAD_CHOICES}):
            raise ConfigError(f'{others[0]} comes from the checkpoint {settings.ckpt}: leave it out')
        fields, encoder = {**dataclasses.asdict(loaded.config), **given}, loaded.encoder
        told = {'frames': loaded.frames, 'window': loaded.spectrum['window'],
                'repeat': loaded.spectrum['repeat'] or settings.repeat}
    told['frames'] = settings.frames or told['frames']
    config = ranges.check_model(ASDAConfig(**{**fields, 'frames': told['frames'], 'drop_path': settings.drop_path}))
    config.frames = fields['frames'] if config.pooling == 'bands' else config.frames        # its longest window
    if config.n_mels != N_MELS:
        raise ConfigError(f'n_mels = {config.n_mels} must be {N_MELS}')
    torch.manual_seed(settings.seed)
    model = Classifier(config, n_classes)
    if encoder and settings.init == 'checkpoint':
        saving.load_weights(model.encoder, encoder.state_dict(), settings.ckpt)
    processes.in_float32(model.head_norm, model.head)
    return model, told


def make_optimizer(model, settings, process):
    """AdamW in groups: block i of L learns at layer_decay^(L - i) times the learning rate, all else at once it; weight
    decay on matrices, and on vectors (biases, norms, CLS) as decay_vectors says."""
    groups, L = {}, model.config.n_layer
    for name, p in model.named_parameters():
        _, blocks, i = (*name.split('.'), '')[:3]
        scale = settings.layer_decay ** (L - int(i)) if blocks == 'blocks' else 1.0
        decay = settings.weight_decay if settings.decay_vectors or p.squeeze().ndim > 1 else 0.0
        groups.setdefault((scale, decay), {'params': [], 'scale': scale, 'weight_decay': decay})['params'].append(p)
    process.print(f'AdamW: {count_parameters(model):,} parameters in {len(groups)} groups, learning rate scaled from '
                  f'{min(g["scale"] for g in groups.values()):.2g} to {max(g["scale"] for g in groups.values()):g}')
    return torch.optim.AdamW(groups.values(), lr=0.0, betas=(settings.beta1, settings.beta2), eps=1e-8, fused=True)


def lr_at(step, settings):
    """Linear from min_lr to the peak, cosine back to min_lr. (The authors do not scale min_lr by layer;
    here all of it is.)"""
    if step < settings.warmup_steps:
        return settings.min_lr + (settings.lr - settings.min_lr) * step / settings.warmup_steps
    progress = (step - settings.warmup_steps) / (settings.max_steps - settings.warmup_steps)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def loss_kind(settings, multi_label):
    return settings.loss if settings.loss != 'auto' else 'bce' if multi_label else 'cross_entropy'


def classification_loss(logits, labels, label_sum, settings, multi_label):
    """The part's share of the loss over the global batch: the sum over all parts is that loss.

    cross_entropy: mean over clips, with label smoothing. bce of a multi-label set: sum / sum of the (mixed) labels of
    the global batch (AudioSet), or / clips if none has a label. bce of single labels: sum over classes, mean over clips
    (Speech Commands). logits, labels (B, classes); label_sum: sum of the global batch's labels, which mixing with the
    reversed batch keeps.
    """
    if loss_kind(settings, multi_label) == 'cross_entropy':
        smooth = settings.label_smoothing
        labels = labels * (1 - smooth) + smooth / labels.shape[1]
        return -(labels * F.log_softmax(logits, dim=1)).sum() / settings.batch_size
    total = F.binary_cross_entropy_with_logits(logits, labels, reduction='sum')
    return total / (torch.where(label_sum > 0, label_sum, settings.batch_size) if multi_label else settings.batch_size)


def forward_backward(network, batch, spectrum, settings, multi_label, process, autocast):
    """Forward and backward over this process's clips in parts of mirrored places -> its share of the loss, times the
    processes: the mean over them is the loss of the global batch."""
    parts, clips, total = settings.accumulate, len(batch['lengths']), 0
    for i in range(parts):
        first, last = i * clips // (2 * parts), (i + 1) * clips // (2 * parts)      # and the places they are mixed with
        part = batch if parts == 1 else {
            name: torch.cat([value[first:last], value[clips - last:clips - first]]) if value.ndim else value
            for name, value in batch.items()}
        spec = data.log_mel(part['pcm'], part['lengths'], **spectrum, gain=part['gain'])
        spec, labels = data.augment(spec, part)
        if isinstance(network, DistributedDataParallel):
            network.require_backward_grad_sync = i == parts - 1             # the processes average their gradients once
        with autocast():
            logits = network(spec, part['draws'])
        share = classification_loss(logits.float(), labels, part['label_sum'], settings, multi_label)
        (share * process.world).backward()                      # DDP takes the mean over processes, the loss is a sum
        total = total + share.detach() * process.world
    return total


def update(model, optimizer, step, settings):
    """One update from the gradients -> their norm. If that is not finite, nothing changes, and nobody waits."""
    for group in optimizer.param_groups:
        group['lr'] = lr_at(step, settings) * group['scale']
    norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters())
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def train(settings, process, stop=None):
    """One fine-tuning run -> {'best': scores, 'last': scores} on the test split; None if a signal ended it. stop: who
    watches for signals, if somebody does already."""
    with running.Run(settings, process, ranges.FREE_IN_FINETUNE, report, stop) as run:
        clips, valid, test, whole = task_splits(
            settings.dataset, settings.data_dir, settings.fold, settings.labels_per_class, settings.seed,
            settings.validation_part, settings.test_dataset)
        check_labels(settings, clips, valid)
        model, told = initial_model(settings, len(clips.classes), run.state)
        mean, std = whole.statistics(told['window'])
        config, spectrum = model.config, {**told, 'mean': mean, 'std': std}
        autocast = run.precision(config.n_embd)
        process.print(f'{configurator.show(settings, (__file__,), leave_out=dataclasses.asdict(config))}\n{config}')
        process.print(f'{len(clips):,} training, {len(valid):,} validation, {len(test):,} test clips; '
                      f'{len(clips.classes)} classes; {told["frames"]} frames; log-mel mean {mean:.3f}, std {std:.3f}; '
                      f'{run.where}')
        process.print(forms.apply(model.to(process.device)))
        optimizer = make_optimizer(model, settings, process)
        run.kept = {'classes': clips.classes, 'multi_label': clips.multi_label, 'best': -math.inf}
        run.load(model, optimizer, spectrum, clips.fingerprint())
        if settings.head == 'probe' and not run.resuming:
            begin_as_probe(model, clips, spectrum, process, autocast, settings.workers)
        network = run.network()

        places = data.mirrored_places(settings.batch_size, process.rank, process.world)
        batches = data.FinetuneBatches(
            clips, told['frames'], settings.batch_size, places, settings.seed, config.n_layer, settings.roll,
            settings.noise, settings.input_mask, settings.mixup, settings.mixup_probability,
            sampling_weights(clips) if settings.weighted else None, settings.epoch_clips)
        judge = Judge(run, spectrum, valid, test)

        for step, batch in run.steps(batches):
            model.train()
            loss = forward_backward(network, batch, spectrum, settings, clips.multi_label, process, autocast)
            norm = update(model, optimizer, step, settings)
            if run.finish(step, {'loss': loss, 'grad_norm': norm}, judge.choose if len(valid) else None):
                return None
        return judge.test()


def report(values, run):
    """The words of a step's line, and what the log is told beside the measures."""
    values['lr'] = lr_at(values['step'] - 1, run.settings)
    return f'loss {values["loss"]:.4f}  lr {values["lr"]:.1e}'


def train_folds(settings, process, stop):
    """Fine-tune once per fold and report each, mean and spread."""
    folds = read_meta(os.path.join(settings.data_dir, settings.dataset))['folds']
    if not folds:
        raise ConfigError(f'{settings.dataset} has no folds')
    results = {}
    for name in folds:
        if stop.agreed_now():
            return process.print(f'stopped before fold {name}; to go on, run the same command with --resume')
        out = os.path.join(settings.out_dir, f'fold-{name}')
        begun = any(os.path.exists(os.path.join(out, ckpt)) for ckpt in ('ckpt.pt', 'ckpt.1.pt'))
        resume, overwrite = settings.resume and begun, settings.overwrite or settings.resume and not begun
        process.print(f'fold {name}')
        results[name] = train(settings.but(fold=name, out_dir=out, resume=resume, overwrite=overwrite), process, stop)
        if results[name] is None:
            return None
    for which in results[folds[0]]:
        values = [main_score(result[which]) for result in results.values()]
        shown = ', '.join(f'fold {name} {value:.1%}' for name, value in zip(folds, values))
        process.print(f'{which} checkpoints: {shown}; mean {np.mean(values):.1%}, '
                      f'standard deviation {np.std(values, ddof=1) if len(values) > 1 else 0:.1%}')


def run(argv):
    settings = configurator.configure(__file__, argv, (os.path.join(ROOT, 'model.py'), 'ASDAConfig'))
    process = processes.start(settings.device, settings.threads, settings.deterministic)
    check(settings, process.world)
    with processes.Stop(process) as stop:
        (train_folds if settings.fold == 'all' else train)(settings, process, stop)


if __name__ == '__main__':
    processes.main(run)
