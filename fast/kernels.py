"""Optional Triton kernels for the two expressions of model.py that PyTorch runs slowly, each beside the plain
expression it must equal: the decoder's grouped 3 x 3 convolution, and differential attention over short sequences.

Both are custom operators with gradients, so that autograd, autocast and torch.compile take them like any other. Nothing
here is needed: without Triton or a CUDA device `choose` answers 'torch', and the plain expressions do the work.
This file must not know the network. Shapes: V views on a grid of rows x columns places, D channels in groups of C;
B sequences of N tokens, h heads of width d. Products are summed in float32 whatever the inputs are; nothing is added
in an order that may vary, so the same inputs give the same bits.
"""
import math
import re
import statistics
import time
import types

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:                         # the plain expressions need none of it
    triton, tl = None, types.SimpleNamespace(constexpr=None)

    def jit(function):
        return function

# How each kernel may be launched, and the KiB of shared memory that one program must be able to have for it: 99 for
# compute capability 8.6, 8.9 and 12.0, 163 for 8.0, 227 for 9.0 and 10.0. `tune` times what fits and keeps the fastest;
# untimed, the first that fits counts. BLOCK_M: positions, queries or keys at a time; BLOCK_K: how many of the 9 C
# inputs of a position at a time. Several stages: copied ahead of use, past the L1 cache; one: loaded through it, which
# nine taps that read almost the same places may repay. float32 uses no tensor cores here and needs more room.
# Checkpoints remember places in these lists: add at their ends.
LAUNCH = {
    'conv': [(99, dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3)),
             (99, dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=4)),
             (99, dict(BLOCK_M=128, BLOCK_K=64, num_warps=8, num_stages=3)),
             (99, dict(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=1))],
    'conv weight': [(99, dict(BLOCK_M=64, BLOCK_K=128, num_warps=4, num_stages=3)),
                    (99, dict(BLOCK_M=64, BLOCK_K=64, num_warps=4, num_stages=3)),
                    (99, dict(BLOCK_M=128, BLOCK_K=64, num_warps=4, num_stages=3)),
                    (99, dict(BLOCK_M=64, BLOCK_K=64, num_warps=8, num_stages=1))],
    'conv float32': [(99, dict(BLOCK_M=64, BLOCK_K=32, num_warps=4, num_stages=2))],
    'conv weight float32': [(99, dict(BLOCK_M=32, BLOCK_K=32, num_warps=4, num_stages=2))],
    'attention': [(99, dict(BLOCK_M=64, num_warps=8, num_stages=1)),
                  (99, dict(BLOCK_M=32, num_warps=8, num_stages=1)),
                  (99, dict(BLOCK_M=32, num_warps=4, num_stages=1))],
    'attention queries': [(99, dict(BLOCK_M=64, num_warps=8, num_stages=1)),
                          (99, dict(BLOCK_M=32, num_warps=8, num_stages=1)),
                          (99, dict(BLOCK_M=32, num_warps=4, num_stages=1))],
    'attention keys': [(227, dict(BLOCK_M=64, num_warps=8, num_stages=1)),
                       (99, dict(BLOCK_M=32, num_warps=8, num_stages=1)),
                       (99, dict(BLOCK_M=32, num_warps=4, num_stages=1))],
}
tuned = {}                      # {kernel: place in its list of LAUNCH}, what `tune` found or `recall` was told
SPLITS = 32                     # parts of the positions whose weight gradients are computed side by side
MAX_TOKENS, MAX_WIDTH = 128, 96     # what attention's programs hold without spilling registers


def launch(kernel, shared_kib):
    """The launch that is tuned, if a card with so much shared memory can do it, or else the first that it can."""
    fitting = [i for i, (least, _) in enumerate(LAUNCH[kernel]) if least <= shared_kib]
    return LAUNCH[kernel][tuned[kernel] if tuned.get(kernel) in fitting else fitting[0]][1]


def launch_on(kernel, x):
    """The same for a tensor's card."""
    return launch(kernel, shared_memory(x.device))


def shared_memory(device):
    """KiB of shared memory that one program may have. Triton's interpreter, on a CPU, takes any."""
    if device.type != 'cuda':
        return 99
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 1024


def power_of_two(n):
    """The size of a block that holds n: Triton's sizes are powers of two, its products at least 16 wide."""
    return max(16, 1 << (n - 1).bit_length())


# -------------------------------------------------------------------------------------------------- grouped convolution

