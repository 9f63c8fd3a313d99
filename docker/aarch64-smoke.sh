#!/usr/bin/env bash
# Runs the real `sfl device` as a Raspberry Pi would, under QEMU's emulation of its CPU, before a Pi's owner does.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: docker/aarch64-smoke.sh [--cpu CPU] [--precisions P,P...] [--steps N] [FOLDER]

Trains a tiny OPT model for a few steps, once with a native device and once with an aarch64 one under QEMU, both through real
gRPC with a native federation server and edge server, and compares their losses; then again with devices that have no model
and get their half from the edge. Ends with 0 if all losses agree.

  --cpu CPU           emulated CPU (default: cortex-a72, the Raspberry Pi 4's; Pi 3 and Zero 2: cortex-a53, Pi 5: cortex-a76)
  --precisions P,...  number formats of the device's base, of fp32, bf16, int8 and nf4 (default: fp32,int8)
  --steps N           training steps (default: 3)
  FOLDER              where the aarch64 system and its packages are kept for the next run: 1 GB
                      (default: sfl-aarch64 in $XDG_CACHE_HOME or ~/.cache)

Needs x86-64 Linux with apt (Debian, Ubuntu), the packages qemu-user-static and debian-archive-keyring, access to a Debian mirror
and a Python package index, and an environment with sfl[train] (default: .venv here; name another one's Python with PYTHON=...).
Needs no root and no binfmt: Debian's arm64 packages are unpacked, not installed, and QEMU is called by its name.
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 2
}

cpu=cortex-a72 precisions=fp32,int8 steps=3 folder=
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit ;;
        --cpu | --precisions | --steps)
            [ $# -ge 2 ] || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift 2
            ;;
        -*) usage >&2; fail "unknown option $1" ;;
        *)
            [ -z "$folder" ] || fail "one folder, not $folder and $1"
            folder=$1
            shift
            ;;
    esac
done

checkout=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$checkout/.venv/bin/python}
qemu=$(command -v qemu-aarch64-static) || fail 'qemu-aarch64-static is missing: apt install qemu-user-static'
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -r "$keyring" ] || fail "$keyring is missing: apt install debian-archive-keyring"
command -v apt-get dpkg-deb >/dev/null || fail 'apt-get and dpkg-deb are needed: run this on Debian or Ubuntu'
"$python" -c '' 2>/dev/null || fail "$python does not run: call make once, or name a Python that has sfl[train] with PYTHON=..."
[[ " $("$qemu" -cpu help | tr -s '[:space:]' ' ') " == *" $cpu "* ]] || fail "QEMU knows no CPU '$cpu': see $qemu -cpu help"

folder=$(realpath -m "${folder:-${XDG_CACHE_HOME:-$HOME/.cache}/sfl-aarch64}")
mkdir -p "$folder"
exec 9>"$folder/lock"
flock --nonblock 9 || fail "another run is using $folder"
ulimit -c 0 # QEMU leaves a core file of its own where the device dies

# Raspberry Pi OS 12 is Debian bookworm, with Python 3.11.
make_root() {
    local apt=$folder/apt root=$folder/root.new package
    rm -rf "$apt" "$root"
    mkdir -p "$apt"/{lists,archives}/partial "$root"
    : >"$apt/status"
    echo "deb [signed-by=$keyring] http://deb.debian.org/debian bookworm main" >"$apt/sources.list"
    cat >"$apt/apt.conf" <<TEXT
#clear APT::Architectures;
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Install-Recommends "false";
APT::Sandbox::User "root";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Acquire::Languages "none";
Dir::Etc::sourcelist "$apt/sources.list";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "$apt";
Dir::State::lists "$apt/lists";
Dir::State::status "$apt/status";
Dir::Cache "$apt";
Dir::Cache::archives "$apt/archives";
TEXT
    apt-get -c "$apt/apt.conf" -qq update
    apt-get -c "$apt/apt.conf" -qq --yes --download-only install python3.11 libstdc++6 libgomp1 >/dev/null
    for package in "$apt"/archives/*.deb; do
        dpkg-deb --extract "$package" "$root"
    done
    rm -rf "$apt" "$folder/root"
    mv "$root" "$folder/root"
}

# With uv, which chooses as pip does on a Pi: pip here, told of another platform, still takes this machine's versions and markers.
make_site() {
    local uv new=$site.new
    if ! uv=$(command -v uv); then
        uv=$folder/tools/bin/uv
        [ -x "$uv" ] || "$python" -m pip install --quiet --root-user-action ignore --disable-pip-version-check \
            --target "$folder/tools" uv
    fi
    rm -rf "$new"
    "$uv" pip install --quiet --cache-dir "$folder/wheels" --python "$python" --target "$new" \
        --python-platform aarch64-manylinux_2_28 --python-version 3.11 --only-binary :all: \
        --requirements "$checkout/pyproject.toml" "$@"
    cp "$checkout/pyproject.toml" "$new/"
    rm -rf "$site"
    mv "$new" "$site"
}

started=$SECONDS
if [ ! -x "$folder/root/usr/bin/python3.11" ]; then
    echo "fetching Debian's arm64 packages"
    make_root
fi
site=$folder/site extras=(--extra train)
if [[ ,$precisions, == *,nf4,* ]]; then
    site=$folder/site-nf4 extras+=(--extra quant)
fi
if ! cmp -s "$checkout/pyproject.toml" "$site/pyproject.toml"; then
    echo 'fetching the aarch64 wheels'
    make_site "${extras[@]}"
fi
echo "$folder: $(du -sm "$folder" | cut -f1) MB, ready after $((SECONDS - started)) s"

export PYTHONPATH="$checkout:$checkout/benchmarks"
exec nice "$python" "$checkout/docker/aarch64_smoke.py" --qemu "$qemu" --cpu "$cpu" --root "$folder/root" --site "$site" \
    --precisions "$precisions" --steps "$steps"
