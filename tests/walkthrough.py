"""The numbers and the line numbers of docs/walkthrough.md, from one short run of pretrain.py that is looked at.

    python -m tests.walkthrough             # prints the blocks of numbers as they are now
    python -m tests.walkthrough --write     # puts them, and the line numbers of the links, into the page

A block of the page begins with <!-- run: NAME -->; BLOCKS has a function for each. A link to code reads
[`model.py: Encoder.embed`](../model.py#L1) `code`, or is followed by a ```python block instead of `code`: the code
must stand in what is named, and the link lead to its first line. tests/test_walkthrough.py compares the page with both.
"""
import ast
import contextlib
import json
import os
import re
import sys
import tempfile
import textwrap
from unittest import mock

import torch
import torch.nn.functional as F

import data
import prepare
import pretrain
from engine import saving
from model import ASDA, ASDAConfig, DiffAttention, n_kept

from .conftest import ROOT, call

PAGE = os.path.join(ROOT, 'docs', 'walkthrough.md')
CLIPS = 200                     # of the demo's set, as the page's commands and tests/conftest.py make it
OPTIONS = ['--n_students=8', '--mask_block=3', '--pos_scale=1', '--batch_size=6', '--max_steps=20', '--warmup_steps=5',
           '--log_interval=1', '--eval_dataset=', '--dtype=float32']
HERE = ['--device=cpu', '--threads=1']      # of which the numbers are no function, but for their last digits
SHOWN = 1, 2, 5, 10, 20         # steps of the table
COLUMNS = 'step', 'lr', 'ema', 'loss', 'frame', 'utterance', 'explained', 'content', 'place', 'grad_norm'


class Watched:
    """One run of pretrain.py in data_dir, with what its first step called: what went in and what came out."""

    def __init__(self, data_dir, out_dir):
        self.calls, self.modules, seen = {}, {}, {}

        def watch(name, function):
            def watched(*inputs, **named):
                output = function(*inputs, **named)
                self.calls.setdefault(name, (inputs, named, output))
                return output
            return watched

        def note(module, inputs, output):
            seen.setdefault(module, (inputs, output))
        hook = torch.nn.modules.module.register_module_forward_hook(note)
        with contextlib.ExitStack() as patches:
            for owner, name in ((data, 'log_mel'), (pretrain, 'masks'), (pretrain, 'mask_noise'), (ASDA, 'targets'),
                                (ASDA, 'forward'), (DiffAttention, 'attend')):
                patches.enter_context(mock.patch.object(owner, name, watch(name, getattr(owner, name))))
            result = call(pretrain.run, os.path.join(ROOT, 'config', 'demo.py'), *OPTIONS, *HERE,
                          f'--data_dir={data_dir}', f'--out_dir={out_dir}', '--overwrite')
        hook.remove()
        assert result.code == 0, result.err
        self.out, model = result.out, self.calls['forward'][0][0]
        self.config = model.config
        self.modules = {name: seen[module] for name, module in model.named_modules() if module in seen}
        with open(os.path.join(out_dir, 'log.jsonl'), encoding='utf-8') as f:
            self.log = {line['step']: line for line in map(json.loads, f) if 'loss' in line}
        self.state = saving.load_checkpoint(os.path.join(out_dir, 'ckpt.pt'))

    def output(self, name):
        return self.modules[name][1]


def shape(tensor):
    return str(tuple(tensor.shape))


def rows(*lines):
    """Name, shape and words in columns."""
    return '\n'.join(f'{name:<22}{what:<24}{words}'.rstrip() for name, what, words in lines)


# -------------------------------------------------------------------------------------------------------------- blocks

def start(run):
    """What the run says of itself before its first step, without what is the machine's."""
    wanted = 'clips, ', 'trainable parameters', 'AdamW: '
    return '\n'.join(line.split('; torch ')[0] for line in run.out.splitlines() if any(word in line for word in wanted))


def sound(run):
    (pcm, lengths), how, spec = run.calls['log_mel']
    return rows(('pcm', shape(pcm), f'{str(pcm.dtype)[6:]}, from {pcm.min()} to {pcm.max()}'),
                ('lengths', shape(lengths), f'real samples: {" ".join(map(str, lengths.tolist()))}'),
                ('spec', shape(spec), f'normalised: mean {spec.mean():.3f}, standard deviation {spec.std():.3f}'),
                ('silence', '', f'log(1.19e-7) = -15.942 becomes {(-15.942 - how["mean"]) / 2 / how["std"]:.3f}'),
                ('padding', '', f'0 becomes {(0 - how["mean"]) / 2 / how["std"]:.3f}'))


