"""The model and training step of model.py, arranged as the authors' fairseq code arranges them: a reference to test
and to time ours against. Written from the description of that arrangement; nothing of it is copied.

Where it differs from ours in how, not in what, it computes: a clip is repeated once per student before the patch
embedding; the two attention maps are made as matrices and subtracted; kept tokens are gathered, the decoder's input is
kept and noise tokens one after the other, gathered into their order; the loss is on gathered masked tokens; the
spectrograms are made clip by clip on the CPU; clipping, AdamW and EMA go from tensor to tensor.

The parameters are ASDA's, whose modules become these here: only what computes is written anew.
"""
import math

import torch
import torch.nn.functional as F
from torchaudio.compliance import kaldi

import model
from model import ASDA, TARGET_EPS, n_kept


class Attention(model.DiffAttention):
    def heads(self, x):
        """(V, N, D) -> (V, h, N, d)"""
        V, N, D = x.shape
        return x.reshape(V, N, self.config.n_head, D // self.config.n_head).permute(0, 2, 1, 3)

    def map(self, q, k):
        """One attention map, written out: (V, h, N, N)"""
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)

    def forward(self, x):
        V, N, D = x.shape
        projections = [self.heads(part) for part in self.qk(x).split(D, dim=-1)]
        if self.config.diff_lambda:
            q1, q2, k1, k2 = projections
            attention = self.map(q1, k1) - self.config.diff_lambda * self.map(q2, k2)
        else:
            attention = self.map(*projections)
        y = (attention @ self.heads(self.v(x))).permute(0, 2, 1, 3)         # (V, N, h, d)
        if self.config.head_norm == 'per_head':
            y = F.layer_norm(y, y.shape[-1:], eps=TARGET_EPS).reshape(V, N, D) * self.norm.weight + self.norm.bias
        else:
            y = self.norm(y.reshape(V, N, D))                               # of all heads together, or none
        return self.proj(y * self.config.attn_scale)


class Block(model.Block):
    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        t = self.mlp(x)
        return self.norm2(x + t), t


class Encoder(model.Encoder):
    def forward(self, spec, ids_keep=None):
        """spec (V, frames, n_mels), a clip per view; ids_keep (V, T) -> (V, 1 + T, D), [t of every block]"""
        x = self.patch_embed(spec.unsqueeze(1)).flatten(2).transpose(1, 2)  # (V, P, D)
        x = x + self.positions[:x.shape[1]]
        if ids_keep is not None:
            x = torch.gather(x, 1, ids_keep.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        x = self.norm(torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1))
        outputs = []
        for block in self.blocks:
            x, t = block(x)
            outputs.append(t)
        return x, outputs


class Decoder(model.Decoder):
    def forward(self, tokens):
        """(V, P, D) -> (V, P, D)"""
        V, P, D = tokens.shape
        x = tokens.transpose(1, 2).reshape(V, D, *self.config.grid)         # channels first
        for conv in self.convs:
            y = conv(x).permute(0, 2, 3, 1)
            x = x + F.gelu(F.layer_norm(y, (D,), eps=TARGET_EPS).permute(0, 3, 1, 2))
        return self.proj(x.reshape(V, D, P).transpose(1, 2))


