"""What this process may use of the machine: the cores and the memory that its affinity and its container leave it."""
import os


def cores():
    """Whole cores: those that it may run on, or fewer if a quota of time is less (at least 1)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    for folder in cgroups('cpu'):
        quota = limits(folder, 'cpu.max') or limits(folder, 'cpu.cfs_quota_us') + limits(folder, 'cpu.cfs_period_us')
        if len(quota) == 2 and min(quota) > 0:
            count = min(count, max(quota[0] // quota[1], 1))
    return count


def memory():
    """Bytes of memory: all of the machine's, or less if a control group has less."""
    found = [os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')]
    for folder in cgroups('memory'):
        for name in ('memory.max', 'memory.high', 'memory.limit_in_bytes'):
            found += limits(folder, name)[:1]
    return min(found)


def limits(folder, name):
    """The numbers in a file of a control group; none if there is no file, or no limit."""
    try:
        with open(os.path.join(folder, name)) as f:
            return [int(word) for word in f.read().split()]
    except (OSError, ValueError):                                           # `max`: no limit
        return []


def cgroups(controller, root='/sys/fs/cgroup', own='/proc/self/cgroup'):
    """The folders of the control groups that hold this process, from its own to the outermost: all limits count."""
    try:
        with open(own) as f:
            lines = [line.rstrip('\n').split(':', 2) for line in f]
    except OSError:
        return
    for _, controllers, path in lines:
        if controllers and controller not in controllers.split(','):
            continue
        top = os.path.join(root, controller) if controllers else root
        while path:
            yield top + path.rstrip('/')
            path = path.rstrip('/').rpartition('/')[0]
        yield top
