/* Matrix times a few vectors, for the weights of experts as they lie in memory.
 *
 * Knows: addresses, shapes, how weights are encoded. Does not know: torch, experts' names, where
 * the bytes came from.
 *
 * One output element is one dot product, computed by one thread in an order that depends on the
 * length K alone: not on the number of threads, not on how many experts or tokens share a call.
 * That is what makes a token's bits independent of the budget. Work is handed out in chunks, so a
 * core that a reader borrowed delays nobody.
 *
 * Built with -march=native: the instruction set is chosen by the compiler. With AVX512-BF16, bf16
 * weights meet bf16 inputs in vdpbf16ps; with AVX512-VNNI, 8- and 4-bit weights meet bf16 inputs in
 * vpdpbusd; else everything is widened to fp32 vectors, which GCC and clang lower to whatever the
 * machine has.
 *
 * OpenMP's symbols are left open: they are those of the library that torch has loaded, so that its
 * threads and ours are the same and never spin against each other.
 */
#include "common.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define BF16_DOT 1
#else
#define BF16_DOT 0
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define INTEGER_DOT 1
#else
#define INTEGER_DOT 0
#endif

#define R 4                 /* tokens that share one pass over a line of weights */
#define EXPERT_CHUNK 524288 /* bytes handed to a thread at a time: each begins unprefetched */
#define DENSE_CHUNK 131072  /* the same, of matrices that may be small and of different sizes */
#define AHEAD 4096          /* bytes: the processor's own prefetching stops at the end of a page */

/* ------------------------------------------------------------------------------ small numbers */

#ifdef __FLT16_MAX__
static inline float from_f16(uint16_t b) { _Float16 h; memcpy(&h, &b, 2); return (float)h; }
static inline uint16_t to_f16(float f) { _Float16 h = (_Float16)f; uint16_t b; memcpy(&b, &h, 2); return b; }
#else
#error "this compiler has no _Float16"
#endif

static inline float rounded(float f, int dtype) {
  return dtype == BF16 ? from_bf16(to_bf16(f)) : dtype == F16 ? from_f16(to_f16(f)) : f;
}

static inline float load_as_float(const void *p, int64_t i, int dtype) {
  if (dtype == BF16) return from_bf16(((const uint16_t *)p)[i]);
  if (dtype == F16) return from_f16(((const uint16_t *)p)[i]);
  return ((const float *)p)[i];
}

