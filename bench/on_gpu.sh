#!/usr/bin/env bash
# Tests and measures this checkout on a GPU machine, uninstalled and without a network, within a number of minutes.
#
#   bench/on_gpu.sh OUT [--minutes N]    OUT gets at most 8 flat files, each under 16 MiB; N is 9 unless given
#   bench/on_gpu.sh OUT --rehearse       the same on the CPU with tiny shapes
#
# The most valuable part first, every row on disk as it is found (rows.jsonl). Runs every part for which time is left, then exits
# with 1 if any failed. PYTHON names the interpreter, else python or python3 from the path.
set -u

usage() {
    echo "usage: bench/on_gpu.sh OUT [--minutes N] [--rehearse], got: $*" >&2
    exit 2
}

given=$*
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || usage "$given"
folder=$1
shift
minutes=9
rehearse=
while [ $# -gt 0 ]; do
    case $1 in
    --minutes)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || usage "$given"
        minutes=$2
        shift
        ;;
    --rehearse) rehearse=--rehearse ;;
    *) usage "$given" ;;
    esac
    shift
done
mkdir -p "$folder" || exit 1
out=$(cd "$folder" && pwd)
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-$(command -v python || command -v python3)}
export PYTHONUNBUFFERED=1
limit=$((15 * 1024 * 1024))
end=$((SECONDS + minutes * 60))
failed=0
# the longest search takes longer than the network's other measurements together
mode=default
[ "$minutes" -ge 30 ] && mode=max-autotune-no-cudagraphs

# keeps a text file's last 15 MiB, in whole lines
trim() {
    if [ -f "$1" ] && [ "$(wc -c <"$1")" -gt "$limit" ]; then
        tail -c "$limit" "$1" | sed 1d >"$1.tail" && mv "$1.tail" "$1"
    fi
}

# part NAME SECONDS COMMAND...: runs a command for so many of nine minutes' seconds, into log.txt, its outcome into summary.txt
part() {
    local name=$1 seconds=$(($2 * minutes / 9)) begun=$SECONDS code
    shift 2
    [ "$seconds" -lt $((end - begun)) ] || seconds=$((end - begun))
    if [ "$seconds" -lt 10 ]; then
        echo "$name: not started, $((end - begun)) s are left" | tee -a "$out/summary.txt"
        return
    fi
    echo "== $name: $*" >>"$out/log.txt"
    timeout -k 5 "$seconds" "$@" >"$out/part.txt" 2>&1
    code=$?
    [ "$code" -eq 0 ] || failed=1
    cat "$out/part.txt" >>"$out/log.txt"
    tail -n 40 "$out/part.txt"
    rm -f "$out/part.txt"
    trim "$out/log.txt"
    trim "$out/rows.jsonl"
    echo "$name: exit code $code after $((SECONDS - begun)) s" | tee -a "$out/summary.txt"
}

# bench NAME SECONDS WHAT...: measures; what has begun after three quarters of the time may end
bench() {
    local name=$1 seconds=$2
    shift 2
    # shellcheck disable=SC2086
    part "$name" "$seconds" "$python" -m vstar_engine.bench "$@" --out "$out/rows.jsonl" --budget $((seconds * minutes / 12)) $rehearse
}

rm -f "$out"/{summary.txt,log.txt,rows.jsonl,profile.md,trace.json.gz}
part machine 20 sh -c 'nvidia-smi || echo "no nvidia-smi: not a GPU machine"'

# only these files: others import libraries that such a machine may lack
# shellcheck disable=SC2046
part gpu_tests 110 "$python" -m pytest -m "gpu and not slow" -q -rs --durations=5 -p no:cacheprovider $(grep -lE 'mark\.gpu\b' tests/test_*.py)

bench kernels 60 kernels --frames 64 16 --limit 10
bench step 110 pipeline --full --frames 64 --parts headline stages --no-compile --rounds 3 --profile "$out"
bench blocks 50 roofline --measure --frames 64 --rounds 3
bench compiled 150 pipeline --full --frames 64 --parts headline --compile-mode "$mode" --rounds 3
bench fused 40 kernels --op groupnorm_silu geglu linear temporal_convolution guided_step to_e4m3 --frames 64 --levels 0 1 2 --limit 3
bench shapes 60 kernels --frames 32 128 256 --levels 0 1 2 --limit 5
bench ladder 100 pipeline --full --frames 16 --parts ladder trajectory --no-compile --rounds 3
bench fast 90 pipeline --full --frames 16 --parts fast --rounds 3
if [ -f "$out/trace.json.gz" ] && [ "$(wc -c <"$out/trace.json.gz")" -gt "$limit" ]; then
    rm "$out/trace.json.gz"
    echo "trace.json.gz was larger than 15 MiB and is left out" | tee -a "$out/summary.txt"
fi
exit "$failed"
