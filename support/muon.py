"""Muon, beyond the lecture ("Muon: An optimizer for hidden layers", Jordan, 2024).

The averaged gradient of a matrix, U S V^T, is dominated by a few directions. Muon steps by about
U V^T, which goes equally far in all of them.

One matrix of GPT-2 (124M) is too small to keep a GPU busy. So those of one shape are stacked, and
each product works on all of them at once.
"""

import torch


def orthogonalize(x: torch.Tensor) -> torch.Tensor:
    """Matrices (N, rows, columns) -> those with the same directions, and singular values near 1.

    Each round of three products turns a singular value s into 3.4445 s - 4.775 s^3 + 2.0315 s^5.
    These are Jordan's coefficients: five rounds bring what lies between 0.002 and 1 to between 0.68
    and 1.2, which is near enough, even in bfloat16.
    """
    tall = x.size(1) > x.size(2)
    x = x.bfloat16()
    x = x.mT if tall else x  # the squares below are then as small as they can be
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(5):
        square = x @ x.mT  # (N, R, C) -> (N, R, R)
        factor = torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)  # 3.4445 x + factor x
    return x.mT.contiguous() if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices inside the blocks.

    A matrix of three times as many rows as columns is three square ones: queries, keys and values
    (`split=False` leaves it whole). The step's size is matched to AdamW's ("Muon is Scalable for
    LLM Training", 2025, section 2.2), so one schedule serves both.
    """

    def __init__(self, matrices, learning_rate, weight_decay, momentum=0.95, split=True):
        self.split = split
        settings = dict(lr=learning_rate, weight_decay=weight_decay, momentum=momentum)
        super().__init__(matrices, settings)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in matrices]
            for p in matrices:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            averages = [self.state[p]["momentum_buffer"] for p in matrices]
            torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
            # Nesterov's momentum: step by what the average will be with this gradient once more.
            ahead = torch._foreach_lerp(gradients, averages, group["momentum"])
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            stacks = {}  # shape -> pairs of a matrix and its direction
            for p, direction in zip(matrices, ahead, strict=True):
                for pair in zip(self.parts(p), self.parts(direction), strict=True):
                    stacks.setdefault(pair[0].shape, []).append(pair)
            for shape, pairs in stacks.items():
                parts, directions = zip(*pairs, strict=True)
                steps = orthogonalize(torch.stack(directions)).to(parts[0].dtype)
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                torch._foreach_add_(parts, steps.unbind(), alpha=-rate)

    def parts(self, matrix: torch.Tensor) -> tuple:
        rows, columns = matrix.shape
        three = self.split and rows == 3 * columns
        return matrix.view(3, columns, columns).unbind() if three else (matrix,)
