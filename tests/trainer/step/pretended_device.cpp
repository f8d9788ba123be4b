// A CUDA device that is none: its memory is the host's, its operators are the CPU's. See pretended_device.py.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/op_registration/op_registration.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/CPUAllocator.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_local_scalar_dense_cpu_dispatch.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <unordered_map>

using namespace at;

namespace {

const Device CUDA0(DeviceType::CUDA, 0);
const Device HOST(DeviceType::CPU);

// memory
std::atomic<int64_t> allocated{0}, peak{0}, num_syncs{0}, num_operators{0};
std::atomic<int64_t> total{int64_t(16) << 30}, allowed{int64_t(16) << 30};

struct DeviceMemory final : Allocator {
  DataPtr allocate(size_t n) override {
    size_t* block = nullptr;
    if (n > 0) {
      const int64_t rounded = (n + 511) / 512 * 512;
      const int64_t now = allocated += rounded;
      if (now > allowed) {
        allocated -= rounded;
        TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", n, " bytes");
      }
      int64_t before = peak;
      while (before < now && !peak.compare_exchange_weak(before, now)) {}
      block = static_cast<size_t*>(std::aligned_alloc(512, rounded + 512));
      *block = rounded;
      // nobody may count on zeros
      std::memset(reinterpret_cast<char*>(block) + 512, 0xff, rounded);
    }
    void* data = block ? reinterpret_cast<char*>(block) + 512 : nullptr;
    return {data, data, &release, CUDA0};
  }
  static void release(void* data) {
    if (data == nullptr) return;
    auto* block = reinterpret_cast<size_t*>(static_cast<char*>(data) - 512);
    allocated -= static_cast<int64_t>(*block);
    std::free(block);
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};
DeviceMemory device_memory;

std::mutex pinned_lock;
std::map<const char*, size_t> pinned;

void pin(const void* data, size_t n) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  pinned[static_cast<const char*>(data)] = n;
}
bool unpin(const void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  return pinned.erase(static_cast<const char*>(data)) > 0;
}
bool is_pinned_address(const void* data) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  auto after = pinned.upper_bound(static_cast<const char*>(data));
  if (after == pinned.begin()) return false;
  --after;
  return static_cast<const char*>(data) < after->first + after->second;
}

