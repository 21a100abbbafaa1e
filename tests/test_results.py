"""The experiments' script on a tiny task.   python -m pytest tests/test_results.py"""
import os

import pytest

from tools import results

from .conftest import call, is_one_line_error
from .test_finetune import RUN as FINETUNE
from .test_finetune import pretrained  # noqa: F401  (a fixture)


def test_every_arm_is_tuned_run_and_found_again(pretrained, data_dir, tmp_path, monkeypatch):          # noqa: F811
    config = tmp_path / 'tiny.py'
    words = [argument[2:].split('=') for argument in FINETUNE if '=' in argument]
    config.write_text(''.join(f'{name} = {value if value[0].isdigit() else repr(value)}\n' for name, value in words)
                      + "pooling = 'mean'\n")
    monkeypatch.setattr(results, 'TASKS', {'noises': ([str(config)], 3, {'*': (1, 2)})})
    base = [f'--ckpt={pretrained}', f'--data_dir={data_dir}', f'--out_dir={tmp_path}/out', '--jobs=2']
    first = call(results.run, *base)
    assert first.code == 0, first.err
    rows = [line for line in first.out.splitlines() if line.startswith('| fine-tuned') or line.startswith('| linear')]
    assert len(rows) == 5 and all('of ' in row and ' / ' in row for row in rows)
    made = {folder: os.path.getmtime(f'{tmp_path}/out/{folder}/log.jsonl') for folder in os.listdir(tmp_path / 'out')}
    again = call(results.run, *base)
    assert again.out.splitlines()[-8:] == first.out.splitlines()[-8:]       # the same table, and nothing was run again
    assert made == {folder: os.path.getmtime(f'{tmp_path}/out/{folder}/log.jsonl') for folder in made}
    monkeypatch.setattr(results, 'TASKS', {'noises': ([str(config)], 4, {})})
    assert call(results.run, *base, '--arms=scratch').code == 0             # another length is another run
    redone = [folder for folder in made if '-scratch-' in folder and '-x1-seed1' in folder]
    assert all(os.path.getmtime(f'{tmp_path}/out/{folder}/log.jsonl') > made[folder] for folder in redone)


@pytest.mark.parametrize('argv, word', [(['--arms=all'], 'arms'), (['--jobs=0'], 'jobs'), (['--seed=3'], 'seeds')])
def test_wrong_settings(argv, word):
    assert is_one_line_error(call(results.run, *argv), word)
