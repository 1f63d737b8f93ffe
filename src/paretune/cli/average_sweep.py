"""``paretune average sweep``: uniform and adaptive averages over mean ratios."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.cli.average_apply import carry_out_average, plan_average
from paretune.cli.average_learn import Bar, add_ends, add_learning, learning
from paretune.errors import ArgumentError

if TYPE_CHECKING:
    from paretune.averaging import Ratios

_EXAMPLES = """\
examples:
  paretune average sweep --pre sft --post aligned --data best.jsonl --means 0:1:0.1 -o sweep
  paretune average sweep --pre sft --post aligned --data best.jsonl --means 0.1,0.2,0.3 --ratios-only -o sweep

For each mean ratio: one ratio for everything (uniform), and one a block, learned (adaptive). Means of 0 and 1 leave
nothing to learn. OUT holds ratios/ (a file and a picture each), models/ (a directory each, written in one read) and
sweep.json. Both curves for the front:
  paretune measure sweep/models/* --family adaptive --reference sft --suite … --prompts … -o points.jsonl

An interrupted sweep goes on when the same command is given again.
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``sweep``."""
    parser = subparsers.add_parser(
        "sweep",
        help="uniform and adaptive averages over mean ratios, for the front",
        description="Average with one ratio and with learned ones over a range of means: both curves for the front.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_ends(parser)
    parser.add_argument("--means", default="0:1:0.1", metavar="FIRST:LAST:STEP", help="or R,R… (0:1:0.1)")
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="the directory to write")
    parser.add_argument("--ratios-only", action="store_true", help="write no models")
    parser.add_argument(
        "--scored-rows", type=int, default=128, metavar="N", help="samples that each point's NLL is taken on (128)"
    )
    add_learning(parser)
    parser.add_argument("--workers", type=int, help="threads that write models; never changes the result")
    parser.add_argument("--json", action="store_true", help="print sweep.json")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked."""
    from paretune.atomic import write_text

    means = _means(arguments.means)
    if arguments.scored_rows < 1:
        raise ArgumentError("scored-rows", arguments.scored_rows, "give at least 1")
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise ArgumentError("out", arguments.out, "is a file: name a directory")
    _claim(out, arguments)
    points = _points(arguments, means, out / "ratios")
    labels = [name for name, _, _ in points]
    if not arguments.ratios_only and not all((out / "models" / name / "config.json").exists() for name in labels):
        plan = plan_average(arguments.pre, arguments.post, [ratios for _, ratios, _ in points], labels)
        plan.check()
        carry_out_average(plan, str(out / "models"), arguments.workers, arguments.quiet)
    if not arguments.ratios_only:
        for name, ratios, _ in points:
            ratios.save(out / "models" / name / "ratios.json")
    content = {
        "pre": arguments.pre,
        "post": arguments.post,
        "points": [
            {
                "name": name,
                "method": "MA" if name.startswith("uniform") else "AMA",
                "family": "adaptive",
                "hyperparameters": {"mean": ratios.mean, "ratios": list(ratios.ratios)},
                "nll": loss,
                "ratios": str(out / "ratios" / f"{name}.json"),
                "model": None if arguments.ratios_only else str(out / "models" / name),
            }
            for name, ratios, loss in points
        ],
    }
    write_text(out / "sweep.json", json.dumps(content, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(content))
        return 0
    print(f"{'mean':>6}  {'NLL':>8}  ratios (weight of pre)")
    for name, ratios, loss in points:
        shown = ", ".join(f"{alpha:.3f}" for alpha in ratios.ratios)
        print(f"{ratios.mean:6.3g}  {loss:8.4f}  {name.split('-')[0]}: {shown}")
    print(out / "sweep.json")
    return 0


def _points(arguments: argparse.Namespace, means: list[float], folder: Path) -> list[tuple[str, Ratios, float]]:
    """(name, ratios, NLL of the samples) of every point; those that are there are not learned again."""
    from paretune.averaging import Ratios, learn_ratios
    from paretune.averaging.dialled import set_model
    from paretune.averaging.ends import Ends
    from paretune.averaging.learn import load_model, load_samples
    from paretune.averaging.picture import save_picture
    from paretune.averaging.samples import mean_nll

    options = learning(arguments)
    ends = Ends(arguments.pre, arguments.post)
    parts = {name: options[name] for name in ("head", "embeddings", "norms")}
    samples = load_samples(options["data"], arguments.post, max_length=options["max_length"])[: arguments.scored_rows]
    model = load_model(arguments.post, options["dtype"], options["device"]).eval()
    found: list[tuple[str, Ratios, float]] = []
    for mean in means:
        uniform = Ratios.by_hand(ends.shapes, ratios=[mean], tied=ends.tied, **parts)
        made = {f"uniform-{mean:g}": uniform}
        uniform.save(folder / f"uniform-{mean:g}.json")
        if 0 < mean < 1:
            name = f"adaptive-{mean:g}"
            file = folder / f"{name}.json"
            if not file.exists():
                bar = Bar(arguments.quiet, f"mean {mean:g}")
                try:
                    learned = learn_ratios(**options, mean=mean, model=model, progress=bar)
                finally:
                    bar.close()
                save_picture(learned, folder / f"{name}.png")
                learned.save(file)
            made[name] = Ratios.load(file)
        for name, ratios in made.items():
            set_model(model, ends, ratios.tensors)
            found.append((name, ratios, mean_nll(model, samples, arguments.batch_size)))
    return found


def _claim(out: Path, arguments: argparse.Namespace) -> None:
    """Say in the directory what is swept; another sweep's results are not continued."""
    from paretune.atomic import write_text

    free = (
        "out",
        "workers",
        "json",
        "quiet",
        "run",
        "command",
        "average_command",
        "ratios_only",
        "scored_rows",
    )
    settings = {name: value for name, value in vars(arguments).items() if name not in free}
    file = out / "arguments.json"
    if file.exists():
        if json.loads(file.read_text()) != settings:
            raise ArgumentError("out", arguments.out, "holds a sweep with other arguments: name another directory")
        return
    if out.is_dir() and any(out.iterdir()):
        raise ArgumentError("out", arguments.out, "is not empty: name a new directory")
    write_text(file, json.dumps(settings, indent=1) + "\n")


def _means(text: str) -> list[float]:
    mend = "write FIRST:LAST:STEP or R,R…, in [0, 1]"
    try:
        if ":" in text:
            first, last, step = (float(each) for each in text.split(":"))
            if not step > 0:
                raise ArgumentError("means", text, mend)
            means = [round(first + i * step, 10) for i in range(int((last - first) / step + 1e-6) + 1)]
        else:
            means = [float(each) for each in text.split(",")]
    except (ValueError, OverflowError):
        raise ArgumentError("means", text, mend) from None
    if not means or len(set(means)) < len(means) or not all(0 <= mean <= 1 for mean in means):
        raise ArgumentError("means", text, mend)
    return means
