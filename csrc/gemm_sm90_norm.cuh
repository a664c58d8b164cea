// LayerNorm behind a linear layer on Hopper, in the same launch: the blocks of a cluster hold all rows of a tile of
// tokens.
//
// Computes    y = residual + outputs, rounded to their dtype; codes = LayerNorm of y over the rows (S3), as
//             layernorm.cu.
// Cluster     A block for every 128 rows (up to 8), all of the same tokens.
// Way out     A block stages the sums of its tile where its stages lay. A thread takes the same rows of two tokens of
//             each panel, 16 of the block's 128, adds them to the residual stream, and keeps what it wrote in
//             registers; eight lanes then have a token's moments over the block's rows. Behind a barrier of the cluster
//             each of them fetches one token's from all blocks, and the outputs in the registers become codes. A second
//             barrier keeps every block there until the others have read.
// Exactness   y as by kReal; codes bounded, like those of layernorm.cu: means are taken off block by block, and what
//             their rounding leaves is added up beside the squares.
// Source      reference.linear_residual_layernorm; moments of parts by Chan, Golub and LeVeque (1979); PTX ISA as of
//             gemm_sm90_parts.cuh.
#pragma once

#include "gemm_sm90_parts.cuh"
#include "norm.cuh"
#include "rows.cuh"

namespace vitq {

// Of a token, over the rows of a block: the mean as it was rounded, and the sums of the distances from it and of their
// squares.
struct alignas(16) Moments {
  float mean, rest, square;
};

// Over the eight lanes that have rows of the same two tokens.
__device__ __forceinline__ float sum_of_token(float x) {
#pragma unroll
  for (int mask = 4; mask < 32; mask *= 2) x += shuffle_xor(x, mask);
  return x;
}

template <class T>
struct NormTile {
  using S = StagedSums<T>;
  static constexpr int kPanels = T::kTokens / S::kPanelTokens / S::kWarps;  // of a warp
  static constexpr int kGroups = 8;                                         // of lanes, each with other rows
  static constexpr int kRuns = T::kRows / (kGroups * kRun);                 // of a thread
  static constexpr int kRunDistance = kGroups * kRun;                       // in rows
  static constexpr int kMostBlocks = kMostNormRows / T::kRows;              // of a cluster, with rows
  static constexpr int kSumBytes = T::kTokens / S::kPanelTokens * S::kPanel;
  static constexpr int kBytes = kSumBytes + T::kTokens * static_cast<int>(sizeof(Moments) + sizeof(Norm));
  static_assert(kBytes <= wgmma_shared_bytes<T>(2) - kBarrierBytes, "moments and norms fit behind the sums");
  static_assert(2 * kPanels <= kGroups, "a lane for each of the tokens that eight lanes share");

  const GemmArguments& with;
  int first_row, first_token;
  float value[kPanels][kRuns][2][kRun];  // outputs, then their distance from the mean of the block's

  __device__ __forceinline__ NormTile(const GemmArguments& with, int first_row, int first_token)
      : with(with), first_row(first_row), first_token(first_token) {}

  static __device__ __forceinline__ int pair() { return static_cast<int>(lane_index() % 4); }
  static __device__ __forceinline__ int group() { return static_cast<int>(lane_index() / 4); }
  static __device__ __forceinline__ int panel(int p) { return warp_index() + p * S::kWarps; }
  // Of the tile.
  static __device__ __forceinline__ int token_at(int p, int i) { return panel(p) * S::kPanelTokens + 2 * pair() + i; }
  static __device__ __forceinline__ Moments* moments(int token) {
    return reinterpret_cast<Moments*>(S::begin() + kSumBytes) + token;
  }
  static __device__ __forceinline__ Norm* norms(int token) {
    return reinterpret_cast<Norm*>(moments(T::kTokens)) + token;
  }
  __device__ __forceinline__ int row(int run) const { return first_row + group() * kRun + run * kRunDistance; }
  __device__ __forceinline__ int token(int p, int i) const { return first_token + token_at(p, i); }
  __device__ __forceinline__ bool inside(int p, int run, int i) const {
    return token(p, i) < with.tokens && row(run) < with.rows;
  }
  // Rows of the block whose first one this is.
  __device__ __forceinline__ int rows_from(int first) const {
    const int left = with.rows - first;
    return left > T::kRows ? T::kRows : left > 0 ? left : 0;
  }

