"""The Triton kernels without a GPU: in Triton's interpreter against float64, compiled for three generations of cards,
and the choice between them and the plain expressions.   python -m pytest tests/test_kernels.py

The interpreter shows that the numbers are right, the compiler that a card would take the kernels: the interpreter lets
pass what the compiler refuses. What neither shows is speed; that, `kernels.choose` measures where training runs.
"""
import os
import re
import subprocess
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from fast import kernels
from fast.kernels import choose

from .conftest import ROOT, script

needs_triton = pytest.mark.skipif(kernels.triton is None, reason='Triton is not installed')
CARDS = {80: 163, 89: 99, 90: 227}          # compute capability: KiB of shared memory that one program may have
# Bytes a thread may spill: none. The compilers of Triton before 3.8 spill up to four registers here and there.
SPILL = 0 if kernels.triton and tuple(map(int, kernels.triton.__version__.split('.')[:2])) >= (3, 8) else 16


# ---------------------------------------------------------------------------------------------------- plain expressions

def test_plain_convolution_is_conv2d_over_channels_first():
    conv = nn.Conv2d(12, 12, 3, padding=1, groups=3)
    x = torch.randn(2, 5, 4, 12)
    torch.testing.assert_close(kernels.grouped_conv_plain(x, conv.weight, conv.bias, 3).movedim(-1, 1),
                               conv(x.movedim(-1, 1)))


@pytest.mark.parametrize('norm', [True, False])
def test_plain_attention_is_the_papers_equation(norm):
    B, N, h, d = 2, 7, 3, 4
    qkv, bias = torch.randn(B, N, 5 * h * d), torch.randn(5 * h * d)
    q1, q2, k1, k2, v = (x.view(B, N, h, d).transpose(1, 2) for x in qkv.chunk(5, dim=-1))
    a = (q1 @ k1.mT / d ** 0.5).softmax(-1) - 0.3 * (q2 @ k2.mT / d ** 0.5).softmax(-1)
    y = (a @ v).transpose(1, 2)
    y = F.layer_norm(y, (d,), eps=1e-5) if norm else y
    torch.testing.assert_close(kernels.diff_attention_plain(qkv, bias, h, 0.3, norm), y.reshape(B, N, h * d))


def test_what_attention_takes():
    assert kernels.diff_attention_fits(102, 96, torch.bfloat16) and kernels.diff_attention_fits(128, 64, torch.float16)
    assert not kernels.diff_attention_fits(129, 64, torch.bfloat16)             # the teacher's sequences
    assert not kernels.diff_attention_fits(102, 192, torch.bfloat16)
    assert not kernels.diff_attention_fits(102, 96, torch.float32)


# -------------------------------------------------------------------------------------------------------------- numbers

