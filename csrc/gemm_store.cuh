// From a warp's accumulators to memory: rescaled (epilogue.cuh), in the model's row order, in wide stores.
#pragma once

#include "gemm_tiles.cuh"

namespace vitq {

// The tile's entries of the vectors, in stored order, a word each, and each stored row's model row.
template <Epilogue kKind, class T>
__device__ __forceinline__ void stage_vectors(const GemmArguments& with, int first_row, int32_t* shared) {
  for (int i = threadIdx.x; i < T::kRows; i += T::kThreads) {
    const int stored = first_row + i;
    int row = stored;
    if (with.weight.order != nullptr)
      row = stored < kGroupRows * with.weight.group_count ? with.weight.order[stored] : with.rows;
    shared[kVectors * T::kRows + i] = row;
    if constexpr (kKind != Epilogue::kPartial) {
      float multiplier, zero, inv_scale;
      int32_t bias;
      load_vectors<kKind>(with.epilogue, row, with.rows, multiplier, bias, zero, inv_scale);
      shared[i] = static_cast<int32_t>(float_bits(multiplier));
      shared[T::kRows + i] = bias;
      shared[2 * T::kRows + i] = static_cast<int32_t>(float_bits(zero));
      shared[3 * T::kRows + i] = static_cast<int32_t>(float_bits(inv_scale));
    }
  }
}

template <class T>
__device__ __forceinline__ void read_run(const int32_t* shared, int at, RunVectors& run) {
#pragma unroll
  for (int i = 0; i < kRun; i += 4) {
    const auto four = [&](int vector) { return *reinterpret_cast<const uint4*>(shared + vector * T::kRows + at + i); };
    const uint4 m = four(0), b = four(1), z = four(2), s = four(3);
    const uint32_t multiplier[4] = {m.x, m.y, m.z, m.w}, bias[4] = {b.x, b.y, b.z, b.w};
    const uint32_t zero[4] = {z.x, z.y, z.z, z.w}, inv_scale[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int l = 0; l < 4; ++l) {
      run.multiplier[i + l] = bits_float(multiplier[l]), run.bias[i + l] = static_cast<int32_t>(bias[l]);
      run.zero[i + l] = bits_float(zero[l]), run.inv_scale[i + l] = bits_float(inv_scale[l]);
    }
  }
}

// Stores a run of words (rescale's) at a token, from `row` on: what is not kReal, which store_real does.
template <Epilogue kKind>
__device__ __forceinline__ void store_words(const GemmArguments& with, uint32_t (&word)[kRun], int token, int row,
                                            bool vector) {
  if constexpr (kKind == Epilogue::kReal) {
    store_real(with.epilogue, word, with.out, token, row, with.rows, vector);
  } else if constexpr (kKind == Epilogue::kPartial) {
    int32_t* target = static_cast<int32_t*>(with.out) + (int64_t{blockIdx.z} * with.tokens + token) * with.rows + row;
    if (vector) {
      *reinterpret_cast<uint4*>(target) = {word[0], word[1], word[2], word[3]};
      *reinterpret_cast<uint4*>(target + 4) = {word[4], word[5], word[6], word[7]};
      return;
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (row + i < with.rows) target[i] = static_cast<int32_t>(word[i]);
    }
  } else {
    int8_t* target = static_cast<int8_t*>(with.out) + int64_t{token} * with.rows + row;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (row + i < with.rows) target[i] = static_cast<int8_t>(word[i]);
    }
  }
}

// A lane's accumulators: token_at's tokens of its fragment rows lane / 4 + 8 h + 16 m, rows 16 (lane % 4) + 2 j + c of
// the group, at [m][j][2 h + c]. Takes the run `half` (fragments 4 half .. + 3) of token 2 m + h of the lane, without
// the weights' left alignment.
template <int kTokenFragments>
__device__ __forceinline__ void take_run(const Accumulators<kTokenFragments>& acc, int token, int half, int shift,
                                         int32_t (&run)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) run[i] = acc[token / 2][4 * half + i / 2][2 * (token % 2) + i % 2] >> shift;
}

