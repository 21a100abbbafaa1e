"""Runs of both stages, replayed by hand: every weight of the checkpoint and every number of the log after five steps.
   python -m pytest tests/test_replay.py

The replay takes from the code only what has tests of its own: the networks (model.ASDA, model.Classifier), data.fbank,
data.block_masks and the generators of engine.randomness. Clips are read from the set's files with numpy; batches,
augmentation, losses with their gradients, clipping, AdamW, schedules and the teacher's average are written out here, in
float64 from the gradients on.

Tolerance: the run adds up in float32 (relative 1e-7, in gradients some 1e-6), and AdamW's first steps, near
lr * sign(gradient), enlarge that where a gradient is near zero: weights differ by 1e-6 here, updates are 1e-2. The
keys' biases have no gradient but rounding, and are left out.
"""
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch

import finetune
import model as networks
import prepare
import pretrain
from audio.clips import carve_validation, open_clips
from data import block_masks, fbank
from engine.randomness import random, torch_random

from .conftest import call, write_wav

CPU = torch.device('cpu')
FRAMES, SAMPLES = 32, 31 * 160 + 400
STEPS, WARMUP, BATCH, SEED = 5, 2, 4, 3
COMMON = ['--workers=0', '--threads=1', '--device=cpu', f'--seed={SEED}', f'--batch_size={BATCH}',
          f'--max_steps={STEPS}', f'--warmup_steps={WARMUP}', '--log_interval=1', '--save_interval=100']
SIZE = {'n_layer': 2, 'n_head': 2, 'n_embd': 16, 'frames': FRAMES, 'decoder_groups': 4}
PRETRAINING = {**SIZE, 'decoder_layers': 2, 'n_students': 3, 'mask_block': 2, 'mask_ratio': 0.6, 'mask_adjust': 0.3,
               'mask_noise': 0.5, 'alpha': 0.3, 'utterance_scale': 2.5}


def options(values):
    return [f'--{name}={value}' for name, value in values.items()]


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    """A folder with the set `sounds`: classes of 8, 4 and 2 clips to train on, shorter and longer than the input, and
    one each to test; and `many`, the same clips with one or two of the three labels each."""
    root, rng, rows = tmp_path_factory.mktemp('sets'), np.random.default_rng(5), []
    for label, name in enumerate('a' * 9 + 'b' * 5 + 'c' * 3):
        time = np.arange(rng.integers(1500, 9000)) / 16000
        tone = 0.2 * np.sin(2 * np.pi * rng.uniform(200, 4000) * time)
        write_wav(f'{root}/source/{name}/{label}.wav', tone + 0.02 * rng.standard_normal(len(time)))
        rows.append(f'{name}/{label}.wav,{"test" if label in (0, 9, 14) else "train"}\n')
    (root / 'split.csv').write_text(''.join(rows))
    assert call(prepare.run, 'folder', f'--source={root}/source', f'--split_file={root}/split.csv', '--workers=0',
                f'--out_dir={root}/sounds').code == 0
    shutil.copytree(root / 'sounds', root / 'many')
    meta = json.loads((root / 'many' / 'meta.json').read_text())
    (root / 'many' / 'meta.json').write_text(json.dumps({**meta, 'name': 'many', 'multi_label': True}))
    for split in ('train', 'test'):
        path = root / 'many' / f'{split}-00000.npz'
        with np.load(path) as stored:
            bits = np.eye(3, dtype=bool)[stored['labels']]
            bits[::2, 2] = True
            arrays = {**stored, 'labels': np.packbits(bits, axis=1)}
        np.savez(path, **arrays)
    return str(root)


def training_clips(sets, name='sounds'):
    """The training split, read with numpy -> [int16 samples], labels (clips, classes) float64"""
    pcm = np.fromfile(os.path.join(sets, name, 'train-00000.pcm'), '<i2')
    with np.load(os.path.join(sets, name, 'train-00000.npz')) as index:
        waves = [pcm[first:first + length] for first, length in zip(index['offsets'], index['lengths'])]
        labels = index['labels']
    return waves, np.unpackbits(labels, axis=1, count=3) * 1.0 if labels.ndim == 2 else np.eye(3)[labels]


