#!/usr/bin/env bash
# The steps of every image, Docker's and Apptainer's: Debian's root takes them, with a Python 3.11
# that has pip.
#
#   install.sh dependencies SOURCE VENV   what modtrain needs, in the versions of the lock files
#   install.sh code SOURCE VENV           modtrain itself
#   install.sh libraries                  InfiniBand's, which NCCL looks for when it starts
#   install.sh compiler                   for compile=true
#   install.sh user NAME UID              who runs it
#   install.sh bare                       take away the Python's own pip
#
# SOURCE has pyproject.toml, constraints.txt and docker/constraints.txt; for `code` also modtrain/,
# conf/, slurm/, README.md and LICENSE.
# Environment: PYTHON, the Python to build on; TORCH_INDEX, the index that torch comes from, empty
# for pip's own.
set -euo pipefail

PYTHON=${PYTHON:-python3.11}
TORCH_INDEX=${TORCH_INDEX:-}
# Kernels of DeepSpeed's own need nvcc, and modtrain uses none of them.
export DS_BUILD_OPS=0
export DEBIAN_FRONTEND=noninteractive

pip_into() { # VENV ARGUMENT...: the venv gets no pip of its own
    "$PYTHON" -m pip --python "$1/bin/python" --disable-pip-version-check "${@:2}"
}

dependencies() { # SOURCE VENV
    local source=$1 venv=$2 torch requirements index=()
    # Build backends, which pip fetches by itself, are held to the locked versions too.
    export PIP_CONSTRAINT="$source/constraints.txt $source/docker/constraints.txt"
    torch=$(grep '^torch==' "$source/constraints.txt")
    [[ -z $TORCH_INDEX ]] || index=(--index-url "$TORCH_INDEX")
    "$PYTHON" -m venv --without-pip "$venv"
    # Alone from its index: what else lies there is of other versions.
    pip_into "$venv" install --no-cache-dir --no-deps "${index[@]}" "$torch"
    requirements=$(mktemp)
    "$PYTHON" - "$source/pyproject.toml" >"$requirements" <<'PYTHON'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
print(*project["dependencies"], *project["optional-dependencies"]["corpus"], sep="\n")
PYTHON
    pip_into "$venv" install --no-cache-dir --requirement "$requirements"
    rm "$requirements"
}

code() { # SOURCE VENV
    export PIP_CONSTRAINT="$1/constraints.txt $1/docker/constraints.txt"
    pip_into "$2" install --no-cache-dir --no-deps "$1"
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
"dependencies 3" | "code 3" | "user 3" | "libraries 1" | "compiler 1" | "bare 1") "$@" ;;
*)
    sed -n '/^#  /s/^# *//p' "$0" >&2
    exit 2
    ;;
esac
