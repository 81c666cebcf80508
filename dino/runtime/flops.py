"""Model FLOPs utilisation (MFU): what the networks need, over what the GPUs could do at their peak."""

import copy
import logging
import re
from collections.abc import Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dino.runtime.refused import one_line

log = logging.getLogger(__name__)

# Dense products in half precision with fp32 accumulation, 1e12 floating-point operations a second, of NVIDIA's data
# sheets and architecture papers (half of the figures "with sparsity"), by torch's name of the GPU without the maker's.
PEAK_TFLOPS = {
    r"B200": 2250.0,
    r"H200": 989.0,
    r"H200 NVL": 835.0,
    r"GH200 .*": 989.0,
    r"H100 \d+GB HBM3": 989.0,  # SXM
    r"H100 NVL": 835.0,
    r"H100 PCIe": 756.0,
    r"H20": 148.0,
    r"A100.*": 312.0,  # SXM and PCIe alike
    r"A800.*": 312.0,
    r"A40": 149.7,
    r"A30": 165.0,
    r"A10": 125.0,
    r"RTX A6000": 154.8,
    r"L40S": 362.0,
    r"L4": 121.0,
    r"GeForce RTX 4090": 165.2,
    r"GeForce RTX 3090": 71.0,
    r"V100-SXM2.*": 125.0,  # of fp16; it has no bf16
    r"T4": 65.0,  # the same
}


def peak_flops(gpu: str) -> float | None:
    """Floating-point operations a second at most, of the GPU of this name; None where that is not known."""
    name = re.sub(r"^(NVIDIA|Tesla) ", "", gpu)
    if "MIG" in name.split():  # a part of a GPU
        return None
    return next((1e12 * peak for pattern, peak in PEAK_TFLOPS.items() if re.fullmatch(pattern, name)), None)


def training_flops(network: nn.Module, sizes: Sequence[int], n_global_crops: int) -> float | None:
    """Floating-point operations to train on one image; None where they cannot be counted.

    Of products and convolutions: a forward pass of all views three times (the backward pass is twice the forward one),
    and the teacher's of the global views. Stochastic depth and activation checkpointing change nothing: that is what
    *model* FLOPs means. `network`: backbone and head, a list of views [batch, 3, size, size] to outputs; `sizes`: of
    the views, in pixels, the global ones first.
    """
    of_globals, of_locals = sizes[:n_global_crops], sizes[n_global_crops:]
    try:
        return 4 * _forward_flops(network, of_globals) + 3 * _forward_flops(network, of_locals) or None
    except Exception as error:  # a backbone of others, of which not every operation may run on shapes alone
        log.debug("floating-point operations are not counted: %s", one_line(error))
        return None


def images_to_mfu(
    network: nn.Module, sizes: Sequence[int], n_global_crops: int, device: torch.device, world_size: int
) -> float | None:
    """By what images per second, of all processes, are multiplied to give the MFU; None where it is not known."""
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return None
    flops = training_flops(network, sizes, n_global_crops)
    return flops and flops / (peak * world_size)


def _forward_flops(network: nn.Module, sizes: Sequence[int]) -> float:
    """Of one image with views of these sizes. Nothing is computed but shapes; `network` stays as it is."""
    if not sizes:
        return 0.0
    # Attention as two products, which are counted. In eval mode a batch norm takes a single image.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counted:
        weightless = {id(p): torch.empty(p.shape, dtype=p.dtype) for p in [*network.parameters(), *network.buffers()]}
        copy.deepcopy(network, weightless).eval()([torch.empty(1, 3, size, size) for size in sizes])
    return float(counted.get_total_flops())
