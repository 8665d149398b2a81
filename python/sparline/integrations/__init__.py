# SPDX-License-Identifier: Apache-2.0
"""Adapters to host libraries, one file each, and the file that learned tensors travel in. Importing
this package imports no host library."""
