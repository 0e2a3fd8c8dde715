#!/usr/bin/env bash
# Digests of logits over everything that must not move a bit: instruction set, threads, chunk, batch, second run.
# usage: bits.sh HOIST FOLDER        prints one line a case: MODEL VARIANT DIGEST, and fails if a model has two digests.
set -euo pipefail
hoist=$1 folder=$2
mkdir -p "$folder"
tokens=$(seq -s, 3 7 450)

digest() { # model, arguments
  local model=$1; shift
  "$hoist" logits "$model" --tokens "$tokens" --context 128 --json "$@" | sed -n 's/^  "digest": "\(.*\)"$/\1/p'
}

status=0
for shape in tiny-llama tiny-mistral tiny-qwen2 tiny-qwen3 tiny-qwen3moe tiny-gemma2 tiny-gemma3 tiny-phi3 tiny-gpt2 smollm2-135m; do
  for encoding in q4_k_m q4_1 q8_0 f16; do
    case $shape-$encoding in smollm2-135m-f16) continue ;; esac
    model=$folder/$shape-$encoding.gguf
    "$hoist" synth "$shape" "$model" --encoding "$encoding" > /dev/null
    first=""
    while read -r name arguments; do
      # shellcheck disable=SC2086 # words on purpose
      d=$(digest "$model" $arguments)
      echo "$shape $encoding $name $d"
      [ -z "$first" ] && first=$d
      [ "$d" = "$first" ] || { echo "DIFFERS: $shape $encoding $name" >&2; status=1; }
    done <<'V'
default --threads 2
scalar --force-scalar --threads 2 --chunk 64
threads-1 --threads 1
threads-7 --threads 7
chunk-1 --threads 2 --chunk 1
chunk-5 --threads 2 --chunk 5
chunk-512 --threads 2 --chunk 512
batch-8 --threads 2 --chunk 16 --batch 8
twice --threads 2 --twice
V
    rm -f "$model"
  done
done
exit $status
