#!/usr/bin/env bash
# Checks numerics and speed on this machine's accelerator: some minutes on a GPU, figures into the file named, if any.
#   PYTHON=.venv/bin/python scripts/device_check.sh device.json [--parts=numerics,speed,fipa,tiny_imagenet] [--tiny]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${1:-device.json}
shift || true
PYTHONPATH=".:${PYTHONPATH:-}" TQDM_MININTERVAL=10 "${PYTHON:-python3}" scripts/benchmark.py device --out="$out" "$@"
