#!/usr/bin/env bash
# Score the answers of infer_instruct.sh. Flags are handed on to the script, such as a judge model's:
# bash eval_instruct.sh --eval-model NAME --api-type dash
set -euo pipefail

OUTPUT_DIR=${OUTPUT_DIR:-output}
NPROC=${NPROC:-32} # questions to the judge at once

exec python "$(dirname "$0")/run_realworldqa.py" eval --nproc "$NPROC" \
    --input-file "$OUTPUT_DIR/realworldqa_instruct.jsonl" \
    --output-file "$OUTPUT_DIR/realworldqa_instruct_eval.json" "$@"
