/* What a compiled decoder layer needs of C: its steps one after the other, and attention of one
 * token.
 *
 * Knows: addresses and shapes. Does not know: torch, who compiled the steps, what they compute.
 *
 * Every result depends on the shapes alone: not on the number of threads, nor on addresses.
 */
#include "common.h"

/* ---------------------------------------------------------------------------------- steps of a layer
 *
 * A step names its tensors by place: `offset` bytes into base number `base`. The bases are given
 * with each call, so one list of steps serves every layer and every thread.
 */

enum step_kind { LOOP, PRODUCTS, TOPK };

struct place { int64_t base, offset; };

struct step {
  void *function;              /* LOOP: void (*)(void *, ...), one pointer per place */
  const struct place *places;  /* PRODUCTS: x, y..., weights...; TOPK: scores, values, ids */
  const int64_t *numbers;      /* PRODUCTS: K, kind, bytes per number, lines...; TOPK: E, k */
  int64_t kind, count;         /* count: of places */
};

#define SMALL 131072 /* bytes that one thread reads before a second one has woken up */
#define MOST_PLACES 32
#define MOST_MATRICES 15

/* A callee that takes fewer pointers than it is given does not see the others: the caller places
 * and removes them, on every machine torch runs on. */
static void loop(void *function, char **p, int64_t count) {
  typedef void *P;
#define EIGHT(i) p[i], p[i + 1], p[i + 2], p[i + 3], p[i + 4], p[i + 5], p[i + 6], p[i + 7]
  if (count <= 8) ((void (*)(P, P, P, P, P, P, P, P))function)(EIGHT(0));
  else if (count <= 16)
    ((void (*)(P, P, P, P, P, P, P, P, P, P, P, P, P, P, P, P))function)(EIGHT(0), EIGHT(8));
  else
    ((void (*)(P, P, P, P, P, P, P, P, P, P, P, P, P, P, P, P, P, P, P, P, P, P, P, P, P, P, P, P, P,
               P, P, P))function)(EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24));
}

static int products(const struct step *s, char **p, int threads) {
  const int64_t count = (s->count - 1) / 2, *n = s->numbers;
  struct matrix all[MOST_MATRICES];
  int64_t bytes = 0;
  memset(all, 0, count * sizeof *all);
  for (int64_t i = 0; i < count; i++) {
    all[i].codes = p[1 + count + i];
    all[i].k = n[0];
    all[i].stride = n[0] * n[2];
    all[i].kind = (int)n[1];
    bytes += n[3 + i] * all[i].stride;
  }
  if (bytes <= SMALL) threads = 1;
  return understudy_linears(all, n + 3, count, (int32_t)n[1], p[0], p + 1, 1, threads);
}

/* The k largest of E scores, largest first; of equal ones the first. NaN counts as the largest. */
static void top_k(const float *scores, float *values, int64_t *ids, int64_t E, int64_t k) {
  for (int64_t rank = 0; rank < k; rank++) {
    int64_t best = -1;
    for (int64_t e = 0; e < E; e++) {
      int taken = 0;
      for (int64_t r = 0; r < rank; r++) taken |= ids[r] == e;
      if (!taken && (best < 0 || scores[e] > scores[best] ||
                     (isnan(scores[e]) && !isnan(scores[best]))))
        best = e;
    }
    ids[rank] = best;
    values[rank] = scores[best];
  }
}

/* Returns 0, or 1 where memory was refused. */
int understudy_steps(const struct step *steps, int64_t count, char *const *bases, int threads) {
  for (const struct step *s = steps; s < steps + count; s++) {
    char *p[MOST_PLACES] = {0};
    for (int64_t i = 0; i < s->count; i++) p[i] = bases[s->places[i].base] + s->places[i].offset;
    if (s->kind == LOOP) loop(s->function, p, s->count);
    else if (s->kind == TOPK)
      top_k((float *)p[0], (float *)p[1], (int64_t *)p[2], s->numbers[0], s->numbers[1]);
    else if (products(s, p, threads)) return 1;
  }
  return 0;
}

/* ---------------------------------------------------------------------- attention of one token */

static inline v16 sixteen(const char *p, int64_t i, int bf16) {
  if (bf16) return sixteen_bf16(p + 2 * i);
  v16 v;
  memcpy(&v, p + 4 * i, 64);
  return v;
}

static inline void keep(char *p, int64_t i, float f, int bf16) {
  if (bf16) ((uint16_t *)p)[i] = to_bf16(f);
  else ((float *)p)[i] = f;
}

struct attention {
  int64_t heads, groups, width; /* query heads; key heads; numbers per head, a multiple of 16 */
  int64_t tokens, room;         /* held with the new one; for how many there is memory */
  int32_t bf16;
  float scale;
};

static void softmax(float *s, int64_t n) {
  float most = -INFINITY, sum = 0;
  for (int64_t t = 0; t < n; t++) most = s[t] > most ? s[t] : most;
  for (int64_t t = 0; t < n; t++) s[t] = expf(s[t] - most);
  for (int64_t t = 0; t < n; t++) sum += s[t];
  for (int64_t t = 0; t < n; t++) s[t] /= sum;
}

static void one_head(const struct attention *a, const char *q, const char *k, const char *v,
                     char *out, float *s) {
  const int64_t d = a->width, size = a->bf16 ? 2 : 4;
  for (int64_t t = 0; t < a->tokens; t++) {
    const char *row = k + t * d * size;
    v16 sum = {0};
    for (int64_t i = 0; i < d; i += 16) sum += sixteen(q, i, a->bf16) * sixteen(row, i, a->bf16);
    s[t] = total(sum) * a->scale;
  }
  softmax(s, a->tokens);
  for (int64_t from = 0; from < d; from += 64) { /* four chains at a time */
    const int64_t parts = (d - from < 64 ? d - from : 64) / 16;
    v16 sum[4] = {0};
    for (int64_t t = 0; t < a->tokens; t++)
      for (int64_t j = 0; j < parts; j++)
        sum[j] += s[t] * sixteen(v + t * d * size, from + 16 * j, a->bf16);
    for (int64_t i = 0; i < 16 * parts; i++) keep(out, from + i, sum[i / 16][i % 16], a->bf16);
  }
}

/* q [heads, width] and the new k and v [groups, width], heads `strides` numbers apart; keys and
 * values [groups, room, width], to which the new ones are added; out [heads, width]. Query heads
 * that share a key head follow each other. Returns 0, or 1 where memory was refused. */
int understudy_attend(const struct attention *a, const char *q, const char *k, const char *v,
                      const int64_t *strides, char *keys, char *values, char *out, int threads) {
  const int64_t size = a->bf16 ? 2 : 4, row = a->width * size, share = a->heads / a->groups;
  float *scores = malloc(a->heads * a->tokens * sizeof(float));
  if (!scores) return 1;
  if (2 * a->groups * a->tokens * row <= SMALL) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t g = 0; g < a->groups; g++) {
    char *mine = keys + g * a->room * row, *its = values + g * a->room * row;
    memcpy(mine + (a->tokens - 1) * row, k + g * strides[1] * size, row);
    memcpy(its + (a->tokens - 1) * row, v + g * strides[2] * size, row);
    for (int64_t h = g * share; h < (g + 1) * share; h++)
      one_head(a, q + h * strides[0] * size, mine, its, out + h * row, scores + h * a->tokens);
  }
  free(scores);
  return 0;
}
