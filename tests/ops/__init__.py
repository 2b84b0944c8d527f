# SPDX-License-Identifier: Apache-2.0
"""One device: orders, patterns, visits, walks, and the operator against its definition."""
