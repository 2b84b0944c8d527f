# SPDX-License-Identifier: Apache-2.0
"""Pretraining: config, data, loss, engine, loop, checkpoints, export."""
