"""Export an encoder by torch.export, for use without this code.

    python -m tools.export --ckpt=out/demo/ckpt.pt --out=out/demo/encoder.pt2

    files = {'input.json': ''}                          # frames, window, mean, std, repeat: how to make spec
    encoder = torch.export.load('encoder.pt2', extra_files=files).module()
    rows, cls = encoder(spec)       # (B, rows, columns * D), (B, D) float32 of spec (B, frames, 128), of any B

spec is what data.log_mel makes: (log-mel - mean) / (2 std), 0 behind the sound's end. Settings are the names below.
"""
import json

import torch

import configurator
from checkpoints.opening import open_checkpoint
from engine import processes
from engine.errors import ConfigError
from engine.files import replacing
from model import Encoder
from scoring.features import states
from scoring.outputs import check_output

ckpt = ''               # the checkpoint
out = 'encoder.pt2'     # the file to write
layer = 0               # of this block (1, 2, ...); 0: the mean of all blocks' outputs


class Rows(torch.nn.Module):
    """spec (B, frames, 128) -> rows (B, rows, columns * D), cls (B, D), as tools.embeddings has them."""

    def __init__(self, encoder, layer):
        super().__init__()
        self.encoder, self.layer = encoder, layer

    def forward(self, spec):
        x, cls = states(self.encoder, spec, self.layer)
        return x.flatten(2), cls


def exported(loaded, layer):
    """-> torch.export.ExportedProgram of a checkpoint's encoder, in float32, for any number of clips."""
    encoder = Encoder(loaded.config).eval()                                 # without the forms of one machine
    encoder.load_state_dict(loaded.encoder.state_dict())
    spec = torch.zeros(2, loaded.spectrum['frames'], loaded.config.n_mels)
    with torch.no_grad():
        return torch.export.export(Rows(encoder, layer), (spec,), dynamic_shapes=({0: torch.export.Dim('clips')},))


def run(argv):
    settings = configurator.configure(__file__, argv)
    check_output(settings.out, '.pt2', settings.ckpt)
    loaded = open_checkpoint(settings.ckpt)
    if not 0 <= settings.layer <= loaded.config.n_layer:
        raise ConfigError(f'layer = {settings.layer}, but {settings.ckpt} has {loaded.config.n_layer} blocks')
    program = exported(loaded, settings.layer)
    with replacing(settings.out, 'wb') as f:
        torch.export.save(program, f, extra_files={'input.json': json.dumps(loaded.spectrum)})
    config = loaded.config
    print(f'{settings.out}: (B, {loaded.spectrum["frames"]}, {config.n_mels}) -> (B, '
          f'{loaded.spectrum["frames"] // config.patch_frames}, {config.n_mels // config.patch_size * config.n_embd}), '
          f'(B, {config.n_embd})')


if __name__ == '__main__':
    processes.main(run)