def order(clips, step, weights=None, per_epoch=None):
    """The clips of the batch at a step: a permutation of all in each epoch, or a draw by weights without replacement
    (the smallest of exponential waiting times)."""
    per_epoch, chosen = per_epoch or clips, []
    for position in range(step * BATCH, (step + 1) * BATCH):
        epoch, place = divmod(position, per_epoch)
        generator = random(SEED, 'order', epoch)
        if weights is None:
            drawn = generator.permutation(clips)
        else:
            waiting = generator.standard_exponential(clips) / weights
            drawn = generator.permutation(np.argpartition(waiting, per_epoch - 1)[:per_epoch])
        chosen.append(int(drawn[place]))
    return chosen


def log_mels(waves, window, gains=None, repeat=False):
    """[int16 samples] -> (clips, FRAMES, 128): mean taken off, gain, log-mel, zeros behind the clip's last frame."""
    rows = np.zeros((len(waves), SAMPLES), np.float32)
    for i, wave in enumerate(waves):
        wave = wave / 32768 - wave.mean() / 32768
        wave = wave * (1 if gains is None else gains[i])
        rows[i, :len(wave)] = wave
        if repeat:
            rows[i] = np.resize(wave, SAMPLES)
    lengths = torch.tensor([SAMPLES if repeat else len(wave) for wave in waves])
    return fbank(torch.from_numpy(rows), lengths, window)


def statistics(waves, window):
    """Mean and standard deviation of the log-mel values of all frames of these clips, not cut."""
    values = np.concatenate([fbank(torch.from_numpy(wave / 32768 - wave.mean() / 32768)[None].float(),
                                   torch.tensor([len(wave)]), window).double().flatten() for wave in waves])
    return float(values.mean()), float(values.std())


class AdamW:
    """Decoupled weight decay, then Adam (Loshchilov and Hutter 2019, algorithm 2), in float64."""

    def __init__(self, parameters, beta1, beta2, decays):
        self.parameters, self.beta1, self.beta2, self.decays = parameters, beta1, beta2, decays
        self.values = {name: p.detach().double() for name, p in parameters.items()}
        self.first = {name: torch.zeros_like(p) for name, p in self.values.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.values.items()}
        self.updates = 0

    def step(self, gradients, rates):
        """gradients, rates: {name: tensor}, {name: learning rate}"""
        self.updates += 1
        for name, value in self.values.items():
            g, m, v = gradients[name], self.first[name], self.second[name]
            m.copy_(self.beta1 * m + (1 - self.beta1) * g)
            v.copy_(self.beta2 * v + (1 - self.beta2) * g ** 2)
            m_hat, v_hat = m / (1 - self.beta1 ** self.updates), v / (1 - self.beta2 ** self.updates)
            value.mul_(1 - rates[name] * self.decays[name]).sub_(rates[name] * m_hat / (v_hat.sqrt() + 1e-8))
            self.parameters[name].data.copy_(value)


def is_vector(name):
    return name.endswith('.bias') or 'norm' in name or name.endswith('encoder.cls')


def warm_cosine(step, lowest, peak):
    """From lowest to peak in WARMUP steps, then down to lowest at STEPS along half a cosine."""
    if step < WARMUP:
        return lowest + (peak - lowest) * step / WARMUP
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2


def assert_same_weights(out_dir, wanted):
    """The model in ckpt.pt holds exactly these weights, to rounding; keys' biases apart."""
    found = torch.load(os.path.join(out_dir, 'ckpt.pt'), weights_only=True)['model']
    assert found.keys() == wanted.keys()
    for name, ours in found.items():
        theirs = wanted[name]
        if name.endswith('attn.qk.bias'):                                   # rows: queries, then keys
            ours, theirs = ours.chunk(2)[0], theirs.chunk(2)[0]
        off = (ours.double() - theirs.double()).abs()                       # AdamW divides by the gradient: where it
        assert off.max() < 1e-4, name                                       # is next to nothing, rounding shows
        assert (off > 1e-5 + 1e-4 * theirs.abs()).float().mean() < 1e-3, name


