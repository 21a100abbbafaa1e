"""ASDA's network: differential attention, the encoder, the decoder, students and teacher with their losses,
the classifier.

Wang et al., "ASDA: Audio Spectrogram Differential Attention Mechanism for Self-Supervised Representation Learning",
Interspeech 2025, arXiv 2507.02666. Equations and sections below are the paper's. `python model.py` prints the parameter
counts.

This file must not know audio, files, devices or processes; of the rest of the code it uses kernels.py, where a layer is
told to. Shapes: B clips, n students (views) per clip, P patches of a
clip on a (P/8, 8) grid of time x frequency, T kept patches of a view, D channels, h heads of d = D / h channels,
L layers.
"""
import copy
import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels


@dataclass
class ASDAConfig:
    n_layer: int = 12                   # L, transformer blocks
    n_head: int = 8                     # heads; differential attention computes two maps in each
    n_embd: int = 768                   # D, width
    ffn_ratio: float = 3.5              # width of the feed-forward layer / D
    diff_lambda: float = 0.3            # weight of the second attention map (Table 3); 0: plain attention, no Q2 and K2
    head_norm: str = 'per_head'         # LayerNorm on the attention's result: per_head (eq. 3), all (authors' code),
                                        # none (EAT)
    attn_scale: float = 1.0             # factor on the attention's result after that LayerNorm; authors' code: 0.95
    pos_embed: str = '1d'               # fixed sine-cosine positions: 1d over the patch index, 2d over
                                        # (time, frequency)
    n_mels: int = 128                   # mel bands of the spectrogram
    patch_size: int = 16                # frames and mel bands of one square patch
    frames: int = 1008                  # input length of pre-training, in 10-ms frames
    decoder_layers: int = 6             # convolutions of the student's decoder
    decoder_groups: int = 16            # groups of each of them
    mask_ratio: float = 0.8             # share of the patches that a student does not see
    mask_block: int = 5                 # side of the blocks of kept patches
    mask_adjust: float = 0.07           # extra share of kept blocks, since blocks overlap
    mask_noise: float = 0.01            # standard deviation of what the decoder gets at masked places
    n_students: int = 16                # views of a clip that share one teacher pass
    alpha: float = 0.5                  # weight of the utterance loss (eq. 6)
    utterance_scale: float = 1.0        # further factor on it; authors' code: clips x students of one GPU, 192
    utterance_target: str = 'normed'    # normed: mean of the frame targets (authors' code); raw: without their
                                        # instance norm
    target_layers: int = 0              # the last k layers make the targets; 0: all
    cls_position: str = 'head'          # where the CLS token stands inside: head or middle (Table 2)
    pooling: str = 'cls'                # the utterance: the CLS token, or the mean of the patches (Table 2)
    drop_path: float = 0.0              # stochastic depth of the last block, rising linearly from 0 (fine-tuning)

    def __post_init__(self):
        """Raises ValueError, in one line with the numbers, for an architecture that cannot be built."""
        for field in dataclasses.fields(self):
            value, kinds = getattr(self, field.name), (int, float) if field.type is float else field.type
            if isinstance(value, bool) or not isinstance(value, kinds) or value != value:
                raise ValueError(f'{field.name} = {value!r} is not of type {field.type.__name__}')

        def choose(name, *allowed):
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} = {getattr(self, name)!r} is none of {", ".join(allowed)}')
        choose('head_norm', 'per_head', 'all', 'none')
        choose('pos_embed', '1d', '2d')
        choose('utterance_target', 'normed', 'raw')
        choose('cls_position', 'head', 'middle')
        choose('pooling', 'cls', 'mean')
        for name in ('n_layer', 'n_head', 'n_embd', 'n_mels', 'patch_size', 'frames', 'decoder_groups', 'n_students',
                     'mask_block'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} = {getattr(self, name)} must be at least 1')
        for name, divisor in (('n_embd', 'n_head'), ('n_embd', 'decoder_groups'), ('n_mels', 'patch_size'),
                              ('frames', 'patch_size')):
            if getattr(self, name) % getattr(self, divisor):
                raise ValueError(f'{name} = {getattr(self, name)} is not divisible by {divisor} '
                                 f'= {getattr(self, divisor)}')
        if self.n_embd % 4:
            raise ValueError(f'n_embd = {self.n_embd} is not divisible by 4, which the sine-cosine positions need')
        if self.frames > MAX_FRAMES:
            raise ValueError(f'frames = {self.frames} is too long: positions reach {MAX_FRAMES} frames')
        for name, lowest in (('mask_ratio', 0.01), ('drop_path', 0.0)):
            if not lowest <= getattr(self, name) < 1:
                raise ValueError(f'{name} = {getattr(self, name)} must lie in [{lowest}, 1)')
        if not 1 <= self.ffn_ratio * self.n_embd <= 1e6:
            raise ValueError(f'ffn_ratio = {self.ffn_ratio} gives the feed-forward layer an odd width')
        for name in ('n_layer', 'decoder_layers'):
            if getattr(self, name) > 1000:
                raise ValueError(f'{name} = {getattr(self, name)} is more than 1000')
        if not 0 <= self.target_layers <= self.n_layer:
            raise ValueError(f'target_layers = {self.target_layers} must lie between 0 (all) '
                             f'and n_layer = {self.n_layer}')

    @property
    def grid(self):
        """(rows, columns) of patches of a `frames` long clip: time x frequency."""
        return self.frames // self.patch_size, self.n_mels // self.patch_size


