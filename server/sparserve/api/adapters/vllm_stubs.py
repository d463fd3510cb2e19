"""The messages of `vllm.grpc.engine`, out of the package that the gateway smg has them from too."""

from __future__ import annotations

from sparserve.errors import ConfigError

try:
    from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc
    from smg_grpc_proto.generated import common_pb2
except ImportError as error:
    raise ConfigError(
        f"adapter vllm needs the package smg-grpc-proto ({error}): pip install 'sparserve[gateway]'"
    ) from error

__all__ = ["common_pb2", "vllm_engine_pb2", "vllm_engine_pb2_grpc"]
