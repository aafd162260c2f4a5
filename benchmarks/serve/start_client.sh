#!/usr/bin/env bash
# Runs the engine's own serving benchmark against the server of start_server.sh. See --help.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: benchmarks/serve/start_client.sh [vllm|sglang] [options] [-- BENCHMARK_OPTIONS...]

sgl is short for sglang.

  --model MODEL    the model that the server serves, for its tokenizer (default: as start_server.sh)
  --name NAME      the model's name on the server (default: the last part of MODEL)
  --venv-path DIR  the virtual environment with the engine (default: the checkout's, or the active one)
  --port PORT      default 8000
  --prompts N      number of requests (default 100)
  --rate N         requests a second, above 0 (default 4; inf: all at once)
  --input N        tokens of a prompt (default 256)
  --output N       tokens of an answer (default 64)
  --print          print the command instead of running it
  -h, --help       this help

Watch the memory follow the load:  kvctl kvtop
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
    command=("$program" bench serve --backend openai --base-url "http://127.0.0.1:$port"
        --model "$name" --tokenizer "$model" --dataset-name random
        --random-input-len "$input" --random-output-len "$output")
    ;;
sglang)
    command=("$program" -m sglang.bench_serving --backend sglang --host 127.0.0.1 --port "$port"
        --model "$model" --dataset-name random-ids --random-range-ratio 1
        --random-input-len "$input" --random-output-len "$output"
        --output-file /dev/null) # else it leaves one in the current folder
    ;;
esac
carry_out "${command[@]}" --num-prompts "$prompts" --request-rate "$rate" "${rest[@]}"
