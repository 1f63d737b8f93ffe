"""The merge methods: which operators each is made of, and which parameters it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Family = Literal["sum", "delta", "election"]


@dataclass(frozen=True)
class MergeMethod:
    """One merge method.

    Args:
        family: ``sum`` Σ cᵢxᵢ of the models | ``delta`` base + Σ cᵢF(τᵢ) | ``election`` base + elected sum of F(τᵢ).
        paper: where it is from.
        base: whether it needs a base model; for ``optional`` ones a base makes task vectors of the models.
        models: the least and the largest number of models (None: any), the base not counted.
        sparsify: how task vectors are sparsified.
        sphere: how the coefficients follow from inner products.
        normalize: whether weights are divided by their sum where the user does not say.
        defaults: per-model and common parameters with the values they have where nothing is given.
    """

    family: Family
    paper: str
    base: Literal["no", "required", "optional"] = "no"
    models: tuple[int, int | None] = (1, None)
    sparsify: Literal["random", "magnitude"] | None = None
    sphere: Literal["slerp", "nested_slerp", "model_stock"] | None = None
    normalize: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def per_model(self) -> tuple[str, ...]:
        """Parameters that each model has its own value of."""
        if self.sphere in ("slerp", "model_stock"):
            return ()
        return ("weight", "density") if self.sparsify else ("weight",)

    @property
    def common(self) -> tuple[str, ...]:
        """Parameters with one value for all models."""
        if self.sphere == "slerp":
            return ("t",)
        if self.sphere:
            return ("lambda",) if self.base != "no" else ()
        found = ["normalize"]
        if self.family != "sum":
            found.append("lambda")
        if self.sparsify:
            found.append("rescale")
        return tuple(found)


_TIES = "arXiv 2306.01708"
_DARE = "arXiv 2311.03099"

METHODS: Mapping[str, MergeMethod] = MappingProxyType(
    {
        "linear": MergeMethod("sum", "arXiv 2203.05482 (soups); arXiv 2309.06256 (MA)", normalize=True),
        "task_arithmetic": MergeMethod("delta", "arXiv 2212.04089", base="required"),
        "dare_linear": MergeMethod(
            "delta",
            _DARE,
            base="required",
            sparsify="random",
            defaults={"density": 0.5, "rescale": "expectation"},
        ),
        "dare_ties": MergeMethod(
            "election",
            f"{_DARE} with {_TIES}",
            base="required",
            sparsify="random",
            defaults={"density": 0.5, "rescale": "expectation"},
        ),
        "ties": MergeMethod(
            "election",
            _TIES,
            base="required",
            sparsify="magnitude",
            normalize=True,
            defaults={"density": 0.2, "rescale": "none"},
        ),
        "slerp": MergeMethod("sum", "Shoemake 1985", models=(2, 2), sphere="slerp", defaults={"t": 0.5}),
        "nuslerp": MergeMethod(
            "sum", "arXiv 2406.16768, section 3", base="optional", models=(2, None), sphere="nested_slerp"
        ),
        "model_stock": MergeMethod(
            "delta", "arXiv 2403.19522", base="required", models=(2, None), sphere="model_stock"
        ),
        "passthrough": MergeMethod("sum", "layers as they are", models=(1, 1)),
    }
)
