// How fast this processor multiplies and adds, and how fast it reads: loops that do nothing else.
//
// Every variant of a kind of arithmetic (0: fp32, 1: bf16, 2: int8) keeps its accumulators in registers, enough of them
// that no multiply-add waits for the one before. A variant is compiled for its own instructions, whatever the rest of
// the file is compiled for, and asked for only where processor and system have them.

#include <chrono>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

// Compilers from 2021 on know all the instructions below; older ones know AVX-512 and no more.
#if defined(__clang__)
#define MODERN (__clang_major__ >= 12)
#else
#define MODERN (__GNUC__ >= 11)
#endif

namespace {

constexpr int64_t kTurns = 4096;  // of a loop, between two looks at the clock

struct Variant {
  const char *name;
  bool (*there)();
  int64_t (*turns)();  // multiply-adds done
};

// What is computed must reach somewhere, or a compiler leaves it out.
volatile int sink;

bool always() { return true; }

// A register of 128 bits in the compiler's own notation: for processors that have no variant of their own.
typedef float Floats __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(16)));

// Has the compiler believe that a register was changed, so that it neither joins turns nor leaves them out.
#if defined(__x86_64__)
#define KEPT(vector) __asm__ volatile("" : "+x"(vector))
#elif defined(__aarch64__)
#define KEPT(vector) __asm__ volatile("" : "+w"(vector))
#else
#define KEPT(vector)
#endif

// Puts 16 accumulators through `step`, turn after turn. They have names, since an array is kept in memory.
template <typename Vector, typename Step> int64_t chained(Vector start, int64_t macs, Step step) {
  Vector s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15;
  s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = s9 = s10 = s11 = s12 = s13 = s14 = s15 = start;
  for (int64_t turn = 0; turn < kTurns; ++turn) {
#define STEP(sum) sum = step(sum); KEPT(sum);
    STEP(s0) STEP(s1) STEP(s2) STEP(s3) STEP(s4) STEP(s5) STEP(s6) STEP(s7)
    STEP(s8) STEP(s9) STEP(s10) STEP(s11) STEP(s12) STEP(s13) STEP(s14) STEP(s15)
#undef STEP
  }
  s0 = s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9 + s10 + s11 + s12 + s13 + s14 + s15;
  sink = int(s0[0]);
  return kTurns * 16 * macs;
}

template <typename Vector> int64_t plain_turns() {
  constexpr int kLanes = sizeof(Vector) / sizeof(Vector{}[0]);
  Vector factor, term;
  for (int i = 0; i < kLanes; ++i) term[i] = 1;
  factor = sizeof(term[0]) == 2 ? term + term + term : term / (term + term);  // times a half: the sums settle at 2
  KEPT(factor);
  KEPT(term);
  return chained(term, kLanes, [=](Vector sum) { return sum * factor + term; });
}

#if defined(__x86_64__)

struct Cpu {
  bool avx2 = false, avx512 = false, vnni512 = false, vnni = false, bf16 = false, amx_int8 = false, amx_bf16 = false;
  Cpu() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return;  // the system keeps no wide registers
    const bool fma = c >> 12 & 1;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6, tiles = (low & 0x60000) == 0x60000;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = ymm && fma && (b >> 5 & 1);
    avx512 = zmm && (b >> 16 & 1);
    vnni512 = avx512 && (c >> 11 & 1);
    const bool granted = tiles && (d >> 24 & 1) && may_use_tiles();
    amx_bf16 = granted && (d >> 22 & 1);
    amx_int8 = granted && (d >> 25 & 1);
    if (a < 1 || !__get_cpuid_count(7, 1, &a, &b, &c, &d)) return;
    vnni = ymm && (a >> 4 & 1);
    bf16 = avx512 && (a >> 5 & 1);
  }
  static bool may_use_tiles() {
#if defined(__linux__)
    return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
#else
    return false;
#endif
  }
};

const Cpu &cpu() {
  static const Cpu found;
  return found;
}

#define FOR(flag) [] { return cpu().flag; }