// What rescale makes of a run of one token.
template <Epilogue kKind, class T>
__device__ __forceinline__ void finish_run(const GemmArguments& with, const Accumulators<T::kTokenFragments>& acc,
                                           const RunVectors& vectors, int first_token, int token, int half, int shift,
                                           uint32_t (&word)[kRun]) {
  int32_t sums[kRun];
  take_run<T::kTokenFragments>(acc, token, half, shift, sums);
  float scale = 1.0f;
  if (kKind == Epilogue::kReal && with.epilogue.token_scale != nullptr && first_token + token < with.tokens) {
    scale = with.epilogue.token_scale[first_token + token];
  }
  rescale<kKind>(with.epilogue, vectors, scale, sums, word);
}

// A lane's outputs, rescaled: of each of its tokens codes of 16 rows, four a word, or 16 words.
template <Epilogue kKind, class T>
using Outputs = uint32_t[2 * T::kTokenFragments][staged_element(kKind) == 1 ? kRun / 2 : 2 * kRun];

template <Epilogue kKind, class T>
__device__ __forceinline__ void finish(const GemmArguments& with, const Accumulators<T::kTokenFragments>& acc,
                                       const int32_t* vectors, int at, int first_token, int shift,
                                       Outputs<kKind, T>& out) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    RunVectors run;
    if constexpr (kKind != Epilogue::kPartial) read_run<T>(vectors, at + half * kRun, run);
#pragma unroll
    for (int token = 0; token < 2 * T::kTokenFragments; ++token) {
      uint32_t word[kRun];
      finish_run<kKind, T>(with, acc, run, first_token, token, half, shift, word);
      if constexpr (staged_element(kKind) == 1) {
        out[token][2 * half] = pack_bytes(word[0], word[1], word[2], word[3]);
        out[token][2 * half + 1] = pack_bytes(word[4], word[5], word[6], word[7]);
      } else {
#pragma unroll
        for (int i = 0; i < kRun; ++i) out[token][half * kRun + i] = word[i];
      }
    }
  }
}

// Rows in the model's order, and as many as whole stores take: each lane stores its own 16 of each of its tokens.
template <Epilogue kKind, class T>
__device__ __forceinline__ void store_direct(const GemmArguments& with, const Outputs<kKind, T>& out, int row,
                                             int first_token) {
  if (row >= with.rows) return;
#pragma unroll
  for (int token = 0; token < 2 * T::kTokenFragments; ++token) {
    if (first_token + token >= with.tokens) continue;
    if constexpr (staged_element(kKind) == 1) {
      int8_t* target = static_cast<int8_t*>(with.out) + int64_t{first_token + token} * with.rows + row;
      *reinterpret_cast<uint4*>(target) = {out[token][0], out[token][1], out[token][2], out[token][3]};
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t word[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) word[i] = out[token][half * kRun + i];
        store_words<kKind>(with, word, first_token + token, row + half * kRun, true);
      }
    }
  }
}

// Columns of a 4 x 4 block of bytes: byte `column` of each of four words.
__device__ __forceinline__ uint32_t byte_column(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3, int column) {
  const uint32_t pair = column | (column + 4) << 4;
  return permute_bytes(permute_bytes(w0, w1, pair), permute_bytes(w2, w3, pair), 0x5410);
}

