"""Settings: module-level names at the top of a script, overridden by Python files and then by --key=value.

    python pretrain.py config/demo.py --diff_lambda=0.1 --max_steps 500 --resume

A script's settings are the assignments of a plain value (number, string, bool, None) to a lower-case name at the top of
its file, with a comment each; a dataclass (the model's configuration) can lend its fields too. An override file is
ordinary Python and is executed: it is code, trusted as such. It sees the settings by name, so that it can compute one
from others, and every lower-case name that it leaves behind must be a setting; what it imports or defines, and names
that begin with an underscore, are its own. include('other.py') runs another file first. What the command line sets is
set before the files, so that they compute with it, and stays.

This file must not know what any setting means.
"""
import ast
import difflib
import itertools
import os
import types

from engine.errors import ConfigError

FLAGS = {'true': True, '1': True, 'false': False, '0': False}


class Settings(types.SimpleNamespace):
    """One attribute per setting. `given`, which is no setting and not in vars(): the names of those that a file or the
    command line has set, be it to their defaults."""
    __slots__ = ('given',)

    def but(self, **changes):
        """The same settings with some changed."""
        settings = Settings(**{**vars(self), **changes})
        settings.given = self.given
        return settings


def settings_of(path, class_name=None):
    """-> {name: (default, comment)} of a script's settings, or of a dataclass in it, in the order of the file."""
    with open(path, encoding='utf-8') as f:
        source = f.read()
    body, lines, found = ast.parse(source).body, source.split('\n'), {}
    if class_name:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == class_name)
    for node in body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) or node.value is None:
            continue
        targets = getattr(node, 'targets', None) or [node.target]
        names = [part.id for target in targets for part in ast.walk(target)
                 if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store) and is_setting(part.id)]
        if not names:
            continue
        try:
            [name], value = names, ast.literal_eval(node.value)
            if not isinstance(targets[0], ast.Name) or isinstance(node, ast.AugAssign):
                raise ValueError
        except (ValueError, TypeError):
            raise ConfigError(f'{path}, line {node.lineno}: {" and ".join(names)} must be plain values to be '
                              'settings, one a line; in capitals or with an underscore ahead they are none') from None
        comment = [lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode()]
        comment += itertools.takewhile(lambda line: line.strip().startswith('#'), lines[node.end_lineno:])
        found[name] = value, ' '.join(line.lstrip('# ') for line in comment).strip()
    return found


def is_setting(name):
    return name.islower() and not name.startswith('_')


def configure(script, argv, *lenders):
    """Resolve a script's settings: defaults, then override files, which see --key=value and do not change it.

    script: path of the script; argv: sys.argv[1:]; lenders: (path, class name) of dataclasses whose fields are settings
    too, (path,) of scripts whose settings are.
    -> Settings with one attribute per setting. Prints the list and exits for --help. Raises ConfigError.
    """
    known = settings_of(script)
    for lender in lenders:
        known = {**known, **settings_of(*lender), **known}                  # the script's own default wins
    if '--help' in argv or '-h' in argv:
        print_help(script, known)
        raise SystemExit(0)
    files, overrides = parse_arguments(argv, known)
    line = {name: checked(name, from_text(text, known[name][0]), known[name][0], 'the command line')
            for name, text in overrides}
    values = {**{name: default for name, (default, _) in known.items()}, **line}
    namespace = Namespace(values, line)
    for path in files:
        namespace.run(path)
    set_in_files = namespace.settings(known)
    settings = Settings(**{**values, **set_in_files, **line})
    settings.given = set_in_files.keys() | line.keys()
    return settings


def check_ranges(settings, **ranges):
    """Raise ConfigError if a setting is not a number in its (lowest, highest); None passes."""
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (is_number and low <= value <= high):
            raise ConfigError(f'{name} = {value!r} must be a number from {low:g} to {high:g}')


def parse_arguments(argv, known):
    """Split argv into override files and (name, text) pairs; accepts --key=value, --key value and --flag."""
    files, overrides = [], []
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith('--'):
            files.append(argument)
            continue
        name, equals, text = argument[2:].partition('=')
        require_known(name, known, 'the command line')
        if not equals:
            is_flag = isinstance(known[name][0], bool)
            following = arguments[0] if arguments else None
            if is_flag and (following is None or following.lower() not in FLAGS):
                text = 'True'
            elif following is None or following.startswith('--'):
                raise ConfigError(f'--{name} needs a value: write --{name}=VALUE')
            else:
                text = arguments.pop(0)
        overrides.append((name, text))
    return files, overrides


