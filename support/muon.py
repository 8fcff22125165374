"""Muon, beyond the lecture ("Muon: An optimizer for hidden layers", Jordan, 2024).

The averaged gradient of a matrix, U S V^T, is dominated by a few directions. Muon steps by about
U V^T, which goes equally far in all of them: five rounds of three small products make the gradient
orthogonal.
"""

import torch


def make(matrices: list, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Muon for matrices inside the blocks.

    The step's size is matched to AdamW's ("Muon is Scalable for LLM Training", 2025, section 2.2),
    so one schedule serves both.
    """
    options = dict(weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return torch.optim.Muon(matrices, learning_rate, **options)
