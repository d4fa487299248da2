"""Whose a folder is, who sees it, what is written there, and that its JSON lines survive kills and full disks."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

import rljax
from rljax.runs import ConfigMismatch, JsonLines, RunFolderError, check_space, flatten, open_run, versions
from tests.stand_in_bucket import played_bucket

pytestmark = pytest.mark.fast

CONFIG = {"seed": 1, "model": {"path": "m", "sizes": (2, 3)}, "data": {"train": "a.jsonl"}, "steps": 10, "stages": {}}
IDENTITY = ("seed", "model", "data.train")


def open_here(folder, config=CONFIG, **kwargs):
    return open_run(folder, config, {"jax": "1"}, identity_keys=IDENTITY, **kwargs)


def test_a_new_run_writes_config_and_versions(tmp_path):
    folder = open_here(tmp_path / "a" / "run")
    assert json.loads((folder / "config.json").read_text()) == json.loads(json.dumps(CONFIG))
    expected = "data.train = 'a.jsonl'\nmodel.path = 'm'\nmodel.sizes = (2, 3)\nseed = 1\nstages = {}\nsteps = 10\n"
    assert (folder / "config.txt").read_text() == expected
    assert json.loads((folder / "versions.json").read_text()) == {"jax": "1"}


def test_the_same_run_goes_on_and_its_changes_are_kept(tmp_path):
    folder = open_here(tmp_path)
    open_here(tmp_path)
    assert sorted(p.name for p in folder.iterdir() if p.name[0] != ".") == [
        "config.json",
        "config.txt",
        "versions.json",
    ]
    open_here(tmp_path, CONFIG | {"steps": 20})
    open_here(tmp_path, CONFIG | {"steps": 30})
    steps = [json.loads((folder / f"config{n}.json").read_text())["steps"] for n in (".1", ".2", "")]
    assert steps == [10, 20, 30]
    assert not (folder / "versions.1.json").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 2}, "seed is 1 there and 2 here"),
        ({"model": {"path": "m", "sizes": (2, 4)}}, r"model.sizes is \[2, 3\] there and \[2, 4\] here"),
        ({"model": {"path": "m"}}, r"model.sizes is \[2, 3\] there and None here"),
        ({"data": {"train": "b.jsonl"}}, "data.train is 'a.jsonl' there and 'b.jsonl' here"),
    ],
)
def test_a_folder_of_another_run_is_refused_by_key(tmp_path, change, said):
    open_here(tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ConfigMismatch, match=f"belongs to another run: {said}"):
        open_here(tmp_path, CONFIG | change)
    assert (tmp_path / "config.json").read_text() == before


def test_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunFolderError, match=r"holds 'thesis.tex' but no config.json of a run"):
        open_here(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"config.json is not JSON"):
        open_here(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot be written \(.*Not a directory.*\); name another folder"):
        open_here(tmp_path / "file" / "run")


def together(folders: list[Path]) -> list[Exception | None]:
    """One thread a process, each with its own idea of the folder; ``gather`` is a barrier that exchanges numbers."""
    numbers, barrier = [0] * len(folders), threading.Barrier(len(folders), timeout=20)
    outcomes: list[Exception | None] = [None] * len(folders)

    def process(index: int) -> None:
        def gather(number: int) -> list[int]:
            numbers[index] = number
            barrier.wait()
            everyone = list(numbers)
            barrier.wait()
            return everyone

        try:
            open_here(folders[index], process_index=index, gather=gather)
        except RunFolderError as error:
            outcomes[index] = error

    threads = [threading.Thread(target=process, args=(i,)) for i in range(len(folders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_processes_that_share_the_folder_go_on(tmp_path):
    assert together([tmp_path] * 3) == [None] * 3
    assert (tmp_path / "config.json").exists()


def test_an_unshared_folder_is_refused_by_every_process(tmp_path):
    outcomes = together([tmp_path / "a", tmp_path / "b", tmp_path / "a"])
    assert all("is not shared" in str(o) and "processes [1] do not see" in str(o) for o in outcomes)
    assert not (tmp_path / "a" / "config.json").exists()


def test_what_process_0_cannot_write_is_refused_by_every_process(tmp_path):
    (tmp_path / "file").write_text("")
    outcomes = together([tmp_path / "file" / "run"] * 2)
    assert "Not a directory" in str(outcomes[0]) and "process 0 says why" in str(outcomes[1])


def test_versions_name_what_made_the_run():
    found = versions(seed=7, command=["python", "-m", "rljax.main", "--config", "my file.py"])
    assert found["jax"] == jax.__version__ and found["rljax"] == rljax.__version__
    assert (found["seed"], found["device_count"], found["process_count"]) == (7, 8, 1)
    assert found["command"] == "python -m rljax.main --config 'my file.py'"
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert found["git_commit"] == (head.stdout.strip() if head.returncode == 0 else None)
    json.dumps(found)


def test_space_is_checked_before_it_runs_out(tmp_path):
    check_space(tmp_path, 1)
    check_space("gs://bucket/run", 2**60)
    with pytest.raises(RunFolderError, match=r"GiB free and the run needs 1073741824.000 GiB; free some"):
        check_space(tmp_path, 2**60)


def test_flatten_sorts_and_keeps_empty_groups():
    assert flatten({"b": {"y": 1, "x": {}}, "a": 2}) == {"a": 2, "b.x": {}, "b.y": 1}


def records(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]


def test_lines_are_on_disk_before_a_kill(tmp_path):
    program = (
        "import os, signal, sys; from rljax.runs import JsonLines\n"
        "lines = JsonLines(sys.argv[1])\n"
        "for step in range(3): lines.append({'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "m.jsonl")], check=False)
    assert done.returncode == -9
    assert records(tmp_path / "m.jsonl") == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_truncate_drops_later_steps_and_half_a_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1, "t": "a\u2028b"}\n{"step": 3}\n{"step": 2}\n{"step": 2, "rew')
    lines = JsonLines(path)
    lines.truncate_after(2)
    lines.append({"step": 3, "again": True})
    lines.close()
    assert records(path) == [{"step": 1, "t": "a\u2028b"}, {"step": 2}, {"step": 3, "again": True}]


def test_lines_are_strict_json(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        lines.append({"step": 1, "loss": float("nan")})
    lines.close()
    assert records(tmp_path / "m.jsonl") == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_said_in_one_sentence(tmp_path):
    (tmp_path / "m.jsonl").symlink_to("/dev/full")
    lines = JsonLines(tmp_path / "m.jsonl")
    with pytest.raises(RunFolderError, match=r"no space left to write .*m.jsonl; free some"):
        lines.append({"step": 1})
    lines.close()


@pytest.fixture
def bucket():
    with played_bucket():
        yield "gs://bucket"


def test_an_object_store_holds_runs_too(bucket):
    folder = open_here(f"{bucket}/run")
    assert str(folder) == "gs://bucket/run"
    open_here(f"{bucket}/run")
    with pytest.raises(ConfigMismatch, match="gs://bucket/run belongs to another run: seed"):
        open_here(f"{bucket}/run", CONFIG | {"seed": 5})
    lines = JsonLines(folder / "metrics.jsonl", upload_every_s=1000)
    lines.append({"step": 1})
    assert not (folder / "metrics.jsonl").exists()
    lines.flush()
    lines.append({"step": 2})
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
    lines.close()
    again = JsonLines(folder / "metrics.jsonl", upload_every_s=0)
    again.truncate_after(1)
    again.append({"step": 2, "again": True})
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2, "again": true}\n'
    again.close()
