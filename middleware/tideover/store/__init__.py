# SPDX-License-Identifier: Apache-2.0
"""Redis and Valkey, and nothing else: arguments in, one script call, a typed result out."""
