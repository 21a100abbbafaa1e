"""Settings: module-level names at the top of a script, overridden by Python files and then by --key=value.

    python pretrain.py config/demo.py --diff_lambda=0.1 --max_steps 500 --resume

A script's settings are the assignments of a plain value (number, string, bool, None) to a lower-case name at the top of
its file, with a comment each; a dataclass (the model's configuration) can lend its fields too. An override file is
ordinary Python and is executed: it is code, trusted as such. It sees the settings by name, so that it can compute one
from others, and every lower-case name that it leaves behind must be a setting. The command line comes last and wins.

This file must not know what any setting means.
"""
import ast
import difflib
import io
import os
import tokenize
import types

from engine.errors import ConfigError


class Settings(types.SimpleNamespace):
    """One attribute per setting; `given`, outside vars(), names those that a file or the command line has set."""
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
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip('# ')
            if not token.line[:token.start[1]].strip():
                alone.add(token.start[0])
    body = ast.parse(source).body
    if class_name:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == class_name)
    found = {}
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, 'target', None)
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not isinstance(target, ast.Name) or node.value is None:
            continue
        if not target.id.islower() or target.id.startswith('_'):
            continue
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            continue
        line, comment = node.end_lineno, [comments.get(node.end_lineno, '')]
        while line + 1 in alone:                            # a comment may go on over the next lines
            line += 1
            comment.append(comments[line])
        found[target.id] = (default, ' '.join(comment).strip())
    return found


def configure(script, argv, *lenders):
    """Resolve a script's settings: defaults, then override files, then --key=value.

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
    values = {name: default for name, (default, _) in known.items()}
    files, overrides = parse_arguments(argv, known)
    given = set()
    for path in files:
        before, values = values, run_config_file(path, values, known)
        given |= {name for name in values if values[name] != before[name]}
    for name, text in overrides:
        given.add(name)
        values[name] = checked(name, from_text(name, text, known[name][0]), known[name][0], 'the command line')
    settings = Settings(**values)
    settings.given = given
    return settings


def check_ranges(settings, **ranges):
    """Raise ConfigError if a setting is not a number in its (lowest, highest); None passes."""
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
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
            if is_flag and (following is None or following.lower() not in ('true', 'false', '1', '0')):
                text = 'True'
            elif following is None or following.startswith('--'):
                raise ConfigError(f'--{name} needs a value: write --{name}=VALUE')
            else:
                text = arguments.pop(0)
        overrides.append((name, text))
    return files, overrides


def run_config_file(path, values, known):
    """Execute an override file on top of values (trusted Python) and return the new values."""
    try:
        with open(path, encoding='utf-8') as f:
            code = compile(f.read(), path, 'exec')
    except OSError as error:
        raise ConfigError(f'cannot read the config file {path}: {error.strerror}') from None
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f'{path} is not valid Python: {error}') from None
    namespace = dict(values, __file__=os.path.abspath(path))
    try:
        exec(code, namespace)
    except Exception as error:
        raise ConfigError(f'{path} stopped with {type(error).__name__}: {error}') from None
    result = dict(values)
    for name, value in namespace.items():
        if name.startswith('_') or isinstance(value, (types.ModuleType, types.FunctionType)) or not name.islower():
            continue
        require_known(name, known, path)
        result[name] = checked(name, value, known[name][0], path)
    return result


def require_known(name, known, where):
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f'did you mean {near[0]!r}?' if near else 'see --help for the keys'
    raise ConfigError(f'unknown key {name!r} in {where}: {hint}')


def from_text(name, text, default):
    """A command-line text as a value; strings stay as they are, so that a value may hold any character."""
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        lowered = text.lower()
        if lowered in ('true', '1', 'false', '0'):
            return lowered in ('true', '1')
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def checked(name, value, default, where):
    """value, if it is of the default's type (an int is accepted for a float, anything plain for a None default)."""
    if default is None or value is None:
        if value is None and default is not None:
            raise ConfigError(f'{name} in {where} must be of type {type(default).__name__}, not None')
        return value
    if isinstance(default, bool) or isinstance(value, bool):
        suits = isinstance(value, bool) and isinstance(default, bool)
    elif isinstance(default, float) and isinstance(value, int):
        value, suits = float(value), True
    elif isinstance(default, int) and isinstance(value, float) and value.is_integer():     # 1e6 updates
        value, suits = int(value), True
    else:
        suits = isinstance(value, type(default))
    if not suits:
        raise ConfigError(f'{name} in {where} must be of type {type(default).__name__}, not {value!r}')
    return value


def print_help(script, known):
    print(f'{os.path.basename(script)}: settings, their defaults and what they mean\n'
          'usage: [CONFIG.py ...] [--key=value ...]; the command line wins\n')
    for name, (default, comment) in known.items():
        print(f'  --{name}={default!r:<16} {comment}')


def show(settings, leave_out=()):
    """The resolved settings in one paragraph, for the start of a run."""
    return '  '.join(f'{name}={value!r}' for name, value in vars(settings).items() if name not in leave_out)


def words(text):
    """'a, b' -> ['a', 'b']"""
    return [word.strip() for word in text.split(',') if word.strip()]
