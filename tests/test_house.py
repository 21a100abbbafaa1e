"""The rooms: what imports what.   python -m pytest tests/test_house.py"""
import ast
import glob
import graphlib
import os

from .conftest import ROOT


def imported(tree):
    """Names of modules that a file imports, within functions too; not under `if __name__ == '__main__'`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and '__main__' in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:           # the tests' own are relative
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)
        yield from imported(node)


def arrows():
    """{module of the product: modules of ours that it imports}"""
    paths = glob.glob('*.py', root_dir=ROOT)
    for room in glob.glob('*/__init__.py', root_dir=ROOT):
        paths += glob.glob(os.path.join(os.path.dirname(room), '*.py'), root_dir=ROOT)
    ours = {path[:-3].replace(os.sep, '.').removesuffix('.__init__'): path for path in paths}
    found = {}
    for module, path in ours.items():
        with open(os.path.join(ROOT, path), encoding='utf-8') as f:
            found[module] = {name for name in imported(ast.parse(f.read())) if name in ours and name != module}
    return {module: names for module, names in found.items() if not module.startswith('tests')}


def test_no_arrow_leads_back():
    """No circle of imports, late ones included; the product needs nothing of the tests, the method nothing of ours."""
    found = arrows()
    order = list(graphlib.TopologicalSorter(found).static_order())          # raises CycleError, which names a circle
    assert len(order) > 40 and not any(name.startswith('tests') for name in order)
    assert found['model'] == set()
