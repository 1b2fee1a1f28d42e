/* A matrix of codes as plain numbers, for prompts: many tokens pay for unpacking it once.
 *
 * Knows: how int8, int4 and MXFP4 lie in memory. Does not know: experts, products.
 *
 * Each weight is worked out in fp32 and rounded once, as `formats` does with torch: the same bits.
 */
#include "common.h"

typedef uint8_t b16 __attribute__((vector_size(16), aligned(1)));
typedef _Float16 f16x16 __attribute__((vector_size(32), aligned(2)));
typedef uint32_t u16x __attribute__((vector_size(64), aligned(4)));

/* sixteen numbers to element `at` of a row, rounded as torch rounds */
static inline void put(char *row, int64_t at, v16 v, int dtype) {
  if (dtype == F32) {
    memcpy(row + 4 * at, &v, 64);
  } else if (dtype == F16) {
    f16x16 h = __builtin_convertvector(v, f16x16);
    memcpy(row + 2 * at, &h, 32);
  } else {
    u16x u, nan;
    memcpy(&u, &v, 64);
    nan = (u16x)((u & 0x7fffffff) > 0x7f800000);
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    h16 h = __builtin_convertvector((u & ~nan) | (nan & 0x7fc0), h16);
    memcpy(row + 2 * at, &h, 32);
  }
}

static inline v16 as_floats(b16 b) {
  return __builtin_convertvector(__builtin_convertvector(b, i16), v16);
}

/* signed bytes, widened as unsigned ones: gcc finds the instruction for those only */
static inline v16 signed_floats(b16 b) { return as_floats(b ^ 128) - 128; }

static void row_of_int8(const char *codes, float scale, int64_t k, char *out, int dtype) {
  b16 b = {0};
  for (int64_t i = 0; i + 16 <= k; i += 16) {
    memcpy(&b, codes + i, 16);
    put(out, i, signed_floats(b) * scale, dtype);
  }
  const int64_t left = k % 16, size = dtype == F32 ? 4 : 2;
  if (left) { /* through a vector that is longer than they are */
    char room[64];
    memcpy(&b, codes + k - left, left);
    put(room, 0, signed_floats(b) * scale, dtype);
    memcpy(out + (k - left) * size, room, left * size);
  }
}

/* 32 weights in 16 bytes: the low halves are the first sixteen */
static void row_of_int4(const char *codes, const _Float16 *scales, int64_t group, int64_t k,
                        char *out, int dtype) {
  for (int64_t i = 0; i < k; i += 32) {
    const float scale = (float)scales[i / group];
    b16 b;
    memcpy(&b, codes + i / 2, 16);
    put(out, i, (as_floats(b & 15) - 8) * scale, dtype);
    put(out, i + 16, (as_floats(b >> 4) - 8) * scale, dtype);
  }
}

/* Sixteen weights of e2m1 that lie in two words, low half first, each twice what it means: half a
 * power of two, exact for all 256 exponents, makes up for it. */
static inline v16 twice(uint32_t first, uint32_t second) {
  const u16x words = {first,  first,  first,  first,  first,  first,  first,  first,
                      second, second, second, second, second, second, second, second};
  const u16x codes = words >> (u16x){0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
  const u16x exponent = codes >> 1 & 3, mantissa = codes & 1;
  const u16x above = (u16x)(exponent > 0); /* all ones where the leading bit is there */
  const u16x size = ((2 & above) | mantissa) << (exponent - (1 & above));
  v16 v = __builtin_convertvector((i16)size, v16);
  u16x bits;
  memcpy(&bits, &v, 64);
  bits |= (codes & 8) << 28; /* the sign, of a zero too */
  memcpy(&v, &bits, 64);
  return v;
}

/* 32 weights in 16 bytes: byte i holds weights 2i (low half) and 2i + 1 */
static void row_of_mxfp4(const char *codes, const uint8_t *scales, int64_t k, char *out,
                         int dtype) {
  for (int64_t i = 0; i < k; i += 32) {
    const uint32_t e = scales[i / 32], bits = e > 1 ? (e - 1) << 23 : 0x00200000u << e;
    float half; /* 2^(e - 128), below 2^-126 a denormal */
    memcpy(&half, &bits, 4);
    uint32_t w[4];
    memcpy(w, codes + i / 2, 16);
    put(out, i, twice(w[0], w[1]) * half, dtype);
    put(out, i + 16, twice(w[2], w[3]) * half, dtype);
  }
}

/* out [lines, k] in `dtype`, its rows one after the other */
void understudy_unpack(const struct matrix *m, int64_t lines, char *out, int dtype, int threads) {
  const int64_t bytes = m->k * (dtype == F32 ? 4 : 2);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < lines; i++) {
    const char *codes = m->codes + i * m->stride, *scales = m->scales + i * m->scale_stride;
    char *row = out + i * bytes;
    if (m->kind == INT8) {
      row_of_int8(codes, ((const float *)m->scales)[i], m->k, row, dtype);
    } else if (m->kind == INT4) {
      row_of_int4(codes, (const _Float16 *)scales, m->group, m->k, row, dtype);
    } else {
      row_of_mxfp4(codes, (const uint8_t *)scales, m->k, row, dtype);
    }
  }
}
