"""The peak rate of a device in 16 bits, for MFU (model FLOPs utilisation).

MFU is the share of its peak rate that a device spends on what the model needs (PaLM, Chowdhery et al. 2022,
appendix B).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Precision = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Peak:
    """Dense matrix products with fp32 accumulation, in TFLOP/s. Data sheets often print twice that, for sparse ones."""

    name: str
    """Regular expression for the whole of the device's name, as PyTorch gives it."""
    tflops: float
    source: str
    bf16: bool = True
    """Whether bf16 has this rate too. False: fp16 alone has it."""


PEAKS = (
    Peak(r"NVIDIA B200.*", 2250, "NVIDIA HGX B200: 36 PFLOP/s sparse of eight GPUs"),
    Peak(r"NVIDIA H200 NVL", 835.5, "NVIDIA H200 data sheet: 1,671 sparse"),
    Peak(r"NVIDIA H200.*", 989.5, "NVIDIA H200 data sheet: 1,979 sparse"),
    Peak(r"NVIDIA H100 NVL", 835.5, "NVIDIA H100 data sheet: 1,671 sparse"),
    Peak(r"NVIDIA H100 PCIe", 756.5, "NVIDIA H100 data sheet: 1,513 sparse"),
    Peak(r"NVIDIA H100.*", 989.5, "NVIDIA H100 data sheet: 1,979 sparse (SXM)"),
    Peak(r"NVIDIA H800.*", 989.5, "as H100 SXM"),
    Peak(r"NVIDIA A100.*|A100-.*", 312, "NVIDIA A100 data sheet"),
    Peak(r"NVIDIA A800.*", 312, "as A100"),
    Peak(r"NVIDIA A40", 149.7, "NVIDIA A40 data sheet"),
    Peak(r"NVIDIA A10", 125, "NVIDIA A10 data sheet"),
    Peak(r"NVIDIA L40S", 362.05, "NVIDIA L40S data sheet"),
    Peak(r"NVIDIA L40", 181.05, "NVIDIA L40 data sheet"),
    Peak(r"NVIDIA L4", 121, "NVIDIA L4 data sheet: 242 sparse"),
    Peak(r"NVIDIA GeForce RTX 4090", 165.2, "NVIDIA Ada architecture paper, fp32 accumulation"),
    Peak(r"NVIDIA GeForce RTX 3090", 71, "NVIDIA GA102 architecture paper, fp32 accumulation"),
    Peak(r"NVIDIA RTX A6000", 154.8, "NVIDIA RTX A6000 data sheet: 309.7 sparse"),
    Peak(r"(NVIDIA )?Tesla V100-SXM2.*", 125, "NVIDIA V100 data sheet", bf16=False),
    Peak(r"(NVIDIA )?Tesla V100-PCIE.*", 112, "NVIDIA V100 data sheet", bf16=False),
    Peak(r"(NVIDIA )?Tesla T4", 65, "NVIDIA T4 data sheet", bf16=False),
    Peak(r"AMD Instinct MI300X.*", 1307.4, "AMD Instinct MI300X data sheet"),
)
"""The first that matches counts."""


def device_peak(name: str, precision: Precision) -> float | None:
    """FLOP/s of one device; None if they are not known, and for fp32, which may or may not run as TF32.

    Args:
        name: as ``torch.cuda.get_device_name()`` gives it.
    """
    if precision == "fp32" or " MIG " in name:  # a part of a GPU has a part of its peak
        return None
    found = next((peak for peak in PEAKS if re.fullmatch(peak.name, name.strip())), None)
    if found is None or (precision == "bf16" and not found.bf16):
        return None
    return found.tflops * 1e12
