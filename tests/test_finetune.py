"""Fine-tuning: losses, layer-wise rates, the whole run from every kind of checkpoint.
   python -m pytest tests/test_finetune.py"""
import contextlib
import json
import math
import os
import shutil
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

import data
import eval as evaluation
import finetune
import pretrain
from audio import samples_for
from audio.clips import open_clips
from configurator import configure
from data import FinetuneBatches
from engine import processes, saving
from engine.errors import ConfigError
from model import ASDAConfig, Classifier
from scoring import judge
from scoring.metrics import describe, metrics

from .conftest import ROOT, TINY, call, is_one_line_error, script
from .test_pretrain import log_of, same_state, weights_of

FIXTURES = os.path.join(ROOT, 'tests', 'fixtures')
RUN = ['--dataset=noises', '--batch_size=8', '--max_steps=6', '--warmup_steps=2', '--log_interval=1',
       '--save_interval=3', '--eval_interval=3', '--lr=1e-2', '--workers=0', '--device=cpu', '--validation_part=0.3',
       '--mixup=0.5', '--noise']


def settings(*argv):
    return configure(os.path.join(ROOT, 'finetune.py'), list(argv), (os.path.join(ROOT, 'model.py'), 'ASDAConfig'))


@pytest.fixture(scope='module')
def pretrained(data_dir, tmp_path_factory):
    out = str(tmp_path_factory.mktemp('pretrained'))
    assert call(pretrain.run, *TINY, '--dataset=noises', '--batch_size=8', '--max_steps=3', '--warmup_steps=1',
                f'--data_dir={data_dir}', f'--out_dir={out}').code == 0
    return os.path.join(out, 'ckpt.pt')


@pytest.fixture(scope='module')
def straight(pretrained, data_dir, tmp_path_factory):
    out = str(tmp_path_factory.mktemp('finetuned'))
    result = call(finetune.run, *RUN, f'--ckpt={pretrained}', f'--data_dir={data_dir}', f'--out_dir={out}')
    assert result.code == 0, result.err
    return out


def test_layerwise_rates_and_decay():
    model = Classifier(ASDAConfig(n_layer=3, n_head=2, n_embd=32, frames=64, decoder_groups=4), 5)
    groups = finetune.make_optimizer(model, settings('--layer_decay=0.5'),
                                     processes.Process(0, 1, torch.device('cpu'))).param_groups
    found = {id(p): (group['scale'], group['weight_decay']) for group in groups for p in group['params']}
    for name, p in model.named_parameters():
        block = int(name.split('.')[2]) if name.startswith('encoder.blocks') else 3
        vector = name.endswith('.bias') or 'norm' in name or name == 'encoder.cls'
        assert found[id(p)] == (0.5 ** (3 - block), 0.0 if vector else 0.05), name


def test_schedule():
    s = settings('--lr=1.0', '--min_lr=0.1', '--warmup_steps=10', '--max_steps=110')
    assert [finetune.lr_at(step, s) for step in (0, 5, 10, 60, 110)] == pytest.approx([0.1, 0.55, 1.0, 0.55, 0.1])
    s = settings('--lr=1.0', '--min_lr=0.1', '--warmup_steps=0', '--max_steps=100')
    assert [finetune.lr_at(step, s) for step in (0, 50)] == pytest.approx([1.0, 0.55])


def test_a_batch_is_cut_into_pairs():
    """Of a place and its partner in mixup, where there are several processes or parts."""
    def check(batch_size, accumulate, world):
        finetune.check(settings('--init=scratch', f'--batch_size={batch_size}', f'--accumulate={accumulate}'), world)
    for fits in ((1, 1, 1), (3, 1, 1), (4, 2, 1), (4, 1, 2), (8, 2, 2)):
        check(*fits)
    finetune.check(settings('--init=scratch', '--lr=0.01', '--min_lr=0.01'), 1)         # equal, a constant rate
    for odd in ((6, 2, 1), (6, 1, 2), (12, 2, 2)):
        with pytest.raises(ConfigError, match=f'batch_size = {odd[0]} is not divisible by 2 x {odd[2]} proc'):
            check(*odd)


