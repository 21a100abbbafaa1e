"""Fine-tuning: losses, layer-wise rates, the whole run from every kind of checkpoint.
   python -m pytest tests/test_finetune.py"""
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import finetune
import pretrain
from checkpoints import saving
from configurator import configure
from engine import processes
from model import ASDAConfig, Classifier

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
    model, window, _ = finetune.initial_model(settings(f'--ckpt={pretrained}', '--frames=96', '--drop_path=0.2'), 7)
    stored = torch.load(pretrained, weights_only=True)['model']
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, stored[f'encoder.{name}'])
    assert (model.config.frames == 96 and model.config.drop_path == 0.2 and window == 'hamming'
            and len(model.head.weight) == 7)
    middle = str(os.path.dirname(pretrained)) + '/middle.pt'
    state = torch.load(pretrained, weights_only=True)
    torch.save({**state, 'config': {**state['config'], 'pooling': 'mean', 'cls_position': 'middle'}}, middle)
    back, _, _ = finetune.initial_model(settings(f'--ckpt={middle}', '--pooling=cls'), 7)
    assert (back.config.pooling, back.config.cls_position) == ('cls', 'middle')     # a given default counts
    other, _, _ = finetune.initial_model(settings(f'--ckpt={pretrained}', '--pooling=mean', '--cls_position=middle'), 7)
    assert (other.config.pooling, other.config.cls_position) == ('mean', 'middle')
    scratch, _, _ = finetune.initial_model(settings(f'--ckpt={pretrained}', '--init=scratch'), 7)
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


def test_multi_label_sets_use_bce_and_map(data_dir, pretrained, tmp_path):
    shutil.copytree(os.path.join(data_dir, 'noises'), tmp_path / 'many')
    with open(tmp_path / 'many' / 'meta.json') as f:
        meta = json.load(f)
    with open(tmp_path / 'many' / 'meta.json', 'w') as f:
        json.dump({**meta, 'multi_label': True, 'classes': ['high', 'low', 'any']}, f)
    for split in ('train', 'test'):
        path = tmp_path / 'many' / f'{split}-00000.npz'
        with np.load(path) as stored:
            bits = np.stack([stored['labels'] == 0, stored['labels'] == 1, np.arange(len(stored['labels'])) % 3 == 0],
                            axis=1)
            arrays = {**stored, 'labels': np.packbits(bits, axis=1)}
        np.savez(path, **arrays)
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
    (['--ckpt={ckpt}', '--input_mask=2'], ['input_mask'])])
def test_refusals_at_the_start(data_dir, pretrained, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(ROOT)
    argv = [argument.format(ckpt=pretrained) for argument in argv]
    result = call(finetune.run, *RUN, f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out', *argv)
    assert is_one_line_error(result, *words)
    assert not os.path.exists(tmp_path / 'out')
