// CUDA's words for a processor: the threads of a block are contexts that take turns, and give theirs away where they wait
// for each other. Blocks run one after the other. A PTX instruction is a function whose name is the instruction's.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <ucontext.h>
#include <utility>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx;

namespace emulation {
constexpr unsigned MOST = 1024, STACK = 128 << 10;
struct Barrier { unsigned arrived = 0, turn = 0; };
static Barrier block, warps[MOST / 32];
static ucontext_t home, threads[MOST];
static bool done[MOST];
static unsigned count, slots[MOST][6];
static void (*body)();

static void wait(Barrier& barrier, unsigned all) {
    const unsigned turn = barrier.turn, own = threadIdx.x;
    if (++barrier.arrived == all) {
        barrier.arrived = 0, barrier.turn++;
        return;
    }
    while (barrier.turn == turn) swapcontext(&threads[own], &home);
}
static void thread() {
    body();
    done[threadIdx.x] = true;
}
// Runs one block of `n` threads.
static void run(unsigned n, void (*of_thread)()) {
    static const std::unique_ptr<char[]> stacks(new char[size_t(MOST) * STACK]);
    count = n, body = of_thread;
    for (unsigned i = 0; i < n; i++) {
        getcontext(&threads[i]);
        threads[i].uc_stack.ss_sp = stacks.get() + size_t(i) * STACK;
        threads[i].uc_stack.ss_size = STACK;
        threads[i].uc_link = &home;
        makecontext(&threads[i], thread, 0);
        done[i] = false;
    }
    for (unsigned left = n; left > 0;) {
        for (unsigned i = 0; i < n; i++) {
            if (done[i]) continue;
            threadIdx = {i, 0, 0};
            swapcontext(&home, &threads[i]);
            left -= done[i];
        }
    }
}

// A kernel's arguments are 64-bit words, in its order.
static const unsigned long long* arguments;
template <class T> static T argument(int i) {
    T x;
    std::memcpy(&x, &arguments[i], sizeof x);
    return x;
}
template <class... P, size_t... I> static void call(void (*kernel)(P...), std::index_sequence<I...>) {
    kernel(argument<P>(I)...);
}
template <class... P> static void call(void (*kernel)(P...)) { call(kernel, std::index_sequence_for<P...>()); }

static float value(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static uint32_t bits(float x) {
    uint32_t own;
    std::memcpy(&own, &x, 4);
    return own;
}
static float of_f16(unsigned short h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float x = exponent == 31 ? mantissa ? NAN : INFINITY
        : exponent ? std::ldexp(float(mantissa + 1024), exponent - 25) : std::ldexp(float(mantissa), -24);
    return h >> 15 ? -x : x;
}
static unsigned short to_f16(float x) {
    const unsigned short sign = bits(x) >> 16 & 0x8000;
    x = std::fabs(x);
    if (std::isnan(x)) return 0x7fff;
    if (x >= 65520.0f) return sign | 0x7c00;
    if (x < 0x1p-14f) return sign | (unsigned short)(std::nearbyint(std::ldexp(x, 24)));
    const int e = std::ilogb(x);
    // A mantissa that is rounded up to 2048 carries into the exponent, as it should.
    return sign | (unsigned short)(((e + 14) << 10) + int(std::nearbyint(std::ldexp(x, 10 - e))));
}
static float of_bf16(unsigned short h) { return value(uint32_t(h) << 16); }
static unsigned short to_bf16(float x) {
    const uint32_t own = bits(x);
    if (std::isnan(x)) return 0x7fff;
    return (own + 0x7fff + (own >> 16 & 1)) >> 16;
}
// The sum is taken in double precision: of values of 16 bits it is rounded once.
template <float (*OF)(unsigned short), unsigned short (*TO)(float)>
static unsigned fma_of_two(unsigned a, unsigned b, unsigned c) {
    unsigned out = 0;
    for (int i = 0; i < 32; i += 16) {
        const auto x = [i](unsigned two) { return double(OF((unsigned short)(two >> i))); };
        out |= unsigned(TO(float(x(a) * x(b) + x(c)))) << i;
    }
    return out;
}
} // namespace emulation

static void __syncthreads() { emulation::wait(emulation::block, emulation::count); }
static void __syncwarp() { emulation::wait(emulation::warps[threadIdx.x / 32], 32); }
static float __int_as_float(int bits) { return emulation::value(uint32_t(bits)); }
static int __float_as_int(float x) { return int(emulation::bits(x)); }
static int __float2int_rn(float x) { return int(std::nearbyint(x)); }
static float __shfl_xor_sync(unsigned, float x, int far) {
    emulation::slots[threadIdx.x][0] = emulation::bits(x);
    __syncwarp();
    const unsigned got = emulation::slots[threadIdx.x ^ unsigned(far)][0];
    __syncwarp();
    return emulation::value(got);
}
static unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = uint64_t(high) << 32 | low;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= unsigned(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return out;
}
template <class T> static T __ldcs(const T* at) { return *at; }
static int min(int a, int b) { return a < b ? a : b; }
using std::exp2f;
using std::fmaxf;
using std::fminf;

// PTX.

static void cvt_f32_f16(float& x, unsigned short h) { x = emulation::of_f16(h); }
static void cvt_rn_f16_f32(unsigned short& h, float x) { h = emulation::to_f16(x); }
static void cvt_rn_bf16_f32(unsigned short& h, float x) { h = emulation::to_bf16(x); }
static void fma_rn_f16x2(unsigned& d, unsigned a, unsigned b, unsigned c) {
    d = emulation::fma_of_two<emulation::of_f16, emulation::to_f16>(a, b, c);
}
static void fma_rn_bf16x2(unsigned& d, unsigned a, unsigned b, unsigned c) {
    d = emulation::fma_of_two<emulation::of_bf16, emulation::to_bf16>(a, b, c);
}
static void lop3_b32(unsigned& d, unsigned a, unsigned b, unsigned c, unsigned table) {
    d = 0;
    for (int i = 0; i < 32; i++) {
        d |= (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i;
    }
}
// `d += a b` of a warp, `[16, 16]` by `[16, 8]`: PTX's manual says which lane holds which element ("matrix fragments for
// mma.m16n8k16").
template <float (*OF)(unsigned short)>
static void emulated_mma(float* (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    const unsigned lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; i++) emulation::slots[threadIdx.x][i] = a[i];
    for (int i = 0; i < 2; i++) emulation::slots[threadIdx.x][4 + i] = b[i];
    __syncwarp();
    const auto& all = emulation::slots;
    const unsigned first = threadIdx.x - lane;
    for (int i = 0; i < 4; i++) {
        const unsigned high = i / 2, n = column + i % 2;
        float sum = *d[i];
        for (unsigned k = 0; k < 16; k++) {
            const unsigned of_a = all[first + row * 4 + k % 8 / 2][high + k / 8 * 2];
            const unsigned of_b = all[first + n * 4 + k % 8 / 2][4 + k / 8];
            sum += OF((unsigned short)(of_a >> (k % 2 * 16))) * OF((unsigned short)(of_b >> (k % 2 * 16)));
        }
        *d[i] = sum;
    }
    __syncwarp();
}
#define EMULATED_MMA(name, of)                                                                                          \
    static void name(                                                                                                   \
        float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,    \
        unsigned b1                                                                                                     \
    ) {                                                                                                                 \
        float* d[4] = {&d0, &d1, &d2, &d3};                                                                             \
        emulated_mma<emulation::of>(d, {a0, a1, a2, a3}, {b0, b1});                                                     \
    }
EMULATED_MMA(mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32, of_f16)
EMULATED_MMA(mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32, of_bf16)
