#!/usr/bin/env bash
# Ask the questions of ODinW-13, sampled as published for the thinking models. Flags are handed on to the script:
# bash infer_think.sh --tensor-parallel-size 8
set -euo pipefail

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-VL-8B-Thinking}
DATA_DIR=${DATA_DIR:-${LMUData:?say in DATA_DIR or LMUData where the data is}}
OUTPUT_DIR=${OUTPUT_DIR:-output}

exec python "$(dirname "$0")/run_odinw.py" infer --preset think \
    --model-path "$MODEL_PATH" --data-dir "$DATA_DIR" \
    --output-file "$OUTPUT_DIR/odinw_think.jsonl" "$@"
