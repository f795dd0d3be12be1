// Attention and cross-entropy for a CPU, each in one pass while its numbers are in the cache. cpu_kernels.py builds this file
// and documents what each function computes.
//
// Sums, exponentials and everything between products are in fp32, whatever the tensors hold. Vectors are those of GCC and Clang
// (attribute vector_size), so that one text serves every instruction set. Bits depend neither on the number of threads nor on
// who takes which task.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
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

// ---- products of small matrices

inline void add_product(V& total, float a, V b) { total += a * b; }

// What products are made of. Whole: numbers in fp32. A matrix serves as the left factor, whose columns are summed over, and as
// the right one, whose rows are.
struct Whole {
    typedef float Word;
    static constexpr int PER_WORD = 1;
    static const float* along(const float* matrix, int64_t, int64_t, int64_t, float*) { return matrix; }
    static const float* across(const float* matrix, int64_t, int64_t, int64_t, float*) { return matrix; }
};

#if defined(__AVX512BF16__)
inline void add_product(V& total, uint32_t a, Bits b) {
    total = (V)_mm512_dpbf16_ps((__m512)total, (__m512bh)(Bits{} + a), (__m512bh)b);
}

// Two numbers in bf16 to a word, which one instruction multiplies and adds to a sum in fp32.
struct Pairs {
    typedef uint32_t Word;
    static constexpr int PER_WORD = 2;
    // Neighbours in a row: words (rows, columns / 2), rows `row` words apart as those of the matrix are.
    static const Word* along(const float* matrix, int64_t rows, int64_t columns, int64_t row, float* room) {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < columns; c += W) write((BF16*)(room + r * row) + c, read(matrix + r * row + c));
        return (const Word*)room;
    }
    // Neighbours in a column: words (rows / 2, columns).
    static const Word* across(const float* matrix, int64_t rows, int64_t columns, int64_t row, float* room) {
        for (int64_t r = 0; r < rows; r += 2)
            for (int64_t c = 0; c < columns; c += W) {
                const Bits upper = rounded(read(matrix + r * row + c)), lower = rounded(read(matrix + (r + 1) * row + c));
                write(room + r / 2 * row + c, (V)(upper >> 16 | (lower & 0xffff0000)));
            }
        return (const Word*)room;
    }
};
#endif

// c (ROWS, NV * W) = a (ROWS, K) b (K, NV * W), or added to c, for words a and b; a[m, k] lies at m * a_row + k * a_column.
template <int NV, bool ADD, class Word>
inline void tile(int64_t K, const Word* a, int64_t a_row, int64_t a_column, const Word* b, int64_t b_row, float* c, int64_t c_row) {
    typedef std::conditional_t<std::is_same_v<Word, float>, V, Bits> Words;
    V total[ROWS][NV] = {};
    for (int64_t k = 0; k < K; k++) {
        Words row[NV];
        for (int n = 0; n < NV; n++) row[n] = load<Words>(b + k * b_row + n * W);
        for (int m = 0; m < ROWS; m++)
            for (int n = 0; n < NV; n++) add_product(total[m][n], a[m * a_row + k * a_column], row[n]);
    }
    for (int m = 0; m < ROWS; m++)
        for (int n = 0; n < NV; n++) {
            float* place = c + m * c_row + n * W;
            write(place, ADD ? read(place) + total[m][n] : total[m][n]);
        }
}

// c (M, N) = a (M, K) b (K, N), or added to c: M a multiple of ROWS, N of W.
template <bool ADD, class Word>
void product(int64_t M, int64_t N, int64_t K, const Word* a, int64_t a_row, int64_t a_column, const Word* b, int64_t b_row,
             float* c, int64_t c_row) {
    int64_t n = 0;
    for (; n + 2 * W <= N; n += 2 * W)
        for (int64_t m = 0; m < M; m += ROWS)
            tile<2, ADD>(K, a + m * a_row, a_row, a_column, b + n, b_row, c + m * c_row + n, c_row);
    if (n < N)
        for (int64_t m = 0; m < M; m += ROWS)
            tile<1, ADD>(K, a + m * a_row, a_row, a_column, b + n, b_row, c + m * c_row + n, c_row);
}

