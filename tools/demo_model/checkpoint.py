"""Training checkpoints as one safetensors file (never pickle), replaced atomically."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from pqkv_cli.files import write_bytes


def save_checkpoint(
    path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], progress: dict[str, Any]
) -> None:
    """Write model, optimizer state and `progress` (JSON values) to `path`."""
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    for i, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    content = save({k: v.contiguous().cpu() for k, v in tensors.items()}, {"progress": json.dumps(progress)})
    write_bytes(path, content)


def load_checkpoint(path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Restore model and optimizers from `path` in place and return the saved progress."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
        progress: dict[str, Any] = json.loads(file.metadata()["progress"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer.{i}."):
                _, _, index, key = name.split(".", 3)
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress
