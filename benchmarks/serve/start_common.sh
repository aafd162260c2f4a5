# The common part of start_server.sh and start_client.sh, which source it with `root` set and `usage` defined.
# shellcheck shell=bash disable=SC2034,SC2154 # variables that those scripts set or use

engine=vllm model='' name='' venv_path='' port=8000 device='' prompts=100 rate=4 input=256 output=64 only_print=no
rest=() variables=() # variables: NAME=VALUE, set for the command

complain() { # complain MESSAGE: report wrong usage and exit with 2
    echo "$(basename "$0"): $1 (see $(basename "$0") --help)" >&2
    exit 2
}

number() { # number OPTION VALUE: print VALUE if it is a whole number of 1 or more
    [[ $2 =~ ^[1-9][0-9]*$ ]] || complain "$1: expected a number of 1 or more, not '$2'"
    echo "$2"
}

read_options() {
    if [[ ${1:-} =~ ^[a-z] ]]; then
        engine=$1
        shift
    fi
    if [[ $engine == sgl ]]; then engine=sglang; fi
    [[ $engine == vllm || $engine == sglang ]] || complain "no engine is named '$engine': vllm or sglang"
    while (($#)); do
        case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --print) only_print=yes ;;
        --)
            shift
            rest=("$@")
            break
            ;;
        --model | --name | --venv-path | --port | --device | --prompts | --rate | --input | --output)
            (($# > 1)) || complain "$1: a value is missing"
            set_option "$1" "$2"
            shift
            ;;
        *) complain "unknown option '$1'" ;;
        esac
        shift
    done
    fill_in
}

set_option() {
    case $1 in
    --model) model=$2 ;;
    --name) name=$2 ;;
    --venv-path) venv_path=$2 ;;
    --port)
        port=$(number "$1" "$2")
        ((${#port} <= 5 && port <= 65535)) || complain "--port: expected at most 65535, not '$2'"
        ;;
    --prompts) prompts=$(number "$1" "$2") ;;
    --input) input=$(number "$1" "$2") ;;
    --output) output=$(number "$1" "$2") ;;
    --rate)
        [[ $2 == inf || ($2 =~ ^[0-9]+(\.[0-9]+)?$ && $2 =~ [1-9]) ]] ||
            complain "--rate: expected a number above 0 or inf, not '$2'"
        rate=$2
        ;;
    --device)
        [[ $2 == cuda || $2 == cpu ]] || complain "--device: expected cuda or cpu, not '$2'"
        device=$2
        ;;
    esac
}

fill_in() { # set the options that were not given
    if [[ -z $device ]]; then
        if nvidia-smi -L >/dev/null 2>&1; then device=cuda; else device=cpu; fi
    fi
    if [[ -z $model ]]; then
        model=$root/build/models/tiny
        if [[ $only_print == no ]]; then
            python=$(interpreter)
            (cd "$root" && "$python" -m devkit.models tiny "$model" >&2)
        fi
    fi
    # a folder, or ORGANISATION/NAME of a model on the Hugging Face Hub
    [[ -d $model || $only_print == yes || $model =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+$ ]] ||
        complain "--model: $model is no folder, and no hub id such as Qwen/Qwen3-0.6B"
    name=${name:-$(basename "$model")}
}

program() { # program: print the path of the engine's command: `vllm`, or the python that has SGLang
    local python
    python=$(interpreter) || exit
    if [[ $engine == vllm ]]; then python=$(dirname "$python")/vllm; fi
    echo "$python"
}

interpreter() { # interpreter: print the python that has the engine: the checkout's, or else one in PATH
    local venv=.venv make=setup found
    if [[ $engine == sglang ]]; then venv=.venv-sglang make=setup-sglang; fi
    local places=("$root/$venv/bin/python")
    if found=$(command -v vllm) && [[ $engine == vllm ]]; then places+=("$(dirname "$found")/python"); fi
    for found in python python3; do
        if found=$(command -v "$found"); then places+=("$found"); fi
    done
    if [[ -n $venv_path ]]; then places=("$venv_path/bin/python"); fi
    for found in "${places[@]}"; do
        if [[ -x $found ]] && has_engine "$found"; then
            echo "$found"
            return
        fi
    done
    [[ -z $venv_path ]] || complain "--venv-path: $venv_path has no bin/python with $engine"
    complain "$engine is not installed: run make $make, or activate the environment that has it"
}

has_engine() { # has_engine PYTHON: whether this interpreter finds the engine; nothing is imported
    [[ $engine == sglang || -x $(dirname "$1")/vllm ]] &&
        "$1" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$engine"
}

carry_out() {
    if [[ $only_print == yes ]]; then
        ((${#variables[@]} == 0)) || printf '%q ' env "${variables[@]}"
        printf '%q ' "$@"
        echo
    else
        exec env "${variables[@]}" "$@"
    fi
}
