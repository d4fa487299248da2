#!/usr/bin/env bash
#
# Show the output of the latest run: worker 0 of slice 0, or others, or all.
#
#   logs.sh --name my-tpu --follow
#   logs.sh --name my-tpu --all --lines 5
#
#   --follow    keep showing until the run ends (Ctrl-C leaves the run alone)
#   --lines N   how many of the last lines (default 100)
#   --worker N  another worker than 0
#   --node N    another slice than 0
#   --all       every worker of every slice, each line with its host's name

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

node=0 worker=0 lines=100 follow=no all=no
parse "lines worker node" "follow all" "$@"
no_more_words
whole_number --lines "$lines"
[ "$all" != yes ] || { node=all && worker=all; }

on_workers logs "$lines" "$follow" "$all"
