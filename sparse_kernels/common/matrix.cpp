#include "matrix.hpp"

#include <algorithm>

namespace sk {

int32_t check_range(const char* name, uint64_t value, uint64_t low, uint64_t high) {
  if (value >= low && value <= high) return SK_STATUS_OK;
  return fail(SK_STATUS_BAD_SIZE, "%s is %" PRIu64 "; it can be %" PRIu64 " to %" PRIu64, name,
              value, low, high);
}

namespace {

constexpr uint64_t round_up(uint64_t value, uint64_t unit) {
  return (value + unit - 1) / unit * unit;
}

// Room for `rows` rows of `columns` elements, both in whole tiles.
int32_t check_plane(const char* name, const sk_plane& plane, uint64_t rows, uint64_t columns) {
  SK_TRY(check_struct(&plane, name));
  if (plane.data == nullptr) return fail(SK_STATUS_NULL_POINTER, "%s.data is a null pointer", name);
  if (plane.reserved != 0) {
    return fail(SK_STATUS_BAD_VALUE, "%s.reserved is %" PRIu32 "; it must be 0", name,
                plane.reserved);
  }
  const uint64_t tile_bytes = plane.bits * SK_COLUMN_TILE / 8,
                 row_bytes = columns / 64 * tile_bytes;
  // Kernels read whole tiles of columns, each within one line.
  if (reinterpret_cast<uintptr_t>(plane.data) % 8 != 0 || plane.row_stride % 8 != 0 ||
      (tile_bytes % 32 == 0 && (reinterpret_cast<uintptr_t>(plane.data) | plane.row_stride) %
                                       (tile_bytes % 64 == 0 ? 64 : 32) !=
                                   0)) {
    return fail(SK_STATUS_BAD_VALUE,
                "%s.data or its row_stride is not aligned to its tiles of %" PRIu64 " bytes", name,
                tile_bytes);
  }
  SK_TRY(check_range("a row_stride", plane.row_stride, row_bytes, uint64_t{1} << 32));
  // The last row may end before its stride: rows of two matrices can stand side by side.
  const uint64_t needed = (rows - 1) * plane.row_stride + row_bytes;
  if (plane.bytes >= needed) return SK_STATUS_OK;
  return fail(SK_STATUS_BAD_SIZE,
              "%s has %" PRIu64 " bytes; %" PRIu64 " rows of %" PRIu64 " bytes need %" PRIu64, name,
              plane.bytes, rows, plane.row_stride, needed);
}

int32_t check_scales(const char* name, const sk_matrix& from, uint64_t row_tiles, uint32_t groups,
                     uint32_t bits) {
  if (from.scales == nullptr || from.zeros == nullptr) {
    return fail(SK_STATUS_NULL_POINTER, "%s.scales or zeros is a null pointer", name);
  }
  const uint64_t count = row_tiles * groups * SK_ROW_TILE;
  if (from.scales_count != count || from.zeros_count != count) {
    return fail(SK_STATUS_BAD_SIZE,
                "%s has %" PRIu64 " scales and %" PRIu64 " zeros; it must have %" PRIu64, name,
                from.scales_count, from.zeros_count, count);
  }
  for (uint64_t i = 0; i < count; ++i) {
    if (from.scales[i] >= 0x7c00u) {  // the sign, or all bits of the exponent
      return fail(SK_STATUS_BAD_VALUE, "%s has a scale that is negative or not finite at %" PRIu64,
                  name, i);
    }
    if (from.zeros[i] >> bits != 0) {
      return fail(SK_STATUS_BAD_VALUE,
                  "%s has the zero %d at %" PRIu64 ", but codes of %" PRIu32 " bits", name,
                  from.zeros[i], i, bits);
    }
  }
  return SK_STATUS_OK;
}

int32_t check_finite(const char* name, const Matrix& matrix, uint64_t rows,
                     const MatrixKinds& kinds) {
  for (uint64_t row = 0; row < rows; ++row) {
    const auto* at = reinterpret_cast<const uint16_t*>(matrix.codes + row * matrix.stride);
    if (!kinds.all_finite(at, matrix.columns)) {
      return fail(SK_STATUS_BAD_VALUE, "%s has a value that is not finite in row %" PRIu64, name,
                  row);
    }
  }
  return SK_STATUS_OK;
}

// Bits of a code in both planes that kernels exist for.
bool known_bits(uint32_t codes, uint32_t low) {
  return low == 0
             ? codes == 16 || codes == 8 || codes == 4
             : (codes == 4 && low == 4) || (codes == 3 && low == 1) || (codes == 2 && low == 2);
}

int32_t check_rank(const char* name, const sk_matrix& from, uint32_t bits) {
  if (from.rank == 0) return SK_STATUS_OK;
  if (bits == 16) {
    return fail(SK_STATUS_UNSUPPORTED,
                "%s.rank is %" PRIu32
                "; with bfloat16, which has no errors to make up for, it is 0",
                name, from.rank);
  }
  if (from.rank % SK_RANK_TILE == 0 && from.rank <= SK_MAX_RANK) return SK_STATUS_OK;
  return fail(SK_STATUS_BAD_SIZE, "%s.rank is %" PRIu32 "; it can be multiples of %d up to %d",
              name, from.rank, SK_RANK_TILE, SK_MAX_RANK);
}

}  // namespace

uint32_t factor_columns(uint32_t bits, uint32_t rank) {
  const uint32_t columns = bits == 4 ? 2 * rank : rank;
  return (columns + SK_COLUMN_TILE - 1) / SK_COLUMN_TILE * SK_COLUMN_TILE;
}

Matrix upper_bits(const Matrix& matrix) {
  Matrix upper = matrix;
  upper.low = nullptr;
  upper.low_stride = upper.low_bits = 0;
  upper.unit = static_cast<float>(1u << matrix.low_bits);
  upper.middle = (upper.unit - 1) / 2;
  return upper;
}

int32_t take_layer_matrix(const char* name, const sk_matrix& from, uint64_t rows, uint64_t columns,
                          const MatrixKinds& kinds, Matrix* out) {
  SK_TRY(check_struct(&from, name));
  if (from.rows != rows || from.columns != columns) {
    return fail(SK_STATUS_BAD_SIZE,
                "%s is %" PRIu32 " x %" PRIu32 ", the description asks for %" PRIu64 " x %" PRIu64,
                name, from.rows, from.columns, rows, columns);
  }
  SK_TRY(check_struct(&from.low, name));
  const uint32_t low_bits = from.low.data == nullptr ? 0 : from.low.bits;
  if (!known_bits(from.codes.bits, low_bits)) {
    return fail(SK_STATUS_BAD_VALUE,
                "%s has planes of %" PRIu32 " and %" PRIu32
                " bits; they can be 16, 8, 4 + 4, 4, 3 + 1 or 2 + 2",
                name, from.codes.bits, low_bits);
  }
  const bool integers = from.codes.bits != 16;
  if (integers ? from.group_size != 32 && from.group_size != 64 && from.group_size != 128
               : from.group_size != 0) {
    return fail(SK_STATUS_BAD_VALUE,
                "%s.group_size is %" PRIu32 "; it can be 32, 64 or 128, and 0 with bfloat16", name,
                from.group_size);
  }
  SK_TRY(check_rank(name, from, from.codes.bits));
  const uint64_t stored_rows = round_up(rows, SK_ROW_TILE);
  Matrix matrix = {};
  matrix.columns = matrix.factors = static_cast<uint32_t>(round_up(columns, SK_COLUMN_TILE));
  if (from.rank != 0) {
    // Groups of these have nothing of the others.
    matrix.factors = static_cast<uint32_t>(round_up(matrix.columns, from.group_size));
    matrix.columns = matrix.factors + factor_columns(from.codes.bits + low_bits, from.rank);
    matrix.rank = from.rank;
  }
  matrix.codes = static_cast<const uint8_t*>(from.codes.data);
  matrix.stride = from.codes.row_stride;
  matrix.bits = from.codes.bits;
  matrix.unit = 1;
  SK_TRY(check_plane(name, from.codes, stored_rows, matrix.columns));
  if (low_bits != 0) {
    SK_TRY(check_plane(name, from.low, stored_rows, matrix.columns));
    matrix.low = static_cast<const uint8_t*>(from.low.data);
    matrix.low_stride = from.low.row_stride;
    matrix.low_bits = low_bits;
  }
  if (!integers) {
    matrix.products = matrix.prompts = kinds.bfloat16;
    *out = matrix;
    return check_finite(name, matrix, stored_rows, kinds);
  }
  matrix.group = from.group_size;
  matrix.groups = (matrix.columns + matrix.group - 1) / matrix.group;
  matrix.scales = from.scales;
  matrix.zeros = from.zeros;
  matrix.products = kinds.integers;
  matrix.prompts = kinds.prompts;
  *out = matrix;
  return check_scales(name, from, stored_rows / SK_ROW_TILE, matrix.groups, matrix.bits + low_bits);
}

int32_t take_matrix(const char* name, const sk_matrix& from, uint64_t rows, uint64_t columns,
                    const MatrixKinds& kinds, Matrix* out) {
  if (from.rank != 0) {
    return fail(SK_STATUS_UNSUPPORTED,
                "%s.rank is %" PRIu32 "; only matrices of layers have low-rank terms", name,
                from.rank);
  }
  return take_layer_matrix(name, from, rows, columns, kinds, out);
}

int32_t take_basis(const char* name, const sk_matrix& from, const Matrix& matrix, uint64_t columns,
                   const MatrixKinds& kinds, Matrix* out) {
  if (matrix.rank == 0) return SK_STATUS_OK;
  if (from.codes.data == nullptr) {
    return fail(SK_STATUS_NULL_POINTER, "%s is missing; its low-rank term has rank %" PRIu32, name,
                matrix.rank);
  }
  SK_TRY(take_matrix(name, from, matrix.rank, columns, kinds, out));
  if (out->bits == 16) return SK_STATUS_OK;
  return fail(SK_STATUS_UNSUPPORTED, "%s has %" PRIu32 " bits; it can have 16", name, out->bits);
}

}  // namespace sk