def test_losses_are_the_stated_reductions():
    torch.manual_seed(0)
    logits, single, many = (torch.randn(6, 5), F.one_hot(torch.tensor([0, 1, 2, 3, 4, 0]), 5).float(),
                            (torch.rand(6, 5) > 0.6).float())
    s = settings('--batch_size=6', '--label_smoothing=0.1')
    labels = single.argmax(1)
    assert finetune.classification_loss(logits, single, None, s, False) == pytest.approx(
        float(F.cross_entropy(logits, labels, label_smoothing=0.1)), rel=1e-5)
    bce = F.binary_cross_entropy_with_logits(logits, many, reduction='sum')
    assert finetune.classification_loss(logits, many, many.sum(), s, True) == pytest.approx(
        float(bce / many.sum()), rel=1e-5)
    s = settings('--batch_size=6', '--loss=bce')
    bce = F.binary_cross_entropy_with_logits(logits, single, reduction='sum')
    assert finetune.classification_loss(logits, single, None, s, False) == pytest.approx(float(bce / 6), rel=1e-5)


def test_a_batch_without_labels_has_a_finite_loss():
    """AudioSet's loss over the sum of the labels; over the clips where there are none."""
    logits, none = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(6, 5)
    loss = finetune.classification_loss(logits, none, none.sum(), settings('--batch_size=6'), True)
    assert loss.item() == pytest.approx(float(F.softplus(logits).sum() / 6), rel=1e-5)


@pytest.mark.parametrize('argv, changes, words', [
    (['--loss=cross_entropy'], {'multi_label': True}, ['cross_entropy', 'several', '--loss=bce']),
    (['--label_smoothing=0.1'], {'multi_label': True}, ['label_smoothing = 0.1', 'bce']),
    (['--label_smoothing=0.1', '--loss=bce'], {}, ['label_smoothing = 0.1', 'bce']),
    ([], {'classes': ['dog']}, ['one class, dog'])])
def test_a_loss_and_labels_that_do_not_go_together(argv, changes, words):
    clips = types.SimpleNamespace(**{'multi_label': False, 'classes': ['dog', 'cat'], **changes})
    with pytest.raises(ConfigError) as error:
        finetune.check_labels(settings('--dataset=mine', *argv), clips, ['one'])
    assert all(word in str(error.value) for word in words)
    clips = types.SimpleNamespace(multi_label=False, classes=['dog', 'cat'])
    finetune.check_labels(settings('--label_smoothing=0.1'), clips, ['one'])


def test_a_run_from_our_checkpoint(straight, pretrained):
    state = saving.load_checkpoint(os.path.join(straight, 'best.pt'))
    assert (state['classes'] == ['high', 'low'] and state['config']['n_embd'] == 32
            and state['config']['drop_path'] == 0.1)
    with open(os.path.join(straight, 'log.jsonl')) as f:
        test = [json.loads(line)['test'] for line in f if '"test"' in line]
    with open(os.path.join(straight, 'log.jsonl')) as f:
        valid = [json.loads(line)['valid']['accuracy'] for line in f if '"valid"' in line]
    assert state['best'] == state['metrics']['accuracy'] == max(valid)
    assert len(test) == 1 and {'best', 'last'} == set(test[0]) and test[0]['best']['clips'] > 0


