"""python model.py: the numbers it prints are the network's.   python -m pytest tests/test_describe.py"""
import ast
import os
import re
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import ASDA, ASDAConfig, Encoder
from tools import describe

from .conftest import ROOT, call, is_one_line_error, script

SMALL = ['--n_layer=2', '--n_head=2', '--n_embd=32', '--frames=64', '--decoder_layers=2', '--decoder_groups=4',
         '--n_students=3', '--mask_block=2', '--device=cpu']


def numbers_of(text, line):
    """The numbers at the end of the line that begins with these words."""
    (found,) = [each for each in text.splitlines() if each.strip().startswith(line)]
    return float(re.search(r'([\d,.]+)( GFLOP)?$', found)[1].replace(',', ''))


def test_model_py_knows_torch_alone_and_stays_short():
    with open(os.path.join(ROOT, 'model.py')) as f:
        text = f.read()
    assert len(text.splitlines()) <= 330
    imported = [name.split('.')[0] for node in ast.parse(text).body if isinstance(node, (ast.Import, ast.ImportFrom))
                for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])]
    assert set(imported) - set(sys.stdlib_module_names) == {'torch'}


def test_the_base_model_has_the_counts_of_the_paper(monkeypatch):
    """Of the authors' own model, counted: 94,950,144 (paper: 95 M); with 527 classes the paper's 93 M."""
    monkeypatch.setattr(describe, 'show_forward', lambda *_: None)          # ten seconds
    text = call(describe.run).out
    assert numbers_of(text, 'trained in pre-training') == 94_950_144
    assert round(numbers_of(text, 'classifier') / 1e6) == 93
    assert numbers_of(text, 'encoder  ') == numbers_of(text, 'teacher:') == 92_364_288
    rows = re.findall(r'^  .*\(.*\) +([\d,]+)$', text.split('\nOperations')[0], re.M)       # each kind of layer
    assert sum(int(row.replace(',', '')) for row in rows) == 94_950_144 and len(rows) == 13
    assert numbers_of(text, 'step, all of it') == pytest.approx(1165.4, abs=0.05)           # docs/performance.md


def test_a_config_file_and_options_count():
    plain = call(describe.run, os.path.join(ROOT, 'config/demo.py'), '--n_layer=1')
    assert plain.code == 0 and '(1, 128, 128): clips, frames, mel bands' in plain.out, plain.err
    for argv in ([f'--config={ROOT}/config/demo.py', '--n_layer=1'],
                 ['--n_layer=1', '--config', f'{ROOT}/config/demo.py']):
        assert call(describe.run, *argv).out == plain.out
    model = ASDA(ASDAConfig(n_layer=2, n_head=2, n_embd=32, frames=64, decoder_layers=2, decoder_groups=4,
                            diff_lambda=0.0))
    trained = sum(p.numel() for part in (model.encoder, model.decoder) for p in part.parameters())
    assert numbers_of(call(describe.run, *SMALL, '--diff_lambda=0').out, 'trained') == trained


def test_the_operations_of_an_embedding_are_those_that_pytorch_counts():
    config = ASDAConfig(n_layer=2, n_head=2, n_embd=32, frames=64)
    with FlopCounterMode(display=False) as counter:
        Encoder(config)(torch.randn(1, 64, 128))
    printed = numbers_of(call(describe.run, *SMALL).out, 'embedding of a clip')
    assert printed == pytest.approx(counter.get_total_flops() / 1e9, abs=6e-4)


def test_the_shapes_are_those_of_the_forward_pass():
    """8 x 4 patches of 64 frames; three students keep 6 of 32 and have a CLS; two maps of two heads in 4 x 32 rows."""
    text = call(describe.run, *SMALL).out
    for line in ('spec (1, 64, 128): clips', 'mask (1, 3, 32): clips, students, patches; 6 of 32 are False',
                 'teacher.patch_embed (1, 1, 64, 128) -> (1, 32, 4, 8)', 'teacher (1, 64, 128) -> (1, 33, 32)',
                 'targets (1, 64, 128) -> (1, 32, 32), (1, 32)', 'encoder.norm (3, 7, 32) -> (3, 7, 32)',
                 'encoder.blocks.0.attn.qk (3, 7, 32) -> (3, 7, 128)',
                 'encoder.blocks.0.mlp.0 (3, 7, 32) -> (3, 7, 112)',
                 'encoder (1, 64, 128), (3, 6) -> (3, 7, 32)', 'decoder.convs.0 (3, 32, 4, 8) -> (3, 32, 4, 8)',
                 'decoder (3, 6, 32), (3, 6), (3, 32, 32) -> (3, 32, 32)'):
        assert line in re.sub(' +', ' ', text), line
    assert 'blocks.1' not in text and re.search(r'loss +\d+\.\d+; frame \d+\.\d+, utterance', text)


def test_model_py_is_that_command_from_any_folder(tmp_path):
    result = script(os.path.join(ROOT, 'model.py'), *SMALL, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout == call(describe.run, *SMALL).out, result.stderr
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('argv, words', [
    (['--n_heads=3'], ['n_heads', 'n_head']), (['--n_head=7'], ['n_embd', 'n_head']), (['--config='], ['config file']),
    (['--config=/nonexistent.py'], ['/nonexistent.py']), (['--frames=63'], ['frames']), (['--device=tpu'], ['tpu']),
    (['--config', os.path.join(ROOT, 'config/finetune_demo.py')], ['checkpoint'])], ids=str)
def test_a_mistake_is_one_line(argv, words):
    assert is_one_line_error(call(describe.run, *argv), *words)


def test_too_little_memory_is_one_line(monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(describe, 'ASDA', full)
    with pytest.raises(describe.RunError, match='too little memory'):
        describe.show_forward(ASDAConfig(), torch.zeros(1, 16, 504, dtype=torch.bool))
