"""Processes that decode: a file that crashes its decoder ends one of them, which alone is started again.

They are forked by a server, multiprocessing's, that has imported PyTorch once and does nothing else. A process is there
within milliseconds, and what the imports take in memory is shared.
"""
import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import signal
import tempfile

import torch

AHEAD = 8                       # results that may be waiting for an earlier one, or be under way, for each process
CRASHED = 'its decoder crashed'
PROCESSES = multiprocessing.get_context('forkserver')


class Worker:
    """A process that computes what it is given, one after the other. It starts when it is given something.

    folder: where it puts temporary files, None for the system's.
    """

    def __init__(self, folder=None):
        self.folder, self.process, self.jobs = folder, None, collections.deque()

    def give(self, number, *call):
        if self.process is None:
            self.start()
        self.jobs.append(number)
        with contextlib.suppress(ConnectionError):                          # it has died, which is seen when it is read
            self.connection.send(call)

    def start(self):
        """It never sees Ctrl-C, nor does the server: that goes to every process of a terminal, and this one ends it."""
        PROCESSES.set_forkserver_preload(['torchaudio', 'soundfile', 'prepare'])
        multiprocessing.resource_tracker.ensure_running()                   # it would let the signal through
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            connection, other_end = PROCESSES.Pipe()
            process = PROCESSES.Process(target=work, args=(other_end, self.folder), daemon=True)
            process.start()
            other_end.close()
            self.process, self.connection = process, connection
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self):
        if self.process is not None:
            self.process.kill()                                             # it holds nothing
            self.process.join()
            self.connection.close()
        self.process = None
        self.jobs.clear()


def work(connection, folder):
    """In the process: until whoever started it is gone."""
    torch.set_num_threads(1)
    tempfile.tempdir = folder                                               # None is its own default
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            function, *arguments = connection.recv()
            try:
                result = function(*arguments)
            except Exception as error:                                      # for whoever waits for the result
                result = error
            connection.send(result)


def in_order(function, items, how, workers):
    """Yield function(item, *how) for every item, in order, computed by the workers, a list (empty: by this process).

    An item that ends its process, twice, has the result CRASHED, and no other is lost. An exception is raised here.
    """
    if not workers:
        return (yield from (function(item, *how) for item in items))
    todo, results, suspects = collections.deque(range(len(items))), {}, set()
    for position in range(len(items)):
        while position not in results:
            for worker in sorted(workers, key=lambda worker: len(worker.jobs)) * 2:     # one more to go on with
                if len(worker.jobs) < 2 and todo and todo[0] < position + AHEAD * len(workers):
                    number = todo.popleft()
                    worker.give(number, function, items[number], *how)
            busy = {worker.connection: worker for worker in workers if worker.jobs}
            for connection in multiprocessing.connection.wait(busy):
                number, *others = busy[connection].jobs
                try:
                    results[number] = connection.recv()
                    busy[connection].jobs.popleft()
                except (EOFError, ConnectionError):                         # it died over this one, or was killed
                    busy[connection].close()
                    todo.extendleft(reversed(others))
                    if number in suspects:
                        results[number] = CRASHED
                    else:
                        suspects.add(number)
                        todo.appendleft(number)
                if isinstance(results.get(number), Exception):
                    raise results[number]
        yield results.pop(position)
