#!/usr/bin/env bash
# All wheels for a machine without network: tools/offline_wheels.sh [--dry-run] [--extras ffcv,dali] [--python PYTHON] [FOLDER]
# Run it where there is a network, on the same kind of system and the same Python as the target (3 GB with torch for
# CUDA); copy FOLDER over and install there with the commands printed at the end. --dry-run prints them and does nothing.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

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
case ",$extras," in *,ffcv,*) run bash "$root/tools/build_ffcv_wheel.sh" "$python" "$out" ;; esac
run mkdir -p "$out"
run "$python" -m pip wheel --constraint "$root/constraints.txt" --find-links "$out" --wheel-dir "$out" "$root${extras:+[$extras]}"
run cp "$root/constraints.txt" "$out"

echo "Install on a machine of this kind, in a virtual environment and from within the copied folder, with:"
printf 'python -m pip install --no-index --find-links . --constraint constraints.txt %q\n' "fastssl-vision${extras:+[$extras]}"