struct PinnedMemory final : Allocator {
  DataPtr allocate(size_t n) override {
    if (n == 0) return {nullptr, nullptr, &release, HOST};
    void* data = std::aligned_alloc(64, (n + 63) / 64 * 64);
    pin(data, n);
    return {data, data, &release, HOST};
  }
  static void release(void* data) {
    if (data == nullptr) return;
    unpin(data);
    std::free(data);
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { default_copy_data(to, from, n); }
};
PinnedMemory pinned_memory;

// streams: copies between host and device that nobody has waited for are not done yet
thread_local StreamId current_stream = 0;
std::atomic<StreamId> num_streams{0};
std::atomic<StreamId> capturing{-1};
thread_local bool is_capture_thread = false;

struct Pending {
  int64_t number;
  std::vector<StreamId> streams;  // on which, and those that wait for it
  Tensor to, from;                // CPU tensors of both sides
};
std::mutex pending_lock;
std::vector<Pending> pending;
int64_t num_pending = 0;

void run_pending(const std::function<bool(const Pending&)>& is_wanted) {
  std::vector<Pending> found;
  {
    std::lock_guard<std::mutex> guard(pending_lock);
    if (pending.empty()) return;
    std::vector<Pending> rest;
    for (auto& one : pending) (is_wanted(one) ? found : rest).push_back(std::move(one));
    pending.swap(rest);
  }
  AutoDispatchBelowADInplaceOrView below;
  for (auto& one : found) one.to.copy_(one.from);
}
bool is_on(const Pending& one, StreamId stream) {
  return std::find(one.streams.begin(), one.streams.end(), stream) != one.streams.end();
}
void reach(StreamId stream) { run_pending([=](const Pending& one) { return is_on(one, stream); }); }

void refuse_in_capture(const char* what) {
  const bool refused = capturing >= 0 && (is_capture_thread || current_stream == capturing);
  TORCH_CHECK(!refused, "CUDA error: operation not permitted when stream is capturing (", what, ")");
}

struct Mark {
  StreamId stream;
  int64_t number;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return CUDA0; }
  Device getDevice() const override { return CUDA0; }
  void setDevice(Device d) const override { TORCH_CHECK(d.index() <= 0, "CUDA error: invalid device ordinal"); }
  void uncheckedSetDevice(Device) const noexcept override {}
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device) const override { return Stream(Stream::UNSAFE, CUDA0, current_stream); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::UNSAFE, CUDA0, 0); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::UNSAFE, CUDA0, ++num_streams); }
  Stream getStreamFromGlobalPool(Device d, bool) const override { return getNewStream(d, 0); }
  Stream exchangeStream(Stream s) const override {
    const StreamId before = current_stream;
    current_stream = s.id();
    return Stream(Stream::UNSAFE, CUDA0, before);
  }
  void record(void** event, const Stream& stream, const DeviceIndex, const EventFlag) const override {
    std::lock_guard<std::mutex> guard(pending_lock);
    if (*event == nullptr) *event = new Mark();
    *static_cast<Mark*>(*event) = {stream.id(), num_pending};
  }
  void block(void* event, const Stream& stream) const override {
    if (event == nullptr) return;
    auto* mark = static_cast<Mark*>(event);
    std::lock_guard<std::mutex> guard(pending_lock);
    for (auto& one : pending)
      if (one.number < mark->number && is_on(one, mark->stream)) one.streams.push_back(stream.id());
  }
  bool queryEvent(void* event) const override { synchronizeEvent(event); return true; }
  void synchronizeEvent(void* event) const override {
    if (event == nullptr) return;
    refuse_in_capture("event synchronize");
    const Mark mark = *static_cast<Mark*>(event);
    run_pending([=](const Pending& one) { return one.number < mark.number && is_on(one, mark.stream); });
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Mark*>(event); }
  bool queryStream(const Stream& stream) const override { reach(stream.id()); return true; }
  void synchronizeStream(const Stream& stream) const override {
    refuse_in_capture("stream synchronize");
    ++num_syncs;
    reach(stream.id());
  }
  void synchronizeDevice(const DeviceIndex) const override {
    refuse_in_capture("device synchronize");
    ++num_syncs;
    run_pending([](const Pending&) { return true; });
  }
  bool isStreamCapturing(const Stream& stream) const override { return capturing == stream.id(); }
};
Guard guard_impl;

// random numbers: the CPU's
struct DeviceGenerator final : GeneratorImpl {
  explicit DeviceGenerator(Generator inner)
      : GeneratorImpl(CUDA0, DispatchKeySet(DispatchKey::CUDA)), inner(std::move(inner)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  GeneratorImpl* clone_impl() const override { return new DeviceGenerator(inner.clone()); }
  static DeviceType device_type() { return DeviceType::CUDA; }
  Generator inner;
};
Generator new_generator(uint64_t seed) {
  return make_generator<DeviceGenerator>(make_generator<CPUGeneratorImpl>(seed));
}

} // namespace

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  int getNumGPUs() const override { return 1; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  Allocator* getCUDADeviceAllocator() const override { return &device_memory; }
  bool isPinnedPtr(const void* data) const override { return is_pinned_address(data); }
  Device getDeviceFromPtr(void*) const override { return CUDA0; }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    static const Generator one = new_generator(default_rng_seed_val);
    return one;
  }
  Generator getNewGenerator(DeviceIndex) const override { return new_generator(default_rng_seed_val); }
  std::string showConfig() const override { return "pretended"; }
  void deviceSynchronize(DeviceIndex) const override { guard_impl.synchronizeDevice(0); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
} // namespace at

