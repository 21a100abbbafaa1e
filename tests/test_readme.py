"""The commands of the README and of docs/, and what they say of files and settings.
    python -m pytest tests/test_readme.py"""

import os
import re
import shlex

import numpy as np
import pytest
import torch

import eval as evaluation
import finetune
import prepare
import pretrain
from tools import viz

from .conftest import ROOT, TINY, call, write_wav

PAGES = ['README.md', *(f'docs/{page}.md' for page in
                        'datasets results ablations scaling paper_and_code performance walkthrough'.split())]
ALL_PAGES = ['README.md', *(f'docs/{name}' for name in sorted(os.listdir(os.path.join(ROOT, 'docs')))
                            if name.endswith('.md'))]


def read(path):
    with open(os.path.join(ROOT, path), encoding='utf-8') as f:
        return f.read()


README, TEXT = read('README.md'), '\n'.join(map(read, PAGES))
COMMANDS = [
    shlex.split(line.split('&&')[-1], comments=True)
    for block in re.findall(r'```sh\n(.*?)```', TEXT, re.S)
    for line in block.replace('\\\n', ' ').splitlines()
    if line.strip() and not line.startswith('#')
]
INLINE = [
    ['python', *shlex.split(text)]
    for text in re.findall(r'`((?:prepare|pretrain|finetune|eval|bench).py [^`]*)`', TEXT)
]
DEMO = [command[2:] for command in COMMANDS if command[:3] == ['python', 'pretrain.py', 'config/demo.py']]
SHORT = ['--max_steps=2', '--warmup_steps=1', '--batch_size=4', '--n_layer=1', '--threads=1']


def as_files(command):
    """python -m tools.bench is python tools/bench.py for whoever looks for the file."""
    if command[1:2] == ['-m'] and command[2].startswith('tools.'):
        return [command[0], command[2].replace('.', '/') + '.py', *command[3:]]
    return command


def options_of(script):
    from configurator import settings_of

    known = set(settings_of(os.path.join(ROOT, script)))
    if script == 'prepare.py':
        for recipe in ('plan', *prepare.RECIPES):
            known |= set(settings_of(os.path.join(ROOT, 'recipes', recipe + '.py')))
    if script == 'tools/bench.py':
        known |= set(settings_of(os.path.join(ROOT, 'pretrain.py')))
    if script in ('pretrain.py', 'finetune.py', 'tools/bench.py'):
        known |= set(settings_of(os.path.join(ROOT, 'model.py'), 'ASDAConfig'))
    return known


def test_there_are_ten_hacks_and_both_first_commands():
    assert sum('--out_dir=out/hack' in command for command in DEMO) == 10
    assert ['python', 'pretrain.py', 'config/demo.py'] in COMMANDS and ['python', '-m', 'pytest'] in COMMANDS


@pytest.mark.parametrize('command', COMMANDS + INLINE, ids=' '.join)
def test_every_option_and_config_exists(command):
    command = as_files(command)
    script = next((word for word in command if word.endswith('.py')), None)
    if script is None:
        return
    assert os.path.exists(os.path.join(ROOT, script))
    for word in command[command.index(script) + 1 :]:
        if word.startswith('--'):
            assert word[2:].split('=')[0] in options_of(script), word
        elif word.startswith('config/'):
            assert os.path.exists(os.path.join(ROOT, word)), word
        else:
            assert word in {'prepare.py': prepare.RECIPES, 'tools/viz.py': viz.PICTURES}[script], word


@pytest.mark.parametrize(
    'command', [c for c in DEMO if '--dataset=mine' not in c], ids=lambda c: ' '.join(c[1:]) or 'demo'
)
def test_demo_and_hacks_run(data_dir, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    result = call(
        pretrain.run, os.path.join(ROOT, command[0]), *command[1:], *SHORT, f'--data_dir={data_dir}', '--out_dir=out/x'
    )
    assert result.code == 0 and ('demo, step ' in result.out) == ('--eval_dataset=' not in command), result.err
    config = torch.load(tmp_path / 'out/x/ckpt.pt', weights_only=True)['config']
    for name, value in [argument[2:].split('=') for argument in command[1:] if '=' in argument]:
        assert name not in config or config[name] == type(config[name])(value)        # the network asked for


def test_the_path_from_a_folder_of_ones_own(tmp_path, monkeypatch):
    """The second block, as it stands but for its length, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    os.symlink(os.path.join(ROOT, 'config'), tmp_path / 'config')
    rng = np.random.default_rng(0)
    for i in range(40):
        wave = rng.standard_normal(16000) * 0.1 if i % 2 else np.sin(np.arange(16000) / 5)
        write_wav(str(tmp_path / 'MY_SOUNDS' / ('noise', 'tone')[i % 2] / f'{i}.wav'), wave)
    for name in ('A.wav', 'B.flac'):
        write_wav(str(tmp_path / name), np.sin(np.arange(16000) / 5))
    runs = {
        'prepare.py': prepare.run,
        'pretrain.py': pretrain.run,
        'finetune.py': finetune.run,
        'eval.py': evaluation.run,
    }
    short = {
        'prepare.py': ['--workers=0'],
        'pretrain.py': SHORT,
        'finetune.py': ['--max_steps=2', '--warmup_steps=1', '--batch_size=4', '--workers=0'],
        'eval.py': [],
    }
    mine = [command for command in COMMANDS if any('mine' in word for word in command)]
    assert len(mine) == 5
    for _, script, *arguments in mine:
        result = call(runs[script], *arguments, *short[script])
        assert result.code == 0, (script, result.err)
    assert os.path.exists(tmp_path / 'mine.npz')


def test_the_readme_is_short_and_its_links_and_files_exist():
    assert len(README.splitlines()) <= 130
    links = [os.path.join(os.path.dirname(page), link) for page in ALL_PAGES
             for link in re.findall(r'\]\((?!http)([^)#]+)[^)]*\)', read(page))]
    tree = re.findall(r'^([a-z_]+(?:\.py|/))', re.search(r'```\n(model\.py.*?)```', README, re.S)[1], re.M)
    assert len(links) >= 5 and len(tree) >= 14
    for path in [*links, *tree]:
        assert os.path.exists(os.path.join(ROOT, path)), path


def test_the_sections_that_links_name_exist():
    """As GitHub calls them: small letters, hyphens for spaces, no other marks."""
    links = [(os.path.join(os.path.dirname(page), link) if link else page, section) for page in ALL_PAGES
             for link, section in re.findall(r'\]\((?!http)([^)#]*\.md|)#([^)]+)\)', read(page))]
    assert len(links) >= 3
    for path, section in links:
        titles = re.findall(r'^#+ (.+)$', read(os.path.normpath(path)), re.M)
        assert section in [re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-') for title in titles], (path, section)


def test_tiny_settings_are_settings():
    for word in TINY:
        assert word[2:].split('=')[0] in options_of('pretrain.py')


def test_no_figure_of_the_performance_notes_is_missing():
    """Every table has as many cells in each row, and no word stands where a figure should."""
    text = read('docs/performance.md')
    assert not re.search(r'\b[A-Z]{4,}_[A-Z]+\b|TODO|TBD', text)
    for table in re.findall(r'(?:^\|.*\n)+', text, re.M):
        assert len({line.count('|') for line in table.splitlines()}) == 1, table
