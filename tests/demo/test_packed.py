"""Sequences side by side: each is computed as if it were alone."""

from __future__ import annotations

import torch

from paretune.demo.packed import Packed
from paretune.demo.pretrain import Shape, build_model
from paretune.demo.rehearse import Replay
from paretune.training.distill import completion_logps, full_kl


def test_neighbours_are_not_seen() -> None:
    model = build_model(Shape(), seed=0)
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 3, 14, 1, 7, 7, 2]
    ids = torch.randint(5, 200, (7, 14), generator=generator)
    packed = Packed.of([4, 0, 2, 6, 1], [lengths[row] for row in (4, 0, 2, 6, 1)])
    assert packed.positions.shape[1] == 28
    with torch.no_grad():
        found = model(input_ids=packed.take(ids), position_ids=packed.positions, attention_mask=packed.mask).logits
    found = found.flatten(0, 1)[packed.flat]
    for row in packed.order:
        alone = model(ids[row : row + 1, : lengths[row]]).logits[0]
        assert torch.allclose(found[packed.source[0] == row], alone, atol=1e-5)


def test_the_replay_loss_is_that_of_a_padded_batch() -> None:
    model, teacher = build_model(Shape(), seed=0), build_model(Shape(), seed=1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (40, 12), generator=generator)
    begin = torch.randint(1, 5, (40, 1), generator=generator)
    end = begin + torch.randint(1, 8, (40, 1), generator=generator)
    completion = (torch.arange(12) >= begin) & (torch.arange(12) < end)
    with torch.no_grad():
        kept = completion_logps(teacher, ids, completion)
    counts = completion.sum(1).tolist()
    for reference in (kept, None):
        replay = Replay(ids, completion, reference)
        expected = []
        for row in _rows(replay):
            own = completion_logps(model, ids[row : row + 1], completion[row : row + 1])
            if reference is None:
                expected.append(-own.gather(1, ids[row][completion[row]][:, None])[:, 0])
            else:
                first = sum(counts[:row])
                expected.append(full_kl(kept[first : first + counts[row]], own, "forward"))
        assert torch.allclose(replay.loss(model, 3), torch.cat(expected).mean(), atol=1e-5)


def _rows(replay: Replay) -> list[int]:
    from random import Random

    return Random(f"{replay.seed}/rows 3").sample(range(40), 32)
