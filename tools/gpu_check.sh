#!/usr/bin/env bash
# What needs a GPU, on a machine that has one: the tests marked gpu, and decoding on the CPU against decoding on the GPU.
#
#     tools/gpu_check.sh [FOLDER OF THE REAL IMAGES]
#
# Messages go to stderr; the last line of stdout is one JSON document that holds what was measured here and nothing else.
# Exit codes: 0 all passed, 1 a test failed, none ran, or decoding was not compared, 2 no GPU (nothing is measured).
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"
data="${1:-${FEEDFAST_DATA:-../shared/data}}"

if ! "$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)'; then
    echo "gpu_check: torch sees no CUDA GPU here; nothing was checked" >&2
    echo '{"gpu": null, "checked": false}'
    exit 2
fi

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"$python" -m pytest -m gpu --junitxml="$work/gpu.xml" >&2
"$python" tools/compare_decode.py "$data" | tail -n 1 >"$work/decode.json" || true

"$python" - "$work" <<'PY'
import json, sys, xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

work = Path(sys.argv[1])
tests = None
if (work / "gpu.xml").is_file():
    suite = next(ElementTree.parse(work / "gpu.xml").getroot().iter("testsuite"))
    tests = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
text = (work / "decode.json").read_text().strip()
decode = json.loads(text) if text else None
ran = tests is not None and tests["tests"] > tests["skipped"]
ok = ran and not tests["failures"] + tests["errors"] and decode is not None
print(json.dumps({
    "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
    "checked": True, "ok": ok, "tests": tests, "decode": decode,
}))
sys.exit(0 if ok else 1)
PY
