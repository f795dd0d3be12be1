"""continue a text with a checkpoint"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from olmo_train.commands.common import (
    add_checkpoint_arguments,
    add_template_arguments,
    check_counts,
    check_template,
    open_chat,
    open_model,
    open_tokenizer,
)

if TYPE_CHECKING:
    from olmo_train.data.tokenizer import Tokenizer
    from olmo_train.model.transformer import Transformer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="text to continue; may be repeated. Without it a new document starts"
    )
    add_template_arguments(parser, "default: as they are")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="continuations of each prompt (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=100, metavar="N", help="most tokens to add (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest tokens that reach P together")
    parser.add_argument("--seed", type=int, default=0, help="sampling seed: the same seed makes the same text (default: 0)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; EOS always ends")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once; changes no text (default: 8)")
    parser.add_argument("--json", action="store_true", help="a list of {prompt, text, tokens} instead of text")


def run(args: argparse.Namespace) -> None:
    import json

    from olmo_train.model.generate import Sampling

    _check(args)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    folder, model = open_model(args.checkpoint, args.device)
    if args.template:
        chat = open_chat(folder, args, model.config.vocab_size)
        tokenizer, encode = chat.tokenizer, lambda prompt: chat.prompt_ids([("user", prompt)])
    else:
        tokenizer = open_tokenizer(folder, args, model.config.vocab_size)
        encode = tokenizer.encode
        _note_template(folder)
    prompts = [prompt for prompt in args.prompt or [""] for _ in range(args.samples)]
    ids = [encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
    results = []
    for prompt, tokens in zip(prompts, _continue(model, tokenizer, ids, sampling, args), strict=True):
        text = tokenizer.decode(tokens[:-1] if tokens[-1:] == [tokenizer.eos_id] else tokens)
        results.append({"prompt": prompt, "text": text[: _stop_at(text, args.stop)], "tokens": tokens})
    if args.json:
        print(json.dumps(results, ensure_ascii=False, indent=1))
        return
    for i, result in enumerate(results):
        if len(results) > 1:
            print(f"{'' if i == 0 else chr(10)}--- {i + 1} of {len(results)}")
        print(("" if args.template else result["prompt"]) + result["text"])


def _note_template(folder: Path) -> None:
    """Name the template of the data to a user who asks without it: such a prompt looks like none of theirs."""
    from olmo_train.data.templates import TEMPLATES, recorded_template

    recorded = recorded_template(folder)
    if recorded and TEMPLATES[recorded["name"]].head:
        name = recorded["name"]
        print(f"note: {folder} was trained on the template {name}; --template {name} writes a prompt as there", file=sys.stderr)


def _check(args: argparse.Namespace) -> None:
    from olmo_train.errors import ConfigError

    check_template(args)
    if args.template is None and args.instruction is not None:
        raise ConfigError("--instruction", "needs --template; name the one of the data, or plain")
    check_counts(args, "samples", "max_new_tokens", "batch_size")
    if "" in args.stop:
        raise ConfigError("--stop", "is empty, and an empty text is everywhere; name the text that ends a continuation")
    if not -(2**63) <= args.seed < 2**63:
        raise ConfigError("--seed", f"must lie between -2^63 and 2^63 - 1, got {args.seed}")


def _continue(model: Transformer, tokenizer: Tokenizer, ids: list[list[int]], sampling, args) -> list[list[int]]:
    """New tokens of each prompt, which `ids` holds. Prompts of like length are run together, which costs the fewest steps."""
    from olmo_train.model.generate import generate

    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    new: list[list[int]] = [[] for _ in ids]

    def finished(tokens: list[int]) -> bool:
        return bool(args.stop) and any(stop in tokenizer.decode(tokens) for stop in args.stop)

    for start in range(0, len(ids), args.batch_size):
        rows = by_length[start : start + args.batch_size]
        seeds = [args.seed + row for row in rows]
        chosen = [ids[row] for row in rows]
        outputs = generate(model, chosen, args.max_new_tokens, sampling, seeds, tokenizer.eos_id, finished)
        for row, tokens in zip(rows, outputs, strict=True):
            new[row] = tokens
    return new


def _stop_at(text: str, stops: list[str]) -> int:
    """Where the first of the stop texts begins in `text`; its length when none is in it."""
    return min([text.find(stop) for stop in stops if stop in text], default=len(text))
