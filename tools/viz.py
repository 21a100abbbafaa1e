"""Pictures of what a model does, each from a checkpoint or from the logs of real runs. Needs matplotlib.

    python -m tools.viz masks --ckpt=out/real/ckpt.pt --wav=dog.wav          # what each student sees of a clip
    python -m tools.viz maps --ckpt=out/real/ckpt.pt --wav=dog.wav           # both attention maps and their difference
    python -m tools.viz lambda --ckpt=out/real/ckpt.pt --dataset=esc10       # what lambda removes, layer by layer
    python -m tools.viz targets --ckpt=out/real/ckpt.pt --dataset=esc10      # targets beside predictions
    python -m tools.viz curves out/real out/b                                # training curves; where two runs part
    python -m tools.viz curves out/demo --reference=results/logs/demo.jsonl  # a run over one to compare with
    python -m tools.viz embeddings --ckpt=out/real/ckpt.pt --dataset=fsdd    # a labelled set in two dimensions
    python -m tools.viz learned --ckpt=out/demo/ckpt.pt                      # a run's curves, and nearest neighbours

Settings are the names below. Colours: viridis, cividis and PuOr, which colour-blind readers tell apart.
"""
import math
import os
import warnings

import numpy as np
import torch
import torch.nn.functional as F

import configurator
import data
from audio import SAMPLE_RATE, frames_in
from audio.clips import open_clips, open_test, read_meta
from audio.decoding import decode_file
from checkpoints.opening import open_checkpoint
from engine import processes
from engine.errors import CheckpointError, ConfigError, DataError
from engine.files import replacing
from engine.logs import history, log_of
from engine.randomness import torch_random
from scoring.features import features
from scoring.monitor import labelled_clips
from scoring.probes import standardised
from tools.embeddings import clips_of, load
from tools.reference import read_log, where_they_part, with_paths

ckpt = ''               # the checkpoint
wav = ''                # masks, maps: the sound, of which the first frames count
dataset = ''            # lambda, targets, embeddings: a prepared set; learned: '' for the run's own eval_dataset
data_dir = 'data'       # where prepared sets are
fold = ''               # embeddings: show this fold; '': the test split
logs = ''               # curves: log.jsonl files or their folders, separated by commas; may stand without its name
reference = ''          # curves: a log to compare with; '': the first of the logs
tolerance = 0.02        # curves: by how much of their value losses must differ to have parted
out = ''                # the picture; '': WHAT.png beside the checkpoint or the first log
layer = 0               # maps: the block, counted from 1; 0: the middle one
query = 'loudest'       # maps: the token that looks: cls, loudest (the patch with most energy) or a patch's index
clips = 64              # lambda, targets: clips to average over; embeddings: at most 16 times as many
seed = 1                # which masks, which clips

NARROW, WIDE = 7.0, 10.0        # inches; at 100 dots an inch both are readable at the width of a README
MAX_SHOWN = 1000                # frames of a clip beside others
QUIET = 0.25                    # the share of patches with least energy that counts as low-energy


# ------------------------------------------------------------------------------------------------------------- opening

def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise ConfigError('pictures need matplotlib: pip install matplotlib') from None
    matplotlib.use('Agg')
    matplotlib.rcParams.update({'font.size': 8, 'axes.titlesize': 8, 'figure.dpi': 100, 'text.parse_math': False,
                                'figure.constrained_layout.use': True, 'legend.frameon': False})
    warnings.filterwarnings('ignore', 'Glyph .* missing')                   # a name in a script that the font lacks
    from matplotlib import pyplot
    return pyplot


def save(figure, path):
    with replacing(path, 'wb') as f:
        figure.savefig(f, format='png')
    pyplot().close(figure)


def open_asda(path):
    """A pre-trained checkpoint with its decoder and teacher, ours or the authors' -> ASDA, its spectrum's settings"""
    loaded = open_checkpoint(path)
    if not loaded.pretrained:
        raise CheckpointError(f'{path} is fine-tuned and has no decoder: name a pre-trained checkpoint')
    return loaded.pretrained.eval(), loaded.spectrum


