"""The network against plain expressions of the paper's equations.   python -m pytest tests/test_model.py"""
import copy
import dataclasses
import math
import os
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import model as model_module
from engine.errors import ConfigError
from engine.ranges import check_model
from fast import forms
from model import (
    ASDA,
    MAX_FRAMES,
    ASDAConfig,
    Classifier,
    DiffAttention,
    Encoder,
    count_parameters,
    n_kept,
    position_table,
)

SMALL = ASDAConfig(n_layer=2, n_head=4, n_embd=32, frames=64, decoder_layers=2, decoder_groups=4, n_students=3,
                   mask_block=2)


def variant(**changes):
    return dataclasses.replace(SMALL, **changes)


def small_batch(config, clips=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spec = torch.randn(clips, config.frames, config.n_mels, generator=generator)
    mask = data.block_masks(clips, config.n_students, config.grid, config.mask_ratio, config.mask_block, generator)
    noise = torch.randn(clips * config.n_students, mask.shape[2], config.n_embd, generator=generator) * 0.01
    return spec, mask, noise


def test_the_default_is_the_base_model():
    """Its sizes and the method's numbers as the paper has them, and as the authors' code where it is silent."""
    assert dataclasses.asdict(ASDAConfig()) == {
        'n_layer': 12, 'n_head': 8, 'n_embd': 768, 'ffn_ratio': 3.5, 'diff_lambda': 0.3, 'head_norm': 'per_head',
        'attn_scale': 1.0, 'pos_scale': 1.0, 'pos_embed': '1d', 'n_mels': 128, 'patch_size': 16,
        'patch_frames': 16, 'frames': 1008, 'decoder_layers': 6, 'decoder_groups': 16, 'mask_ratio': 0.8,
        'mask_block': 5, 'mask_adjust': 0.07, 'mask_noise': 0.01, 'n_students': 16, 'alpha': 0.5,
        'utterance_scale': 1.0, 'utterance_target': 'normed', 'target_layers': 0, 'cls_position': 'head',
        'pooling': 'cls', 'drop_path': 0.0}


def test_parameter_counts():
    with torch.device('meta'):
        assert count_parameters(ASDA(ASDAConfig())) == 94_950_144          # the authors' own model, counted
        assert abs(count_parameters(Classifier(ASDAConfig(), 527)) / 1e6 - 93) < 0.5


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_compiles_as_one_graph(device, dtype, monkeypatch):
    """torch.compile has to take a forward pass in one piece: where it cannot follow, it would cut the network there and
    write every activation to memory. fullgraph raises; fake tensors need no GPU."""
    def backend(graph, inputs):
        raise RuntimeError('traced to the end')                             # a graph of fake tensors cannot run
    torch.compiler.reset()
    monkeypatch.setattr(torch.nn.init, 'trunc_normal_', torch.nn.init.normal_)      # it reads a number; a fake has none
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, dtype != torch.float32)              # torch.autocast refuses a missing GPU
    torch.set_autocast_dtype(device, dtype)
    try:
        with FakeTensorMode():
            with torch.device(device):
                spec, noise = torch.empty(2, 64, 128), torch.empty(6, 32, 64)
                mask, draws = torch.empty(2, 3, 32, dtype=torch.bool), torch.empty(2, 2, 2)
                model, classifier = ASDA(variant(n_embd=64)), Classifier(variant(drop_path=0.1), 5)
            if device == 'cuda':
                forms.apply(model, forms.FORMS)
                forms.apply(classifier)
            for network, inputs in ((model, (spec, mask, noise)), (classifier, (spec, draws))):
                with pytest.raises(BackendCompilerFailed, match='traced to the end'):
                    torch.compile(network, backend=backend, fullgraph=True)(*inputs)
    except torch.AcceleratorError:                                          # PyTorch 2.9
        pytest.skip('this PyTorch makes no fake CUDA tensors without a driver')
    finally:
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


# ------------------------------------------------------------------------------------------------------------ attention

