// Attention and cross-entropy for a CPU, each in one pass while its numbers are in the cache. cpu_kernels.py builds this file
// and documents what each function computes.
//
// Sums, exponentials and everything between products are in fp32, whatever the tensors hold. Vectors are those of GCC and Clang
// (attribute vector_size), so that one text serves every instruction set. Products of bf16 use matrix tiles (AMX) where a processor
// has them, else AVX-512's pairs of bf16, else fp32. Bits depend neither on the number of threads nor on who takes which task.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

// tests/emulated_tiles.h defines these operations in plain C++, so that every machine can test what uses them. -DTILES=0: without.
#if !defined(TILES) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define TILES 1
#define tile_zero _tile_zero
#define tile_load _tile_loadd
#define tile_multiply _tile_dpbf16ps
#define tile_store _tile_stored
#define tile_configure _tile_loadconfig
#define tile_configuration _tile_storeconfig
#define tile_permission() syscall(SYS_arch_prctl, 0x1023, 18)  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
#endif

namespace {

// Lanes of a vector, and rows of a tile of two vectors a row, whose sums must fit in the registers.
#if defined(__AVX512F__)
constexpr int W = 16, ROWS = 8;
#elif defined(__AVX__)
constexpr int W = 8, ROWS = 4;
#else
constexpr int W = 4, ROWS = 8;
#endif
constexpr int BLOCK = 32;  // queries that are worked on together: their scores fit in the cache

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t Integers __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));
typedef uint16_t BF16;

