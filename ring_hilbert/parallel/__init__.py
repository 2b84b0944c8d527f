# SPDX-License-Identifier: Apache-2.0
"""Ranks: plan, prepare, sharding and the operator's collectives, which live only here."""
