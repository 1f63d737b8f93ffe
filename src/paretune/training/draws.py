"""Which rows a micro-batch holds: an endless, reshuffled pass over a data set, as a function of its number."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from paretune.training.ranks import rank, world_size


@dataclass
class Draws:
    """The micro-batches of one objective, numbered from 0; nothing but the number taken so far needs to be saved.

    All ranks together go through the data set in an order of the seed's, then through it in another. Rank r takes
    the r-th part of every micro-batch, so two ranks of batch 2 see what one of batch 4 sees.

    Args:
        name: the objective's; two objectives on the same data have different orders.
        rows: in the data set.
        batch_size: rows in a micro-batch on each rank.
        seed: of the orders.
        taken: micro-batches that are used up.

    Example:
        >>> draws = Draws("sft", rows=3, batch_size=2, seed=0)
        >>> sorted(draws.at(0) + draws.at(1)[:1])
        [0, 1, 2]
    """

    name: str
    rows: int
    batch_size: int
    seed: int
    taken: int = 0
    _orders: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def at(self, number: int) -> list[int]:
        """The rows of this rank in micro-batch ``number``."""
        start = (number * world_size() + rank()) * self.batch_size
        places = range(start, start + self.batch_size)
        return [int(self._order(place // self.rows)[place % self.rows]) for place in places]

    def steps(self, micro_batches: int) -> int:
        """Optimizer steps of so many micro-batches that one pass over the data takes."""
        return -(-self.rows // (self.batch_size * world_size() * micro_batches))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            for old in [known for known in self._orders if known < epoch - 1]:
                del self._orders[old]
            key = hashlib.blake2b(f"{self.seed} {self.name} {epoch}".encode(), digest_size=8).digest()
            self._orders[epoch] = np.random.default_rng(int.from_bytes(key, "big")).permutation(self.rows)
        return self._orders[epoch]
