"""Faster forms of model.py's expressions, put into a built model from outside: apply(model) returns what it replaced.

A form is a class that overrides one method of a class of model.py or PyTorch; a module that is given it keeps its
weights, its name and its hooks, and computes the same numbers up to rounding. tests/test_fast.py compares each with the
plain one, docs/performance.md says what each gains. What is no plain module of its kind (adapted, quantised) stays.
"""
import contextlib
import ctypes

import torch
import torch.nn as nn
import torch.nn.functional as F

import configurator
from engine.errors import ConfigError
from fast import kernels
from model import TARGET_EPS, DiffAttention, n_kept

MAX_MAP = 1024              # tokens up to which a CPU computes attention faster with its maps in memory


class AutocastLayerNorm(nn.LayerNorm):
    """Its result has autocast's type, where PyTorch's own has float32 and twice the memory traffic."""

    def forward(self, x):
        return super().forward(x).to(kernels.autocast_type(x))


class FusedAttention(DiffAttention):
    """(A1 - lambda A2) V = A1 V - lambda A2 V, by PyTorch's fused call over 2h heads: no maps in memory."""

    def attend(self, q, k, v):
        if q.device.type == 'cpu' and q.shape[2] <= MAX_MAP:
            return super().attend(q, k, v)
        y = F.scaled_dot_product_attention(q, k, torch.cat([v] * (q.shape[1] // v.shape[1]), dim=1))
        if not self.config.diff_lambda:
            return y
        y1, y2 = y.chunk(2, dim=1)
        return y1 - self.config.diff_lambda * y2


class TritonAttention(FusedAttention):
    """One product for Q, K and V, one kernel for the rest up to the norm of a head, whose weight and bias go into W_O:
    on the shapes that the kernel takes. What it does not call (qk, v, norm, proj) has no hooks then."""

    def forward(self, x):
        h, D, per_head = self.config.n_head, x.shape[2], self.config.head_norm == 'per_head'
        if not (self.config.diff_lambda and type(self.qk) is type(self.v) is nn.Linear
                and (type(self.norm) is nn.GroupNorm or not per_head)
                and kernels.diff_attention_fits(x.shape[1], D // h, kernels.autocast_type(x))):
            return super().forward(x)
        weight, bias = torch.cat([self.qk.weight, self.v.weight]), torch.cat([self.qk.bias, self.v.bias])
        qkv = F.linear(x, weight, bias.detach())                            # the next line has the bias's gradient
        y = kernels.diff_attention(qkv, bias, h, self.config.diff_lambda, per_head, TARGET_EPS)
        if not per_head or type(self.proj) is not nn.Linear:
            y = y * self.norm.weight + self.norm.bias if per_head else self.norm(y)
            return self.proj(y * self.config.attn_scale)
        weight = self.proj.weight * self.config.attn_scale                  # W_O (w y + b) = (W_O w) y + W_O b: no pass
        return F.linear(y, weight * self.norm.weight, self.proj.bias + (weight * self.norm.bias).sum(dim=1))    # over y


class TritonConv(nn.Conv2d):
    """A grouped 3 x 3 convolution by a kernel, which takes the channels last."""

    def forward(self, x):
        y = kernels.grouped_conv(x.permute(0, 2, 3, 1), self.weight, self.bias, self.groups)
        return y.permute(0, 3, 1, 2)


# name: (what modules are, what they become, in words)
FORMS = {'norm': ((nn.LayerNorm,), AutocastLayerNorm, "LayerNorms in autocast's type"),
         'fused': ((DiffAttention,), FusedAttention, 'attentions without long maps in memory'),
         'attention': ((DiffAttention, FusedAttention), TritonAttention, "students' attentions by Triton"),
         'conv': ((nn.Conv2d,), TritonConv, 'convolutions of the decoder by Triton')}
PARTS = {'attention': 'encoder', 'conv': 'decoder'}     # the teacher sees too many tokens for the first
ALWAYS = 'norm', 'fused'        # conv and attention only where forms.choose has found them right and faster


def apply(model, names=ALWAYS):
    """Give every module of a model (ASDA, Classifier, Encoder) that has a form of these names that form; let the C
    library keep freed memory. -> one line that says what was replaced"""
    keep_freed_memory()
    done = []
    for name in names:
        kinds, form, words = FORMS[name]
        part = getattr(model, PARTS[name], nn.Module()) if name in PARTS else model
        found = [module for module in part.modules() if type(module) in kinds]
        for module in found:
            module.__class__ = form
        done += [f'{len(found)} {words}'] if found else []
    return 'faster forms: ' + ('; '.join(done) or 'none')


def keep_freed_memory():
    """Let the C library reuse the memory of large tensors instead of returning it to the system, which then clears it
    page by page at every step. Where there is no glibc, nothing."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                                                      # M_MMAP_MAX
        mallopt(-1, 2 ** 31 - 1)                                            # M_TRIM_THRESHOLD


def kernel_shapes(config, clips):
    """What kernels.choose wants to know of a forward pass over so many clips."""
    views, (rows, columns), h = clips * config.n_students, config.grid, config.n_head
    tokens = 1 + n_kept(rows * columns, config.mask_ratio)
    return {'conv': (views, rows, columns, config.n_embd, config.decoder_groups) if config.decoder_layers else None,
            'attention': (views, tokens, h, config.n_embd // h, config.diff_lambda, config.head_norm == 'per_head')
            if config.diff_lambda else None}


def choose(settings, config, stored, process):
    """Names for apply: those that always are, and Triton's as settings.kernels says. The choice of one process, or of
    the settings `stored` in the checkpoint that goes on, holds for all and is left in settings.kernels. Raises
    ConfigError."""
    if settings.kernels == 'auto' and stored:
        settings.kernels = stored.get('kernels', 'torch')
    elif settings.kernels in ('auto', 'torch', 'triton'):
        settings.kernels = ','.join(time_kernels(settings, config, process)) or 'torch'
    names = configurator.words(settings.kernels)
    if names == ['torch']:
        return ALWAYS
    try:
        names, missing = [kernels.recall(name) for name in names], kernels.unusable(process.device)
    except ValueError as error:
        missing = error
    if missing:
        raise ConfigError(f'kernels = {settings.kernels!r}, but {missing}: write --kernels=torch')
    return *ALWAYS, *names


def time_kernels(settings, config, process):
    """The kernels that settings.kernels, auto, torch or triton, leads to, with how they are launched: on all processes
    those that the first has chosen."""
    clips = settings.batch_size // process.world // settings.accumulate
    if settings.kernels != 'torch' and not kernels.unusable(process.device):
        process.print('compiling and timing the Triton kernels ...')        # a minute, unless Triton remembers them
    try:
        choice, reasons = kernels.choose(settings.kernels if process.is_main else 'torch',
                                         kernel_shapes(config, clips), process.device,
                                         getattr(torch, settings.dtype), timed=not settings.deterministic)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if len(set(reasons.values())) > 1:                                      # else no kernel was tried, for one reason
        for name, reason in reasons.items():
            process.print(f'{name} by {"Triton" if choice[name] == "triton" else "PyTorch"}: {reason}')
    return process.gather([kernels.tuned_name(name) for name in choice if choice[name] == 'triton'])[0]