def log_of(out_dir, key='loss'):
    with open(os.path.join(out_dir, 'log.jsonl')) as f:
        return [line for line in map(json.loads, f) if key in line]


def break_at(steps, network, monkeypatch):
    """At these steps of training the network's first result is NaN."""
    forward, calls = network.forward, []

    def wrapped(self, *args, **kwargs):
        result = forward(self, *args, **kwargs)
        if not self.training:
            return result
        calls.append(1)
        factor = math.nan if len(calls) - 1 in steps else 1
        return (result[0] * factor, *result[1:]) if isinstance(result, tuple) else result * factor
    monkeypatch.setattr(network, 'forward', wrapped)


# --------------------------------------------------------------------------------------------------------- pre-training

def pretraining_batch(waves, step, join):
    """Random crops of BATCH clips; join: followed by crops of others until the input is full."""
    batch = []
    for place, i in enumerate(order(len(waves), step)):
        generator, parts, left = random(SEED, 'crop', step, place), [], SAMPLES
        while left and (join or not parts):
            i = i if not parts else int(generator.integers(len(waves)))
            start = int(generator.integers(max(len(waves[i]) - left, 0) + 1))
            parts.append(waves[i][start:start + left])
            left -= len(parts[-1])
        batch.append(np.concatenate(parts))
    return batch


def replay_pretraining(waves, fields, join, window, mean, std, decay, decay_vectors, lr, betas, clip, ema, broken=()):
    """-> all weights at the end, [numbers that the log should have], how often the gradient was clipped"""
    torch.manual_seed(SEED)
    config = networks.ASDAConfig(**fields)
    asda, (rows, columns), log, clipped = networks.ASDA(config), config.grid, [], []
    trained = {name: p for name, p in asda.named_parameters() if not name.startswith('teacher.')}
    teacher = {name: p.double() for name, p in asda.teacher.state_dict().items()}
    optimizer = AdamW(trained, *betas, {n: decay if decay_vectors or not is_vector(n) else 0.0 for n in trained})
    for step in range(STEPS):
        spec = (log_mels(pretraining_batch(waves, step, join), window) - mean) / (2 * std)
        mask = block_masks(BATCH, config.n_students, config.grid, config.mask_ratio, config.mask_block,
                           torch_random(CPU, SEED, 'mask', step), config.mask_adjust)
        noise = torch.cat([torch.randn(config.n_students, rows * columns, config.n_embd,
                                       generator=torch_random(CPU, SEED, 'noise', step, place))
                           for place in range(BATCH)]) * config.mask_noise
        loss, measures = asda(spec, mask, noise)
        gradients = dict(zip(trained, torch.autograd.grad(loss, trained.values())))
        gradients = {name: g.double() for name, g in gradients.items()}
        norm = math.sqrt(sum(float((g ** 2).sum()) for g in gradients.values()))
        factor = min(1, clip / norm)
        rate, average = warm_cosine(step, 0, lr), ema[0] + (ema[1] - ema[0]) * min(step / ema[2], 1)
        if step not in broken:
            clipped.append(factor < 1)
            optimizer.step({name: factor * g for name, g in gradients.items()}, dict.fromkeys(trained, rate))
        for name, value in teacher.items():
            value.copy_(average * value + (1 - average) * optimizer.values[f'encoder.{name}'])
            asda.teacher.get_parameter(name).data.copy_(value)
        utterance = fields['alpha'] * fields['utterance_scale'] * measures['utterance'].item()
        log.append({**{name: value.item() for name, value in measures.items()}, 'step': step + 1, 'grad_norm': norm,
                    'lr': rate, 'ema': average, 'loss': measures['frame'].item() + utterance})
    return {**optimizer.values, **{f'teacher.{name}': value for name, value in teacher.items()}}, log, clipped


PRETRAIN = {'norm_mean': -6.0, 'norm_std': 2.5, 'lr': 0.02, 'beta1': 0.8, 'beta2': 0.9, 'weight_decay': 0.3,
            'ema_start': 0.5, 'ema_end': 0.9, 'ema_steps': 3}


