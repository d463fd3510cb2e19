"""Rivals on the same weights, each behind the `System` protocol of `sparserve.bench.systems`."""
