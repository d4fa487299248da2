"""``python -m tests.stops_itself PLACE STEP ...``: rljax.main, which is hit at that place of that step.

Places: "record", the line of the step in metrics.jsonl is half written (SIGKILL); "save", the checkpoint of the step is
being written (SIGKILL); "stage", a stage's weights are written and the checkpoint behind them is not (SIGKILL; STEP
counts within the stage); "asked", the step is under way (SIGTERM); "broken", it is no signal but an error.
"""

import os
import signal
import sys
from typing import Any

from rljax.checkpoint import Checkpointer
from rljax.main import main
from rljax.metrics import MetricsWriter
from rljax.runs import JsonLines

PLACE, STEP = sys.argv[1], int(sys.argv[2])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_line(lines: JsonLines, record: dict[str, Any]) -> None:
    append(lines, record)
    if record["step"] == STEP and lines.path.name == "metrics.jsonl":
        os.truncate(lines.path, os.path.getsize(lines.path) - 40)
        kill()


def half_a_checkpoint(checkpointer: Checkpointer, step: int, *args: Any, **options: Any) -> bool:
    saved = save(checkpointer, step, *args, **options)
    if step == STEP and (PLACE == "stage") == (checkpointer.folder.parent.parent.name == "stages"):
        if PLACE == "stage":
            checkpointer.wait()
        kill()
    return saved


def interrupt(writer: MetricsWriter, step: int, *args: Any) -> None:
    write(writer, step, *args)
    if step == STEP and PLACE == "broken":
        raise RuntimeError("broken on purpose")
    if step == STEP:
        os.kill(os.getpid(), signal.SIGTERM)


append, save, write = JsonLines.append, Checkpointer.save, MetricsWriter.write
if PLACE == "record":
    JsonLines.append = half_a_line  # type: ignore[method-assign]
elif PLACE in ("asked", "broken"):
    MetricsWriter.write = interrupt  # type: ignore[method-assign]
else:
    Checkpointer.save = half_a_checkpoint  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(main([sys.argv[0], *sys.argv[3:]]))
