"""What a compiled training step keeps in a GPU's memory, counted without one.   python -m pytest tests/test_memory.py

torch.compile decides at compile time what the forward pass saves for the backward pass. Here it traces the base model
on fake tensors, with autocast's rules and the layers of a GPU, and what it would save is added up.
"""
import dataclasses
import runpy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode

from fast import forms, kernels
from model import ASDA, ASDAConfig, count_parameters, n_kept

from .conftest import ROOT

GIB = 2 ** 30
VIEWS = ('view', 'alias', 'permute', 'unsqueeze', 'slice', 'expand', 'select', 'squeeze')


class Traced(Exception):
    pass


def bytes_of(node):
    value = node.meta['val']
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def saved_bytes(config, clips):
    """Bytes of the activations that the forward pass of a compiled ASDA hands to the backward pass."""
    found = []

    def count(graph, inputs):
        (outputs,) = next(node for node in graph.graph.nodes if node.op == 'output').args
        kept = set()
        for node in outputs:
            while node is not None and node.op == 'call_function' and any(f'.{v}.' in str(node.target) for v in VIEWS):
                node = node.args[0]                                         # what it is a view of
            if node is not None and node.op == 'call_function':             # not an input: weights, masks
                kept.add(node)
        found.append(sum(map(bytes_of, kept)))
        raise Traced
    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=count, decompositions=select_decomp_table(),
                           partition_fn=min_cut_rematerialization_partition)
    P, D, n = config.grid[0] * config.grid[1], config.n_embd, config.n_students
    with FakeTensorMode(), torch.autocast('cpu', torch.bfloat16):
        spec, mask = torch.empty(clips, config.frames, config.n_mels), torch.empty(clips, n, P, dtype=torch.bool)
        model = ASDA(config)
        forms.apply(model, forms.FORMS)
        noise = torch.empty(clips * n, P, D, dtype=torch.bfloat16)
        with pytest.raises(Exception, match='Traced'):
            torch.compile(model, backend=backend, fullgraph=True)(spec, mask, noise)
    return found[0]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """autocast of a GPU computes LayerNorm in float32, of a CPU in bfloat16; a GPU's attention keeps no maps."""
    layer_norm = F.layer_norm
    monkeypatch.setattr(F, 'layer_norm', lambda x, *rest, **more: layer_norm(x.float(), *rest, **more))
    monkeypatch.setattr(forms, 'MAX_MAP', 0)
    monkeypatch.setattr(kernels, 'triton', None)                            # nothing is launched


@pytest.mark.skipif(torch.__version__ < (2, 11), reason='PyTorch before 2.11 traces no fake tensors here')
def test_twelve_clips_fit_into_eleven_gigabytes(as_on_a_gpu):
    recipe = runpy.run_path(f'{ROOT}/config/as2m.py')
    fields = {field.name for field in dataclasses.fields(ASDAConfig)}
    config, clips = ASDAConfig(**{key: value for key, value in recipe.items() if key in fields}), 12
    one, two = (saved_bytes(dataclasses.replace(config, n_layer=layers), clips) for layers in (1, 2))
    saved = one + (two - one) * (config.n_layer - 1)

    views, P, D = clips * config.n_students, config.grid[0] * config.grid[1], config.n_embd
    with torch.device('meta'):
        model = ASDA(config)
    student, teacher = count_parameters(model), sum(p.numel() for p in model.teacher.parameters())
    weights = 4 * (student + teacher) + 3 * 4 * student                     # gradients and AdamW's two averages
    grid = views * P * D * 2                                                # one tensor of the decoder, bfloat16
    print(f'saved {saved / GIB:.2f} GiB, of that a layer {(two - one) / GIB:.3f}; weights {weights / GIB:.2f}; '
          f'noise, gradients under way {5 * grid / GIB:.2f}')
    # a layer: Q and K 4, V 1, the attention's result 1, the two sums before the norms and the norms' results 4, the
    # feed-forward layer before and after GELU 7; less than one more for weights in bfloat16 and statistics
    unit = views * (1 + n_kept(P, config.mask_ratio)) * D * 2
    assert 17 * unit < two - one < 18.7 * unit                              # 17.9 with PyTorch 2.14
    assert saved + weights + 5 * grid < 11 * GIB
