"""The pictures: what they draw is what the model computes.   python -m pytest tests/test_viz.py"""
import json
import math
import os
import re
import warnings

import numpy as np
import pytest
import torch

import pretrain
from engine import logs
from tools import viz

from .conftest import TINY, call, is_one_line_error, write_wav
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
                             ('embeddings', ['--dataset=demo'], '10 classes'),
                             ('learned', ['--dataset=demo'], "9 neighbours of 3 held-out demo clips")):
        picture = tmp_path / f'{what}.png'
        result = call(viz.run, what, *base, *argv, f'--out={picture}')
        assert result.code == 0 and word in result.out, (what, result)
        assert picture.read_bytes().startswith(b'\x89PNG')


def test_neighbours_of_a_run_are_signed_by_their_class(data_dir, tmp_path, monkeypatch):
    """The last lines of a run name the picture; its titles, over features that are the class and a little noise, and
    over features whose nearest are of another class."""
    out = f'{tmp_path}/out'
    result = call(pretrain.run, *TINY, '--batch_size=4', '--max_steps=2', '--warmup_steps=1', '--dataset=demo',
                  '--eval_dataset=demo', f'--data_dir={data_dir}', f'--out_dir={out}')
    assert result.code == 0 and f'\n{out}/learned.png\nnext:    python eval.py' in result.out, result.err
    assert re.search(r"\npicture: of 9 neighbours of 3 held-out demo clips \d are of their clip's class\n", result.out)
    settings = viz.configurator.configure(viz.__file__, [f'--ckpt={out}/ckpt.pt', f'--data_dir={data_dir}'])
    for turned, sign in ((0, '\u2714'), (1, '\u2717')):
        seen = []

        def classes(encoder, clips, *_, seen=seen, turned=turned):          # of the training part, then of the asked
            seen.append(clips)
            label = clips.label + turned * (len(seen) - 1)
            return (np.eye(10)[label % 10] + 0.01 * np.random.default_rng(0).standard_normal((len(clips), 10))
                    ).astype(np.float32)
        monkeypatch.setattr(viz, 'features', classes)
        figure, said = viz.draw_learned(settings, viz.pyplot())
        course, grid = figure.subfigs
        titles = [axis.get_title() for axis in grid.axes]
        asked = [title.removeprefix('held out: ') for title in titles[::4]]
        assert asked == [seen[1].classes[label] for label in seen[1].label] and len(set(asked)) == 3
        assert all(title.startswith(f'{sign} ') for i, title in enumerate(titles) if i % 4), titles
        assert f'3 held-out demo clips {0 if turned else 9} are' in said
        probe = course.axes[2]
        assert [line.get_linestyle() for line in probe.lines] == ['-', '--', ':']
        scores = logs.history(out, 'demo')[0]
        assert list(probe.lines[0].get_ydata()) == pytest.approx([100 * scores['probe'][step] for step in (0, 2)])
        assert set(probe.lines[2].get_ydata()) == {100 * scores['demo_log_mel_probe'][0]}


def test_names_are_no_formulas_and_may_be_of_any_script(tmp_path):
    figure = viz.pyplot().figure()
    figure.suptitle('x$^1_$.wav \u96e8')
    with warnings.catch_warnings(record=True) as said:
        warnings.filters[:] = [rule for rule in warnings.filters if rule[0] == 'ignore']
        figure.savefig(tmp_path / 'x.png')
    assert not said


def test_a_run_without_a_labelled_set_has_nothing_to_compare_with(pretrained, data_dir):          # noqa: F811
    assert is_one_line_error(call(viz.run, 'learned', f'--ckpt={pretrained}', f'--data_dir={data_dir}'), '--dataset')


def test_the_students_of_the_picture_see_what_its_title_says(pretrained, sound):          # noqa: F811
    settings = viz.configurator.configure(viz.__file__, [f'--ckpt={pretrained}', f'--wav={sound}'])
    figure, _ = viz.draw_masks(settings, viz.pyplot())
    model, _ = viz.open_asda(pretrained)
    patch, kept = model.config.patch_frames * model.config.patch_size, 6
    for axis in figure.axes[1:]:
        shown = np.isfinite(np.ma.filled(axis.images[0].get_array(), np.nan)).sum()
        assert shown == kept * patch and axis.get_title().endswith(f'{kept} of 32')
    drawn = pretrain.masks(settings.but(batch_size=3), model.config, 0, 'cpu')      # those of a training's first step
    assert torch.equal(viz.first_masks(settings, model.config, 3), drawn)


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
