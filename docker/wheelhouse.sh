#!/usr/bin/env bash
# Fills docker/wheelhouse/ with the wheels of docker/locks/, from which images are then built without a network.
#   docker/wheelhouse.sh [x86_64|aarch64]        for this machine's kind, or for another one
set -euo pipefail
cd "$(dirname "$0")/.."
machine=${1:-$(uname -m)}
python=${PYTHON:-.venv/bin/python}
# Only this index has torch without CUDA for x86-64; where it cannot be reached, a build that pip finds elsewhere is taken.
index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
wheels=docker/wheelhouse

[ -e "docker/locks/fed.$machine.txt" ] || { echo "error: no locks for $machine in docker/locks" >&2; exit 2; }
mkdir -p "$wheels"
platforms=() # pip takes these as they are: wheels for an older C library must be named too
for minor in $(seq 5 28); do platforms+=(--platform "manylinux_2_${minor}_$machine"); done
for name in manylinux1 manylinux2010 manylinux2014; do platforms+=(--platform "${name}_$machine"); done
fetch() {
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version 3.11 \
        "${platforms[@]}" --dest "$wheels" "$@"
}

torch=$(grep -h '^torch==' "docker/locks/edge.$machine.txt")
{ [ -n "$index" ] && fetch --timeout 5 --retries 0 --index-url "$index" "$torch" 2>/dev/null; } || fetch "$torch"
grep -hv '^#\|^torch==' docker/locks/{fed,edge,device}."$machine".txt docker/locks/build.txt | sort -u >"$wheels/.wanted"
fetch --requirement "$wheels/.wanted"
rm "$wheels/.wanted"
du -sm "$wheels"
