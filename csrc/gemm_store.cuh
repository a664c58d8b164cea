// From shared memory to memory: outputs that are staged there (gemm_tiles.cuh), in the model's row order.
#pragma once

#include "gemm_tiles.cuh"

namespace vitq {

// The model's row of a stored one, in the same 64; from N on where there is none.
__device__ __forceinline__ int model_row(const GemmArguments& with, int stored) {
  const bool reordered = with.weight.order != nullptr && stored < kGroupRows * with.weight.group_count;
  return reordered ? with.weight.order[stored] : stored;
}

// Stores the codes of a run of 8 rows, of which `left` are inside. `vector`: N is a multiple of the run.
__device__ __forceinline__ void store_codes(void* out, uint32_t low, uint32_t high, int64_t at, int left, bool vector) {
  int8_t* target = static_cast<int8_t*>(out) + at;
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
    at = int64_t{token} * rows + row;
    if (kKind == Epilogue::kReal && with.epilogue.residual != nullptr) {
      residual_rows = with.epilogue.residual_rows;
      residual_token = token % residual_rows;
      residual_at = int64_t{residual_token} * rows + row;
    }
  }

  // kBy: tokens further.
  template <int kBy = 1>
  __device__ __forceinline__ void next_token() {
    at += int64_t{kBy} * rows;
    if constexpr (kKind == Epilogue::kReal) {
      residual_at += int64_t{kBy} * rows, residual_token += kBy;
      while (residual_rows > 0 && residual_token >= residual_rows) {
        residual_at -= int64_t{residual_rows} * rows, residual_token -= residual_rows;
      }
    }
  }
};

// Where the outputs of a part of K begin.
template <Epilogue kKind>
__device__ __forceinline__ void* output_of(const GemmArguments& with, unsigned part) {
  if constexpr (kKind != Epilogue::kPartial) return with.out;
  return static_cast<int32_t*>(with.out) + int64_t{part} * with.tokens * with.rows;
}