def pretrain_both(sets, out_dir, clip=1e9, accumulate=1, join=False, window='hamming', decay_vectors=False,
                  broken=()):
    """pretrain.run and its replay with the same settings -> what replay_pretraining returns"""
    with pytest.MonkeyPatch.context() as patch:
        break_at(broken, networks.ASDA, patch)
        result = call(pretrain.run, *COMMON, *options({**PRETRAINING, **PRETRAIN}), '--dtype=float32',
                      '--dataset=sounds', f'--data_dir={sets}', f'--out_dir={out_dir}', f'--grad_clip={clip}',
                      f'--accumulate={accumulate}', f'--window={window}', f'--decay_vectors={decay_vectors}',
                      f'--short_clips={"join" if join else "pad"}')
    assert result.code == 0, result.err
    p = PRETRAIN
    return replay_pretraining(
        training_clips(sets)[0], PRETRAINING, join, window, p['norm_mean'], p['norm_std'], p['weight_decay'],
        decay_vectors, p['lr'], (p['beta1'], p['beta2']), clip, (p['ema_start'], p['ema_end'], p['ema_steps']), broken)


@pytest.mark.parametrize('how', [
    {}, {'accumulate': 2, 'join': True, 'window': 'hanning', 'decay_vectors': True}], ids=['plain', 'the rest'])
def test_pretraining_is_what_is_written_here(sets, tmp_path, how):
    """Student, decoder, teacher, losses, gradient norm, learning rate and decay of five steps = the replay's."""
    weights, log, clipped = pretrain_both(sets, tmp_path, clip=6.5, **how)
    assert True in clipped and False in clipped                             # so that clipping is seen to be right
    assert_same_weights(tmp_path, weights)
    for ours, theirs in zip(log_of(tmp_path), log, strict=True):
        if 'accumulate' in how:     # spreads and `explained` are then means over the parts
            theirs = {name: theirs[name] for name in ('loss', 'frame', 'utterance', 'grad_norm', 'lr', 'ema')}
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=2e-5, abs=1e-9)


def test_a_step_that_is_not_finite_changes_the_teacher_alone(sets, tmp_path):
    """The third of five losses is NaN: student, decoder and AdamW's state stay, the teacher's average moves on to
    the student, schedules go on; and with the last one NaN, the checkpoint counts it."""
    weights, log, _ = pretrain_both(sets, tmp_path, broken={2, 4})
    assert_same_weights(tmp_path, weights)
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['bad_steps'] == 1
    lines = {line['step']: line for line in log_of(tmp_path)}
    for theirs in log:
        if theirs['step'] not in (3, 5):
            assert {name: lines[theirs['step']][name] for name in theirs} == pytest.approx(theirs, rel=2e-5, abs=1e-9)
    assert [line['step'] for line in log_of(tmp_path, 'skipped_in_a_row')] == [3, 5]


def relative_changes(before, after):
    return [abs(ours['loss'] / theirs['loss'] - 1) for ours, theirs in zip(after, before, strict=True)]


def test_pretraining_in_bfloat16(sets, tmp_path):
    """Its losses are float32's to 2 %, and not to float32's rounding: bfloat16 has 8 bits where that has 24."""
    logs = []
    for dtype in ('float32', 'bfloat16'):
        assert call(pretrain.run, *COMMON, *options({**PRETRAINING, **PRETRAIN}), '--dataset=sounds', '--lr=1e-3',
                    f'--data_dir={sets}', f'--dtype={dtype}', f'--out_dir={tmp_path}/{dtype}').code == 0
        logs.append(log_of(tmp_path / dtype))
    assert all(1e-5 < change < 0.02 for change in relative_changes(*logs))
    assert torch.load(tmp_path / 'bfloat16' / 'ckpt.pt', weights_only=True)['settings']['dtype'] == 'bfloat16'


