#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under eight minutes: gpu_check.py next to this file, from a bare clone.
#
#     tools/gpu_check.sh [--json FILE] [--csv FILE] [--seconds 450] [FOLDER OF THE REAL IMAGES]
#
# Messages and a short table go to stderr; the last line of stdout is one JSON document that holds what was measured here
# and nothing else. Exit codes: 0 all passed, 1 something failed or no kernel test ran, 2 no GPU (nothing is measured).
# PYTHON names the interpreter. It needs torch and triton, for the tests of the kernels pytest, numpy and hypothesis; what
# needs more is skipped with the reason.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/kernels:$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-$(command -v python || command -v python3)}" tools/gpu_check.py "$@"
