# SPDX-License-Identifier: Apache-2.0
"""Runs: configuration, data, steps, checkpoints, hosts."""
