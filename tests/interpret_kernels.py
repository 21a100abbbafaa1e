"""The Triton kernels on a CPU, in Triton's interpreter, against the plain expressions in float64.

TRITON_INTERPRET=1 python tests/interpret_kernels.py; tests/test_kernels.py runs it so, in a process of its own, since
Triton reads that variable when it is imported. Prints one line per case; a wrong one ends with a traceback.
"""
import copy
import os
import sys

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data  # noqa: E402
from fast import (
    forms,  # noqa: E402
    kernels,  # noqa: E402
)
from model import ASDA, ASDAConfig  # noqa: E402

# V, rows, columns, D, groups; then B, N, h, d, lambda, norm
CONV = [(3, 5, 3, 48, 4), (2, 7, 8, 96, 2), (1, 4, 5, 80, 1), (20, 13, 8, 8, 1)]
ATTENTION = [(2, 7, 2, 8, 0.3, True), (1, 13, 3, 16, 0.3, False), (2, 33, 2, 24, 0.3, True), (1, 65, 1, 64, 0.5, True),
             (1, 101, 2, 96, 0.3, True), (1, 101, 1, 96, 0.3, False)]


def correct_bfloat16():
    """The interpreter multiplies bfloat16's bits as if they were integers, and cuts numbers off instead of rounding
    them. A card does neither."""
    plain_dot, plain_cast = interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.cast_impl

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return plain_dot(self, widened(a), widened(b), *rest)

    def cast(self, x, to):
        if (x.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return plain_cast(self, x, to)
        bits = np.ascontiguousarray(x.data).view(np.uint32)
        return interpreter.TensorHandle(((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype(np.uint16), to.scalar)
    # every cast of the interpreter goes through cast_impl
    interpreter.InterpreterBuilder.create_dot, interpreter.InterpreterBuilder.cast_impl = dot, cast


def correct_loops():
    """Before Triton 3.8 the interpreter takes a loop's bound from an array of one number, which NumPy 2.4 refuses."""
    plain = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        plain(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())
    interpreter._patch_lang_tensor = patched


def compare(name, shape, dtype):
    """Value and all gradients: float32 to 1e-5, bfloat16 within 1.5 times the plain expression's own error."""
    plain, kernel = kernels.EXPRESSIONS[name]
    data, parameters, others, grad = kernels.trial(name, shape, 'cpu')
    exact = kernels.results(plain, [x.double().requires_grad_() for x in data + parameters], others, grad.double(),
                            torch.float32)
    tensors = [x.to(dtype).requires_grad_() for x in data] + [x.requires_grad_() for x in parameters]
    found = kernels.results(kernel, tensors, others, grad, dtype)
    assert found[0].dtype == dtype and all(g.dtype == x.dtype for g, x in zip(found[1:], tensors))
    usual = kernels.results(plain, tensors, others, grad, dtype)
    off, off_usual = [[((a - b).norm() / b.norm()).item() for a, b in zip(x, exact)] for x in (found, usual)]
    print(name, shape, dtype, *(f'{e:.1e}' for e in off), 'plain', *(f'{e:.1e}' for e in off_usual))
    for e, plain_error in zip(off, off_usual):
        assert e <= (1e-5 if dtype == torch.float32 else max(1.5 * plain_error, 1e-5)), (e, plain_error)


def autocast():
    """Float32 parameters and data under autocast: computed in bfloat16, gradients in float32 where the leaf is."""
    data, parameters, others, grad = kernels.trial('conv', (2, 5, 3, 48, 4), 'cpu')
    leaves = [x.requires_grad_() for x in data + parameters]
    y, *gradients = kernels.results(kernels.grouped_conv, leaves, others, grad, torch.bfloat16)
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in gradients)
    data, parameters, others, grad = kernels.trial('attention', (1, 7, 2, 8, 0.3, True), 'cpu')
    y, *gradients = kernels.results(kernels.diff_attention, [x.requires_grad_() for x in data + parameters], others,
                                    grad, torch.bfloat16)
    assert y.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in gradients)


def strided():
    """Inputs that are views of something larger, and a gradient that is one expanded number."""
    def of_views(conv, attention, wide, twice, bias):
        weight, ones = torch.ones(16, 4, 3, 3).cumsum(0) / 16, torch.ones(16)
        return conv(wide[..., ::2], weight, ones, 4).sum() + attention(twice[:, :, 80:], bias[::2], 2, 0.3, False).sum()
    leaves = [torch.randn(size).requires_grad_() for size in ((2, 5, 3, 32), (2, 7, 160), (160,))]
    values = [of_views(*(pair[i] for pair in kernels.EXPRESSIONS.values()), *leaves) for i in (0, 1)]
    torch.testing.assert_close(*values)
    for a, b in zip(*(torch.autograd.grad(value, leaves) for value in values)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def extremes():
    """Scores so low that exp of their negative overflows: places beyond the last key must not turn into nan."""
    torch.manual_seed(0)
    qkv, bias = torch.randn(1, 7, 80), torch.randn(80)
    qkv[:, :, :32] += 20
    qkv[:, :, 32:64] -= 20
    plain, kernel = kernels.EXPRESSIONS['attention']
    exact, usual, found = [
        kernels.results(f, [x.to(dtype).requires_grad_() for x in (qkv, bias)], (2, 0.3, True),
                        torch.ones(1, 7, 16, dtype=dtype).cumsum(2), torch.float32)
        for f, dtype in ((plain, torch.float64), (plain, torch.float32), (kernel, torch.float32))]
    for a, b, c in zip(exact, usual, found):
        assert (c - a).norm() <= max(2 * (b - a).norm(), 1e-4 * a.norm())       # log of sums near 1e3, in float32


def operators():
    """What PyTorch asks of an operator (schema, fake tensors, gradients), and tracing by torch.compile."""
    x, weight, bias = torch.randn(2, 3, 5, 32), torch.randn(32, 8, 3, 3), torch.randn(32)
    qkv, shift, grad = torch.randn(2, 7, 80), torch.randn(80), torch.randn(2, 7, 16)
    leaf = [t.clone().requires_grad_() for t in (x, weight, bias, qkv, shift)]
    torch.library.opcheck(kernels.conv_op, (*leaf[:3], 4))
    torch.library.opcheck(kernels.conv_op, (*leaf[:2], None, 4))
    for groups in (4, 1):
        torch.library.opcheck(kernels.conv_weight_grad_op, (x, x, groups))
    for norm in (True, False):
        torch.library.opcheck(kernels.attention_op, (*leaf[3:], 2, 0.3, norm, 1e-5))
        out, lse, rstd = kernels.attention_op(qkv, shift, 2, 0.3, norm, 1e-5)
        torch.library.opcheck(kernels.attention_grad_op,
                              (qkv, out if norm else None, lse, rstd, grad, 2, 0.3, norm))

    def network(x, weight, bias, qkv, shift):
        y = kernels.grouped_conv(x * 2, weight, bias, 4).relu().sum()
        return y + kernels.diff_attention(qkv, shift, 2, 0.3).square().sum() * kernels.diff_attention(
            qkv, shift, 2, 0.3, norm=False).sum()
    compiled = torch.compile(network, backend='aot_eager', fullgraph=True)
    for autocast in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            a, b = network(*leaf), compiled(*leaf)
        torch.testing.assert_close(a, b)
        for g, h in zip(torch.autograd.grad(a, leaf), torch.autograd.grad(b, leaf)):
            torch.testing.assert_close(g, h)


def choosing():
    """The whole of kernels.choose with the real kernels."""
    kernels.unusable = lambda device: None
    kernels.diff_attention_fits = lambda N, d, dtype: True
    shapes = {'conv': (1, 3, 3, 16, 2), 'attention': (1, 7, 1, 16, 0.3, True)}
    choice, reasons = kernels.choose('triton', shapes, 'cpu', torch.bfloat16)
    assert choice == {'conv': 'triton', 'attention': 'triton'}, reasons
    choice, reasons = kernels.choose('auto', shapes, 'cpu', torch.float32)      # an interpreter is never faster
    assert choice == {'conv': 'torch', 'attention': 'torch'} and all('ms' in r for r in reasons.values()), reasons


def whole_model():
    """Loss and gradients of a small ASDA with both kernels, against float64 without: float32 to 1e-5, bfloat16 within
    1.5 times the error of the same model without kernels."""
    config = ASDAConfig(n_layer=2, n_head=2, n_embd=32, frames=64, decoder_layers=2, decoder_groups=2, n_students=3,
                        mask_block=2, attn_scale=0.95)
    kernels.diff_attention_fits = lambda N, d, dtype: True
    reference = ASDA(config)
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.1 * torch.randn_like(p))                               # no bias zero, no weight of a norm one
    generator = torch.Generator().manual_seed(0)
    spec, noise = torch.randn(2, 64, 128, generator=generator), 0.01 * torch.randn(6, 32, 32, generator=generator)
    mask = data.block_masks(2, 3, config.grid, config.mask_ratio, 2, generator)

    def run(dtype, bfloat16, names):
        model = copy.deepcopy(reference).to(dtype)
        forms.apply(model, names)
        with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
            loss, _ = model(spec.to(dtype), mask, noise.to(dtype))
        loss.backward()
        return loss.item(), torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    exact_loss, exact = run(torch.float64, False, ())
    for bfloat16 in (False, True):
        (usual_loss, usual), (loss, found) = [run(torch.float32, bfloat16, names) for names in
                                              ((), ('conv', 'attention'))]
        off, off_usual = [((x - exact).norm() / exact.norm()).item() for x in (found, usual)]
        print(f'bfloat16 {bfloat16}: loss {loss:.6f} {usual_loss:.6f} {exact_loss:.6f}, gradients {off:.1e} '
              f'{off_usual:.1e}')
        assert abs(loss / exact_loss - 1) < (0.005 if bfloat16 else 1e-5)
        assert off <= (1.5 * off_usual if bfloat16 else 1e-5)


if __name__ == '__main__':
    torch.manual_seed(0)
    correct_bfloat16()
    correct_loops()
    for name, shapes in (('conv', CONV), ('attention', ATTENTION)):
        for shape in shapes:
            compare(name, shape, torch.float32)
            compare(name, shape, torch.bfloat16)
        for places in ('1.2.1', '2.1.2', *(['3.3'] if name == 'conv' else [])):     # the other launches
            kernels.recall(f'{name}:{places[:2 * len(kernels.kernels_of(name, torch.bfloat16)) - 1]}')
            compare(name, shapes[1] if name == 'conv' else shapes[4], torch.bfloat16)     # 101 tokens: several blocks
    for check in (autocast, strided, extremes, operators, whole_model, choosing):
        check()
        print(check.__name__, 'ok')
