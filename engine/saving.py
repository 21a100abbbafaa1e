"""Checkpoints of a run: written whole or not at all, read safely, and resumed."""
import os
import pickle

import torch

from engine.errors import CheckpointError, RunError, first_line
from engine.files import replacing
from engine.processes import commit

CHECKPOINT_VERSION = 1
CONTENTS = {'model': dict, 'config': dict, 'settings': dict, 'optimizer': dict, 'input': dict, 'step': int}


def save_checkpoint(path, state, keep=2):
    """Write one, whole or not at all; of earlier ones the newest keep - 1 stay as NAME.1.pt, NAME.2.pt, ..."""
    def rotate():
        for older in range(keep - 1, 0, -1):                                # ckpt.pt -> ckpt.1.pt -> ckpt.2.pt ...
            newer = numbered(path, older - 1)
            if os.path.exists(newer):
                os.replace(newer, numbered(path, older))
    try:
        with replacing(path, 'wb', before_rename=rotate) as f:
            torch.save({'version': CHECKPOINT_VERSION, 'commit': commit(), **state}, f)
        for old in earlier(path, keep):
            os.remove(old)
    except (OSError, RuntimeError) as error:                            # torch.save reports a full disk as RuntimeError
        raise RunError(f'could not write the checkpoint {path} ({error}); the one before it is intact') from None


def numbered(path, number):
    return path if number == 0 else f'{os.path.splitext(path)[0]}.{number}.pt'


def earlier(path, first=1):
    """[NAME.1.pt, NAME.2.pt, ...] that there are, from the first number on, the newest first; at most 100 are kept."""
    return list(filter(os.path.exists, (numbered(path, number) for number in range(first, 100))))


def load_checkpoint(path, wanted=('model', 'config', 'settings')):
    """One of our checkpoints, tensors and plain values only. Raises CheckpointError."""
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f'there is no checkpoint {path}') from None
    except Exception as error:              # a damaged or hostile file can fail in any way; it is not a checkpoint
        is_advice = isinstance(error, pickle.UnpicklingError)               # PyTorch's, of no use
        reason = type(error).__name__ if is_advice else first_line(error)
        raise CheckpointError(f'{path} is not a checkpoint that can be read safely ({reason})') from None
    missing = [key for key in wanted if not isinstance(state, dict) or not isinstance(state.get(key), CONTENTS[key])]
    if missing:
        raise CheckpointError(f'{path} is not a checkpoint of this code: it has no valid {", ".join(missing)}')
    if not isinstance(state.get('version'), int) or state['version'] != CHECKPOINT_VERSION:
        raise CheckpointError(f'{path} is a checkpoint of version {state.get("version")}, '
                              f'this code reads {CHECKPOINT_VERSION}')
    state['config'].setdefault('patch_frames', state['config'].get('patch_size', 16))       # patches were square once
    return state


def latest_checkpoint(out_dir, process):
    """The newest checkpoint of a run that can be read: ckpt.pt, or one before it with a warning."""
    newest, problems = os.path.join(out_dir, 'ckpt.pt'), []
    for path in (newest, *earlier(newest)):
        try:
            state = load_checkpoint(path, ('model', 'config', 'settings', 'optimizer', 'step', 'input'))
            if problems:
                process.print(f'warning: {problems[0]}; going on from {path}')
            return state
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError(f'no checkpoint to resume in {out_dir}: {problems[0]}')


def resume(state, out_dir, model, optimizer, config, input_info, settings, free, process):
    """Put the newest checkpoint of a run (state) into model and optimizer, if it is of the same model and data.

    config, input_info: dictionaries that must equal the stored ones (other_data in the settings allows other clips);
    free: names of settings that may differ without changing the numbers; any other difference is printed.
    """
    path = os.path.join(out_dir, 'ckpt.pt')
    before, now = ({**of_model, 'frames': told.get('frames', of_model['frames'])} for of_model, told in (
        (state['config'], state['input']), (config, input_info)))           # a classifier's input may be longer
    other = [f'{name} {before.get(name)!r} -> {value!r}' for name, value in now.items() if before.get(name) != value]
    if other:
        raise CheckpointError(f'{path} is of another model ({", ".join(other)}): give the same settings, or another '
                              '--out_dir')
    if state['input'].get('fingerprint') != input_info['fingerprint'] and not settings.other_data:
        raise CheckpointError(f'{path} was trained on other clips than there are now: put the data back, start a new '
                              'run, or go on all the same with --other_data')
    changed = [f'{name} {state["settings"].get(name)!r} -> {value!r}' for name, value in vars(settings).items()
               if name not in free and name in state['settings'] and state['settings'][name] != value]
    if changed:
        process.print('warning: changed since the checkpoint, so that this is no longer the same run: '
                      f'{", ".join(changed)}')
    load_weights(model, state['model'], path)
    try:
        groups, stored = optimizer.state_dict()['param_groups'], state['optimizer']['param_groups']
        if [len(group['params']) for group in groups] != [len(group['params']) for group in stored]:
            raise CheckpointError(f'{path} groups its parameters otherwise: decay_vectors and layer_decay cannot '
                                  'change in a run')
        if not all(moment.isfinite().all() for moments in state['optimizer']['state'].values()
                   for moment in moments.values()):
            raise CheckpointError(f'{path}: its optimizer holds numbers that are not finite')
        optimizer.load_state_dict({'state': state['optimizer']['state'], 'param_groups': groups})  # the settings of now
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(f'{path} is damaged: its optimizer cannot be read ({type(error).__name__})') from None
    process.print(f'going on after step {state["step"]:,}')


def load_weights(module, state, path, **how):
    """Copy a state dict into a module; names and shapes must agree, and its numbers be finite floats. Raises
    CheckpointError. how: assign=True only compares them with a module on the device meta."""
    try:
        module.load_state_dict(state, **how)
        for name, weight in state.items():
            if weight.untyped_storage().nbytes() < weight.numel() * weight.element_size():
                raise CheckpointError(f'{path}: the weight {name} claims more numbers than the file holds')
            if not weight.is_floating_point() or not weight.isfinite().all():
                raise CheckpointError(f'{path}: the weight {name} holds numbers that are not finite, or of type '
                                      f'{weight.dtype}: take an earlier checkpoint')
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:     # sparse, without data, ...
        raise CheckpointError(f'{path}: its weights do not fit: {" ".join(str(error).split())[:500]}') from None


def unwrapped(weights):
    """Weights by name, without what DistributedDataParallel (module.) and torch.compile (_orig_mod.) put into names."""
    plain = {'.'.join(part for part in name.split('.') if part not in ('module', '_orig_mod'))
             if isinstance(name, str) else name: weight for name, weight in weights.items()}
    return plain if len(plain) == len(weights) else weights
