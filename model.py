"""ASDA's network: differential attention, encoder, decoder, students and teacher with their losses, classifier.

Wang et al., Interspeech 2025, arXiv 2507.02666: equations and sections are the paper's. `python model.py` prints the
parts, parameters, operations and shapes. This file imports PyTorch alone: it must not know audio, files, processes or
kernels; `fast` replaces what has a faster form. Shapes: B clips, n students of each (V = B * n views), P patches of a
clip on a (P/8, 8) grid of time x frequency, T kept patches of a view, N tokens, D channels, h heads of d, L layers.
"""
import copy
import dataclasses
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclasses.dataclass
class ASDAConfig:
    n_layer: int = 12                   # L, transformer blocks
    n_head: int = 8                     # heads; differential attention computes two maps in each
    n_embd: int = 768                   # D, width
    ffn_ratio: float = 3.5              # width of the feed-forward layer / D
    diff_lambda: float = 0.3            # weight of the second attention map (Table 3); 0: plain attention, no Q2 and K2
    head_norm: str = 'per_head'         # the attention's LayerNorm: per_head (eq. 3), all (authors' code), none (EAT)
    attn_scale: float = 1.0             # factor on the attention's result after that LayerNorm; authors' code: 0.95
    pos_scale: float = 1.0              # factor on the positions against the patches; the paper does not say
    pos_embed: str = '1d'               # fixed sine-cosine positions: 1d over the patch index, 2d over (time, mel)
    n_mels: int = 128                   # mel bands of the spectrogram
    patch_size: int = 16                # mel bands of one patch
    patch_frames: int = 16              # frames of one patch; 8 is better for short sounds
    frames: int = 1008                  # input length of pre-training, in 10-ms frames; a Classifier's longest window
    decoder_layers: int = 6             # convolutions of the student's decoder
    decoder_groups: int = 16            # groups of each of them
    mask_ratio: float = 0.8             # share of the patches that a student does not see
    mask_block: int = 5                 # side of the blocks of kept patches
    mask_adjust: float = 0.07           # extra share of kept blocks, since blocks overlap
    mask_noise: float = 0.01            # standard deviation of what the decoder gets at masked places
    n_students: int = 16                # views of a clip that share one teacher pass
    alpha: float = 0.5                  # weight of the utterance loss (eq. 6)
    utterance_scale: float = 1.0        # further factor on it; authors' code: clips x students of one GPU, 192
    utterance_target: str = 'normed'    # normed: mean of the frame targets (authors' code); raw: before instance norm
    target_layers: int = 0              # the last k layers make the targets; 0: all
    cls_position: str = 'head'          # where the CLS token stands inside: head or middle (Table 2)
    pooling: str = 'cls'                # the utterance: cls or mean of the patches (Table 2); a Classifier's also bands
    drop_path: float = 0.0              # stochastic depth of the last block, rising linearly from 0 (fine-tuning)

    @property
    def grid(self):                     # (rows, columns) of patches of a `frames` long clip: time x frequency
        return self.frames // self.patch_frames, self.n_mels // self.patch_size


MAX_FRAMES = 768 * 16       # the authors' grid of positions has 768 rows of 16 frames, a little over two minutes
NORM_EPS, TARGET_EPS = 1e-6, 1e-5    # LayerNorm of the encoder; of targets, attention's result and decoder


