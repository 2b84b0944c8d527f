#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Set-up and tests: the hooks people run before a commit, then pytest. The fast tier by default; `--full` runs every
# matrix. Further arguments go to pytest:
#
#     bash tests/run.sh [--full] [pytest arguments ...]        e.g. tests/harness/test_ranks.py -n 0
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh train,deepspeed,dev

tier=()
if [ "${1:-}" = --full ]; then
    shift
    tier=(-m "" --hypothesis-profile full)
fi
bash .githooks/pre-commit
exec python -m pytest -n logical --dist worksteal ${tier[@]+"${tier[@]}"} "$@"