// Stores a run of words (rescale's) of which `left` rows are inside.
template <Epilogue kKind>
__device__ __forceinline__ void store_words(const GemmArguments& with, void* out, uint32_t (&word)[kRun],
                                            const Place<kKind>& place, int left, bool vector) {
  if constexpr (kKind == Epilogue::kReal) {
    store_real(with.epilogue, word, out, place.at, place.residual_at, left, vector);
  } else if constexpr (kKind == Epilogue::kPartial) {
    int32_t* target = static_cast<int32_t*>(out) + place.at;
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
    store_codes(out, pack_bytes(word[0], word[1], word[2], word[3]), pack_bytes(word[4], word[5], word[6], word[7]),
                place.at, left, vector);
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

// A pack of one row, word by word: codes of four tokens still together, or two words.
template <int kElement>
__device__ __forceinline__ void load_pack(const unsigned char* from, uint32_t (&word)[2]) {
  if constexpr (kElement == 1) {
    word[0] = *reinterpret_cast<const uint32_t*>(from), word[1] = 0;
  } else {
    const uint2 two = *reinterpret_cast<const uint2*>(from);
    word[0] = two.x, word[1] = two.y;
  }
}

// Reads back what lies staged of all rows of the tile. A thread takes a run of 8 rows of a pack at a time, a warp 32
// rows of 8 packs: whole sectors for the stores, all banks for the loads. N is a multiple of the run; kWhole: and the
// tile has no row or token beyond the matrix. `warp` of `warps` that share the work.
template <Epilogue kKind, bool kWhole, class S>
__device__ __forceinline__ void store_staged(const GemmArguments& with, void* out, const unsigned char* staged,
                                             int first_row, int first_token, unsigned warp, unsigned warps) {
  constexpr int kElement = staged_element(kKind);
  constexpr unsigned kBlocks = S::kRows / 32, kEights = S::kPacks / 8;
  const unsigned lane = lane_index(), run = lane / S::kPacksOfPanel % 4;
  const unsigned pack = lane / (4 * S::kPacksOfPanel) * S::kPacksOfPanel + lane % S::kPacksOfPanel;
  // Fewer warps than blocks of rows: each takes all packs of its rows; else the packs are shared out too.
  const unsigned eights_at_once = warps > kBlocks ? warps / kBlocks : 1;
  for (unsigned block = warp % kBlocks; block < kBlocks; block += warps) {
    const int at = static_cast<int>(32 * block + kRun * run);
    if (!kWhole && first_row + at >= with.rows) continue;
    // Of the run's row i: staged_offset, whose quarter is i ^ run (mod 4).
    const unsigned char* source = staged + pack / S::kPacksOfPanel * S::kPanel +
                                  pack % S::kPacksOfPanel * S::kOfPack * kElement + at * kPanelBytes;
    const int token_of_lane = first_token + S::token_of(static_cast<int>(pack));
#pragma unroll kElement == 1 ? 8 : 1
    for (unsigned eight = warp / kBlocks; eight < kEights; eight += eights_at_once) {
      const unsigned char* panel = source + eight * (8 / S::kPacksOfPanel) * S::kPanel;
      const int token = token_of_lane + static_cast<int>(eight) * S::token_of(8);
      uint32_t word[kRun][2];
#pragma unroll
      for (unsigned i = 0; i < kRun; ++i) {
        load_pack<kElement>(panel + (i / 4 * 4 + ((i ^ run) & 3)) * kPanelBytes, word[i]);
      }
      Place<kKind> place(with, token, first_row + at);
      if constexpr (kElement == 1) {
        uint32_t low[4], high[4];
        transpose_bytes(word[0][0], word[1][0], word[2][0], word[3][0], low);
        transpose_bytes(word[4][0], word[5][0], word[6][0], word[7][0], high);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (kWhole || token + i + (i < 2 ? 0 : S::kJump) < with.tokens) {
            store_codes(out, low[i], high[i], place.at, kRun, true);
          }
          if (i == 1) {
            place.template next_token<1 + S::kJump>();
          } else {
            place.next_token();
          }
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i, place.next_token()) {
          uint32_t of_token[kRun];
#pragma unroll
          for (int j = 0; j < kRun; ++j) of_token[j] = word[j][i];
          if (kWhole || token + i < with.tokens) store_words<kKind>(with, out, of_token, place, kRun, true);
        }
      }
    }
  }
}

// Reads back what lies staged and stores element by element, a row a lane: where N is no multiple of the run.
template <Epilogue kKind, class S>
__device__ __forceinline__ void store_elements(const GemmArguments& with, void* out, const unsigned char* staged,
                                               int first_row, int first_token, unsigned warp, unsigned warps) {
  constexpr int kElement = staged_element(kKind);
  constexpr unsigned kBlocks = S::kRows / 32;
  const int packs_at_once = static_cast<int>(warps > kBlocks ? warps / kBlocks : 1);
  for (unsigned block = warp % kBlocks; block < kBlocks; block += warps) {
    const int at = static_cast<int>(32 * block + lane_index());
    const int row = first_row + at;
    if (row >= with.rows) continue;
    const unsigned char* source = staged + staged_offset(at);
#pragma unroll 1
    for (int pack = static_cast<int>(warp / kBlocks); pack < S::kPacks; pack += packs_at_once) {
      uint32_t word[2];
      load_pack<kElement>(
          source + pack / S::kPacksOfPanel * S::kPanel + pack % S::kPacksOfPanel * S::kOfPack * kElement, word);
#pragma unroll
      for (int i = 0; i < S::kOfPack; ++i) {
        const int token = first_token + S::token_of(pack) + i + (i < 2 ? 0 : S::kJump);
        uint32_t only[kRun] = {kElement == 1 ? word[0] >> (8 * i) : word[i % 2]};
        if (token < with.tokens) store_words<kKind>(with, out, only, Place<kKind>(with, token, row), 1, false);
      }
    }
  }
}

// What a tile has staged, to memory.
template <Epilogue kKind, class S>
__device__ __forceinline__ void store_from_shared(const GemmArguments& with, void* out, const unsigned char* staged,
                                                  int first_row, int first_token, bool whole, unsigned warp,
                                                  unsigned warps) {
  if (with.rows % kRun != 0) {
    store_elements<kKind, S>(with, out, staged, first_row, first_token, warp, warps);
  } else if (whole) {
    store_staged<kKind, true, S>(with, out, staged, first_row, first_token, warp, warps);
  } else {
    store_staged<kKind, false, S>(with, out, staged, first_row, first_token, warp, warps);
  }
}

// Whether no row or token of the tile is beyond the matrix.
__device__ __forceinline__ bool is_whole(const GemmArguments& with, int end_row, int end_token) {
  return end_row <= with.rows && end_token <= with.tokens;
}

}  // namespace vitq
