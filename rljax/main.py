"""The entry point, ``python -m rljax.main --config configs/x.py --config.optim.learning_rate=1e-6``."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rljax.checkpoint import CheckpointError
from rljax.config import USAGE, ConfigError, parse
from rljax.data.rows import DataError
from rljax.models.hf_config import ModelFolderError
from rljax.plan import dry_run, print_config
from rljax.run import Run, finish, open_training
from rljax.runs import RunFolderError, said_if_full
from rljax.session import open_session, start_devices
from rljax.trainer import RunStopped, train

DONE, USER_ERROR, STOPPED = 0, 2, 3

# What may turn out only while a run is under way: a full disk, a select that leaves no row, a folder in the way.
MISTAKES = (RunFolderError, CheckpointError, DataError, ConfigError, ModelFolderError)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 2 for a user's mistake (one sentence on stderr), 3 for a run that a limit of its config stopped."""
    argv = sys.argv if argv is None else argv
    if {"--help", "-h"} & set(argv):
        print(USAGE, end="")
        return DONE
    try:
        run = _set_up(argv)
    except (ValueError, OSError) as error:
        if not _is_mistake(error):
            raise
        return _say(error)
    try:
        return DONE if run is None else _train(run)
    except MISTAKES as error:
        return _say(error)


def _set_up(argv: Sequence[str]) -> Run | None:
    """Everything that can be checked, checked; None where the command only wanted to look."""
    command = parse(argv[1:])
    if command.print_config:
        print_config(command.config)
        return None
    start_devices(command.config)
    session = open_session(command.config)
    if command.dry_run:
        dry_run(session)
        return None
    return open_training(session, command=argv)


def _train(run: Run) -> int:
    with said_if_full(run.session.folder), run:
        try:
            train(run)
        except RunStopped as stop:
            finish(run, stopped=str(stop))
            return STOPPED
        finish(run)
    return DONE


def _is_mistake(error: Exception) -> bool:
    """A user's, that is: what rljax itself refuses, or a file that cannot be used. Anything else is a bug."""
    if isinstance(error, OSError):
        return error.filename is not None
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and Path(place.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def _say(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
