"""The engine: requests in, tokens out; scheduling, sampling, tokenization. Knows nothing of gRPC."""
