"""Copies from this machine's memory to a device for which nobody waits."""

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy on `device` that later work there finds in place. From pageable memory CUDA would let the host wait until
    the device has done all that it was given before; so the values are pinned first."""
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
