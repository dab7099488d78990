"""Give a loaded model a FlashHead at run time and answer a prompt.

    python examples/replace_head.py mlx-community/Qwen3-0.6B-4bit "Why is the sky blue?"

Nothing is written to disk; the model is calibrated anew at each start, so convert it
once (mlx_flashhead.convert) if you use it often.
"""

import sys

import mlx_lm

from mlx_flashhead import replace_head


def show_progress(stage: str, share: float) -> None:
    """Overwrite one line of the terminal."""
    print(f"\r{stage}: {share:.0%}", end="", file=sys.stderr)


def main() -> int:
    """Load the model named first, answer the prompt named second."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    name, prompt = sys.argv[1:]
    model, tokenizer = mlx_lm.load(name)
    replace_head(model, tokenizer, progress=show_progress)
    print(file=sys.stderr)
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    for response in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=200):
        print(response.text, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
