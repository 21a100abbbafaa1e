"""The authors' arrangement equals ours; operations are counted right; bench.py measures what it says.
   python -m pytest tests/test_bench.py"""
import contextlib
import io
import itertools
import json
import math
import os
import types

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import model as model_file
import pretrain
from audio import WINDOWS
from engine import processes
from fast import forms
from model import ASDA, ASDAConfig
from tools import authors_arrangement as authors
from tools import bench, describe, everything, measuring, sections

from .conftest import ROOT, TINY, call, is_one_line_error

SMALL = {'n_layer': 2, 'n_head': 4, 'n_embd': 32, 'frames': 96, 'decoder_layers': 2, 'decoder_groups': 4,
         'n_students': 3, 'mask_block': 2}
SHORT = [*TINY, '--batch_size=4', '--steps=2', '--warmup=1', '--threads=1']
SETTINGS = types.SimpleNamespace(lr=1e-2, beta1=0.9, beta2=0.95, weight_decay=0.05, decay_vectors=True, grad_clip=0.5)


def inputs(config, dtype, clips=2):
    generator = torch.Generator().manual_seed(1)
    spec = torch.randn(clips, config.frames, config.n_mels, generator=generator).to(dtype)
    mask = data.block_masks(clips, config.n_students, config.grid, config.mask_ratio, config.mask_block, generator)
    noise = torch.randn(clips * config.n_students, mask.shape[2], config.n_embd, generator=generator).to(dtype)
    return spec, mask, noise


def pair(dtype, **changes):
    """Ours and the authors' arrangement with the same weights; LayerNorms and biases too have values of their own, and
    the teacher has others than the student."""
    torch.manual_seed(0)
    config = ASDAConfig(**{**SMALL, **changes})
    ours = ASDA(config)
    with torch.no_grad():
        for p in ours.parameters():
            p += 0.1 * torch.randn_like(p)
    theirs = authors.Arrangement(config)
    theirs.load_state_dict(ours.state_dict())                               # strict: the same names and shapes
    assert {type(module).__module__ for model in (theirs.encoder, theirs.teacher) for block in model.blocks
            for module in (model, block, block.attn)} == {authors.__name__}
    return config, ours.to(dtype), theirs.to(dtype)


# Losses and targets are float32 in either model, whatever the weights: float64 tightens all but the last operations.
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 2e-6), (torch.float32, 1e-4)], ids=['float64', 'float32'])
@pytest.mark.parametrize('diff_lambda', [0.0, 0.3])
@pytest.mark.parametrize('head_norm', ['per_head', 'all', 'none'])
def test_the_authors_arrangement_is_the_same_model(head_norm, diff_lambda, dtype, tolerance):
    """Loss, measures and every gradient; then clipping, AdamW and EMA of one step: every weight."""
    config, ours, theirs = pair(dtype, head_norm=head_norm, diff_lambda=diff_lambda, utterance_scale=3.0)
    spec, mask, noise = inputs(config, dtype)
    (loss, measures), (their_loss, their_measures) = ours(spec, mask, noise), theirs(spec, mask, noise)
    assert loss.item() == pytest.approx(their_loss.item(), rel=tolerance)
    del their_measures['pred_std']                                          # of all students; ours is of the first
    for name, value in their_measures.items():
        assert measures[name].item() == pytest.approx(value.item(), rel=max(tolerance, 1e-5)), name
    loss.backward()
    their_loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert {name for name, p in ours.named_parameters() if p.grad is not None} == set(gradients)
    largest = max(gradient.abs().max() for gradient in gradients.values())  # some gradients are zero but for rounding
    for name, p in ours.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, gradients[name], rtol=50 * tolerance, atol=float(tolerance * largest))

    # AdamW's first step has the size of lr whatever the gradient, so that rounding decides where a gradient is zero:
    # give both the same gradients.
    norm = torch.nn.utils.clip_grad_norm_(ours.parameters(), SETTINGS.grad_clip)
    assert norm > SETTINGS.grad_clip                                        # the clip is active
    their_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), SETTINGS.grad_clip, foreach=False)
    assert their_norm.item() == pytest.approx(norm.item(), rel=1e-4)
    for (_, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters()):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=50 * tolerance, atol=float(tolerance * largest))
            q.grad.copy_(p.grad)
    optimizer = pretrain.make_optimizer(ours, SETTINGS, types.SimpleNamespace(
        print=lambda *text: None, device=torch.device('cpu')))
    for group in optimizer.param_groups:
        group['lr'] = SETTINGS.lr
    before = ours.teacher.cls.clone()
    for model, steps in ((ours, optimizer), (theirs, authors.make_optimizer(theirs, SETTINGS))):
        steps.step()
        model.update_teacher(0.9)
    assert not torch.equal(before, ours.teacher.cls)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('head_norm', ['per_head', 'all'])
