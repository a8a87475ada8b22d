#!/usr/bin/env bash
# The wheel in an empty environment, away from the repository: tools/check_wheel.sh [PYTHON [EXTRAS]]
# Builds it, installs it and all its dependencies (6 GB of disk, minutes), then runs every verb on images of its own at
# tiny size. A feature whose extra is left out must say in two lines which to install. Set CONSTRAINTS= to leave
# constraints.txt out, or to another lock.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3} extras=${2:-}
constraints=${CONSTRAINTS-$PWD/constraints.txt}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

"$python" -m venv "$place/venv"
pip() { "$place/venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip wheel --no-deps --wheel-dir "$place" .
wheel=$(echo "$place"/fastssl_vision-*.whl)
pip install ${constraints:+--constraint "$constraints"} "$wheel${extras:+[$extras]}"
pip check

mkdir "$place/elsewhere"
cp tools/check_wheel.py "$place"
cd "$place/elsewhere"
env -u PYTHONPATH "$place/venv/bin/python" -P "$place/check_wheel.py"
