#!/usr/bin/env bash
# Makes .venv with fastssl and what its demo ("base") or its tests ("test") need; quick when it is already there.
# System libraries come by apt when this user may install them; without them everything but FFCV works.
set -euo pipefail
what=${1:-base}
cd "$(dirname "$0")/.."
stamp=.venv/.installed-$what
if [ -e "$stamp" ] && [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ] && [ "$stamp" -nt tools/setup.sh ]; then
  exit 0
fi

say() { printf '\n== %s\n' "$*" >&2; }

apt() {
  local as=()
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || return 1
    as=(sudo -n)
  fi
  command -v apt-get >/dev/null || return 1
  "${as[@]}" apt-get update -qq && "${as[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

find_python() {
  local candidate found=
  local fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
  if [ -n "${PYTHON:-}" ]; then
    "$PYTHON" -c "$fits" 2>/dev/null && { echo "$PYTHON"; return; }
    say "PYTHON is $PYTHON, which is no Python 3.11, 3.12 or 3.13. Set it to the path of one, or unset it."
    exit 2
  fi
  for candidate in python3.11 python3.12 python3.13 python3; do
    if "$candidate" -c "$fits" 2>/dev/null; then
      # one that can make environments goes before one that first needs a system package
      "$candidate" -c 'import venv, ensurepip' 2>/dev/null && { echo "$candidate"; return; }
      found=${found:-$candidate}
    fi
  done
  [ -n "$found" ] && { echo "$found"; return; }
  say "Python 3.11, 3.12 or 3.13 is needed and none was found; install one, or set PYTHON to its path."
  exit 2
}

python=$(find_python)
missing=()
command -v g++ >/dev/null || missing+=(g++)
command -v pkg-config >/dev/null || missing+=(pkg-config)
pkg-config --exists opencv4 2>/dev/null || missing+=(libopencv-dev)
pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
[ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || missing+=(python3-dev)
"$python" -c 'import venv, ensurepip' 2>/dev/null || missing+=(python3-venv)
if [ ${#missing[@]} -gt 0 ]; then
  say "System packages: ${missing[*]}"
  apt "${missing[@]}" >/dev/null || say "These could not be installed here: ${missing[*]}. Going on without them."
fi

if [ "$what" = test ] && ! command -v chromium >/dev/null && ! command -v google-chrome >/dev/null; then
  say "System package: chromium, in which the report's page is tested"
  apt chromium >/dev/null || say "chromium could not be installed here; that test will be skipped."
fi

if [ -n "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then
  version='import sys; print(*sys.version_info[:2], sep=".")'
  [ "$(.venv/bin/python -c "$version")" = "$("$python" -c "$version")" ] ||
    say ".venv has another Python than $python and is used as it is; remove it to change that."
fi
# one that was interrupted, or made without ensurepip or by uv, has no pip
if ! .venv/bin/python -m pip --version >/dev/null 2>&1 && ! .venv/bin/python -m ensurepip --upgrade >/dev/null 2>&1; then
  if [ -e .venv ]; then
    rm -rf .venv.old
    mv .venv .venv.old
    say ".venv has no pip and is now .venv.old."
  fi
  if ! "$python" -m venv .venv; then
    rm -rf .venv
    say "$python cannot make an environment. Install python3-venv, or set PYTHON to another Python."
    exit 2
  fi
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt "$@"; }

say "Python packages (the first time takes a few minutes)"
extras=report
[ "$what" = test ] && extras=dev
pip --upgrade pip setuptools wheel
pip --editable ".[$extras]"
if pkg-config --exists opencv4 libturbojpeg 2>/dev/null && command -v g++ >/dev/null; then
  pip "ffcv==1.0.2" || say "FFCV did not build; fastssl works without it (the resident loader reads the same files)."
else
  say "FFCV is left out: it needs pkg-config, g++, libopencv-dev and libturbojpeg0-dev. The resident loader reads the same files."
fi
if [ "$what" = test ]; then
  pip "nvidia-dali-cuda130" || say "DALI could not be installed; its tests will be skipped."
  pip "tensorboard" "wandb" || say "TensorBoard and W&B could not be installed; their tests will be skipped."
fi
touch "$stamp"