def grouped_conv_plain(x, weight, bias, groups):
    """3 x 3 convolution in groups, zeros around the border, channels last.

    x (V, rows, columns, D), weight (D, D / groups, 3, 3), bias (D,) -> (V, rows, columns, D)
    """
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=groups).permute(0, 2, 3, 1)


@jit
def unfolded(x, start, n_positions, group, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr,
             C: tl.constexpr, BLOCK_M: tl.constexpr):
    """Tile (BLOCK_M, len(k)) of the matrix whose row holds the 9 C inputs of one position: k = tap * C + channel."""
    position = start + tl.arange(0, BLOCK_M)
    row, column = position // COLUMNS % ROWS, position % COLUMNS
    tap = k // C
    down, right = tap // 3 - 1, tap % 3 - 1
    row, column = row[:, None] + down[None, :], column[:, None] + right[None, :]
    inside = (row >= 0) & (row < ROWS) & (column >= 0) & (column < COLUMNS)
    inside = inside & (position < n_positions)[:, None] & (k < 9 * C)[None, :]
    # only the tile's start needs 64 bits: offsets within it are small
    x += start.to(tl.int64) * D + group * C
    offset = (tl.arange(0, BLOCK_M)[:, None] + (down * COLUMNS + right)[None, :]) * D + (k % C)[None, :]
    return tl.load(x + offset, mask=inside, other=0.0)


