#!/usr/bin/env bash
#
# Copy results here: a folder of worker 0 (from the project's root there), or of a bucket.
#
#   copy.sh --name my-tpu runs/quickstart
#   copy.sh --name my-tpu gs://bucket/runs/gsm8k results/
#
#   FROM [TO]  TO is a folder that exists (default: the current one)

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

parse "" "" "$@"
[ ${#REST[@]} -gt 0 ] || misuse "what shall be copied? Name a folder such as runs/quickstart."
[ ${#REST[@]} -le 2 ] || misuse "unexpected word '${REST[2]}'; see $SCRIPT --help."
from=${REST[0]} to=${REST[1]:-.}
[ -d "$to" ] || misuse "'$to' is not a folder; make it first."

node=0 worker=0
case $from in
  gs://*) run gcloud storage cp --recursive "$from" "$to" ;;
  /*) copy "$name:$from" "$to" ;;
  *) copy "$name:rljax/code/$from" "$to" ;;
esac
