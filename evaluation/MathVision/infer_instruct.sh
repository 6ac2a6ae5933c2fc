#!/usr/bin/env bash
# Ask the questions of MathVision, sampled as published for the instruct models. Flags are handed on to the script:
# bash infer_instruct.sh --tensor-parallel-size 8
set -euo pipefail

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-VL-8B-Instruct}
DATA_DIR=${DATA_DIR:-${LMUData:?say in DATA_DIR or LMUData where the data is}}
OUTPUT_DIR=${OUTPUT_DIR:-output}

exec python "$(dirname "$0")/run_mathv.py" infer --preset instruct \
    --model-path "$MODEL_PATH" --data-dir "$DATA_DIR" \
    --output-file "$OUTPUT_DIR/mathvision_instruct.jsonl" "$@"
