// CUDA's words for a processor: the threads of a block are contexts that take turns, and give theirs away where they wait
// for each other. Blocks run one after the other.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <ucontext.h>

#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)

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
static unsigned count, slots[MOST];
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
} // namespace emulation

static void __syncthreads() { emulation::wait(emulation::block, emulation::count); }
static void __syncwarp() { emulation::wait(emulation::warps[threadIdx.x / 32], 32); }
static float __int_as_float(int bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
static int __float2int_rn(float x) { return int(std::nearbyint(x)); }
static float __shfl_xor_sync(unsigned, float x, int far) {
    std::memcpy(&emulation::slots[threadIdx.x], &x, 4);
    __syncwarp();
    const unsigned got = emulation::slots[threadIdx.x ^ unsigned(far)];
    __syncwarp();
    return __int_as_float(int(got));
}
static unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = uint64_t(high) << 32 | low;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) out |= unsigned(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return out;
}
static int min(int a, int b) { return a < b ? a : b; }
static float emulated_half(unsigned short bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float x = exponent ? std::ldexp(float(mantissa + 1024), exponent - 25) : std::ldexp(float(mantissa), -24);
    return bits >> 15 ? -x : x;
}
using std::exp2f;
using std::fmaxf;
using std::fminf;