def masks(run):
    """The first clip's first four students side by side, time downwards."""
    mask = run.calls['masks'][2]
    grids = mask[0, :4].view(4, *run.config.grid)
    drawn = ['   '.join(' '.join('.' if hidden else '#' for hidden in line) for line in lines)
             for lines in zip(*grids.tolist())]
    return rows(('mask', shape(mask), f'{int((~mask[0, 0]).sum())} of {mask.shape[2]} are False in every view')) \
        + '\n\n' + '\n'.join(drawn)


def inverse(run):
    """How many masked patches have a kept one beside them, with our masks and with as many patches kept at random."""
    lines = []
    for name, config in (('demo, 8 x 8, blocks of 3', run.config), ('base, 63 x 8, blocks of 5', ASDAConfig())):
        views, (times, bands) = 1000, config.grid
        generator = torch.Generator().manual_seed(0)
        blocks = data.block_masks(views, 1, config.grid, config.mask_ratio, config.mask_block, generator,
                                  config.mask_adjust)[:, 0]
        kept = torch.rand(views, times * bands, generator=generator).argsort(dim=1)[:, :n_kept(times * bands,
                                                                                               config.mask_ratio)]
        at_random = torch.ones_like(blocks).scatter(1, kept, False)
        shares = []
        for mask in (blocks, at_random):
            seen = F.pad(~mask.view(views, times, bands), (1, 1, 1, 1))
            beside = seen[:, :-2, 1:-1] | seen[:, 2:, 1:-1] | seen[:, 1:-1, :-2] | seen[:, 1:-1, 2:]
            shares.append(float(beside.flatten(1)[mask].float().mean()))
        lines.append(f'{name:<28}{shares[0]:.2f} with blocks, {shares[1]:.2f} at random')
    return '\n'.join(lines)


def teacher(run):
    patches, (_, outputs), norm = (run.output('teacher.patch_embed'), run.output('teacher'),
                                        run.output('teacher.norm'))
    target, utterance = run.calls['targets'][2]
    last = outputs[-1][:, 1:]
    return rows(
        ('patch_embed', shape(patches), 'clips, channels, time, frequency'),
        ('CLS and patches', shape(norm), 'after the input LayerNorm'),
        ('t of each block', f'{len(outputs)} x {shape(outputs[0])}', f'the last: standard deviation {last.std():.3f}'),
        ('target', shape(target), f'norm of each {target.norm(dim=2).mean():.3f} = sqrt(128), its square / sqrt(128) '
                                  f'= {target.square().sum(dim=2).mean() / 128 ** 0.5:.3f}'),
        ('utterance_target', shape(utterance), f'norm of each {utterance.norm(dim=1).mean():.3f}'))


def utterance(run):
    """How much of each target is the same for every clip."""
    target, utterance = run.calls['targets'][2]
    apart, cls_apart = (values - values.mean(dim=0) for values in (target, utterance))
    root = run.config.n_embd ** 0.5
    return rows(('target', shape(target), f'variance over clips, at a place and channel: {apart.square().mean():.4f}'),
                ('utterance_target', shape(utterance), f'variance over clips, in a channel: '
                                                       f'{cls_apart.square().mean():.4f}'),
                ('its loss', 'of the best constant', f'{cls_apart.square().sum(dim=1).mean() / root:.4f}'),
                ('', 'of the first step', f'{run.log[1]["utterance"]:.3f}'))


def attention(run):
    """The teacher's first block: it is called first."""
    (module, q, k, v), _, y = run.calls['attend']
    first, second = (q / q.shape[-1] ** 0.5 @ k.mT).softmax(dim=-1).chunk(2, dim=1)
    rest = module.config.diff_lambda
    kept = (first - rest * second).sum(dim=-1)
    x, normed = run.output('teacher.norm'), run.output('teacher.blocks.0.attn.norm')
    return rows(('X', shape(x), 'clips, tokens, channels'),
                ('Q, K', shape(q), 'clips, 2 h maps, tokens, d'), ('V', shape(v), 'clips, h heads, tokens, d'),
                ('A1, A2', shape(first), f'rows sum to {first.sum(dim=-1).mean():.3f}'),
                (f'A1 - {rest} A2', shape(first), f'rows sum to {kept.mean():.3f}'),
                ('(A1 - lambda A2) V', shape(y), f'standard deviation {y.std():.4f}'),
                ('after LN of the heads', shape(x), f'standard deviation {normed.std():.3f}'))


