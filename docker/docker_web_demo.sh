#!/usr/bin/env bash
# The old name of run_web_demo.sh.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/run_web_demo.sh" "$@"
