"""Which records of an earlier run count as finished."""

from __future__ import annotations

import json
from pathlib import Path

from paretune.demo import run
from paretune.demo.methods import rows
from paretune.demo.pretrain import Recipe
from paretune.demo.world import World


def test_records_of_another_recipe_do_not_count(tmp_path: Path) -> None:
    row = rows()[2]
    record = run._record(tmp_path, 0, row)
    assert run._points(tmp_path, 0, row) is None
    stamp = run._stamp(Recipe(World(seed=0)), row)
    record.write_text(json.dumps({"stamp": stamp, "points": [{"method": "AdamW"}]}))
    assert run._points(tmp_path, 0, row) == [{"method": "AdamW"}]
    record.write_text(json.dumps({"stamp": "of another recipe", "points": []}))
    assert run._points(tmp_path, 0, row) is None
    assert run._stamp(Recipe(World(seed=0)), row) != run._stamp(Recipe(World(seed=1)), row)
    assert run._stamp(Recipe(World(seed=0)), row) != run._stamp(Recipe(World(seed=0)), rows()[3])
