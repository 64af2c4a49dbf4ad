// Attention over pages of codes, and halving of a page's width in its place: the operations of `ops.rs`, fused.
//
// Compiled at run time for one shape: DIM channels of a head, QUERIES query heads of a key head, GROUP channels that share
// a scale, exact rows of half precision (IEEE_HALF 1) or of bf16 (0). What a page looks like is said in `pages.rs`, where
// its codes stand in `pack.rs`.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

static_assert(DIM % 64 == 0 && DIM <= 256, "runs of codes are 16 or 32 bytes");
static_assert(DIM % GROUP == 0 && GROUP % 16 == 0, "16 channels side by side share a scale");

constexpr int GROUPS = DIM / GROUP;
constexpr int WARPS = 4;         // of a block of `attend`, each with a segment of its own
constexpr int SEGMENT = 128;     // most tokens of a segment
constexpr int OWN = SEGMENT / 32; // of them a lane's
constexpr int PADDED = (QUERIES + 3) / 4 * 4;
constexpr u32 ALL = 0xffffffffu;
#define NOTHING __int_as_float(int(0xff800000u)) // the score of no token

// Index arithmetic.

// Codes of a run, and its bytes. Of 8 bits a row is one run.
__device__ constexpr int run(int bits) { return bits >= 8 ? DIM : bits == 4 ? 32 : DIM % 128 == 0 ? 128 : 64; }
__device__ constexpr int stride(int bits) { return bits >= 8 ? DIM : run(bits) * bits / 8; }
// Channel of the code in bits `plane * bits ..` of a byte of a row.
__device__ constexpr int channel(int bits, int byte, int plane) {
    return byte / stride(bits) * run(bits) + byte % stride(bits) + plane * stride(bits);
}
// Channel of the k-th of the 8 codes in the `unit`-th eighth part of DIM / 8 of a row.
__device__ constexpr int unit_channel(int bits, int unit, int k) {
    return bits >= 8 ? unit * 8 + k : channel(bits, unit * bits + k % bits, k / bits);
}
// Row of a page for keys (part 0) or values (part 1): `[part, key head, token]`.
__device__ constexpr u64 row_of(int part, int head, u64 token, int heads, u64 capacity) {
    return (u64(part) * heads + head) * capacity + token;
}

__device__ float half_value(u16 h) {
#if IEEE_HALF
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
#else
    return __int_as_float(int(u32(h) << 16));
#endif
}

// The `byte`-th of four codes. The code becomes the mantissa of 2^23 + code, which is cheaper than a conversion.
template <int BITS> __device__ float code(u32 word, int plane, int byte) {
    u32 four = BITS == 8 ? word : (word >> (BITS * plane)) & (BITS == 4 ? 0x0f0f0f0fu : 0x03030303u);
    return __int_as_float(int(__byte_perm(four, 0x4b000000u, 0x7440u | byte))) - 8388608.0f;
}

// What a warp computes of a page.
struct Segment {
    u64 rows;       // address of the page's rows
    u64 parameters; // address of its scales, then its zeros
    u64 bits;
    u64 capacity; // tokens that the page has room for
    u64 first;    // its first token here
    u64 tokens;   // from 1 to SEGMENT
};

struct Chunk {
    u64 sequence;
    u64 first;    // its first segment
    u64 segments; // from 1 to WARPS
};

