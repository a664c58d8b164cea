// From a warp's accumulators of gemm_sm80.cuh to memory: rescaled (epilogue.cuh), straight or through shared memory.
#pragma once

#include "gemm_store.cuh"

namespace vitq {

// The tile's entries of the vectors, in stored order, a word each, and where each stored row is staged.
template <Epilogue kKind, class T>
__device__ __forceinline__ void stage_vectors(const GemmArguments& with, int first_row, int32_t* shared) {
  for (int i = threadIdx.x; i < T::kRows; i += T::kThreads) {
    const int row = model_row(with, first_row + i);
    shared[kVectors * T::kRows + i] = staged_offset(row - first_row);
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

// A lane's accumulators: token_at's tokens of its fragment rows lane / 4 + 8 h + 16 m, rows 16 (lane % 4) + 2 j + c of
// the group, at [m][j][2 h + c]. Takes the run `half` (fragments 4 half .. + 3) of token 2 m + h of the lane, without
// the weights' left alignment.
template <bool kNative4, int kTokenFragments>
__device__ __forceinline__ void take_run(const Accumulators<kTokenFragments>& acc, int token, int half, Widths widths,
                                         int32_t (&run)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    const int fragment = 4 * half + i / 2, shift = (kNative4 ? 4 : 8) - widths.of(fragment / 2);
    run[i] = acc[token / 2][fragment][2 * (token % 2) + i % 2] >> shift;
  }
}

// What rescale makes of a run of one token.
template <Epilogue kKind, bool kNative4, class T>
__device__ __forceinline__ void finish_run(const GemmArguments& with, const Accumulators<T::kTokenFragments>& acc,
                                           const RunVectors& vectors, int first_token, int token, int half,
                                           Widths widths, uint32_t (&word)[kRun]) {
  int32_t sums[kRun];
  take_run<kNative4, T::kTokenFragments>(acc, token, half, widths, sums);
  const auto scale_of = [&](int) {
    return first_token + token < with.tokens ? with.epilogue.token_scale[first_token + token] : 0.0f;
  };
  rescale<kKind>(with.epilogue, vectors, scale_of, sums, word);
}

// A lane's outputs of 16 rows, rescaled. Words: [token][row]. Codes, four a word: those of four rows, [token][row / 4],
// or, where they are staged, those of four tokens, [row][token / 4].
template <Epilogue kKind, class T>
using Outputs = uint32_t[2 * T::kTokenFragments * 2 * kRun * staged_element(kKind) / 4];

template <Epilogue kKind, bool kNative4, class T>
__device__ __forceinline__ void finish(const GemmArguments& with, const Accumulators<T::kTokenFragments>& acc,
                                       const int32_t* vectors, int at, int first_token, Widths widths, bool staged,
                                       Outputs<kKind, T>& out) {
  constexpr int kFours = T::kTokenFragments / 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    RunVectors run;
    if constexpr (kKind != Epilogue::kPartial) read_run<T>(vectors, at + half * kRun, run);
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      uint32_t word[4][kRun];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        finish_run<kKind, kNative4, T>(with, acc, run, first_token, 4 * four + i, half, widths, word[i]);
      }
      if constexpr (staged_element(kKind) == 4) {
#pragma unroll
        for (int i = 0; i < 4 * kRun; ++i) {
          out[(4 * four + i / kRun) * 2 * kRun + half * kRun + i % kRun] = word[i / kRun][i % kRun];
        }
      } else if (staged) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          out[(half * kRun + i) * kFours + four] = pack_bytes(word[0][i], word[1][i], word[2][i], word[3][i]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const uint32_t* run_of_four = word[i / 2] + i % 2 * 4;
          out[(4 * four + i / 2) * 4 + 2 * half + i % 2] =
              pack_bytes(run_of_four[0], run_of_four[1], run_of_four[2], run_of_four[3]);
        }
      }
    }
  }
}

// Rows in the model's order, and as many as whole stores take: each lane stores its own 16 of each of its tokens.
template <Epilogue kKind, class T>
__device__ __forceinline__ void store_direct(const GemmArguments& with, const Outputs<kKind, T>& out, int row,
                                             int first_token, void* to) {
  if (row >= with.rows) return;
  Place<kKind> place(with, first_token, row);
#pragma unroll
  for (int token = 0; token < 2 * T::kTokenFragments; ++token, place.next_token()) {
    if (first_token + token >= with.tokens) continue;
    if constexpr (staged_element(kKind) == 1) {
      *reinterpret_cast<uint4*>(static_cast<int8_t*>(to) + place.at) = {out[4 * token], out[4 * token + 1],
                                                                        out[4 * token + 2], out[4 * token + 3]};
    } else {
      Place<kKind> of_half = place;
#pragma unroll
      for (int half = 0; half < 2; ++half, of_half.at += kRun, of_half.residual_at += kRun) {
        uint32_t word[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) word[i] = out[(2 * token + half) * kRun + i];
        store_words<kKind>(with, to, word, of_half, kRun, true);
      }
    }
  }
}

// Rows in another order, or of an odd number: each lane puts its 16 rows where they belong, in shared memory.
// offset_of: staged_offset of each of them.
template <Epilogue kKind, class T>
__device__ __forceinline__ void store_through_shared(const GemmArguments& with, const Outputs<kKind, T>& out,
                                                     const int32_t* offset_of, unsigned char* staged, int first_row,
                                                     int first_token, void* to) {
  constexpr int kElement = staged_element(kKind);
  using S = Staging<T, kElement>;
  const unsigned lane = lane_index(), warp = warp_index();
  const unsigned byte = (warp % T::kTokenWarps * 8 + lane / 4) * S::kLaneBytes;  // of the row's
  unsigned char* of_lane = staged + byte / kPanelBytes * S::kPanel + byte % kPanelBytes;
  const bool whole = is_whole(with, first_row + T::kRows, first_token + T::kTokens);
  int offsets[2 * kRun];
#pragma unroll
  for (int i = 0; i < 2 * kRun; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(offset_of + i);
    offsets[i] = four.x, offsets[i + 1] = four.y, offsets[i + 2] = four.z, offsets[i + 3] = four.w;
  }
#pragma unroll
  for (int token = 0; token < S::kOfLane; token += S::kAtOnce) {
    VITQ_BARRIER();  // what was staged before, or the pipeline's last stage, has been read
#pragma unroll
    for (int i = 0; i < 2 * kRun; ++i) {
      unsigned char* target = of_lane + offsets[i];
      if constexpr (kElement == 4) {
        const auto word = [&](int further) { return out[(token + further) * 2 * kRun + i]; };
        *reinterpret_cast<uint4*>(target) = {word(0), word(1), word(2), word(3)};
      } else if constexpr (S::kLaneBytes == 8) {
        *reinterpret_cast<uint2*>(target) = {out[2 * i], out[2 * i + 1]};
      } else {
        static_assert(S::kLaneBytes == 4, "a lane has 4 or 8 tokens");
        *reinterpret_cast<uint32_t*>(target) = out[i];
      }
    }
    VITQ_BARRIER();  // the staged tokens are complete
    store_from_shared<kKind, S>(with, to, staged, first_row, first_token + token, whole, warp_index(),
                                T::kThreads / 32);
  }
}

}  // namespace vitq
