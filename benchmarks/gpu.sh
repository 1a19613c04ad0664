#!/bin/sh
# What one large NVIDIA GPU (80 GB or more) is to measure, each part in so many minutes, saved as it goes:
#
#   sh benchmarks/gpu.sh out                    # 7b (6 minutes), 8b (6), precision (3), study (15)
#   MINUTES=5 sh benchmarks/gpu.sh out study    # one part, shorter
#
# cuBLAS computes all products: Triton's autotuner costs 5 to 20 seconds a program, of which there are dozens, and does
# not take all of JAX's dot algorithms. What does not fit is left out, and said; the others are there whatever fails.
out=${1:?folder for the results}
export XLA_FLAGS="--xla_gpu_enable_triton_gemm=false $XLA_FLAGS"
cd "$(dirname "$0")/.." || exit

part() {
    script=$1 minutes=${MINUTES:-$2}
    shift 2
    echo "$name, $minutes minutes at most"
    python3 "benchmarks/$script.py" "$@" --minutes "$minutes" --out "$out/gpu_$name.json"
}

for name in ${2:-7b 8b precision study}; do
    case $name in
        7b | 8b) part gpu_7b 6 --shapes "$name" --seconds 5 --sample 4 ;;
        precision) part precision 3 --scenes 0 --stages 123 --runs 1 --prompts 50 ;;
        study) part gpu_study 15 --shape 7b --once ;;
        *) echo "unknown part $name; expected 7b, 8b, precision or study" ;;
    esac
done
