"""The authors' ASDA checkpoints, EAT's and SSLAM's, without fairseq and without running anything in the file.

    model = authors.load_pretrained('asda_pretrained.pt', utterance_scale=192)
    classifier = authors.load_classifier('asda_as2m.pt')

A fairseq checkpoint is a zip archive with a pickle that may name classes of packages that are not installed here, or
code that would run. It is read by an unpickler that knows tensors and plain containers; everything else becomes an
inert placeholder. The architecture follows from the shapes of the weights; only the number of heads and the input
length come from the file's cfg.
"""
import collections
import dataclasses
import io
import math
import pickle
import re
import zipfile

import torch

from engine.errors import CheckpointError, ConfigError
from engine.ranges import check_model
from engine.saving import load_weights, unwrapped
from model import ASDA, ASDAConfig, Classifier, position_table

# Their names, ours: patterns, replaced one after the other. The rows of attn.qk are Q1, Q2, K1, K2, as ours.
NAMES = ((r'^modality_encoders\.IMAGE\.', ''), ('^extra_tokens$', 'encoder.cls'),
         (r'^local_encoder\.proj\.', 'encoder.patch_embed.'), (r'^context_encoder\.norm\.', 'encoder.norm.'),
         (r'^blocks\.', 'encoder.blocks.'), (r'\.mlp\.fc1\.', '.mlp.0.'), (r'\.mlp\.fc2\.', '.mlp.2.'),
         (r'^decoder\.blocks\.(\d+)\.0\.', r'decoder.convs.\1.'), (r'^fc_norm\.', 'head_norm.'))
HEAD = ('fc_norm.weight', 'fc_norm.bias', 'head.weight', 'head.bias')
POSITIONS = 'modality_encoders.IMAGE.fixed_positional_encoder.positions'

# Literals of the authors' code that no file records; the analysis window and AudioSet's statistics go with them.
AUTHORS = dict(diff_lambda=0.1, head_norm='all', attn_scale=0.95, pos_embed='2d')
EAT = dict(diff_lambda=0.0, head_norm='none', attn_scale=1.0, pos_embed='2d')
INPUT = {'window': 'hanning', 'mean': -4.268, 'std': 4.569}
INPUT_BY_CLASSES = {50: {'window': 'hanning', 'mean': -6.627, 'std': 5.359},
                    35: {'window': 'hanning', 'mean': -6.846, 'std': 5.565}}
MAX_ELEMENTS = 1 << 31              # of all tensors together, 8 GiB in float32: no model of this family comes near


# -------------------------------------------------------------------------------------------------------------- reading

STORAGES = {'FloatStorage': torch.float32, 'HalfStorage': torch.float16, 'BFloat16Storage': torch.bfloat16,
            'DoubleStorage': torch.float64, 'LongStorage': torch.int64, 'IntStorage': torch.int32,
            'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8,
            'BoolStorage': torch.bool}
PLAIN = {'dict': dict, 'list': list, 'set': set, 'tuple': tuple, 'int': int, 'float': float, 'str': str, 'bool': bool}