def test_the_encoder_is_the_pretrained_students(pretrained):
    model, told = finetune.initial_model(settings(f'--ckpt={pretrained}', '--frames=96', '--drop_path=0.2'), 7)
    stored = torch.load(pretrained, weights_only=True)['model']
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, stored[f'encoder.{name}'])
    assert (model.config.frames == 96 and model.config.drop_path == 0.2
            and told == {'frames': 96, 'window': 'hamming', 'repeat': False}
            and len(model.head.weight) == 7)
    middle = str(os.path.dirname(pretrained)) + '/middle.pt'
    state = torch.load(pretrained, weights_only=True)
    torch.save({**state, 'config': {**state['config'], 'pooling': 'mean', 'cls_position': 'middle'}}, middle)
    back, _ = finetune.initial_model(settings(f'--ckpt={middle}', '--pooling=cls'), 7)
    assert (back.config.pooling, back.config.cls_position) == ('cls', 'middle')     # a given default counts
    other, _ = finetune.initial_model(settings(f'--ckpt={pretrained}', '--pooling=mean', '--cls_position=middle'), 7)
    assert (other.config.pooling, other.config.cls_position) == ('mean', 'middle')
    scratch, _ = finetune.initial_model(settings(f'--ckpt={pretrained}', '--init=scratch'), 7)
    assert scratch.config.n_embd == 32 and not torch.equal(scratch.encoder.cls, model.encoder.cls)


@pytest.mark.parametrize('file', ['authors_tiny_pretrain.pt', 'authors_tiny_finetune.pt', 'eat_tiny_pretrain.pt',
                                  'eat_tiny_finetune.pt'])
def test_from_the_authors_files(data_dir, tmp_path, file):
    result = call(finetune.run, *RUN, f'--ckpt={FIXTURES}/{file}', '--max_steps=3', '--frames=64',
                  f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out')
    assert result.code == 0, result.err
    state = saving.load_checkpoint(str(tmp_path / 'out' / 'ckpt.pt'))
    assert (state['input']['window'] == 'hanning'
            and state['config']['head_norm'] == ('all' if file.startswith('authors') else 'none'))


def test_from_scratch_without_a_checkpoint(data_dir, tmp_path):
    result = call(finetune.run, *RUN, *TINY, '--init=scratch', '--layer_decay=1', f'--data_dir={data_dir}',
                  f'--out_dir={tmp_path}/out')
    assert result.code == 0 and 'learning rate scaled from 1 to 1' in result.out, result.err
    config = weights_of(tmp_path / 'out')['config']
    assert [config[name] for name in ('n_layer', 'n_head', 'n_embd', 'frames', 'drop_path')] == [2, 2, 32, 64, 0.1]


def test_resuming_goes_on_with_the_very_same_run(straight, pretrained, data_dir, tmp_path):
    out = str(tmp_path / 'resumed')
    shutil.copytree(straight, out)
    os.replace(os.path.join(out, 'ckpt.1.pt'), os.path.join(out, 'ckpt.pt'))
    result = call(finetune.run, *RUN, f'--ckpt={pretrained}', f'--data_dir={data_dir}', f'--out_dir={out}', '--resume')
    assert result.code == 0 and 'going on after step 3' in result.out and 'warning' not in result.out
    assert log_of(out) == log_of(straight)
    assert same_state(weights_of(out)['model'], weights_of(straight)['model'])


def test_accumulated_and_distributed_runs_equal_one_process(straight, pretrained, data_dir, tmp_path):
    accumulated, distributed = str(tmp_path / 'accumulated'), str(tmp_path / 'distributed')
    base = [*RUN, f'--ckpt={pretrained}', f'--data_dir={data_dir}']
    assert call(finetune.run, *base, f'--out_dir={accumulated}', '--accumulate=2').code == 0
    result = script('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'finetune.py', *base,
                    f'--out_dir={distributed}')
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    want = [line['loss'] for line in log_of(straight) if 'loss' in line]
    for out in (accumulated, distributed):
        assert [line['loss'] for line in log_of(out) if 'loss' in line] == pytest.approx(want, rel=1e-5)
        got = [line for line in log_of(out) if 'test' in line][0]['test']
        assert got == [line for line in log_of(straight) if 'test' in line][0]['test']


def test_a_finished_run_that_is_resumed_computes_nothing_and_needs_no_pretrained_file(straight, data_dir, tmp_path,
                                                                                        monkeypatch):
    """The test split is not scored again, the log gets no second result, the checkpoint's metrics stay."""
    out = str(tmp_path / 'again')
    shutil.copytree(straight, out)
    before, metrics = log_of(out), weights_of(out)['metrics']
    assert metrics['accuracy'] == [line for line in before if 'valid' in line][-1]['valid']['accuracy']
    with monkeypatch.context() as patch:
        patch.setattr(judge, 'predict', None)
        result = call(finetune.run, *RUN, '--ckpt=/gone.pt', f'--data_dir={data_dir}', f'--out_dir={out}', '--resume')
    assert result.code == 0 and log_of(out) == before, result.err
    scores = before[-1]['test']
    for name, file in (('last', 'ckpt.pt'), ('best', 'best.pt')):
        assert f'test, {name} checkpoint ({out}/{file}): {describe(scores[name])}' in result.out
    more = call(finetune.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={out}', '--resume', '--max_steps=8',
                '--eval_interval=100', '--save_interval=7', '--keep=9')
    assert more.code == 0 and [line['step'] for line in log_of(out) if 'test' in line] == [6, 8], more.err
    assert saving.load_checkpoint(os.path.join(out, 'ckpt.1.pt'))['metrics']['accuracy'] == metrics['accuracy']
    assert is_one_line_error(call(finetune.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={out}', '--resume',
                                  '--n_embd=64'), 'n_embd 32 -> 64')


@pytest.mark.parametrize('multi_label', [False, True])
def test_the_last_line_is_what_eval_says_of_the_same_file(multi_label, pretrained, data_dir, tmp_path, monkeypatch):
    """Trained in bfloat16: the head and what chooses and judges are in float32, logits of 8 bits rank otherwise."""
    if multi_label:
        shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'noises')
        as_multi_label(tmp_path / 'noises')
        data_dir = str(tmp_path)
    seen = {judge: [], evaluation: []}
    for module, logits in seen.items():
        monkeypatch.setattr(module, 'metrics', lambda x, *rest, logits=logits: logits.append(x) or metrics(x, *rest))
    result = call(finetune.run, *RUN, '--dtype=bfloat16', f'--ckpt={pretrained}', f'--data_dir={data_dir}',
                  f'--out_dir={tmp_path}/out')
    assert result.code == 0, result.err
    said = result.out.splitlines()[-1].split(': ')[1]
    result = call(evaluation.run, f'--ckpt={tmp_path}/out/best.pt', '--device=cpu', f'--data_dir={data_dir}')
    assert result.code == 0 and said in result.out, (said, result.out, result.err)
    ours, theirs = seen[judge][-1], seen[evaluation][0]
    np.testing.assert_array_equal(ours, theirs)
    assert (ours != torch.from_numpy(ours).bfloat16().float().numpy()).all()        # more than 8 bits
    model, _ = finetune.initial_model(settings(f'--ckpt={pretrained}'), 3)
    spec = torch.randn(2, 64, 128)
    with torch.autocast('cpu', torch.bfloat16):
        pooled, logits = model.encoder(spec)[:, 0], model(spec)
    plain = F.layer_norm(pooled.float(), (32,), eps=1e-6) @ model.head.weight.T     # as it begins
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, plain, atol=1e-6, rtol=1e-5)


