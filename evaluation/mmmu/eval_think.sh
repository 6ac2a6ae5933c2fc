#!/usr/bin/env bash
# Score the answers of infer_think.sh. Flags are handed on to the script, such as a judge model's:
# bash eval_think.sh --eval-model NAME --api-type dash
set -euo pipefail

OUTPUT_DIR=${OUTPUT_DIR:-output}
NPROC=${NPROC:-32} # questions to the judge at once

exec python "$(dirname "$0")/run_mmmu.py" eval --nproc "$NPROC" \
    --input-file "$OUTPUT_DIR/mmmu_think.jsonl" \
    --output-file "$OUTPUT_DIR/mmmu_think_eval.json" "$@"