// Scores of tokens `lane`, `lane + 32`, ..: `q c s - z sum(q)`. A missing token reads the last one again.
template <int BITS>
__device__ void keys(
    const u8* rows, const float* scales, const float* zeros, int tokens, const float* q, const float* sums,
    float (&score)[QUERIES][OWN]
) {
    constexpr int ROW = DIM * BITS / 8;
    const int lane = threadIdx.x % 32;
    int token[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        token[i] = min(lane + 32 * i, tokens - 1);
#pragma unroll
        for (int g = 0; g < QUERIES; g++) score[g][i] = 0.0f;
    }
#pragma unroll 2
    for (int piece = 0; piece < ROW / 16; piece++) {
        u32 raw[OWN][4];
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const uint4 four = *reinterpret_cast<const uint4*>(rows + token[i] * ROW + piece * 16);
            raw[i][0] = four.x, raw[i][1] = four.y, raw[i][2] = four.z, raw[i][3] = four.w;
        }
        // Each plane holds 16 channels side by side.
#pragma unroll
        for (int plane = 0; plane < (BITS >= 8 ? 1 : 8 / BITS); plane++) {
            const int first = BITS == 16 ? piece * 8 : channel(BITS, piece * 16, plane);
            float scale[OWN];
            if constexpr (GROUPS > 1 && BITS < 16) {
#pragma unroll
                for (int i = 0; i < OWN; i++) scale[i] = scales[token[i] * GROUPS + first / GROUP];
            }
#pragma unroll
            for (int four = 0; four < (BITS == 16 ? 2 : 4); four++) {
                float x[OWN][4];
#pragma unroll
                for (int i = 0; i < OWN; i++) {
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        if constexpr (BITS == 16) {
                            const u32 two = raw[i][four * 2 + k / 2];
                            x[i][k] = half_value(u16(k % 2 ? two >> 16 : two));
                        } else {
                            x[i][k] = code<BITS>(raw[i][four], plane, k);
                            if constexpr (GROUPS > 1) x[i][k] *= scale[i];
                        }
                    }
                }
#pragma unroll
                for (int g = 0; g < QUERIES; g++) {
                    const float4 own = *reinterpret_cast<const float4*>(q + g * DIM + first + four * 4);
#pragma unroll
                    for (int i = 0; i < OWN; i++) {
                        score[g][i] += x[i][0] * own.x + x[i][1] * own.y + x[i][2] * own.z + x[i][3] * own.w;
                    }
                }
            }
        }
    }
    if constexpr (BITS < 16) {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if constexpr (GROUPS == 1) {
#pragma unroll
                for (int g = 0; g < QUERIES; g++) score[g][i] *= scales[token[i]];
            }
            for (int group = 0; group < GROUPS; group++) {
                const float zero = zeros[token[i] * GROUPS + group];
#pragma unroll
                for (int g = 0; g < QUERIES; g++) score[g][i] -= zero * sums[g * GROUPS + group];
            }
        }
    }
}

// Sums of weighted values: 8 channels a lane, `unit_channel`; lanes of other tokens hold other parts of the sums.
template <int BITS>
__device__ void values(
    const u8* rows, const float* scales, const float* zeros, int tokens, const float* weights,
    float (&sum)[QUERIES][8]
) {
    constexpr int ROW = DIM * BITS / 8, UNITS = DIM / 8, TOGETHER = 32 / UNITS;
    const int unit = threadIdx.x % 32 % UNITS, other = threadIdx.x % 32 / UNITS;
#pragma unroll
    for (int g = 0; g < QUERIES; g++) {
#pragma unroll
        for (int k = 0; k < 8; k++) sum[g][k] = 0.0f;
    }
    if (other >= TOGETHER) return;
#pragma unroll 4
    for (int token = other; token < tokens; token += TOGETHER) {
        const u8* at = rows + token * ROW + unit * BITS; // 8 codes are BITS bytes
        u32 raw[4] = {};
        if constexpr (BITS == 2) raw[0] = *reinterpret_cast<const u16*>(at);
        if constexpr (BITS == 4) raw[0] = *reinterpret_cast<const u32*>(at);
        if constexpr (BITS == 8) {
            const uint2 two = *reinterpret_cast<const uint2*>(at);
            raw[0] = two.x, raw[1] = two.y;
        }
        if constexpr (BITS == 16) {
            const uint4 four = *reinterpret_cast<const uint4*>(at);
            raw[0] = four.x, raw[1] = four.y, raw[2] = four.z, raw[3] = four.w;
        }
        float x[8];
#pragma unroll
        for (int k = 0; k < 8; k++) {
            if constexpr (BITS == 16) {
                x[k] = half_value(u16(k % 2 ? raw[k / 2] >> 16 : raw[k / 2]));
            } else if constexpr (BITS == 8) {
                x[k] = code<BITS>(raw[k / 4], 0, k % 4);
            } else {
                x[k] = code<BITS>(raw[0], k / BITS, k % BITS);
            }
        }
        if constexpr (GROUPS > 1 && BITS < 16) {
            // The codes of a plane are of channels side by side, which share a scale.
#pragma unroll
            for (int plane = 0; plane < 8 / BITS; plane++) {
                const int group = token * GROUPS + unit_channel(BITS, unit, plane * BITS) / GROUP;
                const float scale = scales[group], zero = zeros[group];
#pragma unroll
                for (int k = plane * BITS; k < (plane + 1) * BITS; k++) x[k] = x[k] * scale - zero;
            }
        }
#pragma unroll
        for (int g4 = 0; g4 < PADDED / 4; g4++) {
            const float4 four = *reinterpret_cast<const float4*>(weights + token * PADDED + g4 * 4);
            const float own[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int g = 0; g < 4; g++) {
                if (g4 * 4 + g < QUERIES) {
#pragma unroll
                    for (int k = 0; k < 8; k++) sum[g4 * 4 + g][k] += own[g] * x[k];
                }
            }
        }
    }
}

