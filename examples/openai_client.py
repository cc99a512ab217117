"""Send an image to a running server with the OpenAI client, and print the answer as it comes.

    examples/serve.sh                        (in another terminal)
    python examples/openai_client.py
    python examples/openai_client.py --image photo.jpg --question "What is this?"

Without --image it sends one of the demo's held-out scenes. The server decides about MSD: a
client does not see it, other than by the speed.
"""

import argparse
import base64
import mimetypes
import sys
from pathlib import Path


def image_url(path: str | None) -> str:
    """A data URL with the file, or with a demo scene when there is none."""
    if path is not None:
        kind = mimetypes.guess_type(path)[0] or "image/png"
        return f"data:{kind};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
    import io

    from vllm_msd.demo.samples import held_out_samples

    buffer = io.BytesIO()
    scene = next(one for one in held_out_samples() if one.kind == "caption")
    scene.images[0].save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--image", help="an image file")
    parser.add_argument("--question", default="Describe the picture.")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    args = parser.parse_args()

    from openai import APIConnectionError, OpenAI

    client = OpenAI(base_url=args.base_url, api_key="none")
    try:
        model = client.models.list().data[0].id
    except APIConnectionError:
        sys.exit(f"no server at {args.base_url}; start one with examples/serve.sh")
    stream = client.chat.completions.create(
        model=model,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": image_url(args.image)}},
                    {"type": "text", "text": args.question},
                ],
            }
        ],
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        stream=True,
    )
    print(f"{model}: ", end="")
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
