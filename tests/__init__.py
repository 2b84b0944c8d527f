# SPDX-License-Identifier: Apache-2.0
"""Tests; a package, so that spawned ranks can import the functions that test modules hand them."""
