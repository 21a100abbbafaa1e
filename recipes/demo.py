"""Ten classes of synthetic sounds, each a function of the sample times (n,) in seconds, a pitch in Hz and a generator
-> (n,) waveform; nothing is downloaded."""
import numpy as np

from audio import SAMPLE_RATE
from recipes.plan import Plan

clips = 4000            # number of clips
seed = 1                # which clips


def plan(settings):
    classes = list(SOUNDS)
    made = Plan(classes, lambda i: (synthesise, settings.seed, i), lambda i: f'{classes[i % len(classes)]}/{i:05d}',
                lambda i: i % len(classes))
    for i in range(settings.clips):
        made.add(i, 'test' if i % 5 == 4 - (i // 10) % 5 else 'train')
    return made


# --------------------------------------------------------------------------------------------------------------- sounds

def tone(t, pitch, rng):
    return np.sin(2 * np.pi * pitch * t)


def chirp(t, low, high):
    """Exponential sweep."""
    rate = np.log(high / low) / t[-1]
    return np.sin(2 * np.pi * low * (np.exp(rate * t) - 1) / rate)


def chirp_up(t, pitch, rng):
    return chirp(t, pitch, pitch * rng.uniform(1.3, 3))


def chirp_down(t, pitch, rng):
    return chirp(t, pitch * rng.uniform(1.3, 3), pitch)


def noise_bursts(t, pitch, rng):
    rate = rng.uniform(3, 12)
    return rng.standard_normal(len(t)) * ((t * rate + rng.random()) % 1 < rng.uniform(0.2, 0.6))


def am_tone(t, pitch, rng):
    return np.sin(2 * np.pi * pitch * t) * (1 + np.sin(2 * np.pi * rng.uniform(4, 25) * t)) / 2


def fm_tone(t, pitch, rng):
    rate = rng.uniform(4, 15)
    return np.sin(2 * np.pi * pitch * t + rng.uniform(0.05, 0.2) * pitch / rate * np.sin(2 * np.pi * rate * t))


def click_train(t, pitch, rng):
    period = int(SAMPLE_RATE / rng.uniform(8, 40))
    clicks = np.zeros(len(t))
    clicks[rng.integers(period)::period] = 1
    return 8 * np.convolve(clicks, rng.standard_normal(32) * np.exp(-np.arange(32) / 6), 'same')


def harmonic_buzz(t, pitch, rng):
    return sum(np.sin(2 * np.pi * k * pitch / 3 * t + rng.uniform(0, 6.3)) / k for k in range(1, 12))


def inharmonic_bell(t, pitch, rng):
    partials = pitch * np.array([0.56, 0.92, 1.19, 1.71, 2.0, 2.74, 3.76]) * rng.uniform(0.97, 1.03, 7)
    return sum(np.sin(2 * np.pi * p * t) * np.exp(-t * rng.uniform(3, 8) * (1 + i / 3)) for i, p in enumerate(partials))


def noise_sweep(t, pitch, rng):
    """Noise around a sweeping carrier: ring modulation of low-pass noise."""
    width = int(rng.uniform(10, 40))
    smooth = np.convolve(rng.standard_normal(len(t)), np.ones(width) / np.sqrt(width), 'same')
    return smooth * (chirp_up if rng.random() < 0.5 else chirp_down)(t, pitch, rng)


SOUNDS = {function.__name__: function for function in (tone, chirp_up, chirp_down, noise_bursts, am_tone, fm_tone,
                                                       click_train, harmonic_buzz, inharmonic_bell, noise_sweep)}


def synthesise(seed, i):
    """Clip i: 1.3 s of noise of random colour and level, with one sound at a random onset, length, pitch, level."""
    rng = np.random.default_rng([seed, i])
    sound = list(SOUNDS.values())[i % len(SOUNDS)]
    samples = 20720                                                         # 128 frames
    length = int(SAMPLE_RATE * rng.uniform(0.35, 1.2))
    start = rng.integers(samples - length + 1)
    wave = sound(np.arange(length) / SAMPLE_RATE, np.exp(rng.uniform(np.log(250), np.log(2200))), rng)
    ramp = np.minimum(1, np.minimum(np.arange(length), np.arange(length)[::-1]) / 160)
    wave = wave * ramp / (np.sqrt(np.mean(wave ** 2)) + 1e-9)
    background = np.fft.rfft(rng.standard_normal(samples))
    background *= (1 + np.arange(len(background))) ** -rng.uniform(0, 1.0)  # white to pink
    background = np.fft.irfft(background, samples)
    background /= np.sqrt(np.mean(background ** 2))
    background *= 10 ** (rng.uniform(-12, 6) / 20)                          # signal-to-noise ratio 12 to -6 dB
    background[start:start + length] += wave
    level = 10 ** (rng.uniform(-30, -12) / 20)
    return (background * level / np.sqrt(np.mean(background ** 2))).astype(np.float32)