def test_all_folds_report_each_mean_and_spread(data_dir, pretrained, tmp_path):
    shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'folded')
    with open(tmp_path / 'folded' / 'meta.json') as f:
        meta = json.load(f)
    with open(tmp_path / 'folded' / 'meta.json', 'w') as f:
        json.dump({**meta, 'folds': ['x', 'y']}, f)
    for split in ('train', 'test'):
        path = tmp_path / 'folded' / f'{split}-00000.npz'
        with np.load(path) as stored:
            arrays = {**stored, 'folds': (np.arange(len(stored['folds'])) // 2 % 2).astype(np.int16)}
        np.savez(path, **arrays)
    base = [*RUN, '--dataset=folded', '--fold=all', '--max_steps=3', f'--ckpt={pretrained}', f'--data_dir={tmp_path}',
            f'--out_dir={tmp_path}/out']
    result = call(finetune.run, *base)
    assert result.code == 0, result.err
    assert 'best checkpoints: fold x' in result.out and 'mean' in result.out and 'standard deviation' in result.out
    accuracies = [[line for line in log_of(tmp_path / 'out' / f'fold-{fold}')
                   if 'test' in line][0]['test']['last']['accuracy'] for fold in 'xy']
    assert (f'mean {np.mean(accuracies):.1%}, standard deviation {np.std(accuracies, ddof=1):.1%}'
            in result.out.splitlines()[-1])


@pytest.mark.parametrize('values, mean, spread', [({'x': 0.5, 'y': 0.7, 'z': 0.9}, '70.0%', '20.0%'),
                                                  ({'x': 0.5}, '50.0%', '0.0%')])
def test_the_spread_over_folds_is_that_of_a_sample(monkeypatch, capsys, values, mean, spread):
    monkeypatch.setattr(finetune, 'read_meta', lambda _: {'folds': list(values)})
    monkeypatch.setattr(finetune, 'train', lambda given, *_: {
        'best': {'accuracy': values[given.fold]}, 'last': {'accuracy': values[given.fold] / 2}})
    finetune.train_folds(settings('--fold=all'), processes.Process(0, 1, torch.device('cpu')),
                         types.SimpleNamespace(agreed_now=lambda: False))
    best, last = capsys.readouterr().out.splitlines()[-2:]
    shown = ', '.join(f'fold {name} {value:.1%}' for name, value in values.items())
    assert best == f'best checkpoints: {shown}; mean {mean}, standard deviation {spread}'
    assert last.startswith(f'last checkpoints: fold x 25.0%{"," if len(values) > 1 else ";"}')


@pytest.mark.parametrize('argv, wanted', [
    ([], {'x': (False, False), 'y': (False, False), 'z': (False, False)}),
    (['--overwrite'], {'x': (False, True), 'y': (False, True), 'z': (False, True)}),
    (['--resume'], {'x': (True, False), 'y': (True, False), 'z': (False, True)})])
def test_folds_go_on_where_they_were_begun(monkeypatch, tmp_path, capsys, argv, wanted):
    """x has its last checkpoint, y only the one before, z none; after z a signal has come."""
    for fold, file in (('x', 'ckpt.pt'), ('y', 'ckpt.1.pt')):
        (tmp_path / f'fold-{fold}').mkdir()
        (tmp_path / f'fold-{fold}' / file).touch()
    seen = {}

    def train(given, *_):
        assert given.out_dir == str(tmp_path / f'fold-{given.fold}')
        seen[given.fold] = given.resume, given.overwrite
        return {'last': {'accuracy': 0.5}}
    monkeypatch.setattr(finetune, 'read_meta', lambda _: {'folds': [*'xyzw']})
    monkeypatch.setattr(finetune, 'train', train)
    result = finetune.train_folds(settings('--fold=all', f'--out_dir={tmp_path}', *argv),
                                  processes.Process(0, 1, torch.device('cpu')),
                                  types.SimpleNamespace(agreed_now=lambda: len(seen) == 3))
    assert result is None and seen == wanted and 'stopped before fold w; to go on' in capsys.readouterr().out


def test_a_batch_of_an_odd_number_is_not_cut(data_dir):
    """In one part, on one process: the clip in the middle is mixed with itself, and counts."""
    clips = open_clips(['noises'], data_dir)
    batch = FinetuneBatches(clips, 64, 3, range(3), 1, n_layer=2)[0]
    seen = []

    def network(spec, draws):
        seen.append((len(spec), len(draws)))
        return spec.mean(dim=(1, 2))[:, None] * torch.ones(2, requires_grad=True)
    spectrum = {'frames': 64, 'window': 'hamming', 'mean': -6.0, 'std': 3.0}
    loss = finetune.forward_backward(network, batch, spectrum, settings('--batch_size=3'), False,
                                     processes.Process(0, 1, torch.device('cpu')), contextlib.nullcontext)
    assert seen == [(3, 3)] and loss.item() == pytest.approx(math.log(2), rel=1e-5)         # two equal logits


def as_multi_label(folder):
    """A prepared set of two classes with a third that some clips have beside their own."""
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps({**meta, 'multi_label': True, 'classes': ['high', 'low', 'any']}))
    for split in ('train', 'test'):
        path = folder / f'{split}-00000.npz'
        with np.load(path) as stored:
            bits = np.stack([stored['labels'] == 0, stored['labels'] == 1, np.arange(len(stored['labels'])) % 3 == 0],
                            axis=1)
            arrays = {**stored, 'labels': np.packbits(bits, axis=1)}
        np.savez(path, **arrays)


def test_multi_label_sets_use_bce_and_map(data_dir, pretrained, tmp_path):
    shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'many')
    as_multi_label(tmp_path / 'many')
    result = call(finetune.run, *RUN, '--dataset=many', f'--ckpt={pretrained}', f'--data_dir={tmp_path}',
                  f'--out_dir={tmp_path}/out')
    assert result.code == 0 and 'mAP' in result.out, result.err
    first = next(line['loss'] for line in log_of(tmp_path / 'out') if 'loss' in line)
    # at first every probability is near 1/2: 8 clips x 3 classes x ln 2, by 8 first labels and those of `any`
    assert 24 * math.log(2) / 16 < first < 24 * math.log(2) / 8


