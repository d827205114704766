#!/usr/bin/env bash
# Everything that a GPU has to show, in one run: numbers first, then speed. Needs psigraph installed for $PYTHON.
#
#   scripts/gpu/evidence.sh OUT [part ...]
#
# Parts (default: all, in this order): numbers decode text compare prompts sizes sanitize ablate sweep tune
#
# Reports go to OUT, as psigraph's commands write them; copy those that are to be cited into fixtures/.
# LLAMA_BENCH=PATH names a llama-bench for the part `compare`; MODELS=DIR keeps the synthetic files there, and takes
# those that are there. Parts are apart so that a short lease can run some; PART_SECONDS (default 600) ends a command.
set -uo pipefail
out=${1:?usage: scripts/gpu/evidence.sh OUT [part ...]}
shift
parts=${*:-numbers decode text compare prompts sizes sanitize ablate sweep tune}
python=${PYTHON:-python3}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "$out"
export PSIGRAPH_COMMIT=${PSIGRAPH_COMMIT:-$(git -C "$here" rev-parse HEAD 2> /dev/null)}
[ -n "$PSIGRAPH_COMMIT" ] || echo "evidence.sh: no repository here and PSIGRAPH_COMMIT is not set: reports name no commit" >&2
if [ -n "${MODELS:-}" ]; then
    models=$MODELS
    mkdir -p "$models"
else
    models=$(mktemp -d)
    trap 'rm -rf "$models"' EXIT
fi
failed=()

run() { # run NAME COMMAND...: its output to OUT/NAME.txt, its last lines to the screen
    local name=$1
    shift
    echo "== $name"
    if ! timeout "${PART_SECONDS:-600}" "$@" > "$out/$name.txt" 2>&1; then failed+=("$name"); fi
    tail -n "${LINES_SHOWN:-12}" "$out/$name.txt"
}
psigraph=("$python" -m psigraph)
model() { # model SIZE QUANT [option ...]: the path of a synthetic file, made once
    local path=$models/$1-$2.gguf
    [ -f "$path" ] || "${psigraph[@]}" synth "$path" --size "$1" --quant "$2" --seed 1 "${@:3}" > /dev/null
    echo "$path"
}
bench() { # bench NAME MODEL option...
    run "$1" "${psigraph[@]}" bench --model-path "$2" --artifact-kind gguf --backend cuda --prompt-token-ids 151644 \
        --max-new-tokens 512 --repeats 3 --json-out "$out/$1.json" "${@:3}"
}

for part in $parts; do
    case $part in
    numbers)
        run doctor "${psigraph[@]}" doctor
        run numbers "$python" -m pytest -q -s -m gpu "$here/tests/gpu"
        ;;
    sanitize)
        tiny=$here/fixtures/tiny/tiny-qwen3-q4_k_m.gguf
        for tool in memcheck racecheck initcheck synccheck; do
            for graph in "" --no-graph; do
                run "sanitize-$tool$graph" compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m psigraph \
                    generate "$tiny" --backend cuda --prompt-token-ids 4094,448 --max-new-tokens 3 $graph
            done
            # A prompt by chunks, and attention over several tiles after it.
            run "sanitize-$tool-prompt" compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m psigraph \
                generate "$tiny" --backend cuda --prompt-token-ids "$(seq -s, 100 199)" --max-new-tokens 3 --prefill own
        done
        ;;
    decode)
        file=$(model 1.7b q4_k_m)
        bench decode-1.7b-q4_k_m "$file" --model-size 1.7b --profile
        bench decode-1.7b-q4_k_m-forced "$file" --mode forced
        bench decode-1.7b-q4_k_m-d4096 "$file" --depth 4096 --ctx 5120
        bench decode-1.7b-q4_k_m-d4096-q8-cache "$file" --depth 4096 --ctx 5120 --kv-type q8
        ;;
    sweep)
        run sweep "${psigraph[@]}" bench --model-path "$(model 1.7b q4_k_m)" --backend cuda --prompt-token-ids 151644 \
            --max-new-tokens 64 --ctx 16640 --sweep depth=0,512,1024,4096,16384 --json-out "$out/sweep"
        ;;
    tune)
        run tune "${psigraph[@]}" tune "$(model 1.7b q4_k_m)" --seconds 60
        ;;
    prompts)
        file=$(model 1.7b q4_k_m)
        LINES_SHOWN=8 run prefill "$python" "$here/scripts/gpu/prefill.py" --model "$file"
        for way in own library; do # the second one fails where cuBLASLt is not installed
            bench "prompt-512-$way" "$file" --prompt-tokens 512 --prefill "$way" --max-new-tokens 64 --profile
        done
        ;;
    text)
        file=$(model 1.7b q4_k_m)
        bench decode-1.7b-q4_k_m-text "$file" --mode text
        bench decode-1.7b-q4_k_m-text-top-k-40 "$file" --mode text --temperature 0.8 --top-k 40 --top-p 1 --min-p 0
        # shellcheck disable=SC2016
        run chat bash -c 'printf "Tell me about sleep.\nAnd about rest?\n/quit\n" |
            "$0" -m psigraph chat "$1" --backend cuda --temperature 0 --max-new-tokens 512' "$python" "$file"
        ;;
    sizes)
        bench decode-0.6b-q4_k_m "$(model 0.6b q4_k_m)"
        bench decode-4b-q4_k_m "$(model 4b q4_k_m)"
        bench decode-8b-q4_k_m "$(model 8b q4_k_m)"
        bench decode-1.7b-q8_0 "$(model 1.7b q8_0)"
        ;;
    ablate)
        run ablate "${psigraph[@]}" ablate "$(model 1.7b q4_k_m)" --backend cuda --prompt-tokens 512 \
            --json-out "$out/ablation-1.7b-q4_k_m.json"
        ;;
    compare)
        if [ -n "${LLAMA_BENCH:-}" ]; then
            run compare "${psigraph[@]}" compare --model "$(model 1.7b q4_k_m)" --llama-bench "$LLAMA_BENCH" \
                --out-dir "$out/compare"
        else
            echo "== compare: LLAMA_BENCH names no llama-bench; not run"
        fi
        ;;
    *)
        echo "unknown part $part" >&2
        exit 2
        ;;
    esac
done

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all parts passed"