@needs_triton
def test_kernels_equal_the_plain_expressions_in_the_interpreter():
    run = script(os.path.join(ROOT, 'tests', 'interpret_kernels.py'), TRITON_INTERPRET='1', timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert all(f'{check} ok' in run.stdout for check in ('autocast', 'strided', 'extremes', 'operators',
                                                        'whole_model', 'choosing'))


def test_importing_without_triton():
    run = script('-c', 'import sys; sys.modules["triton"] = None; import torch; from fast import kernels\n'
                 'print(kernels.choose("auto", {}, "cuda", torch.bfloat16))')
    assert run.returncode == 0 and run.stdout.count('Triton is not installed') == 2, run.stdout + run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
@pytest.mark.parametrize('shapes', [{'conv': (7, 63, 8, 768, 16), 'attention': (7, 102, 8, 96, 0.3, True)},
                                    {'conv': (3, 5, 3, 48, 4), 'attention': (3, 33, 12, 64, 0.3, False)}])
def test_kernels_equal_the_plain_expressions_on_a_card(shapes):
    assert choose('triton', shapes, 'cuda', torch.bfloat16)[0] == {'conv': 'triton', 'attention': 'triton'}


# ------------------------------------------------------------------------------------------------------------- compiler

def launches(monkeypatch, kib, name, shape, dtype):
    """What a forward and backward pass of a kernel launches on a card with so much shared memory:
    [(function, arguments, keyword arguments)]."""
    found = []

    class Recorder:
        def __init__(self, function):
            self.function = function

        def __getitem__(self, grid):
            assert all(0 < n < 2 ** 16 for n in grid[1:])
            return lambda *arguments, **options: found.append((self.function, arguments, options))
    data, parameters, others, grad = kernels.trial(name, shape, 'cpu')
    tensors = [x.to(dtype).requires_grad_() for x in data] + [x.requires_grad_() for x in parameters]
    with monkeypatch.context() as patch:
        patch.setattr(kernels, 'launch_on', lambda kernel, x: kernels.launch(kernel, kib))
        for function in ('conv_kernel', 'conv_weight_kernel', 'attention_kernel', 'attention_query_kernel',
                         'attention_key_kernel'):
            patch.setattr(kernels, function, Recorder(getattr(kernels, function)))
        kernels.results(kernels.EXPRESSIONS[name][1], tensors, others, grad, dtype)
    return found


def compiled(function, arguments, options, capability):
    """The kernel as a launch with these arguments compiles it. -> (shared memory in bytes, usage as cuobjdump says)"""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    options = dict(options)
    how = {key: options.pop(key) for key in ('num_warps', 'num_stages')}
    signature, constants, attributes = {}, {}, {}
    types_ = {torch.bfloat16: '*bf16', torch.float32: '*fp32', int: 'i32', float: 'fp32'}
    for i, (parameter, value) in enumerate((p, {**dict(zip(function.arg_names, arguments)), **options}[p.name])
                                           for p in function.params):
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.name] = 'constexpr', value
            continue
        signature[parameter.name] = types_[value.dtype if torch.is_tensor(value) else type(value)]
        if torch.is_tensor(value) or isinstance(value, int) and value % 16 == 0:
            attributes[(i,)] = [['tt.divisibility', 16]]                        # as a launch finds out
    kernel = kernels.triton.compile(ASTSource(function, signature, constants, attributes),
                                    target=GPUTarget('cuda', capability, 32), options=how)
    path = os.path.join(os.environ['TRITON_CACHE_DIR'], f'{function.__name__}.cubin')
    with open(path, 'wb') as file:
        file.write(kernel.asm['cubin'])
    tool = os.path.join(os.path.dirname(kernels.triton.__file__), 'backends', 'nvidia', 'bin', 'cuobjdump')
    usage = subprocess.run([tool, '--dump-resource-usage', path], capture_output=True, text=True, check=True).stdout
    return kernel.metadata.shared, {key: int(n) for key, n in re.findall(r'(REG|STACK|LOCAL):(\d+)', usage)}


@needs_triton
@pytest.mark.parametrize('capability', CARDS)
@pytest.mark.parametrize('name, shape, dtype', [
    ('conv', (2, 63, 8, 768, 16), torch.bfloat16), ('conv', (2, 63, 8, 768, 16), torch.float32),
    ('attention', (1, 102, 8, 96, 0.3, True), torch.bfloat16),
    ('attention', (1, 102, 12, 64, 0.3, True), torch.bfloat16),
    ('attention', (1, 128, 8, 96, 0.3, False), torch.bfloat16)])
def test_compiles_without_spills_and_within_shared_memory(monkeypatch, tmp_path, capability, name, shape, dtype):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    found = launches(monkeypatch, CARDS[capability], name, shape, dtype)
    assert len(found) == 3                  # forward, gradient of the data, gradient of the parameters or of the keys
    for launch in found:
        shared, usage = compiled(*launch, capability)
        print(launch[0].__name__, f'sm_{capability}', shape, dtype, f'shared {shared}', usage)
        assert shared <= CARDS[capability] * 1024 and usage['STACK'] + usage['LOCAL'] <= SPILL


