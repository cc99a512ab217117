"""Ask a vision-language model about an image, offline, with an MSD draft.

    python examples/offline_inference.py
    python examples/offline_inference.py --image photo.jpg --question "What is this?" \\
        --target llava-hf/llava-1.5-7b-hf --draft lucylyn/MSD-LLaVA1.5-7B
    python examples/offline_inference.py --num-speculative-tokens 16 --tree-depth 5 --tree-top-k 4

Without --target it serves the small demo pair that comes with the package, and without --image it
shows one of the demo's held-out scenes. --image may be given several times.
"""

import argparse
import base64
import io
import json

from PIL import Image


def data_uri(image: Image.Image) -> str:
    """The image inside a URL, as chat messages take it."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", help="hub name or folder (default: the demo target)")
    parser.add_argument(
        "--draft", help="its MSD draft (default: the one that belongs to the target)"
    )
    parser.add_argument("--image", action="append", default=[], help="an image file; repeatable")
    parser.add_argument("--question", default="Describe the picture.")
    parser.add_argument(
        "--num-speculative-tokens", type=int, default=5, help="length of the chain, or tree nodes"
    )
    parser.add_argument("--tree-depth", type=int, help="draft trees of this depth, not chains")
    parser.add_argument("--tree-top-k", type=int, help="guesses of each node of a tree")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--engine-options",
        type=json.loads,
        default={},
        metavar="JSON",
        help="more vLLM engine arguments, such as '{\"enforce_eager\": true}'",
    )
    return parser.parse_args()


def main() -> None:
    """Run the example."""
    args = parse_args()
    target, draft = args.target, args.draft
    if target is None:
        from vllm_msd.demo.paths import demo_pair

        pair = demo_pair()
        target, draft = str(pair.target), str(pair.draft)
    if args.image:
        images = [Image.open(path) for path in args.image]
    else:
        from vllm_msd.demo.samples import held_out_samples

        images = next(one.images for one in held_out_samples() if one.kind == "caption")

    from vllm import LLM, SamplingParams

    speculative_config = {
        "method": "msd",
        "num_speculative_tokens": args.num_speculative_tokens,
    }
    if args.tree_depth is not None:
        speculative_config |= {"tree_depth": args.tree_depth, "tree_top_k": args.tree_top_k}
    if draft is not None:  # left out, the draft that belongs to the target is looked up
        speculative_config["model"] = draft
    llm = LLM(
        model=target,
        dtype=args.dtype,
        speculative_config=speculative_config,
        disable_log_stats=False,  # for the acceptance counters below
        **args.engine_options,
    )
    content = [{"type": "image_url", "image_url": {"url": data_uri(i)}} for i in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": args.question}]}]
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    (result,) = llm.chat(messages, params, use_tqdm=False)

    print(f"question: {args.question}")
    print(f"answer:   {result.outputs[0].text.strip()}")
    counters = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    verified = counters.get("vllm:spec_decode_num_drafts", 0)
    accepted = counters.get("vllm:spec_decode_num_accepted_tokens", 0)
    if verified:
        print(f"tokens per verification: {1 + accepted / verified:.2f}")


if __name__ == "__main__":
    main()