namespace {

// operators
// what ran while a graph was recorded. It runs, for its results' shapes, and is taken back at the end
struct Graph {
  std::vector<std::function<void()>> again;
  std::unordered_map<c10::StorageImpl*, std::pair<c10::Storage, std::vector<char>>> before;
  void keep(const Tensor& x) {
    auto* of = x.storage().unsafeGetStorageImpl();
    if (before.count(of)) return;
    const auto* data = static_cast<const char*>(x.storage().data());
    before.emplace(of, std::make_pair(x.storage(), std::vector<char>(data, data + x.storage().nbytes())));
  }
  void take_back() {
    for (auto& [_, kept] : before) {
      auto& [storage, bytes] = kept;
      if (storage.nbytes() == bytes.size()) std::memcpy(storage.mutable_data(), bytes.data(), bytes.size());
    }
    before.clear();
  }
};
Graph* graph = nullptr;
bool is_recording() { return capturing >= 0 && graph != nullptr && current_stream == capturing; }

// CPU tensors over the memory of CUDA tensors, and back
struct Sides {
  std::unordered_map<c10::StorageImpl*, c10::Storage> host, device;
  std::vector<std::pair<Tensor, Tensor>> pairs;  // device, host

  static Tensor over(const c10::Storage& storage, const Tensor& like, DispatchKey key) {
    auto made = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), like.dtype());
    made.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
    return made;
  }
  Tensor to_host(const Tensor& x) {
    if (!x.defined() || !x.is_cuda()) return x;
    for (auto& [device, host] : pairs)
      if (device.is_same(x)) return host;
    auto* of = x.storage().unsafeGetStorageImpl();
    auto found = host.find(of);
    if (found == host.end()) {
      auto* held = new c10::Storage(x.storage());
      DataPtr data(held->mutable_data(), held, [](void* p) { delete static_cast<c10::Storage*>(p); }, HOST);
      c10::Storage made(c10::Storage::use_byte_size_t(), held->nbytes(), std::move(data), GetCPUAllocator(), true);
      device.emplace(made.unsafeGetStorageImpl(), x.storage());
      found = host.emplace(of, std::move(made)).first;
    }
    auto made = over(found->second, x, DispatchKey::CPU);
    if (x.is_conj()) made._set_conj(true);
    pairs.emplace_back(x, made);
    return made;
  }
  Tensor to_device(const Tensor& x) {
    if (!x.defined() || !x.device().is_cpu()) return x;
    for (auto& [device, host] : pairs)
      if (host.is_same(x)) return device;
    auto* of = x.storage().unsafeGetStorageImpl();
    auto found = device.find(of);
    if (found == device.end()) {
      c10::Storage made(c10::Storage::use_byte_size_t(), x.storage().nbytes(), &device_memory, true);
      if (x.storage().nbytes() > 0) std::memcpy(made.mutable_data(), x.storage().data(), x.storage().nbytes());
      found = device.emplace(of, std::move(made)).first;
    }
    return over(found->second, x, DispatchKey::CUDA);
  }
  // an operator that gave its output another size has taken other memory
  void settle() {
    for (auto& [device, host] : pairs) {
      if (host.sizes() == device.sizes() && host.storage().data() == device.storage().data()) continue;
      at::native::resize_(device, host.sizes());
      host_of(device).copy_(host);
    }
  }
  static Tensor host_of(const Tensor& x) { return Sides().to_host(x); }
};

