#!/usr/bin/env bash
#
# Stop the run on every worker. It gets a SIGTERM, on which it saves a checkpoint; launching the same command again
# goes on from there. The TPU stays, and costs (delete.sh).
#
#   stop.sh --name my-tpu
#
#   --grace-s N  seconds until what still runs is killed (default 300)

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

grace_s=300
parse "grace-s" "" "$@"
no_more_words
whole_number --grace-s "$grace_s"

on_workers stop "$grace_s"
