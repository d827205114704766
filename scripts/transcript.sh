#!/usr/bin/env bash
# Makes docs/chat-transcript.txt: a conversation with the tiny model of fixtures/, in numpy so that it needs nothing.
# PSIGRAPH_PYTHON names the Python to use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PSIGRAPH_PYTHON:-python3}
out=docs/chat-transcript.txt
chat=(chat fixtures/tiny/tiny-qwen3-q4_k_m.gguf --backend cpu --seed 3)
lines=$(mktemp)
trap 'rm -f "$lines" "$lines.out"' EXIT

cat > "$lines" << 'LINES'
The state of the Union is strong.
/set max_new_tokens 24
And what of the whale?
/set temperature 0
Call me Ishmael.
/quit
LINES

printf '$ psigraph %s\n' "${chat[*]}" > "$lines.out"
"$python" -m psigraph "${chat[@]}" --script "$lines" >> "$lines.out"
mv "$lines.out" "$out"
chmod 644 "$out"
cat "$out"