MAX_FRAMES = 768 * 16       # the authors' grid of positions has 768 rows of 16 frames, a little over two minutes
MAX_MAP = 1024              # tokens whose attention maps may be held in memory, instead of computed in pieces
NORM_EPS = 1e-6             # LayerNorm of the encoder
TARGET_EPS = 1e-5           # normalisations of the targets, of the attention's result and in the decoder


# -------------------------------------------------------------------------------------------------------------- encoder

def sincos(index, dim):
    """Fixed positions of one axis: dim/2 sines, then dim/2 cosines, omega_k = 10000^(-k / (dim/2)). (P,) -> (P, dim)"""
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = index.double()[:, None] * omega                                 # (P, dim/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def position_table(config):
    """(rows * columns, D) fixed positions in time-major patch order, for the longest clip that an encoder takes."""
    columns = config.n_mels // config.patch_size
    patch = torch.arange(MAX_FRAMES // config.patch_size * columns)
    if config.pos_embed == '1d':
        return sincos(patch, config.n_embd).float()
    frequency, time = patch % columns, patch // columns                     # first half of the channels: frequency
    return torch.cat([sincos(frequency, config.n_embd // 2), sincos(time, config.n_embd // 2)], dim=1).float()


class LayerNorm(nn.LayerNorm):
    """Its result has autocast's type, where PyTorch's own has float32 and twice the memory traffic."""

    def forward(self, x):
        return super().forward(x).to(kernels.autocast_type(x))


def linear(x, weight, bias):
    """F.linear. In float32 on a CPU it goes as a 1 x 1 convolution, since PyTorch gives that to oneDNN and a linear
    layer to MKL, which takes twice as long on an AMD processor."""
    if x.device.type != 'cpu' or x.dtype != torch.float32 or kernels.autocast_type(x) != torch.float32:
        return F.linear(x, weight, bias)
    # With one thread PyTorch gives oneDNN only 16 images and more. torch.compile cannot follow a count of threads.
    images = 1 if torch.compiler.is_compiling() or torch.get_num_threads() > 1 else 16
    if x.shape[:-1].numel() % images:
        return F.linear(x, weight, bias)
    pixels = x.reshape(images, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)                  # (images, in, places, 1)
    y = F.conv2d(pixels, weight[:, :, None, None], bias)                                # (images, out, places, 1)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)


class DiffAttention(nn.Module):
    """head_i = LN((softmax(Q1 K1^T / sqrt(d)) - lambda softmax(Q2 K2^T / sqrt(d))) V) (eq. 1-3),
    then W_O over the heads."""
    fused = False       # the same by kernels.diff_attention, where that takes the shape: see use_kernels

    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        self.config = config
        self.maps = 2 if config.diff_lambda else 1                          # attention maps per head
        self.qk = Linear(D, 2 * self.maps * D)                              # rows: Q1, Q2, K1, K2 (or Q, K)
        self.v = Linear(D, D)
        self.proj = Linear(D, D)
        if config.head_norm != 'none':
            self.norm = LayerNorm(D, eps=TARGET_EPS)                    # one weight and bias of length D in either form

    def forward(self, x):
        """(B, N, D) -> (B, N, D)"""
        N, D = x.shape[1:]
        h, per_head = self.config.n_head, self.config.head_norm == 'per_head'
        if self.fused and kernels.diff_attention_fits(N, D // h, kernels.autocast_type(x)):
            weight, bias = torch.cat([self.qk.weight, self.v.weight]), torch.cat([self.qk.bias, self.v.bias])
            qkv = F.linear(x, weight, bias.detach())                        # the next line has the bias's gradient
            y = kernels.diff_attention(qkv, bias, h, self.config.diff_lambda, per_head, TARGET_EPS)
        else:
            y = self.attend(self.qk(x), self.v(x))                          # (B, N, D)
        if self.config.head_norm == 'all':
            y = self.norm(y)
        weight, bias = self.proj.weight * self.config.attn_scale, self.proj.bias        # W_O
        if per_head:        # the norm's weight w and bias b: W_O (w y + b) = (W_O w) y + W_O b, without a pass over y
            weight, bias = weight * self.norm.weight, bias + (weight * self.norm.bias).sum(dim=1)
        return linear(y, weight, bias)

    def attend(self, qk, v):
        """The heads side by side, each with its LayerNorm if it has one. (B, N, 2 * maps * D), (B, N, D) -> like v"""
        B, N, D = v.shape
        h, d = self.config.n_head, D // self.config.n_head
        q, k = qk.view(B, N, 2, self.maps * h, d).permute(2, 0, 3, 1, 4)    # (B, maps * h, N, d) each
        v = v.view(B, N, h, d).transpose(1, 2)                              # (B, h, N, d)
        if v.device.type == 'cpu' and N <= MAX_MAP:                         # faster there than one fused call
            maps = (q / math.sqrt(d) @ k.transpose(2, 3)).softmax(dim=3)    # (B, maps * h, N, N)
            if self.maps == 2:
                maps = maps[:, :h] - self.config.diff_lambda * maps[:, h:]
            y = maps @ v                                                    # (B, h, N, d)
        else:
            y = F.scaled_dot_product_attention(q, k, torch.cat([v] * self.maps, dim=1))     # (B, maps * h, N, d)
            if self.maps == 2:
                y = y[:, :h] - self.config.diff_lambda * y[:, h:]           # (A1 - lambda A2) V = A1 V - lambda A2 V
        y = y.transpose(1, 2)                                               # (B, N, h, d)
        if self.config.head_norm == 'per_head':
            y = F.layer_norm(y, (d,), eps=TARGET_EPS)
        return y.reshape(B, N, D)


def drop_path(branch, rate, draw):
    """Stochastic depth: zero a clip's residual branch (B, N, D) where its draw (B,) in [0, 1) is below rate,
    rescale the rest."""
    return branch * ((draw >= rate).to(branch.dtype) / (1 - rate))[:, None, None]


class Block(nn.Module):
    """Post-norm transformer block. It also returns t, the feed-forward output before the residual,
    of which targets are made."""

    def __init__(self, config, drop_rate):
        super().__init__()
        hidden = round(config.n_embd * config.ffn_ratio)
        self.drop_rate = drop_rate
        self.attn = DiffAttention(config)
        self.norm1 = LayerNorm(config.n_embd, eps=NORM_EPS)
        self.mlp = nn.Sequential(Linear(config.n_embd, hidden), nn.GELU(), Linear(hidden, config.n_embd))
        self.norm2 = LayerNorm(config.n_embd, eps=NORM_EPS)

    def forward(self, x, draw=None):
        """x (B, N, D); draw (B, 2) uniform numbers that decide on stochastic depth -> x, t (B, N, D)"""
        a = self.attn(x)
        x = self.norm1(x + (a if draw is None else drop_path(a, self.drop_rate, draw[:, 0])))
        t = self.mlp(x)
        x = self.norm2(x + (t if draw is None else drop_path(t, self.drop_rate, draw[:, 1])))
        return x, t


class Encoder(nn.Module):
    """Patches + fixed positions, CLS, LayerNorm, L blocks (section 2.1). Student and teacher are one of these each."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = nn.Conv2d(1, config.n_embd, config.patch_size, stride=config.patch_size)
        self.cls = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.norm = LayerNorm(config.n_embd, eps=NORM_EPS)
        self.blocks = nn.ModuleList(
            Block(config, config.drop_path * i / max(config.n_layer - 1, 1)) for i in range(config.n_layer))
        self.register_buffer('positions', position_table(config), persistent=False)      # (P_max, D)
        self.init_weights()

    def init_weights(self):
        """Every initial value of the encoder; LayerNorms start at weight 1, bias 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.normal_(self.cls)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.config.n_embd, -1))
        bound = 1 / self.config.patch_size                                          # PyTorch's own for 16 x 16 inputs
        nn.init.uniform_(self.patch_embed.bias, -bound, bound)

    def embed(self, spec):
        """(B, frames, n_mels) -> (B, P, D): patches in time-major order (index = t * columns + f)
        with their positions."""
        x = self.patch_embed(spec[:, None]).flatten(2).transpose(1, 2)
        return x + self.positions[:x.shape[1]]

    def forward(self, spec, keep=None, draws=None, layers=False):
        """Encode whole clips, or the kept patches of views of them.

        spec (B, frames, n_mels): normalised log-mel, frames a multiple of the patch size and at most MAX_FRAMES.
        keep (B * n, T): patch indices that each view sees, views of one clip adjacent; None: one view of all patches.
        draws (B, L, 2): uniform numbers for stochastic depth, None for none. layers: also return [t of every block].
        -> (B * n, 1 + T, D), CLS first wherever it stood inside; with layers=True, that and a list of L tensors alike.
        """
        if spec.shape[1] % self.config.patch_size or spec.shape[1] > MAX_FRAMES or spec.shape[2] != self.config.n_mels:
            raise ValueError(f'a spectrogram of {spec.shape[1]} frames x {spec.shape[2]} bands: '
                             f'frames must be a multiple of {self.config.patch_size} up to {MAX_FRAMES}, '
                             f'bands {self.config.n_mels}')
        x = self.embed(spec)                                                # (B, P, D)
        if keep is not None:
            B, P, D = x.shape
            clip = torch.arange(B, device=x.device).repeat_interleave(len(keep) // B)    # the clip of each view
            x = x.flatten(0, 1).index_select(0, (clip[:, None] * P + keep).flatten()).view(
                *keep.shape, D)                                             # (B * n, T, D)
        place = x.shape[1] // 2 if self.config.cls_position == 'middle' else 0
        x = torch.cat([x[:, :place], self.cls.expand(len(x), 1, -1).to(x.dtype), x[:, place:]], dim=1)
        x = self.norm(x)
        outputs = []
        for i, block in enumerate(self.blocks):
            x, t = block(x, None if draws is None else draws[:, i])
            outputs.append(t)
        if place:
            x, *outputs = [torch.cat([y[:, place:place + 1], y[:, :place], y[:, place + 1:]], dim=1)
                           for y in (x, *outputs)]
        return (x, outputs) if layers else x


# -------------------------------------------------------------------------------------------------------------- decoder

class Decoder(nn.Module):
    """Predicts the teacher's targets on the whole grid from a student's kept patches.
    PyTorch's default initialisation."""
    fused = False       # the convolutions by kernels.grouped_conv: see use_kernels

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.convs = nn.ModuleList(nn.Conv2d(config.n_embd, config.n_embd, 3, padding=1, groups=config.decoder_groups)
                                   for _ in range(config.decoder_layers))
        self.proj = Linear(config.n_embd, config.n_embd)

    def forward(self, tokens, keep, noise):
        """tokens (V, T, D) of the kept patches, without CLS; keep (V, T) their indices; noise (V, P, D) -> (V, P, D)"""
        V, P, D = noise.shape
        columns = self.config.n_mels // self.config.patch_size
        # (V, P, D), noise where masked
        x = noise.to(tokens.dtype).scatter(1, keep[:, :, None].expand(-1, -1, D), tokens)
        x = x.view(V, P // columns, columns, D)                             # (V, time, frequency, D), channels last
        convolve = kernels.grouped_conv if self.fused else kernels.grouped_conv_plain
        for conv in self.convs:
            y = convolve(x, conv.weight, conv.bias, self.config.decoder_groups)     # (V, time, frequency, D)
            x = x + F.gelu(F.layer_norm(y, (D,), eps=TARGET_EPS)).to(y.dtype)
        return self.proj(x.reshape(V, P, D))


# ------------------------------------------------------------------------------------------------- students and teacher

def n_kept(n_patches, mask_ratio):
    """Patches that a student sees: the authors' floating-point product, so that 320 patches keep 63 and not 64."""
    return int(n_patches * (1 - mask_ratio))


class ASDA(nn.Module):
    """n students and an EMA teacher: frame loss on the masked patches (eq. 5), utterance loss on the CLS (eq. 4),
    sum (eq. 6)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    @torch.no_grad()
    def update_teacher(self, decay):
        """teacher <- decay * teacher + (1 - decay) * student, every parameter, in float32."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.encoder.parameters()), 1 - decay)

    @torch.no_grad()
    def targets(self, spec):
        """(B, frames, n_mels) -> frame targets (B, P, D), utterance targets (B, D), float32:
        the teacher sees every patch.

        From every layer the feed-forward output, instance-normalised over time per channel; averaged over layers;
        LayerNorm.
        """
        _, outputs = self.teacher(spec, layers=True)
        outputs = [t[:, 1:].float() for t in outputs[-self.config.target_layers:]]      # without CLS, (B, P, D)
        D = self.config.n_embd
        frame = F.layer_norm(sum(map(instance_norm, outputs)) / len(outputs), (D,), eps=TARGET_EPS)
        if self.config.utterance_target == 'normed':
            return frame, frame.mean(dim=1)
        return frame, F.layer_norm((sum(outputs) / len(outputs)).mean(dim=1), (D,), eps=TARGET_EPS)

    def forward(self, spec, mask, noise=None):
        """One training forward.

        spec (B, frames, n_mels); mask (B, n, P) bool, True = masked, n_kept(P, mask_ratio) False in every view;
        noise (B * n, P, D) for the masked places, drawn from N(0, mask_noise^2) if not given.
        -> scalar loss, dict of scalar measures:
        frame, utterance: the two losses. target_std, pred_std: standard deviation over the masked patches, of the
        predictions for each clip's first student only, mean over channels (0 = collapse). explained: 1 - squared error
        / variance of the targets, over the masked patches.
        """
        B, n, P = mask.shape
        D = self.config.n_embd
        T = n_kept(P, self.config.mask_ratio)
        target, utterance_target = self.targets(spec)                       # (B, P, D), (B, D)
        keep = mask.flatten(0, 1).to(torch.uint8).argsort(dim=1, stable=True)[:, :T]     # (B * n, T), in rising order
        x = self.encoder(spec, keep)                                        # (B * n, 1 + T, D)
        utterance = x[:, 0] if self.config.pooling == 'cls' else x[:, 1:].mean(dim=1)
        if noise is None:
            noise = torch.randn(B * n, P, D, device=spec.device) * self.config.mask_noise
        prediction = self.decoder(x[:, 1:], keep, noise).view(B, n, P, D).float()
        weight = mask.float()                                               # (B, n, P), 1 = masked
        error = (prediction - target[:, None]).square().sum(dim=-1)         # (B, n, P)
        frame_loss = (error * weight).sum() / weight.sum() / math.sqrt(D)
        utterance_error = (utterance.view(B, n, D).float() - utterance_target[:, None]).square().sum(dim=-1)
        utterance_loss = utterance_error.mean() / math.sqrt(D)
        loss = frame_loss + self.config.alpha * self.config.utterance_scale * utterance_loss
        with torch.no_grad():
            target_variance = masked_variance(target, weight.sum(dim=1))
            prediction_variance = masked_variance(prediction[:, 0], weight[:, 0])
            explained = 1 - frame_loss * math.sqrt(D) / target_variance.sum()
        return loss, {'frame': frame_loss.detach(), 'utterance': utterance_loss.detach(),
                      'target_std': target_variance.sqrt().mean(), 'pred_std': prediction_variance.sqrt().mean(),
                      'explained': explained}


def use_kernels(model, names):
    """Compute these layers of an ASDA by Triton: 'conv', the decoder's, and 'attention', the students'."""
    model.decoder.fused = 'conv' in names
    for block in model.encoder.blocks:
        block.attn.fused = 'attention' in names and model.config.diff_lambda > 0


def kernel_shapes(config, clips):
    """What kernels.choose wants to know of a forward pass over so many clips."""
    views, (rows, columns), h = clips * config.n_students, config.grid, config.n_head
    tokens = 1 + n_kept(rows * columns, config.mask_ratio)
    return {'conv': (views, rows, columns, config.n_embd, config.decoder_groups) if config.decoder_layers else None,
            'attention': (views, tokens, h, config.n_embd // h, config.diff_lambda, config.head_norm == 'per_head')
            if config.diff_lambda else None}


def instance_norm(x):
    """Each clip's channels to mean 0 and variance 1 over its places. PyTorch's own needs the places last, a copy.
    (B, P, D) -> (B, P, D)"""
    x = x - x.mean(dim=1, keepdim=True)
    return x * (x.square().mean(dim=1, keepdim=True) + TARGET_EPS).rsqrt()


def masked_variance(x, weight):
    """Variance of every channel of x (..., D) over the places, each counted weight (...) times. -> (D,)"""
    x, weight = x.flatten(0, -2), weight.flatten()
    share = weight / weight.sum()
    with torch.autocast(x.device.type, enabled=False):                      # bfloat16 is too coarse for E[x^2] - E[x]^2
        mean = share @ x
        return (share @ x.square() - mean.square()).clamp_min(0)


# ----------------------------------------------------------------------------------------------------------- classifier

class Classifier(nn.Module):
    """A pre-trained encoder with LayerNorm -> Linear on its CLS output,
    or on the mean of its patches (config.pooling)."""

    def __init__(self, config, n_classes):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.head_norm = nn.LayerNorm(config.n_embd, eps=NORM_EPS)
        self.head = Linear(config.n_embd, n_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, spec, draws=None):
        """spec (B, frames, n_mels); draws as in Encoder.forward -> logits (B, n_classes)"""
        x = self.encoder(spec, draws=draws)
        pooled = x[:, 0] if self.config.pooling == 'cls' else x[:, 1:].mean(dim=1)
        return self.head(self.head_norm(pooled))


def count_parameters(module):
    """Trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


if __name__ == '__main__':
    base = ASDAConfig()
    print(f'{base}\ntrainable in pre-training: {count_parameters(ASDA(base)):,}')
    print('classifier with 527 classes: '
          f'{count_parameters(Classifier(dataclasses.replace(base, drop_path=0.1), 527)):,}')
