#!/usr/bin/env bash
#
# Ask for a TPU VM, a slice, or several slices: a queued resource, granted when there is capacity (wait.sh waits).
# Asking again for what already exists changes nothing.
#
#   create.sh --name my-tpu --zone us-west4-a --type v5e-16 --spot
#   create.sh --name my-tpu --type v6e-8 -- --network=my-network --labels=team=rl
#
#   --type TYPE             accelerator type (or TPU_TYPE)
#   --node-count N          slices, joined by the data-centre network (default 1)
#   --spot                  cheaper, can be taken back at any moment; without it, on demand
#   --reserved              from the project's reservation
#   --runtime-version NAME  system image (default: the one of the accelerator type)
#   -- ...                  further flags of `gcloud compute tpus queued-resources create`

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

type=${TPU_TYPE:-} node_count=1 runtime_version='' spot='' reserved=''
parse "type node-count runtime-version" "spot reserved" "$@"

type=${type/#v5e-/v5litepod-}
case $type in
  v4-[1-9]*) image=tpu-ubuntu2204-base ;; # images: https://cloud.google.com/tpu/docs/runtimes
  v5litepod-[1-9]*) image=v2-alpha-tpuv5-lite ;;
  v5p-[1-9]*) image=v2-alpha-tpuv5 ;;
  v6e-[1-9]*) image=v2-alpha-tpuv6e ;;
  '') misuse "which accelerator? Give --type TYPE or set TPU_TYPE, for instance v5e-16." ;;
  *) misuse "unknown accelerator type '$type'; v4-N, v5e-N, v5p-N and v6e-N are known." ;;
esac
whole_number --node-count "$node_count"
[ "$node_count" -ge 1 ] || misuse "--node-count is at least 1."
[ "$spot$reserved" != yesyes ] || misuse "--spot and --reserved exclude each other."

if [ "$dry_run" != yes ]; then
  found=$(state)
  case $found in
    '') ;;
    FAILED* | SUSPEND* | DELETING*) fail "'$name' is left over (${found% *}); run delete.sh --name $name first." ;;
    *" $type") echo "$name: already there (${found% *})." && exit 0 ;;
    *) fail "'$name' exists with another type (${found#* }); choose another name or run delete.sh --name $name." ;;
  esac
fi

set -- "$name" "--accelerator-type=$type" "--runtime-version=${runtime_version:-$image}" \
  ${REST[@]+"${REST[@]}"}
if [ "$node_count" -eq 1 ]; then
  set -- "$@" "--node-id=$name"
else
  set -- "$@" "--node-count=$node_count" "--node-prefix=$name"
fi
[ "$spot" != yes ] || set -- "$@" --spot
[ "$reserved" != yes ] || set -- "$@" --reserved
tpu create "$@"