def student(run):
    (_, keep), x = run.modules['encoder']
    (_, _, noise), prediction = run.modules['decoder']
    return rows(('keep', shape(keep), f'first student: {" ".join(map(str, keep[0].tolist()))}'),
                ('CLS and patches', shape(x), f'after the last block; norm of a CLS {x[:, 0].norm(dim=1).mean():.3f}'),
                ('noise', shape(noise), f'standard deviation {noise.std():.4f}'),
                ('a convolution', shape(run.output('decoder.convs.0')), 'views, channels, time, frequency'),
                ('prediction', shape(prediction), f'standard deviation {prediction.std():.3f}'))


@torch.no_grad()
def losses(run):
    """Equations (4) to (6) by loops over views, from what the step's parts gave, beside what the run logged."""
    config, mask = run.config, run.calls['masks'][2].flatten(0, 1)
    target, utterance_target = run.calls['targets'][2]
    cls, prediction = run.output('encoder')[:, 0], run.output('decoder')
    frame, utterance = [], []
    for view in range(len(mask)):
        clip = view // config.n_students
        utterance.append((cls[view] - utterance_target[clip]).square().sum() / config.n_embd ** 0.5)
        for place in mask[view].nonzero()[:, 0]:
            frame.append((prediction[view, place] - target[clip, place]).square().sum() / config.n_embd ** 0.5)
    u, f, logged = float(torch.stack(utterance).mean()), float(torch.stack(frame).mean()), run.log[1]
    return rows(('(4) utterance', f'{len(utterance)} views', f'{u:.3f}   logged {logged["utterance"]:.3f}'),
                ('(5) frame', f'{len(frame)} masked patches', f'{f:.3f}   logged {logged["frame"]:.3f}'),
                ('(6) loss', f'frame + {config.alpha} utterance',
                 f'{f + config.alpha * u:.3f}   logged {logged["loss"]:.3f}'))


def steps(run):
    table = [COLUMNS, *([f'{run.log[step][name]:.4g}' for name in COLUMNS] for step in SHOWN)]
    return '\n'.join(''.join(f'{cell:>11}' for cell in line)[5:].rstrip() for line in table)


def saved(run):
    """Of the checkpoint, what the next step depends on."""
    state = run.state
    parts = {part: sum(w.numel() for name, w in state['model'].items() if name.startswith(part + '.'))
             for part in ('encoder', 'decoder', 'teacher')}
    moments = [m.numel() for each in state['optimizer']['state'].values() for m in each.values() if m.ndim]
    words = {'model': ', '.join(f'{part} {number:,}' for part, number in parts.items()),
             'optimizer': f'two moments of each trained parameter: {sum(moments):,}',
             'step': state['step'],
             **{name: ', '.join(list(state[name])[:5]) + ', ...' * (len(state[name]) > 5)
                for name in ('config', 'settings', 'input')}}
    return '\n'.join(f'{name:<12}{text}' for name, text in words.items())


BLOCKS = {function.__name__: function for function in (
    start, sound, masks, inverse, teacher, utterance, attention, student, losses, steps, saved)}


# ---------------------------------------------------------------------------------------------------------------- page

def blocks_of(page):
    """{name: text} of the blocks of numbers on the page."""
    return dict(re.findall(r'<!-- run: (\w+) -->\n```text\n(.*?)\n```', page, re.S))


