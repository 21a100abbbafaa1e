"""docs/walkthrough.md says what a run computes, and its links lead to the code that they quote.
   python -m pytest tests/test_walkthrough.py

If the code has moved or numbers have changed on purpose: python -m tests.walkthrough --write, and read the page again.
"""
import re
import shlex

import pytest

from . import walkthrough
from .walkthrough import differences, wrong_links

with open(walkthrough.PAGE, encoding='utf-8') as f:
    PAGE = f.read()


@pytest.fixture(scope='module')
def run(data_dir, tmp_path_factory):
    return walkthrough.Watched(data_dir, str(tmp_path_factory.mktemp('walk')))


def test_the_numbers_are_those_of_a_run(run):
    shown = walkthrough.blocks_of(PAGE)
    assert shown.keys() == walkthrough.BLOCKS.keys()
    wrong = {name: differences(shown[name], function(run)) for name, function in walkthrough.BLOCKS.items()}
    assert not any(wrong.values()), (wrong, 'python -m tests.walkthrough --write')


def test_the_equations_give_the_losses_that_the_run_logged(run):
    """Each by a loop over views and patches."""
    for line in walkthrough.losses(run).splitlines():
        computed, logged = re.search(r'([\d.]+) +logged ([\d.]+)$', line).groups()
        assert float(computed) == pytest.approx(float(logged), abs=2e-3), line


def test_the_commands_are_those_of_the_run():
    first, second = [shlex.split(line) for line in re.search(r'```sh\n(.*?)```', PAGE, re.S)[1].splitlines()]
    assert f'--clips={walkthrough.CLIPS}' in first
    assert set(second) - {'python', 'pretrain.py', 'config/demo.py', '--data_dir=data/few'} == set(walkthrough.OPTIONS)


def test_the_links_lead_to_the_code_that_they_quote():
    assert wrong_links(PAGE) == [], 'python -m tests.walkthrough --write'
    assert len(walkthrough.LINK.findall(PAGE)) > 20
    assert len(re.findall('```python\n', PAGE)) == sum(1 for link in walkthrough.LINK.finditer(PAGE) if link['block'])
    assert walkthrough.with_right_lines(PAGE) == walkthrough.with_blocks(PAGE, walkthrough.blocks_of(PAGE)) == PAGE


def test_ten_questions_each_with_code():
    questions = re.split(r'^\*\*(.+?\?)\*\*', PAGE.split('## Ten questions')[1], flags=re.M)[1:]
    assert len(questions) == 20
    for question, answer in zip(questions[::2], questions[1::2]):
        assert walkthrough.LINK.search(answer), question


def test_the_six_equations_stand_in_order():
    assert re.findall(r'^\((\d)\)  ', PAGE, re.M) == list('123456')


@pytest.mark.parametrize('old, new, word', [
    (r'model\.py#L(\d+)', 'model.py#L1', 'the link leads to'), (r'\) `diff_lambda: float = 0.3`', ')', 'quotes none'),
    ('`diff_lambda: float = 0.3`', '`diff_lambda = 9`', 'has no'), ('A1, A2 = A.chunk', 'A2, A1 = A.chunk', 'has no'),
    (r'model.py: ASDA.targets', 'model.py: ASDA.goals', 'there is no'),
    (r'\(\.\./pretrain.py#', '(../data.py#', 'leads to data.py'),
    ('engine/run.py: Run', 'engine/nowhere.py: Run', 'nowhere')])
def test_a_wrong_link_is_found(old, new, word):
    changed, count = re.subn(old, new, PAGE, count=1)
    assert count == 1 and any(word in problem for problem in wrong_links(changed)), wrong_links(changed)


def test_lines_that_moved_are_put_right():
    moved = re.sub(r'#L(\d+)', lambda line: f'#L{int(line[1]) + 7}', PAGE)
    assert wrong_links(moved) and walkthrough.with_right_lines(moved) == PAGE


@pytest.mark.parametrize('want, got, same', [
    ('loss 11.529', 'loss 11.530', True), ('loss 11.529', 'loss 12.1', False), ('loss 11.529', 'gain 11.529', False),
    ('(6, 65, 128)', '(6, 66, 128)', False), ('1,024 clips', '1,024 clips', True),
    ('1,024 clips', '1,025 clips', False), ('0.0019', '0.0020', True), ('0.0019', '0.0025', False),
    ('1.093e-05', '1.09e-05', True), ('a\nb', 'a', False),
    ('1.093e-05', '1.3e-05', False), ('-0.0591', '0.0591', False), ('a  1', 'a 1', True), ('0.063', '', False)])
def test_differences_are_found(want, got, same):
    assert (differences(want, got) == []) == same