static inline void store(void *p, int64_t i, float f, int dtype) {
  if (dtype == BF16) ((uint16_t *)p)[i] = to_bf16(f);
  else if (dtype == F16) ((uint16_t *)p)[i] = to_f16(f);
  else ((float *)p)[i] = f;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline v16 splat(float f) { return (v16){f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f}; }

/* exp to about 1 ulp of fp32 without a branch: every lane does the same, wherever it stands */
static inline v16 exp16(v16 x) {
  const v16 asked = x;
  for (int i = 0; i < 16; i++) x[i] = x[i] > 88.0f ? 88.0f : x[i] < -87.0f ? -87.0f : x[i];
  v16 n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* rounds: 1.5 * 2^23 */
  i16 k = __builtin_convertvector(n, i16);
  v16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  v16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  i16 bits = (k + 127) << 23;
  v16 scale;
  memcpy(&scale, &bits, 64);
  p *= scale;
  for (int i = 0; i < 16; i++) p[i] = asked[i] > 88.0f ? INFINITY : p[i];
  return p;
}

/* -------------------------------------------------------------- inputs, in the order of weights
 *
 * Every kind reads its input from a row in a form of its own. FLOATS and BF16S: elements,
 * zero-filled up to a multiple of 64, in the order in which 64 weights come out of 32 bytes (4-bit
 * kinds) or in their own order (all others). BLOCKS: integers of 16 bits, see below.
 */

enum form { FLOATS, BF16S, BLOCKS };

static inline int form_of(int kind, int dtype) {
  if (BF16_DOT && dtype == BF16 && kind == BF16) return BF16S;
  if (INTEGER_DOT && dtype == BF16 && kind >= INT8) return BLOCKS;
  return FLOATS;
}

static inline int64_t pieces(int64_t all, int64_t size) { return (all + size - 1) / size; }

/* where element i of an input goes inside a row of floats */
static inline int64_t place(int64_t i, int kind) {
  if (kind != INT4 && kind != MXFP4) return i;
  int64_t base = i / 64 * 64, in_half = i % 32, half = i / 32 % 2;
  /* 32 bytes hold two blocks of 32 weights; first come all low nibbles, then all high ones */
  int64_t high = kind == INT4 ? in_half >= 16 : in_half % 2;
  int64_t byte = half * 16 + (kind == INT4 ? in_half % 16 : in_half / 2);
  return base + high * 32 + byte;
}

/* BLOCKS: a block of inputs that share an exponent, x = scale * (256 * high + low).
 *
 * The scale is the power of two that gives the largest input 15 bits: bf16 inputs down to 1/128 of
 * the largest are exact, smaller ones are off by at most 1/32768 of it. The scale is never below
 * 2^-126: what is smaller is rounded to a multiple of that. One block's sums are exact and fit into
 * 32 bits. An infinity or a NaN makes the scale NaN, and with it all products.
 */
#define B 128

struct block {
  uint8_t low[B];
  int8_t high[B];
  int32_t start[16]; /* where the sums start: makes up for weights that were raised above zero */
  float scale, unused[15];
};

static int64_t row_bytes(int64_t k, int kind, int dtype) {
  int form = form_of(kind, dtype);
  if (form == BLOCKS) return pieces(k, B) * (int64_t)sizeof(struct block);
  return pieces(k, 64) * 64 * (form == BF16S ? 2 : 4);
}

#if INTEGER_DOT

/* What is added to a weight so that it can be the unsigned factor of vpdpbusd. The low bytes of
 * the inputs are unsigned themselves: they meet int8 weights as these are. */
static inline int raised(int kind) { return kind == INT8 ? 128 : kind == INT4 ? 8 : 12; }

/* the order in which weights come: all low nibbles of 64 bytes, then all high ones */
static void arrange(const uint8_t *from, uint8_t *to, int kind) {
  if (kind == INT8) memcpy(to, from, B);
  else if (kind == INT4) for (int i = 0; i < 4; i++) {
    memcpy(to + 16 * i, from + 32 * i, 16);
    memcpy(to + 64 + 16 * i, from + 32 * i + 16, 16);
  } else for (int i = 0; i < 64; i++) { to[i] = from[2 * i]; to[64 + i] = from[2 * i + 1]; }
}

/* n <= B inputs, of bf16 */
static void make_block(const uint16_t *x, int64_t n, struct block *b, int kind) {
  uint16_t in[B] = {0}, most = 0;
  uint8_t low[B], high[B];
  memcpy(in, x, 2 * n);
  for (int i = 0; i < B; i++) most = (in[i] & 0x7fff) > most ? in[i] & 0x7fff : most;
  const int32_t top = most >> 7, e = top < 15 ? 15 : top; /* so that neither power leaves fp32 */
  const int32_t down = (e - 14) << 23, up = (268 - e) << 23;
  float times;
  memcpy(&b->scale, &down, 4);
  memcpy(&times, &up, 4);
  if (top == 255) { b->scale = NAN; times = 0; memset(in, 0, sizeof in); }
  for (int i = 0; i < B; i += 16) {
    v16 f = sixteen_bf16(in + i) * times;
    __m512i q = _mm512_cvtps_epi32((__m512)f);
    _mm_storeu_si128((void *)(low + i), _mm512_cvtepi32_epi8(q));
    _mm_storeu_si128((void *)(high + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(q, 8)));
  }
  arrange(low, b->low, kind);
  arrange(high, (uint8_t *)b->high, kind);
  for (int i = 0; i < 16; i++) {
    int32_t lows = 0, highs = 0;
    for (int at = 4 * i; at < 4 * i + 4; at++) {
      lows += b->low[at] + b->low[at + 64];
      highs += b->high[at] + b->high[at + 64];
    }
    b->start[i] = -raised(kind) * (256 * highs + (kind == INT8 ? 0 : lows));
  }
}
#endif

/* k inputs from number `first` on, in the form that `kind` reads */
static void prepare(const void *x, int64_t first, int64_t k, void *row, int kind, int dtype) {
  int form = form_of(kind, dtype);
#if INTEGER_DOT
  if (form == BLOCKS) {
    for (int64_t i = 0; i < k; i += B)
      make_block((const uint16_t *)x + first + i, least(B, k - i),
                 (struct block *)row + i / B, kind);
    return;
  }
#endif
  memset(row, 0, row_bytes(k, kind, dtype));
  if (form == BF16S) memcpy(row, (const uint16_t *)x + first, 2 * k);
  else if (kind == F32 && dtype == F32) memcpy(row, (const float *)x + first, 4 * k);
  else for (int64_t i = 0; i < k; i++)
    ((float *)row)[place(i, kind)] = load_as_float(x, first + i, dtype);
}

/* ------------------------------------------------------------------------------- dot products
 *
 * One line of weights times `rows` inputs. Each of the products keeps sums of its own, so any
 * number of rows gives the same bits. (Two or four lines at once share the inputs and were slower:
 * one thread, one stream of memory.)
 */

#define UNROLL _Pragma("GCC unroll 8")
#define INLINE inline __attribute__((always_inline))
#define LINE const struct matrix *m, int64_t line, const char *const *x, const int rows, float *y

static inline float group_scale(const struct matrix *m, int64_t row, int64_t i) {
  const char *s = m->scales + row * m->scale_stride;
  if (m->kind == INT4) return from_f16(((const uint16_t *)s)[i / m->group]);
  uint32_t bits = (uint32_t)((const uint8_t *)s)[i / 32] << 23; /* 2^(e-127) */
  if (bits == 0) bits = 0x00400000;                             /* the only subnormal one */
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

static inline v16 widen16(const char *w, int kind) { /* sixteen plain weights as fp32 */
  if (kind == F32) { v16 v; memcpy(&v, w, 64); return v; }
  if (kind == BF16) return sixteen_bf16(w);
#ifdef __AVX512F__
  if (kind == F16) return (v16)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)w));
  return (v16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)w)));
