#include "isa.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "error.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sk {
namespace {

#if defined(__x86_64__)

// By cpuid, not __builtin_cpu_supports, which not every compiler knows AMX by.
uint32_t detect_amx() {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr uint32_t kOsxsave = 1u << 27;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kOsxsave)) return 0;
  uint32_t xcr0 = 0, xcr0_high = 0;
  __asm__("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
  constexpr uint32_t kTileState = 3u << 17;
  if ((xcr0 & kTileState) != kTileState) return 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 0;
  uint32_t flags = 0;
  if (edx & (1u << 22)) flags |= SK_CPU_AMX_BF16;
  if (edx & (1u << 25)) flags |= SK_CPU_AMX_INT8;
  return flags;
}

uint32_t detect_flags() {
  uint32_t flags = detect_amx();
  if (__builtin_cpu_supports("avx2")) flags |= SK_CPU_AVX2;
  if (__builtin_cpu_supports("fma")) flags |= SK_CPU_FMA;
  if (__builtin_cpu_supports("f16c")) flags |= SK_CPU_F16C;
  if (__builtin_cpu_supports("avx512f")) flags |= SK_CPU_AVX512F;
  if (__builtin_cpu_supports("avx512bw")) flags |= SK_CPU_AVX512BW;
  if (__builtin_cpu_supports("avx512dq")) flags |= SK_CPU_AVX512DQ;
  if (__builtin_cpu_supports("avx512vl")) flags |= SK_CPU_AVX512VL;
  if (__builtin_cpu_supports("avx512vnni")) flags |= SK_CPU_AVX512VNNI;
  if (__builtin_cpu_supports("avx512bf16")) flags |= SK_CPU_AVX512BF16;
  if (__builtin_cpu_supports("avx512vbmi2")) flags |= SK_CPU_AVX512VBMI2;
  return flags;
}

#else

uint32_t detect_flags() { return 0; }

#endif

uint32_t cpu_flags() {
  static const uint32_t flags = detect_flags();
  return flags;
}

// The kernel gives a process the registers of AMX when it asks for them, once for all its threads.
bool amx_is_permitted() {
#if defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

sk_isa highest_isa() {
  constexpr uint32_t kAvx2 = SK_CPU_AVX2 | SK_CPU_FMA | SK_CPU_F16C;
  constexpr uint32_t kAvx512 = kAvx2 | SK_CPU_AVX512F | SK_CPU_AVX512BW | SK_CPU_AVX512DQ |
                               SK_CPU_AVX512VL | SK_CPU_AVX512VNNI;
  if ((cpu_flags() & kAvx512) == kAvx512) {
    constexpr uint32_t kAmx = SK_CPU_AMX_BF16 | SK_CPU_AMX_INT8 | SK_CPU_AVX512VBMI2;
    return (cpu_flags() & kAmx) == kAmx && amx_is_permitted() ? SK_ISA_AMX : SK_ISA_AVX512;
  }
  if ((cpu_flags() & kAvx2) == kAvx2) return SK_ISA_AVX2;
  return SK_ISA_PORTABLE;
}

const char* isa_name(int32_t isa) {
  switch (isa) {
    case SK_ISA_PORTABLE:
      return "portable";
    case SK_ISA_AVX2:
      return "avx2";
    case SK_ISA_AVX512:
      return "avx512";
    case SK_ISA_AMX:
      return "amx";
    default:
      return nullptr;
  }
}

// The value of SPARSE_KERNELS_ISA, "" if unset. Read once: the level must not change between two
// calls, and getenv races with a Python thread that sets os.environ.
const char* environment_isa() {
  struct Value {
    char text[32];
    Value() {
      const char* variable = std::getenv("SPARSE_KERNELS_ISA");
      std::snprintf(text, sizeof(text), "%s", variable == nullptr ? "" : variable);
    }
  };
  static const Value value;
  return value.text;
}

int32_t check_supported(int32_t isa, const char* origin) {
  if (isa <= highest_isa()) return SK_STATUS_OK;
  return fail(SK_STATUS_UNSUPPORTED, "%s asks for %s, but the highest level of this CPU is %s",
              origin, isa_name(isa), isa_name(highest_isa()));
}

int32_t default_isa(sk_isa* resolved) {
  const char* wanted = environment_isa();
  if (wanted[0] == '\0') {
    *resolved = highest_isa();
    return SK_STATUS_OK;
  }
  for (sk_isa isa : {SK_ISA_PORTABLE, SK_ISA_AVX2, SK_ISA_AVX512, SK_ISA_AMX}) {
    if (std::strcmp(wanted, isa_name(isa)) != 0) continue;
    *resolved = isa;
    return check_supported(isa, "SPARSE_KERNELS_ISA");
  }
  return fail(SK_STATUS_BAD_VALUE,
              "SPARSE_KERNELS_ISA is '%s'; it can be portable, avx2, avx512 or amx", wanted);
}

}  // namespace

int32_t resolve_isa(int32_t requested, sk_isa* resolved) {
  if (requested == SK_ISA_AUTO) return default_isa(resolved);
  if (isa_name(requested) == nullptr) {
    return fail(SK_STATUS_BAD_VALUE, "isa is %" PRId32 "; it can be %d (auto) to %d (amx)",
                requested, SK_ISA_AUTO, SK_ISA_AMX);
  }
  *resolved = static_cast<sk_isa>(requested);
  return check_supported(requested, "isa");
}

}  // namespace sk

int32_t sk_cpu_features(sk_cpu_info* info) {
  if (const int32_t status = sk::check_struct(info, "sk_cpu_info")) return status;
  sk_isa isa;
  if (const int32_t status = sk::resolve_isa(SK_ISA_AUTO, &isa)) return status;
  info->flags = sk::cpu_flags();
  info->isa = isa;
  info->highest_isa = sk::highest_isa();
  info->reserved = 0;
  return SK_STATUS_OK;
}
