#!/usr/bin/env bash
# onnxruntime 1.32.0, Linux x86-64, from PyPI.
#
# A runtime for devices should be free of side effects when it is merely imported. This one makes an
# identifier and a store of usage reports below the user's cache folder at its import, before any
# model is loaded. ORT_DISABLE_TELEMETRY=1 in the environment, set before the import, prevents it.
# On a device with a read-only or small home, or one that must not report, set it.
#
# Seen: after "import onnxruntime" ~/.cache/Microsoft/DeveloperTools/.onnxruntime exists; with the
# variable set it does not. Fails if either changes.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet "onnxruntime==1.32.0" "numpy<3"

store=.cache/Microsoft/DeveloperTools/.onnxruntime
import_in() {
    mkdir -p "$1"
    env -u XDG_CACHE_HOME HOME="$1" "${@:2}" "$work/env/bin/python" -c \
        'import onnxruntime; print("onnxruntime", onnxruntime.__version__)'
}

import_in "$work/plain" env -u ORT_DISABLE_TELEMETRY
import_in "$work/quiet" env ORT_DISABLE_TELEMETRY=1
find "$work/plain" "$work/quiet" -mindepth 1 -printf '%P\n'

test -e "$work/plain/$store" || { echo "CHANGED: the import leaves no store any more"; exit 1; }
test ! -e "$work/quiet/$store" || { echo "CHANGED: the variable no longer prevents it"; exit 1; }
echo "as described: the import writes $store, and ORT_DISABLE_TELEMETRY=1 prevents it"