#elif defined(__AVX2__) && defined(__F16C__)
  __m256 f[2];
  for (int i = 0; i < 2; i++)
    f[i] = kind == F16
        ? _mm256_cvtph_ps(_mm_loadu_si128((const void *)(w + 16 * i)))
        : _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(w + 8 * i))));
  v16 v;
  memcpy(&v, f, 64);
  return v;
#else
  v16 v;
  for (int i = 0; i < 16; i++)
    v[i] = kind == F16 ? load_as_float(w, i, F16) : (float)((const int8_t *)w)[i];
  return v;
#endif
}

/* fp32, fp16, bf16 and int8 weights against fp32 rows */
static INLINE void plain(LINE, int kind) {
  const int size = kind == F32 ? 4 : kind == INT8 ? 1 : 2;
  const char *w = m->codes + line * m->stride;
  v16 a[R][2];
  UNROLL for (int r = 0; r < rows; r++) a[r][0] = a[r][1] = splat(0);
  int64_t i = 0;
  for (; i + 32 <= m->k; i += 32) {
    v16 v0 = widen16(w + i * size, kind), v1 = widen16(w + (i + 16) * size, kind);
    UNROLL for (int r = 0; r < rows; r++) {
      a[r][0] += v0 * *(const v16 *)(x[r] + 4 * i);
      a[r][1] += v1 * *(const v16 *)(x[r] + 4 * i + 64);
    }
  }
  for (; i < m->k; i += 16) { /* the end, through a buffer: nothing is read beyond the line */
    char tail[64] = {0};
    memcpy(tail, w + i * size, least(16, m->k - i) * size);
    v16 v = widen16(tail, kind);
    UNROLL for (int r = 0; r < rows; r++) a[r][0] += v * *(const v16 *)(x[r] + 4 * i);
  }
  float scale = kind == INT8 ? ((const float *)m->scales)[line] : 1.0f;
  UNROLL for (int r = 0; r < rows; r++) y[r] = total(a[r][0] + a[r][1]) * scale;
}

