"""docs/settings.md: every setting of every script, its defaults and who would set it.

    python -m tests.settings_table          # writes the page anew; who would set a new setting is then filled in there

The last column is written by hand and kept. tests/test_configurator.py compares the page with the scripts.
"""
import glob
import os
import re

from configurator import settings_of

from .conftest import ROOT

PAGE = os.path.join(ROOT, 'docs', 'settings.md')
HEAD = """# Every setting, and who would set it

`--key=value` on the command line, or `key = value` in a Python file that is named there; such a file can build on
another with `include('other.py')` and compute with what the command line says, which wins. `python SCRIPT.py --help`
says what each setting means. The page is written by `python -m tests.settings_table`, but for its last column.

| setting | where, with its default | who would set it |
|---|---|---|
"""


def scripts():
    """{name on the page: arguments of settings_of}"""
    found = {'model': ('model.py', 'ASDAConfig')}
    found.update({name: (f'{name}.py',) for name in ('prepare', 'pretrain', 'finetune', 'eval')})
    for folder in ('recipes', 'tools'):
        for path in sorted(glob.glob(os.path.join(ROOT, folder, '*.py'))):
            name = os.path.basename(path)[:-3]
            found[f'prepare {name}'.replace('prepare plan', 'prepare, of files') if folder == 'recipes' else name] = (
                f'{folder}/{name}.py',)
    return found


def defaults():
    """{setting: {script: default}}, in the order of the scripts."""
    found = {}
    for script, (path, *class_name) in scripts().items():
        for name, (default, _) in settings_of(os.path.join(ROOT, path), *class_name).items():
            found.setdefault(name, {})[script] = default
    return found


def who_on_the_page():
    """{setting: last column}"""
    if not os.path.exists(PAGE):
        return {}
    with open(PAGE, encoding='utf-8') as f:
        return dict(re.findall(r'^\| `(\w+)` \|.*\| ([^|]*) \|$', f.read(), re.M))


def page():
    who, rows = who_on_the_page(), []
    for name, where in sorted(defaults().items()):
        values = {}
        for script, default in where.items():
            values.setdefault(repr(default), []).append(script)
        places = '; '.join(f'{", ".join(names)}: `{value}`' for value, names in values.items())
        rows.append(f'| `{name}` | {places} | {who.get(name, "?")} |\n')
    return HEAD + ''.join(rows)


def main():
    text = page()
    with open(PAGE, 'w', encoding='utf-8') as f:
        f.write(text)


if __name__ == '__main__':
    main()
