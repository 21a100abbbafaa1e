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
from engine import processes
from engine.files import replacing
from model import Encoder
from scoring.features import states
from scoring.outputs import check_output
from tools.embeddings import load

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


def run(argv):
    settings = configurator.configure(__file__, argv)
    check_output(settings.out, '.pt2', settings.ckpt)
    model = load(settings.ckpt, layer=settings.layer, device='cpu')
    config = model.encoder.config
    encoder = Encoder(config).eval()                                        # without the forms of one machine
    encoder.load_state_dict(model.encoder.state_dict())
    spec, any_number = torch.zeros(2, config.frames, config.n_mels), {0: torch.export.Dim('clips')}
    with torch.no_grad():
        program = torch.export.export(Rows(encoder, settings.layer), (spec,), dynamic_shapes=(any_number,))
    with replacing(settings.out, 'wb') as f:
        torch.export.save(program, f, extra_files={'input.json': json.dumps(model.spectrum)})
    print(f'{settings.out}: (B, {config.frames}, {config.n_mels}) -> (B, {config.grid[0]}, {model.row_size}), '
          f'(B, {config.n_embd})')


if __name__ == '__main__':
    processes.main(run)
