"""Write docs/benchmarks/cuda-traffic.json: the weight bytes that the GPU's kernels ask for in a step of one token,
beside those that they must move. Counted by the emulator, on two random layers in the shape of SmolLM2.

A kernel must move the codes of each matrix row that the token uses, and of down of each neuron. Lanes ask for at
least that; sectors are pieces of 32 bytes, counted once a block of threads, which is what memory moves.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from sparse_kernels import native
from sparse_kernels.choice import NeuronChoice, core_words
from sparse_kernels.decoder import Decoder, Wanted
from sparse_kernels.formats import BFLOAT16, DecoderFormats, MatrixFormat
from sparse_kernels.pack import pack
from sparse_kernels.weights import DecoderConfig, EndTensors, LayerShape, LayerTensors
from sparserve.compression.quantize import quantize_layer

OUT = Path(__file__).parents[1] / "docs" / "benchmarks" / "cuda-traffic.json"
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, NEURONS, LAYERS = 576, 9, 3, 64, 1536, 2
FORMATS = {
    "bfloat16": BFLOAT16,
    "int8": MatrixFormat(8, 64),
    "int4": MatrixFormat(4, 64),
    "planes 4+4": MatrixFormat(8, 64, 4),
    "planes 2+2": MatrixFormat(4, 64, 2),
}
DENSITIES = (1.0, 0.5, 0.25)


class OneToken(NamedTuple):
    token_ids: tuple[int, ...] = (1,)
    start: int = 0
    block_table: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Row:
    kernel: str
    format: str
    density: float  # of the neurons
    least_bytes: int
    asked_bytes: int
    sector_bytes: int
    asked_over_least: float
    sectors_over_least: float


def decoder(format: MatrixFormat) -> Decoder:
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    width, kv_width = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    formats = DecoderFormats(format if not format.low_bits else BFLOAT16, format, format)
    layers = [
        LayerTensors(
            matrix(width, HIDDEN), matrix(kv_width, HIDDEN), matrix(kv_width, HIDDEN), matrix(HIDDEN, width),
            matrix(NEURONS, HIDDEN), matrix(NEURONS, HIDDEN), matrix(HIDDEN, NEURONS),
            torch.ones(HIDDEN), torch.ones(HIDDEN),
        )
        for _ in range(LAYERS)
    ]  # fmt: skip
    shape = LayerShape(HEADS, KV_HEADS, NEURONS)
    frequencies = 1e4 ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    config = DecoderConfig(HIDDEN, 64, HEAD_DIM, 1e-5, frequencies, [shape] * LAYERS)
    ends = EndTensors(matrix(64, HIDDEN), torch.ones(HIDDEN))
    made = [quantize_layer(layer, formats.layer(i), "") for i, layer in enumerate(layers)]
    return Decoder(pack(config, ends, made, formats), device="emulator")


def measure(name: str, format: MatrixFormat) -> list[Row]:
    library = native.load("emulator")
    machine, rows = decoder(format), []
    kv = machine.new_kv(1)
    suffix = "planes" if format.low_bits else name
    for density in DENSITIES:
        members = torch.rand(LAYERS, NEURONS, generator=torch.Generator().manual_seed(1)) < density
        choice = None if density == 1 else NeuronChoice(core_words(members))
        library.sk_emulator_reset_traffic(1)
        machine.forward([OneToken()], kv, wanted=[Wanted(choice=choice)])
        neurons = NEURONS * LAYERS if choice is None else int(members.sum())
        bits = format.bits if format.quantized else 16
        row_bytes = HIDDEN * bits // 8
        attention = LAYERS * (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM * row_bytes
        least = {"dot": attention, "activate": 2 * neurons * row_bytes, "down": neurons * row_bytes}
        for kernel, wanted in least.items():
            if kernel == "dot" and (density != 1 or format.low_bits):
                continue  # it is as in the other rows
            counts = (ctypes.c_uint64 * 3)()
            native.check(
                library, library.sk_emulator_traffic(f"{kernel}_{suffix}_1".encode(), counts)
            )
            asked, sectors = counts[0], 32 * counts[2]
            rows.append(
                Row(kernel, name, density, wanted, asked, sectors, asked / wanted, sectors / wanted)
            )
    machine.close()
    return rows


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    rows = [row for name, format in FORMATS.items() for row in measure(name, format)]
    table = Table("kernel", "format", "density", "asked / least", "sectors / least")
    for row in rows:
        ratios = (f"{row.asked_over_least:.3f}", f"{row.sectors_over_least:.3f}")
        table.add_row(row.kernel, row.format, str(row.density), *ratios)
    Console().print(table)
    OUT.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