// ---- attention

struct Shape {
    int64_t B, H, K, T, D;  // sequences, query heads, key heads, tokens, head size
    int64_t padded() const { return (T + BLOCK - 1) / BLOCK * BLOCK; }
    int64_t row() const { return padded() + W; }  // of a value for each key; rows a power of two apart would share cache lines
};

// A tensor (B, H, T, D) whose last dimension lies together: its address, and three strides in elements.
template <class E> struct Heads {
    E* data;
    int64_t batch, head, token;
    explicit Heads(const int64_t* about) : data((E*)about[0]), batch(about[1]), head(about[2]), token(about[3]) {}
    E* at(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

// Tokens first..first+count of a head as fp32 (count, D); zeros beyond T.
template <class E>
void unpack(const Heads<E>& x, const Shape& s, int64_t b, int64_t h, int64_t first, int64_t count, float* to) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t d = 0; d < s.D; d += W) write(to + t * s.D + d, first + t < s.T ? read(x.at(b, h, first + t) + d) : V{});
}

template <class E>
void pack(const float* from, float scale, const Shape& s, int64_t b, int64_t h, int64_t first, int64_t count, const Heads<E>& to) {
    for (int64_t t = 0; t < std::min(count, s.T - first); t++)
        for (int64_t d = 0; d < s.D; d += W) write(to.at(b, h, first + t) + d, read(from + t * s.D + d) * scale);
}

// The words of (T, D) as (D / PER_WORD, T), whose rows are s.row() apart.
template <class X> const typename X::Word* turn(const float* matrix, const Shape& s, float* room, float* to) {
    const auto* words = X::along(matrix, s.padded(), s.D, s.D, room);
    auto* turned = (typename X::Word*)to;
    const int64_t columns = s.D / X::PER_WORD;
    for (int64_t c = 0; c < columns; c += 8)  // so that the rows that are written lie in the cache
        for (int64_t t = 0; t < s.padded(); t++)
            for (int64_t i = c; i < c + 8; i++) turned[i * s.row() + t] = words[t * s.D + i];
    return turned;
}

// scores (BLOCK, first + BLOCK) of the queries from `first` on and all keys up to theirs; -inf where a key comes later.
template <class X>
void causal_scores(const float* queries, const typename X::Word* turned_keys, const Shape& s, int64_t first, float* room,
                   float* scores) {
    product<false>(BLOCK, first + BLOCK, s.D / X::PER_WORD, X::along(queries, BLOCK, s.D, s.D, room), s.D, 1, turned_keys, s.row(),
                   scores, s.row());
    for (int64_t i = 0; i < BLOCK; i++)
        std::fill(scores + i * s.row() + first + i + 1, scores + i * s.row() + first + BLOCK, -INFINITY);
}

struct Scratch {  // one piece of memory, given out part by part
    std::unique_ptr<float[]> memory;
    int64_t used = 0;
    explicit Scratch(int64_t floats) : memory(new float[floats]) {}
    float* take(int64_t floats) { return memory.get() + (used += floats) - floats; }
};

