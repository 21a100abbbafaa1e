"""The authors' and EAT's checkpoints reproduce what their own code computed from them.   python -m pytest tests/test_authors.py"""
import os

import numpy as np
import pytest
import torch

import authors

FIXTURES = os.path.join(os.path.dirname(__file__), 'fixtures')


def fixture(name):
    return os.path.join(FIXTURES, name)


def expected(kind):
    stored = np.load(fixture(f'{kind}_tiny_expected.npz'))
    return {name: torch.from_numpy(np.asarray(stored[name])) for name in stored}


def close(ours, theirs, tolerance=1e-4):
    """Relative to the largest value of the reference."""
    return float((ours.detach().double() - theirs.double()).abs().max() / theirs.double().abs().max()) < tolerance


# Their names of the gradients in the fixtures -> ours; EAT's attention has one qkv matrix.
GRADIENTS = {'modality_encoders.IMAGE.extra_tokens': 'encoder.cls',
             'modality_encoders.IMAGE.local_encoder.proj.weight': 'encoder.patch_embed.weight',
             'modality_encoders.IMAGE.decoder.blocks.0.0.weight': 'decoder.convs.0.weight',
             'blocks.0.attn.qk.weight': 'encoder.blocks.0.attn.qk.weight',
             'blocks.1.attn.v.bias': 'encoder.blocks.1.attn.v.bias'}


@pytest.mark.parametrize('kind', ['authors', 'eat'])
def test_pretraining_forward_losses_and_gradients(kind):
    want = expected(kind)
    # The fixture's utterance term is 0.5 x the SUM over 8 views; ours is a mean, so the scale is 8.
    model = authors.load_pretrained(fixture(f'{kind}_tiny_pretrain.pt'), utterance_scale=8.0)
    spec, mask = want['spectrogram'], want['mask'].view(2, 4, 64).bool()
    order = want['ids_keep'].argsort(dim=1)                                 # ours are in rising order
    keep = want['ids_keep'].gather(1, order)
    student = torch.cat([want['student_out'][:, :1], want['student_out'][:, 1:].gather(1, order[:, :, None].expand(-1, -1, 64))], dim=1)
    assert close(model.encoder(spec, keep), student)
    frame_target, utterance_target = model.targets(spec)
    assert close(frame_target, want['targets'])
    assert close(utterance_target, want['targets'].mean(dim=1))
    assert close(model.decoder(student[:, 1:], keep, torch.zeros(8, 64, 64)), want['decoder_out'])
    loss, measures = model(spec, mask, torch.zeros(8, 64, 64))
    assert close(measures['frame'], want['frame_loss'])
    assert close(0.5 * 8 * measures['utterance'], want['utterance_term'])
    loss.backward()
    ours = dict(model.named_parameters())
    named = [name for name in want if name.startswith('grad/')]
    assert len(named) == {'authors': 5, 'eat': 3}[kind]
    for name in named:
        assert close(ours[GRADIENTS[name[5:]]].grad, want[name]), name
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.requires_grad]).norm()
    assert close(total, want['grad_norm_total'])
    assert all(p.grad is None for p in model.teacher.parameters())


@pytest.mark.parametrize('kind', ['authors', 'eat'])
def test_classifier_features_and_logits(kind):
    want = expected(kind)
    model = authors.load_classifier(fixture(f'{kind}_tiny_finetune.pt')).eval()
    assert close(model(want['spectrogram']), want['logits'])
    pretrained = authors.load_pretrained(fixture(f'{kind}_tiny_pretrain.pt'))
    features = model.encoder(want['spectrogram'])
    assert close(features, want['features']) or close(pretrained.encoder(want['spectrogram']), want['features'])
