#!/usr/bin/env bash
#
# Delete the TPU, its disks and its place in the queue. Asks first. Deleting what is not there is no error.
#
#   delete.sh --name my-tpu
#
#   --yes  do not ask

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

yes=''
parse "" "yes" "$@"
no_more_words

if [ "$dry_run" != yes ]; then
  found=$(state)
  [ -n "$found" ] || { echo "$name: does not exist." && exit 0; }
  if [ "$yes" != yes ]; then
    printf "Delete %s (%s) and everything on its disks? [y/N] " "$name" "$found"
    read -r answer || answer=''
    case $answer in
      y | Y | yes) ;;
      *) fail "nothing deleted." ;;
    esac
  fi
fi
tpu delete "$name" --force --quiet
