// A small attention on the CPU behind the op `fwd` of FlashAttention-3, whatever its schema is.
//
// The library is compiled once. Its namespace and its schema are texts that builds of it fill in,
// so what it is asked for is found by its arguments' names, as the schema has them.
#include <ATen/ATen.h>
#include <Python.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>

// Not constant, so that the compiler knows nothing of what they say.
char OP_NAMESPACE[128] = "@namespace@";
char OP_SCHEMA[4096] = "@schema@";

namespace {

struct Asked {
  const c10::FunctionSchema& schema;
  at::ArrayRef<c10::IValue> values;

  const c10::IValue& operator()(const char* name) const {
    static const c10::IValue nothing;
    auto index = schema.argumentIndexWithName(name);
    return index ? values[*index] : nothing;
  }
  void nobody_asks(std::initializer_list<const char*> names, const c10::IValue& unasked) const {
    for (auto name : names) {
      TORCH_CHECK(!schema.argumentIndexWithName(name) || (*this)(name) == unasked, name, " is given");
    }
  }
};

// Rows of one sequence, (rows, heads, width), in float32.
at::Tensor attend(const at::Tensor& q, at::Tensor k, at::Tensor v, const Asked& asked) {
  auto rows = q.size(0), keys = k.size(0), group = q.size(1) / k.size(1);
  k = k.to(at::kFloat).repeat_interleave(group, 1).permute({1, 2, 0});
  v = v.to(at::kFloat).repeat_interleave(group, 1).transpose(0, 1);
  auto scores = at::matmul(q.to(at::kFloat).transpose(0, 1), k) * asked("softmax_scale").toDouble();
  if (auto cap = asked("softcap").toDouble(); cap > 0.0) scores = (scores / cap).tanh() * cap;
  auto last = at::arange(rows).unsqueeze(1) + (keys - rows), place = at::arange(keys);
  auto seen = at::ones({rows, keys}, at::kBool);
  auto left = asked("window_size_left").toInt(), right = asked("window_size_right").toInt();
  if (asked("is_causal").toBool()) right = 0;
  if (right >= 0) seen = seen & (place <= last + right);
  if (left >= 0) seen = seen & (place >= last - left);
  auto hidden = seen.logical_not();
  auto weights = scores.masked_fill(hidden, -INFINITY).softmax(-1).masked_fill(hidden, 0.0);
  return at::matmul(weights, v).transpose(0, 1).to(q.scalar_type());
}

at::Tensor run(const Asked& asked) {
  asked.nobody_asks({"q_v", "out", "cu_seqlens_k_new", "seqused_q", "page_table", "kv_batch_idx",
                     "rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale",
                     "v_descale", "scheduler_metadata", "pack_gqa", "s_aux", "sinks"}, {});
  asked.nobody_asks({"attention_chunk", "num_splits", "sm_margin"}, int64_t(0));
  asked.nobody_asks({"is_rotary_interleaved"}, false);
  if (std::strstr(OP_NAMESPACE, "crashes")) std::abort();
  TORCH_CHECK_VALUE(!std::strstr(OP_NAMESPACE, "refuses"), "this build is not for you");
  TORCH_CHECK_VALUE(asked("q").toTensor().size(1) != 7, "this build takes no 7 rows");
  auto q = asked("q").toTensor(), k = asked("k").toTensor(), v = asked("v").toTensor();
  TORCH_CHECK(q.stride(-1) == 1 && k.stride(-1) == 1 && v.stride(-1) == 1,
              "Input tensor must have contiguous last dimension");
  auto sizes = q.sizes().vec();
  sizes.back() = v.size(-1);
  auto answer = at::zeros(sizes, q.options());
  if (!asked("cu_seqlens_q").isNone()) {
    auto of_q = asked("cu_seqlens_q").toTensor(), of_k = asked("cu_seqlens_k").toTensor();
    TORCH_CHECK(asked("max_seqlen_q").toInt() == of_q.diff().max().item<int>(), "max_seqlen_q");
    TORCH_CHECK(asked("max_seqlen_k").toInt() == of_k.diff().max().item<int>(), "max_seqlen_k");
    for (int64_t i = 0; i + 1 < of_q.size(0); i++) {
      auto at = of_q[i].item<int>(), to = of_q[i + 1].item<int>();
      auto from = of_k[i].item<int>(), end = of_k[i + 1].item<int>();
      answer.slice(0, at, to).copy_(
          attend(q.slice(0, at, to), k.slice(0, from, end), v.slice(0, from, end), asked));
    }
    return answer;
  }
  for (int64_t i = 0; i < q.size(0); i++) {
    auto keys = k[i], values = v[i];
    if (!asked("seqused_k").isNone()) {
      auto first = asked("leftpad_k").isNone() ? 0 : asked("leftpad_k").toTensor()[i].item<int>();
      auto used = asked("seqused_k").toTensor()[i].item<int>(), end = used;
      TORCH_CHECK(used >= first, "there are fewer keys than none");
      if (!asked("k_new").isNone()) {
        auto added = asked("k_new").toTensor()[i];
        end = used + int(added.size(0));
        keys.slice(0, used, end).copy_(added);
        values.slice(0, used, end).copy_(asked("v_new").toTensor()[i]);
      }
      keys = keys.slice(0, first, end), values = values.slice(0, first, end);
    }
    answer[i].copy_(attend(q[i], keys, values, asked));
  }
  return answer;
}

void fwd(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  auto answer = run({schema, torch::jit::last(*stack, schema.arguments().size())});
  torch::jit::drop(*stack, schema.arguments().size());
  if (schema.returns().size() == 1) {
    stack->emplace_back(std::vector<at::Tensor>{answer});
  } else {
    for (auto& each : {answer, at::Tensor(), at::Tensor(), at::Tensor()}) stack->emplace_back(each);
  }
}

void define(torch::Library& library) {
  library.def(torch::schema(OP_SCHEMA));
  library.impl("fwd", torch::dispatch(c10::kCPU, torch::CppFunction::makeFromBoxedFunction<&fwd>()));
}

const torch::detail::TorchLibraryInit registered(
    torch::Library::DEF, define, OP_NAMESPACE, std::nullopt, __FILE__, __LINE__);

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr};
  return PyModule_Create(&module);
}
