"""The published methods, as pairs of a sparsifier and a consensus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .consensus import Consensus, SignElection, WeightedSum
from .sparsify import Magnitude, Random, Sparsify


@dataclass(frozen=True)
class Method:
    """One published method.

    Args:
        sparsify: ``sparsify(density=…, rescale=…)`` makes its sparsifier; None keeps everything.
        consensus: its consensus.
        rescale: its rescale where the paper has one.
        density: the density the paper used or recommends; 1 where it does not sparsify.
        paper: arXiv id and place.
    """

    sparsify: Callable[..., Sparsify] | None
    consensus: Consensus
    rescale: str
    density: float
    paper: str

    def sparsifier(self, density: float | None = None, rescale: str | None = None) -> Sparsify:
        """The sparsifier with the given or the published settings.

        Example:
            >>> METHODS["ondare"].sparsifier()
            Random(density=0.0005, rescale='none')
        """
        make = Random if self.sparsify is None else self.sparsify
        return make(
            density=self.density if density is None else density, rescale=self.rescale if rescale is None else rescale
        )


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        # online: applied to the update and the task vector of every step
        "ondare": Method(Random, WeightedSum(), "none", 5e-4, "2405.17931, Eq. 3"),
        "ondare-released": Method(Random, WeightedSum(), "expectation", 5e-4, "released code of 2405.17931"),
        "onties": Method(Magnitude, SignElection(weighted=True), "none", 0.05, "2405.17931, Eq. 4-7"),
        "onties-released": Method(Magnitude, SignElection(weighted=False), "none", 0.05, "released code of 2405.17931"),
        # offline: applied once, to two task vectors
        "linear": Method(None, WeightedSum(), "none", 1.0, "2309.06256, section 4 (MA)"),
        "dare_linear": Method(Random, WeightedSum(), "expectation", 0.5, "2311.03099"),
        "dare_ties": Method(Random, SignElection(weighted=True), "expectation", 0.5, "2311.03099 with 2306.01708"),
        "ties": Method(Magnitude, SignElection(weighted=True), "none", 0.2, "2306.01708; 2405.17931, section 3"),
    }
)
