#!/bin/sh
# Builds the wheel and runs, away from the source and without torch, the tests that need none: make test-runtime
#   tests/without_torch.sh [PYTHON ...]
# Without arguments: on the oldest and the newest Python of this machine that the project supports, pyenv's included; the
# oldest with the oldest packages that pyproject.toml allows, the newest with those that were the newest when its
# environment was made. The pictures of both are compared.
# TESTS="tests/kernels tests/bundle" runs those alone. Says at the end what ran where.
set -eu
cd "$(dirname "$0")/.."
packages="setuptools>=77 wheel pytest pytest-xdist hypothesis cryptography jsonschema numpy pillow onnxruntime click rich array-api-compat \
onnx filelock packaging tokenizers starlette uvicorn prometheus-client httpx2"

find_python() { # VERSION -> an interpreter that starts
    for found in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
        "$found" -c "import venv" 2>/dev/null && echo "$found" && return
    done
    return 0
}

if [ $# -eq 0 ]; then
    if [ -n "${VENV:-}" ]; then
        echo "VENV is one environment: give the one PYTHON that it is of" >&2
        exit 2
    fi
    for version in 3.10 3.11 3.12 3.13; do
        python=$(find_python $version)
        [ -z "$python" ] || newest=$python
        [ -z "$python" ] || oldest=${oldest:-$python}
    done
    if [ -z "${newest:-}" ]; then
        echo "There is no Python 3.10 to 3.13 here; give one: tests/without_torch.sh PYTHON" >&2
        exit 1
    fi
    set -- "$oldest"
    if [ "$oldest" != "$newest" ]; then
        set -- "$oldest" "$newest"
        compared=yes
    fi
fi

# The lower bounds of what a user of the runtime installs, as pip's constraints.
lowest() { # PYTHON that has tomllib
    "$1" - pyproject.toml <<'END'
import re, sys, tomllib

project = tomllib.load(open(sys.argv[1], "rb"))["project"]
extras = project["optional-dependencies"]
for requirement in project["dependencies"] + extras["cpu"] + extras["text"] + extras["sign"]:
    if not requirement.startswith("packaging>"):  # setuptools builds the wheel with a newer one
        print(re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).expand(r"\1==\2"))
END
}

away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT
: >"$away/constraints"
[ -z "${compared:-}" ] || lowest "$newest" >"$away/constraints"
cp -r tests benchmarks docs README.md pyproject.toml "$away"
ran=""
for python; do
    version=$("$python" -c "import platform; print(platform.python_version())")
    venv=${VENV:-$PWD/.venv-$version}
    [ -e "$venv/bin/pip" ] || "$python" -m venv "$venv"
    # shellcheck disable=SC2086
    "$venv/bin/pip" install -q -c "$away/constraints" $packages
    rm -rf build "$away/wheel"
    "$venv/bin/pip" wheel -q --no-deps --no-build-isolation -w "$away/wheel" .
    "$venv/bin/pip" install -q --force-reinstall --no-deps "$away"/wheel/*.whl
    (
        cd "$away"
        "$venv/bin/python" -c "from piflow_edge.kernels import cpu; assert not cpu.missing(), cpu.missing(); print(cpu.isas())"
        # shellcheck disable=SC2086
        OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q -p no:cacheprovider ${WORKERS--n 2 --dist loadfile} \
            -m "not torch and not gpu" ${TESTS:-tests}
    )
    if [ -n "${compared:-}" ]; then
        (cd "$away" && "$venv/bin/python" -m tests.system.same_pictures pictures)
        : >"$away/constraints"
    fi
    ran="$ran $version"
done
echo "ran without torch on Python$ran, $(uname -m)"
