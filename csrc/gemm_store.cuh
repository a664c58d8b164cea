// From a warp's accumulators to memory: rescaled (epilogue.cuh), in the model's row order, in wide stores.
#pragma once

#include "gemm_tiles.cuh"

namespace vitq {

// The tile's entries of the vectors, in stored order, a word each, and where each stored row is staged.
template <Epilogue kKind, class T>
__device__ __forceinline__ void stage_vectors(const GemmArguments& with, int first_row, int32_t* shared) {
  for (int i = threadIdx.x; i < T::kRows; i += T::kThreads) {
    const int stored = first_row + i;
    const bool reordered = with.weight.order != nullptr && stored < kGroupRows * with.weight.group_count;
    const int row = reordered ? with.weight.order[stored] : stored;
    shared[kVectors * T::kRows + i] = staged_offset(T::kRows == kWindowRows ? row - first_row : i);
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

// Stores the codes of a run of 8 rows, of which `left` are inside. `vector`: N is a multiple of the run.
__device__ __forceinline__ void store_codes(const GemmArguments& with, uint32_t low, uint32_t high, int64_t at,
                                            int left, bool vector) {
  int8_t* target = static_cast<int8_t*>(with.out) + at;
  if (vector) {
    *reinterpret_cast<uint2*>(target) = {low, high};
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (i < left) target[i] = static_cast<int8_t>((i < 4 ? low : high) >> (8 * (i % 4)));
  }
}

// Where the outputs of one row of consecutive tokens lie, token after token, in elements.
template <Epilogue kKind>
struct Place {
  int64_t at, residual_at;
  int residual_token, residual_rows, rows;

  __device__ __forceinline__ Place(const GemmArguments& with, int token, int row)
      : residual_at(0), residual_token(0), residual_rows(0), rows(with.rows) {
    const int64_t part = kKind == Epilogue::kPartial ? int64_t{blockIdx.z} * with.tokens : 0;
    at = (part + token) * rows + row;
    if (kKind == Epilogue::kReal && with.epilogue.residual != nullptr) {
      residual_rows = with.epilogue.residual_rows;
      residual_token = token % residual_rows;
      residual_at = int64_t{residual_token} * rows + row;
    }
  }

  __device__ __forceinline__ void next_token() {
    at += rows;
    if constexpr (kKind == Epilogue::kReal) {
      residual_at += rows;
      if (++residual_token == residual_rows) residual_at -= int64_t{residual_token} * rows, residual_token = 0;
    }
  }
};

// Stores a run of words (rescale's) of which `left` rows are inside.
template <Epilogue kKind>
__device__ __forceinline__ void store_words(const GemmArguments& with, uint32_t (&word)[kRun],
                                            const Place<kKind>& place, int left, bool vector) {
  if constexpr (kKind == Epilogue::kReal) {
    store_real(with.epilogue, word, with.out, place.at, place.residual_at, left, vector);
  } else if constexpr (kKind == Epilogue::kPartial) {
    int32_t* target = static_cast<int32_t*>(with.out) + place.at;
    if (vector) {
      *reinterpret_cast<uint4*>(target) = {word[0], word[1], word[2], word[3]};
      *reinterpret_cast<uint4*>(target + 4) = {word[4], word[5], word[6], word[7]};
      return;
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < left) target[i] = static_cast<int32_t>(word[i]);
    }
  } else {
    store_codes(with, pack_bytes(word[0], word[1], word[2], word[3]), pack_bytes(word[4], word[5], word[6], word[7]),
                place.at, left, vector);
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

// A lane's outputs of 16 rows, rescaled. Words: [token][row]. Codes, four a word: those of four rows, [token][row / 4],
// or, where they are staged, those of four tokens, [row][token / 4].
template <Epilogue kKind, class T>
using Outputs = uint32_t[2 * T::kTokenFragments * 2 * kRun * staged_element(kKind) / 4];

template <Epilogue kKind, class T>
__device__ __forceinline__ void finish(const GemmArguments& with, const Accumulators<T::kTokenFragments>& acc,
                                       const int32_t* vectors, int at, int first_token, int shift, bool staged,
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
        finish_run<kKind, T>(with, acc, run, first_token, 4 * four + i, half, shift, word[i]);
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
                                             int first_token) {
  if (row >= with.rows) return;
  Place<kKind> place(with, first_token, row);
#pragma unroll
  for (int token = 0; token < 2 * T::kTokenFragments; ++token, place.next_token()) {
    if (first_token + token >= with.tokens) continue;
    if constexpr (staged_element(kKind) == 1) {
      *reinterpret_cast<uint4*>(static_cast<int8_t*>(with.out) + place.at) = {out[4 * token], out[4 * token + 1],
                                                                              out[4 * token + 2], out[4 * token + 3]};
    } else {
      Place<kKind> of_half = place;
#pragma unroll
      for (int half = 0; half < 2; ++half, of_half.at += kRun, of_half.residual_at += kRun) {
        uint32_t word[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) word[i] = out[(2 * token + half) * kRun + i];
        store_words<kKind>(with, word, of_half, kRun, true);
      }
    }
  }
}

// Columns of a 4 x 4 block of bytes: byte i of each of four words to word i.
__device__ __forceinline__ void transpose_bytes(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3,
                                                uint32_t (&column)[4]) {
  const uint32_t low01 = permute_bytes(w0, w1, 0x5140), high01 = permute_bytes(w0, w1, 0x7362);
  const uint32_t low23 = permute_bytes(w2, w3, 0x5140), high23 = permute_bytes(w2, w3, 0x7362);
  column[0] = permute_bytes(low01, low23, 0x5410), column[1] = permute_bytes(low01, low23, 0x7632);
  column[2] = permute_bytes(high01, high23, 0x5410), column[3] = permute_bytes(high01, high23, 0x7632);
}

// Reads back what store_through_shared has staged of all rows of the tile. A thread takes a run of 8 rows of four
// tokens at a time, a warp 32 rows of 8 such groups: whole sectors for the stores, all banks for the loads. kWhole: the
// tile has no row or token beyond the matrix, and N is a multiple of the run.
template <Epilogue kKind, bool kWhole, class T>
__device__ __forceinline__ void store_staged(const GemmArguments& with, const unsigned char* staged, int first_row,
                                             int first_token) {
  constexpr int kElement = staged_element(kKind);
  using S = Staging<T, kElement>;
  const bool vector = kWhole || with.rows % kRun == 0;
  const unsigned lane = lane_index(), run = lane / S::kFoursOfPanel % 4;
  const unsigned four = lane / (4 * S::kFoursOfPanel) * S::kFoursOfPanel + lane % S::kFoursOfPanel;
  const unsigned further = 4 * four / S::kAtOnce * S::kOfLane + 4 * four % S::kAtOnce;  // tokens
  for (int block = warp_index(); block < T::kRows / 32; block += T::kThreads / 32) {
    const int at = 32 * block + kRun * static_cast<int>(run), left = with.rows - first_row - at;
    if (!kWhole && left <= 0) continue;
    // Of the run's row i: staged_offset, whose quarter is i ^ run (mod 4).
    const unsigned char* source =
        staged + four / S::kFoursOfPanel * S::kPanel + four % S::kFoursOfPanel * 4 * kElement + at * kPanelBytes;
    int token = first_token + static_cast<int>(further);
#pragma unroll
    for (int eight = 0; eight < S::kFours / 8; ++eight) {
      uint32_t word[4][kRun];  // of each token; bytes: not yet apart
#pragma unroll
      for (unsigned i = 0; i < kRun; ++i) {
        const unsigned char* from = source + (i / 4 * 4 + ((i ^ run) & 3)) * kPanelBytes;
        if constexpr (kElement == 1) {
          word[0][i] = *reinterpret_cast<const uint32_t*>(from);
        } else {
          const uint4 tokens = *reinterpret_cast<const uint4*>(from);
          word[0][i] = tokens.x, word[1][i] = tokens.y, word[2][i] = tokens.z, word[3][i] = tokens.w;
        }
      }
      Place<kKind> place(with, token, first_row + at);
      if constexpr (kElement == 1) {
        uint32_t low[4], high[4];
        transpose_bytes(word[0][0], word[0][1], word[0][2], word[0][3], low);
        transpose_bytes(word[0][4], word[0][5], word[0][6], word[0][7], high);
#pragma unroll
        for (int i = 0; i < 4; ++i, place.next_token()) {
          if (kWhole || token + i < with.tokens) store_codes(with, low[i], high[i], place.at, left, vector);
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i, place.next_token()) {
          if (kWhole || token + i < with.tokens) store_words<kKind>(with, word[i], place, left, vector);
        }
      }
      source += 8 / S::kFoursOfPanel * S::kPanel, token += 32 / S::kAtOnce * S::kOfLane;
    }
  }
}

// Reads back what store_through_shared has staged in stored order and stores element by element, a row a lane: a tile
// that is smaller than the window has every so-manieth byte of its tokens' sectors.
template <Epilogue kKind, class T>
__device__ __forceinline__ void store_scattered(const GemmArguments& with, const unsigned char* staged, int first_row,
                                                int first_token) {
  constexpr int kElement = staged_element(kKind);
  using S = Staging<T, kElement>;
  for (int block = warp_index(); block < T::kRows / 32; block += T::kThreads / 32) {
    const int at = 32 * block + lane_index(), stored = first_row + at;
    const int row = stored < kGroupRows * with.weight.group_count ? with.weight.order[stored] : with.rows;
    if (row >= with.rows) continue;
    const unsigned char* source = staged + staged_offset(at);
#pragma unroll 1
    for (int four = 0; four < S::kFours; ++four) {
      const int token = first_token + 4 * four / S::kAtOnce * S::kOfLane + 4 * four % S::kAtOnce;
      const unsigned char* from = source + four / S::kFoursOfPanel * S::kPanel + four % S::kFoursOfPanel * 4 * kElement;
      Place<kKind> place(with, token, row);
      uint32_t word[4];
      if constexpr (kElement == 1) {
        const uint32_t codes = *reinterpret_cast<const uint32_t*>(from);
#pragma unroll
        for (int i = 0; i < 4; ++i) word[i] = codes >> (8 * i);
      } else {
        const uint4 tokens = *reinterpret_cast<const uint4*>(from);
        word[0] = tokens.x, word[1] = tokens.y, word[2] = tokens.z, word[3] = tokens.w;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i, place.next_token()) {
        uint32_t only[kRun] = {word[i]};
        if (token + i < with.tokens) store_words<kKind>(with, only, place, 1, false);
      }
    }
  }
}

// Rows in another order, or of an odd number: each lane puts its 16 rows where they belong, in shared memory.
// offset_of: staged_offset of each of them.
template <Epilogue kKind, class T>
__device__ __forceinline__ void store_through_shared(const GemmArguments& with, const Outputs<kKind, T>& out,
                                                     const int32_t* offset_of, unsigned char* staged, int first_row,
                                                     int first_token) {
  constexpr int kElement = staged_element(kKind);
  using S = Staging<T, kElement>;
  const unsigned lane = lane_index(), warp = warp_index();
  const unsigned byte = (warp % T::kTokenWarps * 8 + lane / 4) * S::kLaneBytes;  // of the row's
  unsigned char* of_lane = staged + byte / kPanelBytes * S::kPanel + byte % kPanelBytes;
  const bool whole =
      first_row + T::kRows <= with.rows && first_token + T::kTokens <= with.tokens && with.rows % kRun == 0;
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
    if (T::kRows < kWindowRows && with.weight.order != nullptr) {
      store_scattered<kKind, T>(with, staged, first_row, first_token + token);
    } else if (whole) {
      store_staged<kKind, true, T>(with, staged, first_row, first_token + token);
    } else {
      store_staged<kKind, false, T>(with, staged, first_row, first_token + token);
    }
  }
}

}  // namespace vitq
