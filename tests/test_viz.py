"""The pictures: what they draw is what the model computes.   python -m pytest tests/test_viz.py"""
import json
import math

import numpy as np
import pytest
import torch

from tools import viz

from .conftest import call, is_one_line_error, write_wav
from .test_finetune import pretrained  # noqa: F401  (a fixture)

pytest.importorskip('matplotlib')


@pytest.fixture
def sound(tmp_path):
    t = np.arange(16000) / 16000
    write_wav(str(tmp_path / 'tone.wav'), 0.3 * np.sin(2 * np.pi * 900 * t) * (t > 0.4))
    return str(tmp_path / 'tone.wav')


def test_the_maps_are_those_that_the_attention_uses(pretrained):          # noqa: F811
    """(A1 - lambda A2) V, LayerNorm per head and W_O, from the maps that are drawn, give the block's own output."""
    model, _ = viz.open_asda(pretrained)
    config, encoder = model.config, model.encoder
    spec = torch.randn(2, config.frames, 128)
    outputs = []
    attention = encoder.blocks[-1].attn
    hook = attention.register_forward_hook(lambda module, inputs, output: outputs.append((inputs[0], output)))
    maps = viz.attention_maps(encoder, spec)[-1]                            # (B, 2, h, N, N)
    hook.remove()
    x, output = outputs[0]
    d = config.n_embd // config.n_head
    v = attention.v(x).view(*x.shape[:2], config.n_head, d).transpose(1, 2)
    y = ((maps[:, 0] - config.diff_lambda * maps[:, 1]) @ v).transpose(1, 2)                # (B, N, h, d)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    y = attention.proj(y.flatten(2) * attention.norm.weight + attention.norm.bias)
    assert torch.allclose(y, output, atol=1e-5) and maps.shape[1] == 2
    assert torch.allclose(maps.sum(-1), torch.ones(()))


def test_every_picture_is_drawn(pretrained, data_dir, tmp_path, sound):          # noqa: F811
    log = tmp_path / 'log.jsonl'
    log.write_text('{"start": 0, "settings": {"lr": 1.0}, "time": 5.0}\n'
                   + ''.join(f'{{"step": {k}, "loss": {10 / k}, "explained": 0.1, "time": {5.0 + k}}}\n'
                             for k in range(1, 5)))
    base = [f'--ckpt={pretrained}', f'--data_dir={data_dir}', '--clips=6']
    for what, argv, word in (('masks', [f'--wav={sound}'], '2 students see 6 of 32'),
                             ('maps', [f'--wav={sound}', '--query=cls'], 'block 1, CLS: the difference cancels'),
                             ('maps', [f'--wav={sound}', '--layer=2'], 'block 2, the framed patch'),
                             ('lambda', ['--dataset=demo'], 'block 2: '), ('targets', ['--dataset=demo'], '6 clips'),
                             ('curves', [f'--logs={log}'], 'explained, loss'),
                             ('embeddings', ['--dataset=demo'], '10 classes')):
        picture = tmp_path / f'{what}.png'
        result = call(viz.run, what, *base, *argv, f'--out={picture}')
        assert result.code == 0 and word in result.out, (what, result)
        assert picture.read_bytes().startswith(b'\x89PNG')


def test_the_students_of_the_picture_see_what_its_title_says(pretrained, sound):          # noqa: F811
    settings = viz.configurator.configure(viz.__file__, [f'--ckpt={pretrained}', f'--wav={sound}'])
    figure, _ = viz.draw_masks(settings, viz.pyplot())
    model, _ = viz.open_asda(pretrained)
    patch, kept = model.config.patch_size ** 2, 6
    for axis in figure.axes[1:]:
        shown = np.isfinite(np.ma.filled(axis.images[0].get_array(), np.nan)).sum()
        assert shown == kept * patch and axis.get_title().endswith(f'{kept} of 32')


def test_where_two_runs_part():
    def run(settings, losses):
        return settings, {'loss': ([10, 20, 30], losses)}, {}
    one, other = run({'lr': 1, 'seed': 1}, [3.0, 2.0, 1.0]), run({'lr': 2, 'seed': 1}, [3.0, 2.0, 1.5])
    assert viz.where_they_part(one, other) == ('losses part by more than 2% at step 30: 1 / 1.5; '
                                               'settings that differ: lr 1 / 2')
    assert viz.where_they_part(one, one) == ('losses agree to 2% over the 3 steps that both logged, up to 30; '
                                             'no setting differs')
    assert viz.where_they_part(one, ({}, {}, {})) == 'no step in common; no setting differs'


@pytest.mark.parametrize('argv, word', [
    (['portrait'], 'portrait'), (['masks', '--wav=x.wav'], '--ckpt'), (['curves'], '--logs'),
    (['curves', '--logs=/nonexistent/log.jsonl'], 'log.jsonl'), (['maps', '--clips=1', '--ckpt=x'], 'clips'),
    (['masks', '--ckpt=x', '--out=x.jpg'], '.png'), (['masks', '--ckpt=/nonexistent.pt'], '/nonexistent.pt')])
def test_a_mistake_is_one_line(argv, word):
    assert is_one_line_error(call(viz.run, *argv), word)


def test_a_query_that_is_no_patch(pretrained, sound, tmp_path):          # noqa: F811
    for query in ('32', '-1', 'louder'):
        result = call(viz.run, 'maps', f'--ckpt={pretrained}', f'--wav={sound}', f'--query={query}')
        assert is_one_line_error(result, 'query')
    log = tmp_path / 'empty.jsonl'
    log.write_text(json.dumps({'loss': math.pi}) + '\n')
    assert is_one_line_error(call(viz.run, 'curves', f'--logs={log}'), 'no steps')
