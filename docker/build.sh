#!/usr/bin/env bash
# Builds an image by docker, podman or buildah, whichever is here, with the arguments that are known:
#
#   docker/build.sh cuda
#   docker/build.sh cpu --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm
#
# The first word is a target of docker/Dockerfile, and names the image modtrain:TARGET; what follows goes
# to the builder. Environment: BUILDER, one of the three; PIP_CONFIG_FILE, a pip.conf for the build;
# CUDA_VERSION, where TORCH_INDEX has another CUDA than the lock file.
set -euo pipefail

target=${1:?which target: cpu, cuda, cpu-compile or cuda-compile}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for BUILDER in "${BUILDER:-docker}" podman buildah; do ! command -v "$BUILDER" >/dev/null || break; done
command -v "$BUILDER" >/dev/null || { echo "docker, podman or buildah is needed" >&2; exit 2; }

options=(--file "$root/docker/Dockerfile" --target "$target" --tag "modtrain:$target")
# Docker's own format keeps the health check.
[[ $BUILDER = docker ]] || options+=(--format docker)
if revision=$(git -C "$root" rev-parse HEAD 2>/dev/null); then
    [[ -z $(git -C "$root" status --porcelain --untracked-files=no) ]] || revision+=-changed
    options+=(--build-arg "REVISION=$revision")
fi
if [[ $target = cuda* ]]; then
    # Which CUDA torch is built for; the build checks it against the wheel.
    locked=$(sed -nE 's/^nvidia-cuda-runtime==([0-9]+\.[0-9]+)\..*/\1/p' "$root/docker/constraints.txt")
    options+=(--build-arg "CUDA_VERSION=${CUDA_VERSION:-$locked}")
fi
[[ -z ${PIP_CONFIG_FILE:-} ]] || options+=(--secret "id=pip,src=$PIP_CONFIG_FILE")

began=$SECONDS
"$BUILDER" build "${options[@]}" "${@:2}" "$root"
echo "modtrain:$target: built in $((SECONDS - began)) s; its size:"
"$BUILDER" images "modtrain:$target"
