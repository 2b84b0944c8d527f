# SPDX-License-Identifier: Apache-2.0
"""What checkpoints are made of: tensors, manifests and locks on a file system, without anything that could run code."""