// Reads back what store_through_shared has staged of all rows of the tile: 8 times 4 tokens, kOfLane apart. A thread
// takes 8 rows of 4 tokens.
template <Epilogue kKind, class T>
__device__ __forceinline__ void store_staged(const GemmArguments& with, const unsigned char* staged, int first_row,
                                             int first_token) {
  constexpr int kElement = staged_element(kKind), kStride = staged_stride(kElement);
  constexpr int kOfLane = 2 * T::kTokenFragments;
  const bool vector = with.rows % kRun == 0;
  // 8 groups of tokens and 4 runs of rows a warp: whole sectors for the stores, all banks for the loads.
  for (int unit = threadIdx.x; unit < T::kRows / kRun * (kStagedTokens / 4); unit += T::kThreads) {
    const int four = unit % 8, at = unit / 8 * kRun, row = first_row + at;
    if (row >= with.rows) continue;
    const unsigned char* source = staged + at * kStride + four * 4 * kElement;
    uint32_t word[4][kRun];  // of each token; bytes: not yet apart
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if constexpr (kElement == 1) {
        word[0][i] = *reinterpret_cast<const uint32_t*>(source + i * kStride);
      } else {
        const uint4 tokens = *reinterpret_cast<const uint4*>(source + i * kStride);
        word[0][i] = tokens.x, word[1][i] = tokens.y, word[2][i] = tokens.z, word[3][i] = tokens.w;
      }
    }
    if constexpr (kElement == 1) {
      uint2 codes[4];
#pragma unroll
      for (int token = 0; token < 4; ++token) {
        codes[token] = {byte_column(word[0][0], word[0][1], word[0][2], word[0][3], token),
                        byte_column(word[0][4], word[0][5], word[0][6], word[0][7], token)};
      }
#pragma unroll
      for (int token = 0; token < 4; ++token) {
        const int to = first_token + kOfLane * four + token;
        if (to >= with.tokens) continue;
        int8_t* target = static_cast<int8_t*>(with.out) + int64_t{to} * with.rows + row;
        if (vector) {
          *reinterpret_cast<uint2*>(target) = codes[token];
          continue;
        }
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const uint32_t four_codes = i < 4 ? codes[token].x : codes[token].y;
          if (row + i < with.rows) target[i] = static_cast<int8_t>(four_codes >> (8 * (i % 4)));
        }
      }
    } else {
#pragma unroll
      for (int token = 0; token < 4; ++token) {
        const int to = first_token + kOfLane * four + token;
        if (to < with.tokens) store_words<kKind>(with, word[token], to, row, vector);
      }
    }
  }
}

// Rows in another order, or of an odd number: each lane puts 4 tokens at a time of its 16 rows where the rows belong,
// in shared memory.
template <Epilogue kKind, class T>
__device__ __forceinline__ void store_through_shared(const GemmArguments& with, const Outputs<kKind, T>& out,
                                                     const int32_t* row_of, unsigned char* staged, int first_row,
                                                     int tile_token) {
  constexpr int kElement = staged_element(kKind), kStride = staged_stride(kElement);
  const int lane = lane_index(), its_token_warp = warp_index() % T::kTokenWarps;
  // A pass takes 4 consecutive tokens of each of the 8 lanes that share rows; the lanes' own begin kOfLane apart.
#pragma unroll
  for (int token_warp = 0; token_warp < T::kTokenWarps; ++token_warp) {
#pragma unroll
    for (int four = 0; four < 2 * T::kTokenFragments; four += 4) {
      VITQ_BARRIER();  // what was staged before, or the pipeline's last stage, has been read
      if (its_token_warp == token_warp) {
#pragma unroll
        for (int i = 0; i < 2 * kRun; ++i) {
          const int row = row_of[i];
          if (row >= with.rows) continue;
          unsigned char* target = staged + (row - first_row) * kStride + lane / 4 * 4 * kElement;
          if constexpr (kElement == 1) {
            *reinterpret_cast<uint32_t*>(target) =
                byte_column(out[four][i / 4], out[four + 1][i / 4], out[four + 2][i / 4], out[four + 3][i / 4], i % 4);
          } else {
            *reinterpret_cast<uint4*>(target) = {out[four][i], out[four + 1][i], out[four + 2][i], out[four + 3][i]};
          }
        }
      }
      VITQ_BARRIER();  // the staged tokens are complete
      store_staged<kKind, T>(with, staged, first_row, tile_token + token_warp * T::kWarpTokens + four);
    }
  }
}

}  // namespace vitq
