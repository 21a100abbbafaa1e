"""What the bytes of an audio file say before anything is decoded: its format, whether it is whole, where an mp3 begins.

All of it is hostile input: every number in a header may be a lie. This file decodes nothing.
"""
import math
import re

from audio.sources import MAX_FILE_BYTES

# Where and what the first bytes of a format are, and ffmpeg's name for it. None of these formats can name other files.
FORMATS = ((4, b'ftyp', 'mov'), (0, b'\x1a\x45\xdf\xa3', 'matroska'), (0, b'\x30\x26\xb2\x75\x8e\x66\xcf\x11', 'asf'),
           (0, b'\xff\xf1', 'aac'), (0, b'\xff\xf9', 'aac'), (0, b'\x0b\x77', 'ac3'), (0, b'#!AMR', 'amr'),
           (0, b'wvpk', 'wv'), (0, b'TTA1', 'tta'), (0, b'MAC ', 'ape'), (8, b'WAVE', 'wav'), (0, b'riff', 'w64'),
           (8, b'AIFF', 'aiff'), (8, b'AIFC', 'aiff'), (0, b'.snd', 'au'), (0, b'caff', 'caf'), (0, b'fLaC', 'flac'),
           (0, b'OggS', 'ogg'), (0, b'NIST_1A', 'nistsphere'))
ONLY_FFMPEG = ('mov', 'matroska', 'asf', 'aac', 'ac3', 'amr', 'wv', 'tta', 'ape')      # soundfile knows the others
# Files of chunks: where the first one begins; in each where its name, its size and its content begin, and where the
# size ends; byte order; chunks begin at multiples of; how much of the header the size counts.
CHUNKS = {b'RIFF': (12, 0, 4, 8, 8, 'little', 2, 0), b'RIFX': (12, 0, 4, 8, 8, 'big', 2, 0),
          b'RF64': (12, 0, 4, 8, 8, 'little', 2, 0), b'FORM': (12, 0, 4, 8, 8, 'big', 2, 0),
          b'caff': (8, 0, 4, 12, 12, 'big', 1, 0), b'riff': (40, 0, 16, 24, 24, 'little', 8, 24),
          b'ftyp': (0, 4, 0, 4, 8, 'big', 1, 8)}
SOUND = (b'data', b'SSND', b'BODY', b'mdat')        # the chunks that hold the samples
MAX_CHUNKS = 100_000
MAX_JUNK = 1 << 20                                  # bytes ahead of an mp3's first frame, or behind an Ogg's last page
KBITS = {(3, 1): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),       # (version, layer) of MPEG
         (3, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
         (2, 1): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}


def demuxer_of(content):
    """ffmpeg's name for the format, None if the first bytes are of none that is known."""
    return next((name for start, magic, name in FORMATS if content[start:start + len(magic)] == magic), None)


def missing_bytes(content):
    """How many bytes of sound a header promises beyond the file's end: a file that was cut short. 0 if it is whole, or
    if that cannot be told: a pipe writes sizes that no file has (0, or from 2 GiB to -1)."""
    if content[:4] == b'OggS':
        start = max(len(content) - MAX_JUNK, 0)
        last = max(start + content[start:len(content)].rfind(b'OggS'), 0)   # a page: 27 bytes, lengths, as many bytes
        count = int.from_bytes(content[last + 26:last + 27], 'big')
        return max(last + 27 + count + sum(content[last + 27:last + 27 + count]) - len(content), 0)
    if content[:4] == b'.snd':
        promised = [(int.from_bytes(content[4:8], 'big'), int.from_bytes(content[8:12], 'big'))]
    elif content[:7] == b'NIST_1A':
        fields = dict(re.findall(rb'(sample_count|channel_count|sample_n_bytes) -i (\d{1,12})', content[:1024]))
        is_plain = len(fields) == 3 and b'embedded' not in content[:1024]
        promised = [(1024, math.prod(map(int, fields.values())) if is_plain else 0)]
    else:
        promised = sound_chunks(content)
    return max([0, *(start + size - len(content) for start, size in promised if size <= MAX_FILE_BYTES and size)])


def sound_chunks(content):
    """Yield (start, bytes) of every chunk of sound, as the headers of a RIFF, AIFF, W64, CAF or MP4 file say."""
    kind = content[4:8] if content[4:8] == b'ftyp' else content[:4]
    if kind not in CHUNKS:
        return
    place, name_at, size_at, size_end, header, order, align, counted = CHUNKS[kind]
    for _ in range(MAX_CHUNKS):
        name = content[place + name_at:place + name_at + 4]
        size = int.from_bytes(content[place + size_at:place + size_end], order) - counted
        if kind == b'RF64' and name == b'data' and content[12:16] == b'ds64':
            size = int.from_bytes(content[28:36], order)                    # 64 bits, in the first chunk of RF64
        if len(name) < 4 or size < 0:                                       # the end, or MP4's marks 0 and 1
            return
        if name in SOUND:
            yield place + header, size
            if kind != b'ftyp':                                             # behind it there may be anything
                return
        place += -(-(header + size) // align) * align


def mp3_start(content):
    """Where the first of three MPEG frames in a row begins in the file's first MiB, None if there are none."""
    for match in re.finditer(rb'\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff]', content[:MAX_JUNK]):
        place = match.start()
        for _ in range(3):
            length = frame_length(content[place:place + 4])
            if not length:
                break
            place += length
        else:
            return match.start()
    return None


def frame_length(header):
    """Bytes of the MPEG frame (layer II or III) with this header of four bytes, 0 if it is none."""
    if len(header) < 4 or header[0] != 255 or header[1] < 0xe0:
        return 0
    version, layer = header[1] >> 3 & 3, header[1] >> 1 & 3                 # 3: MPEG-1, 2: -2, 0: -2.5; 1: III, 2: II
    kbits, rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer not in (1, 2) or not 0 < kbits < 15 or rate == 3:
        return 0
    hertz = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
    kbits = KBITS[(3, layer) if version == 3 else (2, 1)][kbits - 1]
    return (72 if version != 3 and layer == 1 else 144) * kbits * 1000 // hertz + (header[2] >> 1 & 1)
