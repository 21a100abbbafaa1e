"""Runs of a stage, each a command in a process of its own with a folder of its own, for tables that need many."""
import os
import subprocess
import sys

from engine.errors import ConfigError, RunError
from engine.logs import lines_of


def to_its_end(command, out_dir, finished):
    """Run a stage's command to its end, from wherever it stopped in its out_dir -> what finished(lines of its log)
    says, which is None of a run on its way. Raises ConfigError for what the stage calls a user's mistake, RunError."""
    if (found := finished(log_lines(out_dir))) is None:
        how = '--resume' if os.path.exists(os.path.join(out_dir, 'ckpt.pt')) else '--overwrite'
        result = subprocess.run([sys.executable, *command, how], capture_output=True, text=True)
        if result.returncode:
            said = result.stderr.strip()
            if result.returncode == 2:
                raise ConfigError(said.splitlines()[-1].removeprefix('error: '))
            raise RunError(f'{" ".join(command)} ended with {result.returncode}: {said[-300:]}')
        found = finished(log_lines(out_dir))
    return found


def log_lines(out_dir):
    """The lines of a run's log, none if it has not begun."""
    return list(lines_of(out_dir)) if os.path.exists(os.path.join(out_dir, 'log.jsonl')) else []