def read_fairseq(path):
    """The dictionary of a fairseq checkpoint: tensors, plain values, else placeholders. Raises CheckpointError."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = [name for name in archive.namelist() if name.endswith('/data.pkl')]
            if len(pickled) != 1:
                raise CheckpointError(f'{path} is not a checkpoint: a zip archive without data.pkl')
            return CheckpointUnpickler(archive, pickled[0]).load()
    except FileNotFoundError:
        raise CheckpointError(f'there is no checkpoint {path}') from None
    except CheckpointError:
        raise
    except zipfile.BadZipFile:
        raise CheckpointError(f'{path} is not a checkpoint, or one of PyTorch before 1.6: '
                              'load and save it again with a newer one') from None
    except Exception as error:  # a hostile pickle can fail in any way at all; whatever it is, the file is not readable
        raise CheckpointError(f'{path} cannot be read as a checkpoint ({type(error).__name__}: '
                              f'{str(error)[:100]})') from None


class CheckpointUnpickler(pickle._Unpickler):
    """Allow-list: tensors over the archive's storages and plain containers. Nothing that a file names is imported.

    The unpickler written in Python, since the one in C takes as much memory as a number in a hostile file asks for.
    """

    def __init__(self, archive, pickled):
        if archive.getinfo(pickled).file_size > 1 << 28:
            raise ValueError('its pickle is larger than 256 MiB')
        super().__init__(io.BytesIO(archive.read(pickled)))
        self.archive, self.root, self.storages = archive, pickled[:-len('data.pkl')], {}
        self.stored = self.elements = 0             # bytes read, elements handed out

    def find_class(self, module, name):
        """Everything is made anew for each call, so that a file cannot alter what later files get."""
        if module == 'torch._utils' and name in ('_rebuild_tensor_v2', '_rebuild_tensor'):
            return lambda storage, offset, size, stride, *_: self.rebuild_tensor(storage, offset, size, stride)
        if module == 'torch._utils' and name == '_rebuild_parameter':
            return lambda tensor, *_: tensor
        if module == 'torch' and name in STORAGES:
            return StorageType(STORAGES[name])
        if module == 'collections' and name == 'OrderedDict':
            return collections.OrderedDict
        if module in ('builtins', '__builtin__') and name in PLAIN:
            return PLAIN[name]
        return make_placeholder()

    def persistent_load(self, reference):
        """('storage', type, key, location, number of elements) -> a flat tensor over the member data/key."""
        kind, storage_type, key = reference[:3]
        if kind != 'storage' or not isinstance(storage_type, StorageType) or not str(key).isdigit():
            raise ValueError('a reference to something that is no storage')
        if key not in self.storages:
            info = self.archive.getinfo(f'{self.root}data/{key}')
            if info.compress_type != zipfile.ZIP_STORED:                    # PyTorch never compresses: no zip bombs
                raise ValueError('its tensors are compressed')
            self.stored += info.file_size
            if self.stored > 4 * MAX_ELEMENTS:
                raise ValueError('its tensors are too large')
            content = bytearray(self.archive.read(info))
            self.storages[key] = (torch.frombuffer(content, dtype=storage_type.dtype) if content
                                  else torch.empty(0, dtype=storage_type.dtype))
        return self.storages[key]

    def rebuild_tensor(self, storage, offset, size, stride):
        if not isinstance(storage, torch.Tensor) or math.prod(size) > len(storage):
            raise ValueError('a tensor larger than its storage')
        self.elements += math.prod(size)
        if self.elements > MAX_ELEMENTS:
            raise ValueError('its tensors are too large')
        return torch.as_strided(storage, size, stride, offset).clone()


@dataclasses.dataclass
class StorageType:
    dtype: torch.dtype


def make_placeholder():
    """A class that takes any arguments and any state and does nothing with them but keep the state."""
    class Placeholder:
        def __init__(self, *args, **kwargs):
            self.state = args[0] if len(args) == 1 else None

        def __call__(self, *args, **kwargs):
            return Placeholder(*args)

        def __setstate__(self, state):
            self.state = state

        def __setitem__(self, key, value):
            pass

        def append(self, value):
            pass

        extend = add = append
    return Placeholder


def dig(thing, *path):
    """thing[path[0]][path[1]]..., through dictionaries and the states of placeholders; None where it ends."""
    for key in path:
        state = getattr(thing, 'state', thing)
        state = state.get('_content', state) if isinstance(state, dict) else state  # omegaconf keeps its values there
        thing = state.get(key) if isinstance(state, dict) else None
    value = getattr(thing, 'state', thing)
    return value.get('_val', value) if isinstance(value, dict) else value


# ----------------------------------------------------------------------------------------------------------- converting

def load_pretrained(path, **overrides):
    """The authors' pre-training checkpoint (or EAT's, SSLAM's) as our ASDA, teacher and decoder included.

    overrides: fields of ASDAConfig that no file records, above all utterance_scale. Raises CheckpointError.
    """
    weights, cfg = model_and_cfg(path)
    if not any(name.startswith('modality_encoders.IMAGE.decoder.') for name in weights):
        raise CheckpointError(f'{path} has no decoder: it is not a pre-training checkpoint')
    teacher = weights.pop('_ema', None)
    if not isinstance(teacher, dict):
        raise CheckpointError(f'{path} has no teacher (_ema): it is not a pre-training checkpoint')
    config = config_from(weights, cfg, path, overrides)
    state = renamed(weights)
    state.update({name.replace('encoder.', 'teacher.', 1): tensor
                  for name, tensor in renamed(unwrapped(teacher)).items() if not name.startswith('decoder.')})
    model = ASDA(config)
    load_weights(model, state, path)
    return model


def load_classifier(path, **overrides):
    """The authors' fine-tuned checkpoint (or EAT's, SSLAM's) as our Classifier. Raises CheckpointError."""
    weights, cfg = model_and_cfg(path)
    head = {name: weights[name] for name in HEAD if name in weights}
    if len(head) != 4 or not isinstance(head['head.weight'], torch.Tensor) or head['head.weight'].ndim != 2:
        raise CheckpointError(f'{path} has no head (head.*, fc_norm.*): it is not a fine-tuned checkpoint')
    weights = {name.removeprefix('model.'): tensor for name, tensor in weights.items() if name.startswith('model.')}
    weights.pop('_ema', None)
    config = config_from(weights, cfg, path, overrides)
    state = {name: tensor for name, tensor in renamed({**weights, **head}).items() if not name.startswith('decoder.')}
    model = Classifier(config, len(head['head.weight']))
    load_weights(model, state, path)
    return model


