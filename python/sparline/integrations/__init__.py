# SPDX-License-Identifier: Apache-2.0
"""Adapters to host libraries, one file each. Importing this package imports no host library."""
