"""pretrain.py, counting how often it reads numbers from tensors or asks for their number: there Python would wait for a
GPU, and each step for the one before. torchrun tests/count_reads.py ARGUMENTS prints for every process the count at
each step and at the end.
"""
import os
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import pretrain  # noqa: E402
from engine import processes  # noqa: E402
from engine import run as running  # noqa: E402

aten = torch.ops.aten
READING = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten._unique2, aten.unique_dim,
           aten.unique_consecutive}


def reads(function, args, kwargs):
    """Whether an operator reads: those above, indices that are masks, and lengths that only a tensor knows."""
    indices = args[1] if function.overloadpacket in (aten.index, aten.index_put, aten.index_put_) else ()
    return (function.overloadpacket in READING
            or any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
            or function == aten.repeat_interleave.Tensor and kwargs.get('output_size') is None)


class Reads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        Reads.count += reads(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))


def counting(method):
    def counted(*args, **kwargs):
        Reads.count += 1
        return method(*args, **kwargs)
    return counted


def run(argv):
    counts = []
    running.Late.swap = lambda *arguments, **options: counts.append(Reads.count) or []     # this one is a step late
    for name in ('tolist', 'numpy', 'cpu', '__array__'):                    # these leave PyTorch without an operator
        setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name)))
    with Reads():
        pretrain.run(argv)
    sys.stdout.flush()
    os.write(1, f'\nreads {" ".join(map(str, [*counts, Reads.count]))}\n'.encode())      # whole, whoever else prints


if __name__ == '__main__':
    processes.main(run)
