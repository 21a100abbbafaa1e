"""Mutants: a module with one operator, comparison, number, condition or loop changed, which the tests should notice.

    pip install cosmic-ray
    python tests/mutate.py data.py --tests="tests/test_numbers.py tests/test_data.py" --every=4 --minutes=10

cosmic-ray makes the mutants; this script tries them in a copy of the repository, each in a forked process in which the
libraries are loaded already, which takes a third of a new process's time. Results go to a file of JSON lines, from
which the same command goes on. The docs say what was found: docs/testing.md.
"""
import argparse
import contextlib
import difflib
import functools
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Of the many replacements of an operator one each; no exception types and decorators, which change no number.
KEPT = re.compile('core/(ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_Mul|Pow_Mul|'
                  'BitAnd_BitOr|BitOr_BitAnd|LShift_RShift|RShift_LShift)|'
                  'ReplaceComparisonOperator_(Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Eq_NotEq|NotEq_Eq|Is_IsNot|IsNot_Is)|'
                  'ReplaceUnaryOperator_(USub_UAdd|Delete_.*)|NumberReplacer|AddNot|Replace(True|False|And|Or)With.*|'
                  'ZeroIterationForLoop)$')


def mutants_of(text):
    """Yield (name, line, function that makes the mutated text) for a module's source."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names
    for name in filter(KEPT.match, sorted(operator_names())):
        places = [place for node in ast_nodes(get_ast(text)) for place in get_operator(name)().mutation_positions(node)]
        for i, ((line, _), _) in enumerate(places):
            yield f'{name} {i}', line, functools.partial(mutate_code, text, get_operator(name)(), i)


def load_libraries(copy, tests):
    """Import all that the tests import, then forget the repository's own modules, which a mutant imports anew."""
    os.chdir(copy)
    sys.path.insert(0, copy)
    sys.dont_write_bytecode = True
    before = set(sys.modules)
    import pytest
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', '--assert=plain', *tests])
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], '__file__', None) or '').startswith(copy + os.sep):
            del sys.modules[name]


def trial(path, text, tests, seconds):
    """Run the tests with this text in place of a file of the copy -> ('killed' | 'survived' | 'timeout', first words
    of what failed)."""
    with open(path, encoding='utf-8') as f:
        before = f.read()
    with open(path, 'w', encoding='utf-8') as f:
        f.write(text)
    with tempfile.TemporaryFile('w+') as said:
        child = os.fork()
        if not child:
            os.setsid()
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            import pytest
            code = pytest.main(['-x', '-q', '-p', 'no:cacheprovider', '--assert=plain', '--tb=line', *tests])
            sys.stdout.flush()
            os._exit(int(code))
        until, status = time.monotonic() + seconds, None
        while status is None and time.monotonic() < until:
            pid, found = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(found) if pid else time.sleep(0.05)
        if status is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        said.seek(0)
        failed = re.search(r'^(FAILED|ERROR) (.*)', said.read(), re.M)
    with open(path, 'w', encoding='utf-8') as f:
        f.write(before)
    return ('timeout' if status is None else 'killed' if status else 'survived'), failed[2][:150] if failed else ''


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('module', help='a file of the repository')
    parser.add_argument('--tests', default='tests/test_numbers.py', help='arguments for pytest, separated by spaces')
    parser.add_argument('--every', type=int, default=1, help='try every n-th mutant only')
    parser.add_argument('--minutes', type=float, default=1e9, help='stop after so long')
    parser.add_argument('--seconds', type=float, default=180, help='a trial that takes longer is killed')
    parser.add_argument('--lines', default='1-999999', help='mutate these lines only, first-last')
    parser.add_argument('--out', help='results, default: mutants-MODULE.jsonl in the current folder')
    given = parser.parse_args()
    out = os.path.abspath(given.out or f'mutants-{given.module.replace("/", "-")}.jsonl')
    done = {}
    if os.path.exists(out):
        with open(out) as f:
            done = {line['name']: line for line in map(json.loads, f)}
    first, last = map(int, given.lines.split('-'))
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    until = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory() as folder, open(out, 'a') as f:
        copy = os.path.join(os.path.realpath(folder), 'copy')
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', '__pycache__', 'data', 'out'))
        path = os.path.join(copy, given.module)
        with open(path, encoding='utf-8') as source:
            text = source.read()
        tests = shlex.split(given.tests)
        load_libraries(copy, tests)
        began = time.monotonic()
        if trial(path, text, tests, 1e9)[0] != 'survived':
            sys.exit('the tests fail without a mutant')
        print(f'without a mutant: {time.monotonic() - began:.0f} s', flush=True)
        for number, (name, line, make) in enumerate(mutants_of(text)):
            if number % given.every or name in done or not first <= line <= last:
                continue
            if time.monotonic() > until:
                break
            mutant = make()
            outcome, failed = trial(path, mutant, tests, given.seconds)
            diff = list(difflib.unified_diff(text.splitlines(), mutant.splitlines(), n=0, lineterm=''))[3:]
            done[name] = {'name': name, 'line': line, 'outcome': outcome, 'failed': failed, 'diff': diff}
            f.write(json.dumps(done[name]) + '\n')
            f.flush()
            if outcome == 'survived':
                print(f'{given.module}:{line} survived\n' + '\n'.join(diff), flush=True)
    survived = sum(line['outcome'] == 'survived' for line in done.values())
    print(f'{given.module}: {len(done) - survived} of {len(done)} mutants killed; {out}')


if __name__ == '__main__':
    main()