@pytest.mark.parametrize('argv, words', [
    ([], ['--ckpt', '--init=scratch']), (['--ckpt=/absent.pt'], ['/absent.pt']), (['--ckpt=tests'], ['folder']),
    (['--ckpt=README.md'], ['README.md']), (['--init=nothing'], ['nothing']),
    (['--ckpt={ckpt}', '--n_embd=64'], ['n_embd', 'checkpoint']), (['--ckpt={ckpt}', '--frames=50'], ['frames = 50']),
    (['--ckpt={ckpt}', '--dataset=absent'], ['absent']), (['--ckpt={ckpt}', '--fold=9'], ["fold '9'"]),
    (['--ckpt={ckpt}', '--fold=all'], ['no folds']), (['--ckpt={ckpt}', '--accumulate=3'], ['accumulate = 3']),
    (['--ckpt={ckpt}', '--labels_per_class=99'], ['labels_per_class = 99']),
    (['--ckpt={ckpt}', '--loss=mse'], ['mse']), (['--ckpt={ckpt}', '--drop_path=1'], ['drop_path']),
    (['--ckpt={ckpt}', '--validation_part=0.001'], ['validation']),
    (['--ckpt={ckpt}', '--min_lr=0.1'], ['min_lr = 0.1', 'lr = 0.01']),
    (['--ckpt={ckpt}', '--input_mask=2'], ['input_mask'])])
