// What a scan is made of, checked, and bounds of its products' errors.
#include <algorithm>
#include <cmath>

#include "scan.hpp"

namespace sk {
namespace {

constexpr double kEpsilon = 0x1p-24;  // of float32, half a unit in the last place
constexpr uint32_t kGroup = 64;
constexpr double kLargestCode = 15;

int32_t check_errors(const float* errors, size_t count) {
  if (errors == nullptr) return fail(SK_STATUS_NULL_POINTER, "scan_errors is a null pointer");
  for (size_t i = 0; i < count; ++i) {
    if (!(errors[i] >= 0 && std::isfinite(errors[i]))) {
      return fail(SK_STATUS_BAD_VALUE, "scan_errors has %g at %zu; it must be finite and >= 0",
                  static_cast<double>(errors[i]), i);
    }
  }
  return SK_STATUS_OK;
}

double number_of(uint16_t bfloat16) {
  const uint32_t bits = uint32_t{bfloat16} << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// Of a float16 that is not negative and finite.
double number_of_half(uint16_t half) {
  const int exponent = half >> 10, fraction = half & 0x3ff;
  return exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(fraction + 1024, exponent - 25);
}

// U U^T.
std::vector<double> gram_of(const Matrix& basis) {
  constexpr size_t n = SK_SCAN_DIRECTIONS;
  std::vector<double> rows(n * basis.columns), gram(n * n);
  for (size_t i = 0; i < n; ++i) {
    const auto* row = reinterpret_cast<const uint16_t*>(basis.codes + i * basis.stride);
    for (size_t c = 0; c < basis.columns; ++c) rows[i * basis.columns + c] = number_of(row[c]);
  }
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < n; ++j) {
      const double *a = &rows[i * basis.columns], *b = &rows[j * basis.columns];
      for (size_t c = 0; c < basis.columns; ++c) gram[i * n + j] += a[c] * b[c];
    }
  }
  return gram;
}

// An upper bound of the root of the Gram matrix's largest eigenvalue: |U^T z| <= this |z|.
double norm_of(const std::vector<double>& gram) {
  double most = 0;
  for (size_t i = 0; i < SK_SCAN_DIRECTIONS; ++i) {
    double sum = 0;
    for (size_t j = 0; j < SK_SCAN_DIRECTIONS; ++j) {
      sum += std::fabs(gram[i * SK_SCAN_DIRECTIONS + j]);
    }
    most = std::max(most, sum);
  }
  return std::sqrt(most) * (1 + 1e-9);
}

double row_norm(const Matrix& matrix, size_t row) {
  const auto* numbers = reinterpret_cast<const uint16_t*>(matrix.codes + row * matrix.stride);
  double squares = 0;
  for (size_t c = 0; c < matrix.columns; ++c) {
    const double number = number_of(numbers[c]);
    squares += number * number;
  }
  return std::sqrt(squares);
}

// The largest norm that codes of a row can have in groups [first, last).
double largest_norm(const Matrix& matrix, size_t row, size_t first, size_t last) {
  double squares = 0;
  const size_t begin = row / SK_ROW_TILE * matrix.groups * SK_ROW_TILE + row % SK_ROW_TILE;
  for (size_t g = first; g < last; ++g) {
    const double scale = number_of_half(matrix.scales[begin + g * SK_ROW_TILE]);
    squares += scale * scale;
  }
  return kLargestCode * std::sqrt(double{kGroup} * squares);
}

// To the errors of the weights is added what rounding makes of both products. With m the largest
// norm of the scan's row, n of its part for z, and X = |x| + |z|, these are
//
//   8 / 65024 m X                    inputs as integers: half a unit of their group's largest off
//   (2 groups + 8) 2^-24 2 m X       float32 sums of each group's two terms, of codes and of zeros
//   e |w| |x|                        the exact product, of inputs of 16 bits or more, in float32:
//                                    e = 2^-16 + (2 hidden + 64) 2^-24
//   e sqrt(directions) |u| n |x|     the same of z, where u is the longest of the basis
void bound_errors(const sk_model_args& args, const Matrix& lm_head, ScanHead* scan) {
  const double basis = norm_of(scan->gram);
  const double exact = 0x1p-16 + (2.0 * args.hidden_size + 64) * kEpsilon;
  const double rough =
      0.51 * std::sqrt(double{kGroup}) / 32512 + 2.1 * (2.0 * scan->matrix.groups + 8) * kEpsilon;
  double longest = 0;  // of the basis
  for (size_t i = 0; i < SK_SCAN_DIRECTIONS; ++i) {
    longest = std::max(longest, scan->gram[i * SK_SCAN_DIRECTIONS + i]);
  }
  scan->basis_error = std::sqrt(double{SK_SCAN_DIRECTIONS} * longest) * exact;
  scan->along.resize(args.vocab_size);
  scan->across.resize(args.vocab_size);
  for (size_t i = 0; i < args.vocab_size; ++i) {
    const double along = args.scan_errors[i], across = args.scan_errors[args.vocab_size + i];
    const size_t groups = scan->matrix.groups, of_x = groups - SK_SCAN_DIRECTIONS / kGroup;
    const double m = largest_norm(scan->matrix, i, 0, groups);
    const double n = largest_norm(scan->matrix, i, of_x, groups);
    const double more = exact * row_norm(lm_head, i) + rough * m + scan->basis_error * n;
    // |x| + |z| <= (1 + |U|) |z| + |x - U^T z|
    scan->along[i] = static_cast<float>((along + (1 + basis) * more) * (1 + 1e-6));
    scan->across[i] = static_cast<float>((across + more) * (1 + 1e-6));
  }
}

}  // namespace

int32_t take_scan(const sk_model_args& args, const MatrixKinds& kinds, Model* model) {
  SK_TRY(check_struct(&args.scan, "scan"));
  if (args.scan.codes.data == nullptr) return SK_STATUS_OK;
  ScanHead& scan = model->scan;
  if (model->lm_head.bits != 16) {
    return fail(SK_STATUS_UNSUPPORTED, "lm_head has %" PRIu32 " bits; beside a scan it can have 16",
                model->lm_head.bits);
  }
  // 8 bits would make the errors of the inputs as large as those of the weights.
  const MatrixKinds exact_inputs = {kinds.bfloat16, &model->kernels->integer16,
                                    &model->kernels->integer16, kinds.all_finite};
  const uint64_t columns = uint64_t{model->columns} + SK_SCAN_DIRECTIONS;
  SK_TRY(take_matrix("scan", args.scan, args.vocab_size, columns, exact_inputs, &scan.matrix));
  if (scan.matrix.bits != 4 || scan.matrix.low != nullptr || scan.matrix.group != kGroup) {
    return fail(SK_STATUS_UNSUPPORTED,
                "scan has %" PRIu32 " bits and group_size %" PRIu32
                "; it can have 4 in one plane, and 64",
                scan.matrix.bits + scan.matrix.low_bits, scan.matrix.group);
  }
  SK_TRY(take_matrix("scan_basis", args.scan_basis, SK_SCAN_DIRECTIONS, args.hidden_size, kinds,
                     &scan.basis));
  if (scan.basis.bits != 16) {
    return fail(SK_STATUS_UNSUPPORTED, "scan_basis has %" PRIu32 " bits; it can have 16",
                scan.basis.bits);
  }
  SK_TRY(check_errors(args.scan_errors, size_t{2} * args.vocab_size));
  scan.gram = gram_of(scan.basis);
  bound_errors(args, model->lm_head, &scan);
  scan.used = true;
  return SK_STATUS_OK;
}

}  // namespace sk
