"""``python -m rljax.main --config configs/x.py --config.optim.learning_rate=1e-6``: the wiring, and nothing else."""

import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from rljax.config import Config, ConfigError, make_config, resolved
from rljax.plan import dry_run, print_config
from rljax.session import open_session, start_devices
from rljax.trainer import RunStopped, finish, open_training, train

USER_ERROR, STOPPED = 2, 3


def parse(argv: Sequence[str]) -> tuple[Config, flags.FlagValues]:
    """The config of a command line. Raises ConfigError."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "a file with get_config()", flag_values=values)
    flags.DEFINE_bool("print_config", False, "show the resolved config and leave", flag_values=values)
    flags.DEFINE_bool(
        "dry_run",
        False,
        "load config, tokenizer, one batch and the mesh; print the plan; compile nothing",
        flag_values=values,
    )
    try:
        rest = values(list(argv))
    except FileNotFoundError as error:
        raise ConfigError(f"--config: there is no file {error.filename or error}") from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    if len(rest) > 1:
        raise ConfigError(f"{rest[1]!r} is not a flag; settings are given as --config.key=value")
    if values.config is None:
        raise ConfigError("--config is not set: name a file such as configs/quickstart.py")
    return make_config(values.config), values


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, 2 for a user's mistake (one sentence on stderr), 3 for a run that a limit of its config stopped."""
    argv = sys.argv if argv is None else argv
    try:
        config, options = parse(argv)
        if options.print_config:
            print_config(resolved(config))
            return 0
        start_devices(config)
        session = open_session(config)
        if options.dry_run:
            return dry_run(session)
        run = open_training(session, command=argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    with run:
        try:
            train(run)
        except RunStopped as stop:
            run.writer.event(run.progress.step, f"stopped: {stop}")
            return STOPPED
        finish(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
