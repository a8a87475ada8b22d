#!/usr/bin/env bash
# All wheels for a machine without network: tools/offline_wheels.sh [--dry-run] [--extras ffcv,dali] [--python PYTHON] [FOLDER]
# Run it where there is a network, on the same kind of system and the same Python as the target; copy FOLDER over, and
# install there with the command printed at the end. --dry-run prints the commands and does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n '2,4s/^# //p' "$0" >&2
  exit 2
}

run() { "$@"; }
extras="" python=python3 out=""
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) run() { printf '%q ' "$@" && echo; } ;;
    --extras | --python)
      [ $# -gt 1 ] || usage
      if [ "$1" = --extras ]; then extras=$2; else python=$2; fi
      shift
      ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage
      out=$1 ;;
  esac
  shift
done
out=${out:-offline-wheels}

# FFCV comes as source alone: its wheel is built first, self-contained, and found here by pip
case ",$extras," in *,ffcv,*) run bash tools/build_ffcv_wheel.sh "$python" "$out" ;; esac
run mkdir -p "$out"
run "$python" -m pip wheel --constraint constraints.txt --find-links "$out" --wheel-dir "$out" ".${extras:+[$extras]}"
run cp constraints.txt "$out"

echo "Install on a machine of this kind, in a virtual environment, with:"
printf 'python -m pip install --no-index --find-links %q --constraint %q %q\n' \
  "$out" "$out/constraints.txt" "fastssl-vision${extras:+[$extras]}"
