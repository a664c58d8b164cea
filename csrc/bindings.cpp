// vitq_kernels._cuda: the launchers of launchers.h as Python functions of the same names. Pointers and streams cross as
// integers (torch's data_ptr() and cuda_stream; None is null), so that the extension needs no torch and serves any.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <vector>

#include "early_starts.h"
#include "launchers.h"

#ifdef VITQ_EMULATION
#include <array>

#include "semantics.cuh"
#endif

namespace py = pybind11;

namespace {

template <typename T>
T* at(std::optional<uintptr_t> address) {
  return reinterpret_cast<T*>(address.value_or(0));
}

// How a launcher's argument crosses: a pointer as an integer, anything else as itself.
template <typename T>
struct Wire {
  using type = T;
  static T cross(T value) { return value; }
};
template <typename T>
struct Wire<T*> {
  using type = std::optional<uintptr_t>;
  static T* cross(type value) { return at<T>(value); }
};

// Defines `launcher` under `name`; its arguments are positional, in the launcher's order. The GIL stays held: a launch
// takes microseconds.
template <typename... Arguments>
void define(py::module_& module, const char* name, void (*launcher)(Arguments...)) {
  module.def(name,
             [launcher](typename Wire<Arguments>::type... values) { launcher(Wire<Arguments>::cross(values)...); });
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "The hand-written CUDA kernels of vitq-kernels; see csrc/launchers.h.";
  define(module, "quantize", &vitq::quantize);
  define(module, "quantize_patches", &vitq::quantize_patches);
  define(module, "quantize_per_token", &vitq::quantize_per_token);
  define(module, "layernorm", &vitq::layernorm);
  // Local: the emulation, another module of this code, may be loaded beside it.
  py::class_<vitq::AttentionOperand>(module, "AttentionOperand", py::module_local())
      .def(py::init([](uintptr_t data, int64_t batch, int64_t head, int64_t position) {
        return vitq::AttentionOperand{reinterpret_cast<const int8_t*>(data), batch, head, position};
      }));
  py::class_<vitq::AttentionBias>(module, "AttentionBias", py::module_local())
      .def(py::init([](uintptr_t data, int64_t batch, int64_t head, int64_t query, int64_t key) {
        return vitq::AttentionBias{reinterpret_cast<const int32_t*>(data), batch, head, query, key};
      }));
  using Address = std::optional<uintptr_t>;
  py::class_<vitq::AttentionWindows>(module, "AttentionWindows", py::module_local())
      .def(py::init([](Address tokens, Address pattern, int count) {
        return vitq::AttentionWindows{at<const int32_t>(tokens), at<const int32_t>(pattern), count};
      }));
  define(module, "attention", &vitq::attention);
  define(module, "attention_sm90", &vitq::attention_sm90);
  module.def("attention_sm90_takes", &vitq::attention_sm90_takes);
  py::class_<vitq::LinearWeight>(module, "LinearWeight", py::module_local())
      .def(py::init(
          [](Address chunks, Address groups, Address order, int group_count, int steps, int widest, bool settled) {
            return vitq::LinearWeight{at<const uint8_t>(chunks),
                                      at<const int32_t>(groups),
                                      at<const int32_t>(order),
                                      group_count,
                                      steps,
                                      widest,
                                      settled};
          }));
  py::class_<vitq::EpilogueArguments>(module, "EpilogueArguments", py::module_local())
      .def(py::init([](Address multiplier, Address bias_q, Address zero_point, Address inv_scale, Address thresholds,
                       Address levels, Address residual, Address token_scale, int level_count, int residual_rows,
                       int bits, bool tanh_form, int real_dtype, Address gain, Address offset, float eps,
                       Address codes) {
        return vitq::EpilogueArguments{at<const float>(multiplier),
                                       at<const int32_t>(bias_q),
                                       at<const int32_t>(zero_point),
                                       at<const float>(inv_scale),
                                       at<const float>(thresholds),
                                       at<const int8_t>(levels),
                                       at<const void>(residual),
                                       at<const float>(token_scale),
                                       level_count,
                                       residual_rows,
                                       bits,
                                       tanh_form,
                                       real_dtype,
                                       at<const float>(gain),
                                       at<const float>(offset),
                                       eps,
                                       at<int8_t>(codes)};
      }));
  define(module, "linear", &vitq::linear);
  module.def("clusters_at_once", &vitq::clusters_at_once);
  module.attr("most_with_norm") = std::make_tuple(vitq::kMostNormTokens, vitq::kMostNormRows, vitq::kMostNormTiles);
  module.def("gemm_tiles", [] {
    std::vector<std::tuple<int, int, int, int, int, bool, int>> rows;
    for (int i = 0; i < vitq::kGemmTiles; ++i) {
      const vitq::GemmTile tile = vitq::gemm_tile(i);
      rows.emplace_back(tile.rows, tile.tokens, tile.threads, tile.stages, tile.blocks, tile.wgmma, tile.cluster);
    }
    return rows;
  });
#if defined(VITQ_EMULATION) || defined(VITQ_HAS_SM90A)
  module.attr("has_wgmma") = true;
#else
  module.attr("has_wgmma") = false;
#endif
  // Returns what held before.
  module.def("set_early_starts", [](bool allowed) { return vitq::early_starts.exchange(allowed); });
  module.def("gemm_shared_bytes", [](int tile, int widest, bool staged, int kind) {
    return vitq::gemm_shared_bytes(tile, widest, staged, static_cast<vitq::Epilogue>(kind));
  });

#ifdef VITQ_EMULATION
  module.def("set_seed", &vitq::emulation::set_seed);
  module.def("gelu", [](float y, bool tanh_form) { return tanh_form ? vitq::gelu_tanh(y) : vitq::gelu_erf(y); });
  module.def(
      "plant",
      [](int skipped_barrier, unsigned extra_pending, bool unbounded_copies, bool swapped_fragment, bool no_fence,
         bool no_proxy_fence, bool no_swizzle, bool wrong_parity, bool no_following) {
        vitq::emulation::faults() = {skipped_barrier, extra_pending, unbounded_copies, swapped_fragment, no_fence,
                                     no_proxy_fence,  no_swizzle,    wrong_parity,     no_following};
      },
      py::arg("skipped_barrier") = 0, py::arg("extra_pending") = 0, py::arg("unbounded_copies") = false,
      py::arg("swapped_fragment") = false, py::arg("no_fence") = false, py::arg("no_proxy_fence") = false,
      py::arg("no_swizzle") = false, py::arg("wrong_parity") = false, py::arg("no_following") = false);
  module.def("withhold", [](const std::vector<std::pair<uintptr_t, size_t>>& ranges) {
    std::vector<vitq::emulation::Range> withheld;
    for (const auto& [address, bytes] : ranges) withheld.push_back({reinterpret_cast<unsigned char*>(address), bytes});
    vitq::emulation::withhold(std::move(withheld));
  });
  module.def("take_barrier_lines", [] {
    std::array<int, 256> lines;
    const size_t count = vitq::emulation::take_barrier_lines(lines.data(), lines.size());
    return std::vector<int>(lines.begin(), lines.begin() + count);
  });
#endif
}
