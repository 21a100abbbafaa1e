"""Random numbers as a function of (seed, stream, step, place in the global batch), so that they depend neither on the
number of processes or workers nor on accumulation, and a resumed run goes on exactly.
"""
import numpy as np
import torch

STREAMS = ('order', 'crop', 'mask', 'noise', 'augment', 'mixup', 'few_labels')


def random(seed, stream, *where):
    """A numpy generator for one purpose (a name in STREAMS) at one place, say (step, place in the global batch)."""
    return np.random.default_rng([seed, STREAMS.index(stream), *where])


def torch_random(device, seed, stream, *where):
    """The same for torch, on the device."""
    state = int(random(seed, stream, *where).integers(2 ** 63))
    return torch.Generator(device).manual_seed(state)
