"""Moments of AdamW in checkpoints of the released training code, by the names of a BetaCLIP's parameters.

The code has an optimiser for the pooling block and one for the rest, each with groups of parameters that decay and that
do not. A file numbers the parameters and does not name them. But they stand in the order of the weights, so that the
shapes of a group's moments show which parameters it is of.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from betaclip.model.published_layout import POOL, STRETCHED, TABLES, from_published
from betaclip.model.weights import unusable

MOMENTS = ("exp_avg", "exp_avg_sq")


def moments(content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """``exp_avg``, ``exp_avg_sq`` and ``step`` of each parameter that has them.

    Args:
        content: of the file.
        weights: of the file, in the published layout and the order of the file.

    Raises:
        ValueError: there is no optimiser, or its state is not that of these weights.
    """
    optimizers = {
        key: value for key, value in content.items() if isinstance(value, Mapping) and value.keys() >= _OPTIMIZER
    }
    if not optimizers:
        raise ValueError(f"expected optimisers (dictionaries with state and param_groups), got the keys "
                         f"{', '.join(map(str, list(content)[:8]))}")  # fmt: skip
    found: dict[str, Mapping[str, Tensor]] = {}
    for key, optimizer in optimizers.items():
        try:
            for group in optimizer["param_groups"]:
                found |= _of_group([optimizer["state"].get(number) for number in group["params"]], weights)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{key}: expected the state dict of AdamW: {type(error).__name__} {error}") from error
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    return _ours(found, weights)


_OPTIMIZER = {"state", "param_groups"}


def _of_group(states: Sequence[Mapping[str, Tensor] | None], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The states of a group's parameters by their names; a parameter that never had a gradient has none."""
    shapes = [None if state is None else state["exp_avg"].shape for state in states]
    fitting = {
        names for names in _groups(weights)
        if len(names) == len(shapes)
        and all(shape in (None, weights[name].shape) for name, shape in zip(names, shapes, strict=True))
    }  # fmt: skip
    if len(fitting) != 1:
        number = "several" if fitting else "none"
        raise ValueError(f"expected groups in the order of the weights, got one of {len(shapes)} that fits {number}")
    found = {name: state for name, state in zip(fitting.pop(), states, strict=True) if state is not None}
    for name, state in found.items():
        for kind in MOMENTS:
            reason = unusable(state[kind])
            if reason or state[kind].shape != weights[name].shape:
                raise ValueError(f"{kind} of {name}: {reason or 'expected the shape of the weight'}")
    return found


def _groups(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, ...]]:
    """Names of the parameters that a group can be of: of a part of the model, those that decay, those that do not, or
    both, with the frozen table of positions or without."""
    parts = (
        lambda name: name.startswith(POOL),
        lambda name: not name.startswith(POOL),
        lambda name: True,
        lambda name: name.startswith("visual."),
        lambda name: not name.startswith((POOL, "visual.")),
    )
    kinds = (lambda tensor: tensor.dim() > 1, lambda tensor: tensor.dim() <= 1, lambda tensor: True)
    for part in parts:
        for kind in kinds:
            for left_out in (TABLES[0], None):
                yield tuple(n for n, tensor in weights.items() if part(n) and kind(tensor) and n != left_out)


def _ours(found: Mapping[str, Mapping[str, Any]], weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The moments converted as the weights are: the layout's q, k and v become one, and a table is divided."""
    nowhere = torch.nan
    theirs = {
        kind: {
            n: found[n][kind].float() if n in found else torch.full_like(w, nowhere, dtype=torch.float32)
            for n, w in weights.items()
        }
        for kind in MOMENTS
    }
    steps = {  # in float32 whatever the weights are in: bfloat16 would round a step of 1001 to 1000
        n: torch.full_like(w, float(found[n]["step"]) if n in found else nowhere, dtype=torch.float32)
        for n, w in weights.items()
    }
    converted = {kind: from_published(tensors) for kind, tensors in theirs.items()}
    result = {}
    for name, step in from_published(steps).items():
        if name.startswith(f"{STRETCHED}0.") or step.isnan().all():
            continue
        if (step != step.flatten()[0]).any():
            raise ValueError(f"{name}: expected one number of steps, got moments of parts of it with several")
        result[name] = {**{kind: converted[kind][name] for kind in MOMENTS}, "step": step.flatten()[0].clone()}
    return result
