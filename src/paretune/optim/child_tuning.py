"""ChildTuning: train a sub-network, drawn afresh each step (F) or fixed by Fisher information (D)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim import Optimizer

from ..errors import ArgumentError, StateError, examples
from ..operators import bernoulli_mask, mask_key
from ..task_vector import plain_name
from .fisher import Fisher, child_masks
from .wrapper import OptimizerWrapper, require_dense, shard_like


class ChildTuning(OptimizerWrapper):
    """Any optimizer, fed only the gradients of a child network.

    - **F** (task-free): at each step g ← g ⊙ M / p with a fresh M ~ Bernoulli(p), so that E[g] stays.
    - **D** (task-driven): at each step g ← g ⊙ M with a fixed M: the p·N of all N parameters with the largest
      Fisher information. Not divided by p: the paper scales only F.

    D ranks all parameters *together*, as the paper's code does: layers then get children of unequal density.
    (That code ranks and masks only parameters with "layer" in their name and trains the others freely.)
    Parameters whose information is 0 are never in the child (unless p = 1), and ties at the limit are spread
    evenly over the tied parameters.

    Only gradients are masked. Weight decay reaches all parameters, as in the paper's code (set it to 0 to hold
    D's complement exactly), and an inner optimizer with momentum keeps moving what an earlier mask of F let
    through. F's masks are a function of (seed, step, parameter name): nothing is drawn from torch's generators
    and nothing is stored but the step, ``child_calls``, in ``param_groups``. D's mask is made in the first step,
    is saved and loaded with the optimizer's state as ``child_mask`` (bool, 1 byte a parameter).
    ``.grad`` is as the user left it after the step, which costs one more set of gradients during it.

    Args:
        inner_optimizer: any torch optimizer built from ``model.named_parameters()``, but none with a closure of
            its own (LBFGS).
        mode: ``"F"`` or ``"D"``.
        density: p, the fraction of parameters in the child, 0 < p ≤ 1.
        seed: of F's masks.
        fisher: D only: ``{name: tensor}`` for every parameter, as from ``fisher_information``, or a function
            that returns it, called in the first step unless a mask was loaded by then.

    Raises:
        ArgumentError: an argument out of range; ``fisher`` missing with D, given with F, or not matching the
            parameters; parameters without names.

    Reference:
        arXiv 2109.05687, section 2.2 (F), 2.3 (D) and released code; a baseline of arXiv 2405.17931.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 1, bias=False)
        >>> inner = torch.optim.SGD(model.named_parameters(), lr=1.0)
        >>> fisher = {"weight": torch.tensor([[4.0, 1.0, 3.0, 2.0]])}
        >>> optimizer = ChildTuning(inner, mode="D", density=0.5, fisher=fisher)
        >>> before = model.weight.detach().clone()
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> (before != model.weight).tolist()
        [[True, False, True, False]]
    """

    own_state: ClassVar[frozenset[str]] = frozenset({"child_mask"})

    def __init__(
        self,
        inner_optimizer: Optimizer,
        mode: Literal["F", "D"] = "F",
        density: float = 0.3,
        seed: int = 0,
        fisher: Fisher | Callable[[], Fisher] | None = None,
    ) -> None:
        super().__init__(inner_optimizer)
        if mode not in ("F", "D"):
            raise ArgumentError(
                "mode", mode, "give 'F' (fresh random masks) or 'D' (a fixed mask by Fisher information)"
            )
        if not 0 < density <= 1:
            raise ArgumentError("density", density, "must be in (0, 1]: the fraction of parameters in the child")
        if mode == "F" and fisher is not None:
            raise ArgumentError("fisher", type(fisher).__name__, "mode 'F' needs none; leave it out or give mode='D'")
        if mode == "D" and fisher is None:
            mend = "mode 'D' needs it; give fisher_information(model, batches, loss) or a function returning that"
            raise ArgumentError("fisher", None, mend)
        self.mode = mode
        self.density = density
        self.seed = seed
        self._fisher = fisher
        if fisher is not None and not callable(fisher):
            self._fisher = self._checked(fisher)
        self._set_defaults()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; F draws masks for it from the present step on, D refuses it.

        Args:
            param_group: as torch takes it, with (name, parameter) pairs.

        Raises:
            ArgumentError: with D, whose child is chosen among the parameters of the construction.
        """
        if self.mode == "D":
            mend = "mode 'D' fixes its child at the start; build the optimizer with all parameters"
            raise ArgumentError("param_group", sorted(param_group), mend)
        super().add_param_group(param_group)
        self._set_defaults()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave: D's mask and F's step come with it.

        Args:
            state_dict: of this wrapper, or of the inner optimizer alone (a child is then begun at its step 0).

        Raises:
            StateError: the state is of other parameters, or of another mode, density or seed.
        """
        saved = {group.get("child_tuning") for group in state_dict["param_groups"]} - {None}
        if wrong := saved - {self._setting}:
            raise StateError(
                f"the saved optimizer state is of ChildTuning {examples(map(str, wrong))}, this one is "
                f"{self._setting}: build it with the same arguments"
            )
        super().load_state_dict(state_dict)
        self._set_defaults()

    @property
    def _setting(self) -> str:
        seed = f" seed={self.seed}" if self.mode == "F" else ""
        return f"mode={self.mode} density={self.density}{seed}"

    def _set_defaults(self) -> None:
        calls = max(group.get("child_calls", 0) for group in self.param_groups)
        for group in self.param_groups:
            group.setdefault("child_calls", calls)
            group["child_tuning"] = self._setting

    def _step(self) -> None:
        if self._initialising():
            self.inner.step()
            self._make_masks()
            return
        self._make_masks()
        raw: list[tuple[Tensor, Tensor]] = []
        try:
            if self.density < 1:
                for group, pairs in self.named_groups():
                    for name, p in pairs:
                        if p.grad is not None:
                            require_dense(name, p.grad)
                            raw.append((p, p.grad))
                            p.grad = self._child_gradient(name, p, p.grad, group["child_calls"])
            self.inner.step()
        finally:
            for p, gradient in raw:
                p.grad = gradient
        for group in self.param_groups:
            group["child_calls"] += 1

    def _child_gradient(self, name: str, p: Tensor, gradient: Tensor, step: int) -> Tensor:
        # Multiplied, not selected: a NaN outside the child still shows, as it would without this wrapper.
        if self.mode == "D":
            return gradient * self.own[p]["child_mask"]
        key = mask_key(self.seed, step, "gradient", name)
        mask = bernoulli_mask(key, p.numel(), self.density, device=p.device).view(p.shape)
        return (gradient * shard_like(mask, gradient)).div_(self.density)

    def _make_masks(self) -> None:
        """D: put the masks into the state, unless they were loaded."""
        if self.mode == "F" or self._fisher is None:
            return
        parameters = {name: p for _, pairs in self.named_groups() for name, p in pairs}
        if not all(p in self.own for p in parameters.values()):
            fisher = self._checked(self._fisher()) if callable(self._fisher) else self._fisher
            for name, mask in child_masks({name: fisher[name] for name in parameters}, self.density).items():
                p = parameters[name]
                self.own[p] = {"child_mask": shard_like(mask, p)}
        self._fisher = None

    def _checked(self, fisher: Fisher) -> dict[str, Tensor]:
        """The information of our parameters by plain name, once it fits them."""
        given = {plain_name(name): value for name, value in fisher.items()}
        parameters = {name: p for _, pairs in self.named_groups() for name, p in pairs}
        if missing := parameters.keys() - given.keys():
            mend = "these parameters have no Fisher information; compute it on the model that is trained"
            raise ArgumentError("fisher", examples(missing), mend)
        wrong = [
            f"{name} {tuple(given[name].shape)} for {tuple(p.shape)}"
            for name, p in parameters.items()
            if given[name].shape != p.shape
        ]
        if wrong:
            raise ArgumentError("fisher", examples(wrong), "other shapes; compute it on the model that is trained")
        return {name: given[name] for name in parameters}
