"""Logs to compare with: thinned ones are small and tell of no machine.   python -m pytest tests/test_reference.py"""
import json

import pytest

from tools import reference
from tools.reference import where_they_part

from .conftest import call, is_one_line_error

START = {'start': 0, 'settings': {
    'out_dir': 'out/secret', 'data_dir': '/home/jane/data', 'lr': 0.001, 'dataset': 'fsdd,esc10',
    'leave_out': 'fsdd/theo,esc10/5', 'ckpt': '/home/jane/runs/best.pt,..\\other\\b.pt', 'norm_mean': None},
    'torch': '2.9', 'device': 'x86_64', 'threads': 2, 'commit': 'abc', 'hostname': 'jane-laptop', 'time': 1.6e9}


def write(path, lines):
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return path


def long_log(steps=3000, every=10):
    lines = [START]
    for step in range(every, steps * every + 1, every):
        lines.append({'step': step, 'loss': 1 / 3 + step, 'explained': 0.123456789, 'lr': 1e-4 / 3, 'bad': None,
                      'seconds_left': 5.5, 'time': 1.6e9 + step / 7})
        if step % 5000 == 0:
            lines.append({'step': step, 'knn_cls': 2 / 3, 'note': 'seen on jane-laptop', 'valid': {'accuracy': 2 / 3}})
    return lines


def test_a_thinned_log_is_small_and_keeps_what_counts(tmp_path):
    lines = long_log()
    (tmp_path / 'run').mkdir()
    write(tmp_path / 'run' / 'log.jsonl', lines)
    result = call(reference.run, tmp_path / 'run', f'--out={tmp_path}/logs/demo.jsonl')
    text = (tmp_path / 'logs' / 'demo.jsonl').read_text()
    assert result.code == 0 and 30_000 < len(text) <= 50_000, result.err
    got = [json.loads(line) for line in text.splitlines()]
    assert got[0] == {'start': 0, 'settings': {
        'lr': 0.001, 'dataset': 'fsdd,esc10', 'leave_out': 'fsdd/theo,esc10/5', 'ckpt': 'best.pt,b.pt',
        'norm_mean': None}, 'torch': '2.9', 'device': 'x86_64', 'threads': 2, 'commit': 'abc', 'time': 0.0}
    for word in ('jane', 'secret', 'home', '1600000', 'out/'):
        assert word not in text
    training = [line for line in got if 'loss' in line]
    steps = [line['step'] for line in training]
    n = steps[1] // 10
    assert steps == sorted({10, *range(10 * n, 30_001, 10 * n), 30_000}) and n > 1 and f'one in {n}' in result.out
    assert training[-1] == {'step': 30_000, 'loss': 30000.0, 'explained': 0.12346, 'lr': 3.3333e-05, 'bad': None,
                            'time': 4285.7}
    assert [line for line in got if 'knn_cls' in line] == [
        {'step': step, 'knn_cls': 0.66667, 'valid': {'accuracy': 0.66667}} for step in range(5000, 30_001, 5000)]


def test_a_thinned_log_is_read_as_the_whole_one(tmp_path):
    """Its steps are among those of the run, the losses the same to five digits: they do not part."""
    whole = write(tmp_path / 'whole.jsonl', long_log())
    assert call(reference.run, f'--log={whole}', f'--out={tmp_path}/thin.jsonl').code == 0
    one, other = (reference.read_log(str(tmp_path / name)) for name in ('thin.jsonl', 'whole.jsonl'))
    assert where_they_part(one, other, 1e-4).startswith('losses agree to 0.01 % at all')
    assert one[2][30_000] == pytest.approx(other[2][30_000], abs=0.06)


def test_a_short_log_stays_whole_and_a_changed_setting_is_kept(tmp_path):
    again = {**START, 'settings': {**START['settings'], 'lr': 0.002}, 'start': 20, 'time': 1.6e9 + 60}
    lines = [START, {'step': 10, 'loss': 2.0, 'time': 1.6e9 + 1}, {'step': 20, 'loss': 1.0, 'time': 1.6e9 + 2},
             {**START, 'start': 20}, again, {'step': 30, 'loss': 0.5, 'time': 1.6e9 + 61},
             {'step': 30, 'skipped_in_a_row': 1}]
    assert call(reference.run, write(tmp_path / 'a.jsonl', lines), f'--out={tmp_path}/b.jsonl').code == 0
    got = [json.loads(line) for line in (tmp_path / 'b.jsonl').read_text().splitlines()]
    assert [line.get('step', line.get('start')) for line in got] == [0, 10, 20, 20, 30, 30]
    assert got[3]['settings']['lr'] == 0.002 and got[3]['time'] == 60.0


@pytest.mark.parametrize('argv, words', [
    ([], ['name a run']), (['{}/log.jsonl'], ['name a run']), (['{}/log.jsonl', '--out={}/x.txt'], ['name a run']),
    (['/nonexistent', '--out={}/x.jsonl'], ['/nonexistent']), (['{}/empty.jsonl', '--out={}/x.jsonl'], ['no steps']),
    (['{}/log.jsonl', '--out={}/log.jsonl'], ['the log itself']),
    (['{}', '--out={}/x.jsonl', '--max_kb=0'], ['max_kb']),
    (['{}', '--out={}/x.jsonl', '--max_kb=1'], ['evaluations', 'max_kb'])])
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, argv, words):
    lines = long_log(30) + [{'step': step, 'knn_cls': 0.5} for step in range(100)]
    before = write(tmp_path / 'log.jsonl', lines).read_text()
    write(tmp_path / 'empty.jsonl', [START])
    assert is_one_line_error(call(reference.run, *[word.format(tmp_path) for word in argv]), *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['empty.jsonl', 'log.jsonl']
    assert (tmp_path / 'log.jsonl').read_text() == before


def test_where_two_runs_part():
    def run(settings, losses, **more):
        return settings, {'loss': ([10, 20, 30], losses), **more}, {}
    one = run({'lr': 1, 'seed': 1, 'workers': 2, 'torch': '2.9'}, [3.0, 2.0, 1.0], knn_cls=([20], [0.5]))
    other = run({'lr': 2, 'seed': 1, 'workers': 0, 'torch': '2.8'}, [3.0, 2.0, 1.5], knn_cls=([20], [0.25]))
    assert where_they_part(one, other) == (
        'losses part by more than 2 % at step 30: 1 / 1.5, and do so at 1 of the 3 steps that both logged, up to 30; '
        "last in common: loss 1 / 1.5, knn cls 0.5 / 0.25; what differs: lr 1 / 2, torch '2.9' / '2.8'")
    assert where_they_part(one, one) == ('losses agree to 2 % at all 3 steps that both logged, up to 30; last in '
                                         'common: loss 1 / 1, knn cls 0.5 / 0.5; no setting differs')
    assert where_they_part(one, other, 0.5).startswith('losses agree to 50 %')
    assert where_they_part(one, ({}, {'loss': ([7], [1.0])}, {})).startswith('no step in common')


def test_paths_may_stand_without_a_name():
    assert reference.with_paths(['out/a', 'c.py', '--tolerance', '0.5', 'out/b', '--out=x'], 'logs') == [
        'c.py', '--tolerance', '0.5', '--out=x', '--logs=out/a,out/b']
    assert reference.with_paths(['--help'], 'logs') == ['--help']
