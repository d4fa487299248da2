"""Settings: from a config file and the command line to frozen dataclasses. ConfigDict is not used beyond this point."""

from rljax.config.build import algo_defaults, default_config, make_config, resolved
from rljax.config.command_line import USAGE, Command, parse
from rljax.config.errors import ConfigError
from rljax.config.fields import Config, DataConfig, EvalConfig, RolloutConfig, StageConfig, identity_keys

__all__ = [
    "USAGE",
    "Command",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "RolloutConfig",
    "StageConfig",
    "algo_defaults",
    "default_config",
    "identity_keys",
    "make_config",
    "parse",
    "resolved",
]
