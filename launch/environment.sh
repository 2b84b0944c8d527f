# SPDX-License-Identifier: Apache-2.0
# Make the virtual environment and install the package into it, once, then activate it. Source it from the repository
# root with the extras of pyproject.toml that you want:
#
#     . launch/environment.sh train,dev
#
# It installs again only if pyproject.toml, launch/constraints.txt or the repository's location has changed. It honours:
#   RING_HILBERT_VENV    the environment's folder (default .venv)
#   PYTHON               the interpreter to make it with (default: the first suitable one of python3, python3.13, ...)
#   PIP_*                pip's own settings. On Linux, PyPI's torch brings the CUDA libraries, several gigabytes; on a machine
#                        without a GPU, avoid them with PyTorch's own index of CPU builds:
#                        PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
#   GLIBC_TUNABLES       if unset, set so that the memory of large CPU tensors is reused instead of returned to the system,
#                        whose fresh pages would fault in every step (Linux with glibc; no effect elsewhere)

ring_hilbert_find_python() {
    local candidates=${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10} candidate
    for candidate in $candidates; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.10 to 3.13 found (tried: $candidates). Name one: PYTHON=/path/to/python3.12" >&2
    return 1
}

ring_hilbert_environment() {
    local extras=$1 venv=${RING_HILBERT_VENV:-.venv} python wanted stamp quiet=
    if [ ! -e "$venv/bin/activate" ]; then
        python=$(ring_hilbert_find_python) || return
        echo "making $venv with $("$python" --version)"
        if ! "$python" -m venv "$venv"; then
            echo "error: '$python -m venv $venv' failed. On Debian and Ubuntu: apt install python3-venv" >&2
            return 1
        fi
    fi
    . "$venv/bin/activate" || return
    wanted=$(cat pyproject.toml launch/constraints.txt <(pwd) | cksum)
    stamp=$venv/installed-$extras
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing ring_hilbert[$extras] into $venv (minutes the first time)"
        [ -t 1 ] || quiet=--quiet
        python -m pip install $quiet --disable-pip-version-check -c launch/constraints.txt -e ".[$extras]" || return
        echo "$wanted" >"$stamp"
    fi
}

export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296}
ring_hilbert_environment "$1"
