#!/bin/sh
# Builds the wheel for aarch64 and runs there, without torch, the tests that need none: make test-aarch64
# On an aarch64 machine as it is. On another Linux by emulation, in a Debian of its own (1 GB in .aarch64), as root and
# with: apt-get install debootstrap qemu-user-static binfmt-support. Emulation takes 10 to 20 times as long.
# TESTS="tests/kernels/test_kernels.py tests/bundle/test_demo_bundle.py" runs those files alone.
set -eu
cd "$(dirname "$0")/.."
place=$PWD/.aarch64
packages="setuptools>=77 wheel pytest pytest-xdist hypothesis cryptography jsonschema numpy pillow onnxruntime click rich array-api-compat \
onnx filelock"

if [ "$(uname -m)" != aarch64 ]; then
    if [ ! -e "$place/whole" ]; then
        debootstrap --arch=arm64 --variant=minbase --include=python3-venv,g++,ca-certificates bookworm "$place"
        touch "$place/whole"
    fi
    if [ ! -e "$place/wheels/whole" ]; then # by this machine's pip: an emulated one is too slow for some servers
        platforms=$(for glibc in 17 24 26 27 28; do echo "--platform manylinux_2_${glibc}_aarch64"; done)
        python3 -m venv "$place/pip"
        # shellcheck disable=SC2086
        "$place/pip/bin/pip" download -q --only-binary=:all: --implementation cp --python-version 3.11 --abi cp311 --abi abi3 \
            --abi none $platforms --platform manylinux2014_aarch64 -d "$place/wheels" $packages
        touch "$place/wheels/whole"
    fi
    rm -rf "$place/src"
    mkdir "$place/src"
    git ls-files -z | tar --null -T - -cf - | tar -C "$place/src" -xf -
    mountpoint -q "$place/proc" || mount -t proc proc "$place/proc"
    trap 'umount "$place/proc"' EXIT
    chroot "$place" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TESTS="${TESTS:-tests}" \
        OMP_NUM_THREADS=1 PIFLOW_EDGE_EMULATED=1 PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels VENV=/venv sh /src/tests/aarch64.sh
    exit
fi

VENV=${VENV:-$PWD/.venv-aarch64} WORKERS="" exec tests/without_torch.sh python3
