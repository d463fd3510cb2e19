"""In which numbers the matrices of a decoder are stored: the plan that quantizing and packing follow."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_kernels import _abi

GROUP_SIZES = (32, 64, 128)
# Bits of a code -> bits of it that can be in a plane of their own.
LOW_BITS = {8: (0, 4), 4: (0, 1, 2)}
RANKS = range(0, _abi.SK_MAX_RANK + 1, _abi.SK_RANK_TILE)  # of low-rank terms


@dataclass(frozen=True, slots=True)
class MatrixFormat:
    """bfloat16, or integers with a scale and a zero for each group of columns of a row:

    element = scale * (code - zero), the scale in float16, the zero an integer of as many bits as the code.

    A plane of the lower bits lets the upper ones be read alone. A low-rank term B A has 8 bits for each
    number of B, and A in bfloat16. Raises ValueError of what cannot be.
    """

    bits: int = 16  # of an element: 16 (bfloat16), 8 or 4
    group_size: int = 0  # columns, of GROUP_SIZES; 0 with bfloat16
    low_bits: int = 0  # of a code, in a plane of their own; 0: all bits are in one plane
    rank: int = 0  # of a low-rank term, of RANKS; 0: none

    def __post_init__(self) -> None:
        if self.bits == 16:
            if self.group_size or self.low_bits:
                raise ValueError(
                    f"bfloat16 has group_size {self.group_size} and low_bits {self.low_bits}; both must be 0"
                )
            if self.rank:
                raise ValueError(f"bfloat16 has rank {self.rank}; it must be 0")
            return
        for name, value, allowed in (
            ("bits", self.bits, (16, *LOW_BITS)),
            ("group_size", self.group_size, GROUP_SIZES),
            ("low_bits", self.low_bits, LOW_BITS.get(self.bits, ())),
        ):
            if value not in allowed:
                raise ValueError(
                    f"{name} of a matrix of {self.bits} bits is {value}; it can be {', '.join(map(str, allowed))}"
                )

        if self.rank not in RANKS:
            raise ValueError(
                f"rank is {self.rank}; it can be multiples of {RANKS.step} up to {RANKS[-1]}"
            )

    @property
    def quantized(self) -> bool:
        return self.bits != 16

    @property
    def planes(self) -> tuple[int, ...]:
        """The bits of each, the upper ones first."""
        return (self.bits - self.low_bits, self.low_bits) if self.low_bits else (self.bits,)

    def groups(self, columns: int) -> int:
        """Of a row; the last one may be smaller."""
        return -(-columns // self.group_size) if self.quantized else 0

    @property
    def factor_columns(self) -> int:
        """Further columns of a matrix that hold a low-rank term's factors, in whole tiles."""
        tile = _abi.SK_COLUMN_TILE
        columns = self.rank * 8 // self.bits
        return -(-columns // tile) * tile

    def bytes(self, rows: int, columns: int) -> int:
        """Of all that must be read of a matrix: codes, scales and zeros, of a low-rank term's factors too,
        without padding. See `basis_bytes`."""
        groups = self.groups(columns) + self.groups(self.factor_columns)
        return rows * (columns * self.bits // 8 + self.rank + 3 * groups)

    def basis_bytes(self, columns: int) -> int:
        """Of the basis of a low-rank term, which q, k and v share, and gate and up; columns of the matrix as
        it is stored: of down the hidden size."""
        return 2 * self.rank * columns

    @property
    def name_with_rank(self) -> str:
        return f"{self} of rank {self.rank}" if self.rank else str(self)

    def __str__(self) -> str:
        if not self.quantized:
            return "bfloat16"
        return f"int{self.bits}" + ("" if self.group_size == 64 else f"-g{self.group_size}")


BFLOAT16 = MatrixFormat()
SCAN = MatrixFormat(4, 64)  # of the coarse copy of an LM head


@dataclass(frozen=True, slots=True)
class LayerFormats:
    """Of the matrices of a layer."""

    attention: MatrixFormat = BFLOAT16  # q, k, v and output
    gate_up: MatrixFormat = BFLOAT16
    down: MatrixFormat = BFLOAT16

    @property
    def matrices(self) -> tuple[MatrixFormat, MatrixFormat, MatrixFormat]:
        return self.attention, self.gate_up, self.down

    @property
    def planes(self) -> tuple[int, int]:
        """Bits of gate and up, and of down, that are in a plane of their own."""
        return self.gate_up.low_bits, self.down.low_bits

    def basis_shapes(self, hidden: int, heads: int) -> dict[str, tuple[int, int]]:
        """Of the bases of low-rank terms that there are, by field of LayerTensors: [rank, inputs], of down its
        outputs. heads: num_heads * head_dim."""
        shapes = {
            "qkv_basis": (self.attention.rank, hidden),
            "output_basis": (self.attention.rank, heads),
            "gate_up_basis": (self.gate_up.rank, hidden),
            "down_basis": (self.down.rank, hidden),
        }
        return {name: shape for name, shape in shapes.items() if shape[0]}


@dataclass(frozen=True, slots=True)
class DecoderFormats:
    """Of each kind of matrix; the embedding is always bfloat16. Raises ValueError of what cannot be."""

    attention: MatrixFormat = BFLOAT16  # of all layers but `overrides`, as `LayerFormats`
    gate_up: MatrixFormat = BFLOAT16
    down: MatrixFormat = BFLOAT16
    lm_head: MatrixFormat = BFLOAT16
    activation_bits: int = 16  # of the inputs of integer matrices: 16, or 8
    lm_head_scan: bool = False  # a coarse copy in SCAN beside an LM head in bfloat16
    # Layers of their own by rising index. Feed-forwards have the same planes in all layers: one threshold's
    # choice looks at the upper ones everywhere.
    overrides: tuple[tuple[int, LayerFormats], ...] = ()

    def __post_init__(self) -> None:
        if self.activation_bits not in (8, 16):
            raise ValueError(f"activation_bits is {self.activation_bits}; it can be 8 or 16")
        if self.lm_head_scan and self.lm_head.quantized:
            raise ValueError(f"lm_head is {self.lm_head}; beside a scan it can be bfloat16")
        if self.lm_head.rank:
            raise ValueError(f"lm_head has rank {self.lm_head.rank}; an LM head can have 0")
        below = -1
        for index, own in self.overrides:
            if index <= below:
                raise ValueError(f"overrides have layer {index} after {below}; indices must rise")
            if own == self.most_layers:
                raise ValueError(f"overrides of layer {index} change nothing; leave them out")
            if own.planes != self.most_layers.planes:
                raise ValueError(
                    f"layer {index} has lower planes of {own.planes} bits (gate and up, down) and others of "
                    f"{self.most_layers.planes}; they must be the same in all layers"
                )
            below = index

    @property
    def most_layers(self) -> LayerFormats:
        """Of the layers that are not in `overrides`."""
        return LayerFormats(self.attention, self.gate_up, self.down)

    def layer(self, index: int) -> LayerFormats:
        found = (own for override, own in self.overrides if override == index)
        return next(found, self.most_layers)

    def check_layers(self, count: int) -> None:
        """Raises ValueError of overrides beyond a decoder's so many layers."""
        if self.overrides and (last := self.overrides[-1][0]) >= count:
            raise ValueError(f"formats are given for layer {last}; the last one is {count - 1}")

    @property
    def quantized(self) -> bool:
        return self.lm_head.quantized or self.layers_quantized

    @property
    def layers_quantized(self) -> bool:
        """Whether prompts may be multiplied in another way than what is decoded."""
        layers = (self.most_layers, *(own for _, own in self.overrides))
        return any(matrix.quantized for layer in layers for matrix in layer.matrices)

    def __str__(self) -> str:
        """The feed-forward layers' format, and what differs: "int4 (attention g32, LM head int8)"; of layers
        of their own what else there is in them: "int4 (LM head int8, in 2 layers int4-g32 and int8)"."""
        main, low = str(self.gate_up), self.gate_up.low_bits
        others = {"attention": self.attention, "down": self.down, "LM head": self.lm_head}
        if self.lm_head_scan:
            del others["LM head"]
        notes = [
            f"{name} g{format.group_size}"
            if format.bits == self.gate_up.bits
            else f"{name} {format}"
            for name, format in others.items()
            if str(format) != main
        ]
        if self.lm_head_scan:
            notes.append("LM head int4+exact")
        if low:
            names = "gate, up and down" if self.down.low_bits == low else "gate and up"
            notes.insert(0, f"{names} in planes of {self.gate_up.bits - low} + {low} bits")
        ranks = {"attention": self.attention.rank, "gate and up": self.gate_up.rank}
        ranks["down"] = self.down.rank
        if len(set(ranks.values())) == 1:
            ranks = {"low-rank terms": self.down.rank}
        notes += [f"{name} of rank {rank}" for name, rank in ranks.items() if rank]
        if self.overrides:
            count = len(self.overrides)
            layers = "1 layer" if count == 1 else f"{count} layers"
            notes.append(f"in {layers} {self._names_in_overrides()}")
        if self.quantized and self.activation_bits != 16:
            notes.append(f"{self.activation_bits}-bit activations")
        return f"{main} ({', '.join(notes)})" if notes else main

    def _names_in_overrides(self) -> str:
        usual = self.most_layers.matrices
        pairs = (
            pair for _, own in self.overrides for pair in zip(own.matrices, usual, strict=True)
        )
        *names, last = sorted({own.name_with_rank for own, other in pairs if own != other})
        return f"{', '.join(names)} and {last}" if names else last
