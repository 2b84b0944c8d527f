#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Set-up and tests: the hooks people run before a commit, then pytest. The fast tier by default; `--full` runs every matrix,
# `--quick` what is not slow and needs no ranks, commands or interpreted kernels, with the hooks beside it. Further arguments go
# to pytest:
#
#     bash tests/run.sh [--quick | --full] [pytest arguments ...]        e.g. tests/ops -n 0
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh train,deepspeed,dev

tier=() beside=
case "${1:-}" in
--full)
    shift
    tier=(-m "" --hypothesis-profile full)
    ;;
--quick)
    shift
    tier=(--quick --hypothesis-profile quick) beside=yes
    ;;
esac
tests=(python -m pytest -n logical --dist worksteal --durations 25 ${tier[@]+"${tier[@]}"} "$@")
if [ -z "$beside" ]; then
    bash .githooks/pre-commit
    exec "${tests[@]}"
fi
log=$(mktemp)
trap 'rm "$log"' EXIT
bash .githooks/pre-commit >"$log" 2>&1 &
failed=0
"${tests[@]}" || failed=$?
wait $! || failed=$?
cat "$log"
exit "$failed"
