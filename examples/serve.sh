#!/usr/bin/env bash
# Serve a vision-language model with its MSD draft behind vLLM's OpenAI-compatible API.
#
#   examples/serve.sh                                  the demo pair, on port 8000
#   examples/serve.sh --port 8123 --max-num-seqs 8     the demo pair, with more `vllm serve` options
#   TARGET=llava-hf/llava-1.5-7b-hf DRAFT=lucylyn/MSD-LLaVA1.5-7B examples/serve.sh
#   TARGET=llava-hf/llava-1.5-7b-hf examples/serve.sh  the draft that belongs to the target
#   TOKENS=16 DEPTH=5 TOP_K=4 examples/serve.sh        trees of 16 nodes instead of chains of 5
#
# Environment: TARGET, DRAFT (hub names or folders), TOKENS (drafted per verification, 5), and for
# trees DEPTH and TOP_K.
# Then: python examples/openai_client.py
set -euo pipefail

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi

tokens=${TOKENS:-5}
options=()
if [[ -z "${TARGET:-}" ]]; then
    paths=$(vllm-msd demo paths)
    field() { python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1" <<<"$paths"; }
    TARGET=$(field target)
    DRAFT=$(field draft)
    # A small model: little cache, nothing to compile. fp32, so that answers are the same with and
    # without a draft to the last token; in bf16 near ties may come out either way.
    options+=(--served-model-name msd-demo --dtype float32 --enforce-eager)
    options+=(--kv-cache-memory-bytes 268435456)
fi
# On a CPU vLLM leaves one core to other work; a small machine needs all of them.
export VLLM_CPU_NUM_OF_RESERVED_CPU=${VLLM_CPU_NUM_OF_RESERVED_CPU:-0}

config="{\"method\": \"msd\", \"num_speculative_tokens\": $tokens"
if [[ -n "${DEPTH:-}" ]]; then
    config+=", \"tree_depth\": $DEPTH, \"tree_top_k\": ${TOP_K:-4}"
fi
if [[ -n "${DRAFT:-}" ]]; then
    config+=", \"model\": \"$DRAFT\""
fi
exec vllm serve "$TARGET" "${options[@]}" --speculative-config "$config}" "$@"
