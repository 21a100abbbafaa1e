"""Batches read ahead in processes of their own, which end with what they work for."""
import os
import sys
from multiprocessing.connection import wait

import torch

from engine.errors import ConfigError, DataError, ReadError, RunError
from engine.processes import shield_worker


class Readable(torch.utils.data.Dataset):
    """A batch dataset whose failure to be read is an item, so that it leaves a worker as it is, in one line."""

    def __init__(self, batches):
        self.batches = batches

    def __getitem__(self, k):
        try:
            return self.batches[k]
        except DataError as error:
            return ReadError(f'{error}')
        except OSError as error:
            folders = sorted({os.path.dirname(shard) for shard in self.batches.clips.shards})
            return ReadError(f'{error.filename or ", ".join(folders)}: a batch could not be read '
                             f'({error.strerror or error}); what was saved is intact')


def loader(batches, items, workers=0, pin=False):
    """Yield these items (a range) of a batch dataset, read ahead of time in worker processes if there are any.

    The workers are gone when it ends, however it ends. They are forked where that is safe, so that they share the index
    of the clips (AudioSet's has 245 MB) instead of each getting a copy. Raises ReadError for what cannot be read,
    RunError for a worker that was killed, ConfigError for too little shared memory.
    """
    how = dict(prefetch_factor=batches_ahead(2 * batches.samples * len(batches.places), workers),
               worker_init_fn=quiet_worker,
               multiprocessing_context='fork' if sys.platform == 'linux' else None) if workers else {}
    reading = iter(torch.utils.data.DataLoader(Readable(batches), batch_size=None, sampler=items, num_workers=workers,
                                               pin_memory=pin, **how))
    started = getattr(reading, '_workers', [])
    try:
        for batch in reading:
            if isinstance(batch, ReadError):
                raise batch
            yield batch
    except (OSError, EOFError) as error:                                    # what it had sent cannot be fetched
        if not started or not wait([worker.sentinel for worker in started], timeout=1):     # its end may come later
            raise
        raise RunError(f'a process that reads clips has died ({error}); what was saved is intact') from None
    finally:
        if started:
            reading._shutdown_workers()                                     # waits 5 s for each
        for worker in started:
            worker.kill()


def batches_ahead(size, workers, folder='/dev/shm', most=4):
    """How many batches each worker may read ahead: fewer if they would not fit in the shared memory through which they
    go. Raises ConfigError if one does not.

    size: bytes of one's samples. Two more are on their way to the device. Other processes of torchrun need as much.
    """
    if not os.path.isdir(folder):
        return most
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize // int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if free < (workers + 2) * size:
        raise ConfigError(f'{workers} workers need {(workers + 2) * size >> 20} MiB of shared memory for batches of '
                          f'{size >> 20} MiB, and {folder} has {free >> 20} free: give fewer --workers, or the '
                          'container more (docker run --shm-size=1g)')
    return min(most, (free // size - 2) // workers)


def quiet_worker(worker):
    """A worker does not answer signals that are the main process's, nor may it use its siblings' cores."""
    shield_worker()
    torch.set_num_threads(1)
