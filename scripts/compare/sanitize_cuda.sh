#!/usr/bin/env bash
# compute-sanitizer over small models: one token at a time in one launch and operation by operation, chunks, batches, a load.
# usage: sanitize_cuda.sh HOIST FOLDER [TOOL …]     tools: memcheck synccheck racecheck, all by default
# Prints one line a run: TOOL SHAPE ENCODING WAY VERDICT, and what the tool says below a run that is not clean; fails if one is not.
set -euo pipefail
hoist=$1 folder=$2
shift 2
mkdir -p "$folder"
[ $# -gt 0 ] || set -- memcheck synccheck racecheck

status=0
sanitized() { # tool, what, arguments of hoist
  local tool=$1 what=$2 more=(); shift 2
  [ "$tool" = racecheck ] && more=(--racecheck-report all)
  [ "$tool" = memcheck ] && more=(--leak-check full)
  local code=0
  compute-sanitizer --tool "$tool" "${more[@]}" --error-exitcode 99 --print-limit 100 \
    "$hoist" "$@" > "$folder/said" 2>&1 || code=$?
  if [ "$code" = 0 ]; then
    echo "$tool $what clean"
  else
    echo "$tool $what NOT CLEAN ($code)"
    grep -E '^=========|^error' "$folder/said" | head -60
    status=1
  fi
}

for tool in "$@"; do
  for file in tiny-llama:q4_k_m tiny-qwen2:q5_k tiny-gemma3:q8_0 tiny-qwen3moe:q4_k_m; do
    shape=${file%:*} encoding=${file#*:}
    model=$folder/$shape-$encoding.gguf
    [ -e "$model" ] || "$hoist" synth "$shape" "$model" --encoding "$encoding" > /dev/null
    sanitized "$tool" "$shape $encoding load" load "$model" --backend cuda --verify
    compare=(compare "$model" --backend cuda)
    for way in 1 0; do
      export HOIST_CUDA_ONE_LAUNCH=$way
      name=$([ "$way" = 1 ] && echo one-launch || echo operations)
      sanitized "$tool" "$shape $encoding $name" "${compare[@]}" --positions 6 --batches 1 --chunks 1
    done
    sanitized "$tool" "$shape $encoding chunks" "${compare[@]}" --positions 70 --batches 1 --chunks 5,70
    sanitized "$tool" "$shape $encoding batches" "${compare[@]}" --positions 6 --batches 3,8 --chunks 1,6
  done
done
exit $status
