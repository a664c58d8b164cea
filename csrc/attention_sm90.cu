// Log2-quantized softmax attention in integers (S4) for Hopper (sm_90a): wgmma, whole heads in shared memory,
// persistent blocks.
//
// Computes    What attention_sm80.cu does, without bias and inv_tau. Exact, as there: |acc| <= 2^21.
// Roles       An item is a head, or some of its tiles of 64 queries where heads are few; a block takes items in turn.
//             The last warpgroup loads: one thread copies the keys (tensor map, zeros beyond the sequence), all of it
//             transposes the values. The worker warpgroups take the tiles in turn, of whichever item; no barrier of the
//             block is met. An item's stage has the barriers keys, values (they are there) and empty (all have left).
// Passes      Up to 256 keys a worker's scores stay in registers. Beyond, tiles of 144 or 208 keys, twice: for the
//             maximum, and for codes and the second product.
// Scores      Accumulators begin at the bits of kRoundToInteger: each then is, as a float, kRoundToInteger + score, so
//             maxima are those of the words, and a distance is one exact subtraction.
// Key order   A lane's scores 16 p + 8 f + 2 t + c (f, c in 0..1, t: lane % 4) are the bytes 4 t + 2 f + c of the
//             second product's A fragment: so the values' columns are stored in that order.
// Value rows  Row 8 j + 2 t + c of the transposed values is channel (dim / 4) t + (dim / 8) c + j: a lane ends with
//             dim / 4 consecutive channels.
// Tails       A warp whose 16 queries lie beyond the sequence takes part in products alone: of 197 = 3 * 64 + 5 queries
//             13 warps' rows are coded, not 16.
// Source      design.md S4, kernels.md 3.4; reference.attention; PTX ISA 9.7.15 (wgmma), 9.7.9.25 (bulk copies).

#include "attention.cuh"
#include "attention_sm90.cuh"
#include "launch.cuh"
#include "launchers.h"
#include "tensor_map.cuh"