class Namespace(dict):
    """What override files see and assign. It notes each assigned name with the value and the file, whatever the value
    was before; names in `fixed`, the command line's, keep theirs."""

    def __init__(self, values, fixed):
        super().__init__(values, include=self.include)
        self.before, self.fixed, self.assigned, self.files = dict(self), fixed, {}, []

    def __setitem__(self, name, value):
        self.assigned[name] = value, self.files[-1]
        if name not in self.fixed:
            super().__setitem__(name, value)

    def __delitem__(self, name):
        super().__delitem__(name)
        self.assigned.pop(name, None)

    def include(self, path):
        """Run another file, named relative to the one that includes it, as if it stood here."""
        self.run(os.path.join(os.path.dirname(self.files[-1]), path))

    def run(self, path):
        """Execute an override file (trusted Python). Raises ConfigError."""
        if os.path.realpath(path) in map(os.path.realpath, self.files):
            raise ConfigError(f'{path} includes itself, by way of {self.files[-1]}')
        code = compiled(path)
        self.files.append(path)
        try:
            super().__setitem__('__file__', os.path.abspath(path))
            exec(code, self)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f'{path} stopped with {type(error).__name__}: {error}') from None
        finally:
            self.files.pop()
            super().__setitem__('__file__', os.path.abspath((self.files or [path])[-1]))
        for name in self.before.keys() & self.keys() - self.assigned.keys():
            if self[name] is not self.before[name]:                         # by a function's `global`
                self.assigned[name] = self[name], path

    def settings(self, known):
        """-> {name: value} of the settings that the files have set. Raises ConfigError."""
        found = {}
        for name, (value, path) in self.assigned.items():
            if is_setting(name) and (name in known or not callable(value) and not isinstance(value, types.ModuleType)):
                require_known(name, known, path, f'; a name of the file\'s own begins with an underscore: _{name}')
                found[name] = checked(name, value, known[name][0], path)
        return found


def compiled(path):
    """An override file's code. A line that has no effect, say lr == 3, is an error: it was meant to set something."""
    try:
        with open(path, encoding='utf-8') as f:
            tree = ast.parse(f.read(), path)
        code = compile(tree, path, 'exec')
    except OSError as error:
        raise ConfigError(f'cannot read the config file {path}: {error.strerror}') from None
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f'{path} is not valid Python: {error}') from None
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(getattr(node.value, 'value', None), str)
        if (isinstance(node, ast.Expr) and not is_text and not isinstance(node.value, ast.Call)
                or isinstance(node, ast.AnnAssign) and node.value is None):
            raise ConfigError(f'{path}, line {node.lineno}: `{ast.unparse(node)}` sets nothing: write NAME = VALUE')
    return code


def require_known(name, known, where, advice=''):
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f'did you mean {near[0]!r}?' if near else 'see --help for the keys'
    raise ConfigError(f'unknown key {name!r} in {where}: {hint}{advice}')


def from_text(text, default):
    """A command-line text as a value; strings stay as they are, so that a value may hold any character."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        return FLAGS.get(text.lower(), text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def checked(name, value, default, where):
    """value, if it is of the default's type (an int is accepted for a float, anything plain for a None default)."""
    if default is None:
        return value
    kind, is_flag = type(default), isinstance(value, bool)
    if kind is float and isinstance(value, int) and not is_flag:
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():     # 1e6 updates
        return int(value)
    if not isinstance(value, kind) or is_flag and kind is not bool:
        raise ConfigError(f'{name} in {where} must be of type {kind.__name__}, not {value!r}')
    return value


def print_help(script, known):
    print(f'{os.path.basename(script)}: settings, their defaults and what they mean\n'
          'usage: [CONFIG.py ...] [--key=value ...]; the command line wins\n')
    for name, (default, comment) in known.items():
        print(f'  {f"--{name}={default!r}":<26} {comment}')


def show(settings, *sources, leave_out=()):
    """The settings of a run that differ from their defaults in the sources, arguments of settings_of each. Its log has
    all of them."""
    defaults = {name: default for source in sources for name, (default, _) in settings_of(*source).items()}
    return '  '.join(f'{name}={value!r}' for name, value in vars(settings).items()
                     if name not in leave_out and value != defaults[name])


def words(text):
    """'a, b' -> ['a', 'b']"""
    return [word.strip() for word in text.split(',') if word.strip()]
