"""The wrapper of the L2 anchor."""

from __future__ import annotations

import torch
from wrapped import adam, batches, build, by_hand, train, weights

from perdure.continual import L2Regularization


def test_the_anchor_is_the_last_task_in_every_order_of_calls() -> None:
    anchors = []
    for before in (True, False):
        model = build()
        l2, optimizer = L2Regularization(model, importance=0.5), adam(model)
        for task in (1, 2):
            if before:
                l2.register_task(task)
            train(l2, optimizer, batches(task), task)
            if not before:
                l2.register_task(task)
        l2.register_task(3)
        assert l2.method.anchor is not None
        anchors.append(l2.method.anchor[l2.learner.parameters.mask()])
        assert torch.equal(anchors[-1], weights(model))
    assert torch.equal(*anchors)


def test_the_loss_is_half_the_squared_distance() -> None:
    model = build()
    l2, optimizer = L2Regularization(model, importance=3.0), adam(model)
    by_hand(model, optimizer, batches(1))
    l2.register_task(1)
    anchor = weights(model)
    assert l2.get_regularization_loss().item() == 0.0
    by_hand(model, optimizer, batches(2))
    expected = 1.5 * ((weights(model) - anchor) ** 2).sum()
    torch.testing.assert_close(l2.get_regularization_loss().detach(), expected)
    gradients = torch.autograd.grad(l2.get_regularization_loss(), list(model.parameters()))
    torch.testing.assert_close(torch.cat([g.flatten() for g in gradients]), 3.0 * (weights(model) - anchor))


def test_a_model_trained_before_the_wrapper_is_the_anchor() -> None:
    model = build()
    optimizer = adam(model)
    by_hand(model, optimizer, batches(1))
    anchor = weights(model)
    l2 = L2Regularization(model)
    l2.register_task("old")
    train(l2, optimizer, batches(2), "new")
    assert l2.method.anchor is not None
    assert torch.equal(l2.method.anchor[l2.learner.parameters.mask()], anchor)
