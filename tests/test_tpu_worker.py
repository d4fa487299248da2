"""tpu_scripts/ from setup to stop, on a folder that plays the worker's home and a Python that records its arguments."""

import shutil
import subprocess
import sys
import tomllib

import pytest

from tests.stand_in_gcloud import PYTHON, executable, played_cloud
from tests.tiny import ROOT


@pytest.fixture
def cloud(tmp_path):
    with played_cloud(tmp_path) as cloud:
        yield cloud


def test_setup_installs_on_a_worker_and_keeps_results(cloud):
    cloud.install_worker()
    home = cloud.worker / "rljax"
    (home / "code/runs/quickstart").mkdir()
    (home / "code/left_over.py").write_text("")
    done = cloud.run("setup")
    assert done.returncode == 0, done.stderr
    assert (home / "runs/quickstart").is_dir() and (home / "code/runs/quickstart").is_dir()
    assert not (home / "code/left_over.py").exists() and (home / "code/pyproject.toml").exists()
    pip = ["-m", "pip", "install", "--quiet", "--editable", "code[tpu]"]
    assert [call["args"][:6] for call in cloud.python_calls()][:2] == [["-m", "pip", "--version"], pip]


@pytest.mark.parametrize("extra", ["tpu", "cuda"])
def test_what_is_installed_for_accelerators_reads_gs_folders(extra):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"jax[{extra}" in extras[extra][0]
    assert any(package.startswith("etils[epath-gcs]") for package in extras[extra]), "gs:// needs gcsfs"


def test_setup_brings_a_python_where_the_system_has_an_old_one(cloud):
    for version in ("3.13", "3.12", "3.11"):
        executable(cloud.here / f"bin/python{version}", "#!/bin/sh\nexit 1\n")
    executable(cloud.here / "bin/python3", PYTHON.format(python=sys.executable, here=str(cloud.here)))
    cloud.worker.mkdir()
    done = cloud.run("setup")
    assert done.returncode == 0, done.stderr
    install, venv, *_ = [call["args"] for call in cloud.python_calls()]
    assert install == ["-m", "pip", "install", "--quiet", "--user", "uv"]
    assert venv == ["-m", "uv", "venv", "--quiet", "--seed", "--python", "3.12", "venv"]

    executable(cloud.here / "bin/python3", "#!/bin/sh\nexit 1\n")
    shutil.rmtree(cloud.worker / "rljax/venv")
    done = cloud.run("setup")
    assert done.returncode == 1 and "no Python 3.11 to 3.13" in done.stderr


def test_arguments_reach_python_as_they_were_typed(cloud):
    cloud.install_worker()
    args = ["--config", "configs/a b.py", "--config.mesh=1,-1,4", "", "it's", 'say "x"', "$HOME", "`id`", "a;b&&c|d>e"]
    args += ["*", "~", "back\\slash", "  two  spaces ", "line\nbreak", "ü→", "!x", "{a,b}", "--", "-n"]
    done = cloud.run("launch", "--env", "LIBTPU_INIT_ARGS=--a='1' --b=$2", "--", *args)
    assert done.returncode == 0, done.stderr
    cloud.until("ended", "exit code 0", "step 2")
    (call,) = cloud.python_calls()
    assert call["args"] == ["-m", "rljax.main", *args]
    assert call["cwd"] == str(cloud.worker / "rljax/code") and call["flags"] == "--a='1' --b=$2"


def test_a_run_from_launch_to_stop(cloud):
    cloud.install_worker()
    assert cloud.run("status").stdout == "my-tpu: does not exist\n"
    assert "nothing launched yet" in cloud.until("nothing launched yet")
    assert cloud.run("logs").returncode == 1

    assert cloud.run("launch", "--", "--save").returncode == 0
    cloud.until("running", "step 1")
    second = cloud.run("launch", "--", "--save")
    assert second.returncode == 1 and "still going on" in second.stderr
    again = cloud.run("setup")
    assert again.returncode == 1 and "a run is going on" in again.stderr

    done = cloud.run("stop")
    assert done.returncode == 0 and "stopped, exit code 7" in done.stdout
    cloud.until("ended", "exit code 7", "saved")
    assert cloud.run("logs").stdout == "step 1\nsaved\n"
    assert "nothing is running" in cloud.run("stop").stdout
    assert len([call for call in cloud.python_calls() if "rljax.main" in call["args"]]) == 1


def test_a_command_sent_twice_starts_one_run(cloud):
    cloud.install_worker()
    cloud.run("launch", "--", "--save")
    (call,) = cloud.calls()
    again = [sys.executable, str(cloud.here / "bin/gcloud"), *call]  # what gcloud does when the connection broke
    assert subprocess.run(again, capture_output=True).returncode == 0
    cloud.until("running", "step 1")
    cloud.run("stop")
    assert subprocess.run(again, capture_output=True).returncode == 0
    assert len(cloud.python_calls()) == 1


def test_a_run_that_does_not_listen_is_killed(cloud):
    cloud.install_worker()
    cloud.run("launch", "--", "--deaf")
    cloud.until("running", "step 1")
    assert "killed after 1 s" in cloud.run("stop", "--grace-s", "1").stdout
    cloud.until("ended", "exit code 137")


def test_exit_code_and_logs_of_a_failed_run(cloud):
    cloud.install_worker()
    cloud.run("launch", "--", "--fail")
    cloud.until("ended", "exit code 3", "step 2")
    assert cloud.run("logs", "--follow").stdout == "step 1\nstep 2\n"
    host = subprocess.run(["hostname"], capture_output=True, text=True).stdout.strip()
    assert cloud.run("logs", "--all", "--lines", "1").stdout == f"{host}: step 2\n"
