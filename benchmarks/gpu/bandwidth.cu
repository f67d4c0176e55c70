// What of the memory's bandwidth the kernels of this package use: by rule, dtypes and chunk size, with and without a
// statistics pass before, starting early or not, forwards or backwards; beside copies and kernels written by hand.
// Without torch:
//
//   nvcc -std=c++17 -O3 -DNDEBUG --fmad=false -arch=sm_90 -o bandwidth benchmarks/gpu/bandwidth.cu && ./bandwidth
//
// Prints a table, and with --json writes one line of JSON for each of its rows. With --profile it times nothing and
// launches each kernel once, for a profiler, and the lines say what each launch has to move.
#include <cstring>
#include <memory>
#include <string>

#include "../../csrc/cuda/carried.cu"
#include "../../csrc/cuda/statistics.cu"
#include "../../csrc/cuda/update.cu"
#include "../../csrc/cuda/upload.cu"
#include "by_hand.h"
#include "workload.h"

namespace fusedopt::bandwidth {
namespace {

constexpr const char* kUsage =
    "usage: bandwidth [--elements N] [--tensors N] [--runs N] [--json FILE] [--profile]\n"
    "  --elements N  of all tensors together (default: 304 Mi, as of ViT-L)\n"
    "  --tensors N   among which they are divided (default: 296)\n"
    "  --runs N      of which a time is the median (default: 11)\n"
    "  --json FILE   also write there, one JSON object a line, all that was measured\n"
    "  --profile     launch each kernel once and time nothing (default then: 128 Mi elements)\n";

constexpr int64_t kChunks[] = {8 << 10, 16 << 10, 32 << 10, 64 << 10};

struct Options {
  size_t elements = 0;
  int tensors = 296, runs = 11;
  const char* json = nullptr;
  bool profile = false;
};

[[noreturn]] void refuse(const std::string& reason) {
  std::fprintf(stderr, "bandwidth: %s\n%s", reason.c_str(), kUsage);
  std::exit(2);
}

long long positive(const char* option, const char* text) {
  char* end = nullptr;
  const long long value = text ? std::strtoll(text, &end, 10) : 0;
  if (!text || *end || value <= 0) refuse(std::string(option) + " needs a number above 0");
  return value;
}

Options parse(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const char* const name = arguments[i];
    const char* const value = i + 1 < count ? arguments[i + 1] : nullptr;
    auto is = [name](const char* option) { return std::strcmp(name, option) == 0; };
    if (is("--help")) {
      std::fputs(kUsage, stdout);
      std::exit(0);
    } else if (is("--profile")) {
      options.profile = true;
      continue;
    } else if (is("--elements")) {
      options.elements = static_cast<size_t>(positive(name, value));
    } else if (is("--tensors")) {
      options.tensors = static_cast<int>(positive(name, value));
    } else if (is("--runs")) {
      options.runs = static_cast<int>(positive(name, value));
    } else if (is("--json")) {
      if (!value) refuse("--json needs the name of a file");
      options.json = value;
    } else {
      refuse(std::string("what is ") + name + "?");
    }
    ++i;
  }
  if (!options.elements) options.elements = (options.profile ? size_t(128) : size_t(304)) << 20;
  // Equal tensors that begin at multiples of 16 bytes, whatever the dtype.
  const size_t each = options.elements / options.tensors / 1024 * 1024;
  if (!each) refuse("fewer than 1024 elements to a tensor");
  options.elements = each * options.tensors;
  return options;
}

// One row of the table, and one line of JSON. What does not apply is null or 0 and left out.
struct Record {
  const char* rule;
  const char* dtype;
  long long chunk;
  std::string what;
  double bytes;  // that have to be moved, of one element
  double milliseconds;
};

class Output {
 public:
  Output(const Options& options, const cudaDeviceProp& device) : elements_(static_cast<double>(options.elements)) {
    if (options.json && !(file_ = std::fopen(options.json, "w"))) {
      std::perror(options.json);
      std::exit(2);
    }
    std::printf("%s, %d multiprocessors, %.0f MB of L2; %zu elements in %d tensors\n", device.name,
                device.multiProcessorCount, device.l2CacheSize / 1e6, options.elements, options.tensors);
    std::printf("%-6s %-11s %6s  %-56s %9s %6s %s\n", "rule", "dtypes", "chunk", "what", "ms", "GB/s", "of the copy");
  }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  ~Output() {
    if (file_) std::fclose(file_);
  }

  void add(const Record& record) {
    const double rate = record.bytes * elements_ / record.milliseconds / 1e6;
    if (!copy_) copy_ = rate;
    const std::string chunk = record.chunk ? std::to_string(record.chunk / 1024) + "Ki" : "";
    std::printf("%-6s %-11s %6s  %-56s %9.4f %6.0f %6.1f %%\n", record.rule ? record.rule : "",
                record.dtype ? record.dtype : "", chunk.c_str(), record.what.c_str(), record.milliseconds, rate,
                100 * rate / copy_);
    std::fflush(stdout);
    if (!file_) return;
    begin_line(record);
    std::fprintf(file_, ", \"milliseconds\": %.6g, \"gigabytes_per_second\": %.6g, \"of_copy\": %.6g}\n",
                 record.milliseconds, rate, rate / copy_);
    std::fflush(file_);
  }

  // What a profiler sees next.
  void announce(const Record& record) {
    std::printf("%-6s %-11s %s\n", record.rule ? record.rule : "", record.dtype ? record.dtype : "",
                record.what.c_str());
    if (!file_) return;
    begin_line(record);
    std::fprintf(file_, "}\n");
    std::fflush(file_);
  }

