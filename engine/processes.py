"""The one place where an error becomes a line, processes and devices, signals.

This file must not know the network, audio or any stage; a stage script hands it tensors and plain values.
"""
import atexit
import contextlib
import ctypes
import functools
import inspect
import multiprocessing
import os
import platform
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engine.errors import ROOT, CheckpointError, ConfigError, DataError, ReadError, RunError, first_line

MIN_WIDTH = 128             # channels from which bfloat16 was seen to pay on a CPU
TWICE = 1.0                 # seconds after which a second Ctrl-C is another one, and not passed on by a launcher


# ------------------------------------------------------------------------------------------------ errors and the end

def main(run):
    """Call run(sys.argv[1:]); a user's mistake becomes one line on stderr and exit code 2, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')                   # names that the terminal cannot show
    try:
        run(sys.argv[1:])
        if dist.is_initialized():
            dist.barrier()                                                  # nobody leaves while another still needs it
        code, line = 0, ''
    except (Exception, KeyboardInterrupt) as error:
        code, line = exit_of(error)
        if code is None:
            raise
    if line:
        print(' '.join(line.split()), file=sys.stderr, flush=True)
    if dist.is_initialized():
        sys.stdout.flush()
        end_workers()
        os._exit(code)      # all is written; tidying up could wait for a dead process, and gloo's aborts now and then
    if code:
        sys.exit(code)


def exit_of(error):
    """Exit code and line of an error; (None, '') of one that is no user's and wants its traceback."""
    if isinstance(error, (ConfigError, DataError, CheckpointError, RunError)):
        code = 1 if isinstance(error, RunError) else 2
        if isinstance(error, ReadError) and dist.is_initialized():          # this process's alone
            return code, f'error: process {dist.get_rank()}: {error}'
        return code, f'error: {error}' if os.environ.get('LOCAL_RANK', '0') == '0' else ''      # once per machine
    if isinstance(error, RuntimeError) and 'DataLoader worker' in str(error):
        return 1, f'error: a process that reads clips has died ({first_line(error)}); what was saved is intact'
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return 1, 'error: too little memory: lower batch_size, or raise accumulate; what was saved is intact'
    if isinstance(error, RuntimeError) and lost_contact(error):
        return 1, (f'error: process {dist.get_rank()} lost contact with another one ({first_line(error)}); nothing was '
                   'saved since the last checkpoint, if there is one: run again with --resume')
    if isinstance(error, KeyboardInterrupt):
        return 130, 'interrupted'
    if isinstance(error, BrokenPipeError):                                  # `... | head`
        sys.stderr.close()
        return 1, ''
    if isinstance(error, OSError):
        return 2, f'error: {error.filename or "the system"}: {error.strerror or error}'
    return None, ''


def lost_contact(error):
    """Whether an error is that of a collective whose other side has died."""
    return dist.is_initialized() and (isinstance(error, dist.DistError)
                                      or re.search('gloo|NCCL|[Cc]onnection (closed|reset|refused)', str(error)))


def shield_worker():
    """In a process that works for this one: Ctrl-C and SIGTERM, which reach a whole group, are the main process's to
    handle. The worker goes on until that ends it, and dies with it, however it dies (Linux)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)                          # PR_SET_PDEATHSIG


@atexit.register
def end_workers():
    """Kill what still works for this process, which ends: Python would wait for it, and it ignores SIGTERM."""
    children = multiprocessing.active_children()
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)                       # PyTorch's handler raises at their end
    for child in children:
        child.kill()


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

    def once(self, function):
        """Call function() in the main process while the others wait -> its result, or its error, on every process."""
        result = problem = None
        if self.is_main:
            try:
                result = function()
            except (ConfigError, DataError, CheckpointError, RunError, OSError) as error:
                problem = error
        if self.world > 1:
            result, problem = self.gather((result, problem))[0]
        if problem:
            raise problem
        return result

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
    rank, world, local = (int(os.environ.get(name, default))
                          for name, default in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0)))
    available = {'cpu': True, 'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available()}
    if device == 'auto':
        device = 'cuda' if available['cuda'] else 'mps' if available['mps'] and world == 1 else 'cpu'
    if device not in available:
        raise ConfigError(f'device = {device!r} is none of auto, cpu, cuda, mps')
    if not available[device]:
        raise ConfigError(f'device = {device!r}, but PyTorch finds none here: write --device=cpu')
    if device == 'cuda':
        torch.cuda.set_device(local)
        torch.backends.cudnn.allow_tf32 = False                             # float32 means float32
    if world > 1:
        dist.init_process_group('cpu:gloo,cuda:nccl' if device == 'cuda' else 'gloo')
    return Process(rank, world, torch.device(device, local) if device == 'cuda' else torch.device(device))


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
        on_gpu = process.device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
        on_cpu = process.device.type == 'cpu' and width >= MIN_WIDTH and cpu_has_bfloat16()
        dtype = 'bfloat16' if on_gpu or on_cpu else 'float32'
    if dtype == 'float32':
        return contextlib.nullcontext, dtype
    return lambda: torch.autocast(process.device.type, torch.bfloat16), dtype


def in_float32(*modules):
    """Let modules of one argument compute in float32 whatever autocast says: a classifier's head, since logits of 8
    bits rank otherwise."""
    def outside_autocast(forward, x):
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())
    for module in modules:
        module.forward = functools.partial(outside_autocast, module.forward)


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
        process.print(f'warning: torch.compile does not work here ({first_line(error)}); running without it')
        return False


def provenance(process):
    """Where a run happens: versions, device, threads, commit."""
    return {'torch': torch.__version__, 'python': platform.python_version(), 'device': device_name(process.device),
            'processes': process.world, 'threads': torch.get_num_threads(), 'commit': commit()}


def device_name(device):
    """The GPU's name, or the processor's as Linux tells it."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError), open('/proc/cpuinfo', encoding='utf-8') as f:
        if named := re.search(r'^model name\s*: (.+)$', f.read(), re.M):
            return named[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def commit():
    """The git commit of this code, with '+' if files differ from it; '' outside a repository. Asked once, at the start:
    what is committed during a run is not what runs."""
    ask = ['git', '-C', ROOT, 'describe', '--always', '--abbrev=40', '--exclude=*', '--dirty=+']
    try:
        return subprocess.run(ask, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ''


# ------------------------------------------------------------------------------------------------------------- signals

class Stop:
    """In its `with`, SIGTERM and SIGINT ask the loop to end after its step; a second Ctrl-C ends at once. An error that
    leaves it, where there are several processes, keeps it so until the process has said what it is, and ends."""

    def __init__(self, process):
        self.process, self.requested, self.pending = process, 0.0, None     # when it was asked, 0: not yet

    def __enter__(self):
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, error, *_):
        if error and self.process.world > 1:
            return      # the launcher's SIGTERM, sent because another has died, is not to cut off this one's line
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        if self.requested and number == signal.SIGINT and time.monotonic() > self.requested + TWICE:
            raise KeyboardInterrupt
        self.requested = self.requested or time.monotonic()

    def agreed(self):
        """Whether to stop now: the same answer at the same step on every process, which costs one step's delay."""
        if self.process.world == 1:
            return bool(self.requested)
        before, flag = self.pending, torch.tensor(float(self.requested > 0))    # on the CPU: a GPU is not made to wait
        self.pending = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
        if before is None:
            return False
        before[1].wait()
        return bool(before[0])

    def agreed_now(self):
        """The same without a delay, for where the processes wait for each other anyway."""
        return any(self.process.gather(self.requested > 0))