/* 4-bit weights as int8, those of MXFP4 doubled: what a byte shuffle can look up */
static const int8_t INT4_BYTES[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
static const int8_t MXFP4_BYTES[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

static inline void look_up(const uint8_t *w, const int8_t *values, int8_t *low, int8_t *high) {
#ifdef __SSSE3__
  const __m128i table = _mm_loadu_si128((const void *)values), mask = _mm_set1_epi8(15);
  __m128i bytes = _mm_loadu_si128((const void *)w);
  _mm_storeu_si128((void *)low, _mm_shuffle_epi8(table, _mm_and_si128(bytes, mask)));
  bytes = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  _mm_storeu_si128((void *)high, _mm_shuffle_epi8(table, bytes));
#else
  for (int i = 0; i < 16; i++) { low[i] = values[w[i] & 15]; high[i] = values[w[i] >> 4]; }
#endif
}

/* 4-bit weights against fp32 rows: the road where bf16 does not meet bf16 */
static INLINE void nibbles(LINE) {
  const uint8_t *w = (const uint8_t *)m->codes + line * m->stride;
  const int8_t *values = m->kind == INT4 ? INT4_BYTES : MXFP4_BYTES;
  const float unit = m->kind == INT4 ? 1.0f : 0.5f;
  v16 a[R];
  UNROLL for (int r = 0; r < rows; r++) a[r] = splat(0);
  for (int64_t i = 0; i < m->k; i += 32) {
    int8_t codes[32];
    look_up(w + i / 2, values, codes, codes + 16);
    v16 scale = splat(unit * group_scale(m, line, i));
    v16 low = widen16((const char *)codes, INT8), high = widen16((const char *)codes + 16, INT8);
    UNROLL for (int r = 0; r < rows; r++) { /* high nibbles lie 32 after the low ones */
      const float *at = (const float *)x[r] + i / 64 * 64 + i % 64 / 2;
      a[r] += (low * *(const v16 *)at + high * *(const v16 *)(at + 32)) * scale;
    }
  }
  UNROLL for (int r = 0; r < rows; r++) y[r] = total(a[r]);
}

#if BF16_DOT

static INLINE void bf16_dot(LINE) {
  const char *w = m->codes + line * m->stride;
  __m512 a[R][4];
  UNROLL for (int r = 0; r < rows; r++)
    UNROLL for (int part = 0; part < 4; part++) a[r][part] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 128 <= m->k; i += 128)
    UNROLL for (int part = 0; part < 4; part++) {
      _mm_prefetch(w + 2 * i + 64 * part + AHEAD, _MM_HINT_T1);
      __m512bh v = (__m512bh)_mm512_loadu_si512(w + 2 * i + 64 * part);
      UNROLL for (int r = 0; r < rows; r++)
        a[r][part] = _mm512_dpbf16_ps(
            a[r][part], v, (__m512bh)_mm512_loadu_si512(x[r] + 2 * i + 64 * part));
    }
  for (; i < m->k; i += 32) {
    __mmask32 mask = m->k - i >= 32 ? 0xffffffffu : (1u << (m->k - i)) - 1;
    __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(mask, w + 2 * i);
    UNROLL for (int r = 0; r < rows; r++)
      a[r][0] = _mm512_dpbf16_ps(a[r][0], v, (__m512bh)_mm512_loadu_si512(x[r] + 2 * i));
  }
  UNROLL for (int r = 0; r < rows; r++)
    y[r] = _mm512_reduce_add_ps(
        _mm512_add_ps(_mm512_add_ps(a[r][0], a[r][1]), _mm512_add_ps(a[r][2], a[r][3])));
}
#endif

#if INTEGER_DOT

/* 64 bytes, zeros from byte n on: nothing is read beyond the line */
static INLINE __m512i load_up_to(const char *p, int64_t n) {
  if (n >= 64) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8(n > 0 ? (1ull << n) - 1 : 0, p);
}

/* scale * (256 * high + low), added to what sixteen lanes hold so far */
static INLINE __m512 gathered(__m512i low, __m512i high, __m512 scale, __m512 sum) {
  __m512i both = _mm512_add_epi32(low, _mm512_slli_epi32(high, 8));
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), scale, sum);
}

/* int8 weights against blocks: the B from number i on */
static INLINE void integers_step(const __m512i *v, const char *const *x, int64_t i, const int rows,
                                 __m512 *a) {
  const __m512i sign = _mm512_set1_epi8((char)raised(INT8));
  const __m512i lifted[2] = {_mm512_xor_si512(v[0], sign), _mm512_xor_si512(v[1], sign)};
  UNROLL for (int r = 0; r < rows; r++) {
    const struct block *b = (const struct block *)x[r] + i / B;
    __m512i low = _mm512_load_si512(b->start), high = _mm512_setzero_si512();
    UNROLL for (int n = 0; n < 2; n++) {
      low = _mm512_dpbusd_epi32(low, _mm512_load_si512(b->low + 64 * n), v[n]);
      high = _mm512_dpbusd_epi32(high, lifted[n], _mm512_load_si512(b->high + 64 * n));
    }
    a[r] = gathered(low, high, _mm512_set1_ps(b->scale), a[r]);
  }
}