def open_differential(path):
    """A checkpoint whose heads have two maps -> encoder, its spectrum's settings"""
    loaded = open_checkpoint(path)
    config = loaded.config
    if not config.diff_lambda or config.cls_position != 'head':
        raise ConfigError(f'{path} has diff_lambda = {config.diff_lambda:g} and its CLS at the {config.cls_position}: '
                          'this picture needs two maps and the CLS first')
    return loaded.encoder.eval(), loaded.spectrum


def log_mels(clips, spectrum):
    """(clips, frames, 128), of each the first frames"""
    batch = data.OrderedBatches(clips, spectrum['frames'], len(clips))[0]
    return data.log_mel(batch['pcm'], batch['lengths'], **spectrum)


def real_log_mel(clips, i, spectrum, most):
    """(frames, 128) of one clip without padding, at most so many"""
    frames = min(int(frames_in(clips.length[i])), most)
    return log_mels(clips.select([i]), {**spectrum, 'frames': frames, 'repeat': False})[0]


def named_sound(settings):
    """The sound that --wav names, as clips"""
    if not settings.wav:
        raise ConfigError('this picture shows a sound: name it with --wav=FILE')
    return clips_of(decode_file(settings.wav), SAMPLE_RATE)


def some_clips(settings):
    """Clips of --dataset, drawn by the seed"""
    if not settings.dataset:
        raise ConfigError('this picture looks at a prepared set: name it with --dataset=NAME')
    found = open_clips([settings.dataset], settings.data_dir,
                       sorted(read_meta(os.path.join(settings.data_dir, settings.dataset))['splits']))
    chosen = np.random.default_rng(settings.seed).permutation(len(found))[:settings.clips]
    if len(chosen) < 2:
        raise DataError(f'{settings.dataset} has {len(found)} clips, this picture needs two or more')
    return found.select(np.sort(chosen))


def first_masks(settings, config, clips):
    """(clips, n_students, P) bool, True = masked: what the seed draws first"""
    return data.block_masks(clips, config.n_students, config.grid, config.mask_ratio, config.mask_block,
                            torch_random('cpu', settings.seed, 'mask', 0), config.mask_adjust)


def energies(spec, config):
    """(B, frames, 128) -> (B, P) mean of every patch"""
    return F.avg_pool2d(spec, (config.patch_frames, config.patch_size)).flatten(1)


def show(axis, picture, title='', config=None, **how):
    """A spectrogram (frames, 128), or values of patches (P,) at the size of one, time to the right."""
    image = picture.reshape(-1, config.grid[1]) if config else picture
    axis.imshow(np.asarray(image).T, origin='lower', aspect='auto', interpolation='nearest', **how)
    axis.set(xticks=[], yticks=[], title=title)


# ------------------------------------------------------------------------------------------------------------ pictures

