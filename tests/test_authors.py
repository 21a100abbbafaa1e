"""The authors' and EAT's checkpoints reproduce what their own code computed from them. python -m pytest
tests/test_authors.py"""

import argparse
import collections
import datetime
import os
import pickle
import types
import zipfile

import numpy as np
import pytest
import torch

from checkpoints import authors
from engine.errors import CheckpointError
from model import ASDAConfig, Classifier

from .conftest import call, is_one_line_error

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
GRADIENTS = {
    'modality_encoders.IMAGE.extra_tokens': 'encoder.cls',
    'modality_encoders.IMAGE.local_encoder.proj.weight': 'encoder.patch_embed.weight',
    'modality_encoders.IMAGE.decoder.blocks.0.0.weight': 'decoder.convs.0.weight',
    'blocks.0.attn.qk.weight': 'encoder.blocks.0.attn.qk.weight',
    'blocks.1.attn.v.bias': 'encoder.blocks.1.attn.v.bias',
}


@pytest.mark.parametrize('kind', ['authors', 'eat'])
def test_pretraining_forward_losses_and_gradients(kind):
    want = expected(kind)
    # The fixture's utterance term is 0.5 x the SUM over 8 views; ours is a mean, so the scale is 8.
    model = authors.load_pretrained(fixture(f'{kind}_tiny_pretrain.pt'), utterance_scale=8.0)
    spec, mask = want['spectrogram'], want['mask'].view(2, 4, 64).bool()
    order = want['ids_keep'].argsort(dim=1)  # ours are in rising order
    keep = want['ids_keep'].gather(1, order)
    student = torch.cat(
        [want['student_out'][:, :1], want['student_out'][:, 1:].gather(1, order[:, :, None].expand(-1, -1, 64))], dim=1
    )
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
    assert close(model.encoder(want['spectrogram']), want['features'])


def test_a_finetuned_file_says_its_own_length(tmp_path):
    def change(state):
        state['cfg']['task']['target_length'] = 64                          # the pre-training inside was of 128 frames
    path = resaved(tmp_path / 'short.pt', change, 'authors_tiny_finetune.pt')
    model = authors.load_classifier(path)
    assert model.config.frames == 64 and model.config.n_head == 4


def test_architecture_follows_from_the_shapes():
    asda = authors.load_pretrained(fixture('authors_tiny_pretrain.pt'), utterance_scale=192.0, frames=1008).config
    assert (asda.n_layer, asda.n_head, asda.n_embd, asda.ffn_ratio) == (2, 4, 64, 3.5)  # the file's cfg says 4.0
    assert (asda.diff_lambda, asda.head_norm, asda.attn_scale, asda.pos_embed) == (0.1, 'all', 0.95, '2d')
    assert (asda.decoder_layers, asda.decoder_groups, asda.utterance_scale, asda.frames) == (2, 16, 192.0, 1008)
    eat = authors.load_classifier(fixture('eat_tiny_finetune.pt')).config
    assert (eat.diff_lambda, eat.head_norm, eat.ffn_ratio, eat.n_head, eat.frames) == (0.0, 'none', 4.0, 4, 128)


# ------------------------------------------------------------------------------------------- what a file may hold