// A turn puts 24 accumulators of 512 bits, or 12 of 256, through `step`, with `left` in register 0 and `right` in 1. It
// is all assembly: where an intrinsic reads and writes one register, compilers keep the accumulators in memory.
#define ZMM "2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25"
#define YMM "2,3,4,5,6,7,8,9,10,11,12,13"
#define LOOP(name, features, wide, which, chains, macs, left, right, step)                                             \
  __attribute__((target(features))) int64_t name() {                                                                   \
    int64_t turns = kTurns;                                                                                            \
    __asm__ volatile("vmovd %1, %%xmm0\n\tvpbroadcastd %%xmm0, %%" wide "0\n\t"                                        \
                     "vmovd %2, %%xmm1\n\tvpbroadcastd %%xmm1, %%" wide "1\n\t"                                        \
                     ".irp n," which "\n\tvpbroadcastd %%xmm1, %%" wide "\\n\n\t.endr\n\t"                               \
                     "1:\n\t.irp n," which "\n\t" step "\n\t.endr\n\tdec %0\n\tjnz 1b\n\tvzeroupper"                  \
                     : "+r"(turns)                                                                                     \
                     : "r"(left), "r"(right)                                                                           \
                     : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",  \
                       "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");                                                   \
    return kTurns * (chains) * (macs);                                                                                 \
  }

LOOP(fma_avx2, "avx2,fma", "ymm", YMM, 12, 8, 0x3f000000, 0x3f800000, "vfmadd213ps %%ymm1, %%ymm0, %%ymm\\n")
LOOP(fma_avx512, "avx512f", "zmm", ZMM, 24, 16, 0x3f000000, 0x3f800000, "vfmadd213ps %%zmm1, %%zmm0, %%zmm\\n")
// Two products of 8 bits and their sum of 16, two of those (times 1) and their sum of 32, and the sum of these.
LOOP(madd_avx2, "avx2", "ymm", YMM, 12, 32, 0x05050505, 0x00010001,
     "vpmaddubsw %%ymm0, %%ymm\\n, %%ymm14\n\tvpmaddwd %%ymm1, %%ymm14, %%ymm14\n\tvpaddd %%ymm14, %%ymm\\n, %%ymm\\n")
#if MODERN
LOOP(dot_vnni, "avx2,avxvnni", "ymm", YMM, 12, 32, 0x05050505, 0x03030303, "%{vex%} vpdpbusd %%ymm1, %%ymm0, %%ymm\\n")
LOOP(dot_vnni512, "avx512f,avx512vnni", "zmm", ZMM, 24, 64, 0x05050505, 0x03030303,
     "vpdpbusd %%zmm1, %%zmm0, %%zmm\\n")
LOOP(dot_bf16, "avx512f,avx512bf16", "zmm", ZMM, 24, 32, 0x3f803f80, 0x34003400,
     "vdpbf16ps %%zmm1, %%zmm0, %%zmm\\n")

struct alignas(64) Tiles {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Four sums (tiles 0-3) of 16 x 16 numbers, products of two by two tiles (4-7) of 16 rows of 64 bytes. The asm says that
// all of `config` is read: GCC declares that _tile_loadconfig reads its first eight bytes only, leaves the other stores
// out, and the instruction faults on what lies there.
#define TILES(name, features, instruction, macs)                                                                       \
  __attribute__((target(features))) int64_t name() {                                                                   \
    const Tiles config;                                                                                                \
    __asm__ volatile("" : : "r"(&config) : "memory");                                                                  \
    _tile_loadconfig(&config);                                                                                         \
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);                                                        \
    _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);                                                        \
    for (int64_t turn = 0; turn < kTurns; ++turn) {                                                                    \
      instruction(0, 4, 6);                                                                                            \
      instruction(1, 4, 7);                                                                                            \
      instruction(2, 5, 6);                                                                                            \
      instruction(3, 5, 7);                                                                                            \
    }                                                                                                                  \
    _tile_release();                                                                                                   \
    return kTurns * 4 * (macs);                                                                                        \
  }

TILES(tiles_int8, "amx-tile,amx-int8", _tile_dpbssd, 16 * 16 * 64)
TILES(tiles_bf16, "amx-tile,amx-bf16", _tile_dpbf16ps, 16 * 16 * 32)
#endif

const Variant kFp32[] = {{"AVX-512 vfmadd (512 bits)", FOR(avx512), fma_avx512}, {"AVX2 vfmadd (256 bits)", FOR(avx2), fma_avx2},
                         {"vector multiply-add of the compiler (128 bits)", always, plain_turns<Floats>}};
const Variant kBf16[] = {
#if MODERN
    {"AMX tdpbf16ps (tiles)", FOR(amx_bf16), tiles_bf16}, {"AVX-512 vdpbf16ps (512 bits)", FOR(bf16), dot_bf16},
#endif
    {nullptr, nullptr, nullptr}};
const Variant kInt8[] = {
#if MODERN
    {"AMX tdpbssd (tiles)", FOR(amx_int8), tiles_int8}, {"AVX-512 vpdpbusd (512 bits)", FOR(vnni512), dot_vnni512},
    {"AVX-VNNI vpdpbusd (256 bits)", FOR(vnni), dot_vnni},
#endif
    {"AVX2 vpmaddubsw (256 bits)", FOR(avx2), madd_avx2},
    {"16-bit vector multiply-add of the compiler (128 bits)", always, plain_turns<Shorts>}};

#else

// On these the whole file is compiled for the processor it runs on, so what the compiler announces is there.
#if defined(__ARM_FEATURE_DOTPROD)
int64_t dot_int8() {
  const int8x16_t a = vdupq_n_s8(5), b = vdupq_n_s8(3);
  return chained(vdupq_n_s32(1), 16, [=](int32x4_t sum) { return vdotq_s32(sum, a, b); });
}
#endif
#if defined(__ARM_FEATURE_MATMUL_INT8)
int64_t matrix_int8() {
  const int8x16_t a = vdupq_n_s8(5), b = vdupq_n_s8(3);
  return chained(vdupq_n_s32(1), 32, [=](int32x4_t sum) { return vmmlaq_s32(sum, a, b); });
}
#endif
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
int64_t matrix_bf16() {
  const bfloat16x8_t a = vreinterpretq_bf16_u16(vdupq_n_u16(0x3f80)), b = vreinterpretq_bf16_u16(vdupq_n_u16(0x3400));
  return chained(vdupq_n_f32(1), 16, [=](float32x4_t sum) { return vbfmmlaq_f32(sum, a, b); });
}
#endif

const Variant kFp32[] = {{"vector multiply-add of the compiler (128 bits)", always, plain_turns<Floats>}};
const Variant kBf16[] = {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    {"NEON bfmmla (128 bits)", always, matrix_bf16},
#endif
    {nullptr, nullptr, nullptr}};
const Variant kInt8[] = {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    {"NEON smmla (128 bits)", always, matrix_int8},
#endif
#if defined(__ARM_FEATURE_DOTPROD)
    {"NEON sdot (128 bits)", always, dot_int8},
#endif
    {"16-bit vector multiply-add of the compiler (128 bits)", always, plain_turns<Shorts>}};

#endif

template <int N> const Variant *found(const Variant (&variants)[N], int which) {
  for (const Variant &each : variants)
    if (each.name && each.there() && which-- == 0) return &each;
  return nullptr;
}

const Variant *variant(int kind, int which) {
  return kind == 0 ? found(kFp32, which) : kind == 1 ? found(kBf16, which) : found(kInt8, which);
}

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Calls `work`, which says how much it did, for `least_ns` or more; out: how much in all, and how long it took.
template <typename Work> void timed(int64_t least_ns, int64_t *out, Work work) {
  const int64_t start = now();
  int64_t done = 0, passed;
  do {
    done += work();
    passed = now() - start;
  } while (passed < least_ns);
  out[0] = done, out[1] = passed;
}

typedef uint64_t Words __attribute__((vector_size(64), aligned(8), may_alias));

int64_t read_once(const char *buffer, int64_t num_bytes) {
  constexpr int kChains = 8;
  Words sums[kChains]{};
  int64_t at = 0;
  for (; at + int64_t(sizeof sums) <= num_bytes; at += sizeof sums)
    for (int i = 0; i < kChains; ++i) sums[i] ^= reinterpret_cast<const Words *>(buffer + at)[i];
  for (int i = 1; i < kChains; ++i) sums[0] ^= sums[i];
  sink = int(sums[0][0] ^ sums[0][7]);
  return at;
}

}  // namespace

extern "C" {

// The name of a variant of a kind of arithmetic that this processor has, or null: they are counted from 0.
const char *variant_name(int kind, int which) {
  const Variant *chosen = variant(kind, which);
  return chosen ? chosen->name : nullptr;
}

// out (2): multiply-adds done, nanoseconds it took.
void multiply(int kind, int which, int64_t least_ns, int64_t *out) {
  const Variant *chosen = variant(kind, which);
  timed(least_ns, out, chosen->turns);
}

// out (2): bytes read, nanoseconds it took. The buffer is read from start to end, again and again.
void read_all(const char *buffer, int64_t num_bytes, int64_t least_ns, int64_t *out) {
  timed(least_ns, out, [=] { return read_once(buffer, num_bytes); });
}
}
