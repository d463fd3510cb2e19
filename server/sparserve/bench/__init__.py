"""Offline benchmarks, beside the peers a user would run instead."""