@needs_triton
@pytest.mark.parametrize('capability', CARDS)
@pytest.mark.parametrize('name, shape', [('conv', (2, 63, 8, 768, 16)), ('attention', (1, 101, 8, 96, 0.3, True))])
def test_every_launch_compiles_without_spills(monkeypatch, tmp_path, capability, name, shape):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    names = kernels.kernels_of(name, torch.bfloat16)
    for place in range(1, len(kernels.LAUNCH[name])):
        monkeypatch.setattr(kernels, 'tuned', {kernel: place for kernel in names})
        found = launches(monkeypatch, CARDS[capability], name, shape, torch.bfloat16)
        for launch in found[1:] if name == 'conv' else found:               # the input's gradient is the forward kernel
            shared, usage = compiled(*launch, capability)
            assert shared <= CARDS[capability] * 1024 and usage['STACK'] + usage['LOCAL'] <= SPILL, (launch[2], usage)


# ------------------------------------------------------------------------------------------------------------- choosing

SHAPES = {'conv': (2, 3, 5, 8, 2), 'attention': (2, 5, 2, 4, 0.3, True)}


@pytest.fixture
def card(monkeypatch):
    """A CPU that passes for a card, with two kernels that are the plain expressions under other names, and times."""
    set_up = types.SimpleNamespace(kernels={}, times={'plain': 2.0, 'conv': 1.0, 'attention': 1.0})
    for name, (plain, _) in list(kernels.EXPRESSIONS.items()):
        def kernel(*arguments, name=name, plain=plain):
            return set_up.kernels.get(name, plain)(*arguments)
        kernel.called = name
        monkeypatch.setitem(kernels.EXPRESSIONS, name, (plain, kernel))
    monkeypatch.setattr(kernels, 'tuned', {})
    monkeypatch.setattr(kernels, 'unusable', lambda device: None)
    monkeypatch.setattr(kernels, 'milliseconds', lambda f, *arguments: set_up.times[getattr(f, 'called', 'plain')])
    return set_up


def off_in_backward(x, weight, bias, groups):
    y = kernels.grouped_conv_plain(x, weight, bias, groups)
    return y + 0.1 * (x - x.detach())


def off_in_one_number(x, weight, bias, groups):
    y = kernels.grouped_conv_plain(x, weight, bias, groups).clone()
    y[0, 0, 0, 0] += 10
    return y


def not_a_number(x, weight, bias, groups):
    return kernels.grouped_conv_plain(x, weight, bias, groups) * float('nan')


def raising(*arguments):
    raise RuntimeError('out of resource: shared memory\nand more')


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_a_kernel_that_is_right_and_faster_is_taken(card, monkeypatch, dtype):
    monkeypatch.setattr(kernels, 'diff_attention_fits', lambda *shape: True)
    choice, reasons = choose('auto', SHAPES, 'cpu', dtype)
    assert choice == {'conv': 'triton', 'attention': 'triton'}
    launches = {torch.bfloat16: 'conv:0.0', torch.float32: 'conv'}[dtype]
    assert reasons['conv'] == f'forward and backward 1.00 ms in Triton ({launches}), 2.00 ms in PyTorch'


@pytest.mark.parametrize('kernel, words', [(off_in_one_number, 'result is off'), (off_in_backward, 'gradient 0 is off'),
                                           (not_a_number, 'result is off by nan'),
                                           (raising, 'RuntimeError: out of resource: shared memory')])
def test_a_kernel_that_is_wrong_or_raises_is_refused(card, kernel, words):
    card.kernels['conv'] = kernel
    choice, reasons = choose('auto', SHAPES, 'cpu', torch.bfloat16)
    assert choice == {'conv': 'torch', 'attention': 'triton'}
    assert words in reasons['conv'] and '\n' not in reasons['conv']
    with pytest.raises(ValueError, match=f'^kernels = triton, but conv: {words}'):
        choose('triton', SHAPES, 'cpu', torch.bfloat16)


