// Matrix tiles in plain C++, as the instructions define them, for processors without: `-include` it to build cpu_kernels.cpp on them.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define TILES 1
#define tile_permission() 0

namespace emulated {

thread_local float tiles[8][16][16];
thread_local bool configured = false;  // an instruction on tiles without a configuration is a fault

inline void require(bool valid) {
    if (!valid) __builtin_trap();
}

inline float without_denormals(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

inline float widened(uint16_t bf16) {
    const uint32_t bits = uint32_t(bf16) << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return without_denormals(x);
}

}  // namespace emulated

inline void tile_configuration(void* to) {
    std::memset(to, 0, 64);
    *(uint8_t*)to = emulated::configured;
}

// Palette 1 with eight tiles of 16 rows of 64 bytes, or palette 0: no tiles.
inline void tile_configure(const void* from) {
    const auto* bytes = (const uint8_t*)from;
    for (int i = 0; bytes[0] && i < 8; i++) emulated::require(bytes[0] == 1 && bytes[16 + 2 * i] == 64 && bytes[48 + i] == 16);
    std::memset(emulated::tiles, 0, sizeof emulated::tiles);
    emulated::configured = bytes[0];
}

inline void tile_zero(int tile) {
    emulated::require(emulated::configured);
    std::memset(emulated::tiles[tile], 0, sizeof emulated::tiles[tile]);
}

inline void tile_load(int tile, const void* from, int64_t bytes) {
    emulated::require(emulated::configured);
    for (int row = 0; row < 16; row++) std::memcpy(emulated::tiles[tile][row], (const char*)from + row * bytes, 64);
}

inline void tile_store(int tile, void* to, int64_t bytes) {
    emulated::require(emulated::configured);
    for (int row = 0; row < 16; row++) std::memcpy((char*)to + row * bytes, emulated::tiles[tile][row], 64);
}

// TDPBF16PS of the Intel manual: the first and the second numbers of pairs are summed apart by fused operations, then added to each
// other and to what the tile held; denormals, given or found, are zero.
inline void tile_multiply(int sum, int left, int right) {
    emulated::require(emulated::configured);
    uint16_t a[16][32], b[16][32];
    std::memcpy(a, emulated::tiles[left], sizeof a);
    std::memcpy(b, emulated::tiles[right], sizeof b);
    using emulated::widened, emulated::without_denormals;
    for (int m = 0; m < 16; m++) {
        float sums[32] = {};
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 32; n++) sums[n] = without_denormals(std::fma(widened(a[m][2 * k + n % 2]), widened(b[k][n]), sums[n]));
        for (int n = 0; n < 16; n++) {
            float& total = emulated::tiles[sum][m][n];
            total = without_denormals(without_denormals(total) + without_denormals(sums[2 * n] + sums[2 * n + 1]));
        }
    }
}