 private:
  void begin_line(const Record& record) {
    std::fprintf(file_, "{\"what\": \"%s\", \"elements\": %.0f, \"bytes\": %g", record.what.c_str(), elements_,
                 record.bytes);
    if (record.rule) std::fprintf(file_, ", \"rule\": \"%s\"", record.rule);
    if (record.dtype) std::fprintf(file_, ", \"dtype\": \"%s\"", record.dtype);
    if (record.chunk) std::fprintf(file_, ", \"chunk\": %lld", record.chunk);
  }

  const double elements_;
  double copy_ = 0;
  std::FILE* file_ = nullptr;
};

class Benchmark {
 public:
  Benchmark(const Options& options, const cudaDeviceProp& device)
      : options_(options), output_(options, device), columns_(options.elements) {
    FUSEDOPT_CHECK_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    timer_ = std::make_unique<Timer>(stream_, static_cast<size_t>(device.l2CacheSize));
    cuda::gpu::load_statistics();
    cuda::gpu::load_update();
    cuda::gpu::load_upload();
  }

  void run() {
    columns_.fill(kDTypeChoices[0]);
    copies();
    const std::vector<RuleChoice> rules = rule_choices();
    for (const RuleChoice& rule : rules) {
      for (const DTypeChoice& dtypes : kDTypeChoices) {
        for (int64_t chunk : kChunks) ours(rule, dtypes, chunk);
      }
    }
    columns_.fill(kDTypeChoices[0]);
    for (const ByHand& variant : kByHand) {
      record({"adamw", "fp32", 0, std::string("by hand: ") + variant.name, 28, 0},
             [&] { variant.launch(arrays(), stream_); });
    }
  }

  void profile() {
    const std::vector<RuleChoice> rules = rule_choices();
    for (const RuleChoice& rule : rules) {
      for (const DTypeChoice& dtypes : kDTypeChoices) {
        columns_.fill(dtypes);
        const int64_t chunk = chunk_elements(static_cast<int64_t>(options_.elements));
        Workload workload(columns_, options_.tensors, rule, dtypes, chunk, stream_);
        output_.announce({rule.name, dtypes.name, chunk, "statistics", workload.statistics_bytes(), 0});
        workload.statistics();
        output_.announce({rule.name, dtypes.name, chunk, "update", workload.update_bytes(), 0});
        workload.update(true, true, false);
        workload.check(1);
      }
    }
  }

 private:
  Arrays arrays() const {
    return {columns_.param.as<float4>(), columns_.grad.as<float4>(), columns_.state0.as<float4>(),
            columns_.state1.as<float4>(), columns_.elements / 4};
  }

  template <class Work>
  void record(Record record, const Work& enqueue) {
    record.milliseconds = timer_->milliseconds(enqueue, options_.runs);
    output_.add(record);
  }

  // The first is what all others are compared with.
  void copies() {
    const Arrays a = arrays();
    const size_t bytes = 4 * columns_.elements;
    const auto blocks = static_cast<unsigned>((a.count + 255) / 256);
    record({nullptr, "fp32", 0, "copy, cudaMemcpyAsync", 8, 0},
           [&] { FUSEDOPT_CHECK_CUDA(cudaMemcpyAsync(a.exp_avg, a.grad, bytes, cudaMemcpyDeviceToDevice, stream_)); });
    record({nullptr, "fp32", 0, "copy, a kernel", 8, 0},
           [&] { copy_kernel<<<blocks, 256, 0, stream_>>>(a.exp_avg, a.grad, a.count); });
    record({nullptr, "fp32", 0, "four arrays read, three written", 28, 0},
           [&] { four_in_three_out_kernel<<<blocks, 256, 0, stream_>>>(a); });
    record({nullptr, "fp32", 0, "read only", 4, 0},
           [&] { launch_read(a.grad, bytes, reinterpret_cast<float*>(a.exp_avg), stream_); });
  }

  void ours(const RuleChoice& rule, const DTypeChoice& dtypes, int64_t chunk) {
    columns_.fill(dtypes);
    Workload workload(columns_, options_.tensors, rule, dtypes, chunk, stream_);
    int steps = 0;
    auto full = [&](bool reverse, bool early) {
      workload.statistics();
      workload.update(true, reverse, early);
      ++steps;
    };
    const double statistics = workload.statistics_bytes(), update = workload.update_bytes();
    auto add = [&](const char* what, double bytes, const auto& enqueue) {
      record({rule.name, dtypes.name, chunk, what, bytes, 0}, enqueue);
    };
    add("statistics", statistics, [&] { workload.statistics(), ++steps; });
    add("full", statistics + update, [&] { full(true, false); });
    add("full, early", statistics + update, [&] { full(true, true); });
    add("full, early, forwards", statistics + update, [&] { full(false, true); });
    add("bare", update, [&] { workload.update(false, false, false), ++steps; });
    workload.check(steps);
  }

  const Options options_;
  Output output_;
  const Columns columns_;
  cudaStream_t stream_{};
  std::unique_ptr<Timer> timer_;
};

}  // namespace
}  // namespace fusedopt::bandwidth

int main(int count, char** arguments) {
  using namespace fusedopt::bandwidth;
  const Options options = parse(count, arguments);
  cudaDeviceProp device{};
  FUSEDOPT_CHECK_CUDA(cudaGetDeviceProperties(&device, 0));
  try {
    Benchmark benchmark(options, device);
    options.profile ? benchmark.profile() : benchmark.run();
  } catch (const std::exception& error) {  // of the launchers
    std::fprintf(stderr, "bandwidth: %s\n", error.what());
    return 1;
  }
  return 0;
}
