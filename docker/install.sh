#!/usr/bin/env bash
# The steps of every image, Docker's and Apptainer's: Debian's root takes them, with a Python 3.11
# that has pip.
#
#   install.sh dependencies TARGET SOURCE VENV   what modtrain needs, in the versions of the lock files;
#                                                TARGET, cpu or cuda, is which torch
#   install.sh code SOURCE VENV                  modtrain itself
#   install.sh cuda_version VENV                 print the CUDA of the torch in it, as 13.0
#   install.sh libraries                         InfiniBand's, which NCCL looks for when it starts
#   install.sh compiler                          for compile=true
#   install.sh user NAME UID                     who runs it
#   install.sh bare                              take away the Python's own pip
#
# SOURCE has pyproject.toml, constraints.txt and docker/constraints.txt; for `code` also modtrain/,
# conf/, slurm/, README.md and LICENSE.
# Environment: PYTHON, the Python to build on; TORCH_INDEX, the index that torch comes from, empty for
# what pip has configured; CUDA_VERSION, the CUDA that torch must bring, empty for any; PIP_CACHE_DIR, a
# directory for what is downloaded, without which nothing is kept.
set -euo pipefail

PYTHON=${PYTHON:-python3.11}
TORCH_INDEX=${TORCH_INDEX:-}
CUDA_VERSION=${CUDA_VERSION:-}
# PyPI's torch for Linux on x86_64 is the CUDA build alone.
PYTORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# Kernels of DeepSpeed's own need nvcc, and modtrain uses none of them.
export DS_BUILD_OPS=0
export DEBIAN_FRONTEND=noninteractive

pip_into() { # VENV ARGUMENT...: the venv gets no pip of its own
    "$PYTHON" -m pip --python "$1/bin/python" --disable-pip-version-check "${@:2}"
}

install_into() { # VENV ARGUMENT...
    local cache=()
    [[ -n ${PIP_CACHE_DIR:-} ]] || cache=(--no-cache-dir)
    pip_into "$1" install "${cache[@]}" "${@:2}"
}

torch() { # TARGET VENV VERSION: alone from its index, since what else lies there is of other versions
    local index=()
    [[ -z $TORCH_INDEX ]] || index=(--index-url "$TORCH_INDEX")
    if [[ $1 = cuda ]]; then
        # A site's own index or folder may have the CPU build as well, whose version sorts higher.
        [[ -n $TORCH_INDEX ]] || set -- "$1" "$2" "=$3"
        install_into "$2" --no-deps "${index[@]}" "torch==$3"
        check_cuda "$2"
    elif [[ -n $TORCH_INDEX ]]; then
        install_into "$2" --no-deps "${index[@]}" "torch==$3"
    elif ! install_into "$2" --no-deps "torch==$3+cpu"; then
        echo "pip has no CPU build of torch configured: it comes from $PYTORCH_CPU_INDEX"
        install_into "$2" --no-deps --index-url "$PYTORCH_CPU_INDEX" "torch==$3"
    fi
}

dependencies() { # TARGET SOURCE VENV
    local target=$1 source=$2 venv=$3 version requirements
    [[ $target = cpu || $target = cuda ]] || { echo "TARGET=$target: give cuda or cpu" >&2; exit 2; }
    # Build backends, which pip fetches by itself, are held to the locked versions too.
    export PIP_CONSTRAINT="$source/constraints.txt $source/docker/constraints.txt"
    version=$(sed -n 's/^torch==//p' "$source/constraints.txt")
    "$PYTHON" -m venv --without-pip "$venv"
    torch "$target" "$venv" "$version"
    requirements=$(mktemp)
    "$PYTHON" - "$source/pyproject.toml" >"$requirements" <<'PYTHON'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], *project["optional-dependencies"]["corpus"], sep="\n")
PYTHON
    install_into "$venv" --requirement "$requirements"
    rm "$requirements"
}

cuda_version() { # VENV: torch itself needs its libraries, which are not there yet
    "$1/bin/python" - <<'PYTHON'
import importlib.util, pathlib, runpy
(folder,) = importlib.util.find_spec("torch").submodule_search_locations
print(runpy.run_path(str(pathlib.Path(folder, "version.py")))["cuda"] or "none")
PYTHON
}

check_cuda() { # VENV
    local found
    found=$(cuda_version "$1")
    [[ $found != none ]] || { echo "torch has no CUDA: give a TORCH_INDEX that has a CUDA build" >&2; exit 1; }
    [[ -z $CUDA_VERSION || $CUDA_VERSION = "$found" ]] || {
        echo "torch brings CUDA $found, and CUDA_VERSION=$CUDA_VERSION: give CUDA_VERSION=$found" >&2
        exit 1
    }
}

code() { # SOURCE VENV
    export PIP_CONSTRAINT="$1/constraints.txt $1/docker/constraints.txt"
    install_into "$2" --no-deps "$1"
    pip_into "$2" check
}

debian() { # PACKAGE...
    apt-get update -q
    apt-get install -qy --no-install-recommends "$@"
    rm -rf /var/lib/apt/lists/*
}

libraries() { debian libibverbs1 librdmacm1 ibverbs-providers; }

# Inductor compiles C++ on CPUs; on GPUs Triton compiles the C that starts its kernels.
compiler() { debian g++ libc6-dev; }

user() { # NAME UID
    useradd --create-home --uid "$2" --shell /bin/bash "$1"
    # Caches go below HOME, whichever user `--user` makes of it.
    chmod 1777 "/home/$1"
}

bare() { "$PYTHON" -m pip uninstall --yes --root-user-action ignore wheel setuptools pip; }

case "${1:-} $#" in
"dependencies 4" | "code 3" | "cuda_version 2" | "user 3" | "libraries 1" | "compiler 1" | "bare 1") "$@" ;;
*)
    sed -n '/^#  /s/^# *//p' "$0" >&2
    exit 2
    ;;
esac
