"""Run by mergekit's own python: merge several recipes in one process. Arguments: RECIPE OUT RECIPE OUT …"""

import sys


def main() -> None:
    import torch
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    torch.set_num_threads(1)
    pairs = sys.argv[1:]
    for recipe, out in zip(pairs[::2], pairs[1::2], strict=True):
        with open(recipe, encoding="utf-8") as stream:
            configuration = MergeConfiguration.model_validate(yaml.safe_load(stream))
        options = MergeOptions(copy_tokenizer=False, allow_crimes=False, quiet=True)
        run_merge(configuration, out_path=out, options=options)


if __name__ == "__main__":
    main()
