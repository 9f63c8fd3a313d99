#!/bin/sh
# Inside the build of an image: install.sh packages ROLE | jetson TORCH CUDSS | sfl FOLDER. Wheels beside this file are enough, if
# there are any; without them pip asks its index, and TORCH_INDEX for torch. The locks name every package, so nothing is resolved
# here and nothing else comes in.
set -eu
here=$(dirname "$0")
python=$(command -v python || command -v python3)
if ls "$here"/*.whl >/dev/null 2>&1; then
    export PIP_NO_INDEX=1 PIP_FIND_LINKS="$here"
elif [ -n "${TORCH_INDEX:-}" ]; then
    export PIP_EXTRA_INDEX_URL="$TORCH_INDEX"
fi
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

install() {
    if [ -x /opt/sfl/bin/pip ]; then
        /opt/sfl/bin/python -m pip install --no-deps "$@"
    else
        "$python" -m pip --python /opt/sfl/bin/python install --no-deps "$@"
    fi
}

case $1 in
packages)
    "$python" -m venv --without-pip /opt/sfl
    install --only-binary :all: -r "$here/$2.$(uname -m).txt"
    "$python" -m pip --python /opt/sfl/bin/python check # a lock that lacks something, a torch that wants CUDA's packages
    /opt/sfl/bin/python "$here/prune.py"
    ;;
jetson)
    # With the base's own packages in sight, torch among them if it has one; the lock's come before them. Its pip is too old for
    # --python, so the environment gets one.
    "$python" -m venv --system-site-packages /opt/sfl
    install --upgrade 'pip>=24'
    install --ignore-installed --only-binary :all: -r "$here/jetson.aarch64.txt"
    if [ -n "$2" ]; then
        # From that index alone: of the same version pip likes PyPI's build better, which is for processors.
        install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$2"
        install "$3"
        site=$(/opt/sfl/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        echo "$site/nvidia/cu12/lib" >/etc/ld.so.conf.d/cudss.conf
        ldconfig
    fi
    ;;
sfl)
    PIP_CONSTRAINT="$here/build.txt" install "$2"
    /opt/sfl/bin/sfl --version
    ;;
esac