namespace vitq {
namespace {

using namespace hopper_attention;

// --- the loading warpgroup -------------------------------------------------------------------------------------------

// Row of the transposed values that holds a channel.
template <class S>
__device__ __forceinline__ unsigned value_row(unsigned channel) {
  constexpr unsigned kOfLane = S::kDim / 4, kHalf = S::kDim / 8;
  const unsigned rest = channel % kOfLane;
  return rest % kHalf * 8 + channel / kOfLane * 2 + rest / kHalf;
}

// A head's values into a stage. Consecutive lanes take consecutive channels of a key: whole sectors are read, and rows
// that lie in different banks written. Columns beyond the last 16 keys stay as they are: their levels are zeros.
template <class S>
__device__ __forceinline__ void transpose_values(const Arguments& with, const Item& item, const Ring<S>& ring) {
  constexpr unsigned kOctets = S::kDim / 8, kBatch = 2, kGroups = S::kKeys / 16;
  const int8_t* values = with.v.data + item.image * with.v.batch + item.head * with.v.head;
  const unsigned keys = static_cast<unsigned>(with.sequence), units = (keys + 15) / 16 * 4 * kOctets;
  for (unsigned first = threadIdx.x - kWorkerThreads; first < units; first += kBatch * kWarpgroup) {
    KeyQuad unit[kBatch];
#pragma unroll
    for (unsigned b = 0; b < kBatch; ++b) {
      const unsigned quad = (first + b * kWarpgroup) / kOctets, octet = (first + b * kWarpgroup) % kOctets;
      const unsigned first_key = quad / 4 * 16 + quad % 4 * 2;
      const int8_t* from = values + first_key * with.v.position + octet * 8;
#pragma unroll
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned further = i / 2 * 8 + i % 2;
        unit[b].keys[i] = {0, 0};
        if (first_key + further < keys) {
          unit[b].keys[i] = *reinterpret_cast<const uint2*>(from + further * with.v.position);
        }
      }
    }
#pragma unroll
    for (unsigned b = 0; b < kBatch; ++b) {
      if (first + b * kWarpgroup >= units) continue;
      const unsigned quad = (first + b * kWarpgroup) / kOctets, octet = (first + b * kWarpgroup) % kOctets;
      const unsigned group = quad / 4, tile = S::kWhole ? 0 : group / kGroups, of_tile = group - tile * kGroups;
      const unsigned chunk = of_tile % (kValueKeys / 16), slab = of_tile / (kValueKeys / 16);
      unsigned char* word = ring.values(static_cast<int>(tile)) + slab * S::kValueSlabBytes + quad % 4 * 4;
      const auto place = [&](unsigned row) { return word + row * kValueKeys + (chunk ^ row % 8) * 16; };
      unsigned char* first_row = place(value_row<S>(octet * 8));
#pragma unroll
      for (unsigned c = 0; c < 8; ++c) {
        // Of dims that are multiples of 64 the next channel lies 8 rows further.
        const bool regular = S::kDim % 64 == 0;
        unsigned char* to = regular ? first_row + 8 * c * kValueKeys : place(value_row<S>(octet * 8 + c));
        store_for_wgmma(to, unit[b].of_channel(c));
      }
    }
  }
}

template <class S>
__device__ __forceinline__ void load_items(const Arguments& with, const TensorMap& keys) {
  const int thread = static_cast<int>(threadIdx.x) - kWorkerThreads, tiles = S::tiles(with.sequence);
  Ring<S> ring{with};
  for (int number = blockIdx.x; number < with.items; number += gridDim.x) {
    const Item item(with, number);
    VITQ_WAIT(ring.empty(), ring.parity ^ 1);  // the first round finds the phase before the first complete
    if (thread == 0) {
      mbarrier_expect(ring.keys_full(), static_cast<unsigned>(tiles * S::kTileBytes));
      for (int tile = 0; tile < tiles; ++tile) {
        for (int slab = 0; slab < S::kWidth / S::kLine; ++slab) {
          copy_head_box(ring.keys(tile) + slab * S::kSlabBytes, keys, slab * S::kLine, tile * S::kKeys, item.head,
                        item.image, ring.keys_full());
        }
      }
    }
    const uint8_t* levels = with.levels + item.head * with.level_count;
    for (int i = thread; i < 256; i += kWarpgroup) ring.table()[i] = i < with.level_count ? levels[i] : 0;
    transpose_values<S>(with, item, ring);
    fence_async_proxy();
    sync_warp();
    if (lane_index() == 0) mbarrier_arrive(ring.values_full());
    ring.advance();
  }
}

// --- the workers -----------------------------------------------------------------------------------------------------

// The warp's 16 queries as A fragments, straight from memory; zeros where there are none.
template <class S>
__device__ __forceinline__ void load_queries(const Arguments& with, const Turn& turn, uint32_t (&query)[S::kSteps][4]) {
  const Item item(with, turn.item);
  const int8_t* base = with.q.data + item.image * with.q.batch + item.head * with.q.head;
  const int lane = lane_index(), first = turn.tile * kQueries + warp_index() % 4 * 16 + lane / 4;
  const bool present = turn.item < with.items;
#pragma unroll
  for (int s = 0; s < S::kSteps; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      query[s][i] = 0;
      if (32 * s + i / 2 * 16 >= S::kDim) continue;
      const int row = first + i % 2 * 8;
      if (!present || row >= with.sequence) continue;
      query[s][i] =
          *reinterpret_cast<const uint32_t*>(base + row * with.q.position + 32 * s + i / 2 * 16 + lane % 4 * 4);
    }
  }
}

// Scores with a tile of keys, as words near kRoundToInteger.
template <class S>
__device__ __forceinline__ void multiply_keys(const unsigned char* keys, const uint32_t (&query)[S::kSteps][4],
                                              int32_t (&scores)[S::kKeys / 2]) {
#pragma unroll
  for (int i = 0; i < S::kKeys / 2; ++i) scores[i] = kRoundToIntegerBits;
  hold(scores);
  wgmma_fence();
#pragma unroll
  for (int s = 0; s < S::kSteps; ++s) {
    const auto slab = matrix_descriptor<S::kLine>(keys + 32 * s / S::kLine * S::kSlabBytes);
    wgmma_s8(scores, query[s], columns_further(slab, 32 * s % S::kLine));
  }
  wgmma_commit();
  wgmma_wait<0>();
  hold(scores);
}

// Largest scores of both of the lane's rows so far; scores of keys that are not there become 0, below all others.
template <class S>
__device__ __forceinline__ void take_maximum(int left, int32_t (&scores)[S::kKeys / 2], int32_t (&top)[2]) {
#pragma unroll
  for (int p = 0; p < S::kKeys / 16; ++p) {
    if (16 * p >= S::kLeast && 16 * p >= left) continue;
    if (16 * p + 16 > S::kLeast && 16 * p + 16 > left) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int key = 16 * p + i / 4 * 8 + static_cast<int>(lane_index()) % 4 * 2 + i % 2;
        if (key >= left) scores[8 * p + i] = 0;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      int32_t& of_row = top[i / 2 % 2];
      of_row = larger(larger(scores[8 * p + i], scores[8 * p + i + 1]), of_row);
    }
  }
}

