"""Where sound comes from: folders, archives, downloads, decoding; and the prepared sets that the stages read.

The units of all of it stand here. This folder must not know the network.
"""

SAMPLE_RATE = 16000
WINDOW_SAMPLES = 400        # 25 ms
HOP_SAMPLES = 160           # 10 ms
N_MELS = 128
WINDOWS = ('hamming', 'hanning')


def frames_in(samples):
    """Frames of a clip of that many samples (kaldi's snip_edges); works on numbers and tensors."""
    return (samples - WINDOW_SAMPLES) // HOP_SAMPLES + 1


def samples_for(frames):
    """The fewest samples that give so many frames."""
    return (frames - 1) * HOP_SAMPLES + WINDOW_SAMPLES