def test_what_pretraining_says_of_its_features(sets, tmp_path):
    """Effective rank, chance and kNN accuracy of the CLS, by numpy from the checkpoint: a part of the clips is
    held out; the mean and standard deviation of the clips that are not held out."""
    assert call(pretrain.run, *COMMON, *options({**PRETRAINING, **PRETRAIN}), '--dtype=float32', '--dataset=many',
                '--eval_dataset=sounds', '--window=hanning', f'--data_dir={sets}',
                f'--out_dir={tmp_path}').code == 0
    _, scores = log_of(tmp_path, 'knn_cls')         # of step 0 and the end
    clips = open_clips(['sounds'], sets)
    parts = carve_validation(clips, 0.3)
    waves = [[part.read(i) for i in range(len(part))] for part in parts]
    mean, std = statistics(waves[0], 'hanning')
    encoder = networks.Encoder(networks.ASDAConfig(**PRETRAINING))
    state = torch.load(tmp_path / 'ckpt.pt', weights_only=True)['model']
    encoder.load_state_dict({name[8:]: value for name, value in state.items() if name.startswith('encoder.')})
    valid = []
    for wave in waves[1]:                           # whole clips, frame by frame: windows of the input length
        total, cls = 1 + (len(wave) - 400) // 160, []
        while len(cls) < total:
            first = max(min(len(cls), total - FRAMES), 0)
            spec = (log_mels([wave[first * 160:][:SAMPLES]], 'hanning') - mean) / (2 * std)
            with torch.no_grad():
                x, states = encoder.norm(torch.cat([encoder.cls, encoder.embed(spec)], dim=1)), []
                for block in encoder.blocks:
                    x, _ = block(x)
                    states.append(x[0, 0])
            cls += [torch.stack(states).mean(dim=0).double().numpy()] * (min(first + FRAMES, total) - len(cls))
        valid.append(np.mean(cls, axis=0))
    valid = np.array(valid)
    values = np.linalg.svd(valid - valid.mean(axis=0), compute_uv=False)
    share = values[values > 1e-6] / values.sum()
    assert scores['effective_rank'] == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-3)
    right = parts[1].label == np.bincount(parts[1].label).argmax()
    assert scores['chance'] == pytest.approx(right.mean())
    assert len(waves[0]) <= 10              # all are neighbours, so that a commonest class wins; of several, the nearer
    votes = np.bincount(parts[0].label, minlength=3)
    best, several = votes[parts[1].label] == votes.max(), (votes == votes.max()).sum() > 1
    assert scores['knn_cls'] <= best.mean() + 1e-9 and (several or scores['knn_cls'] == pytest.approx(best.mean()))


# ---------------------------------------------------------------------------------------------------------- fine-tuning

FINETUNE = {'lr': 0.02, 'min_lr': 0.004, 'layer_decay': 0.5, 'beta1': 0.8, 'beta2': 0.9, 'weight_decay': 0.3,
            'drop_path': 0.5, 'validation_part': 0, 'eval_interval': 100, 'input_mask': 0.4}

SMOOTHING = 0.1                                                             # of cross_entropy; bce has none


def finetuning_batch(waves, chosen, step, how):
    """Augmented clips and every number drawn for them, in the order of drawing -> waves, draws (BATCH, L, 2), changes
    of the spectrogram."""
    cut, gains, depths, changes = [], [], [], []
    for place, i in enumerate(chosen):
        generator = random(SEED, 'augment', step, place)
        wave = waves[i]
        if how['roll']:
            shift = int(generator.integers(len(wave)))
            wave = np.concatenate([wave[len(wave) - shift:], wave[:len(wave) - shift]])
        cut.append(wave[:SAMPLES])
        gains.append(np.float32(generator.beta(10, 10) + 0.5) if how['roll'] else 1)
        spans = []
        for size in (128, FRAMES):
            width = generator.random() * FINETUNE['input_mask'] * size
            first = int(generator.random() * (size - width))
            spans.append(slice(first, first + int(width)))
        level, frames = (np.float32(generator.random() * 0.1), int(generator.integers(-10, 10))) if how['noise'] else (
            0, 0)
        depths.append(generator.random((SIZE['n_layer'], 2), dtype=np.float32))
        noise = torch.zeros(FRAMES, 128)
        if how['noise']:
            torch.rand(FRAMES, 128, generator=torch.Generator().manual_seed(int(generator.integers(2 ** 62))),
                       out=noise)
        changes.append((noise.numpy() * level, frames, spans))
    return cut, gains, torch.from_numpy(np.stack(depths)), changes