// A warp's segment: `max[g]` is the largest score, `total[g]` the sum of the exponentials to base 2, `sum[g] - zero[g]` that
// of the weighted values.
template <int BITS>
__device__ void segment(
    const Segment& at, int head, int heads, const float* q, const float* sums, float* weights,
    float (&max)[QUERIES], float (&total)[QUERIES], float (&zero)[QUERIES], float (&sum)[QUERIES][8]
) {
    const int tokens = int(at.tokens), lane = threadIdx.x % 32;
    const u8* rows = reinterpret_cast<const u8*>(at.rows);
    const float* scales = reinterpret_cast<const float*>(at.parameters);
    const float* zeros = scales + 2 * heads * at.capacity * GROUPS;
    const u64 k = row_of(0, head, at.first, heads, at.capacity), v = row_of(1, head, at.first, heads, at.capacity);
    float score[QUERIES][OWN];
    keys<BITS>(rows + k * (DIM * BITS / 8), scales + k * GROUPS, zeros + k * GROUPS, tokens, q, sums, score);
    float value_scale[OWN], value_zero[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const u64 own = v + min(lane + 32 * i, tokens - 1);
        value_scale[i] = BITS < 16 && GROUPS == 1 ? scales[own] : 1.0f;
        value_zero[i] = BITS < 16 && GROUPS == 1 ? zeros[own] : 0.0f;
    }
#pragma unroll
    for (int g = 0; g < QUERIES; g++) {
        float most = NOTHING, all = 0.0f, of_zeros = 0.0f;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if (lane + 32 * i >= tokens) score[g][i] = NOTHING;
            most = fmaxf(most, score[g][i]);
        }
        for (int far = 16; far > 0; far /= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, far));
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const float e = exp2f(score[g][i] - most);
            all += e;
            of_zeros += e * value_zero[i];
            score[g][i] = e * value_scale[i];
        }
        for (int far = 16; far > 0; far /= 2) {
            all += __shfl_xor_sync(ALL, all, far);
            of_zeros += __shfl_xor_sync(ALL, of_zeros, far);
        }
        max[g] = most, total[g] = all, zero[g] = of_zeros;
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
#pragma unroll
        for (int g4 = 0; g4 < PADDED / 4; g4++) {
            float own[4];
#pragma unroll
            for (int g = 0; g < 4; g++) own[g] = g4 * 4 + g < QUERIES ? score[min(g4 * 4 + g, QUERIES - 1)][i] : 0.0f;
            const float4 four = {own[0], own[1], own[2], own[3]};
            *reinterpret_cast<float4*>(weights + (lane + 32 * i) * PADDED + g4 * 4) = four;
        }
    }
    __syncwarp();
    values<BITS>(rows + v * (DIM * BITS / 8), scales + v * GROUPS, zeros + v * GROUPS, tokens, weights, sum);
    // Lanes whose units are the same read different tokens.
    constexpr int UNITS = DIM / 8;
    if constexpr (UNITS < 24) {
#pragma unroll
        for (int g = 0; g < QUERIES; g++) {
#pragma unroll
            for (int k = 0; k < 8; k++) {
                for (int far = 16; far >= UNITS; far /= 2) sum[g][k] += __shfl_xor_sync(ALL, sum[g][k], far);
            }
        }
    }
}

