#!/usr/bin/env bash
#
# Say how the TPU is and, once it is there, what each worker does: running or ended, exit code, last line of output.
#
#   status.sh --name my-tpu

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

parse "" "" "$@"
no_more_words

if [ "$dry_run" = yes ]; then
  state
else
  found=$(state)
  echo "$name: ${found:-does not exist}"
  case $found in
    ACTIVE*) ;;
    *) exit 0 ;;
  esac
fi
on_workers status