def augmented(spec, labels, changes, step, mixup):
    """Noise, shift in time, mixing with the batch reversed, one mask over bands and one over frames, in this order."""
    spec = [np.roll(x + noise, frames, axis=0) for x, (noise, frames, _) in zip(spec, changes)]
    generator, share = random(SEED, 'mixup', step), 1.0
    if mixup and generator.random() < mixup['probability']:
        share = generator.beta(mixup['beta'], mixup['beta'])
    mixed = [share * x + (1 - share) * y for x, y in zip(spec, spec[::-1])]
    for x, (_, _, (bands, times)) in zip(mixed, changes):
        x[:, bands] = 0
        x[times] = 0
    return np.stack(mixed), share * labels + (1 - share) * labels[::-1], share


def loss_and_gradient(logits, labels, label_sum, loss, multi_label):
    """The loss of a batch and its derivative by the logits, in numpy and float64. cross_entropy: mean over clips. bce:
    a sum over clips and classes, by the number of labels of a multi-label batch, else by the number of clips."""
    if loss == 'cross_entropy':
        labels = labels * (1 - SMOOTHING) + SMOOTHING / labels.shape[1]
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        return -(labels * np.log(shares)).sum() / BATCH, (shares - labels) / BATCH
    chance = 1 / (1 + np.exp(-logits))
    total = -(labels * np.log(chance) + (1 - labels) * np.log(1 - chance)).sum()
    count = label_sum if multi_label else BATCH
    return total / count, (chance - labels) / count


def replay_finetuning(waves, labels, encoder, how, broken=()):
    """-> all weights at the end, [numbers that the log should have], the shares of mixup"""
    torch.manual_seed(SEED)
    classifier = networks.Classifier(networks.ASDAConfig(**SIZE, drop_path=FINETUNE['drop_path']), labels.shape[1])
    if encoder:
        classifier.encoder.load_state_dict(encoder)
    trained = dict(classifier.named_parameters())
    decays = {n: FINETUNE['weight_decay'] if how['decay_vectors'] or not is_vector(n) else 0.0 for n in trained}
    optimizer, log, shares = AdamW(trained, FINETUNE['beta1'], FINETUNE['beta2'], decays), [], []
    scales = {n: FINETUNE['layer_decay'] ** (SIZE['n_layer'] - int(n.split('.')[2])) if n.startswith('encoder.blocks')
              else 1.0 for n in trained}
    mean, std = statistics(waves, 'hamming')
    for step in range(STEPS):
        weights = labels @ (1000 / (labels.sum(axis=0) + 0.01)) if how['weighted'] else None
        chosen = order(len(waves), step, weights, how['weighted'])
        cut, gains, depths, changes = finetuning_batch(waves, chosen, step, how)
        spec = (log_mels(cut, 'hamming', gains, how['repeat']) - mean) / (2 * std)
        spec, mixed, share = augmented(spec.numpy(), labels[chosen], changes, step, how['mixup'])
        shares.append(share)
        logits = classifier(torch.from_numpy(spec).float(), depths)
        loss, gradient = loss_and_gradient(logits.detach().double().numpy(), mixed, labels[chosen].sum(), how['loss'],
                                           how['set'] == 'many')
        gradient = torch.from_numpy(gradient).float()
        gradients = dict(zip(trained, torch.autograd.grad(logits, trained.values(), gradient)))
        rate = warm_cosine(step, FINETUNE['min_lr'], FINETUNE['lr'])
        if step not in broken:
            optimizer.step({n: g.double() for n, g in gradients.items()}, {n: rate * scales[n] for n in trained})
        log.append({'step': step + 1, 'loss': loss, 'lr': rate})
    return optimizer.values, log, shares


