# SPDX-License-Identifier: Apache-2.0
"""Triton kernels: tensors, integers and strides in, tensors out; no ranks, no config."""
