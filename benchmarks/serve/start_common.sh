# The common part of start_server.sh and start_client.sh, which source it with `root` set and `usage` defined.
# shellcheck shell=bash disable=SC2034,SC2154 # variables that those scripts set or use

engine=vllm model='' name='' port=8000 device='' prompts=100 rate=4 input=256 output=64 only_print=no
rest=()

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
        --model | --name | --port | --device | --prompts | --rate | --input | --output)
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
    --port) port=$(number "$1" "$2") ;;
    --prompts) prompts=$(number "$1" "$2") ;;
    --input) input=$(number "$1" "$2") ;;
    --output) output=$(number "$1" "$2") ;;
    --rate)
        [[ $2 == inf || $2 =~ ^[0-9]+(\.[0-9]+)?$ ]] || complain "--rate: expected a number or inf, not '$2'"
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
            python=$(program python)
            (cd "$root" && "$python" -m devkit.models tiny "$model" >&2)
        fi
    fi
    [[ -d $model || $only_print == yes ]] || complain "--model: $model is no folder"
    name=${name:-$(basename "$model")}
}

program() { # program NAME: print its path in the engine's virtual environment, or else in PATH
    local venv=.venv make=setup
    if [[ $engine == sglang ]]; then venv=.venv-sglang make=setup-sglang; fi
    if [[ -x $root/$venv/bin/$1 ]]; then
        echo "$root/$venv/bin/$1"
    else
        command -v "$1" || complain "$1 is not installed: run make $make, or activate its environment"
    fi
}

carry_out() {
    if [[ $only_print == yes ]]; then
        printf '%q ' "$@"
        echo
    else
        exec "$@"
    fi
}