static INLINE void integers(LINE) {
  const char *w = m->codes + line * m->stride;
  __m512 a[R];
  UNROLL for (int r = 0; r < rows; r++) a[r] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + B <= m->k; i += B) { /* prefetching on top of the processor's own was slower here */
    const __m512i v[2] = {_mm512_loadu_si512(w + i), _mm512_loadu_si512(w + i + 64)};
    integers_step(v, x, i, rows, a);
  }
  if (i < m->k) {
    const __m512i v[2] = {load_up_to(w + i, m->k - i), load_up_to(w + i + 64, m->k - i - 64)};
    integers_step(v, x, i, rows, a);
  }
  const float scale = ((const float *)m->scales)[line];
  UNROLL for (int r = 0; r < rows; r++) y[r] = _mm512_reduce_add_ps(a[r]) * scale;
}

/* up to sixteen scales from number `first` on, as fp32; each once per group of 64 or 32 weights */
static INLINE __m512 scales_of(const struct matrix *m, const char *s, int64_t first, int kind) {
  const int64_t all = m->k / m->group;
  __mmask16 mask = all - first >= 16 ? 0xffff : (1u << (all - first)) - 1;
  if (kind == INT4) return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, s + 2 * first));
  /* 2^(e-127); e = 0 is the only subnormal one */
  __m512i e = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, s + first));
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(_mm512_slli_epi32(e, 23),
      _mm512_cmpeq_epi32_mask(e, _mm512_setzero_si512()), _mm512_set1_epi32(0x00400000)));
}

/* 128 weights of 64 bytes as unsigned bytes, the low nibbles and the high ones */
static INLINE void unfold(__m512i bytes, int kind, __m512i *v) {
  const __m512i mask = _mm512_set1_epi8(15), table = _mm512_broadcast_i32x4(
      _mm_add_epi8(_mm_loadu_si128((const void *)MXFP4_BYTES), _mm_set1_epi8((char)raised(MXFP4))));
  v[0] = _mm512_and_si512(bytes, mask);
  v[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask);
  if (kind == MXFP4) UNROLL for (int n = 0; n < 2; n++) v[n] = _mm512_shuffle_epi8(table, v[n]);
}

/* 4-bit weights against one block. The low and the high nibbles of the 16 bytes that hold 32
 * weights are summed in the same four lanes, so each lane has one scale. */
static INLINE __m512 nibbles_step(const __m512i *v, __m512 scale, const struct block *b, __m512 a) {
  __m512i low = _mm512_load_si512(b->start), high = _mm512_setzero_si512();
  UNROLL for (int n = 0; n < 2; n++) {
    low = _mm512_dpbusd_epi32(low, _mm512_load_si512(b->low + 64 * n), v[n]);
    high = _mm512_dpbusd_epi32(high, v[n], _mm512_load_si512(b->high + 64 * n));
  }
  return gathered(low, high, _mm512_mul_ps(scale, _mm512_set1_ps(b->scale)), a);
}

/* `lines` lines against `rows` tokens; one of the two numbers is 1. Two lines share the loads of
 * the token, several tokens those of the line. y[line or token]. */
static INLINE void blocks_of_nibbles(const struct matrix *m, int64_t line, const int lines,
                                     const char *const *x, const int rows, float *y, int kind,
                                     int group) {
  const char *w = m->codes + line * m->stride, *s = m->scales + line * m->scale_stride;
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  const __m512i first = group == 64 ? _mm512_srli_epi32(lanes, 1) : lanes;
  const __m512i step = _mm512_set1_epi32(B / group);
  const int64_t span = 16 * group; /* weights that sixteen scales speak for */
  __m512 a[R];
  UNROLL for (int n = 0; n < lines * rows; n++) a[n] = _mm512_setzero_ps();
  for (int64_t from = 0; from < m->k; from += span) {
    const int64_t to = least(m->k, from + span);
    __m512i at = first;
    __m512 scales[2];
    UNROLL for (int l = 0; l < lines; l++)
      scales[l] = scales_of(m, s + l * m->scale_stride, from / group, kind);
    for (int64_t i = from; i < to; i += B, at = _mm512_add_epi32(at, step))
      UNROLL for (int l = 0; l < lines; l++) {
        const char *here = w + l * m->stride + i / 2;
        __m512i v[2];
        _mm_prefetch(here + AHEAD, _MM_HINT_T1);
        unfold(load_up_to(here, (to - i) / 2), kind, v);
        UNROLL for (int r = 0; r < rows; r++)
          a[l + r] = nibbles_step(v, _mm512_permutexvar_ps(at, scales[l]),
                                  (const struct block *)x[r] + i / B, a[l + r]);
      }
  }
  const float unit = kind == INT4 ? 1.0f : 0.5f; /* MXFP4's weights are doubled */
  UNROLL for (int n = 0; n < lines * rows; n++) y[n] = _mm512_reduce_add_ps(a[n]) * unit;
}

