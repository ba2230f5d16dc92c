#!/usr/bin/env bash
# Tests and measures this checkout on a GPU machine, uninstalled and without a network, within a number of minutes.
#
#   bench/on_gpu.sh OUT                            the parts of FIRST, the most valuable first, in 9 minutes
#   bench/on_gpu.sh OUT --parts compiled autotune  only these; OUT keeps what earlier runs left there
#   bench/on_gpu.sh OUT --minutes N --rehearse     another time; the same on the CPU with tiny shapes
#
# A machine that is lent for ten minutes at a time takes three runs: without --parts, then the compilers (compiled autotune), then
# the rest (blocks fused shapes ladder). OUT gets at most 8 flat files, each under 16 MiB; every row is on disk as it is
# found (rows.jsonl). Exits with 1 if any part failed. PYTHON names the interpreter, else python or python3 from the path.
# VSTAR_COMMIT names the commit of a copy that git knows nothing of (40 digits, a + behind them where it was changed).
set -u

# seconds of what a run has: a part's share of the time left is its own by those still to come, so none is lost and all fit
declare -A SECONDS_OF=(
    [machine]=8 [kernels]=45 [step]=80 [tests]=65 [aoti]=150 [trajectory]=90 [long]=42 [fast]=60
    [compiled]=110 [autotune]=430 [blocks]=60 [fused]=60 [shapes]=120 [ladder]=120
)
FIRST="machine kernels step tests aoti trajectory long fast"
REST="compiled autotune blocks fused shapes ladder"

usage() {
    echo "usage: bench/on_gpu.sh OUT [--minutes N] [--rehearse] [--parts NAME...], got: $*" >&2
    echo "parts: $FIRST (without --parts); $REST" >&2
    exit 2
}

given=$*
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || usage "$given"
folder=$1
shift
minutes=9
rehearse=
parts=
while [ $# -gt 0 ]; do
    case $1 in
    --minutes)
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || usage "$given"
        minutes=$2
        shift
        ;;
    --rehearse) rehearse=--rehearse ;;
    --parts)
        while [ -n "${2:-}" ] && [ "${2#-}" = "$2" ]; do
            [ -n "${SECONDS_OF[$2]:-}" ] || usage "$given"
            parts+="$2 "
            shift
        done
        [ -n "$parts" ] || usage "$given"
        ;;
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
if [ -z "$parts" ]; then
    parts=$FIRST
    rm -f "$out"/{summary.txt,log.txt,rows.jsonl,profile.md,trace.json.gz}
fi
coming=0
for name in $parts; do
    coming=$((coming + SECONDS_OF[$name]))
done

# once, before this run leaves anything in the checkout; with a folder that belongs to another user too
if [ -z "${VSTAR_COMMIT:-}" ] && VSTAR_COMMIT=$(git -c safe.directory='*' rev-parse HEAD 2>/dev/null); then
    changes=$(git -c safe.directory='*' status --porcelain -- :/ ':(top,exclude)bench/results') || changes=unknown
    [ -z "$changes" ] || VSTAR_COMMIT+=+
fi
export VSTAR_COMMIT
echo "commit ${VSTAR_COMMIT:-unknown, so the rows cannot be committed: set VSTAR_COMMIT}" | tee -a "$out/summary.txt"

# keeps a text file's first 15 MiB, in whole lines: the most valuable parts come first
trim() {
    if [ -f "$1" ] && [ "$(wc -c <"$1")" -gt "$limit" ]; then
        head -c "$limit" "$1" | sed '$d' >"$1.head" && mv "$1.head" "$1"
    fi
}

# part COMMAND...: runs the command of part $name for the $seconds that are its share, into log.txt, its outcome into summary.txt
part() {
    local begun=$SECONDS code
    if [ "$seconds" -lt 5 ]; then
        echo "$name: not started, $((end - begun)) s are left" | tee -a "$out/summary.txt"
        return
    fi
    echo "== $name: $*" >>"$out/log.txt"
    timeout -k 5 "$seconds" "$@" >"$out/part.txt" 2>&1
    code=$?
    [ "$code" -eq 0 ] || failed=1
    # of a long story the end: what went wrong stands there
    tail -c 1000000 "$out/part.txt" >>"$out/log.txt"
    tail -n 40 "$out/part.txt"
    rm -f "$out/part.txt"
    trim "$out/log.txt"
    trim "$out/rows.jsonl"
    echo "$name: exit code $code after $((SECONDS - begun)) of $seconds s" | tee -a "$out/summary.txt"
}

# bench WHAT...: measures; what has begun after three quarters of the time may end
bench() {
    # shellcheck disable=SC2086
    part "$python" -m vstar_engine.bench "$@" --out "$out/rows.jsonl" --budget $((seconds * 3 / 4)) $rehearse
}

step() {
    bench pipeline --full --rounds 3 "$@"
}

run() {
    case $1 in
    machine) part sh -c 'nvidia-smi || echo "no nvidia-smi: not a GPU machine"' ;;
    kernels) bench kernels --frames 64 16 --limit 10 ;;
    step) step --frames 64 --parts headline stages --no-compile --profile "$out" ;;
    # only these files: others import libraries that such a machine may lack. A line a test, as it ends
    # shellcheck disable=SC2046
    tests) part "$python" -m pytest -m "gpu and not slow" -v -rs --durations=5 -p no:cacheprovider \
        $(grep -lE 'mark\.gpu\b' tests/*/test_*.py) ;;
    aoti) step --frames 64 --parts headline --providers ours "ours, AOTInductor" ;;
    trajectory) step --frames 64 --parts trajectory ;;
    long) step --frames 128 --parts headline --providers ours "clean eager" ;;
    fast) step --frames 64 --parts fast ;;
    compiled) step --frames 64 --parts headline --providers ours "clean compiled" --compile-mode default ;;
    # the longest search would not end: it also tries every pointwise kernel again and again
    autotune) step --frames 64 --parts headline --providers ours "clean compiled" --compile-mode max-autotune-gemm ;;
    blocks) bench roofline --measure --frames 64 --rounds 3 ;;
    fused) bench kernels --op groupnorm_silu geglu linear temporal_convolution guided_step to_e4m3 norm_e4m3 conv_e4m3 linear_e4m3 --frames 64 --levels 0 1 2 --limit 3 ;;
    shapes) bench kernels --frames 32 128 256 --levels 0 1 2 --limit 5 ;;
    ladder) step --frames 16 --parts ladder --no-compile ;;
    esac
}

for name in $parts; do
    left=$((end - SECONDS))
    seconds=$((left * SECONDS_OF[$name] / coming))
    coming=$((coming - SECONDS_OF[$name]))
    run "$name"
done
if [ -f "$out/trace.json.gz" ] && [ "$(wc -c <"$out/trace.json.gz")" -gt "$limit" ]; then
    rm "$out/trace.json.gz"
    echo "trace.json.gz was larger than 15 MiB and is left out" | tee -a "$out/summary.txt"
fi
exit "$failed"
