# SPDX-License-Identifier: Apache-2.0
"""One device: pattern, token order, visits, merge, the torch core and the reference."""