class Arrangement(ASDA):
    """ASDA in the authors' arrangement, for what their code has: CLS at the head, normed targets of all layers.
    Raises ValueError for another configuration."""

    def __init__(self, config):
        super().__init__(config)
        for name, theirs in (('cls_position', 'head'), ('pooling', 'cls'), ('utterance_target', 'normed'),
                             ('target_layers', 0)):
            if getattr(config, name) != theirs:
                raise ValueError(f'{name} = {getattr(config, name)!r}: the authors\' arrangement has only {theirs!r}')
        theirs = {form.__base__: form for form in (Attention, Block, Encoder, Decoder)}
        for module in self.modules():
            module.__class__ = theirs.get(type(module), type(module))

    @torch.no_grad()
    def targets(self, spec):
        """(B, frames, n_mels) -> frame targets (B, P, D)"""
        _, outputs = self.teacher(spec)
        outputs = [F.instance_norm(t[:, 1:].float().transpose(1, 2), eps=TARGET_EPS).transpose(1, 2) for t in outputs]
        return F.layer_norm(sum(outputs) / len(outputs), outputs[0].shape[-1:], eps=TARGET_EPS)

    def forward(self, spec, mask, noise=None):
        """As ASDA.forward; noise (B * n, P, D) is read at the masked places only, and drawn for them if not given."""
        B, n, P = mask.shape
        D, T = self.config.n_embd, n_kept(P, self.config.mask_ratio)
        target = self.targets(spec)
        mask = mask.flatten(0, 1)                                           # (V, P)
        ids_shuffle = mask.int().argsort(dim=1, stable=True)                # the kept patches come first
        ids_restore = ids_shuffle.argsort(dim=1)
        x, _ = self.encoder(spec.repeat_interleave(n, dim=0), ids_shuffle[:, :T])
        if noise is None:
            filling = torch.randn(B * n, P - T, D, device=x.device) * self.config.mask_noise
        else:
            filling = torch.gather(noise, 1, ids_shuffle[:, T:, None].expand(-1, -1, D))
        tokens = torch.cat([x[:, 1:], filling.to(x.dtype)], dim=1)
        tokens = torch.gather(tokens, 1, ids_restore.unsqueeze(-1).expand(-1, -1, D))
        prediction = self.decoder(tokens)[mask].float()   # (masked patches of all views, D)
        utterance_target = target.mean(dim=1).repeat_interleave(n, dim=0)
        target = target.repeat_interleave(n, dim=0)[mask]
        frame_loss = ((prediction - target) ** 2).sum(dim=-1).mean() / math.sqrt(D)
        utterance_loss = ((x[:, 0].float() - utterance_target) ** 2).sum(dim=-1).mean() / math.sqrt(D)
        loss = frame_loss + self.config.alpha * self.config.utterance_scale * utterance_loss
        with torch.no_grad():
            spread = {'target_std': target.std(dim=0, unbiased=False).mean(),
                      'pred_std': prediction.std(dim=0, unbiased=False).mean()}
        return loss, {'frame': frame_loss.detach(), 'utterance': utterance_loss.detach(), **spread}

    @torch.no_grad()
    def update_teacher(self, decay):
        for of_teacher, of_student in zip(self.teacher.parameters(), self.encoder.parameters()):
            of_teacher.mul_(decay)
            of_teacher.add_(of_student, alpha=1 - decay)


def make_optimizer(model, settings):
    """AdamW from tensor to tensor, with weight decay on every one of them."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings.lr, foreach=False,
                             betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay, fused=False)


def train_step(model, optimizer, spec, mask, settings, ema_decay, noise=None):
    """One update of students and teacher -> loss, measures"""
    loss, measures = model(spec, mask, noise)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf, foreach=False)
    if norm.isfinite():
        optimizer.step()
        model.update_teacher(ema_decay)
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), measures


def clip_fbank(wave, window='hamming'):
    """Log-mel spectrogram of one clip by torchaudio, (samples,) in [-1, 1] -> (frames, 128)"""
    return kaldi.fbank(wave[None], htk_compat=True, sample_frequency=16000, use_energy=False, num_mel_bins=128,
                       dither=0.0, frame_shift=10, window_type=window)


def spectrograms(pcm, lengths, frames, window, mean, std):
    """data.log_mel clip by clip: pcm (B, samples) int16, lengths (B,) -> (B, frames, 128) normalised, on the CPU"""
    specs = []
    for wave, length in zip(pcm, lengths):
        wave = wave[:length].float() / 32768
        spec = clip_fbank(wave - wave.mean(), window)[:frames]
        specs.append(F.pad(spec, (0, 0, 0, frames - len(spec))))
    return (torch.stack(specs) - mean) / (2 * std)