static INLINE void nibble_lines(const struct matrix *m, int64_t line, const int lines,
                                const char *const *x, const int rows, float *y) {
  if (m->kind == MXFP4) blocks_of_nibbles(m, line, lines, x, rows, y, MXFP4, 32);
  else if (m->group == 64) blocks_of_nibbles(m, line, lines, x, rows, y, INT4, 64);
  else blocks_of_nibbles(m, line, lines, x, rows, y, INT4, 32);
}
#endif

static INLINE void choose(LINE, int form) {
#if BF16_DOT
  if (form == BF16S) { bf16_dot(m, line, x, rows, y); return; }
#endif
#if INTEGER_DOT
  if (form == BLOCKS) switch (m->kind) {
    case INT8: integers(m, line, x, rows, y); return;
    default: nibble_lines(m, line, 1, x, rows, y); return;
  }
#endif
  (void)form;
  switch (m->kind) {
    case F32: plain(m, line, x, rows, y, F32); break;
    case F16: plain(m, line, x, rows, y, F16); break;
    case BF16: plain(m, line, x, rows, y, BF16); break;
    case INT8: plain(m, line, x, rows, y, INT8); break;
    default: nibbles(m, line, x, rows, y);
  }
}

/* y[i * n + t] = line `first + i` times input t, for n inputs that lie `x_bytes` apart */
static void dot(const struct matrix *m, int64_t first, int64_t lines, const char *x,
                int64_t x_bytes, int64_t n, float *y, int form) {
  int64_t done = 0;
#if INTEGER_DOT
  if (n == 1 && form == BLOCKS && m->kind != INT8)
    for (; done + 2 <= lines; done += 2) nibble_lines(m, first + done, 2, &x, 1, y + done);
#endif
  for (int64_t t = 0; t < n; t += R) {
    const int64_t now = least(R, n - t);
    const char *at[R];
    float four[R];
    for (int r = 0; r < R; r++) at[r] = x + (t + least(r, now - 1)) * x_bytes;
    for (int64_t i = done; i < lines; i++) {
      if (now == 1) choose(m, first + i, at, 1, four, form);
      else if (now == 2) choose(m, first + i, at, 2, four, form);
      else choose(m, first + i, at, R, four, form); /* three are four, one of them twice */
      for (int64_t r = 0; r < now; r++) y[i * n + t + r] = four[r];
    }
  }
}

/* ------------------------------------------------------------------------------------ experts */

struct expert {
  const char *codes[3];  /* gate, up, down; [I, H], [I, H], [H, I] */
  const char *scales[3];
  int64_t first, tokens;  /* its entries in `tokens` and `places` */
};

struct shape {
  int64_t hidden, width;  /* H, I */
  int64_t stride[2], scale_stride[2];  /* of gate and up, and of down: bytes from row to row */
  int32_t kind, group[2];
  int32_t dtype;  /* of the inputs and outputs */
};

static inline struct matrix part(const struct expert *e, int which, const struct shape *s) {
  int down = which == 2;
  return (struct matrix){e->codes[which], e->scales[which], down ? s->width : s->hidden,
                         s->stride[down], s->scale_stride[down], s->kind, s->group[down]};
}

/* silu(gate) * up, rounded where torch rounds, for sixteen places of one token */
static void swiglu16(const float *gate, const float *up, float *h, int dtype) {
  v16 g, u, s;
  for (int i = 0; i < 16; i++) { g[i] = rounded(gate[i], dtype); u[i] = rounded(up[i], dtype); }
  s = g / (1.0f + exp16(-g));
  for (int i = 0; i < 16; i++) h[i] = rounded(rounded(s[i], dtype) * u[i], dtype);
}

/* sixteen rows of gate and up of one expert, and what comes of them, for all of its tokens */
static void gate_up(const struct expert *e, const struct shape *s, int64_t row, const char *x,
                    int64_t x_bytes, char *h, float *room) {
  struct matrix gate = part(e, 0, s), up = part(e, 1, s);
  int form = form_of(s->kind, s->dtype);
  int64_t n = e->tokens, rows = least(16, s->width - row);
  float *g = room, *u = room + 16 * n;
  dot(&gate, row, rows, x, x_bytes, n, g, form);
  dot(&up, row, rows, x, x_bytes, n, u, form);
  for (int64_t t = 0; t < n; t++) {
    float a[16] = {0}, b[16] = {0}, c[16];
    for (int64_t i = 0; i < rows; i++) { a[i] = g[i * n + t]; b[i] = u[i * n + t]; }
    swiglu16(a, b, c, s->dtype);
    for (int64_t i = 0; i < rows; i++) store(h, t * s->width + row + i, c[i], s->dtype);
  }
}

