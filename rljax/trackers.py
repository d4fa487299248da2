"""TensorBoard and Weights & Biases behind one interface; neither is imported unless asked for."""

import secrets
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from etils import epath


class Tracker(Protocol):
    def start_at(self, step: int) -> None:
        """A resumed run will write the steps after ``step`` again."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def open_tracker(kind: str, folder: epath.Path, config: Mapping[str, Any]) -> Tracker:
    """``tensorboard`` or ``wandb``. Raises ValueError where its package is not installed."""
    kinds: dict[str, Callable[..., Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}
    try:
        return kinds[kind](folder, config)
    except ImportError as error:
        raise ValueError(f"config.log.{kind} needs a package: pip install 'rljax[tracking]' ({error})") from error


class _TensorBoard:
    """Event files in the run's ``tensorboard`` folder; those of a resumed run hide the steps it writes again."""

    def __init__(self, folder: epath.Path, _: Mapping[str, Any]):
        from tensorboardX import SummaryWriter

        self._open, self._folder = SummaryWriter, str(folder / "tensorboard")
        self._purge_step: int | None = None
        self._writer: Any = None

    def start_at(self, step: int) -> None:
        self._purge_step = step + 1

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._open(self._folder, purge_step=self._purge_step)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Wandb:
    """A run of project rljax; its id stands in the run's folder, so that a resumed run goes on in the same one."""

    def __init__(self, folder: epath.Path, config: Mapping[str, Any]):
        import wandb

        path = folder / "wandb_id.txt"
        if not path.exists():
            path.write_text(secrets.token_hex(4))
        self._run = wandb.init(
            project="rljax", name=folder.name, id=path.read_text(), resume="allow", config=dict(config)
        )

    def start_at(self, step: int) -> None:
        """Weights & Biases keeps the first value that it got for a step."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()
