"""pretrain.py, counting how often it reads a number from a tensor: there Python would wait for a GPU, and each step for
the one before. torchrun tests/count_reads.py ARGUMENTS prints for every process the count at each step and at the end.
"""
import os
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import pretrain  # noqa: E402
import runtime  # noqa: E402

READING = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal,
           torch.ops.aten.masked_select)


class Reads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        Reads.count += function.overloadpacket in READING
        return function(*args, **(kwargs or {}))


def run(argv):
    counts = []
    runtime.Late.swap = lambda *arguments, **options: counts.append(Reads.count) or []     # this one is a step late
    with Reads():
        pretrain.run(argv)
    print('reads', *counts, Reads.count, flush=True)


if __name__ == '__main__':
    runtime.main(run)
