#!/usr/bin/env bash
# Serve a vision-language model with its MSD draft behind vLLM's OpenAI-compatible API.
#
#   examples/serve.sh                                  the demo pair, on port 8000
#   examples/serve.sh --port 8123 --max-num-seqs 8     the demo pair, with more `vllm serve` options
#   TARGET=llava-hf/llava-1.5-7b-hf DRAFT=lucylyn/MSD-LLaVA1.5-7B examples/serve.sh
#   TARGET=llava-hf/llava-1.5-7b-hf examples/serve.sh  the draft that belongs to the target
#   TOKENS=5 examples/serve.sh                         chains of 5, whatever pays
#   TOKENS=16 DEPTH=5 TOP_K=4 examples/serve.sh        trees of 16 nodes
#   MSD=0 examples/serve.sh                            the target alone, to compare with
#
# Environment: TARGET, DRAFT (hub names or folders), TOKENS (drafted per verification; without it what
# pays), and for trees DEPTH and TOP_K.
# Then: python examples/openai_client.py
set -euo pipefail

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 0
fi

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
# What a CPU needs to be used fully: preloaded libraries, and no idle core on a small machine.
if [[ ! -e /dev/nvidiactl ]]; then
    eval "$(vllm-msd env)"
fi

if [[ "${MSD:-1}" == 0 ]]; then
    exec vllm serve "$TARGET" "${options[@]}" "$@"
fi
config="{\"method\": \"msd\""
if [[ -n "${TOKENS:-}" ]]; then
    config+=", \"num_speculative_tokens\": $TOKENS"
fi
if [[ -n "${DEPTH:-}" ]]; then
    config+=", \"tree_depth\": $DEPTH, \"tree_top_k\": ${TOP_K:-4}"
fi
if [[ -n "${DRAFT:-}" ]]; then
    config+=", \"model\": \"$DRAFT\""
fi
exec vllm serve "$TARGET" "${options[@]}" --speculative-config "$config}" "$@"
