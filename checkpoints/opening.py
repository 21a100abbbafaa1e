"""A checkpoint of any origin, opened for use: ours, and the authors', EAT's and SSLAM's."""
import math
import os
from dataclasses import dataclass, fields, replace

import torch

from audio import WINDOWS
from checkpoints import authors
from engine import saving
from engine.errors import CheckpointError, ConfigError
from engine.processes import in_float32
from engine.ranges import check_model
from fast import forms
from model import ASDA, ASDAConfig, Classifier

# What an encoder computes beside what its weights' shapes say.
ENCODES = ('n_layer', 'n_embd', 'n_head', 'diff_lambda', 'head_norm', 'attn_scale', 'pos_embed', 'pos_scale',
           'patch_size', 'patch_frames', 'n_mels', 'cls_position', 'decoder_layers', 'decoder_groups')


@dataclass
class Loaded:
    """A checkpoint of any origin. classifier and classes are None for a pre-trained one."""
    encoder: torch.nn.Module
    classifier: torch.nn.Module | None
    config: ASDAConfig
    spectrum: dict                  # frames, window, mean, std, repeat: what data.log_mel wants
    classes: list | None
    multi_label: bool | None
    settings: dict
    pretrained: ASDA | None         # decoder and teacher too
    frames: int                     # input length: a classifier's may be longer than what its encoder sees at a time


def open_checkpoint(path):
    """Read a checkpoint of ours or of the authors' family. Raises CheckpointError."""
    if not path:
        raise ConfigError('name a checkpoint: --ckpt=PATH')
    if os.path.isdir(path):
        raise CheckpointError(f'{path} is a folder; name a checkpoint in it, say {os.path.join(path, "ckpt.pt")}')
    try:
        return open_ours(path, saving.load_checkpoint(path))
    except CheckpointError as error:
        try:
            weights = authors.model_and_cfg(path)[0]
        except CheckpointError:
            raise error from None
        if not any('modality_encoders.' in str(name) for name in weights):              # ours, and damaged
            raise error from None
    return open_theirs(path, 'head.weight' in weights)


def open_ours(path, state):
    weights = saving.unwrapped(state['model'])
    unknown = {str(name) for name in state['config']} - {field.name for field in fields(ASDAConfig)}
    if unknown:
        raise CheckpointError(f'{path} is of newer code, whose model has {", ".join(sorted(unknown))}: use that code')
    try:
        config = check_model(ASDAConfig(**state['config']))
        frames = check_model(replace(config, frames=state['input'].get('frames', config.frames))).frames
        spectrum = {'frames': config.frames,
                    **{name: state['input'][name] for name in ('window', 'mean', 'std', 'repeat')}}
        is_classifier = 'head.weight' in weights
        classes, multi_label = (list(state['classes']), bool(state['multi_label'])) if is_classifier else (None, None)
        if (spectrum['window'] not in WINDOWS or not isinstance(spectrum['repeat'], bool)
                or not all(isinstance(spectrum[name], float) and math.isfinite(spectrum[name])
                           for name in ('mean', 'std')) or not spectrum['std'] > 0):
            raise ValueError(f'input {spectrum}')

        def build():
            return Classifier(config, len(classes)) if is_classifier else ASDA(config)
        with torch.device('meta'):                                          # before memory is spent on absurd sizes
            saving.load_weights(build(), weights, path, assign=True)
        model = build()
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f'{path} is a damaged checkpoint ({type(error).__name__}: {error})') from None
    saving.load_weights(model, weights, path)
    return loaded(model, spectrum, classes, multi_label, state['settings'], frames)


def loaded(model, spectrum, classes=None, multi_label=None, settings=(), frames=0):
    """A classifier's head computes in float32: logits of 8 bits rank otherwise."""
    forms.apply(model)
    is_classifier = isinstance(model, Classifier)
    if is_classifier:
        in_float32(model.head_norm, model.head)
    return Loaded(model.encoder, model if is_classifier else None, model.config, spectrum, classes, multi_label,
                  dict(settings), None if is_classifier else model, frames or model.config.frames)


def begin_with(model, path):
    """Give an ASDA the weights of a pre-trained checkpoint of any origin, to go on from there on other sounds. Raises
    CheckpointError, ConfigError."""
    found = open_checkpoint(path)
    if not found.pretrained:
        raise ConfigError(f'{path} is fine-tuned, without decoder and teacher: begin with a pre-trained checkpoint')
    for name in ENCODES:
        theirs, ours = getattr(found.config, name), getattr(model.config, name)
        if theirs != ours:
            raise ConfigError(f'{path} was made with {name} = {theirs}, not {ours}: give --{name}={theirs}')
    saving.load_weights(model, found.pretrained.state_dict(), path)


def open_theirs(path, is_classifier):
    """Their files name no classes and no statistics: AudioSet's, unless the number of classes says otherwise."""
    model = (authors.load_classifier if is_classifier else authors.load_pretrained)(path)
    n_classes = model.head.out_features if is_classifier else 0
    spectrum = {'frames': model.config.frames, 'repeat': False,
                **authors.INPUT_BY_CLASSES.get(n_classes, authors.INPUT)}
    if not is_classifier:
        return loaded(model, spectrum)
    return loaded(model, spectrum, [f'class {i}' for i in range(n_classes)], n_classes == 527)