// Levels of a tile's scores as A fragments, of a table of up to kMost, and their sums.
template <class S, int kMost>
__device__ __forceinline__ void code(const Levels& levels, const Coding& coding, int left,
                                     const int32_t (&scores)[S::kKeys / 2], const int32_t (&top)[2],
                                     uint32_t (&level)[S::kValueSteps][4], int32_t (&total)[2]) {
#pragma unroll
  for (int p = 0; p < 2 * S::kValueSteps; ++p) {
    level[p / 2][p % 2 * 2] = level[p / 2][p % 2 * 2 + 1] = 0;
    if (p >= S::kKeys / 16 || (16 * p >= S::kLeast && 16 * p >= left)) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float distance[4];
      uint32_t codes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t score = scores[8 * p + i / 2 * 4 + 2 * r + i % 2];
        distance[i] = bits_float(static_cast<uint32_t>(top[r])) - bits_float(static_cast<uint32_t>(score));
      }
      coding.codes(distance, codes);
      uint32_t word = levels_of<kMost>(levels, codes);
      if (16 * p + 16 > S::kLeast && 16 * p + 16 > left) {
        const int first = left - 16 * p - static_cast<int>(lane_index()) % 4 * 2;  // of the lane's keys 0, 1, 8, 9
        word &= (first > 0 ? 0xffu : 0) | (first > 1 ? 0xff00u : 0) | (first > 8 ? 0xff0000u : 0) |
                (first > 9 ? 0xff000000u : 0);
      }
      level[p / 2][p % 2 * 2 + r] = word;
      total[r] = static_cast<int32_t>(dot_u8(word, 0x01010101u, static_cast<uint32_t>(total[r])));
    }
  }
}

// o += levels * v of a tile.
template <class S>
__device__ __forceinline__ void multiply_values(const unsigned char* values, uint32_t (&level)[S::kValueSteps][4],
                                                int32_t (&o)[S::kDim / 2]) {
  hold(o);
#pragma unroll
  for (int s = 0; s < S::kValueSteps; ++s) hold(level[s]);
  wgmma_fence();
#pragma unroll
  for (int s = 0; s < S::kValueSteps; ++s) {
    const auto slab = matrix_descriptor(values + s * kValueStep / kValueKeys * S::kValueSlabBytes);
    wgmma_u8_s8(o, level[s], columns_further(slab, s * kValueStep % kValueKeys));
  }
  wgmma_commit();
  wgmma_wait<0>();
  hold(o);
}

// Consecutive bytes, from a multiple of as many on.
template <int kBytes>
__device__ __forceinline__ void store_words(int8_t* to, const uint32_t* words) {
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      reinterpret_cast<uint4*>(to)[i] = {words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]};
    }
  } else if constexpr (kBytes % 8 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 8; ++i) reinterpret_cast<uint2*>(to)[i] = {words[2 * i], words[2 * i + 1]};
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) reinterpret_cast<uint32_t*>(to)[i] = words[i];
  }
}

// The warp's rows of the output.
template <class S>
__device__ __forceinline__ void store(const Arguments& with, const Item& item, int tile,
                                      const int32_t (&o)[S::kDim / 2], const int32_t (&total)[2]) {
  constexpr int kOfLane = S::kDim / 4;
  const int channel = item.head * S::kDim + static_cast<int>(lane_index()) % 4 * kOfLane;
  const CodeRange range = code_range(with.bits);
  const float inverse[2] = {1.0f / int_to_float(total[0]), 1.0f / int_to_float(total[1])};
  uint32_t packed[2][kOfLane / 4];
#pragma unroll
  for (int i = 0; i < kOfLane; i += 4) {
    const uint4 m = *reinterpret_cast<const uint4*>(with.multiplier + channel + i);
    const uint4 z = *reinterpret_cast<const uint4*>(with.zero_point + channel + i);
    const float multiplier[4] = {bits_float(m.x), bits_float(m.y), bits_float(m.z), bits_float(m.w)};
    const auto zero_of = [](uint32_t point) {
      return kRoundToInteger + static_cast<float>(static_cast<int32_t>(point));
    };
    const float zero[4] = {zero_of(z.x), zero_of(z.y), zero_of(z.z), zero_of(z.w)};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t word[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int j = (i + n) % (S::kDim / 8), c = (i + n) / (S::kDim / 8);
        word[n] = requantise(int_to_float(o[4 * j + 2 * r + c]), multiplier[n] * inverse[r], zero[n], range);
      }
      packed[r][i / 4] = pack_bytes(word[0], word[1], word[2], word[3]);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = tile * kQueries + warp_index() % 4 * 16 + static_cast<int>(lane_index()) / 4 + 8 * r;
    if (row >= with.sequence) continue;
    int8_t* line = with.out + (item.image * int64_t{with.sequence} + row) * with.heads * S::kDim;
    store_words<kOfLane>(line + channel, packed[r]);
  }
}

