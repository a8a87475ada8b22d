#!/usr/bin/env bash
# The wheel in an empty environment, away from the repository: tools/check_wheel.sh [PYTHON]
# Builds it, installs it and all its dependencies (some GB, minutes), then runs every verb's help, the shipped recipes and
# a tiny training from one of them. Set CONSTRAINTS= to leave constraints.txt out.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
constraints=${CONSTRAINTS-$PWD/constraints.txt}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

"$python" -m venv "$place/venv"
pip() { "$place/venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip wheel --no-deps --wheel-dir "$place" .
pip install ${constraints:+--constraint "$constraints"} "$place"/fastssl_vision-*.whl
pip check

mkdir "$place/elsewhere"
cd "$place/elsewhere"
unset PYTHONPATH
fastssl() { "$place/venv/bin/fastssl" "$@"; }
for verb in $(fastssl --help | sed -nE 's/^[^a-z ]+ ([a-z]+) .*/\1/p'); do
  fastssl "$verb" --help >/dev/null
  echo "fastssl $verb"
done
fastssl recipes | grep -q quickstart.yaml
fastssl train quickstart -s data.count=96 -s data.test_count=32 -s data.val_count=24 -s data.side_px=16 \
  -s data.batch_size=24 -s augment.side_px=8 -s model.width=0.25 -s train.epochs=1 -s evaluate.linear_epochs=2
fastssl runs
echo "The wheel works: $(fastssl recipe show quickstart --json | head -c 60)..."
