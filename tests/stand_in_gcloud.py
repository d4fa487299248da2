"""A stand-in for gcloud that records its command lines, and can play a worker: what the tests of tpu_scripts/ share."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent / "tpu_scripts"
QUEUED = ["compute", "tpus", "queued-resources"]
WHERE = ["--zone=us-west4-a", "--project=my-project"]

# Writes one line of JSON per call. `list` answers with the next line of the file "states" (the last one stays);
# with a folder "worker", scp copies into it and ssh runs its command there, as the login shell of a worker would.
GCLOUD = """#!{python}
import json, os, pathlib, shutil, subprocess, sys
here, args = pathlib.Path({here!r}), sys.argv[1:]
with open(here / "calls", "a") as calls:
    calls.write(json.dumps(args) + "\\n")
verb, worker, states = args[3], here / "worker", here / "states"
if verb == "list":
    left = states.read_text().splitlines()
    if left[0] == "error":
        sys.exit("ERROR: (gcloud) You do not currently have an active account selected.")
    print(left[0])
    states.write_text("\\n".join(left[1:] or left) + "\\n")
if verb == "scp" and args[5].endswith(":"):
    shutil.copytree(args[4], here / "parcel" / pathlib.Path(args[4]).name, dirs_exist_ok=True)
    if worker.is_dir():
        shutil.copytree(args[4], worker / pathlib.Path(args[4]).name, dirs_exist_ok=True)
if verb == "ssh" and worker.is_dir():
    command = next(a for a in args if a.startswith("--command=")).removeprefix("--command=")
    sys.exit(subprocess.run(["sh", "-c", command], cwd=worker, env=dict(os.environ, HOME=str(worker))).returncode)
"""

# The Python of a worker: records its arguments. `-m venv` copies it there; rljax.main behaves as its arguments say.
PYTHON = """#!{python}
import json, os, pathlib, shutil, signal, sys, time
args = sys.argv[1:]
record = dict(args=args, cwd=os.getcwd(), flags=os.environ.get("LIBTPU_INIT_ARGS"))
with open({here!r} + "/python_calls", "a") as calls:
    calls.write(json.dumps(record) + "\\n")
if args[:2] in (["-m", "venv"], ["-m", "uv"]):
    bin = pathlib.Path(args[-1], "bin")
    bin.mkdir(parents=True)
    shutil.copy(__file__, bin / "python")
if args[:2] == ["-m", "rljax.main"]:
    if "--save" in args:
        signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(7)))
    if "--deaf" in args:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("step 1", flush=True)
    if "--save" in args or "--deaf" in args:
        time.sleep(60)
    print("step 2", flush=True)
    sys.exit(3 if "--fail" in args else 0)
"""


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Cloud:
    """A folder with the stand-ins, their records, a small checkout of a project, and the home of a worker."""

    def __init__(self, here: Path):
        self.here, self.worker, self.checkout = here, here / "worker", here / "checkout"
        shutil.copytree(SCRIPTS, self.checkout / "tpu_scripts")
        (self.checkout / "pyproject.toml").write_text("")
        (self.checkout / ".gitignore").write_text("/runs/\n")
        subprocess.run(["git", "init", "--quiet"], cwd=self.checkout, check=True)
        executable(here / "bin/gcloud", GCLOUD.format(python=sys.executable, here=str(here)))
        self.states("")

    def states(self, *lines: str) -> None:
        (self.here / "states").write_text("\n".join(lines) + "\n")

    def run(self, script: str, *args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}
        settings = dict(TPU_NAME="my-tpu", TPU_ZONE="us-west4-a", TPU_PROJECT="my-project")
        env = inherited | dict(PATH=f"{self.here}/bin:{os.environ['PATH']}") | settings | env
        command = [str(self.checkout / f"tpu_scripts/{script}.sh"), *args]
        return subprocess.run(command, env=env, input=stdin, capture_output=True, text=True, timeout=60)

    def calls(self) -> list[list[str]]:
        path = self.here / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def python_calls(self) -> list[dict]:
        return [json.loads(line) for line in (self.here / "python_calls").read_text().splitlines()]

    def install_worker(self) -> None:
        """The worker as setup.sh leaves it, without going through the package index."""
        for version in ("3.13", "3.12", "3.11"):
            executable(self.here / f"bin/python{version}", PYTHON.format(python=sys.executable, here=str(self.here)))
        self.worker.mkdir()
        done = self.run("setup")
        assert done.returncode == 0, done.stderr
        (self.here / "python_calls").unlink()
        (self.here / "calls").unlink()

    def until(self, *words: str) -> str:
        """Status of the worker, once it says all of these words."""
        self.states("ACTIVE v5litepod-8")
        for _ in range(200):
            said = self.run("status").stdout
            if all(word in said for word in words):
                return said
            time.sleep(0.05)
        raise AssertionError(f"the worker never said {words}, but {said!r}")


@contextmanager
def played_cloud(here: Path) -> Iterator[Cloud]:
    """A stand-in cloud; what still runs on its worker at the end is killed."""
    cloud = Cloud(here)
    yield cloud
    pid = cloud.worker / "rljax/pid"
    if pid.exists():
        command = Path("/proc", pid.read_text().strip(), "cmdline")
        if command.exists() and b"rljax.main" in command.read_bytes():
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def one_sentence(done: subprocess.CompletedProcess[str], script: str, code: int) -> str:
    assert done.returncode == code, done
    assert done.stderr.startswith(f"{script}.sh: ") and done.stderr.count("\n") == 1, done.stderr
    assert "unbound variable" not in done.stderr and done.stderr.rstrip().endswith((".", "?"))
    return done.stderr
