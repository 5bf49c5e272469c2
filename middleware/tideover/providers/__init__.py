# SPDX-License-Identifier: Apache-2.0
"""One file for each dialect that upstreams speak. Imported where a call is made, never by a process that only sends jobs."""
