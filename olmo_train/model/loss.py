"""The head and its loss as one operation that stores the logits once.

The gradient of cross-entropy with respect to a logit is softmax minus one at the label, which the forward knows. So the
forward overwrites the logits with their gradients, a few rows at a time while they are in the cache, and the backward is two
matrix products. With separate torch operations a bf16 logit takes 12 more bytes than its own 2, and five passes over memory.

Letters of shapes: N tokens, C d_model, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_train.model.cost import LOSS_PART_BYTES

Differentiate = Callable[[Tensor, Tensor, float], Tensor]  # as differentiate_, below
IGNORE = -100  # a label that is not scored
PART_BYTES = {"cpu": 2**23}  # bytes of fp32 logits processed at a time; on a CPU they should fit in the cache


class HeadLoss(nn.Module):
    """Cross-entropy of x @ weight.T, and z_loss * log(Z)^2, which is trained on but not part of the returned loss."""

    def __init__(self, z_loss: float):
        super().__init__()
        self.z_loss = z_loss
        self.differentiate_: Differentiate = differentiate_in_parts_  # kernels.py may set another implementation

    def forward(self, x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        """Summed loss in nats of each sequence, fp32 (B,), for x (B, T, C), weight (V, C) and labels (B, T)."""
        rows, flat = x.flatten(0, 1), labels.flatten()
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            losses = _HeadLoss.apply(rows, weight, flat, self.z_loss, self.differentiate_)
        else:
            losses = torch.cat([token_losses(part, label) for part, label in parts(F.linear(rows, weight), flat)])
        return losses.view_as(labels).sum(dim=1)


class _HeadLoss(torch.autograd.Function):
    """Losses (N,) fp32 of x (N, C), weight (V, C) and labels (N,). The incoming gradient may differ by token, so a caller
    can weight tokens."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor, z_loss: float, differentiate_: Differentiate) -> Tensor:
        logits = F.linear(x, weight)  # (N, V)
        losses = differentiate_(logits, labels, z_loss)
        ctx.save_for_backward(x, weight, labels, logits)
        return losses

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight, labels, gradients = ctx.saved_tensors  # gradients (N, V): of each token's loss with respect to its logits
        grad = torch.where(labels == IGNORE, 0.0, grad)[:, None]  # (N, 1)
        grad_x = (gradients @ weight * grad).to(x.dtype)  # (N, C)
        # A frozen head needs none, and it would be a third product of this size.
        grad_weight = gradients.T @ (x * grad).to(x.dtype) if ctx.needs_input_grad[1] else None  # (V, C)
        return grad_x, grad_weight, None, None, None


def differentiate_in_parts_(logits: Tensor, labels: Tensor, z_loss: float) -> Tensor:
    """differentiate_, some rows at a time."""
    return torch.cat([differentiate_(part, label, z_loss) for part, label in parts(logits, labels)])


def parts(logits: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Views of some rows of logits (N, V) and their labels at a time."""
    rows = max(1, PART_BYTES.get(logits.device.type, LOSS_PART_BYTES) // (4 * logits.shape[1]))
    return list(zip(logits.split(rows), labels.split(rows), strict=True))


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (N,) fp32 of logits (N, V) and labels (N,); 0 where a label is IGNORE."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")


def differentiate_(logits: Tensor, labels: Tensor, z_loss: float) -> Tensor:
    """token_losses; overwrites logits (N, V) with the gradients of the losses, and of z_loss * log(Z)^2 where
    log(Z) = log(sum(exp(logits))) (Chowdhery et al. 2022, section 5). Rows with label IGNORE are undefined."""
    scored = labels != IGNORE
    places = torch.where(scored, labels, 0)[:, None]  # (N, 1)
    logits_fp32 = logits.float()
    probs = logits_fp32.softmax(dim=-1)
    # The largest probability is 1 / sum(exp(logits - max)), so log(Z) needs no second pass of exponentials.
    log_z = logits_fp32.amax(dim=-1, keepdim=True) - probs.amax(dim=-1, keepdim=True).log()  # (N, 1)
    losses = torch.where(scored, (log_z - logits_fp32.gather(1, places))[:, 0], 0.0)
    if z_loss:
        probs *= 1 + 2 * z_loss * log_z
    probs.scatter_add_(1, places, torch.full_like(log_z, -1.0))
    logits.copy_(probs)
    return losses


def differentiate_at_once_(logits: Tensor, labels: Tensor, z_loss: float) -> Tensor:
    """differentiate_ in a form that torch.compile turns into two passes over the logits, without another tensor of their size."""
    scored = labels != IGNORE
    places = torch.where(scored, labels, 0)[:, None]  # (N, 1)
    logits_fp32 = logits.float()
    log_z = logits_fp32.logsumexp(dim=-1, keepdim=True)  # (N, 1)
    losses = torch.where(scored, (log_z - logits_fp32.gather(1, places))[:, 0], 0.0)
    at_label = torch.arange(logits.shape[1], device=logits.device) == places  # (N, V)
    logits.copy_((logits_fp32 - log_z).exp() * (1 + 2 * z_loss * log_z) - at_label.float())
    return losses