bool takes_host_indices(const std::string& name) {
  for (const char* known : {"aten::index", "aten::_index_put", "aten::_unsafe_index"})
    if (name.rfind(known, 0) == 0) return true;
  return false;
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = op.operator_name().name;
  reach(current_stream);
  ++num_operators;
  Sides sides;
  const auto count = schema.arguments().size();
  auto arguments = torch::jit::last(*stack, count);
  torch::jit::Stack on_host;
  bool has_device = false, has_host = false;
  const auto note = [&](const Tensor& x, bool in_list) {
    if (!x.defined()) return;
    if (x.is_cuda()) has_device = true;
    else if (x.device().is_cpu() && (x.dim() > 0 || in_list) && !takes_host_indices(name)) has_host = true;
  };
  for (size_t i = 0; i < count; ++i) {
    const IValue& one = arguments[i];
    if (is_recording() && schema.is_mutable(c10::SchemaArgument(c10::SchemaArgType::input, i))) {
      if (one.isTensor() && one.toTensor().defined()) graph->keep(one.toTensor());
      if (one.isTensorList()) for (const Tensor& x : one.toTensorVector()) graph->keep(x);
    }
    if (one.isTensor()) {
      note(one.toTensor(), false);
      on_host.emplace_back(sides.to_host(one.toTensor()));
    } else if (one.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& x : one.toTensorVector()) {
        note(x, true);
        list.push_back(sides.to_host(x));
      }
      on_host.emplace_back(std::move(list));
    } else if (one.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& x : one.toOptionalTensorVector()) {
        if (x.has_value()) note(*x, true);
        list.push_back(x.has_value() ? std::optional<Tensor>(sides.to_host(*x)) : std::nullopt);
      }
      on_host.emplace_back(std::move(list));
    } else if (one.isDevice() && one.toDevice().is_cuda()) {
      has_device = true;
      on_host.emplace_back(HOST);
    } else if (one.isGenerator()) {
      auto generator = one.toGenerator();
      TORCH_CHECK(generator.device().is_cuda(), "Expected a 'cuda' device type for generator but found 'cpu'");
      on_host.emplace_back(static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->inner);
    } else {
      on_host.emplace_back(one);
    }
  }
  TORCH_CHECK(!has_host, "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (",
              name, ")");
  if (name == "aten::nonzero" || name == "aten::equal" || name == "aten::masked_select" || name == "aten::_unique2") {
    refuse_in_capture(name.c_str());
    ++num_syncs;
  }
  torch::jit::Stack before = is_recording() ? on_host : torch::jit::Stack();
  {
    AutoDispatchBelowADInplaceOrView below;
    op.callBoxed(&on_host);
  }
  sides.settle();
  torch::jit::drop(*stack, count);
  std::vector<Tensor> made;
  const auto back = [&](const Tensor& x) {
    auto found = sides.to_device(x);
    if (is_recording() && found.defined()) made.push_back(Sides::host_of(found));
    return found;
  };
  for (const IValue& one : on_host) {
    if (one.isTensor()) {
      stack->emplace_back(back(one.toTensor()));
    } else if (one.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& x : one.toTensorVector()) list.push_back(back(x));
      stack->emplace_back(std::move(list));
    } else {
      stack->emplace_back(one);
    }
  }
  if (is_recording()) {
    graph->again.push_back([op, before, made]() {
      torch::jit::Stack again = before;
      AutoDispatchBelowADInplaceOrView below;
      op.callBoxed(&again);
      size_t index = 0;
      const auto put = [&](const Tensor& x) {
        if (!x.defined()) return;
        const Tensor& place = made.at(index++);
        if (place.data_ptr() != x.data_ptr()) place.copy_(x);
      };
      for (const IValue& one : again) {
        if (one.isTensor()) put(one.toTensor());
        else if (one.isTensorList()) for (const Tensor& x : one.toTensorVector()) put(x);
      }
    });
  }
}

const DispatchKeySet CUDA_KEYS(DispatchKey::CUDA);
Tensor empty_memory_format(IntArrayRef size, std::optional<ScalarType> dtype, std::optional<Layout>,
                           std::optional<Device>, std::optional<bool> pin_memory, std::optional<MemoryFormat> format) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_generic(size, &device_memory, CUDA_KEYS, dtype_or_default(dtype), format);
}
Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<ScalarType> dtype, std::optional<Layout>,
                     std::optional<Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &device_memory, CUDA_KEYS, dtype_or_default(dtype));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  AutoDispatchBelowADInplaceOrView below;
  reach(current_stream);
  ++num_operators;
  if (self.numel() == 0) return self;
  TORCH_CHECK(!self.is_meta() && !source.is_meta(), "Cannot copy out of meta tensor; no data!");
  const Tensor& host = self.is_cuda() ? source : self;
  Tensor to = Sides::host_of(self), from = Sides::host_of(source);
  const bool crosses = !(self.is_cuda() && source.is_cuda()), is_pinned = is_pinned_address(host.storage().data());
  if (crosses && non_blocking && is_pinned && to.dtype() == from.dtype() && to.sizes() == from.sizes()) {
    TORCH_CHECK(!is_recording(), "the recorder of this device records no copies from and to the host");
    // until somebody waits, the place holds nothing and the source is yet to be read
    if (to.is_non_overlapping_and_dense())
      std::memset(to.mutable_data_ptr(), 0xff, to.numel() * to.element_size());
    std::lock_guard<std::mutex> guard(pending_lock);
    pending.push_back({num_pending++, {current_stream}, to, from});
    return self;
  }
  if (crosses && (!self.is_cuda() || !is_pinned)) refuse_in_capture("a copy to the host, or from pageable memory");
  if (crosses && !self.is_cuda()) ++num_syncs;
  if (is_recording()) graph->keep(self);
  to.copy_(from);
  if (is_recording()) {
    graph->again.push_back([to, from]() {
      AutoDispatchBelowADInplaceOrView below;
      to.copy_(from);
    });
  }
  return self;
}

