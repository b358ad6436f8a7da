"""Distillation from the float model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hqod_ops.quant import parameter_groups
from hqod_ops.quant.tuning import Distillation, channel_wise_loss
from python_tests.quant.tuning.nets import Shared, error, images, quantized, trained


def test_the_channel_wise_loss_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    expected = 0.0
    for b in range(2):
        for c in range(3):
            p, q = (x[b, c].flatten().div(2).softmax(0) for x in (t, s))
            expected += float((p * (p / q).log()).sum()) * 4 / 6
    assert channel_wise_loss(s, t, 2.0).item() == pytest.approx(expected, rel=1e-5)


def test_training_alone_brings_the_student_closer() -> None:
    teacher = trained()
    student = quantized(teacher, 2, act_bits=4)
    before = error(student, teacher)
    distillation = Distillation(student, teacher)
    optimizer = torch.optim.Adam(parameter_groups(student, weight_decay=0.0), lr=3e-3)
    state = copy.deepcopy(teacher.state_dict())
    for _ in range(15):
        for batch in images():
            optimizer.zero_grad()
            distillation(batch).backward()
            optimizer.step()
    assert error(student, teacher) < 0.7 * before
    assert all(torch.equal(v, teacher.state_dict()[n]) for n, v in state.items())
    assert all(p.grad is None for p in teacher.parameters())


def test_it_is_one_term_more_beside_labels() -> None:
    teacher = trained()
    student = quantized(teacher).train()
    distillation = Distillation(student, teacher, features=("block", "stem"), predictions="logits")
    outputs = student(images()[0])
    loss = sum(y.square().mean() for y in outputs) + distillation.loss()
    loss.backward()
    assert student.stem.weight.grad is not None
    with pytest.raises(ValueError, match="expected the student to have run"):
        distillation.loss()
    with torch.no_grad():
        student(images()[0])  # an evaluation in between does not count
    distillation.close()
    student(images()[0])
    with pytest.raises(ValueError, match="expected the student to have run"):
        distillation.loss()


def test_a_teacher_alike_gives_no_loss() -> None:
    teacher = trained()
    student = copy.deepcopy(teacher)
    assert Distillation(student, teacher)(images()[0]).item() == pytest.approx(0.0, abs=1e-6)


class Wide(Shared):
    """Another architecture, with a block of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(self.block)


def test_a_teacher_of_another_architecture() -> None:
    names = {"block.1": "block.0.1"}
    distillation = Distillation(quantized(trained()), trained(Wide), names, {"logits": "logits"})
    assert distillation(images()[0]).item() > 0


def test_bad_input() -> None:
    teacher, student = trained(), quantized(trained())
    with pytest.raises(ValueError, match="teacher: expected it in eval mode"):
        Distillation(student, trained().train())
    with pytest.raises(ValueError, match="features: no module fits 'neck.*'"):
        Distillation(student, teacher, features="neck.*")
    with pytest.raises(ValueError, match="the teacher has no module 'neck'"):
        Distillation(student, teacher, features={"block": "neck"})
    with pytest.raises(ValueError, match="prediction layers of a Sequential are not known"):
        Distillation(nn.Sequential(nn.Conv2d(3, 3, 1)), teacher)
    with pytest.raises(ValueError, match="neither features nor predictions"):
        Distillation(student, teacher, (), ())
    with pytest.raises(ValueError, match="same shapes"):
        Distillation(student, teacher, {"stem": "logits"}, ())(torch.rand(1, 3, 8, 8))
