"""Settings, override files and the command line.   python -m pytest tests/test_configurator.py"""
import os
import re

import pytest

import configurator
import pretrain
from configurator import configure
from engine.errors import ConfigError

from . import settings_table
from .conftest import ROOT, call, is_one_line_error, script

SCRIPT = '''"""A script."""
import os
lr = 0.1            # peak learning rate
steps = 10          # updates,
                    # in all
name = 'demo'       # of the set
quick = False       # no evaluation
limit = None        # at most so many
HIDDEN = 3
_private = 4
def function(): pass
'''


@pytest.fixture
def path(tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    return str(tmp_path / 'script.py')


def test_defaults_and_comments(path):
    found = configurator.settings_of(path)
    assert list(found) == ['lr', 'steps', 'name', 'quick', 'limit']
    assert found['steps'] == (10, 'updates, in all')


@pytest.mark.parametrize('argv, key, value', [
    (['--lr=2'], 'lr', 2.0), (['--lr', '2e-3'], 'lr', 0.002), (['--steps=1e3'], 'steps', 1000),
    (['--name=a=b,c'], 'name', 'a=b,c'), (['--name=12'], 'name', '12'), (['--quick'], 'quick', True),
    (['--quick', 'false'], 'quick', False), (['--quick=True'], 'quick', True), (['--limit=5'], 'limit', 5),
    (['--limit=abc'], 'limit', 'abc'), (['--lr=-1'], 'lr', -1.0), (['--name='], 'name', ''),
    (['--lr=1', '--lr=3'], 'lr', 3.0), (['--quick', '--lr=3'], 'quick', True)])
def test_command_line(path, argv, key, value):
    got = getattr(configure(path, argv), key)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize('argv, message', [
    (['--lrr=1'], "did you mean 'lr'"), (['--steps=abc'], 'steps'), (['--steps=1.5'], 'int'),
    (['--quick=maybe'], 'bool'), (['--lr=True'], 'lr'), (['--lr'], 'needs a value'),
    (['--lr', '--steps=2'], 'needs a value'), (['nothing.py'], 'nothing.py'), (['--HIDDEN=1'], 'HIDDEN'),
    (['--name', '--lr=1'], 'needs a value'), (['--lr=None'], 'not None')])
def test_errors(path, argv, message):
    with pytest.raises(ConfigError, match=message):
        configure(path, argv)


def test_override_file(path, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text('import math\nsteps = 4\nlr = steps / 2\nlimit = int(math.pi)\n_note = 1\n')
    got = configure(path, [str(config), '--limit=7'])
    assert (got.steps, got.lr, got.limit, got.name) == (4, 2.0, 7, 'demo')


@pytest.mark.parametrize('text, given', [
    ('steps = 10', 'steps'), ('steps = 2 * 5', 'steps'), ('steps: int = 10', 'steps'), ('steps += 0', 'steps'),
    ('steps, lr = 10, 0.1', 'steps lr'), ('for steps in (7, 10): pass', 'steps'), ('if (steps := 10): pass', 'steps'),
    ('def _set():\n    global steps\n    steps = 20\n_set()', 'steps'), ("globals().update(steps=20)", 'steps'),
    ('quick = name = lr = 3\ndel quick, name', 'lr'), ('_steps = steps', ''),
    ('print(steps)', ''), ('lr: float = lr', 'lr')])
def test_what_a_file_assigns_is_given_be_it_the_default(path, tmp_path, text, given):
    (tmp_path / 'config.py').write_text(text)
    got = configure(path, [str(tmp_path / 'config.py')])
    assert got.given == set(given.split())
    assert (got.steps, got.lr) == (20 if '20' in text else 10, 3.0 if 'lr = 3' in text else 0.1)


@pytest.mark.parametrize('text', ['from math import ceil', 'import os, math as mathematics', 'from os import path',
                                  'def ceil(x):\n    return 4', 'ceil = lambda x: 4', 'class ceil: pass'])
def test_what_a_file_imports_or_defines_is_no_setting(path, tmp_path, text):
    (tmp_path / 'config.py').write_text(f'{text}\nsteps = 4\n')
    got = configure(path, [str(tmp_path / 'config.py')])
    assert got.steps == 4 and got.given == {'steps'} and 'ceil' not in vars(got)


@pytest.mark.parametrize('argv, steps, lr, limit', [
    ([], 20, 10.0, 20), (['--steps=8'], 8, 4.0, 8), (['--lr=1'], 20, 1.0, 20), (['--limit=5'], 20, 10.0, 5),
    (['--steps=1e3', '--limit=1'], 1000, 500.0, 1)])
def test_files_compute_with_the_command_line(path, tmp_path, argv, steps, lr, limit):
    (tmp_path / 'config.py').write_text('steps = 20\nlr, limit = steps / 2, steps')
    (tmp_path / 'second.py').write_text('steps *= 1\nlimit = steps')
    for files in (['config.py'], ['config.py', 'second.py']):
        got = configure(path, [str(tmp_path / file) for file in files] + argv)
        assert (got.steps, got.lr, got.limit) == (steps, lr, limit)


def shipped(stage, *argv):
    return configure(os.path.join(ROOT, stage), list(argv), (os.path.join(ROOT, 'model.py'), 'ASDAConfig'))


def test_the_shipped_files_compute_with_the_command_line():
    config = os.path.join(ROOT, 'config')
    assert shipped('pretrain.py', f'{config}/demo.py').ema_steps == 600
    assert shipped('pretrain.py', f'{config}/demo.py', '--max_steps=200').ema_steps == 200
    assert shipped('pretrain.py', '--max_steps=200', f'{config}/real.py').ema_steps == 200
    large = shipped('pretrain.py', f'{config}/as2m.py', '--batch_size=96')
    assert (large.max_steps, large.warmup_steps) == (398361, 49795)         # 20 and 2.5 epochs of 1,912,134 clips
    assert 'pooling' in shipped('finetune.py', f'{config}/finetune_demo.py').given


def test_a_file_builds_on_another(path, tmp_path):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'sub' / 'base.py').write_text("steps = 20\nlr = 0.5\nname = __file__\n")
    (tmp_path / 'config.py').write_text("include('sub/base.py')\nlr = lr * 2\nlimit = __file__\n")
    got = configure(path, [str(tmp_path / 'config.py'), '--steps=3'])
    assert (got.steps, got.lr, got.given) == (3, 1.0, {'steps', 'lr', 'name', 'limit'})
    assert [got.name, got.limit] == [str(tmp_path / file) for file in ('sub/base.py', 'config.py')]


@pytest.mark.parametrize('base, message', [
    (None, 'cannot read the config file .*base.py'), ('stepz = 1', "stepz.*base.py.*'steps'"),
    ("include('config.py')", 'config.py includes itself'), ("include('base.py')", 'base.py includes itself'),
    ('1 / 0', 'base.py'), ('steps = 1 / 0', 'base.py stopped with ZeroDivisionError'), ('steps = (', 'base.py')])
def test_errors_of_the_file_that_another_builds_on_name_it(path, tmp_path, base, message):
    if base is not None:
        (tmp_path / 'base.py').write_text(base)
    (tmp_path / 'config.py').write_text("include('base.py')")
    with pytest.raises(ConfigError, match=message):
        configure(path, [str(tmp_path / 'config.py')])


def test_a_script_has_no_assignment_that_is_silently_no_setting(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('HIDDEN = [open]\nsteps = 100   # updates\nlr = -0.5\nname: str = "a#é"   # of it\n# or not\n')
    assert configurator.settings_of(str(script)) == {'steps': (100, 'updates'), 'lr': (-0.5, ''),
                                                     'name': ('a#é', 'of it or not')}
    for line in ('steps = len("ab")', 'steps = HIDDEN', 'steps = lambda: 3', 'steps = [object]', 'steps = 20 * 5',
                 'steps, lr = 1, 0.5', 'lr = steps = 3', 'HIDDEN, steps = 1, 2', 'steps += 1', 'steps = {[]: 1}'):
        script.write_text(f'HIDDEN = [open]\nlr = 0.5\n{line}\n')
        with pytest.raises(ConfigError, match='script.py, line 3: .*steps.* must be'):
            configurator.settings_of(str(script))


@pytest.mark.parametrize('text, message', [
    ('20 * 5', 'line 1: `20 . 5` sets nothing'), ('steps', '`steps` sets nothing'), ('lr == 3', '`lr == 3` sets'),
    ('import os\nsteps: int', 'line 2: `steps: int` sets'), ('if steps:\n    steps, 3', 'line 2: '), ('5', '`5` sets'),
    ('def lr(): pass', 'lr in .*config.py must be of type float'),
    ('import os as name', 'name in .*must be of type str'),
    ('half = steps / 2', "'half' in .*begins with an underscore: _half"),
    ('for i in range(3): pass', 'underscore: _i'),
    ('stepz = 4', "stepz.*config.py.*did you mean 'steps'"), ('steps = "4"', 'steps'),
    ('steps = (', 'not valid Python'), ('steps = 1 / 0', 'ZeroDivisionError'), ('steps = True', 'steps')])
def test_override_file_errors(path, tmp_path, text, message):
    (tmp_path / 'config.py').write_text(text)
    with pytest.raises(ConfigError, match=message):
        configure(path, [str(tmp_path / 'config.py')])


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.run(['--help'])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for key in ('n_embd', 'diff_lambda', 'max_steps', 'utterance_scale'):
        assert f'--{key}=' in text
    assert '0.3' in text and 'weight of the second attention map' in text
    assert min(map(len, re.findall(r'^  --\S+ +', text, re.M))) == 29           # below each other, but for long values


@pytest.mark.parametrize('name', ['pretrain', 'finetune', 'eval', 'prepare'])
def test_every_setting_has_a_comment(name):
    for key, (_, comment) in configurator.settings_of(os.path.join(ROOT, name + '.py')).items():
        assert len(comment) > 4, key
    for key, (_, comment) in configurator.settings_of(os.path.join(ROOT, 'model.py'), 'ASDAConfig').items():
        assert len(comment) > 4, key


@pytest.mark.parametrize('name', sorted(os.listdir(os.path.join(ROOT, 'config'))))
def test_shipped_configs_are_valid_and_say_what_they_cost(name):
    path = os.path.join(ROOT, 'config', name)
    if not name.endswith('.py'):
        return
    stage = 'finetune.py' if name.startswith('finetune') else 'pretrain.py'
    settings = shipped(stage, path)
    if stage == 'pretrain.py':
        pretrain.check(settings, 1)
        pretrain.model_config(settings)
    with open(path) as f:
        head = f.read().split('"""')[1].lower()
    for word in ('cost', 'time', 'expect'):
        assert word in head, f'{name} does not say: {word}'


def test_user_sees_one_line():
    assert is_one_line_error(call(pretrain.run, '--max_stepz=3'), 'max_stepz', 'max_steps')
    result = script('pretrain.py', '--lrr=1')
    assert result.returncode == 2 and result.stderr.strip().count('\n') == 0 and 'Traceback' not in result.stderr


def test_works_from_any_folder(tmp_path):
    result = script(os.path.join(ROOT, 'pretrain.py'), '--help', cwd=tmp_path)
    assert result.returncode == 0 and '--n_embd' in result.stdout


def test_importing_a_script_starts_nothing(tmp_path):
    result = script('-c', 'import pretrain, finetune, eval, prepare; print("imported")')
    assert result.stdout == 'imported\n', result.stderr


def test_the_page_of_settings_is_that_of_the_scripts():
    found = settings_table.defaults()
    assert found['n_layer']['model'] == 12 and set(found['lr']) >= {'pretrain', 'finetune'} and len(found) > 100
    who = settings_table.who_on_the_page()
    assert who.keys() == found.keys(), 'python -m tests.settings_table writes the page anew'
    assert [name for name, text in who.items() if len(text) < 5] == [], 'docs/settings.md: who would set these?'
    with open(settings_table.PAGE, encoding='utf-8') as f:
        assert f.read() == settings_table.page(), 'python -m tests.settings_table writes the page anew'


def test_a_run_shows_what_differs_from_the_defaults():
    model = os.path.join(ROOT, 'model.py'), 'ASDAConfig'
    chosen = configure(pretrain.__file__, ['--lr=0.5', '--n_layer=3', '--seed=1', '--dataset=a,b'], model)
    assert configurator.show(chosen, (pretrain.__file__,), model) == "dataset='a,b'  lr=0.5  n_layer=3"
    without = configurator.show(chosen, (pretrain.__file__,), leave_out=configurator.settings_of(*model))
    assert without == "dataset='a,b'  lr=0.5"