def plain_attention(module, x):
    """Equations 1-3 written out, with explicit softmax matrices."""
    config = module.config
    B, N, D = x.shape
    h, d = config.n_head, D // config.n_head
    rows = module.qk.weight.split(D)
    biases = module.qk.bias.split(D)
    half = len(rows) // 2
    values = (x @ module.v.weight.T + module.v.bias).view(B, N, h, d)
    heads = torch.zeros(B, N, h, d, dtype=x.dtype)
    for number, factor in zip(range(half), (1.0, -config.diff_lambda)):
        q = (x @ rows[number].T + biases[number]).view(B, N, h, d)
        k = (x @ rows[half + number].T + biases[half + number]).view(B, N, h, d)
        for i in range(h):
            weights = torch.softmax(q[:, :, i] @ k[:, :, i].transpose(1, 2) / math.sqrt(d), dim=-1)
            heads[:, :, i] += factor * weights @ values[:, :, i]
    if config.head_norm == 'per_head':
        mean, variance = heads.mean(-1, keepdim=True), heads.var(-1, keepdim=True, unbiased=False)
        y = ((heads - mean) / (variance + 1e-5).sqrt()).reshape(B, N, D) * module.norm.weight + module.norm.bias
    elif config.head_norm == 'all':
        y = heads.reshape(B, N, D)
        mean, variance = y.mean(-1, keepdim=True), y.var(-1, keepdim=True, unbiased=False)
        y = (y - mean) / (variance + 1e-5).sqrt() * module.norm.weight + module.norm.bias
    else:
        y = heads.reshape(B, N, D)
    return y * config.attn_scale @ module.proj.weight.T + module.proj.bias


def random_attention(config):
    torch.manual_seed(1)
    module = DiffAttention(config).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


@pytest.mark.parametrize('head_norm', ['per_head', 'all', 'none'])
@pytest.mark.parametrize('diff_lambda', [0.0, 0.3, 1.0])
def test_attention_equals_the_equations(head_norm, diff_lambda):
    module = random_attention(variant(head_norm=head_norm, diff_lambda=diff_lambda, attn_scale=0.95))
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    torch.testing.assert_close(module(x), plain_attention(module, x), atol=1e-10, rtol=1e-9)


def test_qk_without_lambda_has_no_second_map():
    for diff_lambda, maps in ((0.0, 1), (0.3, 2)):
        assert DiffAttention(variant(diff_lambda=diff_lambda)).qk.weight.shape == (2 * maps * 32, 32)


@pytest.mark.parametrize('replace', [lambda model: None, forms.apply], ids=['plain', 'fast'])
@pytest.mark.parametrize('head_norm', ['per_head', 'all', 'none'])
def test_every_module_of_the_attention_is_called(head_norm, replace):
    """Hooks see all parts; what stands in the place of one of them is used."""
    model, seen, batch = ASDA(variant(head_norm=head_norm)), [], small_batch(SMALL)
    replace(model)
    attention = model.encoder.blocks[1].attn
    for name in ('qk', 'v', 'proj', 'norm'):
        getattr(attention, name).register_forward_hook(lambda module, x, y, name=name: seen.append(name))
    before = model(*batch)[0]
    assert sorted(seen) == ['norm', 'proj', 'qk', 'v']
    for name in ('v', 'proj', 'norm'):
        plain = getattr(attention, name)
        setattr(attention, name, torch.nn.Sequential(plain, Negation()))
        assert model(*batch)[0] != before, name
        setattr(attention, name, plain)


class Negation(torch.nn.Module):
    def forward(self, x):
        return -x


# -------------------------------------------------------------------------------------------------------------- encoder

