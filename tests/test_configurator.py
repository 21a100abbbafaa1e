"""Settings, override files and the command line.   python -m pytest tests/test_configurator.py"""
import os

import pytest

import configurator
import pretrain
from configurator import configure
from engine.errors import ConfigError

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


@pytest.mark.parametrize('text, message', [
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
    settings = configure(os.path.join(ROOT, stage), [path], (os.path.join(ROOT, 'model.py'), 'ASDAConfig'))
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