@jit
def conv_kernel(x, weight, bias, y, n_positions, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr,
                C: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_K: tl.constexpr):
    """y (positions, D) = unfolded x (positions, 9 C) @ weight (9 C, C) in each group; one program per
    (BLOCK_M positions, BLOCK_N outputs of a group)."""
    TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    # groups vary fastest: programs that run together read neighbouring channels of the same positions
    tile = tl.program_id(0) % (D // C * TILES)
    start = tl.program_id(0) // (D // C * TILES) * BLOCK_M
    group = tile // TILES
    n = tile % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, 9 * C, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = unfolded(x, start, n_positions, group, k, ROWS, COLUMNS, D, C, BLOCK_M)
        b = tl.load(weight + group * 9 * C * C + k[:, None] * C + n[None, :],
                    mask=(k < 9 * C)[:, None] & (n < C)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision='ieee')
    if HAS_BIAS:
        total += tl.load(bias + group * C + n, mask=n < C, other=0.0).to(tl.float32)[None, :]
    m = tl.arange(0, BLOCK_M)
    y += start.to(tl.int64) * D + group * C
    tl.store(y + m[:, None] * D + n[None, :], total.to(y.dtype.element_ty),
             mask=(start + m < n_positions)[:, None] & (n < C)[None, :])


@jit
def conv_weight_kernel(x, grad, partial, n_positions, span, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                       D: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                       BLOCK_K: tl.constexpr):
    """partial (splits, groups, 9 C, C): unfolded x^T @ grad over `span` positions each; one program per
    (split, BLOCK_K x BLOCK_N of a group's weight)."""
    TILES: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tile, k0, split = tl.program_id(0), tl.program_id(1) * BLOCK_K, tl.program_id(2)
    group = tile // TILES
    n = tile % TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    k = k0 + tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    first = split * span
    for step in range(0, tl.minimum(span, n_positions - first), BLOCK_M):
        start = first + step
        a = unfolded(x, start, n_positions, group, k, ROWS, COLUMNS, D, C, BLOCK_M)
        b = tl.load(grad + start.to(tl.int64) * D + group * C + m[:, None] * D + n[None, :],
                    mask=(start + m < n_positions)[:, None] & (n < C)[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision='ieee')
    partial += (split * (D // C) + group) * 9 * C * C
    tl.store(partial + k[:, None] * C + n[None, :], total, mask=(k < 9 * C)[:, None] & (n < C)[None, :])


@torch.library.custom_op('asda::grouped_conv', mutates_args=())
def conv_op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int) -> torch.Tensor:
    """grouped_conv_plain in x's type, whatever weight's and bias's."""
    x, (D, C) = x.contiguous(), weight.shape[:2]
    V, rows, columns, _ = x.shape
    weight = weight.reshape(groups, C, C, 3, 3).permute(0, 3, 4, 2, 1)      # (groups, 3, 3, in, out)
    weight = weight.to(x.dtype).contiguous()
    y = torch.empty_like(x)
    how = launch_on('conv float32' if x.dtype == torch.float32 else 'conv', x)
    block_n = min(power_of_two(C), 64)
    grid = (groups * triton.cdiv(C, block_n) * triton.cdiv(V * rows * columns, how['BLOCK_M']),)
    conv_kernel[grid](x, weight, y if bias is None else bias, y, V * rows * columns, rows, columns, D, C,
                      bias is not None, BLOCK_N=block_n, **how)
    return y


@torch.library.custom_op('asda::grouped_conv_weight_grad', mutates_args=())
def conv_weight_grad_op(x: torch.Tensor, grad: torch.Tensor, groups: int) -> torch.Tensor:
    """x, grad (V, rows, columns, D) -> (D, D / groups, 3, 3) float32"""
    x, grad = x.contiguous(), grad.contiguous()
    V, rows, columns, D = x.shape
    C, n_positions = D // groups, V * rows * columns
    how = launch_on('conv weight float32' if x.dtype == torch.float32 else 'conv weight', x)
    span = triton.cdiv(triton.cdiv(n_positions, SPLITS), how['BLOCK_M']) * how['BLOCK_M']
    splits, block_n = triton.cdiv(n_positions, span), min(power_of_two(C), 64)
    partial = x.new_empty(splits, groups, 3, 3, C, C, dtype=torch.float32)
    grid = (groups * triton.cdiv(C, block_n), triton.cdiv(9 * C, how['BLOCK_K']), splits)
    conv_weight_kernel[grid](x, grad, partial, n_positions, span, rows, columns, D, C, BLOCK_N=block_n, **how)
    return partial.sum(0).permute(0, 4, 3, 1, 2).reshape(D, C, 3, 3).contiguous()      # of one group it is a view


@conv_op.register_fake
def _(x, weight, bias, groups):
    return x.new_empty(x.shape)


@conv_weight_grad_op.register_fake
def _(x, grad, groups):
    return x.new_empty(x.shape[-1], x.shape[-1] // groups, 3, 3, dtype=torch.float32)


def save_conv(ctx, inputs, output):
    x, weight, bias, ctx.groups = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_type = None if bias is None else bias.dtype


def conv_backward(ctx, grad):
    (x, weight), groups = ctx.saved_tensors, ctx.groups
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:             # the same convolution: taps flipped, inputs and outputs exchanged
        D, C = weight.shape[:2]
        flipped = weight.reshape(groups, C, C, 3, 3).transpose(1, 2).flip(3, 4).reshape(D, C, 3, 3)
        grad_x = conv_op(grad, flipped, None, groups)
    if ctx.needs_input_grad[1]:
        grad_weight = conv_weight_grad_op(x, grad, groups).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum((0, 1, 2), dtype=torch.float32).to(ctx.bias_type)
    return grad_x, grad_weight, grad_bias, None


conv_op.register_autograd(conv_backward, setup_context=save_conv)


def autocast_type(x):
    """The type that autocast, where it is on, wants x to have."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def grouped_conv(x, weight, bias, groups):
    """grouped_conv_plain by Triton. Under autocast x takes its type; weight and bias may stay float32, and so do their
    gradients. x (V, rows, columns, D), weight (D, D / groups, 3, 3), bias (D,) -> (V, rows, columns, D)"""
    return conv_op(x.to(autocast_type(x)), weight, bias, groups)


# ----------------------------------------------------------------------------------------------- differential attention

def diff_attention_plain(qkv, bias, n_head, diff_lambda, norm=True, eps=1e-5):
    """head_i = LN((softmax(Q1 K1^T / sqrt(d)) - lambda softmax(Q2 K2^T / sqrt(d))) V) (arXiv 2507.02666, eq. 1-3),
    the LayerNorm without weight and bias and only if `norm`.

    qkv (B, N, 5 h d), a token's row being Q1, Q2, K1, K2 and V of all heads; bias (5 h d,), which the linear layer
    before has added to every token, leaving its gradient to this function, which has qkv's at hand -> (B, N, h d)
    """
    B, N, D = *qkv.shape[:2], qkv.shape[2] // 5
    qk, v = (qkv + (bias - bias.detach()).to(qkv.dtype)).split([4 * D, D], dim=2)
    q, k = qk.reshape(B, N, 2, 2 * n_head, D // n_head).permute(2, 0, 3, 1, 4)  # (B, 2 h, N, d) each
    v = v.reshape(B, N, n_head, D // n_head).transpose(1, 2)                    # (B, h, N, d)
    y1, y2 = F.scaled_dot_product_attention(q, k, torch.cat([v, v], dim=1)).chunk(2, dim=1)
    y = (y1 - diff_lambda * y2).transpose(1, 2)                                 # (B, N, h, d)
    if norm:
        y = F.layer_norm(y, y.shape[-1:], eps=eps)
    return y.reshape(B, N, D)


@jit
def tile(x, first, stride, N: tl.constexpr, d: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows first, first + 1, ... of one head's x (N, d), `stride` apart, as (ROWS, WIDTH) with zeros beyond."""
    token, channel = first + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    return tl.load(x + token[:, None] * stride + channel[None, :],
                   mask=(token < N)[:, None] & (channel < d)[None, :], other=0.0)


@jit
def put(x, value, first, stride, N: tl.constexpr, d: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The opposite of tile: value (ROWS, WIDTH) -> x, in x's type."""
    token, channel = first + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    tl.store(x + token[:, None] * stride + channel[None, :], value.to(x.dtype.element_ty),
             mask=(token < N)[:, None] & (channel < d)[None, :])


@jit
def attention_kernel(qkv, out, lse, rstd, scale, diff_lambda, eps, H: tl.constexpr, N: tl.constexpr,
                     d: tl.constexpr, NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                     WIDTH: tl.constexpr):
    """out = norm((A1 - lambda A2) V); one program per BLOCK_M queries of a head of a sequence, with all of its keys.

    qkv (B, N, 5 h d): Q1, Q2, K1, K2, V; out (B, N, h d). For the gradients: lse (B h, 2, N), log2 of the softmaxes'
    denominators, and rstd (B h, N) of the norm. scale includes log2(e), since exp2 is what the hardware has.
    """
    BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    D: tl.constexpr = H * d
    pid, first = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS * BLOCK_M
    offset, head = (pid // H).to(tl.int64) * N * D, pid % H * d
    qkv, out = qkv + 5 * offset + head, out + offset + head
    token, key = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    a = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(2):                                                      # the two maps
        q = tile(qkv + i * D, first, 5 * D, N, d, BLOCK_M, WIDTH)
        k = tile(qkv + (2 + i) * D, 0, 5 * D, N, d, BLOCK_N, WIDTH)
        s = tl.dot(q, tl.trans(k), input_precision='ieee') * scale
        s = tl.where((key < N)[None, :], s, float('-inf'))
        top = tl.max(s, 1)
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, 1)
        a += p * (tl.where(i == 0, 1.0, -diff_lambda) / total)[:, None]
        tl.store(lse + (2 * pid + i) * N + token, top + tl.log2(total), mask=token < N)
    v = tile(qkv + 4 * D, 0, 5 * D, N, d, BLOCK_N, WIDTH)
    y = tl.dot(a.to(v.dtype), v, input_precision='ieee')
    if NORM:
        y -= (tl.sum(y, 1) / d)[:, None]
        y = tl.where((tl.arange(0, WIDTH) < d)[None, :], y, 0.0)
        r = 1 / tl.sqrt(tl.sum(y * y, 1) / d + eps)
        y *= r[:, None]
        tl.store(rstd + pid * N + token, r, mask=token < N)
    put(out, y, first, D, N, d, BLOCK_M, WIDTH)


@jit
def attention_query_kernel(qkv, out, lse, rstd, grad, grad_y, delta, grad_qkv, sums, scale, diff_lambda,
                           H: tl.constexpr, N: tl.constexpr, d: tl.constexpr, NORM: tl.constexpr,
                           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """Gradients of BLOCK_M queries, with all keys, and their sums over these queries, (B, blocks, 2 h d). For the
    keys' turn it also leaves grad_y (B, N, h d), the gradient before the norm, and delta (B h, 2, N), each map's row
    sums of A dA. The maps are computed again."""
    BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    D: tl.constexpr = H * d
    pid, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    first, offset, head = block * BLOCK_M, (pid // H).to(tl.int64) * N * D, pid % H * d
    qkv, grad, grad_qkv = qkv + 5 * offset + head, grad + offset + head, grad_qkv + 5 * offset + head
    sums += (pid // H * BLOCKS + block) * 2 * D + head
    token, key, channel = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    g = tile(grad, first, D, N, d, BLOCK_M, WIDTH)
    if NORM:
        # y = (x - mean) r:  dx = r (dy - mean(dy) - y mean(dy y)). Beyond d it is not zero, but meets zeros of v
        g = g.to(tl.float32)
        y = tile(out + offset + head, first, D, N, d, BLOCK_M, WIDTH).to(tl.float32)
        r = tl.load(rstd + pid * N + token, mask=token < N, other=0.0)
        g = (g - (tl.sum(g, 1) / d)[:, None] - y * (tl.sum(g * y, 1) / d)[:, None]) * r[:, None]
        g = g.to(qkv.dtype.element_ty)
        put(grad_y + offset + head, g, first, D, N, d, BLOCK_M, WIDTH)
    v = tile(qkv + 4 * D, 0, 5 * D, N, d, BLOCK_N, WIDTH)
    da = tl.dot(g, tl.trans(v), input_precision='ieee')
    for i in range(2):
        q = tile(qkv + i * D, first, 5 * D, N, d, BLOCK_M, WIDTH)
        k = tile(qkv + (2 + i) * D, 0, 5 * D, N, d, BLOCK_N, WIDTH)
        s = tl.dot(q, tl.trans(k), input_precision='ieee') * scale
        log_total = tl.load(lse + (2 * pid + i) * N + token, mask=token < N, other=float('inf'))
        a = tl.where((key < N)[None, :], tl.exp2(s - log_total[:, None]), 0.0)
        row = tl.sum(a * da, 1)
        tl.store(delta + (2 * pid + i) * N + token, row, mask=token < N)
        ds = a * (da - row[:, None]) * (tl.where(i == 0, 1.0, -diff_lambda) * scale * 0.6931471805599453)
        gq = tl.dot(ds.to(k.dtype), k, input_precision='ieee')
        put(grad_qkv + i * D, gq, first, 5 * D, N, d, BLOCK_M, WIDTH)
        tl.store(sums + i * D + channel, tl.sum(gq, 0), mask=channel < d)   # beyond N it is zero


@jit
def attention_key_kernel(qkv, lse, grad_y, delta, grad_qkv, sums, scale, diff_lambda, H: tl.constexpr,
                         N: tl.constexpr, d: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                         WIDTH: tl.constexpr):
    """Gradients of BLOCK_M keys and values, with all queries, and the sums of the values', (B, blocks, h d)."""
    BLOCKS: tl.constexpr = (N + BLOCK_M - 1) // BLOCK_M
    D: tl.constexpr = H * d
    pid, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    first, offset, head = block * BLOCK_M, (pid // H).to(tl.int64) * N * D, pid % H * d
    qkv, grad_qkv = qkv + 5 * offset + head, grad_qkv + 5 * offset + head
    token, channel = tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    g = tile(grad_y + offset + head, 0, D, N, d, BLOCK_N, WIDTH)            # of all queries
    # transposed maps, (BLOCK_M keys, BLOCK_N queries). Keys beyond N get numbers that go nowhere
    v = tile(qkv + 4 * D, first, 5 * D, N, d, BLOCK_M, WIDTH)
    da = tl.dot(v, tl.trans(g), input_precision='ieee')
    gv = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for i in range(2):
        q = tile(qkv + i * D, 0, 5 * D, N, d, BLOCK_N, WIDTH)
        k = tile(qkv + (2 + i) * D, first, 5 * D, N, d, BLOCK_M, WIDTH)
        s = tl.dot(k, tl.trans(q), input_precision='ieee') * scale
        log_total = tl.load(lse + (2 * pid + i) * N + token, mask=token < N, other=float('inf'))
        a = tl.exp2(s - log_total[None, :]) * tl.where(i == 0, 1.0, -diff_lambda)
        gv = tl.dot(a.to(g.dtype), g, gv, input_precision='ieee')
        row = tl.load(delta + (2 * pid + i) * N + token, mask=token < N, other=0.0)
        ds = a * (da - row[None, :]) * (scale * 0.6931471805599453)
        gk = tl.dot(ds.to(q.dtype), q, input_precision='ieee')
        put(grad_qkv + (2 + i) * D, gk, first, 5 * D, N, d, BLOCK_M, WIDTH)
    put(grad_qkv + 4 * D, gv, first, 5 * D, N, d, BLOCK_M, WIDTH)
    gv = tl.where((first + tl.arange(0, BLOCK_M) < N)[:, None], gv, 0.0)
    tl.store(sums + (pid // H * BLOCKS + block) * D + head + channel, tl.sum(gv, 0), mask=channel < d)


@torch.library.custom_op('asda::diff_attention', mutates_args=())
def attention_op(qkv: torch.Tensor, bias: torch.Tensor, n_head: int, diff_lambda: float, norm: bool,
                 eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> result (B, N, h d), and for the gradients lse (B h, 2, N), rstd (B h, N or, without norm, 0)"""
    qkv = qkv.contiguous()
    out, lse, rstd = attention_like(qkv, bias, n_head, diff_lambda, norm, eps)
    how, grid = attention_launch('attention', qkv, n_head)
    attention_kernel[grid](qkv, out, lse, rstd, math.log2(math.e) / math.sqrt(how['d']), diff_lambda, eps,
                           NORM=norm, **how)
    return out, lse, rstd


def attention_launch(kernel, qkv, n_head):
    """The arguments of LAUNCH together with those that follow from the shapes, and the grid."""
    B, N, width = qkv.shape
    d = width // (5 * n_head)
    how = dict(launch_on(kernel, qkv), H=n_head, N=N, d=d, BLOCK_N=power_of_two(N), WIDTH=power_of_two(d))
    how['BLOCK_M'] = min(how['BLOCK_M'], how['BLOCK_N'])
    return how, (B * n_head * triton.cdiv(N, how['BLOCK_M']),)


@torch.library.custom_op('asda::diff_attention_grad', mutates_args=())
def attention_grad_op(qkv: torch.Tensor, out: torch.Tensor | None, lse: torch.Tensor, rstd: torch.Tensor,
                      grad: torch.Tensor, n_head: int, diff_lambda: float,
                      norm: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """-> gradients of qkv and, in float32, of the bias. `out`, the result, is used only with norm."""
    qkv, grad = qkv.contiguous(), grad.contiguous()
    grad_qkv, delta, grad_y = torch.empty_like(qkv), torch.empty_like(lse), torch.empty_like(grad) if norm else grad
    D = grad.shape[-1]
    scale = math.log2(math.e) / math.sqrt(D // n_head)
    how, grid = attention_launch('attention queries', qkv, n_head)
    sum_q = qkv.new_empty(grid[0] // n_head, 2 * D, dtype=torch.float32)
    attention_query_kernel[grid](qkv, out if norm else grad, lse, rstd, grad, grad_y, delta, grad_qkv, sum_q,
                                 scale, diff_lambda, NORM=norm, **how)
    how, grid = attention_launch('attention keys', qkv, n_head)
    sum_v = qkv.new_empty(grid[0] // n_head, D, dtype=torch.float32)
    attention_key_kernel[grid](qkv, lse, grad_y, delta, grad_qkv, sum_v, scale, diff_lambda, **how)
    # what is added to all keys alike leaves a softmax as it is: the gradient of the keys' bias is zero
    return grad_qkv, torch.cat([sum_q.sum(0), sum_q.new_zeros(2 * D), sum_v.sum(0)])


@attention_op.register_fake
def attention_like(qkv, bias, n_head, diff_lambda, norm, eps):
    B, N, width = qkv.shape
    return (qkv.new_empty(B, N, width // 5), qkv.new_empty(B * n_head, 2, N, dtype=torch.float32),
            qkv.new_empty(B * n_head, N if norm else 0, dtype=torch.float32))


@attention_grad_op.register_fake
def _(qkv, out, lse, rstd, grad, n_head, diff_lambda, norm):
    return qkv.new_empty(qkv.shape), qkv.new_empty(qkv.shape[2], dtype=torch.float32)


def save_attention(ctx, inputs, output):
    qkv, bias, ctx.n_head, ctx.diff_lambda, ctx.norm, _ = inputs
    out, lse, rstd = output
    ctx.save_for_backward(qkv, out if ctx.norm else None, lse, rstd)
    ctx.mark_non_differentiable(lse, rstd)
    ctx.bias_type = bias.dtype


def attention_backward(ctx, grad, *_):
    grad_qkv, grad_bias = attention_grad_op(*ctx.saved_tensors, grad, ctx.n_head, ctx.diff_lambda, ctx.norm)
    return grad_qkv, grad_bias.to(ctx.bias_type), None, None, None, None


attention_op.register_autograd(attention_backward, setup_context=save_attention)


def diff_attention_fits(N, d, dtype):
    """Whether diff_attention takes N tokens and heads of width d: all keys of a head must fit into one program."""
    return N <= MAX_TOKENS and d <= MAX_WIDTH and dtype in (torch.bfloat16, torch.float16)


def diff_attention(qkv, bias, n_head, diff_lambda, norm=True, eps=1e-5):
    """diff_attention_plain by Triton, for shapes that diff_attention_fits. The result has the type of qkv, which is
    autocast's, where the plain LayerNorm gives float32; bias and its gradient may stay float32.
    qkv (B, N, 5 h d), bias (5 h d,) -> (B, N, h d)"""
    return attention_op(qkv.to(autocast_type(qkv)), bias, n_head, diff_lambda, norm, eps)[0]


# ------------------------------------------------------------------------------------------------------------- choosing

EXPRESSIONS = {'conv': (grouped_conv_plain, grouped_conv), 'attention': (diff_attention_plain, diff_attention)}
TOLERANCE = 2                   # a kernel's error may be this many times the plain expression's in the same type


def unusable(device):
    """Why Triton's kernels cannot run on this device, or None."""
    if triton is None:
        return 'Triton is not installed'
    if torch.device(device).type != 'cuda':
        return f'the device is {device}, not CUDA'
    if shared_memory(torch.device(device)) < 99:
        return f'{torch.cuda.get_device_name(device)} has too little shared memory'


def trial(name, shape, device):
    """Float32 data, parameters and other arguments of a kernel in the shape that choose describes, and a gradient of
    its result."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size):                      # bfloat16 numbers, which TF32 does not round either
        return torch.randn(size, generator=generator, device=device).bfloat16().float()
    if name == 'conv':
        V, rows, columns, D, groups = shape
        grid = V, rows, columns, D
        return [normal(*grid)], [normal(D, D // groups, 3, 3) / 16, normal(D)], (groups,), normal(*grid)
    B, N, h, d, diff_lambda, norm = shape
    return [normal(B, N, 5 * h * d)], [normal(5 * h * d) / 2], (h, diff_lambda, norm), normal(B, N, h * d)


def results(function, tensors, others, grad, dtype):
    """The function's value and the gradient of every tensor, under autocast as in training."""
    with torch.enable_grad(), torch.autocast(grad.device.type, dtype, enabled=dtype != torch.float32):
        y = function(*tensors, *others)
    return [y.detach(), *torch.autograd.grad(y, tensors, grad.to(y.dtype))]


def milliseconds(function, tensors, *arguments, repeats=5):
    """Median time of results(function, ...)."""
    def clock():
        if tensors[0].is_cuda:
            torch.cuda.synchronize(tensors[0].device)
        return 1000 * time.perf_counter()
    times = []
    for _ in range(repeats + 2):            # the first two warm up
        start = clock()
        results(function, tensors, *arguments)
        times.append(clock() - start)
    return statistics.median(times[2:])


def kernels_of(name, dtype):
    """The keys of LAUNCH that belong to an expression in that type."""
    return [kernel for kernel in LAUNCH if kernel.split()[0] == name
            and (name != 'conv' or kernel.endswith('float32') == (dtype == torch.float32))]


def tune(name, tensors, *arguments):
    """Try the launches of an expression's kernels, one kernel after the other, each timed within results(kernel,
    tensors, ...), and leave the fastest that works in `tuned`."""
    for kernel in kernels_of(name, tensors[0].dtype):
        times = {}
        for i, (least, _) in enumerate(LAUNCH[kernel]):
            if least <= shared_memory(tensors[0].device) and len(LAUNCH[kernel]) > 1:
                tuned[kernel] = i
                try:
                    times[i] = milliseconds(EXPRESSIONS[name][1], tensors, *arguments)
                except Exception:           # a launch that this card or this Triton refuses; another may do
                    continue
        tuned.pop(kernel, None)
        if times:
            tuned[kernel] = min(times, key=times.get)


def tuned_name(name):
    """An expression together with the launches that are tuned: 'conv', or 'conv:0.2' for the first launch of its first
    kernel and the third of its second."""
    kernels = kernels_of(name, torch.bfloat16)
    places = '.'.join(str(tuned.get(kernel, 0)) for kernel in kernels)
    return f'{name}:{places}' if any(kernel in tuned for kernel in kernels) else name


def recall(text):
    """Use the launches of what tuned_name has given -> the expression's name. Raises ValueError for anything else."""
    name, _, places = text.partition(':')
    if name not in EXPRESSIONS:
        raise ValueError(f'{text} is no kernel')
    kernels = kernels_of(name, torch.bfloat16)
    for kernel in kernels:
        tuned.pop(kernel, None)
    if places:
        if not re.fullmatch(r'\d(\.\d)*', places) or len(places.split('.')) != len(kernels) or any(
                int(place) >= len(LAUNCH[kernel]) for kernel, place in zip(kernels, places.split('.'))):
            raise ValueError(f'{text} is no kernel: after the colon stand the places of its launches')
        tuned.update(zip(kernels, map(int, places.split('.'))))
    return name


def compare(name, shape, device, dtype, timed=True):
    """Run a plain expression and its kernel, if timed in its fastest launch. -> for each of the two the errors of its
    result and of every gradient against float32, relative to their norms; for each ms, 0 if not timed."""
    plain, kernel = EXPRESSIONS[name]
    data, parameters, others, grad = trial(name, shape, device)
    exact = results(plain, [x.requires_grad_() for x in data + parameters], others, grad, torch.float32)
    # as in training the data come in dtype, the parameters in float32
    tensors = [x.detach().to(dtype).requires_grad_() for x in data] + parameters
    del data
    for launched in kernels_of(name, dtype):
        tuned.pop(launched, None)
    if timed:
        tune(name, tensors, others, grad, dtype)
    found = {f: [((a - b).norm() / b.norm()).item() for a, b in zip(results(f, tensors, others, grad, dtype), exact)]
             for f in (plain, kernel)}
    del exact
    return [(found[f], milliseconds(f, tensors, others, grad, dtype) if timed else 0.0) for f in (plain, kernel)]


def is_right(error, allowed):
    """Whether a kernel may be so far from float32 where the plain expression is `allowed` from it; nan is not."""
    return error <= max(TOLERANCE * allowed, 1e-5)


def examine(name, shape, device, dtype, timed=True):
    """-> plain ms, kernel ms of compare. Raises ValueError, one line, for a kernel that is wrong or does not run."""
    if name == 'attention' and not diff_attention_fits(shape[1], shape[3], dtype):
        raise ValueError(f'{shape[1]} tokens, heads of {shape[3]}, {dtype}: beyond what the kernel holds')
    try:
        (plain, plain_ms), (kernel, kernel_ms) = compare(name, shape, device, dtype, timed)
    except Exception as error:              # whatever Triton, its compiler or the driver raise: training can go on
        said, _, _ = str(error).strip().partition('\n')
        raise ValueError(f'{type(error).__name__}: {said}') from None
    for what, error, allowed in zip(('result', *(f'gradient {i}' for i in range(9))), kernel, plain):
        if not is_right(error, allowed):
            raise ValueError(f'{what} is off by {error:.1e}, the plain expression by {allowed:.1e}')
    return plain_ms, kernel_ms


def choose(mode, shapes, device, dtype, timed=True):
    """Which expression each layer uses: ({'conv': 'torch' or 'triton', 'attention': ...}, {the same: why, one line}).

    mode 'torch': the plain ones. 'triton': the kernels, ValueError where they cannot run or are wrong. 'auto': a kernel
    where it runs, is right and is faster, forward and backward, on the shapes of the run:
    shapes = {'conv': (V, rows, columns, D, groups), 'attention': (B, N, h, d, diff_lambda, norm)}; None for a layer
    that the model lacks. dtype: what autocast computes in. timed=False: no clock decides anything, so that every run
    chooses alike: a kernel where it runs and is right, in its first launch.
    """
    if mode not in ('auto', 'torch', 'triton'):
        raise ValueError(f'kernels = {mode!r} is none of auto, torch, triton')
    why_not = 'asked for' if mode == 'torch' else unusable(device)
    if why_not and mode == 'triton':
        raise ValueError(f'kernels = triton, but {why_not}')
    choice, reasons = {}, {}
    for name in EXPRESSIONS:
        choice[name], shape = 'torch', shapes.get(name)
        if why_not or shape is None:
            reasons[name] = why_not or 'this model has no such layer'
            continue
        try:
            plain, kernel = examine(name, shape, device, dtype, timed)
        except ValueError as error:
            if mode == 'triton':
                raise ValueError(f'kernels = triton, but {name}: {error}') from None
            reasons[name] = str(error)
            continue
        choice[name] = 'triton' if mode == 'triton' or not timed or kernel < plain else 'torch'
        reasons[name] = (f'forward and backward {kernel:.2f} ms in Triton ({tuned_name(name)}), {plain:.2f} ms in '
                         'PyTorch' if timed else 'right, and not timed')
    if torch.device(device).type == 'cuda':
        torch.cuda.empty_cache()            # what the trials held is not of the sizes that training asks for
    return choice, reasons