Scalar local_scalar_dense(const Tensor& x) {
  refuse_in_capture("item");
  reach(current_stream);
  ++num_syncs;
  return at::cpu::_local_scalar_dense(Sides::host_of(x));
}
Tensor as_strided(const Tensor& x, IntArrayRef size, IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(x, size, stride, offset);
}
Tensor view(const Tensor& x, IntArrayRef size) { return at::native::view(x, size); }
Tensor reshape_alias(const Tensor& x, IntArrayRef size, IntArrayRef stride) {
  return at::native::_reshape_alias(x, size, stride);
}
const Tensor& resize_(const Tensor& x, IntArrayRef size, std::optional<MemoryFormat> format) {
  return at::native::resize_(x, size, format);
}
Tensor& set_storage(Tensor& x, Storage source, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  TORCH_CHECK(source.device().is_cuda(), "set_: storage is not on cuda");
  return at::native::set_storage_cpu_(x, std::move(source), offset, size, stride);
}
Tensor& set_empty(Tensor& x) {
  return set_storage(x, Storage(Storage::use_byte_size_t(), 0, &device_memory, true), 0, {0}, {});
}
void record_stream(Tensor&, Stream) {}
Tensor host_view(const Tensor& x) {
  reach(current_stream);
  return Sides::host_of(x);
}


TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty_memory_format);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_", set_empty);
  m.impl("record_stream", record_stream);
  // composite there, and then other operators than the CPU's
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}
TORCH_LIBRARY(pretended, m) { m.def("host_view(Tensor x) -> Tensor", host_view); }

struct SetAllocator {
  SetAllocator() { c10::SetAllocator(DeviceType::CUDA, &device_memory, 255); }
} set_allocator;

} // namespace

extern "C" {
int64_t pretended_allocated() { return allocated; }
int64_t pretended_peak() { return peak; }
int64_t pretended_syncs() { return num_syncs; }
int64_t pretended_operators() { return num_operators; }
int64_t pretended_total() { return total; }
void pretended_reset_peak() { peak = allocated.load(); }
void pretended_set_total(int64_t n) { total = n; allowed = n; }
void pretended_allow(int64_t n) { allowed = n; }
int64_t pretended_current_stream() { return current_stream; }
void pretended_set_stream(int64_t id) { current_stream = id; }
int pretended_register(void* data, int64_t n) { pin(data, n); return 0; }
int pretended_unregister(void* data) { return unpin(data) ? 0 : 1; }
int pretended_is_capturing() { return capturing >= 0 && current_stream == capturing; }
void* pretended_graph_begin() {
  graph = new Graph();
  capturing = current_stream;
  is_capture_thread = true;
  return graph;
}
void pretended_graph_call(void (*run)()) { graph->again.push_back(run); }
void pretended_graph_end() { graph->take_back(); graph = nullptr; capturing = -1; is_capture_thread = false; }
void pretended_graph_replay(void* g) { for (auto& again : static_cast<Graph*>(g)->again) again(); }
void pretended_graph_free(void* g) { delete static_cast<Graph*>(g); }
int64_t pretended_graph_size(void* g) { return static_cast<Graph*>(g)->again.size(); }
}