template <class X, class E> X load(const E* from) {
    X x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline V read(const float* from) { return load<V>(from); }
inline V read(const BF16* from) { return (V)(__builtin_convertvector(load<Halves>(from), Bits) << 16); }

inline void write(float* to, V x) { std::memcpy(to, &x, sizeof x); }
// bf16 in the upper half of each number: to the nearest, ties to even; a NaN stays one, as its last bits are zeros here.
inline Bits rounded(V x) { return (Bits)x + 0x7fff + (((Bits)x >> 16) & 1); }
inline void write(BF16* to, V x) {
    const Halves halves = __builtin_convertvector(rounded(x) >> 16, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

// The first `count` of a vector's elements.
template <class E> V read_some(const E* from, int64_t count, float otherwise) {
    E some[W] = {};
    std::copy(from, from + count, some);
    V x = read(some);
    for (int64_t i = count; i < W; i++) x[i] = otherwise;
    return x;
}
template <class E> void write_some(E* to, V x, int64_t count) {
    E some[W];
    write(some, x);
    std::copy(some, some + count, to);
}

inline float sum(V x) {
    float total = 0;
    for (int i = 0; i < W; i++) total += x[i];
    return total;
}
inline float largest(V x) {
    float most = x[0];
    for (int i = 1; i < W; i++) most = std::max(most, x[i]);
    return most;
}
inline V larger(V x, V y) { return x > y ? x : y; }

// exp(x) for x <= 0, 0 below the smallest normal number: 2^n exp(f) with |f| <= ln(2)/2, exp(f) by its Taylor series.
// NaN is passed on apart: what it becomes as an integer is not defined.
inline V exponential(V x) {
    const float to_integer = 3 << 22;  // 1.5 * 2^23: with it added, a float has no place for a fraction
    const V n = (x * 1.44269504f + to_integer) - to_integer;
    const V f = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln(2) in two parts, the first with few bits
    V series = f * (1 / 5040.0f) + 1 / 720.0f;
    for (float term : {1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 1 / 2.0f, 1.0f, 1.0f}) series = series * f + term;
    const V result = (V)((Integers)series + (__builtin_convertvector(n, Integers) << 23));
    return x < -87.0f ? V{} : x == x ? result : x;
}

template <class F> void in_parallel(int64_t tasks, int threads, F task) {
    std::atomic<int64_t> next{0};
    auto work = [&] {
        for (int64_t i; (i = next++) < tasks;) task(i);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < std::min<int64_t>(threads, tasks); i++) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
}

// The lanes that the indices name, of x and then y.
#if defined(__clang__)
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, Integers{__VA_ARGS__})
#endif

// Of each square of 2 S lanes in 2 S rows, the upper right quarter and the lower left one change places.
template <int S, size_t... L> inline void swap_quarters(V& upper, V& lower, std::index_sequence<L...>) {
    const V x = upper, y = lower;
    upper = SHUFFLE(x, y, (int(L) & S ? W + int(L) - S : int(L))...);
    lower = SHUFFLE(x, y, (int(L) & S ? W + int(L) : int(L) + S)...);
}
template <int S = 1> inline void transpose(V* square) {
    for (int i = 0; i < W; i++)
        if (!(i & S)) swap_quarters<S>(square[i], square[i + S], std::make_index_sequence<W>());
    if constexpr (2 * S < W) transpose<2 * S>(square);
}
// to (columns, rows) = from (rows, columns), both multiples of W.
void transpose(const float* from, int64_t rows, int64_t columns, int64_t from_row, float* to, int64_t to_row) {
    for (int64_t r = 0; r < rows; r += W)
        for (int64_t c = 0; c < columns; c += W) {
            V square[W];
            for (int i = 0; i < W; i++) square[i] = read(from + (r + i) * from_row + c);
            transpose(square);
            for (int i = 0; i < W; i++) write(to + (c + i) * to_row + r, square[i]);
        }
}
// The lanes of each of W vectors combined, in their order: one result a lane.
template <class F> V combined(const V* vectors, F combine) {
    V square[W];
    std::copy(vectors, vectors + W, square);
    transpose(square);
    for (int i = 1; i < W; i++) square[0] = combine(square[0], square[i]);
    return square[0];
}

// ---- products of small matrices
//
// Factors are made of words of 32 bits: a number in fp32, or a pair in bf16, neighbours in the dimension that is summed over. The
// left factor lies in rows of words, the right one in panels: 16 columns, whose rows of 64 bytes follow one another.

constexpr int64_t ALL = std::numeric_limits<int64_t>::max();

// What products are made of. Whole: numbers in fp32.
struct Whole {
    typedef float Element, Word;
    struct Use {};  // lives as long as a task that multiplies
    static constexpr int PER_WORD = 1, COLUMNS = 16;  // elements of a word; the columns of a product are a multiple of COLUMNS
    // Keys whose scores the forward keeps at once, and queries and keys of the backward. The last bits depend on them.
    static constexpr int64_t CHUNK = ALL, QUERIES = BLOCK, KEYS = ALL;
    static constexpr float UNIT = 1;  // exp(x) = e^(x / UNIT)
    static V exp(V x) { return exponential(x); }
    static V divide(V x, float by) { return x / by; }
    static void put(float* to, V x) { write(to, x); }
    // Elements of rows r and r + 1 of a right factor, in the column of a panel at `column`.
    static void put(float* column, int64_t r, V even, V odd) { write(column + r * 16, even), write(column + (r + 1) * 16, odd); }
};
inline void add_product(V& total, float a, V b) { total += a * b; }

struct Pairs : Whole {
    typedef BF16 Element;
    typedef uint32_t Word;
    static constexpr int PER_WORD = 2;
    static void put(BF16* to, V x) { write(to, x); }
    static void put(float* column, int64_t r, V even, V odd) {
        write(column + r * 8, (V)(rounded(even) >> 16 | (rounded(odd) & 0xffff0000)));
    }
};
#if defined(__AVX512BF16__)
inline void add_product(V& total, uint32_t a, Bits b) {  // one instruction for both numbers of a pair
    total = (V)_mm512_dpbf16_ps((__m512)total, (__m512bh)(Bits{} + a), (__m512bh)b);
}
typedef Pairs Short;  // what products of tensors in bf16 are made of
#else
typedef Whole Short;
#endif

// c (ROWS, NV * W) = a (ROWS, K) b (K, NV * W), or added to c, for K words.
template <int NV, class Word>
inline void multiply_rows(bool add, int64_t K, const Word* a, int64_t a_row, const Word* b, int64_t panel, float* c, int64_t row) {
    typedef std::conditional_t<std::is_same_v<Word, float>, V, Bits> Words;
    V total[ROWS][NV] = {};
    for (int64_t k = 0; k < K; k++) {
        Words row[NV];
        for (int n = 0; n < NV; n++) row[n] = load<Words>(b + n * W / 16 * panel + k * 16 + n * W % 16);
        for (int m = 0; m < ROWS; m++)
            for (int n = 0; n < NV; n++) add_product(total[m][n], a[m * a_row + k], row[n]);
    }
    for (int m = 0; m < ROWS; m++)
        for (int n = 0; n < NV; n++) {
            float* place = c + m * row + n * W;
            write(place, add ? read(place) + total[m][n] : total[m][n]);
        }
}

// c (M, N) = a (M, K) b (K, N), or added to c, for K words: M and N multiples of 16. Panels of b are `panel` words apart.
template <class X>
void multiply(bool add, int64_t M, int64_t N, int64_t K, const float* a, int64_t a_row, const float* b, int64_t panel, float* c,
              int64_t c_row) {
    typedef const typename X::Word* Words;
    for (int64_t n = 0, columns; n < N; n += columns) {
        columns = std::min<int64_t>(2 * W, N - n);
        for (int64_t m = 0; m < M; m += ROWS)
            (columns == 2 * W ? multiply_rows<2, typename X::Word> : multiply_rows<1, typename X::Word>)(
                add, K, Words(a + m * a_row), a_row, Words(b + n / 16 * panel + n % 16), panel, c + m * c_row + n, c_row);
    }
}

#if TILES

bool may_use_tiles() {
    static const bool granted = tile_permission() == 0;  // by the kernel, to this process, once
    return granted;
}

// 2^x for x up to about 0, with a relative error of 3e-6, far below that of bf16; 0 below 2^-125. The polynomial is the best of its
// degree for |x| <= 1/2. A NaN stays one: it is multiplied, whatever the power of two becomes.
inline V power_of_two(V x) {
    const float to_integer = (3 << 22) + 127;  // with it added, x is rounded, and its last bits are the exponent of a float
    const V integer = x + to_integer, f = x - (integer - to_integer);
    V series = f * 0.00958285f + 0.05590643f;
    for (float term : {0.24024099f, 0.69312419f, 1.0f}) series = series * f + term;
    return x < -125.0f ? V{} : series * (V)((Bits)integer << 23);
}

// One instruction multiplies 16 rows of 16 pairs by 16 columns. It is so fast that all else counts: scores stay in the first
// cache, and exponentials are no more exact than bf16 needs.
struct Tiles : Pairs {
    static constexpr int COLUMNS = 32;
    static constexpr int64_t CHUNK = 256, QUERIES = 64, KEYS = 64;
    static constexpr float UNIT = 1.44269504f;  // log2(e)
    static V exp(V x) { return power_of_two(x); }
    static V divide(V x, float by) { return x * (1 / by); }
#if defined(__AVX512BF16__)
    static void put(BF16* to, V x) {
        const __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
        std::memcpy(to, &halves, sizeof halves);
    }
    static void put(float* column, int64_t r, V even, V odd) {
        alignas(64) static const uint16_t alternating[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const auto halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
        write(column + r * 8, (V)_mm512_permutexvar_epi16(_mm512_load_si512(alternating), halves));
    }
#endif
    struct Use {  // the tiles of this thread: full, then as they were
        alignas(64) uint8_t before[64];
        Use() {
            alignas(64) uint8_t full[64] = {1};  // palette 1; bytes of a row from 16 on, rows from 48 on
            for (int i = 0; i < 8; i++) full[16 + 2 * i] = 64, full[48 + i] = 16;
            tile_configuration(before);
            asm volatile("" ::"r"(full) : "memory");  // GCC does not know that all of it is read
            tile_configure(full);
        }
        ~Use() { tile_configure(before); }
    };
};

template <>
void multiply<Tiles>(bool add, int64_t M, int64_t N, int64_t K, const float* a, int64_t a_row, const float* b, int64_t panel,
                     float* c, int64_t c_row) {
    asm volatile("" ::: "memory");  // GCC does not know that tile_load reads memory
    for (int64_t n = 0; n < N; n += 32)
        for (int64_t m = 0; m < M; m += 32) {
            const float *left = a + m * a_row, *right = b + n / 16 * panel;
            float *upper = c + m * c_row + n, *lower = upper + 16 * c_row;
            if (add) {
                tile_load(0, upper, 4 * c_row); tile_load(1, upper + 16, 4 * c_row);
                tile_load(2, lower, 4 * c_row); tile_load(3, lower + 16, 4 * c_row);
            } else {
                tile_zero(0); tile_zero(1); tile_zero(2); tile_zero(3);
            }
            for (int64_t k = 0; k < K; k += 16) {  // four products of four tiles that are loaded once
                tile_load(4, left + k, 4 * a_row); tile_load(5, left + 16 * a_row + k, 4 * a_row);
                tile_load(6, right + k * 16, 64); tile_load(7, right + panel + k * 16, 64);
                tile_multiply(0, 4, 6); tile_multiply(1, 4, 7);
                tile_multiply(2, 5, 6); tile_multiply(3, 5, 7);
            }
            tile_store(0, upper, 4 * c_row); tile_store(1, upper + 16, 4 * c_row);
            tile_store(2, lower, 4 * c_row); tile_store(3, lower + 16, 4 * c_row);
        }
}

#endif

// ---- attention

struct Shape {
    int64_t B, H, K, T, D;  // sequences, query heads, key heads, tokens, head size
    const int64_t* starts;  // (B, T): the first key that each query sees, never before that of an earlier query; null: 0
    int64_t columns(int64_t multiple) const { return (D + multiple - 1) / multiple * multiple; }
    template <class X> int64_t words() const { return columns(16 * X::PER_WORD) / X::PER_WORD; }  // of a token in a left factor
    int64_t padded() const { return (T + BLOCK - 1) / BLOCK * BLOCK; }
    int64_t start(int64_t b, int64_t t) const { return starts ? starts[b * T + std::min(t, T - 1)] : 0; }
    // The first key of the blocks that the queries from `first` on see.
    int64_t seen_from(int64_t b, int64_t first) const { return start(b, first) / BLOCK * BLOCK; }
};

// A tensor (B, H, T, D) whose last dimension lies together: its address, and three strides in elements.
template <class E> struct Heads {
    E* data;
    int64_t batch, head, token;
    explicit Heads(const int64_t* about) : data((E*)about[0]), batch(about[1]), head(about[2]), token(about[3]) {}
    E* at(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

struct Scratch {  // one piece of memory, handed out in parts of multiples of 64 bytes, each at the beginning of a cache line
    std::unique_ptr<float[]> memory;
    int64_t used;
    explicit Scratch(int64_t floats) : memory(new float[floats + 16]), used(16 - (uintptr_t)memory.get() / 4 % 16) {}
    float* take(int64_t floats) { return memory.get() + (used += floats) - floats; }
};

// `count` tokens of a head, from `first` on, as rows of a left factor (count, words); zeros beyond T and D.
template <class X, class E>
void unpack(const Heads<const E>& x, const Shape& s, int64_t b, int64_t h, int64_t first, int64_t count, float* to) {
    typedef typename X::Element Element;
    for (int64_t t = first; t < first + count; t++, to += s.words<X>()) {
        const int64_t known = t < s.T ? s.D : 0;
        if constexpr (std::is_same_v<E, Element>)
            std::copy_n(x.at(b, h, std::min(t, s.T - 1)), known, (Element*)to);
        else
            for (int64_t d = 0; d < known; d += W) write(to + d, read(x.at(b, h, t) + d));
        std::memset((Element*)to + known, 0, s.words<X>() * sizeof *to - known * sizeof(Element));
    }
}
// Such rows as a right factor that is summed over the head size: (words, count) in panels.
void turn(const float* rows, int64_t count, int64_t words, float* to) {
    for (int64_t t = 0; t < count; t += 16) transpose(rows + t * words, 16, words, words, to + t * words, 16);
}
// Such rows as a right factor that is summed over the tokens: (count / PER_WORD, columns) in panels.
template <class X> void pair(const float* rows, int64_t count, int64_t words, int64_t columns, float* to) {
    for (int64_t t = 0; t < count; t += 2)
        for (int64_t d = 0; d < columns; d += W) {
            const auto* even = (const typename X::Element*)(rows + t * words) + d;
            X::put(to + d / 16 * (count / X::PER_WORD * 16) + d % 16, t, read(even), read(even + words * X::PER_WORD));
        }
}
template <class E>
void pack(const float* from, int64_t row, float scale, const Shape& s, int64_t b, int64_t h, int64_t first, int64_t count, Heads<E> to) {
    for (int64_t t = 0; t < std::min(count, s.T - first); t++)
        for (int64_t d = 0; d < s.D; d += W) write(to.at(b, h, first + t) + d, read(from + t * row + d) * scale);
}

// Sets scores to -inf where the query does not see the key: `queries` from `first` on, `keys` from `from` on. That of query i and
// key j lies at i * query_row + j * key_row.
void hide(const Shape& s, int64_t b, int64_t first, int64_t queries, int64_t from, int64_t keys, float* scores, int64_t query_row,
          int64_t key_row) {
    for (int64_t i = 0; i < queries; i++) {
        float* row = scores + i * query_row;
        for (int64_t j = 0; j < std::min(s.start(b, first + i) - from, keys); j++) row[j * key_row] = -INFINITY;
        for (int64_t j = std::max<int64_t>(first + i + 1 - from, 0); j < keys; j++) row[j * key_row] = -INFINITY;
    }
}

// Turns scores (BLOCK, count) of a chunk of keys into exp(score * scale - top), as a left factor in their place, for the largest
// scores so far, times scale: `tops`. Earlier sums have to be multiplied by `factors`; `totals` are, and include this chunk.
template <class X>
void exponentials(float* scores, int64_t row, int64_t count, float scale, float* tops, V* totals, float* factors) {
    V most[BLOCK];
    for (int64_t i = 0; i < BLOCK; i++) {
        most[i] = read(scores + i * row);
        for (int64_t j = W; j < count; j += W) most[i] = larger(most[i], read(scores + i * row + j));
    }
    for (int64_t i = 0; i < BLOCK; i += W) {
        const V before = read(tops + i), top = larger(combined(most + i, larger) * scale, before);
        write(factors + i, X::exp(before - top));
        write(tops + i, top);
    }
    for (int64_t i = 0; i < BLOCK; i++) {
        float* scored = scores + i * row;
        V total = totals[i] * factors[i];
        for (int64_t j = 0; j < count; j += W) {
            const V e = X::exp(read(scored + j) * scale - tops[i]);
            total += e;
            X::put((typename X::Element*)scored + j, e);  // which is never beyond what has been read
        }
        totals[i] = total;
    }
}

template <class X, class E> void forward(const Shape& s, float scale, const int64_t (*x)[4], float* log_sums, int threads) {
    const Heads<const E> q(x[0]), k(x[1]), v(x[2]);
    const Heads<E> out(x[3]);
    const int64_t words = s.words<X>(), columns = s.columns(X::COLUMNS), T = s.padded(), queries_a_key = s.H / s.K;
    const int64_t chunk = std::min(X::CHUNK, T), row = chunk + 16;  // rows a power of two apart would share cache lines
    in_parallel(s.B * s.K, threads, [&](int64_t task) {
        [[maybe_unused]] const typename X::Use use{};
        const int64_t b = task / s.K, key_head = task % s.K, panel = T / X::PER_WORD * 16;
        Scratch scratch(2 * T * words + panel / 16 * columns + BLOCK * (words + row + columns));
        float *rows = scratch.take(T * words), *keys = scratch.take(T * words), *values = scratch.take(panel / 16 * columns);
        unpack<X>(k, s, b, key_head, 0, T, rows);
        turn(rows, T, words, keys);
        unpack<X>(v, s, b, key_head, 0, T, rows);
        pair<X>(rows, T, words, columns, values);
        float *queries = scratch.take(BLOCK * words), *scores = scratch.take(BLOCK * row), *result = scratch.take(BLOCK * columns);
        for (int64_t h = key_head * queries_a_key; h < (key_head + 1) * queries_a_key; h++)
            for (int64_t first = 0; first < s.T; first += BLOCK) {
                const int64_t begin = s.seen_from(b, first), seen = first + BLOCK;
                float tops[BLOCK], factors[BLOCK], sums[BLOCK];
                V totals[BLOCK] = {};
                std::fill(tops, tops + BLOCK, std::numeric_limits<float>::lowest());
                unpack<X>(q, s, b, h, first, BLOCK, queries);
                for (int64_t from = begin; from < seen; from += chunk) {  // as in FlashAttention, with one pass over a chunk
                    const int64_t count = std::min(chunk, seen - from);
                    multiply<X>(false, BLOCK, count, words, queries, words, keys + from * words, 16 * words, scores, row);
                    hide(s, b, first, BLOCK, from, count, scores, row, 1);
                    exponentials<X>(scores, row, count, scale * X::UNIT, tops, totals, factors);
                    for (int64_t i = 0; from > begin && i < BLOCK; i++)
                        for (int64_t d = 0; factors[i] != 1 && d < columns; d += W)
                            write(result + i * columns + d, read(result + i * columns + d) * factors[i]);
                    multiply<X>(from > begin, BLOCK, columns, count / X::PER_WORD, scores, row, values + from / X::PER_WORD * 16, panel,
                                result, columns);
                }
                for (int64_t i = 0; i < BLOCK; i += W) write(sums + i, combined(totals + i, [](V x, V y) { return x + y; }));
                for (int64_t i = 0; i < BLOCK; i++) {
                    if (first + i < s.T) log_sums[(b * s.H + h) * s.T + first + i] = tops[i] / X::UNIT + std::log(sums[i]);
                    float* row = result + i * columns;
                    for (int64_t d = 0; d < s.D; d += W) write(row + d, X::divide(read(row + d), sums[i]));
                }
                pack(result, columns, 1, s, b, h, first, BLOCK, out);
            }
    });
}

// From transposed scores and products of values with the gradient, (keys, queries) in rows of X::QUERIES: probabilities and the
// gradients by scores, not yet times scale, as left factors in their places; the latter also as a right one, summed over keys.
template <class X>
void differentiate_scores(int64_t keys, int64_t queries, float scale, const float* log_sums, const float* means, float* scores,
                          float* products, float* panels, int64_t panel) {
    typedef typename X::Element Element;
    for (int64_t j = 0; j < keys; j += 2)
        for (int64_t i = 0; i < queries; i += W) {
            V gradients[2];
            for (int r = 0; r < 2; r++) {
                float *scored = scores + (j + r) * X::QUERIES, *product = products + (j + r) * X::QUERIES;
                const V prob = X::exp(read(scored + i) * scale - read(log_sums + i));
                gradients[r] = prob * (read(product + i) - read(means + i));
                X::put((Element*)scored + i, prob);
                X::put((Element*)product + i, gradients[r]);
            }
            X::put(panels + i / 16 * panel + i % 16, j, gradients[0], gradients[1]);
        }
}

// Scores are transposed, (keys, queries), so that all that the products need is made of rows; so are the gradients of queries.
template <class X, class E> void backward(const Shape& s, float scale, const int64_t (*x)[4], float* log_sums, int threads) {
    const Heads<const E> grad(x[0]), q(x[1]), k(x[2]), v(x[3]), out(x[4]);
    const Heads<E> grad_q(x[5]), grad_k(x[6]), grad_v(x[7]);
    const int64_t words = s.words<X>(), columns = s.columns(X::COLUMNS), T = s.padded(), queries_a_key = s.H / s.K;
    const int64_t some = X::QUERIES, chunk = std::min(X::KEYS, T), turned_row = T / X::PER_WORD + 16;
    in_parallel(s.B * s.K, threads, [&](int64_t task) {
        [[maybe_unused]] const typename X::Use use{};
        const int64_t b = task / s.K, key_head = task % s.K, panel = chunk / X::PER_WORD * 16;
        Scratch scratch(2 * T * words + columns * (turned_row + 3 * T) + some * (4 * words + 4 * columns + 3 * chunk));
        float *keys = scratch.take(T * words), *values = scratch.take(T * words);
        float *paired_keys = scratch.take(columns * T), *turned_keys = scratch.take(columns * turned_row);
        unpack<X>(k, s, b, key_head, 0, T, keys);
        unpack<X>(v, s, b, key_head, 0, T, values);
        pair<X>(keys, T, words, columns, paired_keys);
        for (int64_t d = 0; d < columns; d += 16)
            transpose(paired_keys + d * T / X::PER_WORD, T / X::PER_WORD, 16, 16, turned_keys + d * turned_row, turned_row);
        float *key_gradients = scratch.take(T * columns), *value_gradients = scratch.take(T * columns);
        std::fill(key_gradients, key_gradients + 2 * T * columns, 0.0f);
        float *queries = scratch.take(some * words), *turned_queries = scratch.take(some * words);
        float *grads = scratch.take(some * words), *turned_grads = scratch.take(some * words);
        float *paired_queries = scratch.take(some * columns), *paired_grads = scratch.take(some * columns);
        float *result = scratch.take(some * columns), *turned_result = scratch.take(some * columns);
        float *scores = scratch.take(some * chunk), *products = scratch.take(some * chunk), *panels = scratch.take(some * chunk);
        for (int64_t h = key_head * queries_a_key; h < (key_head + 1) * queries_a_key; h++)
            for (int64_t first = 0; first < s.T; first += some) {
                const int64_t n = std::min(some, T - first), n_words = n / X::PER_WORD, begin = s.seen_from(b, first), seen = first + n;
                float units[X::QUERIES], means[X::QUERIES];
                V common[X::QUERIES] = {};
                for (int64_t i = 0; i < n; i++) {
                    for (int64_t d = 0; first + i < s.T && d < s.D; d += W)
                        common[i] += read(grad.at(b, h, first + i) + d) * read(out.at(b, h, first + i) + d);
                    units[i] = first + i < s.T ? log_sums[(b * s.H + h) * s.T + first + i] * X::UNIT : INFINITY;
                }
                for (int64_t i = 0; i < n; i += W) write(means + i, combined(common + i, [](V x, V y) { return x + y; }));
                unpack<X>(q, s, b, h, first, n, queries);
                unpack<X>(grad, s, b, h, first, n, grads);
                turn(queries, n, words, turned_queries);
                turn(grads, n, words, turned_grads);
                pair<X>(queries, n, words, columns, paired_queries);
                pair<X>(grads, n, words, columns, paired_grads);
                for (int64_t from = begin; from < seen; from += chunk) {
                    const int64_t count = std::min(chunk, seen - from);
                    multiply<X>(false, count, n, words, keys + from * words, words, turned_queries, 16 * words, scores, some);
                    multiply<X>(false, count, n, words, values + from * words, words, turned_grads, 16 * words, products, some);
                    hide(s, b, first, n, from, count, scores, 1, some);
                    differentiate_scores<X>(count, n, scale * X::UNIT, units, means, scores, products, panels, panel);
                    float *to_values = value_gradients + from * columns, *to_keys = key_gradients + from * columns;
                    multiply<X>(true, count, columns, n_words, scores, some, paired_grads, 16 * n_words, to_values, columns);
                    multiply<X>(true, count, columns, n_words, products, some, paired_queries, 16 * n_words, to_keys, columns);
                    multiply<X>(from > begin, columns, n, count / X::PER_WORD, turned_keys + from / X::PER_WORD, turned_row, panels, panel,
                                turned_result, some);
                }
                transpose(turned_result, columns, n, some, result, columns);
                pack(result, columns, scale, s, b, h, first, n, grad_q);
            }
        pack(key_gradients, columns, scale, s, b, key_head, 0, T, grad_k);
        pack(value_gradients, columns, 1, s, b, key_head, 0, T, grad_v);
    });
}

// ---- cross-entropy

// Overwrites one row of logits (V) with the gradients of its loss; `probs` has room for V numbers and one more vector.
template <class E> float differentiate_row(E* logits, int64_t V_, int64_t label, float z_loss, float* probs) {
    V top = V{} - INFINITY, total{};
    for (int64_t j = 0; j < V_; j += W) {
        const V x = j + W <= V_ ? read(logits + j) : read_some(logits + j, V_ - j, -INFINITY);
        top = larger(top, x);
        write(probs + j, x);
    }
    const float most = largest(top), at_label = probs[label];
    for (int64_t j = 0; j < V_; j += W) {
        const V e = exponential(read(probs + j) - most);
        total += e;
        write(probs + j, e);
    }
    const float all = sum(total), log_z = most + std::log(all), weight = (1 + 2 * z_loss * log_z) / all;
    for (int64_t j = 0; j < V_; j += W) {
        const V gradient = read(probs + j) * weight;
        j + W <= V_ ? write(logits + j, gradient) : write_some(logits + j, gradient, V_ - j);
    }
    write_some(logits + label, V{} + (probs[label] * weight - 1), 1);
    return log_z - at_label;
}

// False, with nothing done, where a label is no place of the vocabulary.
template <class E>
bool differentiate(int64_t rows, int64_t V_, E* logits, const int64_t* labels, int64_t ignored, float z_loss, float* losses,
                   int threads) {
    for (int64_t r = 0; r < rows; r++)
        if (labels[r] != ignored && (labels[r] < 0 || labels[r] >= V_)) return false;
    in_parallel(threads, threads, [&](int64_t part) {
        std::vector<float> probs(V_ + W);
        for (int64_t r = rows * part / threads; r < rows * (part + 1) / threads; r++)
            losses[r] = labels[r] == ignored ? 0 : differentiate_row(logits + r * V_, V_, labels[r], z_loss, probs.data());
    });
    return true;
}

}  // namespace

extern "C" {

int lanes() { return W; }

// What products of bf16 are made of: 0: fp32, 1: pairs, 2: tiles.
int bf16_products() {
#if TILES
    if (may_use_tiles()) return 2;
#endif
    return Short::PER_WORD - 1;
}

// x: q, k, v and the result; backward: the gradient that comes in, q, k, v, the forward's result, and the gradients of q, k and v.
void attention(int is_backward, int bf16, const int64_t* n, float scale, const int64_t* starts, const int64_t (*x)[4],
               float* log_sums, int threads) {
    auto* pass = is_backward ? backward<Whole, float> : forward<Whole, float>;
    if (bf16) pass = is_backward ? backward<Short, BF16> : forward<Short, BF16>;
#if TILES
    if (bf16 && may_use_tiles()) pass = is_backward ? backward<Tiles, BF16> : forward<Tiles, BF16>;
#endif
    pass({n[0], n[1], n[2], n[3], n[4], starts}, scale, x, log_sums, threads);
}

int differentiate(int bf16, int64_t rows, int64_t vocab, void* logits, const int64_t* labels, int64_t ignored, float z_loss,
                  float* losses, int threads) {
    if (bf16) return differentiate<BF16>(rows, vocab, (BF16*)logits, labels, ignored, z_loss, losses, threads);
    return differentiate<float>(rows, vocab, (float*)logits, labels, ignored, z_loss, losses, threads);
}

}  // extern "C"
