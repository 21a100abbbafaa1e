"""What `python model.py` prints: the network's parts with their parameters, its operations, a forward pass with shapes.

    python model.py                                     # the paper's base model
    python model.py config/demo.py --n_head=8           # or --config=config/demo.py

Settings are those of pretrain.py and the fields of model.ASDAConfig, so that its config files serve as they are.
"""
import math
import os
import re

import torch

import configurator
import pretrain
from engine import processes
from engine.errors import ConfigError, RunError
from model import ASDA, Classifier, count_parameters, n_kept

CLASSES = 527                   # of AudioSet


def flops(config):
    """Floating-point operations of one pre-training step per clip, {part: number}; a multiply-add counts as two.

    The teacher runs forward once, over all patches. What is trained counts three times, forward and the gradients of
    input and weights; the students' patch embedding twice, since the spectrogram needs no gradient. Normalisations,
    activations, the optimizer and the EMA are not counted, nor is what a kernel computes again in the backward pass.
    """
    P, D, L, views = math.prod(config.grid), config.n_embd, config.n_layer, config.n_students
    seen = 1 + n_kept(P, config.mask_ratio)                                 # tokens of a view, with CLS
    maps = 2 if config.diff_lambda else 1
    hidden = round(D * config.ffn_ratio)
    layer = 2 * ((2 * maps + 2) * D * D + 2 * D * hidden)                   # of a token: Q and K, V, W_O; feed-forward
    attention = 4 * maps * D                                                # of a pair of tokens: scores, sum of values
    embedding = 2 * P * D * config.patch_frames * config.patch_size
    convolutions = config.decoder_layers * 2 * P * 9 * D * D // config.decoder_groups
    return {'teacher patch embedding': embedding, 'teacher matmuls': L * (1 + P) * layer,
            'teacher attention': L * (1 + P) ** 2 * attention, 'student patch embedding': 2 * embedding,
            'student matmuls': 3 * views * L * seen * layer, 'student attention': 3 * views * L * seen ** 2 * attention,
            'decoder convolutions': 3 * views * convolutions, 'decoder projection': 3 * views * 2 * P * D * D}


def parts(model):
    """-> {part: [what it is, how many times, parameters in all]}, like layers of blocks and of convolutions as one."""
    found = {}
    for name, parameter in model.named_parameters():
        module, _, own = name.rpartition('.')
        kind = model.get_submodule(module)
        is_leaf = not any(True for _ in kind.children())
        key = re.sub(r'\b(blocks|convs)\.\d+', r'\1.*', module if is_leaf else name)
        what = f'{type(kind).__name__}({kind.extra_repr()})' if is_leaf else f'Parameter{tuple(parameter.shape)}'
        row = found.setdefault(key, [what, set(), 0])
        row[1].add(module)
        row[2] += parameter.numel()
    return {name: [what, len(modules), number] for name, (what, modules, number) in found.items()}


def show_parts(config):
    """The architecture: every kind of layer with its parameters, on the device meta, where nothing is computed."""
    with torch.device('meta'):
        model, classifier = ASDA(config), Classifier(config, CLASSES)
    rows = {**parts(model.encoder), **{f'decoder.{name}': row for name, row in parts(model.decoder).items()}}
    width, teacher = max(map(len, rows)), sum(p.numel() for p in model.teacher.parameters())
    print('\nEach student is one encoder and one decoder, all students the same; the teacher is another encoder.')
    for name, (what, times, number) in rows.items():
        print(f'  {name:<{width}}  {f"{times} x " if times > 1 else "":>5}{what:<76} {number:>12,}')
    for what, number in (('encoder', count_parameters(model.encoder)), ('decoder', count_parameters(model.decoder)),
                         ('trained in pre-training: encoder and decoder', count_parameters(model)),
                         ('teacher: EMA of the encoder, not trained', teacher),
                         (f'classifier: encoder, LayerNorm and Linear to {CLASSES} classes, all trained',
                          count_parameters(classifier))):
        print(f'  {what:<{width + 83}} {number:>12,}')


def show_operations(config):
    counted = flops(config)
    print('\nOperations of one clip in a step of pre-training: matrix products and convolutions, a multiply-add as\n'
          'two; teacher forward, students and decoder forward and backward. No norms, activations, AdamW or EMA.')
    for part, number in counted.items():
        print(f'  {part:<38} {number / 1e9:>12,.3f} GFLOP')
    embedding = sum(number for part, number in counted.items() if part.startswith('teacher'))
    print(f'  {"step, all of it":<38} {sum(counted.values()) / 1e9:>12,.3f} GFLOP\n'
          f'  {"embedding of a clip (encoder forward)":<38} {embedding / 1e9:>12,.3f} GFLOP')


def shapes_of(value):
    values = [value] if isinstance(value, torch.Tensor) else value
    return ', '.join(str(tuple(each.shape)) for each in values if isinstance(each, torch.Tensor))


def show_forward(config, mask):
    """One clip of random numbers through ASDA.forward; what goes into and comes out of each kind of layer, as they are
    called: of blocks and convolutions the first."""
    try:
        model = ASDA(config).to(mask.device)
        spec = torch.randn(1, config.frames, config.n_mels, device=mask.device)

        def show(name):
            return lambda _, inputs, output: print(f'  {name:<28} {shapes_of(inputs)} -> {shapes_of(output)}')

        def targets(spec, unshown=model.targets):
            found = unshown(spec)
            show('targets')(None, [spec], found)
            return found
        model.targets = targets
        print(f'\nA forward pass of one clip of random numbers, with random weights, in float32 on {mask.device}\n'
              f'  {"spec":<28} {shapes_of(spec)}: clips, frames, mel bands\n'
              f'  {"mask":<28} {shapes_of(mask)}: clips, students, patches; {int((~mask[0, 0]).sum())} of '
              f'{mask.shape[2]} are False in each view: seen')
        for name, module in model.named_modules():
            if name and not re.search(r'(blocks|convs)\.[1-9]|blocks.*norm|mlp$|mlp\.1', name):
                module.register_forward_hook(show(name))
        with torch.no_grad():
            loss, measures = model(spec, mask)
    except RuntimeError as error:
        if 'allocate' not in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise RunError('too little memory for a forward pass of this model') from None
    print(f'  {"loss":<28} {float(loss):.4f}; '
          + ', '.join(f'{name} {float(value):.4f}' for name, value in measures.items()))


def run(argv):
    if {'-h', '--help'} & set(argv):
        print(__doc__)
    argv = [word.removeprefix('--config=') for word in argv if word != '--config']
    for word in argv:
        if os.path.basename(word).startswith('finetune'):
            raise ConfigError(f'{word} is of fine-tuning, which has its network from a checkpoint: name a config file '
                              'of pretrain.py')
    settings = configurator.configure(pretrain.__file__, argv, pretrain.MODEL_SETTINGS)
    process = processes.start(settings.device, settings.threads)
    config = pretrain.model_config(settings)
    print(config)
    show_parts(config)
    show_operations(config)
    torch.manual_seed(settings.seed)
    show_forward(config, pretrain.masks(settings.but(batch_size=1), config, 0, process.device))


def main():
    processes.main(run)
