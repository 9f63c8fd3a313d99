#!/usr/bin/env bash
# Writes docker/locks/: the exact version of every package in each image, from what pyproject.toml admits. Run it when that has
# changed, or to take newer versions, and try the images then. Needs uv (found in PATH, or named with UV=...) and a package index.
set -euo pipefail
cd "$(dirname "$0")/.."
uv=${UV:-uv}
locks=docker/locks
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

# lock NAME PYTHON MACHINE EXTRA...: one line a package, all of them, as images install without looking at dependencies.
# torch comes as its CPU build (see install.sh), which has none of CUDA's packages: they go, and so does the name of the build.
lock() {
    local name=$1 python=$2 machine=$3 extras=() extra
    shift 3
    for extra in "$@"; do extras+=(--extra "$extra"); done
    {
        echo "# Made by docker/lock.sh for Python $python on $machine${*:+, with the extras $*}."
        "$uv" pip compile --quiet --no-header --no-annotate --only-binary :all: --python-version "$python" \
            --python-platform "$machine-manylinux_2_28" "${extras[@]}" pyproject.toml |
            sed -E -e '/^(nvidia-|cuda-|triton==)/d' -e 's/^(torch==[0-9.]+)\+.*/\1/'
    } >"$temporary/$name.$machine.txt"
}

for machine in x86_64 aarch64; do
    lock fed 3.11 "$machine"
    lock edge 3.11 "$machine" train quant
    lock device 3.11 "$machine" train quant
done
# Jetson's torch is its base's, or NVIDIA's build (see Dockerfile.jetson); bitsandbytes has no kernels for it.
lock jetson 3.10 aarch64 train
sed -i '/^torch==/d' "$temporary/jetson.aarch64.txt"

# A device never makes certificates and never serves gRPC.
sed -i -E '/^(cryptography|cffi|pycparser|grpcio-health-checking)==/d' "$temporary"/{device,jetson}.*.txt

# What builds sfl itself.
echo 'setuptools>=77' | "$uv" pip compile --quiet --no-header --no-annotate --python-version 3.10 - |
    sed '1i # Made by docker/lock.sh; it builds sfl and is in no image.' >"$temporary/build.txt"

mkdir -p "$locks"
rm -f "$locks"/*.txt
mv "$temporary"/*.txt "$locks/"
wc -l "$locks"/*.txt
