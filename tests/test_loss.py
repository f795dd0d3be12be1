"""The head's loss as one operation equals torch's separate operations: losses, gradients, and weights of tokens."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from olmo_train.model import loss as losses
from olmo_train.model.loss import IGNORE, HeadLoss

B, T, C, V = 3, 7, 8, 33
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(B, T, C, generator=generator), 2 * torch.randn(V, C, generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[0, 2:5] = labels[2] = IGNORE
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def step_by_step(x, weight, labels, z_loss=0.0):
    logits = F.linear(x, weight).float()
    summed = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none")
    squares = z_loss * logits.logsumexp(dim=-1).square() * (labels != IGNORE)
    return summed.view_as(labels).sum(dim=1) + (squares - squares.detach()).sum(dim=1)


def gradients(function, dtype, weights) -> tuple:
    x, weight, labels = inputs(dtype)
    losses = function(x, weight, labels)
    (losses * torch.tensor(weights)).sum().backward()
    return losses.detach(), x.grad, weight.grad


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.25, 3.0, 1.0)], ids=["equal", "unequal"])
@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("part", [1, 2**23], ids=["row by row", "at once"])
def test_losses_and_gradients_are_those_of_torchs_operations(monkeypatch, dtype, close, weights, z_loss, part):
    monkeypatch.setitem(losses.PART_BYTES, "cpu", part)
    expected = gradients(lambda *tensors: step_by_step(*tensors, z_loss), dtype, weights)
    found = gradients(HeadLoss(z_loss), dtype, weights)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= close * other.norm()


class CountProducts(TorchDispatchMode):
    """Counts the matrix products of the code in its block."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function is torch.ops.aten.mm.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_head_costs_no_product_for_its_gradient(frozen):
    expected = gradients(HeadLoss(0.0), torch.float32, (1.0, 1.0, 1.0))
    x, weight, labels = inputs(torch.float32)
    weight.requires_grad_(not frozen)
    loss = HeadLoss(0.0)(x, weight, labels).sum()
    with CountProducts() as count:
        loss.backward()
    assert count.products == (1 if frozen else 2)
    assert torch.equal(x.grad, expected[1])
    assert weight.grad is None if frozen else torch.equal(weight.grad, expected[2])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=NEEDS_COMPILER)])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_the_form_that_is_compiled_for_gpus_computes_the_same(compiled, z_loss):
    loss = HeadLoss(z_loss)
    loss.differentiate_ = torch.compile(losses.differentiate_at_once_) if compiled else losses.differentiate_at_once_
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        expected = gradients(lambda *tensors: step_by_step(*tensors, z_loss), dtype, (0.25, 3.0, 1.0))
        for one, other in zip(gradients(loss, dtype, (0.25, 3.0, 1.0)), expected, strict=True):
            assert one.dtype == other.dtype
            assert (one - other).norm() <= close * other.norm()


def test_without_gradients_the_losses_are_the_same():
    x, weight, labels = inputs(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(HeadLoss(0.1)(x, weight, labels), step_by_step(x, weight, labels))


def test_logits_far_apart_neither_overflow_nor_vanish():
    x, weight, labels = inputs(torch.float32)
    losses = HeadLoss(0.0)(x * 1e3, weight, labels)
    assert torch.isfinite(losses).all()
    torch.testing.assert_close(losses, step_by_step(x * 1e3, weight, labels))


def test_a_value_that_is_not_finite_is_found():
    x, weight, labels = inputs(torch.float32)
    assert HeadLoss(0.0)(x * torch.nan, weight, labels)[:2].isnan().all()


def test_the_logits_are_held_once():
    x, weight, labels = inputs(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        HeadLoss(0.0)(x, weight, labels)
    assert [t.dtype for t in saved if t.shape == (B * T, V)] == [torch.bfloat16]
