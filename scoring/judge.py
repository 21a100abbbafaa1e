"""A classifier's head that begins as a linear probe; the checkpoint that the validation part chooses, and what the test
split says of it and of the last one."""
import math
import os

import numpy as np
import torch

from engine import processes, saving
from scoring.features import over_clips, predict
from scoring.metrics import describe, metrics
from scoring.probes import fit_logistic

PROBE_L2 = 0.1                  # of the head that begins as a probe


class Judge:
    """Of a fine-tuning run (engine.run.Run) and its validation and test clips, either labelled."""

    def __init__(self, run, spectrum, valid, test):
        self.run, self.spectrum, self.valid, self.test_clips = run, spectrum, valid, test

    def score(self, clips, title):
        """Metrics of the model as it is, in the precision that eval.py takes by itself: both say the same."""
        process = self.run.process
        autocast, _ = processes.autocast(process, 'auto')
        logits = predict(self.run.model, clips, self.spectrum, process, autocast, workers=self.run.settings.workers,
                         title=title)
        return metrics(logits, clips.targets(np.arange(len(clips))), clips.multi_label)[0]

    def choose(self):
        """Log a validation, and write best.pt if none before was better: of equals the later has seen more."""
        run, scores = self.run, self.score(self.valid, 'validation')
        run.process.print(f'step {run.done:,}: validation {describe(scores)}')
        run.note(scores, valid=scores)
        if main_score(scores) >= run.kept['best']:
            run.kept['best'] = main_score(scores)
            run.save('best.pt', keep=1)

    def test(self):
        """{'last': scores, 'best': scores} on the test split, by the checkpoints of these names; of a finished run that
        is resumed, those that its log has."""
        run, process = self.run, self.run.process
        paths = {'last': os.path.join(run.settings.out_dir, 'ckpt.pt')}
        if len(self.valid):
            paths['best'] = os.path.join(run.settings.out_dir, 'best.pt')
        results = run.logged('test')
        if not results or results.keys() != paths.keys():
            results = {'last': self.score(self.test_clips, 'test')}
            if 'best' in paths:
                process.gather(None)                                        # it is whole before the others read it
                saving.load_weights(run.model, saving.load_checkpoint(paths['best'])['model'], paths['best'])
                results['best'] = self.score(self.test_clips, 'test')
            run.note({}, test=results)
        for name, scores in results.items():
            process.print(f'test, {name} checkpoint ({paths[name]}): {describe(scores)}')
        return results


def begin_as_probe(classifier, clips, spectrum, process, autocast, workers=0):
    """Give the head the weights of a linear probe of what it sees of the training clips: fine-tuning begins where
    probing ends (Kumar et al., "Fine-Tuning can Distort Pretrained Features", ICLR 2022)."""
    seen = []
    hook = classifier.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        classifier.eval()
        _, x = over_clips(lambda spec, *_: (classifier(spec), seen.pop()), clips, spectrum, process,
                          autocast, workers=workers, title='probe')
    finally:
        hook.remove()
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-6
    weight = fit_logistic((x - mean) / std, clips.targets(np.arange(len(clips))), PROBE_L2, clips.multi_label)
    scaled = weight[1:] / torch.from_numpy(std)[:, None]                    # for what is not standardised
    with torch.no_grad():
        classifier.head.weight.copy_(scaled.T)
        classifier.head.bias.copy_(weight[0] - torch.from_numpy(mean).double() @ scaled)


def main_score(scores):
    """The number that chooses; of none, NaN, the lowest."""
    score = scores['mAP'] if 'mAP' in scores else scores['accuracy']
    return score if score == score else -math.inf