template <class X, class E>
void attention_forward(Shape s, float scale, Heads<const E> q, Heads<const E> k, Heads<const E> v, Heads<E> out, float* log_sums,
                       int threads) {
    const int64_t all = s.padded() * s.D, some = BLOCK * s.D, scored = BLOCK * s.row(), queries_a_key = s.H / s.K;
    in_parallel(s.B * s.K, threads, [&](int64_t task) {
        const int64_t b = task / s.K, key_head = task % s.K;
        Scratch scratch(4 * all + s.D * s.row() + 3 * some + 2 * scored);
        float *plain = scratch.take(all), *plain_values = scratch.take(all), *room = scratch.take(all);
        unpack(k, s, b, key_head, 0, s.padded(), plain);
        unpack(v, s, b, key_head, 0, s.padded(), plain_values);
        const auto* turned_keys = turn<X>(plain, s, room, scratch.take(s.D * s.row()));
        const auto* values = X::across(plain_values, s.padded(), s.D, s.D, scratch.take(all));
        float *queries = scratch.take(some), *queries_room = scratch.take(some), *result = scratch.take(some);
        float *scores = scratch.take(scored), *scores_room = scratch.take(scored);
        for (int64_t h = key_head * queries_a_key; h < (key_head + 1) * queries_a_key; h++)
            for (int64_t first = 0; first < s.T; first += BLOCK) {
                const int64_t seen = first + BLOCK;
                float totals[BLOCK];
                unpack(q, s, b, h, first, BLOCK, queries);
                causal_scores<X>(queries, turned_keys, s, first, queries_room, scores);
                for (int64_t i = 0; i < BLOCK; i++) {  // softmax, not yet divided
                    float* row = scores + i * s.row();
                    V top = read(row), total{};
                    for (int64_t j = W; j < seen; j += W) top = larger(top, read(row + j));
                    const float most = largest(top) * scale;
                    for (int64_t j = 0; j < seen; j += W) {
                        const V e = exponential(read(row + j) * scale - most);
                        total += e;
                        write(row + j, e);
                    }
                    totals[i] = sum(total);
                    if (first + i < s.T) log_sums[(b * s.H + h) * s.T + first + i] = most + std::log(totals[i]);
                }
                const auto* probs = X::along(scores, BLOCK, seen, s.row(), scores_room);
                product<false>(BLOCK, s.D, seen / X::PER_WORD, probs, s.row(), 1, values, s.D, result, s.D);
                for (int64_t i = 0; i < BLOCK; i++)
                    for (int64_t d = 0; d < s.D; d += W) write(result + i * s.D + d, read(result + i * s.D + d) / totals[i]);
                pack(result, 1, s, b, h, first, BLOCK, out);
            }
    });
}

