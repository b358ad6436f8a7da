"""The training loss of ATSS, with the terms of HQOD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

import hqod_ops
from hqod_ops.detection.models.network import RawOutputs
from hqod_ops.detection.models.options import LossConfig


def rank_mean(total: Tensor) -> Tensor:
    """The mean of a number over all ranks of a distributed run; the number itself without one.

    Args:
        total (Tensor[]): this rank's value; not changed.

    Returns:
        Tensor[]: the same on every rank.

    Example:
        >>> import torch
        >>> from hqod_ops.detection.models.losses import rank_mean
        >>> rank_mean(torch.tensor(3.0))
        tensor(3.)
    """
    if not (dist.is_available() and dist.is_initialized()):
        return total
    total = total.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def centerness_target(anchors: Tensor, boxes: Tensor) -> Tensor:
    """How central an anchor lies in its object: 1 in the middle, 0 on the border.

    ``sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))`` with the distances l, t, r, b from the
    anchor's centre to the sides of the object.

    Args:
        anchors (Tensor[N, 4]): anchors (x1, y1, x2, y2), centres inside their objects, in pixels.
        boxes (Tensor[N, 4]): the objects, in pixels.

    Returns:
        Tensor[N]: values in [0, 1].

    Source: FCOS (arXiv:1904.01355), as used by ATSS.

    Example:
        >>> import torch
        >>> from hqod_ops.detection.models.losses import centerness_target
        >>> centerness_target(torch.tensor([[0., 0., 4., 4.]]), torch.tensor([[1., 0., 5., 4.]]))
        tensor([0.5774])
    """
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    before, after = centres - boxes[:, :2], boxes[:, 2:] - centres
    ratio = torch.minimum(before, after) / torch.maximum(before, after).clamp(min=1e-6)
    return ratio.clamp(min=0).prod(dim=1).sqrt()


def _wide(x: Tensor) -> Tensor:
    """Half precision in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def atss_losses(
    outputs: RawOutputs,
    anchors: Tensor,
    decoded: Tensor,
    assigned: Tensor,
    labels: Tensor,
    boxes: Tensor,
    config: LossConfig,
) -> dict[str, Tensor]:
    """Classification, box, centerness and HQOD loss of a batch.

    With positives i of IoU u_i, class score p_i and centerness target c_i, all sums over the batch:

    - ``cls``: sum of the focal loss over all anchors and classes / number of positives
    - ``box``: sum of ``2 * (1 - GIoU_i) * c_i`` / sum of c_i
    - ``centerness``: sum of the binary cross-entropy against c_i / number of positives
    - ``hqod`` (when ``config.hqod``): sum of ``hiou_weight * HIoU(u_i) + tcorr_weight *
      TCorr(p_i, u_i)`` / sum of c_i, outside of the weights 2 and c_i, as published; with
      ``normaliser = "num_pos"`` / number of positives.

    Divisors are averages over ranks and at least 1.

    Args:
        outputs (RawOutputs): predictions at B x A anchors.
        anchors (Tensor[P, 4]): the anchors of the P positives, in pixels.
        decoded (Tensor[P, 4]): their predicted boxes, in pixels.
        assigned (Tensor[P]): their positions among the B * A anchors.
        labels (Tensor[P]): their classes.
        boxes (Tensor[P, 4]): their objects, in pixels.
        config (LossConfig): weights and HQOD options.

    Returns:
        dict of Tensor[]: the terms; the loss is their sum. Without a positive they are finite and
        connected to every output.

    Source: ATSS (arXiv:1912.02424), HQOD (arXiv:2408.02561).
    """
    logits = _wide(outputs.logits.flatten(0, 1))
    target = torch.zeros_like(logits)
    target[assigned, labels] = 1.0
    centre = centerness_target(anchors, boxes)
    counts = rank_mean(torch.stack([centre.new_tensor(float(len(assigned))), centre.sum()]))
    num_pos, sum_centre = counts.clamp(min=1.0).unbind()

    focal = sigmoid_focal_loss(
        logits, target, alpha=config.focal_alpha, gamma=config.focal_gamma, reduction="sum"
    )
    giou = hqod_ops.generalized_box_iou_loss(decoded, boxes, weight=centre, reduction="sum")
    predicted = _wide(outputs.centerness.flatten()[assigned])
    losses = {
        "cls": focal / num_pos,
        "box": config.box_weight * giou / sum_centre,
        "centerness": F.binary_cross_entropy_with_logits(predicted, centre, reduction="sum")
        / num_pos,
    }
    if config.hqod:
        losses["hqod"] = hqod_ops.hqod_loss(
            decoded,
            boxes,
            logits[assigned, labels],
            logits=True,
            variant=config.variant,
            hiou_weight=config.hiou_weight,
            tcorr_weight=config.tcorr_weight,
            avg_factor=sum_centre if config.normaliser == "official" else num_pos,
        )
    return losses


def total(losses: dict[str, Tensor]) -> Tensor:
    """The sum of the terms.

    Example:
        >>> import torch
        >>> from hqod_ops.detection.models.losses import total
        >>> total({"cls": torch.tensor(1.0), "box": torch.tensor(2.0)})
        tensor(3.)
    """
    return torch.stack(list(losses.values())).sum()


def gather_targets(
    assigned: Sequence[Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The positives of a batch in one list.

    Args:
        assigned (sequence of Tensor[A]): what
            :func:`hqod_ops.detection.models.assigner.atss_assign` gave.
        boxes (sequence of Tensor[G_b, 4]): objects of every image.
        labels (sequence of Tensor[G_b]): their classes.

    Returns:
        tuple: positions among the B * A anchors Tensor[P], boxes Tensor[P, 4], classes Tensor[P].

    Example:
        >>> import torch
        >>> from hqod_ops.detection.models.losses import gather_targets
        >>> one = torch.tensor([[0., 0., 1., 1.]])
        >>> gather_targets([torch.tensor([-1, 0])], [one], [torch.tensor([7])])
        (tensor([1]), tensor([[0., 0., 1., 1.]]), tensor([7]))
    """
    flat = torch.cat(list(assigned))
    position = (flat >= 0).nonzero().flatten()
    counts = torch.tensor([len(b) for b in boxes], device=flat.device)
    offset = (counts.cumsum(0) - counts)[position // len(assigned[0])]
    index = flat[position] + offset
    return position, torch.cat(list(boxes))[index], torch.cat(list(labels))[index]