def draw_masks(settings, plt):
    """A clip, and the patches that each of its students sees of it."""
    model, spectrum = open_asda(settings.ckpt)
    config, (spec,) = model.config, log_mels(named_sound(settings), spectrum)
    (mask,) = first_masks(settings, config, 1)                               # (n, P), True = masked
    columns = 4
    rows = 1 + -(-config.n_students // columns)
    figure = plt.figure(figsize=(WIDE, 0.95 * rows + 0.5))
    grid = figure.add_gridspec(rows, columns)
    show(figure.add_subplot(grid[0, :]), spec, f'{os.path.basename(settings.wav)}: {config.frames / 100:g} s, '
         f'{config.grid[0]} x {config.grid[1]} patches; the teacher sees all')
    for n, hidden in enumerate(mask.view(-1, *config.grid)):
        hidden = hidden.repeat_interleave(config.patch_frames, 0).repeat_interleave(config.patch_size, 1)
        show(figure.add_subplot(grid[1 + n // columns, n % columns], facecolor='0.85'),
             spec.masked_fill(hidden, math.nan), f'student {n + 1}: {int((~mask[n]).sum())} of {mask.shape[1]}',
             vmin=float(spec.min()), vmax=float(spec.max()))
    return figure, f'{config.n_students} students see {int((~mask[0]).sum())} of {mask.shape[1]} patches each'


def attention_maps(encoder, spec):
    """Per block, both softmax maps of every head, by the weights that the block uses. -> [(B, 2, h, 1 + P, 1 + P)]"""
    h, found = encoder.config.n_head, []

    def note(attention, inputs, _):
        (x,) = inputs
        B, N, D = x.shape
        q, k = attention.qk(x).view(B, N, 2, 2, h, D // h).permute(2, 0, 3, 4, 1, 5)         # (B, 2, h, N, d) each
        found.append((q @ k.mT / math.sqrt(D // h)).softmax(dim=-1))
    hooks = [block.attn.register_forward_hook(note) for block in encoder.blocks]
    with torch.no_grad():
        encoder(spec)
    for hook in hooks:
        hook.remove()
    return found


def draw_maps(settings, plt):
    """For one token: where each head's two maps look, their difference, and what the difference cancels."""
    encoder, spectrum = open_differential(settings.ckpt)
    config, clips = encoder.config, named_sound(settings)
    spec, columns = log_mels(clips, spectrum), config.grid[1]
    rows = -(-len(real_log_mel(clips, 0, spectrum, spectrum['frames'])) // config.patch_frames)
    energy = energies(spec, config)[0, :rows * columns]
    named = {'cls': 0, 'loudest': 1 + int(energy.argmax())}
    token = named.get(settings.query, 1 + int(settings.query) if settings.query.isdecimal() else -1)
    number = settings.layer or (config.n_layer + 1) // 2
    if not 0 <= token <= spec.shape[1] // config.patch_frames * columns or number > config.n_layer:
        raise ConfigError(f'query = {settings.query!r} is neither cls, loudest nor a patch, or layer = {number} is not '
                          f'one of {config.n_layer}')
    first, second = attention_maps(encoder, spec)[number - 1][0, :, :, token, 1:1 + rows * columns]     # (h, P) each
    second, both = config.diff_lambda * second, f'{config.diff_lambda:g} A2'
    cancelled = torch.minimum(first, second)
    pictures = (('A1', first, 0, 'viridis'), (both, second, 0, 'viridis'),
                (f'A1 - {both}', first - second, -1, 'PuOr_r'),
                ('cancelled: the smaller of both', cancelled, 0, 'viridis'))
    figure, axes = plt.subplots(1 + config.n_head, 4, figsize=(WIDE, 0.75 * (1 + config.n_head) + 0.4), squeeze=False)
    for axis in axes[0, 1:]:
        axis.remove()
    name = 'CLS' if not token else f'the framed patch ({token - 1})'
    show(axes[0, 0], spec[0, :rows * config.patch_frames], f'block {number} of {config.n_layer}: where {name} looks')
    if token:
        wide, high, (row, column) = config.patch_frames, config.patch_size, divmod(token - 1, columns)
        axes[0, 0].add_patch(plt.Rectangle((row * wide, column * high), wide, high, fill=False, color='white', lw=1.5))
    for head, line in enumerate(axes[1:]):
        top = float(first[head].max())
        for axis, (title, values, low, colours) in zip(line, pictures):
            show(axis, values[head], '' if head else title, config, cmap=colours, vmin=low * top, vmax=top)
        line[0].set_ylabel(f'head {head + 1}')
    share = float(cancelled.sum() / first.sum())
    return figure, f'block {number}, {name}: the difference cancels {share:.1%} of what A1 gives to patches'


def draw_lambda(settings, plt):
    """Per block: the entropy of A1, A2 and of what their difference keeps, and the attention on low-energy patches."""
    encoder, spectrum = open_differential(settings.ckpt)
    config, spec = encoder.config, log_mels(some_clips(settings), spectrum)
    energy = energies(spec, config)
    quiet = (energy <= energy.quantile(QUIET, dim=1, keepdim=True)).float()                 # (B, P)

    def measures(maps):                                             # (B, h, N, P)
        share = maps / maps.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        entropy = -(share * share.clamp_min(1e-12).log()).sum(dim=-1).mean() / math.log(share.shape[-1])
        return float(entropy), float((share * quiet[:, None, None]).sum(dim=-1).mean())
    table = []
    for pair in attention_maps(encoder, spec):
        first, second = pair[..., 1:].unbind(dim=1)                 # onto patches
        kept = (first - config.diff_lambda * second).clamp_min(0)
        table.append([measures(maps) for maps in (first, second, kept)])
    table = np.array(table)                                         # (L, 3 kinds, 2 measures)
    figure, axes = plt.subplots(1, 2, figsize=(WIDE, 2.8))
    where = np.arange(1, config.n_layer + 1)
    kinds = (('A1', 'o-', 0.0), ('A2', 's--', 0.45), (f'what A1 - {config.diff_lambda:g} A2 keeps', '^-.', 0.85))
    for measure, (axis, title) in enumerate(zip(axes, ('entropy / log P (1: looks everywhere alike)',
                                                       f'share on the {QUIET:.0%} of patches with least energy'))):
        for kind, (name, style, colour) in enumerate(kinds):
            axis.plot(where, table[:, kind, measure], style, color=plt.cm.cividis(colour), label=name)
        axis.set(title=title, xlabel='block', xticks=where)
    axes[1].axhline(QUIET, color='0.6', lw=0.8, ls=':')
    axes[0].legend()
    said = '; '.join(f'block {i}: {first[1]:.1%} -> {kept[1]:.1%}' for i, (first, _, kept) in zip(where, table))
    return figure, f'attention on low-energy patches, A1 -> kept: {said}'


def draw_targets(settings, plt):
    """First principal components of the targets of one clip, of what its students predict at the places that they do
    not see, and of the mean target of each place over clips."""
    model, spectrum = open_asda(settings.ckpt)
    config, spec = model.config, log_mels(some_clips(settings), spectrum)
    shown = int(energies(spec, config).var(dim=1).argmax())                 # a clip with loud and quiet patches
    mask = first_masks(settings, config, len(spec))[shown]                  # (n, P)
    with torch.inference_mode():
        target, _ = model.targets(spec)                                     # (B, P, D)
        keep = (~mask).nonzero()[:, 1].view(config.n_students, -1)
        x = model.encoder(spec[shown:shown + 1], keep)
        prediction = model.decoder(x[:, 1:], keep, torch.zeros(*mask.shape, config.n_embd))         # (n, P, D)
    hidden = mask.float()[:, :, None]
    prediction = (prediction * hidden).sum(dim=0) / hidden.sum(dim=0).clamp_min(1)      # mean of who did not see it
    place, mean = target.mean(dim=0), target.mean(dim=(0, 1))               # (P, D), (D,)
    basis = torch.linalg.svd((target - mean).flatten(0, 1), full_matrices=False)[2][:3]     # (3, D)
    figure, axes = plt.subplots(3, 4, figsize=(WIDE, 3.6))
    show(axes[0, 0], spec[shown], 'log-mel')
    for axis in axes[1:, 0]:
        axis.remove()
    top = ((target[shown] - mean) @ basis.T).abs().amax(dim=0).tolist()
    for line, (title, values) in zip(axes, (('target', target[shown]), ('prediction where masked', prediction),
                                            ('mean target of each place', place))):
        for i, (axis, component) in enumerate(zip(line[1:], ((values - mean) @ basis.T).T)):
            show(axis, component, f'{title}, component {i + 1}', config, cmap='PuOr', vmin=-top[i], vmax=top[i])
    error = (prediction - target[shown]).square().sum(dim=1)
    beyond = 1 - float(error.mean() / (target[shown] - place).square().sum(dim=1).mean())
    return figure, f'of this clip, beyond the mean target of each place, {beyond:.1%} is predicted ({len(spec)} clips)'


# -------------------------------------------------------------------------------------------------------------- curves

def draw_curves(settings, plt):
    """Loss, explained and content share, and probes, of several runs against updates and against time."""
    paths = [log_of(path) for path in configurator.words(settings.logs)]
    if not paths:
        raise ConfigError('name the logs to draw: curves out/a out/b, or --logs=out/a,out/b')
    if settings.reference:
        paths = [log_of(settings.reference), *paths]
    runs = [read_log(path) for path in paths]
    names = [path.removesuffix('.jsonl').removesuffix('/log') for path in paths]
    panels = [('loss', ['loss']), ('share of the variance', ['explained', 'content']),
              ('accuracy', ['knn', 'probe', 'knn_cls', 'valid accuracy', 'valid mAP'])]
    panels = [panel for panel in panels if any(name in series for name in panel[1] for _, series, _ in runs)]
    figure, axes = plt.subplots(2, len(panels), figsize=(WIDE, 4.2), squeeze=False)
    for run, (path, (_, series, seconds)) in enumerate(zip(names, runs)):
        how = {'color': '0.7', 'lw': 3} if settings.reference and run == 0 else {
            'color': plt.cm.viridis(0.85 * run / max(len(runs) - 1, 1)), 'lw': 1.2}
        for (title, measures), over_updates, over_time in zip(panels, *axes):
            drawn = list(zip(('-', '--', ':', '-.'), [name for name in measures if any(name in s for _, s, _ in runs)]))
            for style, name in drawn:
                steps, values = series.get(name, ([], []))
                over_updates.plot(steps, values, style, label=path if style == '-' else '', **how)
                over_time.plot([seconds.get(step, math.nan) / 60 for step in steps], values, style, **how)
            if not run and [name for _, name in drawn] != [title]:          # lines are measures, colours are runs
                over_time.legend(handles=[plt.Line2D([], [], color='black', linestyle=style,
                                                     label=name.replace('_', ' ')) for style, name in drawn])
            over_updates.set(title=title, xlabel='updates')
            over_time.set_xlabel('minutes')
        axes[0, 0].legend(fontsize=6)
    said = [f'{names[0]} / {name}: {where_they_part(runs[0], run, settings.tolerance)}'
            for name, run in zip(names[1:], runs[1:])]
    return figure, '\n'.join(said) or f'{names[0]}: {", ".join(sorted(runs[0][1]))}'


def draw_embeddings(settings, plt):
    """A labelled set in two dimensions: t-SNE where scikit-learn is installed, else two principal components."""
    model, test = load(settings.ckpt, device='cpu'), open_test(settings.dataset, settings.data_dir, settings.fold)
    if test.multi_label:
        raise DataError(f'{settings.dataset} has several labels a clip: this picture needs one')
    chosen = np.random.default_rng(settings.seed).permutation(len(test))[:16 * settings.clips]
    test = test.select(np.sort(chosen))
    (found,) = standardised(model.clips(test))
    try:
        from sklearn.manifold import TSNE
        how, flat = 't-SNE', TSNE(perplexity=min(30, (len(test) - 1) / 3), random_state=settings.seed,
                                  init='pca').fit_transform(found)
    except ImportError:
        basis = np.linalg.svd(found, full_matrices=False)[2][:2]
        how, flat = 'principal components', found @ basis.T
    figure, axis = plt.subplots(figsize=(NARROW, 4.6))
    markers = 'os^vDP*X<>'
    for label, name in enumerate(test.classes):
        of_class = test.label == label
        axis.scatter(*flat[of_class].T, s=14, marker=markers[label % len(markers)],
                     color=plt.cm.viridis(label / max(len(test.classes) - 1, 1)), label=name, edgecolors='none')
    axis.set(xticks=[], yticks=[], title=f'{len(test)} clips of {settings.dataset}: {how} of the frozen features')
    if len(test.classes) <= 20:
        axis.legend(loc='center left', bbox_to_anchor=(1, 0.5))
    return figure, f'{len(test)} clips, {len(test.classes)} classes, {how}'


def draw_learned(settings, plt):
    """What a run has learned: its curves over what it began with and log-mel statistics, and for held-out clips of
    three classes, drawn by the seed, the training clips whose standardised frozen features have the largest cosine."""
    loaded = open_checkpoint(settings.ckpt)
    name, on_gpu = settings.dataset or loaded.settings.get('eval_dataset', ''), torch.cuda.is_available()
    process = processes.Process(0, 1, torch.device(                         # one of several processes may call this
        'cuda' if loaded.settings.get('device') == 'cuda' and on_gpu else 'cpu'))
    labelled = labelled_clips(name, settings.data_dir, loaded.settings.get('seed', 1), process)
    if not labelled:
        raise ConfigError(f'{settings.ckpt} had no labelled set to compare with: name one with --dataset=NAME')
    train, valid = labelled
    spectrum = {**loaded.spectrum, **dict(zip(('mean', 'std'), train.statistics(loaded.spectrum['window'])))}
    autocast, _ = processes.autocast(process, 'auto', loaded.config.n_embd)
    order = np.random.default_rng(settings.seed).permutation(len(valid))
    asked = valid.select(order[np.sort(np.unique(valid.label[order], return_index=True)[1])[:3]])
    encoder = loaded.encoder.to(process.device).eval()
    known, found = (F.normalize(torch.from_numpy(x), dim=1) for x in standardised(*(
        features(encoder, part, spectrum, process, autocast) for part in (train, asked))))
    similarity, nearest = (found @ known.T).topk(min(3, len(train)), dim=1)     # (asked, 3)

    figure = plt.figure(figsize=(WIDE, 4.6))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2.6))
    draw_course(left, os.path.dirname(settings.ckpt), name, plt)
    axes = right.subplots(len(asked), 1 + nearest.shape[1], squeeze=False)
    for row, line in enumerate(axes):
        line[0].spines[:].set_linewidth(2.5)
        show_clip(line[0], asked, row, spectrum, f'held out: {asked.classes[asked.label[row]]}')
        for axis, i, cosine in zip(line[1:], nearest[row].tolist(), similarity[row].tolist()):
            sign = '\N{HEAVY CHECK MARK}' if train.label[i] == asked.label[row] else '\N{BALLOT X}'
            show_clip(axis, train, i, spectrum, f'{sign} {train.classes[train.label[i]]}  {cosine:.2f}')
    right.suptitle('held-out clips and the training clips nearest to them (cosine of frozen features)', fontsize=9)
    same = int((train.label[nearest.numpy()] == asked.label[:, None]).sum())
    return figure, (f'picture: of {nearest.numel()} neighbours of {len(asked)} held-out {name} clips {same} are of '
                    "their clip's class")


def draw_course(figure, out_dir, name, plt):
    """Loss, content and scores of a run against updates, one below another."""
    measured, began = history(out_dir, name)
    panels = [panel for panel in (('loss', 'loss'), ('content', 'content, % beyond the place'),
                                  ('probe', 'linear probe, %'), ('knn', '10 nearest neighbours, %'))
              if panel[0] in measured]
    if not panels:
        raise DataError(f'{out_dir}/log.jsonl is not the log of a run: it has no steps')
    for axis, (measure, title) in zip(figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels):
        scale = 1 if measure == 'loss' else 100
        steps, values = zip(*sorted(measured[measure].items()))
        axis.plot(steps, scale * np.array(values), 'o-' if len(values) < 20 else '-', color=plt.cm.viridis(0.25), ms=3)
        axis.set_title(title, loc='left')
        for rival, style, values in ((began, '--', measured[measure]), (
                'log-mel statistics', ':', measured.get(f'{name}_log_mel_{measure}', {}))):
            if 0 in values and measure != 'loss':
                axis.axhline(scale * values[0], ls=style, color='0.3', lw=1.2, label=rival)
        if measure == 'content':
            axis.set_ylim(bottom=max(axis.get_ylim()[0], -25))              # it begins far below, which says nothing
        axis.spines[['top', 'right']].set_visible(False)
    axis.set_xlabel('updates')
    figure.legend(*axis.get_legend_handles_labels(), loc='outside lower center', fontsize=7, ncols=2)


def show_clip(axis, clips, i, spectrum, title):
    """The log-mel of one clip, its first ten seconds at most, in colour from its median up: background is flat."""
    spec = real_log_mel(clips, i, spectrum, MAX_SHOWN)
    show(axis, spec, title, vmin=float(spec.median()))


PICTURES = {'masks': draw_masks, 'maps': draw_maps, 'lambda': draw_lambda, 'targets': draw_targets,
            'curves': draw_curves, 'embeddings': draw_embeddings, 'learned': draw_learned}


def run(argv):
    what, *rest = argv or ['--help']
    rest = with_paths(rest, 'logs') if what == 'curves' else rest
    settings = configurator.configure(__file__, rest if what in PICTURES else ['--help'] if what in ('-h', '--help')
                                      else argv)
    if what not in PICTURES:
        raise ConfigError(f'{what!r} is no picture: it is one of {", ".join(PICTURES)}')
    configurator.check_ranges(settings, layer=(0, 1000), clips=(2, 1e5), seed=(0, 2 ** 32 - 1), tolerance=(0, 1e3))
    beside = log_of((configurator.words(settings.logs) or [''])[0]) if what == 'curves' else settings.ckpt
    path = settings.out or os.path.join(os.path.dirname(beside), f'{what}.png')
    if not path.endswith('.png'):
        raise ConfigError(f'out = {path!r} must end in .png')
    plt = pyplot()
    figure, said = PICTURES[what](settings, plt)
    save(figure, path)
    print(f'{said}\n{path}')


if __name__ == '__main__':
    processes.main(run)
