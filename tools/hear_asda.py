"""The common interface of HEAR 2021 (Turian et al., "HEAR: Holistic Evaluation of Audio Representations", PMLR 176).

    PYTHONPATH=. hear-validator tools.hear_asda --model out/demo/ckpt.pt

https://hearbenchmark.com/hear-api.html; scene embeddings are pooled by 'bands', time-stamped ones are a
patch apart, 160 ms as a rule.
"""
import torch

from audio import SAMPLE_RATE
from engine.errors import DataError
from tools.embeddings import load


class Model(torch.nn.Module):
    """sample_rate 16000; scene_embedding_size, timestamp_embedding_size: numbers of an embedding."""

    def __init__(self, path):
        super().__init__()
        self.embedder = load(path)
        self.encoder = self.embedder.encoder                                # what .to(device) moves
        self.sample_rate = SAMPLE_RATE
        self.scene_embedding_size, self.timestamp_embedding_size = self.embedder.clip_size, self.embedder.row_size


def load_model(model_file_path=''):
    """A checkpoint of any origin -> Model. Raises CheckpointError, ConfigError."""
    return Model(model_file_path)


def get_scene_embeddings(audio, model):
    """audio (n_sounds, n_samples) float in [-1, 1] at 16 kHz -> (n_sounds, scene_embedding_size) float32, on its
    device. Raises DataError, CheckpointError."""
    return torch.from_numpy(model.embedder.clips(samples(audio, model))).to(audio.device)


def get_timestamp_embeddings(audio, model):
    """audio as above -> embeddings (n_sounds, n_timestamps, timestamp_embedding_size) float32, and the milliseconds
    (n_sounds, n_timestamps) float32 of their centres: 87.5, 247.5, ... Raises DataError, CheckpointError."""
    rows, seconds = model.embedder.rows(samples(audio, model))
    return torch.from_numpy(rows).to(audio.device), torch.from_numpy(1000 * seconds).float().to(audio.device)


def samples(audio, model):
    """Check the audio; let the embedder compute where the encoder is now. -> array"""
    if audio.ndim != 2 or not audio.is_floating_point():
        raise DataError(f'audio is {audio.dtype} {tuple(audio.shape)}: it must be float (n_sounds, n_samples)')
    model.eval()
    model.embedder.process.device = next(model.encoder.parameters()).device
    return audio.detach().float().cpu().numpy()
