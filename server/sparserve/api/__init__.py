"""gRPC: messages to engine calls and back, nothing else."""
