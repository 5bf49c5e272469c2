# SPDX-License-Identifier: Apache-2.0
"""The processes: run, drain, probe, keep house, and the command line."""