@pytest.mark.parametrize('pos_embed', ['1d', '2d'])
@pytest.mark.parametrize('patch_frames', [16, 8])
def test_positions_follow_the_formula(pos_embed, patch_frames):
    table, D = position_table(variant(pos_embed=pos_embed, patch_frames=patch_frames)), 32
    assert table.shape == (MAX_FRAMES // patch_frames * 8, D)

    def axis(index, dim):
        angles = [index * 10000 ** (-k / (dim / 2)) for k in range(dim // 2)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    for t, f in ((0, 0), (0, 5), (3, 2), (767, 7)):
        want = axis(t * 8 + f, D) if pos_embed == '1d' else axis(f, D // 2) + axis(t, D // 2)
        torch.testing.assert_close(table[t * 8 + f], torch.tensor(want), atol=1e-5, rtol=0)


@pytest.mark.parametrize('wide, high', [(16, 16), (8, 16), (32, 64)])
def test_patches_are_time_major_and_cls_has_no_position(wide, high):
    config = variant(patch_frames=wide, patch_size=high)
    encoder = Encoder(config)
    encoder.positions.zero_()
    spec = torch.randn(1, 64, 128)
    t, f = 1, 128 // high - 1
    want = ((encoder.patch_embed.weight[:, 0]
             * spec[0, t * wide:t * wide + wide, f * high:f * high + high]).sum((1, 2)) + encoder.patch_embed.bias)
    assert config.grid == (64 // wide, 128 // high)
    torch.testing.assert_close(encoder.embed(spec)[0, t * config.grid[1] + f], want)


def test_student_sees_only_what_it_keeps():
    encoder = Encoder(SMALL).eval()
    spec, mask, _ = small_batch(SMALL)
    keep = torch.stack([torch.nonzero(~view).flatten() for view in mask.flatten(0, 1)])
    before = encoder(spec, keep)
    assert before.shape == (6, 1 + n_kept(32, 0.8), 32)
    changed = spec.clone()
    for patch in torch.nonzero(mask[0, 1]).flatten().tolist():          # everything that view 1 of clip 0 does not see
        t, f = divmod(patch, 8)
        changed[0, t * 16:t * 16 + 16, f * 16:f * 16 + 16] = 7.0
    after = encoder(changed, keep)
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0])                             # the other views of the clip see some of it
    assert torch.equal(before[3:], after[3:])                               # the other clip is as it was


def test_views_of_one_clip_are_adjacent():
    encoder = Encoder(SMALL).eval()
    spec, _, _ = small_batch(SMALL)
    keep = torch.arange(32).expand(6, 32)                                   # every view sees everything
    together, alone = encoder(spec, keep), encoder(spec)
    for view in range(6):
        torch.testing.assert_close(together[view], alone[view // 3])


def test_cls_in_the_middle_stands_there_and_comes_out_first(monkeypatch):
    head = Encoder(SMALL).eval()
    middle = Encoder(variant(cls_position='middle')).eval()
    middle.load_state_dict(head.state_dict())
    middle.positions, head.positions = middle.positions * 0, head.positions * 0
    spec = torch.zeros(1, 64, 128)                                      # all patches alike: the one that differs is CLS
    seen = []
    for encoder in (head, middle):
        encoder.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
        encoder(spec)
    others = seen[0][1]
    assert [int(torch.nonzero((x - others).abs().sum(1) > 1e-3).flatten()) for x in seen] == [0, 16]
    spec = torch.randn(2, 64, 128)
    (x, ts), (y, us) = head(spec, layers=True), middle(spec, layers=True)
    # attention has no order and CLS no position: the same function
    torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ts[0], us[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('frames', [16, 48, 1024, MAX_FRAMES])
def test_any_length_that_is_a_multiple_of_the_patch(frames):
    encoder = Encoder(variant(n_layer=1, n_embd=16))
    forms.apply(encoder)                                                     # no maps of two minutes in memory
    with torch.no_grad():
        assert encoder(torch.zeros(1, frames, 128)).shape == (1, 1 + frames // 2, 16)


@pytest.mark.parametrize('frames, mels', [(50, 128), (MAX_FRAMES + 16, 128), (64, 64)])
def test_other_lengths_are_refused(frames, mels):
    with pytest.raises(ValueError, match='multiple of'):
        Encoder(SMALL)(torch.zeros(1, frames, mels))


def test_initial_values():
    torch.manual_seed(0)
    encoder = Encoder(ASDAConfig(n_layer=1))
    for module in encoder.modules():
        if isinstance(module, torch.nn.Linear):
            assert abs(float(module.weight.std()) - 0.02) < 1e-3 and not module.bias.any()
    assert abs(float(encoder.cls.std()) - 1) < 0.1
    bound = math.sqrt(6 / (256 + 768))                                      # Xavier on the flattened weight
    assert abs(float(encoder.patch_embed.weight.abs().max()) - bound) < 1e-4
    bias = encoder.patch_embed.bias                                         # 768 numbers from U(-1/16, 1/16)
    assert -1 / 16 <= float(bias.min()) < -0.06 and 0.06 < float(bias.max()) <= 1 / 16
    model = Classifier(ASDAConfig(n_layer=1), 527)
    assert abs(float(model.head.weight.std()) - 0.02) < 1e-4 and not model.head.bias.any()


@pytest.mark.parametrize('changes, message', [
    ({'n_head': 5}, 'n_embd = 32 is not divisible by n_head = 5'), ({'decoder_groups': 5}, 'decoder_groups = 5'),
    ({'frames': 50}, 'frames = 50'), ({'frames': MAX_FRAMES + 16}, 'too long'), ({'head_norm': 'some'}, 'head_norm'),
    ({'pos_embed': '3d'}, 'pos_embed'), ({'mask_ratio': 1.0}, 'mask_ratio'),
    ({'target_layers': 9}, 'target_layers = 9'), ({'n_layer': 0}, 'n_layer = 0'), ({'n_mels': 100}, 'n_mels = 100'),
    ({'pooling': 'max'}, 'pooling'), ({'cls_position': 'tail'}, 'cls_position'),
    ({'utterance_target': 'x'}, 'utterance_target'), ({'n_embd': 30, 'n_head': 2, 'decoder_groups': 2}, 'by 4')])
def test_impossible_architectures_are_refused_with_the_numbers(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_model(variant(**changes))


# --------------------------------------------------------------------------------------------- decoder, targets, losses

def test_decoder_sees_no_cls_and_fills_with_noise():
    torch.manual_seed(0)
    model = ASDA(variant(alpha=0.0))
    spec, mask, noise = small_batch(SMALL)
    grabbed = []

    def grab(_, __, output):
        output.retain_grad()
        grabbed.append(output)
    model.encoder.register_forward_hook(grab)
    model(spec, mask, noise)[1]
    loss = model(spec, mask, noise)[0]
    loss.backward()
    gradient = grabbed[-1].grad
    assert not gradient[:, 0].any() and gradient[:, 1:].abs().sum(-1).all()


def test_decoder_equals_plain_layers():
    torch.manual_seed(0)
    decoder = model_module.Decoder(SMALL).double()
    V, P, D, T = 2, 32, 32, 6
    tokens, noise = torch.randn(V, T, D).double(), torch.randn(V, P, D).double()
    keep = torch.stack([torch.randperm(P)[:T] for _ in range(V)])
    x = noise.clone()
    for view in range(V):
        for row, patch in enumerate(keep[view]):
            x[view, patch] = tokens[view, row]
    x = x.transpose(1, 2).reshape(V, D, 4, 8)
    for conv in decoder.convs:
        y = conv(x)
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        x = x + y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    want = decoder.proj(x.flatten(2).transpose(1, 2))
    torch.testing.assert_close(decoder(tokens, keep, noise), want)


def plain_targets(model, spec, raw=False):
    """Section 4 of the method, patch by patch, in float64."""
    _, outputs = model.teacher(spec, layers=True)
    normed = []
    for t in outputs[len(outputs) - (model.config.target_layers or len(outputs)):]:
        t = t[:, 1:].double()
        normed.append(t if raw else
                      (t - t.mean(1, keepdim=True)) / (t.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt())
    mean = torch.stack(normed).mean(0)
    if raw:
        mean = mean.mean(1)
    return (mean - mean.mean(-1, keepdim=True)) / (mean.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


@pytest.mark.parametrize('target_layers', [0, 1, 2])
def test_targets(target_layers):
    """Of all three layers, the last, the last two."""
    model = ASDA(variant(n_layer=3, target_layers=target_layers))
    spec, _, _ = small_batch(SMALL)
    frame, utterance = model.targets(spec)
    want = plain_targets(model, spec)
    torch.testing.assert_close(frame.double(), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(utterance.double(), want.mean(1), atol=1e-5, rtol=1e-4)
    raw = ASDA(variant(n_layer=3, target_layers=target_layers, utterance_target='raw'))
    raw.load_state_dict(model.state_dict())
    torch.testing.assert_close(raw.targets(spec)[1].double(), plain_targets(model, spec, raw=True), atol=1e-5,
                               rtol=1e-4)


def test_losses_and_measures_are_those_of_the_method():
    torch.manual_seed(0)
    model = ASDA(variant(alpha=0.7, utterance_scale=3.0))
    spec, mask, noise = small_batch(SMALL)
    loss, measures = model(spec, mask, noise)
    target, utterance_target = model.targets(spec)
    keep = torch.stack([torch.nonzero(~view).flatten() for view in mask.flatten(0, 1)])
    x = model.encoder(spec, keep)
    prediction = model.decoder(x[:, 1:], keep, noise)
    errors, cls_errors, predicted, wanted = [], [], [], []
    for view in range(6):
        masked = mask.flatten(0, 1)[view]
        errors.append((prediction[view][masked] - target[view // 3][masked]).square().sum(-1) / math.sqrt(32))
        cls_errors.append((x[view, 0] - utterance_target[view // 3]).square().sum() / math.sqrt(32))
        if view % 3 == 0:                                                   # of each clip's first student
            predicted.append(prediction[view][masked])
        wanted.append(target[view // 3][masked])
    frame, utterance = torch.cat(errors).mean(), torch.stack(cls_errors).mean()
    torch.testing.assert_close(loss, frame + 0.7 * 3.0 * utterance)
    torch.testing.assert_close(measures['frame'], frame)
    torch.testing.assert_close(measures['utterance'], utterance)
    predicted, wanted = torch.cat(predicted), torch.cat(wanted)
    torch.testing.assert_close(measures['pred_std'], predicted.std(0, unbiased=False).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measures['target_std'], wanted.std(0, unbiased=False).mean(), rtol=1e-4, atol=1e-5)
    explained = 1 - frame * math.sqrt(32) * len(wanted) / (wanted - wanted.mean(0)).square().sum()
    torch.testing.assert_close(measures['explained'], explained, rtol=1e-4, atol=1e-5)
    rest = torch.stack([(target[clip, place] - target[:, place].mean(dim=0)).square().sum() * 2 / (2 - 1)
                        for clip in range(2) for place in range(target.shape[1])
                        for view in range(3) if mask[clip, view, place]]).mean()        # of each masked place
    torch.testing.assert_close(measures['content'], 1 - frame * math.sqrt(32) / rest, rtol=1e-4, atol=1e-5)
    variance = (wanted - wanted.mean(0)).square().sum(dim=1).mean()
    torch.testing.assert_close(measures['place'], 1 - rest / variance, rtol=1e-4, atol=1e-5)
    assert math.isnan(model(spec[:1], mask[:1], noise[:3])[1]['content'])               # of one clip nobody knows


@pytest.mark.parametrize('clips', [2, 16])
def test_content_sees_through_a_teacher_that_knows_places_alone(clips):
    """Targets are a table of places plus what no student can know; a student that has learned the table explains nearly
    all of the variance and none of the content, however few the clips (the mean of 200 batches)."""
    torch.manual_seed(0)
    model = ASDA(SMALL)
    P = math.prod(SMALL.grid)
    table = torch.randn(P, 32)
    model.decoder.forward = lambda tokens, keep, noise: table.expand(len(keep), -1, -1)
    found = []
    for seed in range(200):
        target = table + 0.2 * torch.randn(clips, P, 32)
        model.targets = lambda spec: (target, target.mean(dim=1))           # noqa: B023  (called in this round alone)
        mask = data.block_masks(clips, 3, SMALL.grid, SMALL.mask_ratio, SMALL.mask_block,
                                torch.Generator().manual_seed(seed))
        with torch.no_grad():
            found.append(model(torch.randn(clips, SMALL.frames, 128), mask)[1])
    mean = {name: np.mean([float(measures[name]) for measures in found]) for name in ('content', 'explained', 'place')}
    assert abs(mean['content']) < 0.01 and mean['explained'] > 0.95 and 0.94 < mean['place'] < 0.98, mean


def test_content_of_a_trained_student_of_a_teacher_that_hardly_hears():
    """The teacher's patches weigh next to nothing against its positions: what the student learns of it are places."""
    torch.manual_seed(0)
    model = ASDA(variant(n_students=4))
    with torch.no_grad():
        model.teacher.patch_embed.weight.mul_(0.01)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for seed in range(150):
        mask = data.block_masks(8, 4, SMALL.grid, SMALL.mask_ratio, SMALL.mask_block,
                                torch.Generator().manual_seed(seed))
        loss, measures = model(torch.randn(8, SMALL.frames, 128), mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert measures['explained'] > 0.8 and measures['place'] > 0.9 and measures['content'] < 0.1, measures


def test_every_parameter_of_the_student_gets_a_gradient_and_the_teacher_none():
    for changes in ({}, {'pooling': 'mean'}, {'cls_position': 'middle'}, {'diff_lambda': 0.0}, {'head_norm': 'none'},
                    {'utterance_target': 'raw'}):
        torch.manual_seed(0)
        model = ASDA(variant(**changes))
        model(*small_batch(SMALL))[0].backward()
        assert all(p.grad is not None for p in (*model.encoder.parameters(), *model.decoder.parameters())), changes
        assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())


def test_teacher_is_the_ema_recursion():
    torch.manual_seed(0)
    model = ASDA(SMALL)
    want = {name: p.detach().double().clone() for name, p in model.encoder.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for decay in (0.9, 0.99, 0.5):
        model(*small_batch(SMALL))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(decay)
        for name, p in model.encoder.named_parameters():
            want[name] = decay * want[name] + (1 - decay) * p.detach().double()
    for name, p in model.teacher.named_parameters():
        torch.testing.assert_close(p.double(), want[name], atol=1e-6, rtol=1e-5)


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = ASDA(SMALL)
    batch = small_batch(SMALL)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    first = None
    for _ in range(300):
        loss, measures = model(*batch)
        first = first or float(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss) < 0.1 * first and float(measures['explained']) > 0.9, (first, float(loss), measures)


def wrong_by_one(mask, view, keeps):
    """Mask one more patch of a view, or keep one more."""
    mask = mask.clone()
    patch = torch.nonzero(mask.flatten(0, 1)[view] == keeps).flatten()[0]
    mask.flatten(0, 1)[view, patch] = not keeps
    return mask


@pytest.mark.parametrize('keeps', [True, False])
def test_a_mask_that_keeps_another_number_is_refused(keeps):
    """Of one view; compiled too."""
    model, (spec, mask, noise) = ASDA(SMALL), small_batch(SMALL)
    wrong = wrong_by_one(mask, 4, keeps)
    with pytest.raises(RuntimeError, match='every view must keep 6 of 32 patches'):
        model(spec, wrong, noise)
    if keeps:
        return
    torch.compiler.reset()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(spec, mask, noise)[0], model(spec, mask, noise)[0])
    with pytest.raises(RuntimeError, match='every view must keep 6 of 32 patches'):
        compiled(spec, wrong, noise)


def test_noise_that_is_not_given_is_drawn_at_its_scale(monkeypatch):
    model, (spec, mask, _) = ASDA(variant(mask_noise=0.3)), small_batch(SMALL)
    given = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: given.append(inputs[2]))
    model(spec, mask)
    model(spec, mask)
    assert given[0].shape == (6, 32, 32) and abs(given[0].std() - 0.3) < 0.02 and not torch.equal(*given)


def test_block_outputs_are_kept_only_when_asked_for():
    """Otherwise each is gone as soon as its block has used it."""
    encoder, alive = Encoder(variant(n_layer=4)).eval(), []
    outputs = []

    def note(_, __, output):
        alive.append(sum(reference() is not None for reference in outputs))
        outputs.append(weakref.ref(output[1]))
    for block in encoder.blocks:
        block.register_forward_hook(note)
    with torch.no_grad():
        encoder(torch.zeros(1, 64, 128))
        assert max(alive) <= 1, alive                                       # the one before, until it is overwritten
        outputs.clear()
        kept = encoder(torch.zeros(1, 64, 128), layers=True)
    assert alive[-1] == 3 and len(kept[1]) == 4


# ------------------------------------------------------------------------------------------------------ numbers as ever

VARIANTS = [{}, {'diff_lambda': 0.0}, {'head_norm': 'all', 'attn_scale': 0.95, 'pos_embed': '2d'},
            {'head_norm': 'none'}, {'cls_position': 'middle', 'diff_lambda': 1.0}, {'pooling': 'mean', 'alpha': 2.0},
            {'utterance_target': 'raw', 'utterance_scale': 3.0}, {'target_layers': 1, 'alpha': 0.0},
            {'decoder_layers': 0, 'ffn_ratio': 4.0}, {'attn_scale': 0.5, 'n_students': 1},
            {'drop_path': 0.5, 'head_norm': 'all', 'diff_lambda': 0.1}]


def filled(module, seed):
    """With weights that depend on nothing but NumPy's oldest generator."""
    rng = np.random.RandomState(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            is_norm = 'norm' in name and name.endswith('weight')
            p.copy_(torch.from_numpy(rng.standard_normal(tuple(p.shape)) * 0.1) + is_norm)
    return module.double()


def of_gradients(module, seed):
    """(parameters, 2): the norm of each gradient, and its product with fixed random numbers."""
    rng = np.random.RandomState(seed)
    gradients = [p.grad.numpy() for p in module.parameters() if p.requires_grad]
    return np.array([[np.linalg.norm(x), (x * rng.standard_normal(x.shape)).sum()] for x in gradients])


@pytest.mark.parametrize('number', range(len(VARIANTS)), ids=lambda i: str(VARIANTS[i]))
def test_numbers_are_those_of_the_first_version(number):
    """fixtures/model_numbers.npz was written by this code when the network had fused and folded forms inside: losses,
    measures, features, logits, every gradient and the teacher after its update, in float64."""
    config, rng = variant(**VARIANTS[number]), np.random.RandomState(0)
    spec, P, n = torch.from_numpy(rng.standard_normal((2, 64, 128))), 32, config.n_students
    mask = torch.from_numpy(np.stack([rng.permutation(P) >= 6 for _ in range(2 * n)])).view(2, n, P)
    noise = torch.from_numpy(rng.standard_normal((2 * n, P, 32)) * 0.01)
    draws = torch.from_numpy(rng.uniform(size=(2, 2, 2)))
    model, classifier = filled(ASDA(config), 1), filled(Classifier(config, 5), 2)
    loss, measures = model(spec, mask, noise)
    loss.backward()
    logits = classifier(spec, draws)
    logits.square().sum().backward()
    model.update_teacher(0.9)
    found = {'loss': loss.item(), **{name: value.item() for name, value in measures.items()},
             'gradients': of_gradients(model, 3), 'logits': logits.detach().numpy(),
             'classifier_gradients': of_gradients(classifier, 4),
             'teacher': np.array([float(p.norm()) for p in model.teacher.parameters()]),
             'features': model.encoder(spec).detach()[:, :3, :4].numpy()}
    with np.load(os.path.join(os.path.dirname(__file__), 'fixtures', 'model_numbers.npz')) as expected:
        assert {name for name in found if f'{number}/{name}' not in expected} == {'content', 'place'}   # younger
        for name, value in found.items():
            want = expected.get(f'{number}/{name}', value)                  # losses and measures are float32
            tolerance = 2e-5 if name in ('explained', 'pred_std') else 1e-6
            assert np.abs(value - want).max() <= tolerance * np.abs(want).max(), name


# ----------------------------------------------------------------------------------------------------------- classifier

def test_classifier_pools_cls_patches_or_bands():
    torch.manual_seed(0)
    spec = torch.randn(2, 64, 128)
    model = Classifier(SMALL, 5).eval()
    x = model.encoder(spec)
    torch.testing.assert_close(model(spec), model.head(F.layer_norm(x[:, 0], (32,), model.head_norm.weight,
                                                                    model.head_norm.bias, eps=1e-6)))
    mean = Classifier(variant(pooling='mean'), 5).eval()
    mean.load_state_dict(model.state_dict())
    torch.testing.assert_close(mean(spec), mean.head(mean.head_norm(x[:, 1:].mean(1))))
    bands = Classifier(variant(pooling='bands'), 5).eval()
    bands.encoder.load_state_dict(model.encoder.state_dict())
    grid = x[:, 1:].detach().numpy().reshape(2, 4, 8 * 32)                  # (clip, time, band * channel)
    want = torch.from_numpy(np.concatenate([grid.mean(axis=1), grid.std(axis=1)], axis=1))
    torch.testing.assert_close(bands(spec), bands.head(bands.head_norm(want)), atol=1e-4, rtol=1e-4)
    bands(spec[:, :16]).sum().backward()                                    # one row: no deviation, and a gradient
    assert all(p.grad.isfinite().all() for p in bands.parameters())


@pytest.mark.parametrize('frames, window', [(64, 64), (80, 48), (128, 64), (144, 48), (400, 64)])
def test_bands_read_what_pretraining_saw_at_a_time(frames, window):
    """As few equal windows as are no longer than config.frames = 64, encoded one by one; their rows side by side."""
    torch.manual_seed(0)
    spec = torch.randn(2, frames, 128)
    bands = Classifier(variant(pooling='bands', drop_path=0.5), 5).train()
    draws = torch.tensor([[[0.1, 0.9]] * 2, [[0.9, 0.1]] * 2])
    logits = []
    for clip, draw in zip(spec, draws):
        padded = torch.cat([clip, torch.zeros(-frames % window, 128)])
        rows = torch.cat([bands.encoder(part[None], draws=draw[None])[0, 1:].reshape(-1, 8 * 32)
                          for part in padded.split(window)]).detach().numpy()
        want = np.concatenate([rows.mean(axis=0), np.sqrt(rows.var(axis=0) + 1e-6)])
        logits.append(bands.head(bands.head_norm(torch.from_numpy(want))))
    torch.testing.assert_close(bands(spec, draws), torch.stack(logits), atol=1e-4, rtol=1e-4)


def test_stochastic_depth_drops_whole_clips_and_keeps_the_mean():
    branch = torch.ones(4000, 2, 3)
    dropped = model_module.drop_path(branch, 0.25, torch.rand(4000, generator=torch.Generator().manual_seed(0)))
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert torch.equal(dropped, dropped[:, :1, :1].expand(-1, 2, 3))
    assert abs(float(dropped.mean()) - 1) < 0.03
    assert model_module.drop_path(branch[:3], 0.5, torch.tensor([0.5, 0.4999, 0.0]))[:, 0, 0].tolist() == [2, 0, 0]
    assert torch.equal(model_module.drop_path(branch, 0.0, torch.zeros(4000)), branch)
    model = Classifier(variant(drop_path=0.5), 5)
    assert [block.drop_rate for block in model.encoder.blocks] == [0.0, 0.5]
    rates = [block.drop_rate for block in Encoder(variant(drop_path=0.4, n_layer=5)).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4]) and Encoder(variant(n_layer=1)).blocks[0].drop_rate == 0
    spec = torch.randn(2, 64, 128)
    torch.testing.assert_close(model(spec, torch.ones(2, 2, 2)), drop_nothing(model, 2.0)(spec), atol=1e-5, rtol=1e-4)


def drop_nothing(model, factor):
    """The same model with the last block's branches scaled, as a draw that drops nothing leaves them."""
    scaled = copy.deepcopy(model)
    block = scaled.encoder.blocks[1]
    with torch.no_grad():
        for linear in (block.attn.proj, block.mlp[2]):
            linear.weight *= factor
            linear.bias *= factor
    return scaled
