#!/usr/bin/env bash
#
# Wait until the TPU is there (the queued resource is ACTIVE). Ends with 1 when the request failed or was taken back.
#
#   wait.sh --name my-tpu
#
#   --timeout-s N  give up after N seconds (default 0: never)
#   --every-s N    seconds between two looks (default 30)

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

timeout_s=0 every_s=30
parse "timeout-s every-s" "" "$@"
no_more_words
whole_number --timeout-s "$timeout_s"
whole_number --every-s "$every_s"

[ "$dry_run" != yes ] || { state && exit 0; }

last=''
SECONDS=0
while :; do
  found=$(state)
  found=${found%% *}
  [ "$found" = "$last" ] || echo "$name: ${found:-not there}"
  last=$found
  case $found in
    ACTIVE) exit 0 ;;
    '') fail "'$name' does not exist; run create.sh first." ;;
    FAILED | SUSPEND* | DELETING) fail "'$name' is $found; run delete.sh --name $name, then create.sh again." ;;
  esac
  [ "$timeout_s" -eq 0 ] || [ "$SECONDS" -lt "$timeout_s" ] || fail "'$name' is still $found after $timeout_s s."
  sleep "$every_s"
done
