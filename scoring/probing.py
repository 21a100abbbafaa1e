"""Frozen features scored: kNN and linear probe from training to test clips, of a checkpoint's features or of those that
any other program has computed."""
import numpy as np

from engine.errors import DataError, first_line
from engine.files import printable
from scoring.metrics import describe, metrics
from scoring.probes import in_float64, knn_scores, linear_probe, standardised

LONGEST = len('random weights, bands')             # name of features of ours, so that all tables have the same columns


def score_features(kinds, train, test, words, process):
    """Print and return {features: {probe: scores}}, of labelled clips.

    kinds: {name: a function that gives the features of the training and of the test clips, (N, F) each}; words: what
    the first line says of them
    """
    targets, wanted = (part.targets(np.arange(len(part))) for part in (train, test))
    process.print(f'{train.names()}: {len(train):,} training and {len(test):,} test clips; '
                  f'{len(test.classes)} classes; {words}')
    results, where, wide = {}, in_float64(process.device), max([LONGEST, *map(len, kinds)])
    for kind, found in kinds.items():
        x, t = found()
        results[kind] = {}
        if not test.multi_label:
            near, far = standardised(x, t)
            votes = knn_scores(near, train.label, far, len(train.classes), device=where)
            del near, far                                                   # linear_probe makes its own
            results[kind]['kNN'] = metrics(votes, wanted, False)[0]
        logits, strength = linear_probe((x, targets), t, test.multi_label,
                                        title='probing' if process.is_main else '', device=where)
        results[kind]['linear probe'] = {**metrics(logits, wanted, test.multi_label)[0], 'l2': strength}
        process.print(f'{kind:{wide}} '
                      + ''.join(f'{probe}: {describe(scores)}   ' for probe, scores in results[kind].items()))
    return results


def stored_features(path, parts):
    """The features of an .npz for clips by their names: {array: [(len(part), F) float32 of each part]} of its arrays
    (N, F) of real numbers, whose rows are called names (N,). Hostile input. Raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        raise DataError(f'there is no features_file {path}') from None
    except Exception as error:                      # a damaged file can fail in any way; it is not one of features
        raise DataError(f'features_file {path} is not an .npz of arrays ({type(error).__name__}: {first_line(error)})'
                        ) from None
    names = arrays.get('names', np.zeros(0))
    is_list = names.dtype.kind == 'U' and names.ndim == 1
    row_of = {name: row for row, name in enumerate(names.tolist())} if is_list else {}
    if not row_of or len(row_of) < len(names):
        raise DataError(f'features_file {path} has no array `names` of one name a row, each once')
    missing = [key for part in parts for key in part if key not in row_of]
    if missing:
        raise DataError(f'features_file {path} lacks {len(missing)} of the clips, e.g. {printable(missing[0])}')
    rows, found = [np.array([row_of[key] for key in part]) for part in parts], {}
    for name, array in arrays.items():
        if array.dtype.kind == 'f' and array.ndim == 2 and len(array) == len(names) and array.shape[1]:
            with np.errstate(over='ignore'):                                # what float32 cannot hold is infinite then
                found[name] = [array[part].astype(np.float32) for part in rows]
            if not all(np.isfinite(part).all() for part in found[name]):
                raise DataError(f'features_file {path}: {name} holds numbers that are not finite')
    if not found:
        raise DataError(f'features_file {path} has no array of {len(names)} rows of real numbers beside `names`')
    return found