HOW = {'set': 'sounds', 'from_checkpoint': False, 'loss': 'cross_entropy', 'roll': True, 'noise': True, 'repeat': False,
       'mixup': {'beta': 0.5, 'probability': 0.6}, 'weighted': 0, 'accumulate': 1, 'decay_vectors': False}


@pytest.fixture(scope='module')
def pretrained(sets, tmp_path_factory):
    out = tmp_path_factory.mktemp('pretrained')
    assert call(pretrain.run, *COMMON, *options({**PRETRAINING, **PRETRAIN}), '--dataset=sounds',
                f'--data_dir={sets}', f'--out_dir={out}').code == 0
    return out / 'ckpt.pt'


def finetune_both(sets, pretrained, out_dir, how, broken=()):
    """finetune.run and its replay with the same settings -> what replay_finetuning returns"""
    argv = [f'--{name}={how[name]}' for name in ('loss', 'roll', 'noise', 'repeat', 'accumulate', 'decay_vectors')]
    argv += [f'--dataset={how["set"]}', f'--ckpt={pretrained}'] if how['from_checkpoint'] else [
        f'--dataset={how["set"]}', '--init=scratch', *options(SIZE)]
    argv += [f'--mixup={how["mixup"]["beta"]}', f'--mixup_probability={how["mixup"]["probability"]}'] if how[
        'mixup'] else []
    argv += [f'--label_smoothing={SMOOTHING}'] if how['loss'] == 'cross_entropy' else []
    argv += ['--weighted', f'--epoch_clips={how["weighted"]}'] if how['weighted'] else []
    with pytest.MonkeyPatch.context() as patch:
        break_at(broken, networks.Classifier, patch)
        result = call(finetune.run, *COMMON, *options(FINETUNE), '--dtype=float32', *argv, f'--data_dir={sets}',
                      f'--out_dir={out_dir}')
    assert result.code == 0, result.err
    encoder = {name.removeprefix('encoder.'): tensor for name, tensor in
               torch.load(pretrained, weights_only=True)['model'].items() if name.startswith('encoder.')}
    encoder = encoder if how['from_checkpoint'] else None
    return replay_finetuning(*training_clips(sets, how['set']), encoder, how, broken)


@pytest.mark.parametrize('how', [
    {}, {'from_checkpoint': True, 'loss': 'bce', 'noise': False, 'repeat': True, 'weighted': 6, 'accumulate': 2},
    {'set': 'many', 'loss': 'bce', 'roll': False, 'decay_vectors': True}], ids=['plain', 'weighted', 'many labels'])
def test_finetuning_is_what_is_written_here(sets, pretrained, tmp_path, how):
    """Classifier, losses and learning rate of five steps = the replay's."""
    weights, log, shares = finetune_both(sets, pretrained, tmp_path, {**HOW, **how})
    assert 1 in shares and not all(share == 1 for share in shares)          # mixed and not mixed, so that both are seen
    assert_same_weights(tmp_path, weights)
    for ours, theirs in zip(log_of(tmp_path), log, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=2e-5, abs=1e-9)


def test_a_step_of_finetuning_that_is_not_finite_changes_nothing(sets, pretrained, tmp_path):
    """The logits of the third of five steps, and of the last, are NaN."""
    weights, _, _ = finetune_both(sets, pretrained, tmp_path, HOW, broken={2, 4})
    assert_same_weights(tmp_path, weights)
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['bad_steps'] == 1
    assert [line['step'] for line in log_of(tmp_path, 'skipped_in_a_row')] == [3, 5]


def test_finetuning_in_bfloat16(sets, pretrained, tmp_path):
    """As in pre-training."""
    logs = []
    for dtype in ('float32', 'bfloat16'):
        assert call(finetune.run, *COMMON, '--dataset=sounds', f'--ckpt={pretrained}', '--validation_part=0',
                    f'--data_dir={sets}', '--lr=1e-2', f'--dtype={dtype}', f'--out_dir={tmp_path}/{dtype}').code == 0
        logs.append(log_of(tmp_path / dtype))
    assert all(1e-5 < change < 0.02 for change in relative_changes(*logs))