static void down(const struct expert *e, const struct shape *s, int64_t row, int64_t rows,
                 const char *h, int64_t h_bytes, char *out, const int64_t *places, float *room) {
  struct matrix m = part(e, 2, s);
  dot(&m, row, rows, h, h_bytes, e->tokens, room, form_of(s->kind, s->dtype));
  for (int64_t i = 0; i < rows; i++)
    for (int64_t t = 0; t < e->tokens; t++)
      store(out, places[e->first + t] * s->hidden + row + i, room[i * e->tokens + t], s->dtype);
}

/* Lines handed to a thread at a time: a multiple of sixteen, about `bytes`, and so many pieces that
 * `count` matrices can be shared evenly. `stride`: bytes of a line. */
static int64_t chunk(int64_t lines, int64_t stride, int64_t count, int64_t bytes, int threads) {
  int64_t per = least(pieces(lines * stride, bytes), pieces(lines, 16));
  while (per * count % threads && per < pieces(lines, 16)) per++;
  return 16 * pieces(pieces(lines, per), 16);
}

static inline int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

/* SwiGLU experts: out[place] = down(silu(gate(x)) * up(x)).
 * x [T, H]; tokens[j]: the row of x that entry j reads; places[j]: the row of out that it fills.
 * Returns 0, or 1 where memory was refused. */
int understudy_swiglu(const struct expert *experts, int64_t count, const struct shape *s,
                      const char *x, int64_t T, char *out, const int64_t *tokens,
                      const int64_t *places, int threads) {
  const int64_t x_bytes = row_bytes(s->hidden, s->kind, s->dtype);
  const int64_t h_bytes = row_bytes(s->width, s->kind, s->dtype);
  const int64_t size = s->dtype == F32 ? 4 : 2;
  int64_t entries = 0, most = 1;
  for (int64_t e = 0; e < count; e++) {
    entries += experts[e].tokens;
    if (experts[e].tokens > most) most = experts[e].tokens;
  }
  const int gather = T > 1 || most > 1; /* else all experts read the one row there is */
  const int64_t room_bytes = 32 * most * (int64_t)sizeof(float);
  char *memory = NULL;
  if (posix_memalign((void **)&memory, 64,
                     (T + entries) * x_bytes + entries * (h_bytes + s->width * size) +
                         threads * room_bytes + count * sizeof(int64_t)))
    return 1;
  char *xs = memory, *gathered = xs + T * x_bytes, *hs = gathered + entries * x_bytes;
  char *rooms = hs + entries * h_bytes;
  int64_t *at = (int64_t *)(rooms + threads * room_bytes); /* first entry of an expert in here */
  char *between = (char *)(at + count); /* what gate and up left, not prepared yet */
  for (int64_t e = 0, sum = 0; e < count; sum += experts[e++].tokens) at[e] = sum;
  const int64_t up_chunk = chunk(s->width, 2 * s->stride[0], count, EXPERT_CHUNK, threads);
  const int64_t down_chunk = chunk(s->hidden, s->stride[1], count, EXPERT_CHUNK, threads);
  const int64_t up_per = pieces(s->width, up_chunk), down_per = pieces(s->hidden, down_chunk);
  int64_t up_next = 0, down_next = 0, room_next = 0;
#pragma omp parallel num_threads(threads)
  {
    float *room = (float *)(rooms + take(&room_next) * room_bytes);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; t++)
      prepare(x, t * s->hidden, s->hidden, xs + t * x_bytes, s->kind, s->dtype);
    if (gather) {
#pragma omp for schedule(static)
      for (int64_t e = 0; e < count; e++)
        for (int64_t j = 0; j < experts[e].tokens; j++)
          memcpy(gathered + (at[e] + j) * x_bytes, xs + tokens[experts[e].first + j] * x_bytes,
                 x_bytes);
    }
    for (int64_t c; (c = take(&up_next)) < up_per * count;) {
      const int64_t e = c / up_per, from = c % up_per * up_chunk;
      const char *in = gather ? gathered + at[e] * x_bytes : xs;
      for (int64_t row = from; row < least(from + up_chunk, s->width); row += 16)
        gate_up(experts + e, s, row, in, x_bytes, between + at[e] * s->width * size, room);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t j = 0; j < entries; j++)
      prepare(between, j * s->width, s->width, hs + j * h_bytes, s->kind, s->dtype);
    for (int64_t c; (c = take(&down_next)) < down_per * count;) {
      const int64_t e = c / down_per, from = c % down_per * down_chunk;
      const int64_t to = least(from + down_chunk, s->hidden);
      for (int64_t row = from; row < to; row += 16)
        down(experts + e, s, row, least(16, to - row), hs + at[e] * h_bytes, h_bytes, out, places,
             room);
    }
  }
  free(memory);
  return 0;
}

