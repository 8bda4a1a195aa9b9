#!/usr/bin/env bash
# Everything that needs a GPU: the tests, then each result file, the kernels first. A step that fails does not stop the others.
#   bash benchmarks/all.sh [FOLDER [STEP ...]]    FOLDER: of the result files; STEP: tests, kernels, serving, hf, vllm, sanitize
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
steps=("${@:2}")
[ ${#steps[@]} -gt 0 ] || steps=(tests kernels serving hf vllm sanitize)
mkdir -p "$out"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
failed=()

step() { # seconds at most, then the command
  local limit=$1 start=$SECONDS
  shift
  echo "== $*"
  timeout "$limit" "$@" || failed+=("$*")
  echo "== $((SECONDS - start)) s"
}

sanitize() {
  for tool in memcheck racecheck initcheck synccheck; do
    echo "$tool"
    compute-sanitizer --tool $tool --kernel-name kernel_substring=tq4 --report-api-errors no python3 benchmarks/sanitize.py
  done | grep -v "^$" > "$out/sanitizer-h200.txt"
  ! grep "ERROR SUMMARY" "$out/sanitizer-h200.txt" | grep -v " 0 errors"
}

for name in "${steps[@]}"; do
  case $name in
    tests) step 300 python3 -m pytest -m gpu tests -n 14 --tb=short -p no:cacheprovider ;;
    kernels)
      step 120 python3 benchmarks/decode.py --rep 30 --out "$out"
      step 120 python3 benchmarks/triton_attention.py --out "$out"
      step 60 python3 benchmarks/store.py --out "$out"
      ;;
    serving)
      step 120 python3 benchmarks/serving.py --out "$out"
      step 120 python3 benchmarks/steps.py --out "$out"
      ;;
    hf) step 420 python3 benchmarks/hf.py --out "$out" ;;
    vllm) step 500 python3 benchmarks/vllm_serving.py --out "$out/vllm-h200.json" ;;
    sanitize) sanitize || failed+=("$name") ;;
    *) failed+=("unknown step $name") ;;
  esac
done
printf 'failed: %s\n' "${failed[@]:-nothing}"
[ ${#failed[@]} -eq 0 ]
