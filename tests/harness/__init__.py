# SPDX-License-Identifier: Apache-2.0
"""What the tests stand on: ranks, hosts, small runs, random cases, other people's algorithms."""
