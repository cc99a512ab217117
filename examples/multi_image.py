"""Several images in one request, with text between them, and a second turn about them.

    examples/serve.sh                        (in another terminal)
    python examples/multi_image.py
    python examples/multi_image.py --image a.jpg --image b.jpg --question "What changed?"

Every image may lie anywhere in the prompt: the draft takes its visual rows from where they are.
Where that is, the model's chat template decides; LLaVA's puts a message's images before its text.
Without --image it sends two of the demo's held-out scenes. The demo target was trained on one
image at a time, so expect a loose answer from it; a larger model does this properly.
"""

import argparse
import base64
import io
import sys

from PIL import Image


def image_part(image: Image.Image) -> dict:
    """An image as a part of a chat message."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--image", action="append", default=[], help="an image file; repeatable")
    parser.add_argument("--question", default="What is in these pictures?")
    parser.add_argument("--follow-up", default="Which colours do you see?")
    parser.add_argument("--max-tokens", type=int, default=96)
    args = parser.parse_args()

    if args.image:
        images = [Image.open(path) for path in args.image]
    else:
        from vllm_msd.demo.samples import held_out_samples

        images = [one.images[0] for one in held_out_samples() if one.kind == "caption"][:2]

    from openai import APIConnectionError, OpenAI

    client = OpenAI(base_url=args.base_url, api_key="none")
    try:
        model = client.models.list().data[0].id
    except APIConnectionError:
        sys.exit(f"no server at {args.base_url}; start one with examples/serve.sh")

    content = []
    for number, image in enumerate(images, 1):
        content += [{"type": "text", "text": f"Picture {number}:"}, image_part(image)]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": args.question}]}]
    for follow_up in (args.follow_up, None):
        reply = client.chat.completions.create(
            model=model, messages=messages, max_tokens=args.max_tokens, temperature=0
        )
        answer = reply.choices[0].message.content
        print(f"{messages[-1]['content'][-1]['text']}\n  {answer.strip()}")
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        if follow_up is not None:
            messages.append({"role": "user", "content": [{"type": "text", "text": follow_up}]})


if __name__ == "__main__":
    main()
