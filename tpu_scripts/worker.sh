#!/usr/bin/env bash
#
# The part that runs on a TPU VM; setup.sh puts it there, the other scripts call it by ssh.
#
# ~/rljax/  code/ the project   venv/   runs/ results (code/runs points there)   logs/ one file a launch
#           id, pid, exit_code of the latest launch; pid is its process group too

set -euo pipefail
cd "$HOME/rljax"

fail() {
  echo "$(hostname): $*" >&2
  exit 1
}

# The command line is compared too: after a reboot the number may belong to another process.
running() {
  [ -s pid ] && grep -qs 'rljax\.main' "/proc/$(cat pid)/cmdline"
}

make_venv() {
  local version
  rm -rf venv
  for version in 3.13 3.12 3.11; do
    if "python$version" -m ensurepip --version >/dev/null 2>&1; then
      "python$version" -m venv venv
      return
    fi
  done
  # Ubuntu 22.04, which TPU VMs run, has Python 3.10; uv brings a newer one along.
  { python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --seed --python 3.12 venv; } ||
    fail "no Python 3.11 to 3.13 with venv here, and uv could not fetch one; install python3.11-venv and run setup.sh again."
}

install() { # install [URL REF]: from code.tar.gz, or cloned
  ! running || fail "a run is going on; stop it with stop.sh before setting up again."
  rm -rf code.new
  mkdir -p code.new runs logs
  if [ $# -gt 0 ]; then
    git clone --quiet "$1" code.new
    git -C code.new checkout --quiet "$2"
  else
    tar -xzf code.tar.gz -C code.new
  fi
  ln -s ../runs code.new/runs
  rm -rf code
  mv code.new code
  venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv
  venv/bin/python -m pip install --quiet --editable 'code[tpu]'
  venv/bin/python -c 'import jax, rljax, socket; print(f"{socket.gethostname()}: rljax {rljax.__version__}, jax {jax.__version__}")'
}

start() { # start ID [NAME=VALUE]... -- ARGS...
  local id=$1 environment=(PYTHONUNBUFFERED=1)
  shift
  [ -d code ] || fail "rljax is not installed here; run setup.sh first."
  [ ! -s id ] || [ "$(cat id)" != "$id" ] || return 0 # this very command came twice
  ! running || fail "the run $(cat id) is still going on; stop it with stop.sh first."
  while [ "$1" != -- ]; do
    environment+=("$1")
    shift
  done
  shift
  rm -f exit_code
  ln -sfn "$id.log" logs/latest
  setsid bash worker.sh supervise env "${environment[@]}" ../venv/bin/python -m rljax.main "$@" \
    >"logs/$id.log" 2>&1 </dev/null &
  echo $! >pid
  echo "$id" >id
  echo "$(hostname): started $id"
}

# Run a command, pass SIGTERM on to it alone (its children are its own business), and note its exit code.
supervise() {
  local child='' code
  trap 'kill -TERM $child' TERM
  cd code
  "$@" &
  child=$!
  while :; do
    code=0
    wait "$child" || code=$?
    kill -0 "$child" 2>/dev/null || break # still there: a signal ended the wait
  done
  echo "$code" >../exit_code
}

status() {
  if running; then
    echo "$(hostname): running $(cat id)"
  elif [ -s exit_code ]; then
    echo "$(hostname): ended $(cat id) with exit code $(cat exit_code)"
  elif [ -s id ]; then
    echo "$(hostname): gone $(cat id), without an exit code (killed, or the machine restarted)"
  else
    echo "$(hostname): nothing launched yet"
  fi
  [ ! -e logs/latest ] || tail -n 1 logs/latest | tr '\r' '\n' | tail -n 1
}

logs() { # logs LINES FOLLOW PREFIX
  local options=(-n "$1") prefix=''
  [ -e logs/latest ] || fail "nothing launched yet."
  if [ "$2" = yes ] && running; then options+=(-F "--pid=$(cat pid)"); fi
  if [ "$3" = yes ]; then prefix="$(hostname): "; fi
  tail "${options[@]}" logs/latest | sed -u "s/^/$prefix/"
}

stop() { # stop GRACE_S
  local pid waited
  if ! running; then
    echo "$(hostname): nothing is running"
    return
  fi
  pid=$(cat pid)
  kill -TERM "$pid"
  for ((waited = 0; waited < $1; waited++)); do
    if ! running; then
      kill -KILL -- "-$pid" 2>/dev/null || : # children that it left behind would hold the TPU
      echo "$(hostname): stopped, exit code $(cat exit_code)"
      return
    fi
    sleep 1
  done
  kill -KILL -- "-$pid"
  echo 137 >exit_code
  echo "$(hostname): killed after $1 s"
}

"$@"