def model_and_cfg(path):
    """(weights by name, the cfg, which in a fine-tuned file holds that of the pre-training)"""
    stored = read_fairseq(path)
    if not isinstance(stored, dict) or not isinstance(stored.get('model'), dict):
        raise CheckpointError(f'{path} is not a fairseq checkpoint: it has no model')
    return unwrapped(stored['model']), stored.get('cfg') or stored.get('args')


def config_from(weights, cfg, path, overrides):
    """ASDAConfig by the shapes of the weights; heads and input length by cfg, the rest by the authors' literals."""
    try:
        blocks = 1 + max(int(name.split('.')[1]) for name in weights if name.startswith('blocks.'))
        D = weights['modality_encoders.IMAGE.extra_tokens'].shape[-1]
        hidden = len(weights['blocks.0.mlp.fc1.weight'])
        patch = weights['modality_encoders.IMAGE.local_encoder.proj.weight'].shape[-1]
        convs = [tensor for name, tensor in weights.items()
                 if name.startswith('modality_encoders.IMAGE.decoder.blocks.') and name.endswith('.weight')]
        single = 'blocks.0.attn.qkv.weight' in weights
        groups = D // convs[0].shape[1] if convs else 16
    except (KeyError, ValueError, AttributeError, IndexError, ZeroDivisionError):
        raise CheckpointError(f'{path} is no checkpoint of ASDA, EAT or SSLAM: their weights are not in it') from None
    frames = dig(cfg, 'task', 'target_length') or dig(cfg, 'model', 'target_length') or dig(
        cfg, 'model', 'modalities', 'image', 'target_length')
    heads = dig(cfg, 'model', 'num_heads') or dig(cfg, 'model', 'pretrained_model_args', 'model', 'num_heads')
    fields = dict(n_layer=blocks, n_embd=D, ffn_ratio=hidden / D, patch_size=patch, patch_frames=patch,
                  decoder_layers=len(convs), decoder_groups=groups,
                  n_head=heads if type(heads) is int and heads > 0 else max(D // 64, 1),
                  frames=frames if type(frames) is int and frames > 0 else 1024, **(EAT if single else AUTHORS))
    try:
        config = check_model(ASDAConfig(**{**fields, **overrides}))
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f'{path}: {error}') from None
    stored = weights.get(POSITIONS)
    if isinstance(stored, torch.Tensor) and stored.ndim == 3:
        ours = position_table(config)
        rows = min(stored.shape[1], len(ours))
        if stored.shape[2] != D or not torch.allclose(stored[0, :rows].float(), ours[:rows], atol=1e-3):
            raise CheckpointError(f'{path}: its positions are not the fixed {config.pos_embed} sine-cosine ones '
                                  'of this code')
    return config


def renamed(weights):
    """{our name: tensor, in float32}, of an encoder and what is beside it. What is unknown keeps its name, and no model
    takes it."""
    found = {}
    for name, tensor in weights.items():
        if name == POSITIONS:
            continue
        name, tensor = str(name), tensor.float() if isinstance(tensor, torch.Tensor) else tensor
        for theirs, ours in NAMES:
            name = re.sub(theirs, ours, name)
        if '.attn.qkv.' in name and getattr(tensor, 'ndim', 0):             # EAT's (3D, D): qk (2D, D) and v (D, D)
            third = len(tensor) // 3
            found[name.replace('qkv', 'qk')], found[name.replace('qkv', 'v')] = tensor[:2 * third], tensor[2 * third:]
        else:
            found[name] = tensor
    return found
