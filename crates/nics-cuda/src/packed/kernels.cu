// Products with packed weights: `y = x Wᵀ + b` for up to 64 rows of x by one launch, and W written out for more.
//
// Compiled at run time for one kind of matrix: BITS of a code, GROUP channels that share a scale (0: all of a row), a scale
// in SCALES bits, x, b and y of half precision (IEEE_HALF 1) or of bf16 (0). How codes lie is said in `tiles.rs`.
//
// A warp takes 32 outputs and every so manieth block of 128 channels. It reads a block's codes as it multiplies them: the
// registers of `mma` are made from them without a way through shared memory. A code becomes the low bits of the mantissa of
// a power of two, and one `fma` takes that power and the zero away again, exactly. Products are exact and summed in float32,
// so that no value that x can have overflows, and up to 8 rows of x take the instructions of one.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

static_assert(BITS == 2 || BITS == 3 || BITS == 4 || BITS == 8, "codes of 2, 3, 4 or 8 bits");
static_assert(GROUP % 32 == 0 || GROUP == 0, "a column has one scale an output");
static_assert(SCALES == 16 || SCALES == 32, "scales of half precision or of float32");

constexpr int BLOCK = 128;  // channels of a block
constexpr int COLUMN = 32;  // channels of a column: a component of the block's vectors
constexpr int COLUMNS = BLOCK / COLUMN;
constexpr int TILE = 32;    // outputs of a tile
constexpr int PAIRS = 16;   // pairs of codes that a lane has of a column

// Columns whose scales are the same, however groups begin.
constexpr int ALIKE = GROUP % BLOCK == 0 ? COLUMNS : GROUP % (2 * COLUMN) == 0 ? 2 : 1;

constexpr int MANTISSA = IEEE_HALF ? 10 : 7;
constexpr int BIAS = IEEE_HALF ? 15 : 127;
constexpr u32 SIGN = 0x80008000u;
// Twice the same.
__device__ constexpr u32 twice(u32 x) { return x | x << 16; }
// 2^e, twice.
__device__ constexpr u32 power(int e) { return twice(u32(BIAS + e) << MANTISSA); }

// Numbers of 16 bits.

__device__ float wide(u16 h) {
#if IEEE_HALF
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
#else
    return __int_as_float(int(u32(h) << 16));
#endif
}

__device__ u16 narrow(float x) {
    u16 h;
#if IEEE_HALF
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(x));
#endif
    return h;
}

// `a b + c` of each half.
__device__ u32 fma(u32 a, u32 b, u32 c) {
    u32 d;
#if IEEE_HALF
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}

// `sum += a b`: 16 outputs, 16 channels, 8 rows of x.
__device__ void mma(float (&sum)[4], const u32* a, u32 low, u32 high) {
#if IEEE_HALF
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(low), "r"(high));
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(low), "r"(high));
#endif
}

// Codes.

// The codes in bits `at ..` of both halves of a word, less `zero`, which stands in both halves too; both as numbers.
__device__ u32 less_zero(u32 word, int at, u32 zero) {
    constexpr u32 MASK = (1u << BITS) - 1;
    if constexpr (BITS <= MANTISSA) {
        // Codes that the mantissa has room for, one above the other, need no shift between them.
        constexpr int ROOM = MANTISSA / BITS;
        const int place = at / BITS % ROOM * BITS;
        u32 two; // (a & b) | c
        asm("lop3.b32 %0, %1, %2, %3, %4;"
            : "=r"(two)
            : "r"(word >> (at - place)), "r"(twice(MASK) << place), "r"(power(MANTISSA)), "n"(0xea));
        return fma(two, power(-place), SIGN | power(MANTISSA - place) | zero << place);
    } else {
        // 8 bits and 7 of bf16: differences of whole numbers up to 255, which bf16 has.
        const float magic = 8388608.0f;
        const float low = __int_as_float(int(0x4b000000u | (word >> at & MASK))) - magic - float(zero & MASK);
        const float high = __int_as_float(int(0x4b000000u | (word >> (at + 16) & MASK))) - magic - float(zero & MASK);
        return __byte_perm(u32(__float_as_int(low)), u32(__float_as_int(high)), 0x7632u);
    }
}

// The `pair`-th pair of codes of a column, less their zeros.
__device__ u32 codes(const u32 (&words)[BITS], int pair, u32 zero) {
    if constexpr (BITS == 3) {
        // Five codes a half; the bits that are left over are the sixteenth pair.
        if (pair < 15) return less_zero(words[pair / 5], pair % 5 * 3, zero);
        return less_zero(
            (words[0] >> 15 & 0x00010001u) | (words[1] >> 14 & 0x00020002u) | (words[2] >> 13 & 0x00040004u), 0, zero
        );
    } else {
        constexpr int EACH = 16 / BITS;
        return less_zero(words[pair / EACH], pair % EACH * BITS, zero);
    }
}

