"""What every optimizer around an optimizer shares: groups and state, names, closures, saving and loading."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import ArgumentError, StateError, examples
from ..task_vector import plain_name
from .parts import any_nonzero
from .weights import loaded
from .weights import saved as saved_state


def unique_names(names: Iterable[str], argument: str) -> list[str]:
    """``plain_name`` of each, refused where two parameters end up with one name.

    Args:
        names: as the model gives them.
        argument: what to call them in the error.

    Returns:
        The plain names, in order.

    Raises:
        ArgumentError: two names are equal once the wrappers' segments are gone.

    Example:
        >>> unique_names(["module.a", "module.b"], "named_params")
        ['a', 'b']
    """
    plain = [plain_name(name) for name in names]
    if len(set(plain)) < len(plain):
        seen: set[str] = set()
        twice = {name for name in plain if name in seen or seen.add(name)}  # type: ignore[func-returns-value]
        raise ArgumentError(argument, examples(twice), "these names occur twice; give each parameter once")
    return plain


def require_dense(name: str, gradient: Tensor) -> None:
    """Refuse a sparse gradient by its parameter's name.

    Args:
        name: the parameter's name.
        gradient: its gradient.

    Raises:
        ArgumentError: the gradient's layout is not strided.

    Example:
        >>> require_dense("embedding.weight", torch.zeros(2))
    """
    if gradient.layout != torch.strided:
        mend = "sparse gradients are not supported; build the embedding with sparse=False"
        raise ArgumentError(f"{name}.grad", gradient.layout, mend)


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor laid out as a DTensor is; for a plain ``like``, the value on its device.

    Args:
        value: a plain tensor that every rank has whole, or a DTensor, which is taken as it is.
        like: the parameter.

    Returns:
        The value, sharded as the parameter is; nothing is sent between ranks.

    Example:
        >>> shard_like(torch.ones(1), torch.zeros(1))
        tensor([1.])
    """
    if not hasattr(like, "device_mesh") or hasattr(value, "device_mesh"):
        return value.to(like.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return value.to(like.device)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


class OptimizerWrapper(Optimizer):
    """An optimizer that steps another one and does something before or after.

    ``param_groups``, ``state`` and ``defaults`` *are* the inner optimizer's, so schedulers, gradient clipping,
    accelerate, ``torch.save`` and torch's distributed checkpoint treat both as one optimizer. A subclass
    defines ``_step``, which calls ``self.inner.step()`` once; own counters go into ``param_groups`` and own
    tensors into ``own[parameter]``, under keys named in ``own_state``: beside ``state``, because optimizers make
    their own where they find none, but in the same place of the state dict. Both are made in ``_step``, since
    accelerate may replace the parameters before it (FSDP2).

    - **Closures** are evaluated once, here; the inner optimizer never sees them.
    - **GradScaler**: a wrapper never claims ``_step_supports_amp_scaling``, so the scaler unscales the
      gradients itself and skips the whole step, counters included, when one is not finite.
    - **Names** come from ``group["param_names"]``, which torch keeps when an optimizer is built from
      ``model.named_parameters()``.
    - **Loading** compares names first (torch would silently assign state by position) and keeps the dtypes of
      ``own_state``, which torch would cast to the parameter's.

    Args:
        inner_optimizer: any ``torch.optim.Optimizer`` over named parameters whose ``step`` needs no closure.

    Raises:
        ArgumentError: not an optimizer, one that needs a closure (LBFGS), or parameters without names.

    Example:
        >>> class Halved(OptimizerWrapper):
        ...     def _step(self):
        ...         self.inner.step()
        ...         for group in self.param_groups:
        ...             torch._foreach_mul_(group["params"], 0.5)
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = Halved(torch.optim.SGD(model.named_parameters(), lr=0.1))
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer.step()
        >>> model.weight.item()
        0.5
    """

    own_state: ClassVar[frozenset[str]] = frozenset()
    """Keys of the per-parameter state that the subclass owns; no two kinds of wrapper share one."""

    inner: Optimizer
    own: dict[Tensor, dict[str, Tensor]]

    def __init__(self, inner_optimizer: Optimizer) -> None:
        # Optimizer.__init__ would build groups of its own; __setstate__ makes only the hooks.
        _require_optimizer(inner_optimizer)
        super().__setstate__({"inner": inner_optimizer, "own": {}})
        self.named_groups()

    # -- one optimizer to everyone else ----------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The inner optimizer's state; this wrapper's own is in ``own``."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner.defaults = defaults

    def __getstate__(self) -> dict[str, Any]:
        # Schedulers put an unpicklable `step` on the instance, hooks are rarely picklable: torch drops both.
        return {k: v for k, v in self.__dict__.items() if k != "step" and not k.endswith("_hooks")}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; its parameters must have names.

        Args:
            param_group: as ``torch.optim.Optimizer.add_param_group`` takes it, with (name, parameter) pairs.
        """
        self.inner.add_param_group(param_group)
        try:
            self.named_groups()
        except ArgumentError:
            self.inner.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the inner optimizer does it.

        Args:
            set_to_none: drop them instead of writing zeros.
        """
        self.inner.zero_grad(set_to_none)

    def train(self) -> None:
        """Switch a schedule-free inner optimizer to training; nothing for one without modes."""
        if callable(switch := getattr(self.inner, "train", None)):
            switch()

    def eval(self) -> None:
        """Switch a schedule-free inner optimizer to evaluation; nothing for one without modes."""
        if callable(switch := getattr(self.inner, "eval", None)):
            switch()

    def named_groups(self) -> list[tuple[dict[str, Any], list[tuple[str, Tensor]]]]:
        """Each group with its (plain name, parameter) pairs.

        Returns:
            One (group, pairs) for each parameter group, in order.

        Raises:
            ArgumentError: a group without names, or a name that occurs twice.
        """
        for index, group in enumerate(self.param_groups):
            names, found = group.get("param_names") or (), group["params"]
            if len(names) != len(found):
                mend = "its parameters have no names; build the optimizer from model.named_parameters()"
                if names:
                    mend = f"its {len(names)} parameters were replaced by {len(found)} (DeepSpeed ZeRO flattens them): "
                    mend += "shard with FSDP2 (accelerate's fsdp_version: 2), or take OnDARE for ZeRO-1 and 2"
                raise ArgumentError(f"param_groups[{index}]", type(self.inner).__name__, mend)
        names = iter(unique_names((n for g in self.param_groups for n in g["param_names"]), "param_names"))
        return [(group, [(next(names), p) for p in group["params"]]) for group in self.param_groups]

    # -- stepping --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step.

        Args:
            closure: evaluated once, with gradients enabled, before anything else.

        Returns:
            The closure's value, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    def _step(self) -> None:
        self.inner.step()

    def _initialising(self) -> bool:
        """Whether torch's distributed checkpoint is stepping only to make the state exist.

        It does so with an empty state, every lr 0 and every gradient 0: then nothing may move or be counted.
        (A warm-up may start at lr 0 too, but with gradients.)
        """
        if any(not isinstance(entry, dict) or entry for entry in self.state.values()):
            return False
        if any(float(group.get("lr", 1.0)) != 0 for group in self.param_groups):
            return False
        return not any_nonzero(p for group in self.param_groups for p in group["params"])

    # -- saving and loading ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict, with this wrapper's state and counters in it."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        saved: dict[str, Any] = self.inner.state_dict()
        entries = dict(saved["state"])
        for p, index in self._indices(saved):
            if p in self.own:
                entries[index] = {**entries.get(index, {}), **saved_state(self.own[p])}
        saved["state"] = entries
        for after in self._optimizer_state_dict_post_hooks.values():
            saved = after(self, saved) or saved
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, for the same parameters in the same order.

        Args:
            state_dict: from this kind of wrapper around this kind of optimizer.

        Raises:
            StateError: its parameters have other names, or come in another order.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        names = [group["param_names"] for group in self.param_groups]
        require_same_names(self.param_groups, state_dict["param_groups"])
        entries = dict(state_dict["state"])
        own: dict[Tensor, dict[str, Tensor]] = {}
        for p, index in self._indices(state_dict):
            entry = entries.pop(index, {})
            if mine := {key: loaded(key, entry[key].to(p.device)) for key in self.own_state & entry.keys()}:
                own[p] = mine
            if rest := {key: value for key, value in entry.items() if key not in self.own_state}:
                entries[index] = rest
        self.inner.load_state_dict({**state_dict, "state": entries})
        self.own = own
        for group, ours in zip(self.param_groups, names, strict=True):
            group["param_names"] = ours  # torch took the saved ones, which may carry a wrapper's segments
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _indices(self, state_dict: dict[str, Any]) -> Iterator[tuple[Tensor, Any]]:
        """Each parameter with its key in a state dict."""
        for group, packed in zip(self.param_groups, state_dict["param_groups"], strict=True):
            yield from zip(group["params"], packed["params"], strict=True)


def require_same_names(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Refuse a saved optimizer state whose parameters are not ours, in our order.

    Args:
        groups: the optimizer's parameter groups.
        saved: ``state_dict["param_groups"]``; groups without ``param_names`` are compared by their sizes.

    Raises:
        StateError: another number of groups or parameters, other names, or another order.

    Example:
        >>> saved = [{"params": [0], "param_names": ["module.weight"]}]
        >>> require_same_names([{"params": [None], "param_names": ["weight"]}], saved)
    """
    here, there = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved]
    if here != there:
        raise StateError(
            f"the saved optimizer state has {there} parameters in its groups, this optimizer {here}: "
            "build it from the same model with the same groups"
        )
    for group, other in zip(groups, saved, strict=True):
        if "param_names" not in other or "param_names" not in group:
            continue
        ours, theirs = map(plain_name, group["param_names"]), map(plain_name, other["param_names"])
        wrong = [f"{b} for {a}" for a, b in zip(ours, theirs, strict=True) if a != b]
        if wrong:
            raise StateError(
                f"the saved optimizer state is of other parameters or in another order: {examples(wrong)}; "
                "build the optimizer from the same model with the same groups"
            )


def _require_optimizer(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError("inner_optimizer", optimizer, "give a torch.optim.Optimizer")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        mend = "it re-evaluates a closure within its step, as LBFGS does; give a first-order one such as AdamW"
        raise ArgumentError("inner_optimizer", type(optimizer).__name__, mend)
