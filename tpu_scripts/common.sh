# shellcheck shell=bash
# What the scripts of this folder share; sourced, not run. Written for the bash 3.2 of macOS too.
#
# Settings, by flag or by environment:
#   --name NAME        TPU_NAME     the queued resource; its node is NAME, several slices are NAME-0, NAME-1, ...
#   --zone ZONE        TPU_ZONE     without it, gcloud's own default
#   --project PROJECT  TPU_PROJECT  without it, gcloud's own default
#   --type TYPE        TPU_TYPE     create.sh only: v4-8, v5e-16 (= v5litepod-16), v5p-8, v6e-8, ...
#   --iap              tunnel ssh and scp through Identity-Aware Proxy (VMs without an external address)
#   --dry-run          print the gcloud commands and run nothing

set -euo pipefail

SCRIPT=$(basename "$0")
name=${TPU_NAME:-} zone=${TPU_ZONE:-} project=${TPU_PROJECT:-}
node=all worker=all iap='' dry_run=''
REST=()

fail() {
  echo "$SCRIPT: $*" >&2
  exit 1
}

misuse() {
  echo "$SCRIPT: $*" >&2
  exit 2
}

# A script's help is the comment on its top, then the settings above.
print_help() {
  sed -n '3,/^$/s/^# \{0,1\}//p' "$0"
  echo
  sed -n '/^# Settings/,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

# parse VALUES SWITCHES ARGS...: sets the variable of every flag met (--node-count: node_count); the words after the
# flags, or after --, are left in REST. VALUES and SWITCHES name the script's own flags, separated by spaces.
parse() {
  local values=" name zone project $1 " switches=" iap dry-run $2 " flag
  shift 2
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) print_help && exit 0 ;;
      --) shift && break ;;
      --?*) ;;
      -*) misuse "unknown flag $1; see $SCRIPT --help." ;;
      *) break ;;
    esac
    flag=${1%%=*} && flag=${flag#--}
    case $switches$values in
      *" $flag "*) ;;
      *) misuse "unknown flag --$flag; see $SCRIPT --help." ;;
    esac
    case $switches in
      *" $flag "*)
        [ "$1" = "--$flag" ] || misuse "--$flag takes no value."
        set -- "$1" yes "${@:2}"
        ;;
      *)
        [ "$1" = "--$flag" ] || set -- "--$flag" "${1#*=}" "${@:2}"
        [ -n "${2:-}" ] || misuse "--$flag needs a value."
        ;;
    esac
    printf -v "${flag//-/_}" %s "$2"
    shift 2
  done
  REST=("$@")
  check_settings
}

check_settings() {
  [ -n "$name" ] || misuse "which TPU? Give --name NAME or set TPU_NAME."
  case $name in
    [a-z]*) ;;
    *) misuse "the name '$name' has to begin with a small letter." ;;
  esac
  case $name in
    *[!a-z0-9-]*) misuse "the name '$name' may hold small letters, digits and hyphens only." ;;
  esac
  [ "$dry_run" = yes ] || command -v gcloud >/dev/null ||
    misuse "gcloud is not on PATH; install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install), then run gcloud init."
}

no_more_words() {
  [ ${#REST[@]} -eq 0 ] || misuse "unexpected word '${REST[0]}'; see $SCRIPT --help."
}

whole_number() { # whole_number FLAG VALUE
  case $2 in
    *[!0-9]* | '') misuse "$1 takes a whole number, not '$2'." ;;
  esac
}

# Sets QUOTED to the words as one line that any POSIX shell reads back as the same words.
quote() {
  local word close_open="'\\''" LC_ALL=C
  QUOTED=''
  for word in "$@"; do
    case $word in
      *[!A-Za-z0-9_@%+=:,./-]* | '') word="'${word//\'/$close_open}'" ;;
    esac
    QUOTED="$QUOTED${QUOTED:+ }$word"
  done
}

run() {
  if [ "$dry_run" = yes ]; then
    quote "$@"
    printf '%s\n' "$QUOTED"
  else
    "$@"
  fi
}

# tpu VERB ARGS...: gcloud on queued resources, in the zone and project of the settings.
tpu() {
  set -- gcloud compute tpus queued-resources "$@"
  [ -z "$zone" ] || set -- "$@" "--zone=$zone"
  [ -z "$project" ] || set -- "$@" "--project=$project"
  run "$@"
}

# "STATE TYPE" of the queued resource, or nothing where there is none. (describe would not tell absence from an error.)
state() {
  tpu list "--filter=name~/$name\$" "--format=value[separator=' '](state.state,tpu.nodeSpec[0].node.acceleratorType)"
}

# on_workers VERB ARGS...: worker.sh on the workers chosen by $node and $worker. gcloud repeats a command whose
# connection failed, so every verb of worker.sh may come twice.
on_workers() {
  quote bash rljax/worker.sh "$@"
  set -- ssh "$name" "--node=$node" "--worker=$worker"
  [ "$iap" != yes ] || set -- "$@" --tunnel-through-iap
  tpu "$@" "--command=$QUOTED"
}

# copy FROM TO: scp, recursively, on the same workers.
copy() {
  set -- scp "$1" "$2" --recurse "--node=$node" "--worker=$worker"
  [ "$iap" != yes ] || set -- "$@" --tunnel-through-iap
  tpu "$@"
}
