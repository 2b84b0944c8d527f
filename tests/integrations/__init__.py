# SPDX-License-Identifier: Apache-2.0
"""Other people's libraries, models and loops."""
