# SPDX-License-Identifier: Apache-2.0
"""Ranks: plans, what travels, and the same numbers whatever their count."""
