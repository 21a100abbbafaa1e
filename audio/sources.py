"""Where audio comes from: folders, zip and tar archives.

All of it is hostile input. Nothing is unpacked: members of archives are read where they lie, so that no name in one is
ever used as a path; sizes are bounded whatever a header says.
"""
import codecs
import collections
import contextlib
import errno
import hashlib
import io
import lzma
import os
import pathlib
import re
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from array import array

from tqdm import tqdm

from engine.errors import DataError
from engine.files import printable, replacing

MAX_FILE_BYTES = 1 << 30                            # no audio file of a set is larger
WHOLE = 16 << 20                                    # files up to this size are read at once
MAX_ARCHIVE_RATIO = 100                             # what grows more than this when it is decompressed is hostile ...
HARMLESS_BYTES = 32 << 20                           # ... if it grows to more than this: silence compresses well
MAX_HEADER_BYTES = 1 << 20                          # of a tar's long names and further fields, its
LONG_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
                tarfile.SOLARIS_XHDTYPE)
ARCHIVE_ERRORS = (OSError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
AUDIO_SUFFIXES = ('.wav', '.wave', '.bwf', '.rf64', '.w64', '.flac', '.ogg', '.oga', '.opus', '.mp3', '.mp2', '.mpga',
                  '.aif', '.aiff', '.aifc', '.au', '.snd', '.sph', '.nist', '.caf', '.voc', '.m4a', '.m4b', '.mp4',
                  '.mov', '.3gp', '.3g2', '.aac', '.ac3', '.amr', '.webm', '.mkv', '.mka', '.wma', '.asf', '.wv',
                  '.ape', '.tta')
HIDDEN = re.compile(r'(^|/)(\.(?!\.?(/|$))|(__MACOSX|@eaDir|\$RECYCLE\.BIN|System Volume Information|lost\+found)'
                    r'(/|$))', re.IGNORECASE)


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
    """The files of a folder or archive: their names inside it, and where their bytes are.

    Names are parted by slashes. What is hidden is not among them: whatever lies under a name that begins with a dot or
    belongs to a system (__MACOSX, lost+found).
    """

    def __init__(self, kind, path):
        self.kind, self.path = kind, path                                   # folder, zip or tar
        self.names = Strings()
        # in a tar: where the file begins, its bytes; in a zip: where its header begins, its bytes there, its bytes, how
        # they are compressed, their checksum
        self.columns = [array(code) for code in {'folder': '', 'tar': 'qI', 'zip': 'qIIHI'}[kind]]
        self.left_out = {}                                                  # reason: [how many, the first name]

    def add(self, name, *where):
        if HIDDEN.search(name):
            if is_audio(name):
                self.leave_out('audio files under hidden names', name)
            return
        self.names.append(name)
        for column, value in zip(self.columns, where):
            column.append(min(value, 1 << 62 if column.typecode == 'q' else 0xffffffff))     # more is a lie

    def leave_out(self, reason, name):
        self.left_out.setdefault(reason, [0, name])[0] += 1

    def place(self, i):
        """What read_bytes wants to know of file i."""
        if self.kind == 'folder':
            return 'file', os.path.join(self.path, self.names[i])
        return self.kind, self.path, *(column[i] for column in self.columns)

    def audio(self):
        """Yield (index, name) of every audio file, by its suffix."""
        for i, name in enumerate(self.names):
            if is_audio(name):
                yield i, name

    def told(self):
        """The same files, after a line that says what was left out, if anything was."""
        others = collections.Counter(os.path.splitext(name)[1].lower() or 'without a suffix'
                                     for name in self.names if not is_audio(name))
        said = [f'{count} {reason} (the first: {printable(name)})' for reason, (count, name) in self.left_out.items()]
        if others:
            kinds = ', '.join(f'{printable(kind)} {count}' for kind, count in others.most_common(5))
            said.append(f'{sum(others.values())} files whose names are not those of audio ({kinds}'
                        f'{", ..." if len(others) > 5 else ""})')
        if said:
            print(f'left out of {printable(self.path)}: {"; ".join(said)}')
        return self


def is_audio(name):
    return name.lower().endswith(AUDIO_SUFFIXES)


def list_source(path, work_dir):
    """Files of a folder, zip or tar archive, always in the same order; a line says what was left out. Raises DataError.

    work_dir: where a compressed tar is decompressed.
    """
    kind = kind_of(path)
    if kind == 'folder':
        return list_folder(path).told()
    try:
        plain = uncompressed_tar(path, work_dir) if kind == 'compressed tar' else path
        return (list_zip if kind == 'zip' else list_tar)(plain).told()
    except (*ARCHIVE_ERRORS, UnicodeError, ValueError, NotImplementedError) as error:
        raise DataError(f'the archive {path} is damaged ({error}): get it again') from None


def kind_of(path):
    """'folder', 'zip', 'tar' or 'compressed tar'. Raises DataError.

    By the first bytes: a tar may end with a zip, its last member, and a program that unpacks itself is a zip that
    begins with something else.
    """
    if os.path.isdir(path):
        return 'folder'
    if not os.path.exists(path):
        raise DataError(f'there is no archive or folder {path}')
    try:
        with open(path, 'rb') as f:
            if f.read(2) == b'PK' and zipfile.is_zipfile(path):
                return 'zip'
        with contextlib.suppress(tarfile.ReadError), tarfile.open(path, tarinfo=BoundedHeader) as archive:
            return 'tar' if isinstance(archive.fileobj, io.BufferedReader) else 'compressed tar'
        if zipfile.is_zipfile(path):
            return 'zip'
    except (*ARCHIVE_ERRORS, UnicodeError, ValueError, NotImplementedError) as error:
        raise DataError(f'the archive {path} is damaged ({error}): get it again') from None
    raise DataError(f'{path} is neither a folder nor a zip or tar archive')


def list_folder(path):
    """Files of a folder; linked folders too, behind the others, but none twice: a link may lead back, for ever.
    Raises DataError if any folder in it cannot be listed."""
    found = Files('folder', path)
    seen = {identity(parent) for parent in pathlib.Path(os.path.realpath(path)).parents}
    folders, links = [''], []                                               # still to list, by their names inside
    while folders or links:
        through_link = not folders
        inside = (folders or links).pop()
        folder = os.path.join(path, inside) if inside else path
        try:
            this = identity(folder)
            if through_link and this in seen:
                found.leave_out('linked folders that lead to one that is listed or holds the source', inside)
                continue
            seen.add(this)
            with os.scandir(folder) as entries:
                here = sorted((entry.name, kind_of_entry(entry)) for entry in entries)
        except OSError as error:
            if HIDDEN.search(inside):
                continue
            raise DataError(f'cannot list the folder {folder} ({reason_of(error)}): its sounds would be missing'
                            ) from None
        below = []
        for name, kind in here:
            name = f'{inside}/{name}' if inside else name
            if kind == 'file':
                found.add(name)
            elif kind == 'folder':
                below.append(name)
            elif kind == 'linked folder':
                links += [] if HIDDEN.search(name) else [name]
            else:
                found.leave_out(kind, name)
        (links if through_link else folders).extend(reversed(below))
    return found


def identity(folder):
    info = os.stat(folder)
    return info.st_dev, info.st_ino


def kind_of_entry(entry):
    """Of a folder's entry: 'file', 'folder', 'linked folder', or why it is left out. A link costs a look at its target;
    a pipe or device must not be opened, which could wait for ever."""
    if not entry.is_symlink():
        return 'folder' if entry.is_dir() else 'file' if entry.is_file() else 'pipes, sockets or devices'
    try:
        mode = os.stat(entry.path).st_mode
    except OSError as error:
        if is_audio(entry.name):
            return 'file'                                                   # to be skipped by name when it is read
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return 'links that lead nowhere'
        raise
    return 'linked folder' if stat.S_ISDIR(mode) else 'file' if stat.S_ISREG(mode) else 'pipes, sockets or devices'


def list_zip(path):
    """Its directory is read once, here, and not kept: of two million files it would take a gigabyte."""
    found = Files('zip', path)

    class Directory(zipfile.ZipFile):
        NameToInfo = filelist = property(lambda self: self, lambda self, value: None)       # its list, and its dict

        def append(self, info):
            name = info.filename.replace('\\', '/')                         # some are made with Windows' separators
            if not name.endswith('/'):
                found.add(name, info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)

        def __setitem__(self, name, info):
            pass

        def __iter__(self):
            return iter(())
    Directory(path).close()
    return found


def list_tar(path):
    found = Files('tar', path)
    with tarfile.open(path, 'r:', tarinfo=BoundedHeader) as archive:
        for member in archive:
            name = member.name.replace('\\', '/').removeprefix('./')
            if member.isfile() and not member.issparse():
                found.add(name, member.offset_data, member.size)
            elif not member.isdir():
                found.leave_out('links, devices or sparse files', name)     # links could lead anywhere
            archive.members = []                                            # or it would keep every header in memory
    return found


class BoundedHeader(tarfile.TarInfo):
    """A tar header whose long names and further fields are not read into memory if they are absurdly long."""

    def _proc_member(self, archive):
        if self.type in LONG_HEADERS and self.size > MAX_HEADER_BYTES:
            raise ValueError(f'a header of {self.size >> 20} MiB')
        return super()._proc_member(archive)


def uncompressed_tar(path, work_dir):
    """The path of the tar itself, of a .tar.gz, .tar.bz2 or .tar.xz, decompressed into work_dir once."""
    info = os.stat(path)
    plain = os.path.join(work_dir, cache_name(f'{os.path.abspath(path)} {info.st_size} {info.st_mtime_ns}', 'tar'))
    if os.path.exists(plain):
        return plain
    with (tarfile.open(path, 'r:*', tarinfo=BoundedHeader) as archive, replacing(plain, 'wb') as out,
          tqdm(unit='B', unit_scale=True, desc=f'decompressing {os.path.basename(path)}', delay=1) as bar):
        archive.fileobj.seek(0)                                             # opening has read the first header
        while block := archive.fileobj.read(1 << 20):
            bar.update(len(block))
            if bar.n > info.st_size * MAX_ARCHIVE_RATIO:
                raise DataError(f'{path} grows more than {MAX_ARCHIVE_RATIO} times when decompressed: refused')
            out.write(block)
    return plain


def cache_name(origin, suffix):
    """The name of a file that is kept beside a set until it is complete; another origin gives another name."""
    return f'source-{hashlib.sha256(origin.encode("utf-8", "surrogateescape")).hexdigest()[:8]}.{suffix}'


class Section(io.RawIOBase):
    """Bytes of an open file from start on, read where they lie when they are asked for: a stream, and with slices.

    A slice with an end gives bytes, one without another Section.
    """

    def __init__(self, file, start, size, errors=None):
        self.file, self.start, self.place = file, start, 0
        self.size = max(min(size, os.fstat(file.fileno()).st_size - start), 0)
        self.errors = [] if errors is None else errors                      # soundfile loses those of a stream

    def __len__(self):
        return self.size

    def __getitem__(self, part):
        first, last, _ = part.indices(self.size)
        if part.stop is None:
            return Section(self.file, self.start + first, self.size - first, self.errors)
        try:
            return os.pread(self.file.fileno(), max(last - first, 0), self.start + first)
        except OSError as error:
            self.errors.append(error)
            raise

    def readinto(self, buffer):
        content = self[self.place:self.place + len(buffer)]
        buffer[:len(content)] = content
        self.place += len(content)
        return len(content)

    def seek(self, offset, whence=os.SEEK_SET):
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def readable(self):
        return True

    seekable = readable


@contextlib.contextmanager
def content_of(place):
    """The bytes of one file: bytes, or of more than WHOLE a Section of the file. Raises ValueError if there are more
    than MAX_FILE_BYTES, whatever a header says."""
    kind, path, *inside = place
    limit, start, size = MAX_FILE_BYTES, 0, MAX_FILE_BYTES + 1
    with contextlib.ExitStack() as stack:
        file = stream = stack.enter_context(open(path, 'rb'))
        if kind == 'zip':
            stream = stack.enter_context(open_member(file, *inside))
            limit = min(limit, max(HARMLESS_BYTES, inside[1] * MAX_ARCHIVE_RATIO))
        elif kind == 'tar':
            start, size = inside
            file.seek(start)
        content = stream.read(min(size, limit + 1, WHOLE + 1))
        if len(content) <= min(limit, WHOLE):
            yield content
            return
        if stream is not file or not file.seekable():                       # compressed, or a pipe
            file, start = stack.enter_context(tempfile.TemporaryFile()), 0
            while content and file.tell() <= limit:
                file.write(content)
                content = stream.read(WHOLE)
            file.flush()
        section = Section(file, start, size)
        if len(section) > limit:
            raise ValueError(f'larger than {limit >> 20} MiB' if limit == MAX_FILE_BYTES else
                             f'grows more than {MAX_ARCHIVE_RATIO} times when decompressed')
        try:
            yield section
        finally:
            for error in section.errors:
                raise error


def open_member(file, offset, packed, size, method, checksum):
    """A member of a zip as a stream, found without the directory. It ends with an error if it has another checksum."""
    file.seek(offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b'PK\3\4':
        raise zipfile.BadZipFile('there is no member where the directory says')
    flags, name, extra = struct.unpack('<6xH18xHH', header)
    if flags & 0x61:
        raise ValueError('encrypted, or a patch to another file')
    file.seek(name + extra, os.SEEK_CUR)
    info = zipfile.ZipInfo()
    info.compress_size, info.file_size, info.compress_type, info.CRC = packed, size, method, checksum
    return zipfile.ZipExtFile(file, 'r', info)


def read_bytes(place):
    """The bytes of one file, however many; for what content_of raises see there."""
    with content_of(place) as content:
        return content[:len(content)]


def open_text(place):
    """A text table as a stream of lines, from a path or what read_bytes takes: UTF-8, with or without a byte-order
    mark, or UTF-16 with one. Raises what reading does; UnicodeError (a ValueError), also later, if it is no text."""
    raw = open(place, 'rb') if isinstance(place, str) else io.BufferedReader(io.BytesIO(read_bytes(place)))
    utf16 = raw.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return io.TextIOWrapper(raw, 'utf-16' if utf16 else 'utf-8-sig', newline='')    # as csv wants it


def reason_of(error):
    """An exception as one line."""
    text = (getattr(error, 'error_string', None) or getattr(error, 'strerror', None) or str(error)
            or type(error).__name__)
    return ' '.join(text.split())
