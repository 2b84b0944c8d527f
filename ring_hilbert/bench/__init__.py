# SPDX-License-Identifier: Apache-2.0
"""Measurements: each writes rows to `ring_hilbert/bench/results/*.csv`, from which the README takes its figures."""