def sincos(index, dim):
    """Fixed positions of one axis: dim/2 sines, then dim/2 cosines, omega_k = 10000^(-k / (dim/2)). (P,) -> (P, dim)"""
    omega = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = index.double()[:, None] * omega                                 # (P, dim/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def position_table(config):
    """(rows * columns, D) fixed positions in time-major patch order, for the longest clip that an encoder takes."""
    columns = config.n_mels // config.patch_size
    patch = torch.arange(MAX_FRAMES // config.patch_frames * columns)
    if config.pos_embed == '1d':
        return sincos(patch, config.n_embd).float()
    axes = patch % columns, patch // columns                                # frequency, time: half of the channels each
    return torch.cat([sincos(axis, config.n_embd // 2) for axis in axes], dim=1).float()


class DiffAttention(nn.Module):
    """Differential attention, section 2.1, equations (1) to (3). Without lambda: plain attention."""

    def __init__(self, config):
        super().__init__()
        D = config.n_embd
        self.config = config
        self.qk = nn.Linear(D, 4 * D if config.diff_lambda else 2 * D)      # rows: Q1, Q2, K1, K2 (or Q, K)
        self.v = nn.Linear(D, D)
        self.proj = nn.Linear(D, D)
        self.norm = {'per_head': nn.GroupNorm(config.n_head, D, eps=TARGET_EPS),    # LayerNorm of each group: of a head
                     'all': nn.LayerNorm(D, eps=TARGET_EPS), 'none': nn.Identity()}[config.head_norm]

    def forward(self, x):
        """(B, N, D) -> (B, N, D)"""
        d = self.config.n_embd // self.config.n_head
        (q, k), v = self.qk(x).chunk(2, dim=2), self.v(x)                   # eq. (1): Q1 | Q2, K1 | K2 (B, N, 2D), V
        q, k, v = (y.unflatten(2, (-1, d)).transpose(1, 2) for y in (q, k, v))      # (B, 2h, N, d), V (B, h, N, d)
        y = self.attend(q, k, v).transpose(1, 2).flatten(2)                 # (B, N, D), the heads side by side
        y = self.norm(y.flatten(0, 1)).view_as(y)                           # eq. (3): LayerNorm of every head,
        return self.proj(y * self.config.attn_scale)                        # then W_O over all of them

    def attend(self, q, k, v):
        """Eq. (2): (softmax(Q1 K1^T / sqrt(d)) - lambda softmax(Q2 K2^T / sqrt(d))) V -> (B, h, N, d)"""
        A = (q / math.sqrt(q.shape[-1]) @ k.mT).softmax(dim=-1)             # (B, 2h, N, N)
        if not self.config.diff_lambda:
            return A @ v
        A1, A2 = A.chunk(2, dim=1)                                          # (B, h, N, N) each
        return (A1 - self.config.diff_lambda * A2) @ v


def drop_path(branch, rate, draw):
    """Stochastic depth: a clip's branch (B, N, D) is 0 where its draw (B,) in [0, 1) is below rate, the rest scaled."""
    return branch * ((draw >= rate).to(branch.dtype) / (1 - rate))[:, None, None]


class Block(nn.Module):
    """Post-norm transformer block. It also gives t, the feed-forward output before the residual, for the targets."""

    def __init__(self, config, drop_rate):
        super().__init__()
        hidden = round(config.n_embd * config.ffn_ratio)
        self.drop_rate = drop_rate
        self.attn = DiffAttention(config)
        self.norm1 = nn.LayerNorm(config.n_embd, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(config.n_embd, hidden), nn.GELU(), nn.Linear(hidden, config.n_embd))
        self.norm2 = nn.LayerNorm(config.n_embd, eps=NORM_EPS)

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
        patch = config.patch_frames, config.patch_size
        self.patch_embed = nn.Conv2d(1, config.n_embd, patch, stride=patch)
        self.cls = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.norm = nn.LayerNorm(config.n_embd, eps=NORM_EPS)
        self.blocks = nn.ModuleList(
            Block(config, config.drop_path * i / max(config.n_layer - 1, 1)) for i in range(config.n_layer))
        self.register_buffer('positions', position_table(config), persistent=False)      # (P_max, D)
        self.init_weights()

    def init_weights(self):                 # every initial value but the norms', which are PyTorch's, 1 and 0
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.config.n_embd, -1))
        limit = self.patch_embed.weight[0].numel() ** -0.5
        nn.init.uniform_(self.patch_embed.bias, -limit, limit)

    def embed(self, spec):
        """(B, frames, n_mels) -> (B, P, D): patches in time-major order (t * columns + f) with their positions."""
        x = self.patch_embed(spec[:, None]).flatten(2).transpose(1, 2)
        return x + self.config.pos_scale * self.positions[:x.shape[1]]

    def forward(self, spec, keep=None, draws=None, layers=False):
        """Encode whole clips, or the kept patches of views of them.

        spec (B, frames, n_mels): normalised log-mel, frames a multiple of the patch size and at most MAX_FRAMES.
        keep (B * n, T): patch indices that each view sees, views of one clip adjacent; None: one view of all patches.
        draws (B, L, 2): uniform numbers for stochastic depth, None for none.
        -> (B * n, 1 + T, D), CLS first wherever it stood inside; with layers=True, that and t of all L blocks.
        """
        _, frames, bands = spec.shape
        if frames % self.config.patch_frames or frames > MAX_FRAMES or bands != self.config.n_mels:
            raise ValueError(f'a spectrogram of {frames} frames x {bands} bands: frames must be a multiple of '
                             f'{self.config.patch_frames} up to {MAX_FRAMES}, bands {self.config.n_mels}')
        x = self.embed(spec)                                                # (B, P, D)
        if keep is not None:
            B, P, D = x.shape
            clip = torch.arange(B, device=x.device).repeat_interleave(len(keep) // B)[:, None]      # of each view
            x = x.flatten(0, 1).index_select(0, (clip * P + keep).flatten()).view(*keep.shape, D)   # (B * n, T, D)
        place = x.shape[1] // 2 if self.config.cls_position == 'middle' else 0
        x = torch.cat([x[:, :place], self.cls.expand(x.shape[0], -1, -1), x[:, place:]], dim=1)     # (B * n, 1 + T, D)
        x, outputs = self.norm(x), []
        for i, block in enumerate(self.blocks):
            x, t = block(x, None if draws is None else draws[:, i])
            if layers:
                outputs.append(t)
        if place:
            x, *outputs = [torch.cat([y[:, place:place + 1], y[:, :place], y[:, place + 1:]], dim=1)
                           for y in (x, *outputs)]
        return (x, outputs) if layers else x


class Decoder(nn.Module):
    """Predicts the teacher's targets on the whole grid from a student's kept patches. Initialised as by PyTorch."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.convs = nn.ModuleList(nn.Conv2d(config.n_embd, config.n_embd, 3, padding=1, groups=config.decoder_groups)
                                   for _ in range(config.decoder_layers))
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, tokens, keep, noise):
        """tokens (V, T, D) of the kept patches, without CLS; keep (V, T) their indices; noise (V, P, D) -> (V, P, D)"""
        V, P, D = noise.shape
        x = noise.scatter(1, keep[:, :, None].expand(-1, -1, D), tokens.to(noise.dtype))    # noise where masked
        x = x.unflatten(1, (-1, self.config.n_mels // self.config.patch_size))  # (V, time, frequency, D)
        for conv in self.convs:
            y = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)             # which wants (V, D, time, frequency)
            x = x + F.gelu(F.layer_norm(y, (D,), eps=TARGET_EPS)).to(x.dtype)
        return self.proj(x.flatten(1, 2))                                   # (V, P, D)


def n_kept(n_patches, mask_ratio):
    """Patches that a student sees: the authors' floating-point product, so that 320 patches keep 63 and not 64."""
    return int(n_patches * (1 - mask_ratio))


class ASDA(nn.Module):
    """n students and an EMA teacher: utterance loss (eq. 4), frame loss on the masked patches (eq. 5), sum (eq. 6)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)

    @torch.no_grad()
    def update_teacher(self, decay):
        """EMA: teacher <- decay * teacher + (1 - decay) * student, every parameter, in float32."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.encoder.parameters()), 1 - decay)

    @torch.no_grad()
    def targets(self, spec):
        """(B, frames, n_mels) -> frame targets (B, P, D), utterance targets (B, D): the teacher sees every patch. From
        every layer t, instance-normalised over time per channel; averaged over layers; LayerNorm. In float32."""
        _, outputs = self.teacher(spec, layers=True)
        outputs = outputs[-self.config.target_layers:]                      # of the last blocks; [-0:] is all of them
        outputs = [t[:, 1:].float() for t in outputs]                       # without CLS, (B, P, D) each
        frame = F.layer_norm(sum(map(instance_norm, outputs)) / len(outputs), (self.config.n_embd,), eps=TARGET_EPS)
        if self.config.utterance_target == 'normed':
            return frame, frame.mean(dim=1)
        return frame, F.layer_norm((sum(outputs) / len(outputs)).mean(dim=1), (self.config.n_embd,), eps=TARGET_EPS)

    def forward(self, spec, mask, noise=None):
        """One training forward -> scalar loss, dict of scalars: frame and utterance, the two losses, and measures().

        spec (B, frames, n_mels); mask (B, n, P) bool, True = masked, n_kept(P, mask_ratio) False in every view, or else
        RuntimeError; noise (B * n, P, D) for masked places, in the decoder's type; None: from N(0, mask_noise^2).
        """
        B, n, P = mask.shape
        D, T = self.config.n_embd, n_kept(P, self.config.mask_ratio)
        torch._assert_async((mask.sum(dim=2) == P - T).all(), f'every view must keep {T} of {P} patches')   # no waiting
        target, utterance_target = self.targets(spec)                       # (B, P, D), (B, D)
        keep = mask.flatten(0, 1).to(torch.uint8).argsort(dim=1, stable=True)[:, :T]     # (B * n, T), in rising order
        x = self.encoder(spec, keep)                                        # (B * n, 1 + T, D)
        if noise is None:
            noise = torch.randn(B * n, P, D, device=x.device, dtype=x.dtype) * self.config.mask_noise
        prediction = self.decoder(x[:, 1:], keep, noise).view(B, n, P, D).float()
        utterance = pool(x, self.config.pooling).view(B, n, D).float()

        utterance_loss = (utterance - utterance_target[:, None]).square().sum(dim=-1).mean() / math.sqrt(D)  # eq. (4)
        error = (prediction - target[:, None]).square().sum(dim=-1)                                     # (B, n, P)
        frame_loss = (error * mask).sum() / mask.sum() / math.sqrt(D)       # eq. (5), over the masked patches alone
        loss = frame_loss + self.config.alpha * self.config.utterance_scale * utterance_loss            # eq. (6)
        losses = {'frame': frame_loss.detach(), 'utterance': utterance_loss.detach()}
        return loss, losses | self.measures(target, prediction, error, mask)

    @torch.no_grad()
    def measures(self, target, prediction, error, mask):
        """What the losses do not say, over the masked patches (shapes as in forward) -> dict of scalars. explained: 1 -
        error / variance of the targets; place: the share of that variance that the mean target of each place over the
        clips holds; content: 1 - error / the rest, what is known beyond the place (NaN for one clip). target_std and
        pred_std: standard deviations, mean over channels (0 = collapse); the latter of each clip's first student."""
        B, times = len(target), mask.sum(dim=1)                             # how often a place is masked (B, P)
        missed, variance = (error * mask).sum() / mask.sum(), masked_variance(target, times)
        around_place = (target - target.mean(dim=0)).square().sum(dim=-1) * (B / (B - 1) if B > 1 else math.nan)
        rest = (around_place * times).sum() / times.sum()                   # B / (B - 1): unbiased
        return {'content': 1 - missed / rest, 'place': 1 - rest / variance.sum(),
                'explained': 1 - missed / variance.sum(), 'target_std': variance.sqrt().mean(),
                'pred_std': masked_variance(prediction[:, 0], mask[:, 0]).sqrt().mean()}


def pool(x, pooling, columns=None, windows=1):
    """(B * windows, 1 + T, D), CLS first -> utterance (B, D); bands: mean, deviation over time (B, 2 * columns * D)"""
    if pooling == 'bands':
        rows = x[:, 1:].reshape(len(x) // windows, -1, columns * x.shape[2])        # (B, time, columns * D)
        return torch.cat([rows.mean(dim=1), (rows.var(dim=1, correction=0) + NORM_EPS).sqrt()], dim=1)
    return x[:, 0] if pooling == 'cls' else x[:, 1:].mean(dim=1)


def instance_norm(x):
    """Each clip's channels to mean 0 and variance 1 over its places. (B, P, D) -> (B, P, D)"""
    x = x - x.mean(dim=1, keepdim=True)
    return x * (x.square().mean(dim=1, keepdim=True) + TARGET_EPS).rsqrt()


def masked_variance(x, weight):
    """Variance of every channel of x (..., D) over the places, each counted weight (...) times. -> (D,)"""
    x, share = x.flatten(0, -2), (weight / weight.sum()).flatten()[:, None]
    return (share * (x - (share * x).sum(dim=0)).square()).sum(dim=0)


class Classifier(nn.Module):
    """A pre-trained encoder with LayerNorm -> Linear on what pool makes of its output. For bands a long clip is cut."""

    def __init__(self, config, n_classes):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        width = config.n_embd * (2 * config.grid[1] if config.pooling == 'bands' else 1)
        self.head_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.head = nn.Linear(width, n_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, spec, draws=None):
        """spec (B, frames, n_mels); draws as in Encoder.forward -> logits (B, n_classes)"""
        windows = math.ceil(spec.shape[1] / self.config.frames) if self.config.pooling == 'bands' else 1
        pad = -spec.shape[1] % (windows * self.config.patch_frames) if windows > 1 else 0   # with 0, to equal windows
        spec = F.pad(spec, (0, 0, 0, pad)).unflatten(1, (windows, -1)).flatten(0, 1)        # (B * windows, ..., n_mels)
        x = self.encoder(spec, draws=draws if draws is None else draws.repeat_interleave(windows, dim=0))
        return self.head(self.head_norm(pool(x, self.config.pooling, self.config.grid[1], windows)))


def count_parameters(module):           # trainable ones
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


if __name__ == '__main__':
    from tools import describe  # with all that this file must not know
    describe.main()