__device__ u32 component(const uint4& four, int i) {
    return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// Scales and zeros of the four outputs that a lane has to do with: `lane / 4 + 8 i`.
struct Parameters {
    u32 scales[SCALES / 8];
    u32 zeros;
};

__device__ float scale_of(const Parameters& own, int i) {
#if SCALES == 32
    return __int_as_float(int(own.scales[i]));
#else
    float x;
    const u16 h = u16(own.scales[i / 2] >> (i % 2 * 16));
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
#endif
}

__device__ u32 zero_of(const Parameters& own, int i) { return twice(own.zeros >> (8 * i) & 255u); }

// A matrix on the device.
struct Matrix {
    const uint4* codes; // [tiles, blocks, BITS, 32]
    const u8* scales;   // [tiles, groups, 8, 4]
    const u8* zeros;    // likewise, a byte each
    int blocks;
    int groups;
};

__device__ Parameters parameters(const Matrix& w, int tile, int channel) {
    int group = 0;
    if constexpr (GROUP > 0) group = min(channel / GROUP, w.groups - 1); // channels that fill up a block have none
    const u64 at = ((u64(tile) * w.groups + group) * 8 + threadIdx.x % 32 / 4) * 4;
    Parameters own;
    own.zeros = *reinterpret_cast<const u32*>(w.zeros + at);
#if SCALES == 32
    const uint4 four = *reinterpret_cast<const uint4*>(w.scales + at * 4);
    own.scales[0] = four.x, own.scales[1] = four.y, own.scales[2] = four.z, own.scales[3] = four.w;
#else
    const uint2 two = *reinterpret_cast<const uint2*>(w.scales + at * 2);
    own.scales[0] = two.x, own.scales[1] = two.y;
#endif
    return own;
}

// What a lane needs of a block, on its way from memory.
struct Stage {
    uint4 codes[BITS];
    Parameters own[COLUMNS / ALIKE];
};

__device__ void load(Stage& to, const Matrix& w, int tile, int block) {
    const uint4* from = w.codes + (u64(tile) * w.blocks + block) * (BITS * 32) + threadIdx.x % 32;
#pragma unroll
    for (int v = 0; v < BITS; v++) to.codes[v] = __ldcs(from + v * 32);
#pragma unroll
    for (int i = 0; i < COLUMNS / ALIKE; i++) to.own[i] = parameters(w, tile, block * BLOCK + i * ALIKE * COLUMN);
}

// The numbers of a column in the registers of `mma`: [halves of the column's channels][halves of the outputs][4].
__device__ void numbers(const Stage& from, int column, u32 (&a)[PAIRS]) {
    u32 words[BITS];
#pragma unroll
    for (int v = 0; v < BITS; v++) words[v] = component(from.codes[v], column);
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
        const int output = pair / 4 % 2 * 2 + pair % 2;
        a[pair] = codes(words, pair, zero_of(from.own[column / ALIKE], output));
    }
}

// Products of a block: `sum` is `[8 rows of x][16 outputs][4]`. `x` is where the lane's first row has its channels of the block;
// from there on there are `rows` rows, and channels up to `channels`.
template <int TILES>
__device__ void multiply(float (&sum)[TILES][2][4], const Stage& from, const u16* x, int rows, int channels, int input) {
    float part[TILES][2][4];
#pragma unroll
    for (int column = 0; column < COLUMNS; column++) {
        if (column % ALIKE == 0) {
#pragma unroll
            for (int i = 0; i < TILES * 8; i++) part[i / 8][i / 4 % 2][i % 4] = 0.0f;
        }
        uint4 eight[TILES]; // channels of a row of x; what fills up a block or the rows is 0
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            eight[t] = uint4{0, 0, 0, 0};
            if (t * 8 < rows && column * COLUMN < channels) {
                eight[t] = *reinterpret_cast<const uint4*>(x + u64(t * 8) * input + column * COLUMN);
            }
        }
        u32 a[PAIRS];
        numbers(from, column, a);
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            mma(part[t][0], a, eight[t].x, eight[t].y);
            mma(part[t][1], a + 4, eight[t].x, eight[t].y);
            mma(part[t][0], a + 8, eight[t].z, eight[t].w);
            mma(part[t][1], a + 12, eight[t].z, eight[t].w);
        }
        if (column % ALIKE == ALIKE - 1) {
#pragma unroll
            for (int i = 0; i < TILES * 8; i++) {
                const int half = i / 4 % 2;
                sum[i / 8][half][i % 4] += part[i / 8][half][i % 4] * scale_of(from.own[column / ALIKE], half * 2 + i % 4 / 2);
            }
        }
    }
}

