#!/usr/bin/env bash
#
# Start `python -m rljax.main ARGS` on every worker of every slice, in a session that outlives the connection.
# The working folder there is the project's root, so the command is the one you would type here.
#
#   launch.sh --name my-tpu -- --config configs/quickstart.py --config.mesh=1,-1,4
#   launch.sh --name my-tpu --env 'LIBTPU_INIT_ARGS=--a=1 --b=2' -- --config configs/quickstart.py
#
#   --env NAME=VALUE  an environment variable of the run; may be repeated. It shows in the worker's process list.
#   -- ARGS           arguments of rljax.main
#
# Several workers share no disk: give them --config.output_dir=gs://bucket/folder. Starting the same run again
# resumes it from its last checkpoint.

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

# --env repeats, which parse does not know: take it out first.
environment=() words=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --env)
      [ $# -gt 1 ] || misuse "--env needs NAME=VALUE."
      pair=$2 && shift
      ;;
    --env=*) pair=${1#--env=} ;;
    *) words+=("$1") && shift && continue ;;
  esac
  case $pair in
    [A-Za-z_]*=*) environment+=("$pair") && shift ;;
    *) misuse "--env needs NAME=VALUE, not '$pair'." ;;
  esac
done
parse "" "" ${words[@]+"${words[@]}"} "$@"
[ ${#REST[@]} -gt 0 ] || misuse "nothing to run; put the arguments of rljax.main after --, for instance -- --config configs/quickstart.py."

on_workers start "$(date -u +%Y%m%dT%H%M%SZ)-$$" ${environment[@]+"${environment[@]}"} -- "${REST[@]}"
[ "$dry_run" = yes ] || echo "$name: started; follow it with logs.sh --name $name --follow"
