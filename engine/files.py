"""Files that appear under their names only when they are whole."""
import contextlib
import os


@contextlib.contextmanager
def replacing(path, mode='w', before_rename=lambda: None):
    """A file that appears under its name only when it is whole: temporary name, fsync, rename;
    nothing stays on failure."""
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
