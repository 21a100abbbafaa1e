"""Files that appear under their names only when they are whole, and folders that one process has for itself."""
import contextlib
import fcntl
import os

from engine.errors import ConfigError


@contextlib.contextmanager
def replacing(path, mode='w', before_rename=lambda: None):
    """A file that appears under its name whole (temporary name, fsync, rename) or not at all."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    temporary = path + '.tmp'
    try:
        with open(temporary, mode, **({} if 'b' in mode else {'encoding': 'utf-8', 'errors': 'surrogateescape'})) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        before_rename()
        os.replace(temporary, path)
        fsync_folder(os.path.dirname(path) or '.')
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def names_in(folder):
    """What a folder holds, sorted; nothing if there is no such folder."""
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def fsync_folder(folder):
    """Make renames in it durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def printable(text):
    """A name that may hold anything, for one line of a text file."""
    return str(text).encode('utf-8', 'backslashreplace').decode().translate({9: ' ', 10: ' ', 13: ' '})


HELD = set()                # folders that this process has locked; to open one's file again would unlock it


@contextlib.contextmanager
def locked(folder):
    """Hold a folder for this process alone, so that no other writes into it meanwhile; it is made if it is missing, and
    goes again if it stays empty. The lock ends with the process, however that ends. Raises ConfigError if it is held.
    """
    made = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    name, path = os.path.realpath(folder), os.path.join(folder, '.lock')
    file = None if name in HELD else lock_file(path)
    if file is None:
        raise ConfigError(f'{folder} is in use by another process: wait for it, or choose another --out_dir')
    HELD.add(name)
    try:
        yield
    finally:
        HELD.discard(name)
        with contextlib.suppress(OSError):
            os.remove(path)                                                 # before the lock goes
        file.close()
        if made:
            with contextlib.suppress(OSError):
                os.rmdir(folder)                                            # fails unless it is empty


def lock_file(path):
    """A file that this process alone has locked, open; None if another has."""
    while True:
        file = open(path, 'a')
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return None
        except OSError:                                                     # a file system without locks
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()                                                        # its owner has removed it: a new one
