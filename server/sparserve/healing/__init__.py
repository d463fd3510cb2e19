"""Self-distillation: a pruned, sparse or quantized model learns to answer as the original one did."""
