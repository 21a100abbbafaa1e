"""Every faster form against the plain one, forward and gradients.   python -m pytest tests/test_fast.py

The Triton forms are compared here with the plain expressions in the kernels' place, and by tests/interpret_kernels.py
with the kernels themselves.
"""
import copy

import pytest
import torch
import torch.nn.functional as F

from checkpoints.opening import open_checkpoint
from fast import forms, kernels
from model import ASDA, Classifier, DiffAttention, Encoder

from .conftest import ROOT
from .test_model import SMALL, random_attention, small_batch, variant


@pytest.fixture
def plain_kernels(monkeypatch):
    """The kernels' plain expressions where Triton is not at hand, on all shapes. -> the names of what was called"""
    used = set()

    def noting(name):
        def plain(*arguments):
            used.add(name)
            return kernels.EXPRESSIONS[name][0](*arguments)
        return plain
    monkeypatch.setattr(kernels, 'grouped_conv', noting('conv'))
    monkeypatch.setattr(kernels, 'diff_attention', noting('attention'))
    monkeypatch.setattr(kernels, 'diff_attention_fits', lambda N, d, dtype: True)
    return used


def loss_and_gradients(model, dtype, bfloat16):
    spec, mask, noise = small_batch(SMALL)
    model = model.to(dtype)
    with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
        loss = model(spec.to(dtype), mask, noise.to(torch.bfloat16 if bfloat16 else dtype))[0]
    loss.backward()
    return loss.double().detach(), torch.cat([p.grad.double().flatten() for p in model.parameters() if p.requires_grad])


def off(found, exact):
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact)]


@pytest.mark.parametrize('changes', [{}, {'head_norm': 'all', 'attn_scale': 0.95}, {'head_norm': 'none'},
                                     {'diff_lambda': 0.0}], ids=str)
@pytest.mark.parametrize('form', forms.FORMS)
def test_a_form_computes_the_same(form, changes, plain_kernels, monkeypatch):
    """Loss and all gradients: float32 to 1e-5, bfloat16 within 1.5 times the plain network's own error."""
    monkeypatch.setattr(forms, 'MAX_MAP', 0)                                 # the fused call on few tokens too
    torch.manual_seed(0)
    plain = ASDA(variant(**changes))
    with torch.no_grad():
        for p in plain.parameters():
            p += 0.1 * torch.randn_like(p)                                  # no bias zero, no weight of a norm one
    faster = copy.deepcopy(plain)
    assert forms.FORMS[form][2] in forms.apply(faster, [form])
    assert faster.state_dict().keys() == plain.state_dict().keys()
    exact = loss_and_gradients(copy.deepcopy(plain), torch.float64, False)
    assert max(off(loss_and_gradients(copy.deepcopy(faster), torch.float32, False), exact)) < 1e-5
    usual, found = (off(loss_and_gradients(model, torch.float32, True), exact) for model in (plain, faster))
    assert found[1] <= 1.5 * usual[1] and found[0] <= 1.5 * usual[0] + 1e-3, (found, usual)
    expected = {'conv': {'conv'}, 'attention': {'attention'} if variant(**changes).diff_lambda else set()}
    assert plain_kernels == expected.get(form, set())


@pytest.mark.parametrize('diff_lambda', [0.0, 0.3])
@pytest.mark.parametrize('head_norm', ['per_head', 'all', 'none'])
def test_maps_in_memory_equal_the_fused_call(monkeypatch, head_norm, diff_lambda):
    module = random_attention(variant(head_norm=head_norm, diff_lambda=diff_lambda))
    x, results = torch.randn(2, 9, 32, dtype=torch.float64), []
    forms.apply(module)
    for limit in (0, 9):
        monkeypatch.setattr(forms, 'MAX_MAP', limit)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        results.append((y, leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('diff_lambda, maps', [(0.0, 1), (0.3, 2)])
def test_one_call_with_one_softmax_per_map(monkeypatch, diff_lambda, maps):
    monkeypatch.setattr(forms, 'MAX_MAP', 0)                                 # as on a GPU, and on long inputs
    shapes = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention',
                        lambda q, k, v: shapes.append((q.shape, k.shape, v.shape)) or original(q, k, v))
    module = DiffAttention(variant(diff_lambda=diff_lambda))
    forms.apply(module)
    module(torch.randn(2, 7, 32))
    assert shapes == [((2, 4 * maps, 7, 8),) * 3]


def test_long_inputs_hold_no_maps_in_memory(monkeypatch):
    """By default, in what a stage opens; short ones on a CPU do."""
    calls = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda *x: calls.append(x[0].shape[2]) or original(*x))
    encoder = Encoder(variant(n_layer=1))
    with torch.no_grad():
        forms.apply(encoder)
        encoder(torch.zeros(1, 128, 128))
        assert not calls
        encoder(torch.zeros(1, 2064, 128))
    assert calls == [1033]
    opened = open_checkpoint(f'{ROOT}/tests/fixtures/authors_tiny_finetune.pt')
    assert {type(block.attn) for block in opened.classifier.encoder.blocks} == {forms.FusedAttention}


def test_what_was_replaced_is_said():
    model = ASDA(SMALL)
    assert forms.apply(model) == ("faster forms: 10 LayerNorms in autocast's type; "
                                 '4 attentions without long maps in memory')
    assert forms.apply(model) == 'faster forms: none'                        # nothing is replaced twice
    assert forms.apply(model, forms.FORMS) == ("faster forms: 2 students' attentions by Triton; "
                                               '2 convolutions of the decoder by Triton')
    assert type(model.teacher.blocks[0].attn) is forms.FusedAttention
    assert forms.apply(Classifier(SMALL, 3)).startswith('faster forms: 6 LayerNorms')


def test_a_copy_keeps_its_forms_and_its_own_weights():
    model = ASDA(SMALL)
    forms.apply(model)
    other = copy.deepcopy(model)
    assert type(other.encoder.norm) is forms.AutocastLayerNorm
    before = model(*small_batch(SMALL))[0]
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(model(*small_batch(SMALL))[0], before)


def test_adapted_modules_are_used_by_the_triton_forms_too(plain_kernels):
    """Whatever stands in place of qk, v, proj, the norm or a convolution is called, instead of its weights read."""
    class Twice(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.weight, self.bias = getattr(inner, 'weight', None), getattr(inner, 'bias', None)

        def forward(self, x):
            called.append(self)
            return 2 * self.inner(x)
    for name in ('qk', 'v', 'proj', 'norm', 'conv'):
        plain, called = ASDA(SMALL), []
        part = plain.decoder.convs if name == 'conv' else plain.encoder.blocks[0].attn
        setattr(part, '0' if name == 'conv' else name, Twice(getattr(part, '0' if name == 'conv' else name)))
        faster = copy.deepcopy(plain)
        forms.apply(faster, forms.FORMS)
        want = plain(*small_batch(SMALL))[0]
        torch.testing.assert_close(faster(*small_batch(SMALL))[0], want, rtol=1e-5, atol=1e-5)
        assert len(called) == 2, name
