#!/usr/bin/env bash
# Takes the tiny model of fixtures/ through every stage: compiled, inspected, benchmarked, continued as text.
# Runs on a GPU if there is one, else on the CPU. Called by `make demo`; PSIGRAPH_PYTHON names the Python to use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PSIGRAPH_PYTHON:-python3}
model=fixtures/tiny/tiny-qwen3-q4_k_m.gguf
out=demo-out

step() {
    printf '\n\033[1m$ psigraph %s\033[0m\n' "$*"
    "$python" -m psigraph "$@"
}

# Asked of the program, not of nvidia-smi: a GPU that is too old, or has too old a driver, is none.
backend=$("$python" - << 'PYTHON'
from psigraph.diagnosis import diagnose

gpu = next(found for found in diagnose().capabilities if found.name == "run on a GPU")
print("cuda" if gpu.works else "cpu")
PYTHON
)

step compile "$model" --out "$out"
step inspect "$model" --stage fused --layer 0
step bench --model-path "$model" --artifact-kind gguf --backend "$backend" \
    --prompt-token-ids 0 --max-new-tokens 32 --repeats 3 --json-out "$out/bench.json"
step generate "$model" --prompt "The heart" --max-new-tokens 48
printf '\nEverything that was written lies in %s/.\n' "$out"
