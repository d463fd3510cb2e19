/* The C ABI of the native libraries of sparse_kernels.
 *
 * Conventions, for every function and struct:
 *
 * - A struct begins with `uint32_t abi_version; uint32_t struct_size;`. The caller sets both, to
 *   SK_ABI_VERSION and sizeof(the struct), in arguments and in results: a result that is smaller
 *   than the library believes must not be written to. Both must match exactly.
 * - A function returns an sk_status as int32_t. Unless it is SK_STATUS_OK the results are
 *   unchanged and sk_last_error() says what was wrong, naming the value and its limit.
 * - Every size, count and pointer that comes in is checked. Sizes are in bytes, times in seconds,
 *   rates in GB/s = 1e9 bytes a second.
 * - No C++ exception leaves the library. All functions may be called from several threads at once.
 * - SK_ABI_VERSION grows with every change that a caller compiled earlier would notice.
 *
 * tools/generate_abi.py reads this file and writes the ctypes mirror (sparse_kernels/_abi.py) and
 * the layout table (cpu/struct_layout.inc). It understands integer #defines, named enums, structs
 * of fixed-width numbers, arrays and pointers, and SK_API functions; it refuses everything else.
 */
#ifndef SPARSE_KERNELS_H_
#define SPARSE_KERNELS_H_

#include <stdint.h>

#define SK_API __attribute__((visibility("default")))

#define SK_ABI_VERSION 1

#define SK_MAX_THREADS 1024
/* A buffer smaller than this for each thread is refused; it is also the unit of its division. */
#define SK_READ_PROBE_BLOCK_BYTES 65536
#define SK_READ_PROBE_MAX_BUFFER_BYTES 1099511627776
#define SK_READ_PROBE_DEFAULT_PASS_BYTES 67108864
#define SK_READ_PROBE_MAX_PASSES 1048576
#define SK_READ_PROBE_MAX_SECONDS 600

#ifdef __cplusplus
extern "C" {
#endif

enum sk_status {
  SK_STATUS_OK = 0,
  SK_STATUS_ABI_MISMATCH = 1, /* abi_version or struct_size is not this library's */
  SK_STATUS_BAD_SIZE = 2,     /* a size or count outside its limits */
  SK_STATUS_BAD_VALUE = 3,    /* any other value outside its limits */
  SK_STATUS_NULL_POINTER = 4,
  SK_STATUS_OUT_OF_MEMORY = 5, /* memory, or threads */
  SK_STATUS_UNSUPPORTED = 6,   /* this CPU or this build cannot do it */
  SK_STATUS_INTERNAL = 7       /* a defect of the library */
};

/* Levels of the instruction set that kernels exist for, in ascending order. */
enum sk_isa {
  SK_ISA_AUTO = 0, /* the level that the environment variable SPARSE_KERNELS_ISA names
                      (portable, avx2, avx512; read once), else the CPU's highest */
  SK_ISA_PORTABLE = 1,
  SK_ISA_AVX2 = 2,  /* with FMA and F16C */
  SK_ISA_AVX512 = 3 /* F, BW, DQ, VL */
};

/* What the CPU has and the operating system lets programs use.
 * AMX needs one thing more: each process asks for its registers (arch_prctl ARCH_REQ_XCOMP_PERM).
 */
enum sk_cpu_flag {
  SK_CPU_AVX2 = 1,
  SK_CPU_FMA = 2,
  SK_CPU_F16C = 4,
  SK_CPU_AVX512F = 8,
  SK_CPU_AVX512BW = 16,
  SK_CPU_AVX512DQ = 32,
  SK_CPU_AVX512VL = 64,
  SK_CPU_AVX512VNNI = 128,
  SK_CPU_AVX512BF16 = 256,
  SK_CPU_AMX_INT8 = 512,
  SK_CPU_AMX_BF16 = 1024
};

struct sk_cpu_info {
  uint32_t abi_version;
  uint32_t struct_size;
  uint32_t flags;      /* sk_cpu_flag, or-ed; 0 on other than x86-64 */
  int32_t isa;         /* the sk_isa that SK_ISA_AUTO stands for */
  int32_t highest_isa; /* the highest sk_isa that this CPU runs */
  uint32_t reserved;
};

struct sk_read_probe_args {
  uint32_t abi_version;
  uint32_t struct_size;
  uint64_t buffer_bytes; /* cycled over; >= threads * SK_READ_PROBE_BLOCK_BYTES */
  uint64_t pass_bytes;   /* read between two looks at the clock; 0: the default */
  double seconds;        /* no pass begins after this; > 0, <= SK_READ_PROBE_MAX_SECONDS */
  uint32_t max_passes;   /* no more passes than this; 0: SK_READ_PROBE_MAX_PASSES */
  uint32_t threads;      /* 1 .. SK_MAX_THREADS */
  int32_t isa;           /* sk_isa */
  uint32_t reserved;     /* 0 */
};

struct sk_read_probe_result {
  uint32_t abi_version;
  uint32_t struct_size;
  uint64_t buffer_bytes;  /* really cycled over: rounded down to equal shares of blocks */
  uint64_t bytes_read;    /* by all passes */
  double seconds;         /* of all passes */
  double setup_seconds;   /* spent before them, on memory and threads */
  double median_gb_per_s; /* over the passes */
  double best_gb_per_s;   /* of one pass */
  uint32_t passes;
  uint32_t threads;
  int32_t isa;         /* the sk_isa used, never SK_ISA_AUTO */
  uint32_t pinned;     /* 1: each thread had a CPU of its own */
  uint32_t huge_pages; /* 1: the kernel took the advice to use huge pages */
  uint32_t reserved;
};

/* The SK_ABI_VERSION that the library was built with. */
SK_API uint32_t sk_abi_version(void);

/* Text of the last failure on the calling thread ("" before the first), valid until its next. */
SK_API const char* sk_last_error(void);

/* Where the compiler put a field of a struct of this header, and how many bytes it has; with a null
 * field_name, offset 0 and the size of the struct. */
SK_API int32_t sk_struct_layout(const char* struct_name, const char* field_name, uint64_t* offset,
                                uint64_t* bytes);

SK_API int32_t sk_cpu_features(struct sk_cpu_info* info);

/* Measures how fast `threads` threads together read memory: the ceiling of any kernel that streams
 * weights. Each thread fills and then cycles over its own share of the buffer. Threads are pinned
 * to CPUs of the caller's affinity mask if it has that many. Takes setup_seconds + seconds + the
 * rest of the last pass; filling the buffer takes of the order of 0.2 s a GiB. */
SK_API int32_t sk_read_probe(const struct sk_read_probe_args* args,
                             struct sk_read_probe_result* result);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* SPARSE_KERNELS_H_ */
