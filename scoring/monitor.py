"""How pre-training goes, in numbers that a falling loss does not have: what can be read off the frozen features; and
what it has learned, in words."""
import os
import shlex
import textwrap

import numpy as np
import torch

import configurator
from audio import frames_in
from audio.clips import carve_validation, open_clips, open_test, read_meta
from engine.errors import ROOT
from engine.logs import lines_of
from engine.randomness import random
from model import MAX_FRAMES
from scoring.features import feature_batches, log_mel_statistics
from scoring.probes import effective_rank, in_float64, knn_accuracy, linear_probe

CLIPS = 2000                    # of the labelled set, at most
PROBE_L2 = (0.1,)               # one strength, that it takes little time


def labelled_clips(name, data_dir, seed, process):
    """(train, valid) clips of the training split of a labelled set, or, of SET/FOLD, without and of that fold (a
    speaker, 1 to 5, ...); None, and a line that says why, if it is not for a kNN accuracy, or without a name. Raises
    DataError for a set that is not there."""
    if not name:
        return None
    name, _, fold = name.partition('/')
    test = open_test(name, data_dir, fold) if fold else None                # its error speaks of the fold
    clips = open_clips([name], data_dir, ['train'], [f'{name}/{fold}'] if fold else [])
    if clips.multi_label or not clips.classes:
        process.print(f'no kNN accuracy: {name} has {"several labels a clip" if clips.multi_label else "no labels"}')
        return None

    def some(clips):
        return clips.select(random(seed, 'few_labels').permutation(len(clips))[:CLIPS])
    clips = clips.select(clips.label >= 0)
    train, valid = (some(clips), some(test)) if fold else carve_validation(some(clips), 0.3)
    if not len(train) or not len(valid):
        process.print(f'no kNN accuracy: {name} has too few clips')
        return None
    return train, valid


def watch(run, labelled, spectrum, autocast):
    """Print and log what is read off the features of a run's student; at its beginning, with random weights, also off
    log-mel statistics: what training has to beat."""
    settings, encoder, (train, valid) = run.settings, run.model.encoder, labelled
    mean, std = train.statistics(spectrum['window'])
    how = {**spectrum, 'mean': mean, 'std': std}
    name = settings.eval_dataset
    if not run.done:
        frames = min(int(frames_in(np.r_[train.length, valid.length]).max()), MAX_FRAMES)
        longest = {**how, 'frames': frames, 'repeat': False}
        scores = read_off(*(log_mel_statistics(part, longest, run.process, workers=settings.workers)
                            for part in labelled), *labelled)
        run.process.print(f'{name}, log-mel statistics: kNN {scores["knn"]:.1%}, linear probe {scores["probe"]:.1%}')
        run.note({}, **{f'{name}_log_mel_{probe}': score for probe, score in scores.items()})
    scores = monitor(encoder, labelled, how, run.process, autocast, settings.workers)
    run.process.print(f'{name}, step {run.done:,}: kNN {scores["knn"]:.1%}, linear probe {scores["probe"]:.1%} (chance '
                      f'{scores["chance"]:.1%}); CLS: kNN {scores["knn_cls"]:.1%}, effective rank '
                      f'{scores["effective_rank"]:.1f} of {encoder.config.n_embd}')
    run.note(scores, **scores)


def monitor(encoder, labelled, spectrum, process, autocast, workers):
    """Scores of the encoder's frozen features from train to valid clips: kNN and linear probe of the bands, kNN and
    effective rank of the CLS. spectrum: what data.log_mel is told."""
    found = []
    for part in labelled:
        batches = feature_batches(encoder, part, spectrum, process, autocast, ['bands', 'cls'], workers=workers)
        found.append([np.concatenate(parts) for parts in zip(*((rows['bands'], rows['cls']) for _, rows in batches))])
    (x, x_cls), (t, t_cls) = found
    train, valid = labelled
    return {**read_off(x, t, train, valid, in_float64(process.device)),
            'knn_cls': knn_accuracy(x_cls, train.label, t_cls, valid.label),
            'chance': float((valid.label == torch.from_numpy(valid.label).mode().values.item()).mean()),
            'effective_rank': effective_rank(t_cls)}