  // Calls `body` for each panel of the warp, with where the first run of the thread's two tokens lies.
  template <class Body>
  __device__ __forceinline__ void each_panel(const Body& body) const {
    using Outputs = Place<Epilogue::kReal>;
    Outputs place(with, token(0, 0), row(0));
#pragma unroll
    for (int p = 0; p < kPanels; ++p) {
      const Outputs first = place;
      place.next_token();
      const Outputs of_token[2] = {first, place};
      body(p, of_token);
      place.template next_token<S::kWarps * S::kPanelTokens - 1>();
    }
  }

  // Adds the staged sums to the residual stream and stores it. The residual's loads are under way together, while other
  // warps stage.
  template <Real kDtype>
  __device__ __forceinline__ void finish() {
    Words<kDtype> residual[kPanels][kRuns][2];
    each_panel([&](int p, const auto& place) {
#pragma unroll
      for (int at = 0; at < 2 * kRuns; ++at) {
        const int run = at / 2, i = at % 2;
        if (!inside(p, run, i)) continue;
        residual[p][run][i] = load_words<kDtype>(with.epilogue.residual, place[i].residual_at + run * kRunDistance);
      }
    });
    RunVectors vectors[kRuns] = {};
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      if (row(run) >= with.rows) continue;
      float bias[kRun];
      reals_of(load_words<Real::kFloat32>(with.epilogue.multiplier, row(run)), vectors[run].multiplier);
      reals_of(load_words<Real::kFloat32>(with.epilogue.bias_q, row(run)), bias);
#pragma unroll
      for (int r = 0; r < kRun; ++r) vectors[run].bias[r] = static_cast<int32_t>(float_bits(bias[r]));
    }
    VITQ_NAMED_BARRIER(1, T::kWorkerThreads);  // the sums of all rows of the block are there
    each_panel([&](int p, const auto& place) {
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        const unsigned char* source =
            S::begin() + panel(p) * S::kPanel + (row(run) - first_row) * kPanelBytes + pair() * 8;
        int32_t sums[2][kRun];
#pragma unroll
        for (int r = 0; r < kRun; ++r) {  // staged_offset
          const uint2 two = *reinterpret_cast<const uint2*>(source + (r / 4 * 4 + ((r ^ group()) & 3)) * kPanelBytes);
          sums[0][r] = static_cast<int32_t>(two.x), sums[1][r] = static_cast<int32_t>(two.y);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t word[kRun];
          rescale<Epilogue::kNorm>(with.epilogue, vectors[run], [](int) { return 1.0f; }, sums[i], word);
          float (&y)[kRun] = value[p][run][i];
          reals_of(residual[p][run][i], y);
#pragma unroll
          for (int r = 0; r < kRun; ++r) y[r] += bits_float(word[r]);
          const Words<kDtype> rounded = words_of<kDtype>(y);
          if (inside(p, run, i)) store_words(with.out, place[i].at + run * kRunDistance, rounded);
          reals_of(rounded, y);
        }
      }
    });
  }

  // Takes the mean of the block's rows off its outputs, and shows the cluster the moments.
  __device__ __forceinline__ void stage_moments() {
    const int rows = rows_from(first_row);
    const float inverse = rows > 0 ? 1.0f / static_cast<float>(rows) : 0.0f;
#pragma unroll
    for (int token = 0; token < 2 * kPanels; ++token) {
      const int p = token / 2, i = token % 2;
      float totals[kRun], rests[kRun], squares[kRun];  // side by side, as in layernorm.cu
#pragma unroll
      for (int at = 0; at < kRuns * kRun; ++at) {
        const float x = value[p][at / kRun][i][at % kRun];
        totals[at % kRun] = at < kRun ? x : totals[at % kRun] + x;
      }
      const float mean = sum_of_token(sum_of(totals)) * inverse;
#pragma unroll
      for (int at = 0; at < kRuns * kRun; ++at) {
        const int run = at / kRun, r = at % kRun;
        float& x = value[p][run][i][r];
        x -= row(run) < with.rows ? mean : 0.0f;  // what is no output is 0, and stays so
        rests[r] = run == 0 ? x : rests[r] + x;
        squares[r] = run == 0 ? x * x : fmaf(x, x, squares[r]);
      }
      const float rest = sum_of_token(sum_of(rests)), square = sum_of_token(sum_of(squares));
      if (group() == 0) *moments(token_at(p, i)) = {mean, rest, square};
    }
  }

  // After the barrier behind which all blocks of the cluster have staged their moments: the norms of the warp's tokens.
  __device__ __forceinline__ void make_norms() const {
    if (group() < 2 * kPanels) make_norm(token_at(group() / 2, group() % 2));
    sync_warp();  // they are there
  }

  // Of one of the tokens that eight lanes share, by the moments of all rows.
  __device__ __forceinline__ void make_norm(int token) const {
    float mean[kMostBlocks], rest[kMostBlocks], square[kMostBlocks], all_mean = 0.0f;
#pragma unroll
    for (int block = 0; block < kMostBlocks; ++block) {
      if (rows_from(block * T::kRows) == 0) continue;
      const ClusterPointer there = place_in_block(moments(token), static_cast<unsigned>(block));
      const uint2 first = load_there(there, 0), second = load_there(there, 8);
      mean[block] = bits_float(first.x), rest[block] = bits_float(first.y), square[block] = bits_float(second.x);
    }
#pragma unroll
    for (int block = 0; block < kMostBlocks; ++block) {
      const int rows = rows_from(block * T::kRows);
      if (rows > 0) all_mean = fmaf(static_cast<float>(rows), mean[block], all_mean);
    }
    const float inverse = 1.0f / static_cast<float>(with.rows);
    all_mean *= inverse;
    float all_rest = 0.0f, all_square = 0.0f;
#pragma unroll
    for (int block = 0; block < kMostBlocks; ++block) {
      const int rows = rows_from(block * T::kRows);
      if (rows == 0) continue;
      const float away = mean[block] - all_mean, moved = fmaf(static_cast<float>(rows), away, rest[block]);
      all_rest += moved, all_square += fmaf(away, rest[block] + moved, square[block]);
    }
    Norm norm = norm_of(all_rest * inverse, all_square * inverse, with.epilogue.eps);
    norm.shift = fmaf(moments(token)->mean - all_mean, norm.rstd, norm.shift);  // of a distance from the block's mean
    *norms(token) = norm;
  }

  __device__ __forceinline__ void store_norm() const {
    float gain[kRuns][kRun] = {}, offset[kRuns][kRun] = {};
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      if (row(run) >= with.rows) continue;
      reals_of(load_words<Real::kFloat32>(with.epilogue.gain, row(run)), gain[run]);
      reals_of(load_words<Real::kFloat32>(with.epilogue.offset, row(run)), offset[run]);
    }
    const CodeRange range = code_range(with.epilogue.bits);
    each_panel([&](int p, const auto& place) {
#pragma unroll
      for (int at = 0; at < 2 * kRuns; ++at) {
        const int run = at % kRuns, i = at / kRuns;
        const Norm norm = *norms(token_at(p, i));
        uint32_t word[kRun];
#pragma unroll
        for (int r = 0; r < kRun; ++r) {
          word[r] = static_code(normalised(value[p][run][i][r], norm, gain[run][r], offset[run][r]), range);
        }
        if (inside(p, run, i)) store_codes(with.epilogue.codes + place[i].at + run * kRunDistance, word);
      }
    });
  }
};

// The way out of a tile of all rows.
template <class T>
__device__ __forceinline__ void norm_tile(const GemmArguments& with, int32_t (&acc)[T::kTokens / 2], int first_row,
                                          int first_token, int shift) {
  stage_sums<T>(with, acc, first_row, shift);
  NormTile<T> tile(with, first_row, first_token);
  with_constant(static_cast<Real>(with.epilogue.real_dtype),
                [&](auto dtype) { tile.template finish<decltype(dtype)::value>(); });
  tile.stage_moments();
  cluster_has_staged();
  tile.make_norms();
  tile.store_norm();
}

}  // namespace vitq