def differences(want, got, relative=0.02):
    """In words, where two texts differ: other words, other whole numbers, or numbers with a point that differ by more
    than the tolerance and one and a half of the last digit shown. [] if nowhere."""
    number = r'-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?'
    found = []
    for line, other in zip(want.splitlines(), got.splitlines()):
        if re.sub(r'\s+', ' ', re.sub(number, '0', line)) != re.sub(r'\s+', ' ', re.sub(number, '0', other)):
            found.append(f'{line!r} is now {other!r}')
            continue
        for one, two in zip(re.findall(number, line), re.findall(number, other)):
            a, b = (float(text.replace(',', '')) for text in (one, two))
            digits = len(one.partition('.')[2].partition('e')[0])
            last = 10.0 ** (int(one.partition('e')[2] or 0) - digits)
            allowed = relative * abs(a) + 1.5 * last if '.' in one + two or 'e' in one + two else 0
            if abs(a - b) > allowed:
                found.append(f'{one} in {line!r} is now {two}')
    return found + (['other lines'] if len(want.splitlines()) != len(got.splitlines()) else [])


LINK = re.compile(r'\[`(?P<file>[\w/]+\.py): (?P<name>[\w.]+)`\]\(\.\./(?P<link>[\w/]+\.py)#L(?P<line>\d+)\)'
                  r'(?:\s+`(?P<code>[^`\n]+)`|:?\n\n```python\n(?P<block>.*?)\n```)', re.S)
ANY_LINK = re.compile(r'\]\(\.\./[\w/]+\.py')


def span(source, name):
    """First and last line of a function, class or assignment, as Class.function or one name. Raises ValueError."""
    body = ast.parse(source).body
    for part in name.split('.'):
        for node in body:
            names = ([node.name] if hasattr(node, 'name') else
                     [target.id for target in ast.walk(node) if isinstance(target, ast.Name)]
                     if isinstance(node, (ast.Assign, ast.AnnAssign)) else [])
            if part in names:
                break
        else:
            raise ValueError(f'there is no {name}')
        body = getattr(node, 'body', [])
    return node.lineno, node.end_lineno


def place_of(link):
    """The line at which the code that a link quotes stands. Raises ValueError."""
    with open(os.path.join(ROOT, link['file']), encoding='utf-8') as f:
        source = f.read()
    first, last = span(source, link['name'])
    lines = source.splitlines()[first - 1:last]
    if link['code']:
        found = [first + i for i, line in enumerate(lines) if link['code'] in line]
    else:
        block = textwrap.dedent(link['block']).splitlines()
        found = [first + i for i in range(len(lines))
                 if textwrap.dedent('\n'.join(lines[i:i + len(block)])).splitlines() == block]
    if not found:
        raise ValueError(f'{link["name"]} in {link["file"]} has no {link["code"] or link["block"]!r}')
    return found[0]


def wrong_links(page):
    """In words, what is wrong with the page's links to code. [] if nothing."""
    links = list(LINK.finditer(page))
    found = [] if len(links) == len(ANY_LINK.findall(page)) else ['a link to code quotes none']
    for link in links:
        try:
            line = place_of(link)
        except (ValueError, OSError) as error:
            found.append(str(error))
            continue
        if line != int(link['line']) or link['link'] != link['file']:
            found.append(f'{link["file"]}: {link["name"]} is at line {line}, the link leads to {link["link"]}, line '
                         f'{link["line"]}')
    return found


def with_right_lines(page):
    """The page with the line numbers of its links as the code is now. Raises ValueError for code that has gone."""
    return LINK.sub(lambda link: re.sub(r'#L\d+', f'#L{place_of(link)}', link[0], count=1), page)


def with_blocks(page, blocks):
    return re.sub(r'(<!-- run: (\w+) -->\n```text\n).*?(\n```\n)', lambda m: m[1] + blocks[m[2]] + m[3], page,
                  flags=re.S)


def main(argv):
    with tempfile.TemporaryDirectory() as folder:
        made = call(prepare.run, 'demo', f'--clips={CLIPS}', '--workers=0', f'--out_dir={folder}/demo')
        assert made.code == 0, made.err
        run = Watched(folder, os.path.join(folder, 'out'))
    blocks = {name: function(run) for name, function in BLOCKS.items()}
    if argv != ['--write']:
        print('\n\n'.join(f'<!-- run: {name} -->\n{text}' for name, text in blocks.items()))
        return
    with open(PAGE, encoding='utf-8') as f:
        page = f.read()
    page = with_right_lines(with_blocks(page, blocks))
    with open(PAGE, 'w', encoding='utf-8') as f:
        f.write(page)


if __name__ == '__main__':
    main(sys.argv[1:])
