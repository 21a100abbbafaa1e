"""What a pre-training has learned, in words and in a picture, and what to type next."""
import os
import shlex
import textwrap

import configurator
from audio.clips import read_meta
from engine.errors import ROOT
from engine.logs import history


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