class Run:
    """Pickles into a call of os.system."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Evaluate(Run):
    def __reduce__(self):
        return eval, (self.command,)


class Colour(__import__('enum').Enum):
    RED = 1


def resaved(path, change, name='authors_tiny_pretrain.pt'):
    """The fixture again with something else in it, saved as fairseq would (a full pickle)."""
    state = torch.load(fixture(name), weights_only=True)
    torch.save(change(state) or state, path)
    return str(path)


@pytest.mark.parametrize('D, heads, layers', [(768, 12, 2), (1024, 16, 3)])
def test_base_and_large_of_eat_and_sslam(tmp_path, D, heads, layers):
    """The widths of their base and large models (fewer layers, for time): 64 channels a head where cfg says nothing."""
    config = ASDAConfig(n_layer=layers, n_head=heads, n_embd=D, ffn_ratio=4.0, diff_lambda=0.0, head_norm='none',
                        pos_embed='2d', frames=1024, decoder_layers=0)
    ours = Classifier(config, 527)
    theirs = {}
    for name, tensor in ours.state_dict().items():
        table = {'encoder.cls': 'model.modality_encoders.IMAGE.extra_tokens',
                 'encoder.patch_embed.': 'model.modality_encoders.IMAGE.local_encoder.proj.',
                 'encoder.norm.': 'model.modality_encoders.IMAGE.context_encoder.norm.', 'head_norm.': 'fc_norm.',
                 'encoder.blocks.': 'model.blocks.', 'mlp.0.': 'mlp.fc1.', 'mlp.2.': 'mlp.fc2.'}
        for mine, other in table.items():
            name = name.replace(mine, other)
        theirs[name] = tensor
    for i in range(layers):
        for p in ('weight', 'bias'):
            prefix = f'model.blocks.{i}.attn.'
            theirs[f'{prefix}qkv.{p}'] = torch.cat([theirs.pop(f'{prefix}qk.{p}'), theirs.pop(f'{prefix}v.{p}')])
    torch.save({'model': theirs, 'cfg': None, 'args': None}, tmp_path / 'large.pt')
    loaded = authors.load_classifier(str(tmp_path / 'large.pt'))
    assert loaded.config == config
    spec = torch.randn(1, 128, 128)
    torch.testing.assert_close(loaded.eval()(spec), ours.eval()(spec))


def test_objects_of_other_packages_become_inert(tmp_path):
    def change(state):
        state['cfg'] = {
            'model': argparse.Namespace(num_heads=4, when=datetime.date.today(), colour=Colour.RED),
            'task': {'target_length': 128},
            'space': types.SimpleNamespace(a=1),
            'dtype': np.float32(3),
            'deque': collections.deque([1, 2]),
        }
        state['args'] = argparse.Namespace(path='x')

    path = resaved(tmp_path / 'odd.pt', change)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)  # so the allow-list reader is what opens it
    ours, theirs = authors.load_pretrained(path), authors.load_pretrained(fixture('authors_tiny_pretrain.pt'))
    assert ours.config == theirs.config
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()))


@pytest.mark.parametrize('where', ['cfg', 'weight', 'top', 'key'])
@pytest.mark.parametrize('kind', [Run, Evaluate])
def test_code_in_a_file_does_not_run(tmp_path, where, kind):
    marker = tmp_path / 'ran'
    bomb = kind(f'touch {marker}' if kind is Run else f'open({str(marker)!r}, "w").close()')

    def change(state):
        if where == 'cfg':
            state['cfg']['model']['bomb'] = bomb
        elif where == 'weight':
            state['model']['blocks.0.attn.v.bias'] = bomb
        elif where == 'key':
            state['model'][('a', 'tuple')] = bomb
        else:
            return bomb

    path = resaved(tmp_path / 'bomb.pt', change)
    import eval as evaluation

    result = call(evaluation.run, f'--ckpt={path}', f'--embed={tmp_path}/x.npz', '--dataset=none')
    assert result.code == 2 and 'Traceback' not in result.err
    try:
        authors.load_pretrained(path)
    except CheckpointError as error:
        assert 'bomb.pt' in str(error)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the bomb is a real one
    assert marker.exists()


def test_a_pickle_that_patches_what_it_gets_changes_nothing_for_others(tmp_path):
    """BUILD can set attributes of what find_class returns: it must not be shared with the next file."""
    code = (
        pickle.PROTO
        + b'\x02'
        + pickle.GLOBAL
        + b'torch._utils\n_rebuild_tensor_v2\n'
        + pickle.EMPTY_DICT
        + pickle.MARK
        + pickle.BINUNICODE
        + b'\x08\x00\x00\x00__code__'
        + pickle.BININT1
        + b'\x01'
        + pickle.SETITEMS
        + pickle.BUILD
        + pickle.STOP
    )
    with zipfile.ZipFile(tmp_path / 'odd.pt', 'w') as archive:
        archive.writestr('odd/data.pkl', code)
    with pytest.raises(CheckpointError):
        authors.load_pretrained(str(tmp_path / 'odd.pt'))
    authors.load_pretrained(fixture('authors_tiny_pretrain.pt'))


def drop(state, name):
    del state['model'][name]


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda s: drop(s, '_ema'), 'no teacher'),
        (lambda s: drop(s, 'blocks.1.attn.v.bias'), 'Missing key.*v.bias'),
        (lambda s: s['model'].update({'blocks.0.attn.v.bias': torch.zeros(3)}), r'v.bias: .*\(\[3\]\) from'),
        (lambda s: s['model'].update(surprise=torch.zeros(3)), 'surprise'),
        (
            lambda s: s['model'].update(
                {'modality_encoders.IMAGE.fixed_positional_encoder.positions': torch.zeros(1, 512, 64)}
            ),
            'positions',
        ),
        (lambda s: s['model'].update({'blocks.0.attn.v.bias': 'text'}), "v.bias.*received <class 'str'>"),
        (lambda s: {'model': {}}, 'no decoder'),
        (lambda s: {'weights': 1}, 'no model'),
        (lambda s: [1, 2], 'not a fairseq'),
        (lambda s: s['cfg']['model'].update(num_heads=7), 'n_head = 7'),
    ],
)
def test_wrong_files_are_named(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=f'(?s)odd.pt.*{message}'):
        authors.load_pretrained(resaved(tmp_path / 'odd.pt', change))


def test_one_storage_under_many_tensors_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(authors, 'MAX_ELEMENTS', 400000)
    big = torch.zeros(100000)
    path = resaved(tmp_path / 'big.pt', lambda s: s['model'].update({f'x{i}': big.view(1, -1) for i in range(50)}))
    with pytest.raises(CheckpointError, match='too large'):
        authors.load_pretrained(path)


def test_files_that_are_no_checkpoints(tmp_path):
    (tmp_path / 'text.pt').write_text('hello')
    with zipfile.ZipFile(tmp_path / 'zip.pt', 'w') as archive:
        archive.writestr('a.txt', 'hello')
    with open(fixture('authors_tiny_pretrain.pt'), 'rb') as f:
        (tmp_path / 'torn.pt').write_bytes(f.read()[:400000])
    for name in ('text.pt', 'zip.pt', 'torn.pt', 'absent.pt'):
        for load in (authors.load_pretrained, authors.load_classifier):
            assert is_one_line_error(call(lambda _, load=load, name=name: load(str(tmp_path / name))), name)
    with pytest.raises(CheckpointError, match='not a fine-tuned'):
        authors.load_classifier(fixture('authors_tiny_pretrain.pt'))
    with pytest.raises(CheckpointError, match='not a pre-training'):
        authors.load_pretrained(fixture('authors_tiny_finetune.pt'))


def test_mutated_files_fail_cleanly(tmp_path):
    """Bytes of the pickle changed at random: an error of ours or a model, never another exception."""
    with zipfile.ZipFile(fixture('authors_tiny_finetune.pt')) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = next(name for name in members if name.endswith('data.pkl'))
    rng, failed = np.random.default_rng(0), 0
    for _ in range(150):
        content = bytearray(members[pickled])
        for place in rng.integers(len(content), size=rng.integers(1, 8)):
            content[place] = rng.integers(256)
        with zipfile.ZipFile(tmp_path / 'x.pt', 'w') as archive:
            for name, data in {**members, pickled: bytes(content)}.items():
                archive.writestr(name, data)
        try:
            authors.load_classifier(str(tmp_path / 'x.pt'))
        except CheckpointError:
            failed += 1
    assert failed > 50
