#!/usr/bin/env bash
# Score the answers of infer_instruct.sh. Flags are handed on to the script.
set -euo pipefail

OUTPUT_DIR=${OUTPUT_DIR:-output}

exec python "$(dirname "$0")/run_mathv.py" eval \
    --input-file "$OUTPUT_DIR/mathvision_instruct.jsonl" \
    --output-file "$OUTPUT_DIR/mathvision_instruct_eval.json" "$@"
