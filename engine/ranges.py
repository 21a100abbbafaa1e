"""What settings may be: {name: (lowest, highest)} with both included, {name: allowed words}, names of free ones."""
import dataclasses

from engine.errors import ConfigError
from model import MAX_FRAMES

MODEL = {'n_layer': (1, 1000), 'n_head': (1, 10_000), 'n_embd': (4, 100_000), 'ffn_ratio': (1e-5, 1000),
         'diff_lambda': (0, 100), 'attn_scale': (0, 1000), 'pos_scale': (0, 1000), 'n_mels': (1, 10_000),
         'patch_size': (1, 10_000), 'patch_frames': (1, MAX_FRAMES), 'frames': (1, MAX_FRAMES),
         'decoder_layers': (0, 1000), 'decoder_groups': (1, 100_000), 'mask_ratio': (0.01, 0.9999),
         'mask_block': (1, 10_000), 'mask_adjust': (-1, 1), 'mask_noise': (0, 1000), 'n_students': (1, 100_000),
         'alpha': (0, 1e6), 'utterance_scale': (0, 1e6), 'target_layers': (0, 1000), 'drop_path': (0, 0.9999)}
MODEL_CHOICES = {'head_norm': ('per_head', 'all', 'none'), 'pos_embed': ('1d', '2d'),
                 'utterance_target': ('normed', 'raw'), 'cls_position': ('head', 'middle'),
                 'pooling': ('cls', 'mean', 'bands')}
MODEL_DIVISORS = (('n_embd', 'n_head'), ('n_embd', 'decoder_groups'), ('n_mels', 'patch_size'),
                  ('frames', 'patch_frames'))

RUN = {'batch_size': (1, 1e6), 'accumulate': (1, 1e6), 'max_steps': (1, 1e9), 'warmup_steps': (0, 1e9),
       'lr': (0, 1e30), 'weight_decay': (0, 1e3), 'beta1': (0, 0.9999), 'beta2': (0, 0.999999),
       'log_interval': (1, 1e9), 'save_interval': (1, 1e9), 'keep': (1, 100), 'max_bad_steps': (1, 1e9),
       'seed': (0, 2 ** 32 - 1), 'workers': (0, 1000), 'threads': (0, 1000)}
PRETRAIN = {**RUN, 'norm_mean': (-100, 100), 'norm_std': (1e-3, 100), 'grad_clip': (0, 1e9), 'ema_start': (0, 1),
            'ema_end': (0, 1), 'ema_steps': (1, 1e9), 'min_target_var': (0, 1), 'eval_interval': (0, 1e9)}
FINETUNE = {**RUN, 'min_lr': (0, 1e30), 'layer_decay': (0, 1), 'labels_per_class': (0, 1e9), 'mixup': (0, 1e3),
            'mixup_probability': (0, 1), 'input_mask': (0, 1), 'label_smoothing': (0, 1), 'validation_part': (0, 1),
            'frames': (0, 1e6), 'epoch_clips': (1, 1e9), 'eval_interval': (1, 1e9)}

# Settings that may differ when a run goes on, since they do not change its numbers.
FREE_IN_RUN = ('out_dir', 'resume', 'overwrite', 'other_data', 'max_bad_steps', 'data_dir', 'log_interval',
               'save_interval', 'keep', 'workers', 'accumulate', 'loggers')
FREE_IN_PRETRAIN = *FREE_IN_RUN, 'min_target_var', 'eval_dataset', 'eval_interval', 'kernels'
FREE_IN_FINETUNE = *FREE_IN_RUN, 'ckpt'


def check_model(config):
    """The ASDAConfig itself; raises ConfigError if it cannot be built."""
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, (int, float) if field.type is float else field.type):
            raise ConfigError(f'{name} = {value!r} is not of type {field.type.__name__}')
        if name in MODEL_CHOICES and value not in MODEL_CHOICES[name]:
            raise ConfigError(f'{name} = {value!r} is none of {", ".join(MODEL_CHOICES[name])}')
        if name in MODEL and not MODEL[name][0] <= value <= MODEL[name][1]:             # of nan nothing is true
            low, high = MODEL[name]
            hint = ', too long: positions reach no further' if name == 'frames' and value > high else ''
            raise ConfigError(f'{name} = {value} must lie between {low} and {high}{hint}')
    for name, divisor in MODEL_DIVISORS:
        if getattr(config, name) % getattr(config, divisor):
            raise ConfigError(f'{name} = {getattr(config, name)} is not divisible by {divisor} '
                             f'= {getattr(config, divisor)}')
    if config.n_embd % 4:
        raise ConfigError(f'n_embd = {config.n_embd} is not divisible by 4, which the sine-cosine positions need')
    if not 1 <= config.ffn_ratio * config.n_embd <= 1e6:
        raise ConfigError(f'ffn_ratio = {config.ffn_ratio} gives the feed-forward layer a width of '
                         f'{config.ffn_ratio * config.n_embd:g}')
    if config.target_layers > config.n_layer:
        raise ConfigError(f'target_layers = {config.target_layers} must lie between 0 (all) and n_layer = '
                         f'{config.n_layer}')
    return config
EVALUATE = {name: FINETUNE[name] for name in ('labels_per_class', 'seed', 'frames', 'batch_size', 'workers', 'threads')}
EVALUATE |= {'top_k': (1, 1e6), 'max_minutes': (0.001, 1e5), 'norm_mean': (-100, 100),
             'norm_std': (1e-3, 100), 'window': (0, 1e6), 'hop': (0, 1e6), 'layer': (0, 1000)}
