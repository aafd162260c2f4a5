#!/usr/bin/env bash
# Starts an engine with the elastic KV cache on, on a GPU or on the CPU. See --help.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: benchmarks/serve/start_server.sh [vllm|sglang] [options] [-- ENGINE_OPTIONS...]

sgl is short for sglang.

  --model MODEL    a folder, or a hub id such as Qwen/Qwen3-0.6B (default: a tiny model, made under build/models)
  --name NAME      the model's name for clients and kvctl (default: the last part of MODEL)
  --venv-path DIR  the virtual environment with the engine (default: the checkout's, or the active one)
  --port PORT      default 8000
  --device WHERE   cuda or cpu (default: cuda if nvidia-smi finds a GPU)
  --print          print the command instead of running it
  -h, --help       this help

Then, in other terminals:  benchmarks/serve/start_client.sh     kvctl kvtop
TEXT
}

root=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source=benchmarks/serve/start_common.sh
source "$root/benchmarks/serve/start_common.sh"
read_options "$@"

command=()
program=$(program)
case $engine in
vllm)
    command=("$program" serve "$model" --served-model-name "$name" --kv-cache-backend kvcached)
    ;;
sglang)
    variables+=(ENABLE_KVCACHED=true)
    command=("$program" -m sglang.launch_server
        --model-path "$model" --served-model-name "$name")
    if [[ $device == cpu ]]; then command+=(--device cpu); fi
    ;;
esac
command+=(--host 127.0.0.1 --port "$port")
if [[ $engine-$device == vllm-cpu ]]; then
    # only vLLM's own check at its start uses it; memory is elastic
    variables+=("VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}")
    command+=(--enforce-eager --max-model-len "${MAX_MODEL_LEN:-2048}")
fi
variables+=("KVCACHED_NAME=${KVCACHED_NAME:-$name}")
carry_out "${command[@]}" "${rest[@]}"
