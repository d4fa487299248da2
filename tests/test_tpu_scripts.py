"""The command lines of tpu_scripts/, exactly, against a stand-in gcloud."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.stand_in_gcloud import QUEUED, SCRIPTS, WHERE, one_sentence, played_cloud

COMMANDS = ["create", "wait", "setup", "launch", "logs", "status", "copy", "stop", "delete"]


@pytest.fixture
def cloud(tmp_path):
    with played_cloud(tmp_path) as cloud:
        yield cloud


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is part of the dev extra"
    files = [str(path) for path in sorted(SCRIPTS.glob("*.sh"))]
    assert len(files) == len(COMMANDS) + 2
    done = subprocess.run([shellcheck, "-x", *files], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("script", COMMANDS)
def test_help_names_every_flag(cloud, script):
    done = cloud.run(script, "--help", TPU_NAME="", PATH=os.environ["PATH"])
    assert (done.returncode, done.stderr) == (0, "")
    own = re.search(r'^parse "(.*?)" "(.*?)" ', (SCRIPTS / f"{script}.sh").read_text(), re.MULTILINE)
    for flag in f"name zone project iap dry-run {own[1]} {own[2]}".split():
        assert re.search(rf"^ +--{flag} ", done.stdout, re.MULTILINE), flag
    assert f"{script}.sh --name my-tpu" in done.stdout and "shellcheck" not in done.stdout


@pytest.mark.parametrize("script", COMMANDS)
def test_misuse_is_one_sentence_and_calls_nothing(cloud, script):
    assert "unknown flag --sport;" in one_sentence(cloud.run(script, "--sport"), script, 2)
    assert "--name needs a value" in one_sentence(cloud.run(script, "--name"), script, 2)
    assert "--dry-run takes no value" in one_sentence(cloud.run(script, "--dry-run=no"), script, 2)
    assert "--name NAME or set TPU_NAME" in one_sentence(cloud.run(script, TPU_NAME=""), script, 2)
    assert "'my tpu' may hold" in one_sentence(cloud.run(script, "--name", "my tpu"), script, 2)
    assert "'1tpu' has to begin" in one_sentence(cloud.run(script, "--name=1tpu"), script, 2)
    assert cloud.calls() == []


@pytest.mark.parametrize("script", COMMANDS)
def test_without_gcloud(cloud, tmp_path, script):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("env", "bash", "basename", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    assert "install the Google Cloud CLI" in one_sentence(cloud.run(script, PATH=str(tools)), script, 2)


CREATE = [
    (["--type", "v4-8"], ["v4-8", "tpu-ubuntu2204-base", "--node-id=my-tpu"]),
    (["--type=v5e-16", "--spot"], ["v5litepod-16", "v2-alpha-tpuv5-lite", "--node-id=my-tpu", "--spot"]),
    (["--type", "v5litepod-8", "--reserved"], ["v5litepod-8", "v2-alpha-tpuv5-lite", "--node-id=my-tpu", "--reserved"]),
    (["--type", "v5p-8", "--node-count", "1"], ["v5p-8", "v2-alpha-tpuv5", "--node-id=my-tpu"]),
    (["--type", "v6e-256", "--node-count=2"], ["v6e-256", "v2-alpha-tpuv6e", "--node-count=2", "--node-prefix=my-tpu"]),
    (["--type", "v6e-8", "--runtime-version", "other"], ["v6e-8", "other", "--node-id=my-tpu"]),
    (["--type", "v6e-8", "--", "--network=n"], ["v6e-8", "v2-alpha-tpuv6e", "--network=n", "--node-id=my-tpu"]),
]


@pytest.mark.parametrize("args, expected", CREATE)
def test_create(cloud, args, expected):
    assert cloud.run("create", *args).returncode == 0
    kind, image, *rest = expected
    flags = [f"--accelerator-type={kind}", f"--runtime-version={image}", *rest]
    assert cloud.calls()[-1] == [*QUEUED, "create", "my-tpu", *flags, *WHERE]


def test_settings_by_flag_win_over_the_environment_and_may_be_absent(cloud):
    cloud.run("create", "--name", "other", "--zone=z", "--project", "p", TPU_TYPE="v4-8")
    assert cloud.calls()[-1][4] == "other" and cloud.calls()[-1][-2:] == ["--zone=z", "--project=p"]
    cloud.run("create", TPU_TYPE="v4-8", TPU_ZONE="", TPU_PROJECT="")
    assert cloud.calls()[-1][-1] == "--node-id=my-tpu"


def test_create_misuse(cloud):
    for args, words in [
        ([], "which accelerator?"),
        (["--type", "v7x-8"], "unknown accelerator type 'v7x-8'; v4-N, v5e-N, v5p-N and v6e-N are known."),
        (["--type", "v4-8", "--node-count", "two"], "--node-count takes a whole number, not 'two'."),
        (["--type", "v4-8", "--node-count", "0"], "--node-count is at least 1."),
        (["--type", "v4-8", "--spot", "--reserved"], "--spot and --reserved exclude each other."),
    ]:
        assert words in one_sentence(cloud.run("create", *args), "create", 2)
    assert cloud.calls() == []


def test_create_twice_asks_once(cloud):
    cloud.states("WAITING_FOR_RESOURCES v5litepod-16")
    done = cloud.run("create", "--type", "v5e-16")
    assert (done.returncode, done.stdout) == (0, "my-tpu: already there (WAITING_FOR_RESOURCES).\n")
    assert "another type (v5litepod-16)" in one_sentence(cloud.run("create", "--type", "v4-8"), "create", 1)
    cloud.states("SUSPENDED v5litepod-16")
    assert "delete.sh --name my-tpu first" in one_sentence(cloud.run("create", "--type", "v5e-16"), "create", 1)
    cloud.states("error")
    done = cloud.run("create", "--type", "v5e-16")
    assert done.returncode == 1 and "active account" in done.stderr
    assert [call[3] for call in cloud.calls()] == ["list"] * 4


def test_wait(cloud):
    cloud.states("WAITING_FOR_RESOURCES v4-8", "WAITING_FOR_RESOURCES v4-8", "PROVISIONING v4-8", "ACTIVE v4-8")
    done = cloud.run("wait", "--every-s", "0")
    assert done.returncode == 0
    assert done.stdout.split("\n") == [f"my-tpu: {s}" for s in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")] + [
        ""
    ]
    output = "--format=value[separator=' '](state.state,tpu.nodeSpec[0].node.acceleratorType)"
    assert cloud.calls() == [[*QUEUED, "list", "--filter=name~/my-tpu$", output, *WHERE]] * 4

    cloud.states("PROVISIONING v4-8", "FAILED v4-8")
    assert "'my-tpu' is FAILED" in one_sentence(cloud.run("wait", "--every-s", "0"), "wait", 1)
    cloud.states("")
    assert "does not exist" in one_sentence(cloud.run("wait"), "wait", 1)
    cloud.states("PROVISIONING v4-8")
    late = cloud.run("wait", "--every-s", "1", "--timeout-s", "1")
    assert "still PROVISIONING after 1 s" in one_sentence(late, "wait", 1)


def test_setup_sends_the_checkout_as_it_stands(cloud):
    for name in ("tracked.py", "gone.py", "new file.py", "runs/model.bin"):
        (cloud.checkout / name).parent.mkdir(exist_ok=True)
        (cloud.checkout / name).write_text("")
    subprocess.run(["git", "add", "tracked.py", "gone.py"], cwd=cloud.checkout, check=True)
    (cloud.checkout / "gone.py").unlink()
    done = cloud.run("setup")
    assert done.returncode == 0, done.stderr
    scp, ssh = cloud.calls()
    assert scp == [*QUEUED, "scp", scp[4], "my-tpu:", "--recurse", "--node=all", "--worker=all", *WHERE]
    assert Path(scp[4]).name == "rljax" and not Path(scp[4]).exists()
    everywhere = ["my-tpu", "--node=all", "--worker=all"]
    assert ssh == [*QUEUED, "ssh", *everywhere, "--command=bash rljax/worker.sh install", *WHERE]
    assert {path.name for path in (cloud.here / "parcel/rljax").iterdir()} == {"worker.sh", "code.tar.gz"}
    with tarfile.open(cloud.here / "parcel/rljax/code.tar.gz") as tar:
        names = {name for name in tar.getnames() if not name.startswith("tpu_scripts/")}
    assert names == {".gitignore", "pyproject.toml", "tracked.py", "new file.py"}


def test_setup_outside_git(cloud):
    shutil.rmtree(cloud.checkout / ".git")
    assert "is not a git checkout; give --git URL" in one_sentence(cloud.run("setup"), "setup", 1)


def test_setup_from_git(cloud):
    cloud.run("setup", "--git", "https://example.org/me/rljax", "--ref", "a branch")
    assert "--command=bash rljax/worker.sh install https://example.org/me/rljax 'a branch'" in cloud.calls()[-1]
    assert [path.name for path in (cloud.here / "parcel/rljax").iterdir()] == ["worker.sh"]
    assert "--ref goes with --git" in one_sentence(cloud.run("setup", "--ref", "x"), "setup", 2)


def test_launch_command(cloud):
    args = ["--config", "configs/quickstart.py", "--config.mesh=1,-1,4", "--config.note=two words"]
    assert cloud.run("launch", "--env", "A=b c", "--env=D=e", "--iap", "--", *args).returncode == 0
    (call,) = cloud.calls()
    assert call[:-3] == [*QUEUED, "ssh", "my-tpu", "--node=all", "--worker=all", "--tunnel-through-iap"]
    stamp = re.search(r" (\d{8}T\d{6}Z-\d+) ", call[-3])[1]
    expected = (
        f"start {stamp} 'A=b c' D=e -- --config configs/quickstart.py --config.mesh=1,-1,4 '--config.note=two words'"
    )
    assert call[-3:] == [f"--command=bash rljax/worker.sh {expected}", *WHERE]


def test_launch_misuse(cloud):
    for args in ([], ["--"]):
        assert "nothing to run" in one_sentence(cloud.run("launch", *args), "launch", 2)
    assert "unknown flag --config;" in one_sentence(cloud.run("launch", "--config", "x"), "launch", 2)
    for args in (["--env"], ["--env", "x", "--", "y"], ["--env=1x=2", "--", "y"]):
        assert "--env needs NAME=VALUE" in one_sentence(cloud.run("launch", *args), "launch", 2)
    assert cloud.calls() == []


def test_logs_commands(cloud):
    cloud.run("logs")
    cloud.run("logs", "--follow", "--worker", "3", "--node", "1", "--lines", "5")
    cloud.run("logs", "--all")
    here = [["--node=0", "--worker=0"], ["--node=1", "--worker=3"], ["--node=all", "--worker=all"]]
    words = ["100 no no", "5 yes no", "100 no yes"]
    expected = [
        [*QUEUED, "ssh", "my-tpu", *place, f"--command=bash rljax/worker.sh logs {word}", *WHERE]
        for place, word in zip(here, words, strict=True)
    ]
    assert cloud.calls() == expected


def test_status_asks_no_worker_before_the_tpu_is_there(cloud):
    cloud.states("PROVISIONING v4-8")
    assert cloud.run("status").stdout == "my-tpu: PROVISIONING v4-8\n"
    cloud.states("ACTIVE v4-8")
    cloud.run("status")
    assert [call[3] for call in cloud.calls()] == ["list", "list", "ssh"]
    assert cloud.calls()[-1][5:8] == ["--node=all", "--worker=all", "--command=bash rljax/worker.sh status"]


def test_copy(cloud, tmp_path):
    scp = [*QUEUED, "scp"]
    flags = ["--recurse", "--node=0", "--worker=0", *WHERE]
    for args, expected in [
        (["runs/quickstart"], [*scp, "my-tpu:rljax/code/runs/quickstart", ".", *flags]),
        (["/tmp/trace", str(tmp_path)], [*scp, "my-tpu:/tmp/trace", str(tmp_path), *flags]),
        (["gs://bucket/a", str(tmp_path)], ["storage", "cp", "--recursive", "gs://bucket/a", str(tmp_path)]),
    ]:
        assert cloud.run("copy", *args).returncode == 0
        assert cloud.calls()[-1] == expected
    assert "what shall be copied?" in one_sentence(cloud.run("copy"), "copy", 2)
    assert "'nowhere' is not a folder" in one_sentence(cloud.run("copy", "runs", "nowhere"), "copy", 2)
    assert "unexpected word 'c'" in one_sentence(cloud.run("copy", "a", ".", "c"), "copy", 2)


def test_delete_asks_first(cloud):
    delete = [*QUEUED, "delete", "my-tpu", "--force", "--quiet", *WHERE]
    cloud.states("ACTIVE v4-8")
    for answer in ("", "n\n", "\n"):
        done = cloud.run("delete", stdin=answer)
        assert done.returncode == 1 and done.stderr == "delete.sh: nothing deleted.\n"
        assert done.stdout == "Delete my-tpu (ACTIVE v4-8) and everything on its disks? [y/N] "
    assert delete not in cloud.calls()
    assert cloud.run("delete", stdin="y\n").returncode == 0 and cloud.calls()[-1] == delete
    assert cloud.run("delete", "--yes").returncode == 0 and cloud.calls()[-1] == delete
    cloud.states("")
    done = cloud.run("delete", "--yes")
    assert (done.returncode, done.stdout) == (0, "my-tpu: does not exist.\n") and cloud.calls()[-1][3] == "list"


DRY = [
    ("create", ["--type", "v4-8", "--", "--description=two words"]),
    ("launch", ["--", "it's", "$HOME"]),
    ("logs", []),
    ("stop", []),
    ("copy", ["runs/a b"]),
]


@pytest.mark.parametrize("script, args", DRY)
def test_dry_run_prints_what_would_run(cloud, script, args):
    done = cloud.run(script, "--dry-run", *args)
    assert done.returncode == 0 and cloud.calls() == []
    without_time = [re.sub(r"\d{8}T\d{6}Z-\d+", "TIME", word) for word in shlex.split(done.stdout)]
    cloud.run(script, *args)
    assert without_time == ["gcloud", *(re.sub(r"\d{8}T\d{6}Z-\d+", "TIME", word) for word in cloud.calls()[-1])]


@pytest.mark.parametrize("script", ["wait", "status", "setup", "delete"])
def test_dry_run_calls_nothing(cloud, script):
    done = cloud.run(script, "--dry-run")
    assert done.returncode == 0 and cloud.calls() == []
    assert all(line.startswith("gcloud compute tpus queued-resources ") for line in done.stdout.splitlines())


def test_readme_names_every_script():
    text = (SCRIPTS / "README.md").read_text()
    named = set(re.findall(r"^\| `(\w+\.sh)`", text, re.MULTILINE))
    assert named == {path.name for path in SCRIPTS.glob("*.sh")}
    assert "stand-in gcloud; not measured on hardware here" in text
