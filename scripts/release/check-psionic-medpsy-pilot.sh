#!/usr/bin/env bash
# The gate of the MedPsy pilot: schemas, decision, policy, documents' figures, no sidecar, focused tests.
# PYTHON names the interpreter that has psigraph and its test tools; without it the one of `make test` is used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python="${PYTHON:-}"
if [[ -z "$python" ]]; then
    if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; else python=python3; fi
fi
if ! "$python" -c "import psigraph.medpsy.matrix" 2>/dev/null; then
    echo "$python has no psigraph: run 'make test' first, or set PYTHON to one that has it" >&2
    exit 2
fi
"$python" scripts/release/gate.py .
if [[ "${1:-}" != "--no-tests" ]]; then
    "$python" -m pytest -q tests/psigraph/medpsy tests/psigraph/bench/test_report.py tests/scripts/release
fi
echo "MedPsy pilot: all checks passed"