// A tile of queries; the next turn's queries are on their way from the last product of this one's on.
template <class S>
__device__ __forceinline__ void attend(const Arguments& with, const Ring<S>& ring, const Turn& turn, const Turn& next,
                                       uint32_t (&query)[S::kSteps][4]) {
  const Item item(with, turn.item);
  const bool active = turn.tile * kQueries + warp_index() % 4 * 16 < with.sequence;
  const Coding coding{with.kappa[item.head], 0.0f, static_cast<float>(with.level_count - 1), false};
  const int tiles = S::tiles(with.sequence);
  int32_t scores[S::kKeys / 2], o[S::kDim / 2] = {}, top[2] = {0, 0}, total[2] = {0, 0};
  uint32_t level[S::kValueSteps][4];
  const auto largest_of_row = [&] { over_row(top, larger); };
  VITQ_WAIT(ring.keys_full(), ring.parity);
  if constexpr (!S::kWhole) {
    for (int tile = 0; tile < tiles; ++tile) {
      const int left = with.sequence - tile * S::kKeys;
      multiply_keys<S>(ring.keys(tile), query, scores);
      if (active) take_maximum<S>(left, scores, top);
    }
    largest_of_row();
  }
  VITQ_WAIT(ring.values_full(), ring.parity);
  Levels levels;
  levels.table = ring.table(), levels.count = with.level_count;
#pragma unroll
  for (int i = 0; i < 4; ++i) levels.words[i] = reinterpret_cast<const uint32_t*>(ring.table())[i];
  for (int tile = 0; tile < tiles; ++tile) {
    const int left = with.sequence - tile * S::kKeys;
    multiply_keys<S>(ring.keys(tile), query, scores);
    if (tile == tiles - 1) load_queries<S>(with, next, query);
    if constexpr (S::kWhole) {
      if (active) take_maximum<S>(left, scores, top);
      largest_of_row();
    }
    if (active && levels.count <= 16) code<S, 16>(levels, coding, left, scores, top, level, total);
    if (active && levels.count > 16) code<S, 256>(levels, coding, left, scores, top, level, total);
    multiply_values<S>(ring.values(tile), level, o);
  }
  over_row(total, [](int32_t a, int32_t b) { return a + b; });
  if (active) store<S>(with, item, turn.tile, o, total);
}

template <class S>
__device__ __forceinline__ void attend_items(const Arguments& with) {
  Ring<S> ring{with};
  uint32_t query[S::kSteps][4];
  int item = blockIdx.x;
  Turn turn{item, Item(with, item).first};
  turn.skip(with, warp_index() / 4);
  load_queries<S>(with, turn, query);
  for (;;) {
    // Leaves the stages of the items before; of one without a tile for this worker too, once it has been filled.
    for (; item < turn.item && item < with.items; item += gridDim.x) {
      VITQ_WAIT(ring.keys_full(), ring.parity);
      sync_warp();
      if (lane_index() == 0) mbarrier_arrive(ring.empty());
      ring.advance();
    }
    if (turn.item >= with.items) return;
    Turn next = turn;
    next.skip(with, kWorkers);
    attend<S>(with, ring, turn, next, query);
    turn = next;
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 1) attention_wgmma_kernel(const Arguments with, VITQ_TENSOR_MAP keys) {
#if defined(VITQ_EMULATION) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if (threadIdx.x == 0) {
    for (Ring<S> ring{with}; ring.stage < with.stages; ++ring.stage) {
      mbarrier_init(ring.keys_full(), 1);
      mbarrier_init(ring.values_full(), kWarpgroup / 32);
      mbarrier_init(ring.empty(), kWorkerThreads / 32);
    }
    fence_mbarrier_init();
  }
  VITQ_BARRIER();  // the barriers are initialised
  follow_predecessor();
  if (threadIdx.x >= kWorkerThreads) {
    give_registers<kLoaderRegisters>();
    load_items<S>(with, keys);
    return;
  }
  take_registers<kWorkerRegisters>();
  attend_items<S>(with);
#else
  __trap();  // no wgmma before and after Hopper, nor in a build without sm_90a; ops/cuda does not ask for it there
#endif
}