// One chunk (x) of one key head (y). `q`: `[sequences, heads * QUERIES, DIM]`, `parts`: `[chunks, heads, QUERIES * (2 + DIM)]`, the
// queries' largest scores, the sums of their exponentials to base 2, and the weighted values. `factor` goes to the scores.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
attend(float* parts, const float* q, const Segment* segments, const Chunk* chunks, int heads, float factor) {
    alignas(16) __shared__ float query[QUERIES * DIM]; // then the sums of all warps
    __shared__ float sums[QUERIES * GROUPS];
    alignas(16) __shared__ float weights[WARPS][SEGMENT * PADDED];
    __shared__ float maxes[WARPS][QUERIES], totals[WARPS][QUERIES];
    const Chunk chunk = chunks[blockIdx.x];
    const int head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float* own = q + (chunk.sequence * heads + head) * QUERIES * DIM;
    for (int i = threadIdx.x; i < QUERIES * DIM; i += WARPS * 32) query[i] = own[i] * factor;
    __syncthreads();
    for (int i = threadIdx.x; i < QUERIES * GROUPS; i += WARPS * 32) {
        float sum = 0.0f;
        for (int c = 0; c < GROUP; c++) sum += query[i * GROUP + c];
        sums[i] = sum;
    }
    __syncthreads();
    float max[QUERIES], total[QUERIES], zero[QUERIES], sum[QUERIES][8];
    int bits = 8;
    if (warp < chunk.segments) {
        const Segment at = segments[chunk.first + warp];
        bits = int(at.bits);
        switch (bits) {
        case 2: segment<2>(at, head, heads, query, sums, weights[warp], max, total, zero, sum); break;
        case 4: segment<4>(at, head, heads, query, sums, weights[warp], max, total, zero, sum); break;
        case 8: segment<8>(at, head, heads, query, sums, weights[warp], max, total, zero, sum); break;
        default: segment<16>(at, head, heads, query, sums, weights[warp], max, total, zero, sum); break;
        }
    } else {
#pragma unroll
        for (int g = 0; g < QUERIES; g++) {
            max[g] = NOTHING, total[g] = zero[g] = 0.0f;
#pragma unroll
            for (int k = 0; k < 8; k++) sum[g][k] = 0.0f;
        }
    }
#pragma unroll
    for (int g = 0; g < QUERIES; g++) {
        if (lane == 0) maxes[warp][g] = max[g], totals[warp][g] = total[g];
    }
    __syncthreads();
    // One warp after the other, the first of which always has a segment.
    for (int turn = 0; turn < WARPS; turn++) {
        if (warp == turn && lane < DIM / 8) {
#pragma unroll
            for (int g = 0; g < QUERIES; g++) {
                float most = maxes[0][g];
                for (int w = 1; w < WARPS; w++) most = fmaxf(most, maxes[w][g]);
                const float weight = exp2f(max[g] - most);
#pragma unroll
                for (int k = 0; k < 8; k++) {
                    float* to = query + g * DIM + unit_channel(bits, lane, k);
                    *to = (turn > 0 ? *to : 0.0f) + weight * (sum[g][k] - zero[g]);
                }
            }
        }
        __syncthreads();
    }
    float* part = parts + (u64(blockIdx.x) * heads + head) * (QUERIES * (2 + DIM));
    for (int g = threadIdx.x; g < QUERIES; g += WARPS * 32) {
        float most = maxes[0][g], all = 0.0f;
        for (int w = 1; w < WARPS; w++) most = fmaxf(most, maxes[w][g]);
        for (int w = 0; w < WARPS; w++) all += totals[w][g] * exp2f(maxes[w][g] - most);
        part[g] = most;
        part[QUERIES + g] = all;
    }
    for (int i = threadIdx.x; i < QUERIES * DIM; i += WARPS * 32) part[2 * QUERIES + i] = query[i];
}

