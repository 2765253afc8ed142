#!/usr/bin/env bash
# Everything one session on a GPU should show, in one command and under nine minutes:
#
#   bench/gpu.sh                        on a CUDA machine; JSON files in bench/results/ or $OUT
#   bench/gpu.sh --device cpu --tiny    its dry run, anywhere, under two minutes; in build/bench/
#
# Parts, each with its own time budget and its own JSON, written as it goes:
#   op_tests.json   every op's tests on the device; an op that fails runs on torch from there on
#   ops.json        us, GB/s, TFLOP/s and % of ceiling of every op
#   e2e.json        prefill and decode of whole models against the peers
#   gpu.json        how each part ended
# What the machine lacks (deepspeed, ...) is installed from .whl/ in the repository, if present.
set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
device=cuda
tiny=()
while (($#)); do
  case "$1" in
    --device) device=${2:-}; shift 2 || exit 2 ;;
    --tiny) tiny=(--tiny); shift ;;
    *) echo "usage: bench/gpu.sh [--device cuda|cpu] [--tiny]; got: $1" >&2; exit 2 ;;
  esac
done
case "$device" in cpu | cuda) ;; *) echo "--device takes cpu or cuda, got: $device" >&2; exit 2 ;; esac

python=$(command -v python3 || command -v python) || { echo "no python on the PATH" >&2; exit 2; }
if [[ $device == cpu ]]; then
  out=${OUT:-build/bench}
  # One quick op stands for all: CI runs the op tests themselves.
  test_args=(--only interpreter_canary add_rms_norm --limit-s 60 --jobs 1)
  test_s=60 ops_s=30 e2e_s=60
else
  out=${OUT:-bench/results}
  test_args=(--limit-s 120 --jobs 5 --workers 3)
  test_s=150 ops_s=110 e2e_s=240
fi
mkdir -p "$out" || exit 2
export PYTHONPATH="$PWD/src:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Models are random here; nothing is fetched.
export HF_HUB_OFFLINE=1

if [[ $device == cuda ]] && compgen -G ".whl/*.whl" >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps .whl/*.whl ||
    echo "wheels in .whl/ did not install; what needs them will say so" >&2
fi

failed=0
ended=()
# run_part NAME SECONDS COMMAND...: the command minds its budget; the time-out is for one that hangs.
run_part() {
  local name=$1 seconds=$2 start=$SECONDS code=0
  shift 2
  echo "== $name"
  timeout --kill-after=5 "$((seconds + 15))" "$@" --out "$out/$name.json" || code=$?
  ((code == 0)) || failed=1
  ended+=("\"$name\": {\"exit\": $code, \"seconds\": $((SECONDS - start)), \"budget_s\": $seconds}")
  local joined
  joined=$(printf '%s, ' "${ended[@]}")
  printf '{"device": "%s", "parts": {%s}}\n' "$device" "${joined%, }" >"$out/gpu.json"
}

rm -f "$out"/{op_tests,ops,e2e,gpu}.json
run_part op_tests "$test_s" "$python" bench/op_tests.py --device "$device" \
  "${test_args[@]}" --budget-s "$test_s"

# Without a list, no op is proven: then all run on torch, and the parts below still say something.
torch_ops=$("$python" - "$out/op_tests.json" <<'PY'
import json, pathlib, sys
from tritonhybrid_kernels.ops import OP_NAMES
path = pathlib.Path(sys.argv[1])
print(",".join(json.loads(path.read_text())["torch_ops"] if path.exists() else OP_NAMES))
PY
)
# On the CPU every op is on its torch path anyway.
[[ $device == cpu ]] && torch_ops=
run_part ops "$ops_s" "$python" bench/bench_ops.py --device "$device" "${tiny[@]}" \
  --torch-ops "$torch_ops" --budget-s "$ops_s"
run_part e2e "$e2e_s" "$python" bench/bench_e2e.py --device "$device" "${tiny[@]}" \
  --torch-ops "$torch_ops" --budget-s "$e2e_s"

echo "== results in $out after $SECONDS s"
exit "$failed"
