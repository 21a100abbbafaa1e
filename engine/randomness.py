"""Random numbers as a function of (seed, stream, step, place in the global batch), so that they depend neither on the
number of processes or workers nor on accumulation, and a resumed run goes on exactly.
"""
import numpy as np
import torch

from engine.errors import ConfigError

STREAMS = ('order', 'crop', 'mask', 'noise', 'augment', 'mixup', 'few_labels')
MAX_SEED = 2 ** 32 - 1      # of more bits, numpy takes the higher ones for the stream and torch leaves them out


def random(seed, stream, *where):
    """A numpy generator for one purpose (a name in STREAMS) at one place, say (step, place in the global batch).
    Raises ConfigError for a seed of more than 32 bits, whose numbers would be those of another."""
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f'seed = {seed} must be from 0 to {MAX_SEED}')
    return np.random.default_rng([seed, STREAMS.index(stream), *where])


def torch_random(device, seed, stream, *where):
    """The same for torch, on the device."""
    state = int(random(seed, stream, *where).integers(2 ** 63))
    return torch.Generator(device).manual_seed(state)
