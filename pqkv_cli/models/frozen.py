"""A model that only computes: no gradients of weights, no dropout. Knows nothing of what is computed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of `model` ask for a gradient while the context lasts, so that a graph holds activations alone."""
    was_training, asking = model.training, [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        model.train(was_training)
        for parameter in asking:
            parameter.requires_grad_(True)
