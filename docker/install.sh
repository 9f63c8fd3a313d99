#!/bin/sh
# Inside the build of an image: install.sh packages ROLE | sfl | jetson. Wheels beside this file are enough, if there are any;
# without them pip asks its index, and TORCH_INDEX for torch.
set -eu
here=$(dirname "$0")
if ls "$here"/*.whl >/dev/null 2>&1; then
    export PIP_NO_INDEX=1 PIP_FIND_LINKS="$here"
elif [ -n "${TORCH_INDEX:-}" ]; then
    export PIP_EXTRA_INDEX_URL="$TORCH_INDEX"
fi
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_CONSTRAINT="$here/build.txt"

# The locks name every package, so nothing is resolved here, and nothing else comes in.
case $1 in
packages)
    python -m venv --without-pip /opt/sfl
    python -m pip --python /opt/sfl/bin/python install --no-deps --only-binary :all: -r "$here/$2.$(uname -m).txt"
    /opt/sfl/bin/python "$here/prune.py"
    ;;
sfl)
    python -m pip --python /opt/sfl/bin/python install --no-deps "$2"
    /opt/sfl/bin/sfl --version
    ;;
esac