def test_the_fastest_launch_of_each_kernel_is_kept(card, monkeypatch):
    """Of a kernel whose every launch takes its own time, on a card where two of them fail."""
    def milliseconds(function, *arguments):
        if getattr(function, 'called', None) != 'attention':
            return 9.0
        places = [kernels.tuned.get(kernel, 0) for kernel in ('attention', 'attention queries', 'attention keys')]
        if places[0] == 0 or places[2] == 2:
            raise RuntimeError('out of resource')
        return 1 + abs(places[0] - 2) + abs(places[1] - 1) + abs(places[2] - 1)
    monkeypatch.setattr(kernels, 'milliseconds', milliseconds)
    monkeypatch.setattr(kernels, 'shared_memory', lambda device: 227)
    choice, reasons = choose('auto', {'attention': SHAPES['attention']}, 'cpu', torch.bfloat16)
    assert choice['attention'] == 'triton' and '1.00 ms in Triton (attention:2.1.1)' in reasons['attention']
    assert kernels.launch('attention', 227) == kernels.LAUNCH['attention'][2][1]
    choice, reasons = choose('auto', {'attention': SHAPES['attention']}, 'cpu', torch.bfloat16, timed=False)
    assert choice['attention'] == 'triton' and reasons['attention'] == 'right, and not timed' and not kernels.tuned
    monkeypatch.setattr(kernels, 'milliseconds', raising)
    choice, reasons = choose('auto', {'attention': SHAPES['attention']}, 'cpu', torch.bfloat16)
    assert choice['attention'] == 'torch' and 'out of resource' in reasons['attention']


def test_a_kernel_whose_first_launch_fails_does_not_spoil_the_others(card, monkeypatch):
    def plain_unless_refused(*arguments):
        if kernels.tuned.get('conv weight', 0) == 0:
            raise RuntimeError('out of resource')
        return kernels.grouped_conv_plain(*arguments)
    card.kernels['conv'] = plain_unless_refused
    monkeypatch.setattr(kernels, 'milliseconds', lambda *arguments: len(kernels.results(*arguments)))
    choice, _ = choose('triton', {'conv': SHAPES['conv']}, 'cpu', torch.bfloat16)
    assert choice['conv'] == 'triton' and kernels.tuned == {'conv weight': 1}
    assert kernels.tuned_name('conv') == 'conv:0.1' and kernels.recall('conv:0.1') == 'conv'


def test_launches_are_recalled_by_name(monkeypatch):
    monkeypatch.setattr(kernels, 'tuned', {})
    assert kernels.recall('attention:2.0.1') == 'attention' and kernels.tuned_name('attention') == 'attention:2.0.1'
    assert kernels.launch('attention', 99)['num_warps'] == 4 and kernels.tuned_name('conv') == 'conv'
    kernels.recall('attention:0.0.0')
    assert [kernels.launch('attention keys', kib)['BLOCK_M'] for kib in (227, 99)] == [64, 32]
    assert kernels.recall('attention') == 'attention' and not kernels.tuned         # untuned again
    for wrong in ('attention:1', 'attention:1.1.7', 'attention:1.1.x', 'conv:0.0.0', 'fast', 'conv:-1.0'):
        with pytest.raises(ValueError, match='is no kernel'):
            kernels.recall(wrong)


def test_a_slower_kernel_is_refused_unless_asked_for(card):
    card.times['attention'] = 3.0
    assert choose('auto', SHAPES, 'cpu', torch.bfloat16)[0] == {'conv': 'triton', 'attention': 'torch'}
    assert choose('triton', SHAPES, 'cpu', torch.bfloat16)[0] == {'conv': 'triton', 'attention': 'triton'}


def test_shapes_that_no_kernel_takes(card):
    choice, reasons = choose('auto', {'conv': None, 'attention': (2, 505, 2, 4, 0.3, True)}, 'cpu', torch.bfloat16)
    assert choice == {'conv': 'torch', 'attention': 'torch'}
    assert reasons['conv'] == 'this model has no such layer' and '505 tokens' in reasons['attention']


def test_choosing_leaves_the_random_numbers_alone(card):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    choose('auto', SHAPES, 'cpu', torch.bfloat16)
    assert torch.equal(torch.rand(3), expected)


def test_without_a_card():
    for mode in ('auto', 'torch'):
        choice, reasons = choose(mode, SHAPES, 'cpu', torch.bfloat16)
        assert choice == {'conv': 'torch', 'attention': 'torch'} and len(reasons) == 2
    with pytest.raises(ValueError, match='^kernels = triton, but '):
        choose('triton', SHAPES, 'cpu', torch.bfloat16)
    with pytest.raises(ValueError, match='none of auto, torch, triton'):
        choose('cuda', SHAPES, 'cpu', torch.bfloat16)