def test_bfloat16_is_as_near_to_float64_as_the_plain_arrangement(head_norm):
    """What saves time in bfloat16 (norms that return it, maps in memory) costs no accuracy: the error of the loss and
    of all gradients together against float64 is at most 1.5 times that of the authors' arrangement under autocast."""
    config, exact, _ = pair(torch.float64, head_norm=head_norm)
    spec, mask, noise = inputs(config, torch.float64)

    def gradient(model, spec, noise, dtype):
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(spec, mask, noise)[0]
        loss.backward()
        return loss.double(), torch.cat([p.grad.double().flatten() for _, p in sorted(model.named_parameters())
                                         if p.grad is not None])
    want = gradient(exact, spec, noise, torch.float64)
    _, ours, theirs = pair(torch.float32, head_norm=head_norm)
    errors = []
    for model in (ours, theirs):
        got = gradient(model, spec.float(), noise.float(), torch.bfloat16)
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(got, want)])
    assert errors[0][1] <= 1.5 * errors[1][1] and errors[0][0] <= 1.5 * errors[1][0] + 1e-3, errors
    assert errors[0][1] < 0.1


def test_a_step_of_the_arrangement_trains():
    config, _, model = pair(torch.float32)
    optimizer = authors.make_optimizer(model, SETTINGS)
    spec, mask, _ = inputs(config, torch.float32)
    losses = [authors.train_step(model, optimizer, spec, mask, SETTINGS, 0.999)[0].item() for _ in range(6)]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


@pytest.mark.parametrize('change', [{'cls_position': 'middle'}, {'pooling': 'mean'}, {'utterance_target': 'raw'},
                                    {'target_layers': 1}], ids=str)
def test_the_arrangement_refuses_what_the_authors_code_has_not(change):
    with pytest.raises(ValueError, match='only'):
        authors.Arrangement(ASDAConfig(**SMALL, **change))


