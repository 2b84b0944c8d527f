# SPDX-License-Identifier: Apache-2.0
"""Storage of checkpoints: tensors, manifests and locks on a file system, without pickles or anything else that could run code."""