template <class X, class E>
void attention_backward(Shape s, float scale, Heads<const E> grad, Heads<const E> q, Heads<const E> k, Heads<const E> v,
                        Heads<const E> out, const float* log_sums, Heads<E> grad_q, Heads<E> grad_k, Heads<E> grad_v, int threads) {
    const int64_t all = s.padded() * s.D, some = BLOCK * s.D, scored = BLOCK * s.row(), queries_a_key = s.H / s.K;
    in_parallel(s.B * s.K, threads, [&](int64_t task) {
        const int64_t b = task / s.K, key_head = task % s.K;
        Scratch scratch(6 * all + 2 * s.D * s.row() + 6 * some + 3 * scored);
        float *plain_keys = scratch.take(all), *plain_values = scratch.take(all), *room = scratch.take(all);
        unpack(k, s, b, key_head, 0, s.padded(), plain_keys);
        unpack(v, s, b, key_head, 0, s.padded(), plain_values);
        const auto* turned_keys = turn<X>(plain_keys, s, room, scratch.take(s.D * s.row()));
        const auto* turned_values = turn<X>(plain_values, s, room, scratch.take(s.D * s.row()));
        const auto* keys = X::across(plain_keys, s.padded(), s.D, s.D, scratch.take(all));
        float *key_gradients = scratch.take(all), *value_gradients = scratch.take(all);
        std::fill(key_gradients, key_gradients + 2 * all, 0.0f);
        float *queries = scratch.take(some), *outs = scratch.take(some), *grads = scratch.take(some), *result = scratch.take(some);
        float *some_room = scratch.take(some), *other_room = scratch.take(some);
        float *probs = scratch.take(scored), *score_gradients = scratch.take(scored), *scores_room = scratch.take(scored);
        for (int64_t h = key_head * queries_a_key; h < (key_head + 1) * queries_a_key; h++)
            for (int64_t first = 0; first < s.T; first += BLOCK) {
                const int64_t seen = first + BLOCK;
                unpack(q, s, b, h, first, BLOCK, queries);
                unpack(out, s, b, h, first, BLOCK, outs);
                unpack(grad, s, b, h, first, BLOCK, grads);
                causal_scores<X>(queries, turned_keys, s, first, some_room, probs);
                product<false>(BLOCK, seen, s.D / X::PER_WORD, X::along(grads, BLOCK, s.D, s.D, some_room), s.D, 1, turned_values,
                               s.row(), score_gradients, s.row());
                for (int64_t i = 0; i < BLOCK; i++) {  // gradients of the loss by the scores, not yet times scale
                    V common{};
                    for (int64_t d = 0; d < s.D; d += W) common += read(grads + i * s.D + d) * read(outs + i * s.D + d);
                    const float mean_gradient = sum(common);
                    const float log_sum = first + i < s.T ? log_sums[(b * s.H + h) * s.T + first + i] : INFINITY;
                    float *p = probs + i * s.row(), *score_gradient = score_gradients + i * s.row();
                    for (int64_t j = 0; j < seen; j += W) {
                        const V prob = exponential(read(p + j) * scale - log_sum);
                        write(p + j, prob);
                        write(score_gradient + j, prob * (read(score_gradient + j) - mean_gradient));
                    }
                }
                product<true>(seen, s.D, BLOCK / X::PER_WORD, X::across(probs, BLOCK, seen, s.row(), scores_room), 1, s.row(),
                              X::across(grads, BLOCK, s.D, s.D, some_room), s.D, value_gradients, s.D);
                product<true>(seen, s.D, BLOCK / X::PER_WORD, X::across(score_gradients, BLOCK, seen, s.row(), scores_room), 1, s.row(),
                              X::across(queries, BLOCK, s.D, s.D, other_room), s.D, key_gradients, s.D);
                product<false>(BLOCK, s.D, seen / X::PER_WORD, X::along(score_gradients, BLOCK, seen, s.row(), scores_room), s.row(), 1, keys,
                               s.D, result, s.D);
                pack(result, scale, s, b, h, first, BLOCK, grad_q);
            }
        pack(key_gradients, scale, s, b, key_head, 0, s.padded(), grad_k);
        pack(value_gradients, 1, s, b, key_head, 0, s.padded(), grad_v);
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

template <class X, class E> void forward(const int64_t* shape, float scale, const int64_t (*x)[4], float* log_sums, int threads) {
    typedef Heads<const E> In;
    attention_forward<X, E>({shape[0], shape[1], shape[2], shape[3], shape[4]}, scale, In(x[0]), In(x[1]), In(x[2]), Heads<E>(x[3]),
                            log_sums, threads);
}

template <class X, class E>
void backward(const int64_t* shape, float scale, const int64_t (*x)[4], const float* log_sums, int threads) {
    typedef Heads<const E> In;
    typedef Heads<E> Out;
    attention_backward<X, E>({shape[0], shape[1], shape[2], shape[3], shape[4]}, scale, In(x[0]), In(x[1]), In(x[2]), In(x[3]),
                             In(x[4]), log_sums, Out(x[5]), Out(x[6]), Out(x[7]), threads);
}

#if defined(__AVX512BF16__)
typedef Pairs Short;  // what products of tensors in bf16 are made of
#else
typedef Whole Short;
#endif

}  // namespace

extern "C" {

int lanes() { return W; }

// x: q, k, v and the result
void attention_forward(int bf16, const int64_t* shape, float scale, const int64_t (*x)[4], float* log_sums, int threads) {
    (bf16 ? forward<Short, BF16> : forward<Whole, float>)(shape, scale, x, log_sums, threads);
}

// x: the gradient that comes in, q, k, v, the forward's result, and the gradients of q, k and v
void attention_backward(int bf16, const int64_t* shape, float scale, const int64_t (*x)[4], const float* log_sums, int threads) {
    (bf16 ? backward<Short, BF16> : backward<Whole, float>)(shape, scale, x, log_sums, threads);
}

int differentiate(int bf16, int64_t rows, int64_t vocab, void* logits, const int64_t* labels, int64_t ignored, float z_loss,
                  float* losses, int threads) {
    if (bf16) return differentiate<BF16>(rows, vocab, (BF16*)logits, labels, ignored, z_loss, losses, threads);
    return differentiate<float>(rows, vocab, (float*)logits, labels, ignored, z_loss, losses, threads);
}

}  // extern "C"
