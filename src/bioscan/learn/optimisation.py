"""Optimizers and learning rates, from the settings."""

import math

import torch
from torch import nn

from bioscan.learn.adapters import parameter_groups
from bioscan.learn.settings import TrainSettings


def make_optimizer(network: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW without decay on biases and norms, or SGD with Nesterov momentum and decay on all, as the paper
    has it.
    """
    groups = parameter_groups(network, settings)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0
        )
    return torch.optim.AdamW(groups, lr=settings.lr)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group of parameters its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def learning_rate(settings: TrainSettings, at: float) -> float:
    """The rate after so many epochs, a fraction within the running one included."""
    if settings.schedule == "steps":
        return settings.lr * 0.1 ** sum(at >= step for step in settings.steps)
    warmup = min(settings.warmup, settings.epochs - 1)
    if at < warmup:
        return settings.lr * (at + 0.01) / warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (at - warmup) / (settings.epochs - warmup)))
