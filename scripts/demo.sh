#!/usr/bin/env bash
# Takes the tiny model of fixtures/ through every stage: compiled, inspected, benchmarked, continued as text.
# Runs on a GPU if there is one, else on the CPU. Called by `make demo`; PSIGRAPH_PYTHON names the Python to use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PSIGRAPH_PYTHON:-python3}
model=fixtures/tiny/tiny-qwen3-q4_k_m.gguf
out=demo-out
bold='' plain=''
if [ -t 1 ]; then bold=$'\033[1m' plain=$'\033[0m'; fi

step() {
    printf '\n%s$ psigraph' "$bold"
    for word in "$@"; do
        if [[ $word == *' '* ]]; then printf ' "%s"' "$word"; else printf ' %s' "$word"; fi
    done
    printf '%s\n' "$plain"
    "$python" -m psigraph "$@"
}

mkdir -p "$out"
step compile "$model" --out "$out/compiled"
step inspect "$model" --stage fused --layer 0
step bench --model-path "$model" --prompt-token-ids 4094 --max-new-tokens 64 --repeats 3 --json-out "$out/bench.json"
step generate "$model" --prompt "Fellow-Citizens of the Senate and House of Representatives:" --max-new-tokens 48
printf '\nEverything that was written lies in %s/.\n' "$out"
