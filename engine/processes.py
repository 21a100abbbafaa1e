"""Processes, device and precision, signals, and the one place where an error becomes a line.

This file must not know the network, audio or any stage; a stage script hands it tensors and plain values.
"""
import contextlib
import ctypes
import inspect
import os
import platform
import re
import signal
import subprocess
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engine.errors import ROOT, CheckpointError, ConfigError, DataError, RunError

MIN_WIDTH = 128             # channels from which bfloat16 was seen to pay on a CPU


def main(run):
    """Call run(sys.argv[1:]); a user's mistake becomes one line on stderr and exit code 2, never a traceback."""
    try:
        run(sys.argv[1:])
        if dist.is_initialized():
            dist.barrier()                                                  # nobody leaves while another still needs it
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)     # all is written; gloo's own tidying up at exit aborts now and then (its threads still run)
    except (ConfigError, DataError, CheckpointError, RunError) as error:
        if os.environ.get('LOCAL_RANK', '0') == '0':                        # once per machine
            print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
        sys.exit(1 if isinstance(error, RunError) else 2)
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        print(f'error: process {dist.get_rank()} lost contact with another one ({str(error).splitlines()[0][:150]}); '
              'nothing was saved since the last checkpoint: run again with --resume', file=sys.stderr, flush=True)
        os._exit(1)                                                         # tidying up could wait for the dead process
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                                                 # `... | head`
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        print(f'error: {error.filename or "the system"}: {error.strerror or error}', file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def lost_contact(error):
    """Whether an error is that of a collective whose other side has died."""
    return dist.is_initialized() and (isinstance(error, dist.DistError)
                                      or re.search('gloo|NCCL|[Cc]onnection (closed|reset|refused)', str(error)))


# ------------------------------------------------------------------------------------------------ processes and devices

@dataclass
class Process:
    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def print(self, *text):
        if self.is_main:
            print(*text, flush=True)

    def mean(self, tensor):
        """The mean over all processes of a tensor that each has."""
        if self.world > 1:
            dist.all_reduce(tensor)
            tensor /= self.world
        return tensor

    def gather(self, thing):
        """[thing of rank 0, thing of rank 1, ...] on every process."""
        if self.world == 1:
            return [thing]
        things = [None] * self.world
        dist.all_gather_object(things, thing)
        return things


def start(device='auto', threads=0, deterministic=False):
    """Join the other processes (torchrun sets RANK, WORLD_SIZE, LOCAL_RANK) and choose the device: cuda, mps or cpu.

    deterministic: the same bits in every run on a GPU too (on a CPU they always are), an error where there is no way.
    """
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    rank, world, local = (int(os.environ.get(name, default))
                          for name, default in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    if device == 'auto':
        device = ('cuda' if torch.cuda.is_available() else
                  'mps' if torch.backends.mps.is_available() and world == 1 else 'cpu')
    if device not in ('cpu', 'cuda', 'mps'):
        raise ConfigError(f'device = {device!r} is none of auto, cpu, cuda, mps')
    if device == 'cuda' and not torch.cuda.is_available() or device == 'mps' and not torch.backends.mps.is_available():
        raise ConfigError(f'device = {device!r}, but PyTorch finds none here: write --device=cpu')
    if device == 'cuda':
        torch.cuda.set_device(local)
        torch.backends.cudnn.allow_tf32 = False                             # float32 means float32
    if world > 1:
        dist.init_process_group('cpu:gloo,cuda:nccl' if device == 'cuda' else 'gloo')
    return Process(rank, world, torch.device(device, local) if device == 'cuda' else torch.device(device))


def keep_freed_memory():
    """Let the C library reuse the memory of large tensors instead of returning it to the system, which then clears it
    page by page at every step: a tenth of a step of the base model on a CPU. Where there is no glibc, nothing."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)                                                      # M_MMAP_MAX
        mallopt(-1, 2 ** 31 - 1)                                            # M_TRIM_THRESHOLD


def distribute(model, process):
    """The model itself, or its DistributedDataParallel wrapper: gradients live in the buckets that are averaged."""
    if process.world == 1:
        return model
    # Our buffers are constants; what keeps them from being sent at every step was renamed after PyTorch 2.13.
    renamed = 'forward_sync_buffers' in inspect.signature(DistributedDataParallel).parameters
    return DistributedDataParallel(model, device_ids=[process.device] if process.device.type == 'cuda' else None,
                                   gradient_as_bucket_view=True,
                                   **{'forward_sync_buffers' if renamed else 'broadcast_buffers': False})


def autocast(process, dtype, width=0):
    """Precision of the forward pass: 'auto' is bfloat16 on a GPU that has it, and on a CPU that has it if the model is
    wide enough to gain, else float32. -> a context maker and its name"""
    if dtype not in ('auto', 'float32', 'bfloat16'):
        raise ConfigError(f'dtype = {dtype!r} is none of auto, float32, bfloat16')
    if dtype == 'auto':
        if process.device.type == 'cuda':
            gains = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            gains = process.device.type == 'cpu' and width >= MIN_WIDTH and cpu_has_bfloat16()
        dtype = 'bfloat16' if gains else 'float32'
    if dtype == 'float32':
        return contextlib.nullcontext, dtype
    return lambda: torch.autocast(process.device.type, torch.bfloat16), dtype


def in_float32(*modules):
    """Let modules of one argument compute in float32 whatever autocast says: a classifier's head, since logits of 8
    bits rank otherwise."""
    def outside_autocast(forward):
        def in_float32(x):
            with torch.autocast(x.device.type, enabled=False):
                return forward(x.float())
        return in_float32
    for module in modules:
        module.forward = outside_autocast(module.forward)


def cpu_has_bfloat16():
    """Whether the processor multiplies bfloat16 numbers itself; elsewhere they are only slower."""
    try:
        return torch.cpu._is_avx512_bf16_supported()
    except AttributeError:                                                  # another kind of processor
        return False


def can_compile(process):
    """Whether torch.compile works here (it needs a compiler); says so in one line if it does not."""
    try:
        torch.compile(lambda x: x @ x + 1)(torch.ones(8, 8, device=process.device))
        return True
    except Exception as error:
        process.print(f'warning: torch.compile does not work here ({str(error).splitlines()[0][:100]}); '
                      'running without it')
        return False


def provenance(process):
    """Where a run happens: versions, device, threads, commit."""
    device = (torch.cuda.get_device_name() if process.device.type == 'cuda'
              else platform.processor() or platform.machine())
    return {'torch': torch.__version__, 'python': platform.python_version(), 'device': device,
            'processes': process.world, 'threads': torch.get_num_threads(), 'commit': commit()}


def commit():
    """The git commit of this code, with '+' if files differ from it; '' outside a repository."""
    try:
        git = ['git', '-C', ROOT]
        head = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True, timeout=10)
        if head.returncode:
            return ''
        changed = subprocess.run([*git, 'status', '--porcelain', '-uno'], capture_output=True, text=True,
                                 timeout=10).stdout
        return head.stdout.strip() + ('+' if changed.strip() else '')
    except (OSError, subprocess.SubprocessError):
        return ''


class Stop:
    """SIGTERM and SIGINT ask the loop to end after its step; a second SIGINT ends at once."""

    def __init__(self, process):
        self.process, self.requested, self.pending = process, False, None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def agreed(self):
        """Whether to stop now: the same answer at the same step on every process, which costs one step's delay."""
        if self.process.world == 1:
            return self.requested
        before, flag = self.pending, torch.tensor(float(self.requested))    # on the CPU: a GPU is not made to wait
        self.pending = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
        if before is None:
            return False
        before[1].wait()
        return bool(before[0])


def ahead(batches, process, stay=()):
    """Yield dictionaries of tensors on the device, each copied there while the step before it runs; those named in stay
    do not move."""
    def copied(batch):
        return {name: value if name in stay else value.to(process.device, non_blocking=True)
                for name, value in batch.items()}
    if process.device.type != 'cuda':
        yield from map(copied, batches)
        return
    beside, waiting = torch.cuda.Stream(), []

    def arrived(batch, copy):
        here = torch.cuda.current_stream()
        here.wait_event(copy)                                               # the device waits, not Python
        for value in batch.values():
            if value.is_cuda:
                value.record_stream(here)                                   # its memory is not given away before use
        return batch
    for batch in batches:
        with torch.cuda.stream(beside):
            waiting.append((copied(batch), beside.record_event()))
        if len(waiting) == 2:
            yield arrived(*waiting.pop(0))
    for pair in waiting:
        yield arrived(*pair)


def check_bad_steps(done, in_a_row, settings, batches, places, process, log):
    """Say that a step was skipped, its gradient not being finite; after max_bad_steps in a row end the run, naming
    clips of this process's places that the last of them saw."""
    if not in_a_row:
        return
    process.print(f'warning: step {done} has a gradient that is not finite; skipped ({in_a_row} in a row)')
    log.write(step=done, skipped_in_a_row=in_a_row)
    if in_a_row >= settings.max_bad_steps:
        shown = [batches.order.at((done - 1) * settings.batch_size + place) for place in list(places)[:8]]
        raise RunError(f'{in_a_row} steps in a row were not finite; the last saw '
                       f'{", ".join(batches.clips.select(shown).keys())}, ...; lower lr, or look at these clips; '
                       f'{settings.out_dir} holds the last checkpoint')


class Late:
    """Numbers of a step, read a step late from a GPU, so that it never waits for Python; at once from a CPU."""

    def __init__(self, process):
        self.process, self.pending = process, []

    def swap(self, item, values, wait=False):
        """Take an item with its values (n,), a tensor on the device -> [(earlier item, its numbers)] that have arrived;
        with wait, this one too."""
        on_gpu = self.process.device.type == 'cuda'
        arrived = None
        if on_gpu:
            values = values.to('cpu', non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.pending.append((item, values, arrived))
        keep = 1 if on_gpu and not wait else 0
        ready, self.pending = self.pending[:len(self.pending) - keep], self.pending[len(self.pending) - keep:]
        for _, _, arrived in ready:
            if arrived:
                arrived.synchronize()
        return [(item, values.tolist()) for item, values, _ in ready]
