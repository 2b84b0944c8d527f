# SPDX-License-Identifier: Apache-2.0
"""The commands of `ring-hilbert`: their flags, and what they call. What is slow to import is imported when it is called."""
