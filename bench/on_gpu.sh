#!/usr/bin/env bash
# Tests and measures this checkout on a GPU machine, uninstalled and without a network, in nine minutes.
#
#   bench/on_gpu.sh OUT               OUT gets at most 8 flat files, each under 16 MiB, flushed as they grow
#   bench/on_gpu.sh OUT --rehearse    the same on the CPU with the mini model
#
# Runs every part, then exits with 1 if any failed. PYTHON names the interpreter, else python or python3 from the path.
set -u

if [ $# -lt 1 ] || [ $# -gt 2 ] || [ "${2:---rehearse}" != --rehearse ]; then
    echo "usage: bench/on_gpu.sh OUT [--rehearse], got: $*" >&2
    exit 2
fi
mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd)
rehearse=${2:-}
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-$(command -v python || command -v python3)}
export PYTHONUNBUFFERED=1
limit=$((15 * 1024 * 1024))
failed=0

# keeps a file's last 15 MiB, in whole lines
trim() {
    if [ -f "$1" ] && [ "$(wc -c <"$1")" -gt "$limit" ]; then
        tail -c "$limit" "$1" | sed 1d >"$1.tail" && mv "$1.tail" "$1"
    fi
}

# part NAME SECONDS COMMAND...: runs a command into NAME.log and its outcome into summary.txt
part() {
    local name=$1 seconds=$2 begun=$SECONDS code
    shift 2
    timeout -k 5 "$seconds" "$@" >"$out/$name.log" 2>&1
    code=$?
    [ "$code" -eq 0 ] || failed=1
    trim "$out/$name.log"
    trim "$out/$name.jsonl"
    tail -n 40 "$out/$name.log"
    echo "$name: exit code $code after $((SECONDS - begun)) s" | tee -a "$out/summary.txt"
}

rm -f "$out/summary.txt" "$out/unet.jsonl" "$out/kernels.jsonl"
part machine 20 sh -c 'nvidia-smi || echo "no nvidia-smi: not a GPU machine"'

# only these files: others import libraries that such a machine may lack
# shellcheck disable=SC2046
part gpu_tests 120 "$python" -m pytest -m "gpu and not slow" -q -rs --durations=5 -p no:cacheprovider $(grep -lE 'mark\.gpu\b' tests/test_*.py)

part unet 260 "$python" -m vstar_engine.bench unet --out "$out/unet.jsonl" --budget 240 $rehearse

if [ -f bench/kernels.py ]; then
    part kernels 120 "$python" -m vstar_engine.bench kernels --out "$out/kernels.jsonl" --budget 110 $rehearse
fi
exit "$failed"
