"""The flags of every command that has a model or a server answer, and what they name."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_answering(parser: argparse.ArgumentParser, *, answer: str, max_new_tokens: int, temperature: float) -> None:
    """Add flags for who answers and how.

    Args:
        parser: gets them; its ``model`` names who answers.
        answer: what an answer is called in the help.
        max_new_tokens: the default.
        temperature: the default; 0 is greedy.
    """
    add = parser.add_argument
    add("--endpoint", metavar="URL", help="an OpenAI-compatible server, as http://localhost:8000/v1")
    add("--api-key-env", default="OPENAI_API_KEY", metavar="NAME", help="variable with the server's key")
    add("--concurrency", type=int, default=8, help="requests at a time (8)")
    add("--timeout", type=float, default=60.0, help="seconds for one request (60)")
    add("--retries", type=int, default=5, help="further attempts at a request (5)")
    add("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="of the model")
    add("--device", help="where the model runs; the accelerator where there is one")
    add("--raw", action="store_true", help="continue text as it stands, without the chat template")
    add("--limit", type=int, help="only the first so many prompts")
    add("--max-new-tokens", type=int, default=max_new_tokens, help=f"the longest {answer} ({max_new_tokens})")
    add("--temperature", type=float, default=temperature, help=f"of the sampling, 0 for greedy ({temperature:g})")
    add("--top-p", type=float, default=1.0, help="sample from the smallest set of this probability (1)")
    add("--top-k", type=int, default=0, help="sample from the k likeliest tokens (0: all)")
    add("--stop", action="append", default=[], metavar="TEXT", help="text that ends one; repeat it")
    add("--seed", type=int, default=0, help="of the sampling (0)")
    add("--batch-size", type=int, default=8, help="prompts at once; never changes the draws (8)")


def open_source(arguments: argparse.Namespace) -> tuple[Any, Any, bool]:
    """What answers, its tokenizer (None for a server), and whether prompts are made conversations.

    Args:
        arguments: of a parser with the flags above and ``model`` and ``quiet``.
    """
    from paretune.generation import Endpoint, load

    if arguments.endpoint is not None:
        endpoint = Endpoint(
            arguments.endpoint,
            arguments.model,
            api_key_env=arguments.api_key_env,
            concurrency=arguments.concurrency,
            timeout=arguments.timeout,
            retries=arguments.retries,
        )
        return endpoint, None, not arguments.raw
    if arguments.quiet or not sys.stderr.isatty():
        import transformers

        transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load(arguments.model, dtype=arguments.dtype, device=arguments.device)
    return model, tokenizer, not arguments.raw and bool(tokenizer.chat_template)
