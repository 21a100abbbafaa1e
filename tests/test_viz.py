"""The pictures: what they draw is what the model computes.   python -m pytest tests/test_viz.py"""
import json
import math
import os

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
    patch, kept = model.config.patch_frames * model.config.patch_size, 6
    for axis in figure.axes[1:]:
        shown = np.isfinite(np.ma.filled(axis.images[0].get_array(), np.nan)).sum()
        assert shown == kept * patch and axis.get_title().endswith(f'{kept} of 32')


def a_log(path, losses, every=10, **settings):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({'start': 0, 'settings': {'lr': 1.0, **settings}, 'time': 5.0}) + '\n' + ''.join(
        json.dumps({'step': every * k, 'loss': loss, 'time': 5.0 + k}) + '\n' for k, loss in enumerate(losses, 1)))
    return path


def test_curves_over_a_reference(tmp_path):
    """Folders without their names, the reference first and in grey; where they part in words."""
    a_log(tmp_path / 'demo.jsonl', [4.0, 3.0, 2.0], seed=1)
    for name, losses in (('a', [4.0, 3.1, 2.0]), ('b', [4.0, 3.0, 2.0])):
        a_log(tmp_path / name / 'log.jsonl', losses, seed=2)
    result = call(viz.run, 'curves', tmp_path / 'a', f'{tmp_path}/b/log.jsonl', f'--reference={tmp_path}/demo.jsonl')
    assert result.code == 0 and os.path.exists(tmp_path / 'a' / 'curves.png'), result.err
    one, other, _ = result.out.splitlines()
    assert one.startswith(f'{tmp_path}/demo / {tmp_path}/a: losses part by more than 2 % at step 20: 3 / 3.1')
    assert other.startswith(f'{tmp_path}/demo / {tmp_path}/b: losses agree to 2 %') and 'seed 1 / 2' in other
    result = call(viz.run, 'curves', tmp_path / 'a', tmp_path / 'b', '--tolerance', 0.05, f'--out={tmp_path}/c.png')
    assert result.out.startswith(f'{tmp_path}/a / {tmp_path}/b: losses agree to 5 %') and result.code == 0
    settings = viz.configurator.configure(viz.__file__, [f'--logs={tmp_path}/a', f'--reference={tmp_path}/demo.jsonl'])
    figure, _ = viz.draw_curves(settings, viz.pyplot())
    grey, coloured = figure.axes[0].lines
    assert list(grey.get_ydata()) == [4.0, 3.0, 2.0] and grey.get_color() == '0.7' != coloured.get_color()


@pytest.mark.parametrize('argv, word', [
    (['portrait'], 'portrait'), (['masks', '--wav=x.wav'], '--ckpt'), (['curves'], '--logs'),
    (['curves', '--logs=/nonexistent/log.jsonl'], 'log.jsonl'),
    (['curves', '/nonexistent/run'], '/nonexistent/run'), (['curves', 'x', '--tolerance=-1'], 'tolerance'),
    (['maps', '--clips=1', '--ckpt=x'], 'clips'),
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
