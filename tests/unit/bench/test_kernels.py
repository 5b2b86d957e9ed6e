"""Device time by kind of kernel."""

from __future__ import annotations

import pytest
import torch
from salient_eval.bench.kernels import covered, kernel_kind, kernel_table, product_kind


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("aten::mm", [[2048, 4096], [4096, 64]], "products with adapters"),
        ("aten::mm", [[2048, 4096], [4096, 11008]], "frozen products and output layer"),
        ("aten::baddbmm", [[28, 64, 64], [28, 64, 4096], [28, 4096, 64]], "products with adapters"),
    ],
)
def test_products_are_told_apart_by_size(name: str, shapes: list[list[int]], kind: str) -> None:
    found, title = product_kind(name, shapes)
    assert found == kind and str(shapes[0][0]) in title


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("triton_poi_fused_add_mul_7", "fused elementwise (Triton)"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_TNT", ""),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16>", ""),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"),
        ("Memcpy DtoD (Device -> Device)", "copies and concatenation"),
        ("void at::native::vectorized_elementwise_kernel<sin>", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(name: str, kind: str) -> None:
    assert kernel_kind(name) == kind


def test_time_that_overlaps_counts_once() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.8)]) == 4
    assert covered([]) == 0


def test_a_cpu_has_no_table() -> None:
    assert kernel_table(lambda: pytest.fail("not profiled"), torch.device("cpu")) == {}