// In how many items a head is cut. An item costs its tiles and its values' transposition, about a sixth of a tile; the
// last round of items decides.
int items_of_head(int heads, int tiles, int sms) {
  int best = 1;
  double least = 0;
  for (int items = 1; items <= tiles; ++items) {
    const int rounds = (heads * items + sms - 1) / sms;
    const double cost = rounds * ((tiles + items - 1) / items + 1.0 / 6);
    if (items == 1 || cost < least) best = items, least = cost;
  }
  return best;
}

template <class S>
void launch(Arguments with, const AttentionOperand& k, int batch, cudaStream_t stream) {
  const int heads = batch * with.heads, sms = sm_count(), tiles = (with.sequence + kQueries - 1) / kQueries;
  with.items_of_head = items_of_head(heads, tiles, sms);
  with.items = heads * with.items_of_head, with.stages = S::stages(with.sequence);
  const int bytes = kBarrierBytes + with.stages * S::stage_bytes(with.sequence);
  const auto kernel = &attention_wgmma_kernel<S>;
  allow_shared_memory(kernel, static_cast<size_t>(bytes), "attention_sm90");  // first: it makes the thread's context
  const TensorMap keys = head_map(k, S::kDim, with.sequence, with.heads, batch, S::kLine, S::kKeys);
  VITQ_LAUNCH(kernel, static_cast<unsigned>(std::min(with.items, sms)), kThreads, bytes, stream, with, keys);
  check_launch("attention_sm90");
}

template <class S, class Use>
bool use_if_it_fits(int sequence, const Use& use) {
  if (S::stages(sequence) == 0) return false;
  return use(S()), true;
}

// Calls `use` with the shape for a length; false where there is none.
template <int kDim, class Use>
bool with_length(int sequence, const Use& use) {
  if (sequence <= 128) return use(Shape<kDim, 128, true>()), true;
  if (sequence <= 208) return use(Shape<kDim, 208, true, 129>()), true;
  if (sequence <= 256) return use(Shape<kDim, 256, true, 209>()), true;
  const auto padded = [&](int keys) { return (sequence + keys - 1) / keys * keys; };
  if constexpr (kDim <= 80) {  // above, the scores of 208 keys and the outputs are more than a thread's registers
    if (padded(208) <= padded(144)) return use_if_it_fits<Shape<kDim, 208, false>>(sequence, use);
  }
  return use_if_it_fits<Shape<kDim, 144, false>>(sequence, use);
}

template <class Use>
bool with_shape(int sequence, int dim, const Use& use) {
  switch (dim) {
    case 32:
      return with_length<32>(sequence, use);
    case 64:
      return with_length<64>(sequence, use);
    case 80:
      return with_length<80>(sequence, use);
    case 96:
      return with_length<96>(sequence, use);
    case 128:
      return with_length<128>(sequence, use);
    default:
      return false;
  }
}

}  // namespace

bool attention_sm90_takes(int sequence, int dim) {
  return with_shape(sequence, dim, [](auto) {});
}

void attention_sm90(AttentionOperand q, AttentionOperand k, AttentionOperand v, const float* kappa,
                    const uint8_t* levels, int level_count, const float* multiplier, const int32_t* zero_point,
                    int8_t* out, int batch, int heads, int sequence, int dim, int bits, cudaStream_t stream) {
  require(0 < level_count && level_count <= 256,
          "attention_sm90: level_count must be in 1..256, got " + std::to_string(level_count));
  for (const AttentionOperand& operand : {q, k, v}) {
    require((reinterpret_cast<uintptr_t>(operand.data) | operand.batch | operand.head | operand.position) % 16 == 0,
            "attention_sm90: q, k and v must be aligned to 16 bytes");
  }
  require((reinterpret_cast<uintptr_t>(multiplier) | reinterpret_cast<uintptr_t>(zero_point)) % 16 == 0,
          "attention_sm90: multiplier and zero_point must be aligned to 16 bytes");
  require(int64_t{batch} * heads * ((sequence + kQueries - 1) / kQueries) < int64_t{1} << 30,
          "attention_sm90: too many heads and images");
  if (batch == 0 || heads == 0 || sequence == 0) return;
  const Arguments with{q, v, kappa, levels, level_count, multiplier, zero_point, out, heads, sequence, bits, 0, 0, 0};
  const bool taken = with_shape(sequence, dim, [&](auto shape) { launch<decltype(shape)>(with, k, batch, stream); });
  require(taken, "attention_sm90: no shape for " + std::to_string(sequence) + " tokens of dim " + std::to_string(dim));
}

}  // namespace vitq
