#!/usr/bin/env bash
# Checks and measures the checkout on a GPU within a time limit, without a network: see `bench/on_gpu.sh --help`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m bench.on_gpu "$@"
