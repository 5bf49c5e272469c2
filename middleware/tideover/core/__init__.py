# SPDX-License-Identifier: Apache-2.0
"""Decisions, pure: values in, values out. No clock, no I/O, no third party."""