def read_off(x, t, train, valid, device='cpu'):
    """kNN and linear probe from features x of train to t of valid clips."""
    targets = train.targets(np.arange(len(train)))
    logits, _ = linear_probe((x, targets), t, False, strengths=PROBE_L2, device=device)
    return {'knn': knn_accuracy(x, train.label, t, valid.label, device=device),
            'probe': float((logits.argmax(axis=1) == valid.label).mean())}


# -------------------------------------------------------------------------------------------------------------- the end

def conclude(settings):
    """The last lines of a pre-training, for the main process alone: what was learned, in words and, if the frozen
    features were scored and matplotlib is installed, in a picture; and what to type next."""
    said, is_scored = what_was_learned(settings.out_dir, settings.eval_dataset)
    said = [textwrap.fill(line, 99, subsequent_indent=' ' * 9, break_on_hyphens=False) for line in said]
    print('\n'.join([f'done:    {settings.out_dir}/ckpt.pt', *said]), flush=True)
    drawing = ['learned', f'--ckpt={settings.out_dir}/ckpt.pt', f'--data_dir={settings.data_dir}']
    if is_scored:
        try:
            from tools import viz
            viz.run(drawing)
        except Exception as error:                                          # a run does not fail for want of a picture
            print(f'no picture ({" ".join(str(error).split())[:150]}); to draw it later: '
                  f'{shlex.join(["python", "-m", "tools.viz", *drawing])}')
    print(what_next(settings), flush=True)


def history(out_dir, name):
    """What a run's log.jsonl says, over all its starts -> {measure: {step: value}}, scores being those on the labelled
    set of that name; what the weights of step 0 are, in words."""
    found, scored_on, began = {}, None, None
    for line in lines_of(out_dir):
        if 'settings' in line:
            scored_on = line['settings'].get('eval_dataset')
            began = began or (f'the weights of {line["settings"]["init"]}' if line['settings'].get('init') else
                              'random weights')
        if 'step' in line and (scored_on == name or 'chance' not in line):
            for measure, value in line.items():
                if isinstance(value, int | float):                          # null: it was not finite
                    found.setdefault(measure, {})[line['step']] = value
    return found, began


def what_was_learned(out_dir, name):
    """Lines in plain words of what a run's log has at its last step, beside step 0 and log-mel statistics, and whether
    it has scores there. What was not measured is not said."""
    found, began = history(out_dir, name)
    last = max(found.get('step', [0]))
    end = {measure: values[last] for measure, values in found.items() if last in values}
    said, lost = [], False
    if 'content' in end and 'place' in end:
        said.append(f'the place of a patch tells {end["place"]:.1%} of what the teacher says of it; of the rest the '
                    f'students predict {end["content"]:.1%} (0%: the place alone)')
    for measure, what in (('probe', f'a linear probe of the frozen features names {{:.1%}} of held-out {name} clips'),
                          ('knn', 'their ten nearest neighbours name {:.1%}')):
        if measure not in end:
            continue
        rivals = {began: found[measure].get(0) if last else None,
                  'log-mel statistics': found.get(f'{name}_log_mel_{measure}', {}).get(0), 'chance': end['chance']}
        beside = [f'{"above" if end[measure] > share else "below" if end[measure] < share else "level with"} '
                  f'{rival} ({share:.1%})' for rival, share in rivals.items() if share is not None]
        said.append(f'{what.format(end[measure])}: {", ".join(beside)}')
        lost |= any(share is not None and end[measure] < share for share in rivals.values())
    if lost:
        said.append('below: for these sounds that was no gain yet; train longer (--max_steps) or on more sounds')
    return [f'{"" if i else "learned:":8} {line}' for i, line in enumerate(said)], 'probe' in end


def what_next(settings):
    """What to type after pre-training."""
    name = settings.eval_dataset.partition('/')[0] or configurator.words(settings.dataset)[0]
    if not read_meta(os.path.join(settings.data_dir, name))['classes']:
        return f'next:    python eval.py --ckpt={settings.out_dir}/ckpt.pt --dataset={name} --embed=embeddings.npz'
    lines = [f'next:    python eval.py --ckpt={settings.out_dir}/ckpt.pt --dataset={name}      # kNN and linear probe']
    config = f'config/finetune_{name}.py'
    if os.path.exists(os.path.join(ROOT, config)):
        lines.append(f'         python finetune.py {config} --ckpt={settings.out_dir}/ckpt.pt')
    return '\n'.join(lines)
