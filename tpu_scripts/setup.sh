#!/usr/bin/env bash
#
# Install rljax on every worker: this checkout as it stands (tracked and new files, not ignored ones), or a git URL.
# Run it again after changing the code; the virtual environment and the results on the workers stay.
#
#   setup.sh --name my-tpu
#   setup.sh --name my-tpu --git https://github.com/me/rljax --ref my-branch
#
#   --git URL  clone on the workers instead of copying this checkout
#   --ref REF  branch, tag or commit to check out (default HEAD; with --git)

# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

git='' ref=''
parse "git ref" "" "$@"
no_more_words
[ -z "$ref" ] || [ -n "$git" ] || misuse "--ref goes with --git."

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
parcel=$(mktemp -d)
trap 'rm -rf "$parcel"' EXIT
mkdir "$parcel/rljax"
cp "$here/worker.sh" "$parcel/rljax/"

if [ -z "$git" ]; then
  git -C "$root" rev-parse --git-dir >/dev/null 2>&1 || fail "$root is not a git checkout; give --git URL."
  (
    cd "$root"
    git ls-files -z --cached --others --exclude-standard |
      while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
      COPYFILE_DISABLE=1 tar -czf "$parcel/rljax/code.tar.gz" --null -T -
  )
  set -- install
else
  set -- install "$git" "${ref:-HEAD}"
fi

copy "$parcel/rljax" "$name:"
on_workers "$@"
