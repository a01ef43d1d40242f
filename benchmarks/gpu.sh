#!/usr/bin/env bash
# All that a GPU is wanted for, in nine minutes: checks, costs, a profile, the experiment which form trains best.
#
#   OUT=results DATA=cifar10 PEER=OREPA_CVPR2022 TIMM_SCRIPTS=pytorch-image-models benchmarks/gpu.sh
#
# OUT is a new or an empty folder. What is not there is left out: DATA, a folder (or a tar.xz of one) with train/CLASS/*
# and test/CLASS/*; PEER, a clone of the authors' code; TIMM_SCRIPTS. Each part has a time limit of its own, so that the
# next one runs whatever becomes of it; PARTS="checks profile" runs these alone, and some only so. No network is needed.
# TOY=1 DEVICE=cpu tries it on a CPU.
set -u
cd "$(dirname "$0")/.."
: "${OUT:?names no folder}" "${DEVICE:=cuda}" "${TOY:=}" "${DATA:=}" "${PEER:=}" "${PYTHON:=python3}" "${PARTS:=}"
mkdir -p "$OUT"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
started=$SECONDS
report="$OUT/parts.md"
printf '| part | outcome | seconds |\n|---|---|--:|\n' > "$report"

part() {  # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begun=$SECONDS outcome
    shift 2
    [[ -z "$PARTS" || " $PARTS " == *" $name "* ]] || return 0
    echo "== $name: $*"
    timeout --kill-after=5 "$limit" "$@" > "$OUT/$name.log" 2>&1
    case $? in 0) outcome=ok;; 124|137) outcome="stopped after $limit s";; *) outcome=failed;; esac
    tail -n 3 "$OUT/$name.log"
    echo "| $name | $outcome | $((SECONDS - begun)) |" >> "$report"
}

cost() {  # NAME SECONDS ARGUMENTS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PYTHON" benchmarks/train_cost.py --device "$DEVICE" --dtype bf16 --channels-last \
        --out "$OUT/$name" "$@"
}

shared_out() {  # NAME SECONDS FOLDER SCRIPT ARGUMENTS...: for several processes, as one leaves the GPU waiting
    local name=$1 limit=$2 folder=$3 script=$4 left=$((530 - SECONDS + started))
    shift 4
    [ "$left" -lt 30 ] && left=30
    part "$name" "$((left < limit ? left : limit))" bash -c '
        for _ in 1 2 3 4; do "$@" & done; for job in $(jobs -p); do wait "$job" || failed=1; done; exit "${failed:-0}"' several \
        "$PYTHON" "experiments/cifar10_fast/$script" --data "$DATA" --output "$OUT/$folder" --device "$DEVICE" \
        "${graphed[@]}" "$@"
    [ ! -d "$OUT/$folder" ] || tar -czf "$OUT/$folder.tar.gz" -C "$OUT" "$folder"
}

export CHECKED_NETWORK=resnet18
if [ -n "$TOY" ]; then
    CHECKED_NETWORK=test_resnet
    large=(--batch 2 --size 32 --rounds 2 --warmup 1)
    small=("${large[@]}")
else
    large=(--batch 256 --rounds 5 --steps 5)
    small=(--batch 64 --rounds 7 --steps 10)
fi

part checks 160 "$PYTHON" benchmarks/gpu_checks.py --device "$DEVICE" --out "$OUT"
together=(together captured)
graphed=(--execution graphed) captured=(--captured)
[ "$DEVICE" = cpu ] && together=(together) graphed=() captured=()  # graphs are a GPU's
eager=(--forms plain branched orepa)
authors=(${PEER:+--peer "$PEER"})
cost resnet50_b64 75 --models resnet50 "${eager[@]}" "${together[@]}" "${authors[@]}" "${small[@]}"
cost resnet50_b256 60 --models resnet50 "${eager[@]}" "${together[@]}" "${authors[@]}" "${large[@]}"
cost resnet18_b256 40 --models resnet18 "${eager[@]}" "${together[@]}" "${authors[@]}" "${large[@]}"
cost repvgg_a0_b256 40 --models repvgg_a0 "${eager[@]}" "${together[@]}" "${authors[@]}" "${large[@]}"
cost resnet18_b256_compiled 75 --models resnet18 --forms plain compiled "${large[@]}"
part profile 30 "$PYTHON" benchmarks/gpu_profile.py --device "$DEVICE" --top 60 --out "$OUT" \
    "${captured[@]}" ${TOY:+--batch 2 --size 32}
if [ -n "$DATA" ]; then
    if [ -f "$DATA" ]; then
        unpacked=$(mktemp -d)
        tar -xf "$DATA" -C "$unpacked"
        DATA=$(dirname "$(find "$unpacked" -maxdepth 2 -name train -type d | head -n 1)")
    fi
    shared_out experiment 530 speedrun run.py --network speedrun --seeds 50
    part table 20 "$PYTHON" experiments/cifar10_fast/table.py "$OUT/speedrun"
    if [ -n "$PARTS" ]; then  # these run only where they are named: there is no time for all
        rates=(--rates 0.4 0.8 0.2)
        start=(--start-rates plain=0.4 orepa=0.4 rep=0.4 dbb=0.4)
        shared_out forms_dbb 120 small_gpu run.py "${rates[@]}" --forms plain dbb --few --seeds 12
        shared_out anneal_dbb 400 anneal_small_gpu anneal.py "${rates[@]}" "${start[@]}" --forms dbb --seeds 4
        shared_out anneal_teacher 400 anneal_small_gpu_teacher anneal.py "${rates[@]}" "${start[@]}" --forms rep plain \
            --arms descent restarts measured0 --few-arms authors --seeds 12 --teacher medium --teacher-lr 0.4
        shared_out anneal_warmup 160 anneal_small_gpu_warmup anneal.py "${rates[@]}" "${start[@]}" --forms rep --seeds 6 \
            --epochs 6 --arms measured0-w0 measured0-w0.17 measured0-w0.33 measured0 measured0-w0.67 \
            authors-w0 authors-w0.17 authors-w0.33 authors authors-w0.67 --few-arms --grid-arms measured0 authors
    fi
fi
echo
cat "$report" "$OUT"/checks.md "$OUT"/res*.md "$OUT"/rep*.md "$OUT"/profile.md 2> "$OUT/missing.log"
exit 0
