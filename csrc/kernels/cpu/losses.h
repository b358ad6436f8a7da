// The CPU kernels of the losses, each over a range of chunks of kLossChunk samples.
#pragma once

#include "kernels/cpu/isa.h"
#include "kernels/loss_call.h"

HQOD_DECLARE_KERNEL(box_iou_forward, const LossCall& call, int64_t begin, int64_t end)
HQOD_DECLARE_KERNEL(box_iou_backward, const LossCall& call, int64_t begin, int64_t end)
HQOD_DECLARE_KERNEL(harmonious_iou_forward, const LossCall& call, int64_t begin, int64_t end)
HQOD_DECLARE_KERNEL(harmonious_iou_backward, const LossCall& call, int64_t begin, int64_t end)
HQOD_DECLARE_KERNEL(tcorr_forward, const LossCall& call, int64_t begin, int64_t end)
HQOD_DECLARE_KERNEL(tcorr_backward, const LossCall& call, int64_t begin, int64_t end)
HQOD_DECLARE_KERNEL(hqod_forward, const LossCall& call, int64_t begin, int64_t end)
HQOD_DECLARE_KERNEL(hqod_backward, const LossCall& call, int64_t begin, int64_t end)
