"""``paretune average learn``: ratios by blocks of layers, learned from samples that score well."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.errors import ArgumentError

if TYPE_CHECKING:
    from paretune.averaging import Ratios

_EXAMPLES = """\
examples:
  paretune average learn --pre sft --post aligned --data best.jsonl --blocks 3 --mean 0.2 --steps 100 -o ratios.json
  paretune average learn --pre sft --post aligned --data best.jsonl --blocks layer --parametrization projection \\
      -o ratios.json
  paretune average learn --pre sft --post aligned --data best.jsonl --pivots 10,20 --penalty released --head last \\
      --embeddings 1 --norms 1 -o ratios.json        # all as released

Writes the ratios of every tensor with the history, and a picture of both curves beside it (ratios.png).
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``learn``."""
    parser = subparsers.add_parser(
        "learn",
        help="learn how much of each block of layers to give back",
        description="Learn one ratio a block of layers (adaptive model averaging) from samples that score well.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_ends(parser)
    parser.add_argument("--mean", type=float, default=0.2, help="mean of the ratios, in [0, 1] (0.2)")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="the ratios.json to write")
    add_learning(parser)
    parser.add_argument("--json", action="store_true", help="print the ratios as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)
    return parser


def add_ends(parser: argparse.ArgumentParser) -> None:
    """``--pre`` and ``--post``."""
    parser.add_argument("--pre", required=True, metavar="MODEL", help="before alignment: directory, file or hub id")
    parser.add_argument("--post", required=True, metavar="MODEL", help="the aligned model")


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Ratios of what is in no block."""
    parser.add_argument("--head", metavar="R|last", help="the output head's own ratio, or the last block's (the mean)")
    parser.add_argument("--embeddings", type=float, metavar="R", help="the embeddings' own ratio (the mean)")
    parser.add_argument("--norms", type=float, metavar="R", help="the norms' own ratio (the mean)")


def add_learning(parser: argparse.ArgumentParser) -> None:
    """What learning takes besides the end points and the mean."""
    parser.add_argument("--data", required=True, metavar="DATA", help="samples: JSON lines, Parquet, folder or hub id")
    parser.add_argument("--blocks", default="3", metavar="K|layer|module", help="equal blocks of layers (3)")
    parser.add_argument("--pivots", metavar="N,N…", help="last layer of each block but the last, instead of --blocks")
    add_parts(parser)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (100)")
    parser.add_argument("--batch-size", type=int, default=8, help="samples a step (8)")
    parser.add_argument("--micro-batch", type=int, metavar="N", help="samples at once, to save memory (all)")
    parser.add_argument("--lr", type=float, help="peak step (0.1 for sigmoid, 0.02 for projection)")
    parser.add_argument(
        "--parametrization",
        choices=("sigmoid", "projection"),
        default="sigmoid",
        help="sigmoid: as published, a ratio may exceed 1; projection: all stay in [0, 1]",
    )
    parser.add_argument("--epsilon", type=float, default=0.2, help="of the published normalisation (0.2)")
    parser.add_argument(
        "--penalty", choices=("l1", "depth", "released", "none"), default="l1", help="on leaving the mean (l1)"
    )
    parser.add_argument("--penalty-weight", type=float, default=1e-4, help="its factor (1e-4)")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a sample, at most (1024)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of the model while learning")
    parser.add_argument("--device", help="where the model runs; the accelerator where there is one")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the samples (0)")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked."""
    from paretune.averaging import learn_ratios
    from paretune.averaging.picture import save_picture

    out = Path(arguments.out)
    if out.is_dir() or out.suffix != ".json":
        raise ArgumentError("out", arguments.out, "name a file that ends in .json")
    bar = Bar(arguments.quiet, "learn")
    try:
        ratios = learn_ratios(**learning(arguments), mean=arguments.mean, progress=bar)
    finally:
        bar.close()
    ratios.save(out)
    picture = out.with_suffix(".png")
    save_picture(ratios, picture)
    if arguments.json:
        print(json.dumps(ratios.to_dict()))
        return 0
    print("\n".join(statement(ratios)))
    print(out, picture, sep="\n")
    return 0


def learning(arguments: argparse.Namespace) -> dict[str, Any]:
    """`learn_ratios`'s arguments, but for the mean."""
    import torch

    if arguments.quiet or not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
    same: tuple[str, ...] = (
        "pre",
        "post",
        "steps",
        "batch_size",
        "micro_batch",
        "lr",
        "parametrization",
        "epsilon",
        "penalty",
    )
    same += ("penalty_weight", "embeddings", "norms", "max_length", "device", "seed")
    return {name: getattr(arguments, name) for name in same} | {
        "blocks": _blocks(arguments.blocks),
        "pivots": whole_numbers("pivots", arguments.pivots),
        "head": head_of(arguments.head),
        "dtype": None if arguments.dtype is None else getattr(torch, arguments.dtype),
        "data": samples(arguments.data),  # last: a hub is asked for it
    }


def samples(data: str) -> Any:
    """A file of JSON lines by its name; any other data set as rows."""
    if data.endswith(".jsonl"):
        return data
    from paretune.training.data import load_splits, take_split

    return take_split(load_splits(data, argument="data"), "train", name=data, argument="data")


def statement(ratios: Ratios) -> list[str]:
    """Every tensor's ratio, in few lines."""
    from collections import Counter

    from paretune.averaging.picture import label

    rows = [(label(block), block.ratio) for block in ratios.blocks]
    rows += [(part, getattr(ratios, part)) for part in ("head", "embeddings", "norms")]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {alpha:.4f}" for name, alpha in rows if alpha is not None]
    lines += [f"{head} is tied to {twin}: {ratios.tensors[twin]:.4f}" for head, twin in ratios.tied.items()]
    counts = Counter(round(alpha, 4) for alpha in ratios.tensors.values())
    shown = ", ".join(f"{count} at {alpha:.4f}" for alpha, count in sorted(counts.items()))
    return [*lines, f"{len(ratios.tensors)} tensors: {shown}", f"mean {ratios.mean:.4f}"]


def head_of(text: str | None) -> float | str | None:
    """A number, ``last``, or nothing."""
    if text is None or text == "last":
        return text
    try:
        return float(text)
    except ValueError:
        raise ArgumentError("head", text, "give a number, or 'last'") from None


def whole_numbers(argument: str, text: str | None) -> list[int] | None:
    """Whole numbers separated by commas."""
    if text is None:
        return None
    try:
        return [int(each) for each in text.split(",")]
    except ValueError:
        raise ArgumentError(argument, text, "give whole numbers separated by commas") from None


def _blocks(text: str) -> Any:
    if not text.isdigit() and text not in ("layer", "module"):
        raise ArgumentError("blocks", text, "give a number of blocks, 'layer' or 'module'")
    return int(text) if text.isdigit() else text


class Bar:
    """A progress bar on stderr, made when there is something to tell."""

    def __init__(self, quiet: bool, what: str) -> None:
        self._quiet, self._what = quiet, what
        self._bar: Any = None

    def __call__(self, done: int, of: int, loss: float | None = None) -> None:
        if self._quiet:
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=of, desc=self._what, file=sys.stderr)
        self._bar.update(done - self._bar.n)
        if loss is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)

    def close(self) -> None:
        """End the bar's line."""
        if self._bar is not None:
            self._bar.close()
