/* What both C files speak of: kinds of numbers, vectors of sixteen, a matrix as it lies in memory.
 *
 * Knows: bits. Does not know: experts, layers.
 */
#ifndef UNDERSTUDY_COMMON_H
#define UNDERSTUDY_COMMON_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum kind { F32, F16, BF16, INT8, INT4, MXFP4 };

typedef float v16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i16 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2)));

static inline float from_bf16(uint16_t b) {
  uint32_t u = (uint32_t)b << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline uint16_t to_bf16(float f) { /* to nearest, ties to even, as torch rounds */
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline v16 sixteen_bf16(const void *p) {
  h16 h;
  memcpy(&h, p, 32);
  i16 u = __builtin_convertvector(h, i16) << 16;
  v16 v;
  memcpy(&v, &u, 64);
  return v;
}

static inline float total(v16 a) { /* always by halves */
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; i++) a[i] += a[i + width];
  return a[0];
}

struct matrix {
  const char *codes;
  const char *scales;  /* null where the kind has none */
  int64_t k, stride, scale_stride;  /* bytes from row to row */
  int kind, group;
};

/* y[m][t] = W[m] x[t], see experts.c */
int understudy_linears(const struct matrix *all, const int64_t *lines, int64_t count, int32_t dtype,
                       const char *x, char *const *y, int64_t n, int threads);

#endif