def test_refusals_at_the_start(data_dir, pretrained, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(ROOT)
    argv = [argument.format(ckpt=pretrained) for argument in argv]
    result = call(finetune.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out', *argv)
    assert is_one_line_error(result, *words)
    assert not os.path.exists(tmp_path / 'out')


@pytest.mark.parametrize('pooling', ['cls', 'bands'])
def test_a_head_can_begin_as_a_linear_probe(pretrained, data_dir, tmp_path, pooling):
    """Reference: scikit-learn's logistic regression on what stands before the head, in numpy."""
    result = call(finetune.run, *RUN, f'--pooling={pooling}', '--head=probe', '--lr=0', '--min_lr=0', '--repeat',
                  f'--ckpt={pretrained}', f'--data_dir={data_dir}', f'--out_dir={tmp_path}')
    assert result.code == 0, result.err
    loaded = evaluation.open_checkpoint(str(tmp_path / 'ckpt.pt'))
    model, train = loaded.classifier.eval(), finetune.task_splits('noises', data_dir, '', 0, 1, 0.3, '')[0]
    batch = [torch.from_numpy(np.stack(rows)) for rows in zip(*(
        (np.resize(train.read(i), samples_for(loaded.config.frames)), samples_for(loaded.config.frames))
        for i in range(len(train))))]
    with torch.no_grad():
        x = model.encoder(data.log_mel(*batch, **loaded.spectrum))[:, 1:].unflatten(1, (-1, 8)).flatten(2).numpy()
        if pooling == 'cls':
            x = model.encoder(data.log_mel(*batch, **loaded.spectrum))[:, 0].numpy()
        else:
            x = np.concatenate([x.mean(axis=1), np.sqrt(x.var(axis=1) + 1e-6)], axis=1)
        seen = model.head_norm(torch.from_numpy(x))
        logits = model.head(seen)
    standard = (seen.numpy() - seen.numpy().mean(axis=0)) / (seen.numpy().std(axis=0) + 1e-6)
    two_vectors = 2                         # of opposite sign, for two classes, each with half of what one would have
    probe = LogisticRegression(C=two_vectors / (0.1 * len(train)), tol=1e-8, max_iter=5000).fit(standard, train.label)
    np.testing.assert_allclose(logits.softmax(dim=1), probe.predict_proba(standard), atol=2e-3)


def test_bands_keep_the_window_of_pretraining(pretrained, data_dir, tmp_path):
    """Inputs of 144 frames, an encoder that sees 48 of them at a time: its own 64 at most."""
    run = [*RUN, '--pooling=bands', '--frames=144', f'--ckpt={pretrained}', f'--data_dir={data_dir}']
    made = call(finetune.run, *run, f'--out_dir={tmp_path}/out')
    assert made.code == 0 and '; 144 frames;' in made.out, made.err
    best, tests = f'{tmp_path}/out/best.pt', log_of(tmp_path / 'out')[-1]['test']
    loaded = evaluation.open_checkpoint(best)
    assert (loaded.config.frames, loaded.spectrum['frames'], loaded.frames) == (64, 64, 144)
    seen = []
    loaded.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    loaded.classifier(torch.zeros(1, loaded.frames, 128))
    assert seen == [48]
    shown = call(evaluation.run, f'--ckpt={best}', f'--data_dir={data_dir}', '--device=cpu')
    assert shown.code == 0 and describe(tests['best']) in shown.out, shown.err
    assert is_one_line_error(call(finetune.run, *run, f'--out_dir={tmp_path}/out', '--resume', '--frames=96'),
                             'frames 144 -> 96')
    again, told = finetune.initial_model(settings(f'--ckpt={best}', '--pooling=bands'), 2)       # tuned once more
    assert (again.config.frames, told['frames']) == (64, 144)

    whole = weights_of(tmp_path / 'out')
    os.replace(tmp_path / 'out' / 'ckpt.1.pt', tmp_path / 'out' / 'ckpt.pt')
    assert call(finetune.run, *run, f'--out_dir={tmp_path}/out', '--resume').code == 0
    assert same_state(weights_of(tmp_path / 'out')['model'], whole['model'])
    state = torch.load(best, weights_only=True)                             # as it was written before windows were
    state['config']['frames'] = state['input'].pop('frames')
    torch.save(state, tmp_path / 'old.pt')
    old = evaluation.open_checkpoint(str(tmp_path / 'old.pt'))
    assert (old.config.frames, old.frames) == (144, 144)
    scratch, told = finetune.initial_model(settings('--init=scratch', '--pooling=bands', '--patch_frames=32',
                                                    '--frames=480'), 2)
    assert (scratch.config.frames, told['frames']) == (480, 480)            # not cut, and a length that it can have
    for damage in (100, 10 ** 9, 'x', 64.0):
        torch.save({**state, 'input': {**state['input'], 'frames': damage}}, tmp_path / 'damaged.pt')
        assert is_one_line_error(call(evaluation.run, f'--ckpt={tmp_path}/damaged.pt'), 'damaged', 'frames')


def test_a_run_that_goes_on_keeps_its_head(pretrained, data_dir, tmp_path):
    base = [*RUN, '--head=probe', f'--ckpt={pretrained}', f'--data_dir={data_dir}', f'--out_dir={tmp_path}']
    assert call(finetune.run, *base).code == 0
    whole = weights_of(tmp_path)['model']
    os.replace(tmp_path / 'ckpt.1.pt', tmp_path / 'ckpt.pt')                # as it was after three updates
    assert call(finetune.run, *base, '--resume').code == 0
    assert same_state(weights_of(tmp_path)['model'], whole)
