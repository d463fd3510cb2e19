"""Activation sparsity: which feed-forward neurons a request reads."""