/* Matrices of one kind and length that read the same inputs: y[m][t] = W[m] x[t].
 * x [n, K], y[m] [n, lines[m]]. */
int understudy_linears(const struct matrix *all, const int64_t *lines, int64_t count, int32_t dtype,
                       const char *x, char *const *y, int64_t n, int threads) {
  const int64_t k = all[0].k, x_bytes = row_bytes(k, all[0].kind, dtype);
  const int64_t room_bytes = 16 * n * (int64_t)sizeof(float);
  char *memory = NULL;
  if (posix_memalign((void **)&memory, 64, n * x_bytes + threads * room_bytes)) return 1;
  char *rooms = memory + n * x_bytes;
  const int form = form_of(all[0].kind, dtype);
  int64_t units = 0, next = 0, room_next = 0, total = 0;
  for (int64_t i = 0; i < count; i++) total += lines[i];
  const int64_t size = chunk(total, all[0].stride, 1, DENSE_CHUNK, threads);
  for (int64_t i = 0; i < count; i++) units += pieces(lines[i], size);
#pragma omp parallel num_threads(threads)
  {
    float *room = (float *)(rooms + take(&room_next) * room_bytes);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < n; t++) prepare(x, t * k, k, memory + t * x_bytes, all[0].kind, dtype);
    for (int64_t c; (c = take(&next)) < units;) {
      int64_t i = 0;
      for (; c >= pieces(lines[i], size); i++) c -= pieces(lines[i], size);
      const int64_t to = least((c + 1) * size, lines[i]);
      for (int64_t row = c * size; row < to; row += 16) {
        const int64_t now = least(16, to - row);
        dot(all + i, row, now, memory, x_bytes, n, room, form);
        for (int64_t line = 0; line < now; line++)
          for (int64_t t = 0; t < n; t++)
            store(y[i], t * lines[i] + row + line, room[line * n + t], dtype);
      }
    }
  }
  free(memory);
  return 0;
}

/* ------------------------------------------------------------------- the sum over ranks of a token */

static inline v16 sixteen(const char *p, int64_t n, int dtype) { /* n <= 16 of them, then zeros */
  const int64_t size = dtype == F32 ? 4 : 2;
  char room[64] = {0};
  if (n < 16) p = memcpy(room, p, n * size);
  if (dtype == BF16) return sixteen_bf16(p);
  v16 v;
  if (dtype == F32) memcpy(&v, p, 64);
  else for (int i = 0; i < 16; i++) v[i] = load_as_float(p, i, dtype);
  return v;
}

/* out[t] = y[t, 0] * weight[t, 0] + y[t, 1] * weight[t, 1] + ..., in this order. Each product is
 * rounded to the wider of the two dtypes, the sum once, at the end: as torch does it. */
void understudy_sum(const char *y, const char *weights, int64_t tokens, int64_t ranks,
                    int64_t width, int dtype, int weight_dtype, char *out, int threads) {
  const int64_t size = dtype == F32 ? 4 : 2;
  const int between = dtype == weight_dtype ? dtype : F32;
#pragma omp parallel for num_threads(threads) if (tokens > 16)
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t i = 0; i < width; i += 16) {
      const int64_t n = least(16, width - i);
      v16 sum = splat(0);
      for (int64_t r = t * ranks; r < (t + 1) * ranks; r++) {
        v16 product = sixteen(y + (r * width + i) * size, n, dtype) *
                      splat(load_as_float(weights, r, weight_dtype));
        __asm__("" : "+m"(product)); /* else it may be fused with the addition, and not rounded */
        if (between != F32) for (int j = 0; j < 16; j++) product[j] = rounded(product[j], between);
        sum += product;
      }
      for (int64_t j = 0; j < n; j++) store(out, t * width + i + j, sum[j], dtype);
    }
}