// One query head (y) of one sequence (x), DIM threads: its parts put together. `first`: `[sequences + 1]`, the first chunk of
// each. `out`: `[sequences, heads * QUERIES, DIM]`.
extern "C" __global__ void __launch_bounds__(DIM)
combine(float* out, const float* parts, const u64* first, int heads) {
    const int h = blockIdx.y, g = h % QUERIES;
    const u64 step = u64(heads) * (QUERIES * (2 + DIM));
    const float* begin = parts + first[blockIdx.x] * step + u64(h / QUERIES) * (QUERIES * (2 + DIM));
    const u64 n = first[blockIdx.x + 1] - first[blockIdx.x];
    float most = NOTHING, all = 0.0f, sum = 0.0f;
    for (u64 c = 0; c < n; c++) most = fmaxf(most, begin[c * step + g]);
    for (u64 c = 0; c < n; c++) {
        const float* part = begin + c * step;
        const float weight = exp2f(part[g] - most);
        all += weight * part[QUERIES + g];
        sum += weight * part[2 * QUERIES + g * DIM + threadIdx.x];
    }
    out[(u64(blockIdx.x) * heads * QUERIES + h) * DIM + threadIdx.x] = sum / all;
}

// Halving in place. A block streams through a page: it reads a piece whole before it writes that piece's half, which ends
// where the piece before it was read, or earlier.

constexpr int THREADS = 512;

struct Halved {
    u64 rows;
    u64 parameters;
};

// Four codes of 8 bits, `(2^8 - 2^4 + 1) (q + 2^3) >> 12` each; the products fit 16 bits.
__device__ u32 four_of_8(u32 word) {
    const u32 even = (((word & 0x00ff00ffu) + 0x00080008u) * 241u >> 12) & 0x000f000fu;
    const u32 odd = (((word >> 8 & 0x00ff00ffu) + 0x00080008u) * 241u >> 12) & 0x000f000fu;
    return even | odd << 8;
}

// Four codes of 4 bits in the low halves of bytes, `(2^4 - 2^2 + 1) (q + 2) >> 6` each; the products fit 8 bits.
__device__ u32 four_of_4(u32 word) { return ((word & 0x0f0f0f0fu) + 0x02020202u) * 13u >> 6 & 0x03030303u; }

// 32 codes of 8 bits: a run of 16 bytes.
__device__ void narrow_8(const u32 (&from)[8], u32 (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) to[i] = four_of_8(from[i]) | four_of_8(from[i + 4]) << 4;
}

// A run of 2 bits from the runs of 4 bits that it replaces: of 128 codes from four, of 64 codes from two.
constexpr int WIDE = DIM % 128 == 0 ? 16 : 8; // words of them
__device__ void narrow_4(const u32 (&from)[WIDE], u32 (&to)[WIDE / 2]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (WIDE == 16) {
            // Codes 0 to 15 of each run are the low halves of its bytes, codes 16 to 31 the high ones.
            to[i] = to[i + 4] = 0;
#pragma unroll
            for (int r = 0; r < 4; r++) {
                to[i] |= four_of_4(from[r * 4 + i]) << (2 * r);
                to[i + 4] |= four_of_4(from[r * 4 + i] >> 4) << (2 * r);
            }
        } else {
            to[i] = four_of_4(from[i]) | four_of_4(from[i] >> 4) << 2 | four_of_4(from[4 + i]) << 4
                | four_of_4(from[4 + i] >> 4) << 6;
        }
    }
}

