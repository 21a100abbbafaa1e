"""Where audio comes from: folders, zip and tar archives.

All of it is hostile input. Nothing is unpacked: members of archives are read where they lie, so that no name in one is
ever used as a path; sizes are bounded whatever a header says.
"""
import functools
import hashlib
import lzma
import os
import tarfile
import zipfile
import zlib
from array import array

from tqdm import tqdm

from engine.errors import DataError
from engine.files import replacing

MAX_FILE_BYTES = 1 << 30                            # no audio file of a set is larger
MAX_ARCHIVE_RATIO = 100                             # what grows more than this when it is decompressed is hostile ...
HARMLESS_BYTES = 32 << 20                           # ... if it grows to more than this: silence compresses well
MAX_HEADER_BYTES = 1 << 20                          # of a tar's long names
ARCHIVE_ERRORS = (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
AUDIO_SUFFIXES = ('.wav', '.flac', '.ogg', '.oga', '.opus', '.mp3', '.aif', '.aiff', '.au', '.w64', '.caf',
                  '.m4a', '.mp4', '.aac', '.webm', '.mkv', '.mka', '.wma')


class Strings:
    """A list of strings in one stretch of bytes: two million file names take 100 MB instead of 250."""

    def __init__(self):
        self.bytes, self.ends = bytearray(), array('q', [0])

    def append(self, text):
        self.bytes += text.encode('utf-8', 'surrogateescape')
        self.ends.append(len(self.bytes))

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.bytes[self.ends[i]:self.ends[i + 1]].decode('utf-8', 'surrogateescape')


class Files:
    """The files of a folder or archive: their names inside it, and where their bytes are."""

    def __init__(self, kind, path):
        self.kind, self.path = kind, path                                   # folder, zip or tar
        self.names, self.offsets, self.sizes = Strings(), array('q'), array('q')

    def add(self, name, offset=0, size=0):
        self.names.append(name)
        self.offsets.append(offset)
        self.sizes.append(size)

    def place(self, i):
        """What read_bytes wants to know of file i."""
        if self.kind == 'folder':
            return 'file', os.path.join(self.path, self.names[i])
        if self.kind == 'zip':
            return 'zip', self.path, self.names[i]
        return 'tar', self.path, self.offsets[i], self.sizes[i]

    def audio(self):
        """Yield (index, name) of every audio file, by its suffix."""
        for i, name in enumerate(self.names):
            if name.lower().endswith(AUDIO_SUFFIXES) and not os.path.basename(name).startswith('.'):
                yield i, name


def list_source(path, work_dir):
    """Files of a folder, zip or tar archive, always in the same order. Raises DataError.

    work_dir: where a compressed tar is decompressed.
    """
    if os.path.isdir(path):
        found = Files('folder', path)
        for folder, folders, files in os.walk(path):
            folders.sort()
            inside = os.path.relpath(folder, path).replace(os.sep, '/')
            for file in sorted(files):
                found.add(file if inside == '.' else f'{inside}/{file}')
        return found
    if not os.path.exists(path):
        raise DataError(f'there is no archive or folder {path}')
    try:
        if zipfile.is_zipfile(path):
            found = Files('zip', path)
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if not info.is_dir():
                        found.add(info.filename)
            return found
        try:
            tarfile.open(path, 'r:*', tarinfo=BoundedHeader).close()
        except tarfile.ReadError:
            raise DataError(f'{path} is neither a folder nor a zip or tar archive') from None
        path = uncompressed_tar(path, work_dir)
        found = Files('tar', path)
        with tarfile.open(path, 'r:', tarinfo=BoundedHeader) as archive:
            for member in archive:
                if member.isfile():                                         # links and devices are no files: left out
                    found.add(member.name.removeprefix('./'), member.offset_data, member.size)
                archive.members = []                                        # or it would keep every header in memory
        return found
    except (*ARCHIVE_ERRORS, UnicodeError, ValueError, NotImplementedError) as error:
        raise DataError(f'the archive {path} is damaged ({error}): get it again') from None


class BoundedHeader(tarfile.TarInfo):
    """A tar header whose long names and further fields are not read into memory if they are absurdly long."""

    def check_size(self):
        if self.size > MAX_HEADER_BYTES:
            raise ValueError(f'a header of {self.size >> 20} MiB')

    def _proc_gnulong(self, archive):
        self.check_size()
        return super()._proc_gnulong(archive)

    def _proc_pax(self, archive):
        self.check_size()
        return super()._proc_pax(archive)


def is_compressed_tar(path):
    if os.path.isdir(path) or zipfile.is_zipfile(path):
        return False
    try:
        with tarfile.open(path, 'r:', tarinfo=BoundedHeader) as archive:
            archive.next()
        return False
    except tarfile.ReadError:
        return True


def uncompressed_tar(path, work_dir):
    """The path of the tar itself, decompressed into work_dir once if it is a .tar.gz, .tar.bz2 or .tar.xz."""
    if not is_compressed_tar(path):
        return path
    info = os.stat(path)
    plain = os.path.join(work_dir, cache_name(f'{os.path.abspath(path)} {info.st_size} {info.st_mtime_ns}', 'tar'))
    if os.path.exists(plain):
        return plain
    limit = os.path.getsize(path) * MAX_ARCHIVE_RATIO
    with (tarfile.open(path, 'r:*', tarinfo=BoundedHeader) as archive, replacing(plain, 'wb') as out,
          tqdm(unit='B', unit_scale=True, desc=f'decompressing {os.path.basename(path)}', delay=1) as bar):
        archive.fileobj.seek(0)                                             # opening has read the first header
        while block := archive.fileobj.read(1 << 20):
            bar.update(len(block))
            if bar.n > limit:
                raise DataError(f'{path} grows more than {MAX_ARCHIVE_RATIO} times when decompressed: refused')
            out.write(block)
    return plain


def cache_name(origin, suffix):
    """The name of a file that is kept beside a set until it is complete; another origin gives another name."""
    return f'source-{hashlib.sha256(origin.encode("utf-8", "surrogateescape")).hexdigest()[:8]}.{suffix}'


@functools.lru_cache(maxsize=4)
def open_zip(path, modified):
    """modified: when, so that a file that has been replaced is opened anew."""
    return zipfile.ZipFile(path)


def read_bytes(place):
    """The bytes of one file, at most MAX_FILE_BYTES whatever a header says. Raises ValueError if there are more."""
    kind, path = place[:2]
    limit = MAX_FILE_BYTES
    if kind == 'zip':
        archive = open_zip(path, os.stat(path).st_mtime_ns)
        limit = min(limit, max(HARMLESS_BYTES, archive.getinfo(place[2]).compress_size * MAX_ARCHIVE_RATIO))
        with archive.open(place[2]) as f:
            content = f.read(limit + 1)
    else:
        with open(path, 'rb') as f:
            f.seek(place[2] if kind == 'tar' else 0)
            content = f.read(min(place[3], limit + 1) if kind == 'tar' else limit + 1)
    if len(content) > limit:
        raise ValueError(f'larger than {limit >> 20} MiB' if limit == MAX_FILE_BYTES else
                         f'grows more than {MAX_ARCHIVE_RATIO} times when decompressed')
    return content


def reason_of(error):
    """An exception as one line."""
    text = (getattr(error, 'error_string', None) or getattr(error, 'strerror', None) or str(error)
            or type(error).__name__)
    return ' '.join(text.split())