@pytest.mark.parametrize('window', WINDOWS)
def test_spectrograms_clip_by_clip(window):
    """Clips longer and shorter than the input, against data.log_mel."""
    pcm = torch.randint(-9000, 9000, (3, 16000), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([16000, 5000, 400])
    for row, length in zip(pcm, lengths):
        row[length:] = 0
    for frames in (64, 112):
        spectrum = {'frames': frames, 'window': window, 'mean': -4.0, 'std': 4.0}
        torch.testing.assert_close(data.log_mel(pcm, lengths, **spectrum),
                                   authors.spectrograms(pcm, lengths, **spectrum), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('changes', [{}, {'diff_lambda': 0.0, 'n_students': 2}, {'ffn_ratio': 4.0, 'frames': 64}],
                         ids=str)
def test_flops_are_those_that_pytorch_counts(changes, monkeypatch):
    """Exactly, by kind of operation. One group, as PyTorch's counter takes the weight gradient of a grouped convolution
    for `groups` times what it is; grouped ones are compared in the forward pass. Without the measures that are logged,
    variances by matmul, which are no part of the training."""
    monkeypatch.setattr(model_file, 'masked_variance', lambda x, weight: x.flatten(0, -2).var(dim=0), raising=False)
    config = ASDAConfig(**{**SMALL, **changes, 'decoder_groups': 1})
    parts = describe.flops(config)
    model, (spec, mask, noise) = ASDA(config).double(), inputs(config, torch.float64)
    monkeypatch.setattr(forms, 'MAX_MAP', 0)            # as on a GPU: a fused call, which multiplies V with either map
    forms.apply(model, ['fused'])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:      # whose attention is matmuls
        model(spec, mask, noise)[0].backward()
    counted = {}
    for operator, number in counter.get_flop_counts()['Global'].items():
        kind = next(kind for kind in ('convolution', 'bmm', 'mm') if kind in str(operator))
        counted[kind] = counted.get(kind, 0) + number
    assert counted == {
        'bmm': 2 * (parts['teacher attention'] + parts['student attention']),
        'mm': 2 * (parts['teacher matmuls'] + parts['student matmuls'] + parts['decoder projection']),
        'convolution': 2 * (parts['teacher patch embedding'] + parts['student patch embedding']
                            + parts['decoder convolutions'])}
    assert counter.get_total_flops() == 2 * sum(parts.values())


def test_flops_of_grouped_convolutions():
    config = ASDAConfig(**SMALL)
    model, (spec, mask, noise) = ASDA(config).double(), inputs(config, torch.float64)
    with FlopCounterMode(display=False) as counter:
        model(spec, mask, noise)
    counted = counter.get_flop_counts()['Global'][torch.ops.aten.convolution]
    parts = describe.flops(config)
    assert counted == 2 * (2 * parts['teacher patch embedding'] + parts['decoder convolutions'] // 3)


def test_peaks_by_name():
    for name, dtype, peak in (('NVIDIA H100 80GB HBM3', 'bfloat16', 989e12), ('NVIDIA H100 PCIe', 'bfloat16', 756e12),
                              ('NVIDIA A100-SXM4-80GB', 'float32', 19.5e12), ('NVIDIA L4', 'float32', 30.3e12),
                              ('NVIDIA L40S', 'float32', 91.6e12), ('Tesla V100-SXM2-16GB', 'bfloat16', None),
                              ('NVIDIA GeForce RTX 4090 Laptop GPU', 'float32', None), ('AMD EPYC', 'float32', None),
                              ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', 'bfloat16', None)):
        assert measuring.peak_flops(name, dtype) == peak, name


def finite_and_positive(figures, prefix=''):
    for name, value in figures.items():
        if isinstance(value, dict):
            assert value and finite_and_positive(value, f'{prefix}{name}/')
        else:
            assert math.isfinite(value) and value > 0, f'{prefix}{name} = {value}'
    return True


@pytest.mark.parametrize('section', [*sections.SECTIONS])
def test_every_section_measures(section, tmp_path):
    path = tmp_path / 'new' / 'figures.json'
    result = call(bench.run, *SHORT, f'--what={section}', f'--json={path}')
    assert result.code == 0, result.err
    written = json.loads(path.read_text())
    assert list(written['figures']) == [section] and finite_and_positive(written['figures'])
    assert written['batch_size'] == 4 and written['clips'] == 'synthetic' and written['torch'] == torch.__version__
    assert section in result.out.splitlines() and str(written['device']) in result.out
    assert torch.get_num_threads() == 1                                     # as SHORT says, whatever a section tried
    figures = written['figures'][section]
    if section == 'growth':
        assert {'ms, batch_size = 2', 'ms, n_students = 4', 'ms, frames = 128'} <= set(figures)
    if section == 'baseline':
        assert figures['authors_float32_over_ours_float32'] == pytest.approx(
            figures['authors_float32_ms'] / figures['ours_float32_ms'])
    if section == 'prepare':
        assert 'at least 30' in result.out


def test_the_flag_baseline_measures_nothing_else(tmp_path):
    path = tmp_path / 'figures.json'
    result = call(bench.run, *SHORT, '--baseline', '--what=step,masks', f'--json={path}')
    assert result.code == 0 and list(json.loads(path.read_text())['figures']) == ['baseline']


def test_prepared_clips_are_read_when_named(data_dir, tmp_path):
    path = tmp_path / 'figures.json'
    result = call(bench.run, *SHORT, '--what=step,data', '--dataset=demo,noises', '--short_clips=join', '--workers=1',
                  f'--data_dir={data_dir}', f'--json={path}')
    assert result.code == 0, result.err
    written = json.loads(path.read_text())
    assert written['clips'] == 'demo,noises' and finite_and_positive(written['figures'])


def test_the_step_is_that_of_pretraining(data_dir, tmp_path, monkeypatch):
    """The same losses, step by step, as a run of pretrain.py with the same settings."""
    losses, forward_backward = [], pretrain.forward_backward

    def recorded(*arguments):
        measures = forward_backward(*arguments)
        losses.append(measures['loss'].item())
        return measures
    monkeypatch.setattr(pretrain, 'forward_backward', recorded)
    argv = [os.path.join(ROOT, 'config', 'demo.py'), *TINY, '--batch_size=4', '--accumulate=2', '--threads=1',
            '--dataset=noises', '--eval_dataset=', f'--data_dir={data_dir}', '--max_steps=4', '--lr=1e-2',
            '--warmup_steps=1', '--ema_start=0.5', '--grad_clip=0.5']
    assert call(pretrain.run, *argv, f'--out_dir={tmp_path}/run').code == 0
    assert call(bench.run, *argv, '--what=step', '--steps=3', '--warmup=1').code == 0
    assert len(losses) == 4 + 2 + 4 and losses[:4] == losses[4:8]           # two before those that warm up


def test_everything_at_once_in_miniature(data_dir, tmp_path, monkeypatch):
    """Every part has finite figures or a reason, and every figure a row in its table."""
    monkeypatch.setattr(processes, 'can_compile', lambda process: False)    # half a minute a part
    result = call(bench.run, *SHORT, '--everything', '--budget=1e4', '--pretraining_seconds=2',
                  f'--data_dir={data_dir}', f'--json={tmp_path}/figures.json', f'--tables={tmp_path}/tables.md')
    assert result.code == 0, result.err
    written, tables = json.loads((tmp_path / 'figures.json').read_text()), (tmp_path / 'tables.md').read_text()
    parts = [f'{table}: {column}' for table, column, *_ in everything.parts(bench.configure(SHORT))]
    figures, reasons = written['figures'], written['not_measured']
    assert len(set(parts)) == len(parts) and sorted([*figures, *reasons]) == sorted(parts)
    assert {part.partition(':')[0] for part in figures} == {part.partition(':')[0] for part in parts} - {
        'Kernels', 'The largest batch'}                                     # what needs a GPU
    assert all(reason.startswith('not on this device (') for reason in reasons.values()), reasons
    content = figures['A short pre-training: measured'].pop('content')      # negative at the start
    assert content < 1 and finite_and_positive(figures) and written['seconds'].keys() == figures.keys()
    for part, values in figures.items():
        table = tables.split(f'### {part.partition(":")[0]}\n')[1].split('###')[0]
        for name, value in values.items():
            row = next(row for row in table.splitlines() if row.startswith(f'| {name.replace("_", " ")}'))
            assert measuring.shown(value) in row.strip('| ').split(' | ')
        assert '| measuring it, s |' in table
    assert all(f'* {part}: {reason}.' in tables for part, reason in reasons.items())


def dies(sender, *_):
    os._exit(7)


def test_a_part_that_fails_loses_no_other(tmp_path, monkeypatch):
    """An error, a process that dies, a budget that ends; what comes after is measured, or named as left out."""
    arguments = [*SHORT, '--everything', f'--json={tmp_path}/figures.json']
    monkeypatch.setattr(processes, 'can_compile', lambda process: False)
    monkeypatch.setattr(everything, 'parts', lambda settings: [
        ('First', 'measured', 'no such function', {}), ('Masks', 'measured', 'masks', {}),
        ('A short pre-training', 'measured', 'pretraining', {})])
    result = call(bench.run, *arguments, '--budget=1000', '--pretraining_seconds=1000')
    written = json.loads((tmp_path / 'figures.json').read_text())
    assert result.code == 0 and list(written['figures']) == ['Masks: measured'] and '### Masks' in result.out
    assert written['not_measured']['First: measured'].startswith('failed: KeyError')
    assert 'left out: ' in written['not_measured']['A short pre-training: measured']
    settings = bench.configure(SHORT)
    assert everything.in_a_process('masks', settings, 0.0) == 'stopped after 0 s: the budget was used up'
    monkeypatch.setattr(everything, 'work', dies)
    assert everything.in_a_process('masks', settings, 1000) == 'its process ended with exit code 7'


def test_what_ends_the_budget_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, 'can_compile', lambda process: False)
    clock = itertools.count(0, 100)
    monkeypatch.setattr(everything.time, 'perf_counter', lambda: next(clock))
    monkeypatch.setattr(everything, 'in_a_process', lambda name, settings, limit: {'limit': limit})
    result = call(bench.run, *SHORT, '--everything', '--budget=350', '--pretraining_seconds=40',
                  f'--json={tmp_path}/figures.json')
    written = json.loads((tmp_path / 'figures.json').read_text())
    assert result.code == 0, result.err                                     # the second part, less what is kept
    assert [values['limit'] for values in written['figures'].values()] == [90]
    assert 'left out: 0 s of the budget of 350 s were left' in result.out


def test_a_profile_is_a_trace(tmp_path):
    path = tmp_path / 'trace.json'
    result = call(bench.run, *SHORT, '--what=', f'--profile={path}')
    assert result.code == 0, result.err
    names = {event.get('name') for event in json.loads(path.read_text())['traceEvents']}
    assert 'aten::convolution' in names and 'Self CPU' in result.out
    assert os.listdir(tmp_path) == ['trace.json']


@pytest.mark.parametrize('config', ['as2m.py', 'as2m_authors.py', 'demo.py', 'real.py'])
def test_config_files_of_pretraining_serve_as_they_are(config):
    settings = bench.configure([os.path.join(ROOT, 'config', config)])
    assert settings.dataset == '' and pretrain.model_config(settings).frames == settings.frames
    assert bench.check(settings, processes.Process(0, 1, torch.device('cpu'))) == list(sections.SECTIONS)[:-1]


def test_defaults_depend_on_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert (bench.configure([]).batch_size, bench.configure([]).n_layer) == (12, 12)
    assert bench.configure(['--batch_size=3']).batch_size == 3 and bench.configure(['--device=cpu']).n_layer == 4
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert bench.configure([]).n_layer == 4


def test_help_lists_every_key():
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        bench.configure(['--help'])
    assert all(f'--{name}=' in out.getvalue() for name in ('what', 'baseline', 'ema_start', 'diff_lambda'))


@pytest.mark.parametrize('arguments, words', [
    (['--what=step,stride'], ['stride', 'growth']), (['--what='], ['nothing']), (['--steps=0'], ['steps']),
    (['--warmup=-1'], ['warmup']), (['--stepss=3'], ['stepss', 'steps']), (['--dtype=float8'], ['float8']),
    (['--batch_size=0'], ['batch_size']), (['--frames=50'], ['frames', '50']), (['--json=.'], ['json']),
    (['--what=step', '--dataset=missing', '--data_dir=nowhere'], ['missing']),
    (['--baseline', '--pooling=mean'], ['pooling'])], ids=str)
def test_bad_settings_are_one_line(arguments, words):
    assert is_one_line_error(call(bench.run, *SHORT, *arguments), *words)


def test_more_than_one_process_is_refused():
    with pytest.raises(bench.configurator.ConfigError, match='one process'):
        bench.check(bench.configure(SHORT), processes.Process(0, 2, torch.device('cpu')))
