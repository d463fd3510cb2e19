"""Models: configuration, loading, the Llama family in plain torch, KV cache and backends."""
