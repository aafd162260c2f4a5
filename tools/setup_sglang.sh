#!/usr/bin/env bash
# Makes .venv-sglang: torch, stock SGLang on the CPU with the stand-ins of devkit/sglang_rig, the project (editable) and
# the development tools. It is separate from .venv because the engines want different versions of the same packages.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly TORCH=torch==2.13.0 SGLANG=sglang==0.5.23
readonly VENV=.venv-sglang WHEELS=build/wheels LOG=build/setup-sglang.log TOTAL=6
readonly RIG=devkit/sglang_rig PROJECTS=(. cli plugins/sglang_kvcached)
source tools/stages.sh

torch() { pip install "$TORCH"; }
requirements() { pip install -r tools/requirements-sglang.txt "$TORCH"; }
engine() {
    # --no-deps: SGLang requires several GB of CUDA packages. The rig replaces the two that SGLang imports.
    pip install --no-deps "$SGLANG"
    editable "$RIG"
}
developer() { pip install -r tools/requirements-dev.txt "$TORCH"; }
project() { editable "${PROJECTS[@]}"; }

begin
stage environment "$versions" "virtual environment for SGLang with $python"
stage torch "$TORCH" "$TORCH (about 1 minute)"
stage requirements "$(sha256sum <tools/requirements-sglang.txt)" "imports of SGLang on a CPU (about 2 minutes)"
stage developer "$(sha256sum <tools/requirements-dev.txt)" "tools for tests"
stage engine "$SGLANG $(cat $RIG/pyproject.toml $RIG/*/*.py | sha256sum)" "$SGLANG and the rig"
stage project "$(metadata_of "${PROJECTS[@]}")" "the project itself, editable"