// 32 outputs (x) of 8 * TILES rows (y), by WARPS warps, each of which has some of the channels.
template <int TILES, int WARPS>
__device__ void product(u16* y, const u16* x, const Matrix& w, const u16* bias, int rows, int input, int out) {
    constexpr int STAGES = BITS == 8 ? 1 : 2; // blocks of a warp on their way, as far as registers go
    __shared__ float parts[WARPS / 2][TILES * 8][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = blockIdx.x, first = blockIdx.y * (8 * TILES);
    const int own = first + lane / 4, quad = lane % 4 * 8;
    const u16* mine = x + u64(own) * input + quad;
    float sum[TILES][2][4];
#pragma unroll
    for (int i = 0; i < TILES * 8; i++) sum[i / 8][i / 4 % 2][i % 4] = 0.0f;
    Stage stages[STAGES];
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
        if (warp + s * WARPS < w.blocks) load(stages[s], w, tile, warp + s * WARPS);
    }
    for (int begin = warp; begin < w.blocks; begin += STAGES * WARPS) {
#pragma unroll
        for (int s = 0; s < STAGES; s++) {
            // The same for the whole warp.
            const int block = begin + s * WARPS, next = block + STAGES * WARPS;
            if (block < w.blocks) {
                multiply<TILES>(sum, stages[s], mine + block * BLOCK, rows - own, input - quad - block * BLOCK, input);
            }
            if (next < w.blocks) load(stages[s], w, tile, next);
        }
    }
    // The second half of the warps hands its sums to the first, until one is left.
    for (int half = WARPS / 2; half > 0; half /= 2) {
        if (warp >= half && warp < 2 * half) {
#pragma unroll
            for (int i = 0; i < TILES * 8; i++) parts[warp - half][i][lane] = sum[i / 8][i / 4 % 2][i % 4];
        }
        __syncthreads();
        if (warp < half) {
#pragma unroll
            for (int i = 0; i < TILES * 8; i++) sum[i / 8][i / 4 % 2][i % 4] += parts[warp][i][lane];
        }
        __syncthreads();
    }
    if (warp > 0) return;
#pragma unroll
    for (int i = 0; i < TILES * 8; i++) {
        const int row = first + i / 8 * 8 + lane % 4 * 2 + i % 2;
        const int output = tile * TILE + i / 4 % 2 * 16 + i % 4 / 2 * 8 + lane / 4;
        if (row < rows && output < out) {
            const float added = bias != nullptr ? wide(bias[output]) : 0.0f;
            y[u64(row) * out + output] = narrow(sum[i / 8][i / 4 % 2][i % 4] + added);
        }
    }
}

// `x`: `[rows, input]`, `y`: `[rows, out]`, `bias`: `[out]` or null.
#define PRODUCT(name, tiles, warps)                                                                                    \
    extern "C" __global__ void __launch_bounds__(warps * 32) name(                                                      \
        u16* y, const u16* x, const uint4* codes, const u8* scales, const u8* zeros, const u16* bias, int rows,         \
        int input, int out, int blocks, int groups                                                                      \
    ) {                                                                                                                 \
        product<tiles, warps>(y, x, Matrix{codes, scales, zeros, blocks, groups}, bias, rows, input, out);              \
    }
PRODUCT(product_8, 1, 16)
PRODUCT(product_16, 2, 16)
PRODUCT(product_32, 4, 8)
PRODUCT(product_64, 8, 8)

// What codes mean, `[out, input]`: 32 outputs (x), as many blocks as there are warps (y).
extern "C" __global__ void __launch_bounds__(256)
dequantize(u16* to, const uint4* codes, const u8* scales, const u8* zeros, int input, int out, int blocks, int groups) {
    const Matrix w = {codes, scales, zeros, blocks, groups};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = lane / 4, quad = lane % 4;
    const int tile = blockIdx.x, block = blockIdx.y * 8 + warp;
    if (block >= blocks) return;
    Stage stage;
    load(stage, w, tile, block);
#pragma unroll
    for (int column = 0; column < COLUMNS; column++) {
        u32 a[PAIRS];
        numbers(stage, column, a);
        const int channel = block * BLOCK + column * COLUMN + quad * 8;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int output = tile * TILE + i * 8 + own;
            const float scale = scale_of(stage.own[column / ALIKE], i);
            u32 two[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const u32 pair = a[k / 2 * 8 + i / 2 * 4 + k % 2 * 2 + i % 2];
                two[k] = narrow(wide(u16(pair)) * scale) | u32(narrow(wide(u16(pair >> 16)) * scale)) << 16;
            }
            if (output < out && channel < input) {
                *reinterpret_cast<uint4*>(to + u64(output) * input + channel) = uint4{two[0], two[1], two[2], two[3]};
            }
        }
    }
}