template <int BITS> __device__ void halve(const Halved& page, u64 bytes, u64 groups) {
    constexpr int WORDS = BITS == 8 ? 8 : WIDE;
    u8* rows = reinterpret_cast<u8*>(page.rows);
    float* scales = reinterpret_cast<float*>(page.parameters);
    for (u64 i = threadIdx.x; i < groups; i += THREADS) scales[i] *= BITS == 8 ? 17.0f : 5.0f;
    for (u64 begin = 0; begin < bytes; begin += THREADS * WORDS * 4) {
        const u64 at = begin + threadIdx.x * WORDS * 4;
        u32 from[WORDS], to[WORDS / 2];
        if (at < bytes) {
#pragma unroll
            for (int i = 0; i < WORDS / 4; i++) {
                const uint4 four = *reinterpret_cast<const uint4*>(rows + at + i * 16);
                from[i * 4] = four.x, from[i * 4 + 1] = four.y, from[i * 4 + 2] = four.z, from[i * 4 + 3] = four.w;
            }
        }
        __syncthreads();
        if (at < bytes) {
            if constexpr (BITS == 8) narrow_8(from, to);
            else narrow_4(from, to);
#pragma unroll
            for (int i = 0; i < WORDS / 8; i++) {
                const uint4 four = {to[i * 4], to[i * 4 + 1], to[i * 4 + 2], to[i * 4 + 3]};
                *reinterpret_cast<uint4*>(rows + at / 2 + i * 16) = four;
            }
        }
    }
}

// One page (x): `bytes` of codes, `groups` scales.
extern "C" __global__ void __launch_bounds__(THREADS) halve_8(const Halved* pages, u64 bytes, u64 groups) {
    halve<8>(pages[blockIdx.x], bytes, groups);
}
extern "C" __global__ void __launch_bounds__(THREADS) halve_4(const Halved* pages, u64 bytes, u64 groups) {
    halve<4>(pages[blockIdx.x], bytes, groups);
}

// Exact rows of a page (x) to codes of 8 bits: `s = clamp((max - min) / 255, 1e-5, 1e5)`, `z = -min`, `q = round((x + z) / s)`.
extern "C" __global__ void __launch_bounds__(THREADS) quantize(const Halved* pages, u64, u64 groups) {
    constexpr int EACH = (GROUP + 31) / 32, TOGETHER = 4; // values of a lane, groups of a warp
    const Halved page = pages[blockIdx.x];
    const u16* exact = reinterpret_cast<const u16*>(page.rows);
    u8* codes = reinterpret_cast<u8*>(page.rows);
    float* scales = reinterpret_cast<float*>(page.parameters);
    float* zeros = scales + groups;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (u64 begin = 0; begin < groups; begin += THREADS / 32 * TOGETHER) {
        float x[TOGETHER][EACH];
#pragma unroll
        for (int t = 0; t < TOGETHER; t++) {
            const u64 group = begin + warp * TOGETHER + t;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                // A missing value is the group's first once more.
                const int at = lane + 32 * i < GROUP ? lane + 32 * i : 0;
                x[t][i] = group < groups ? half_value(exact[group * GROUP + at]) : 0.0f;
            }
        }
        __syncthreads();
#pragma unroll
        for (int t = 0; t < TOGETHER; t++) {
            const u64 group = begin + warp * TOGETHER + t;
            float least = x[t][0], most = x[t][0];
#pragma unroll
            for (int i = 1; i < EACH; i++) least = fminf(least, x[t][i]), most = fmaxf(most, x[t][i]);
            for (int far = 16; far > 0; far /= 2) {
                least = fminf(least, __shfl_xor_sync(ALL, least, far));
                most = fmaxf(most, __shfl_xor_sync(ALL, most, far));
            }
            if (group >= groups) continue; // the same for the whole warp
            const float scale = fminf(fmaxf((most - least) / 255.0f, 1e-5f), 1e5f), zero = -least;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const float q = fminf(fmaxf((x[t][i] + zero) / scale, 0.0f), 255.0f);
                if (lane + 32 * i < GROUP) codes[group * GROUP + lane + 32 * i] = u8(__float2int_rn(q));
            }
            if (lane == 0) scales[group] = scale, zeros[group] = zero;
        }
    }
}
