// The calls of the CUDA driver that Hoist makes, on a device that is a program. README.md says what it takes care of.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "machine.h"
#include "memory.h"

namespace emulator {
namespace {

enum Code : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    ECC_UNCORRECTABLE = 214,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    LAUNCH_TIMEOUT = 702,
    HOST_MEMORY_ALREADY_REGISTERED = 712,
    HOST_MEMORY_NOT_REGISTERED = 713,
    LAUNCH_FAILED = 719,
    COOPERATIVE_LAUNCH_TOO_LARGE = 720,
    NOT_SUPPORTED = 801,
    STREAM_CAPTURE_UNSUPPORTED = 900,
    STREAM_CAPTURE_INVALIDATED = 901,
    STREAM_CAPTURE_UNMATCHED = 903,
};

struct Name {
    int code;
    const char *name, *text;
};
const Name NAMES[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {ECC_UNCORRECTABLE, "CUDA_ERROR_ECC_UNCORRECTABLE", "uncorrectable ECC error encountered"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {LAUNCH_TIMEOUT, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED", "part or all of the requested memory range is already mapped"},
    {HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED", "pointer does not correspond to a registered memory region"},
    {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {COOPERATIVE_LAUNCH_TOO_LARGE, "CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE", "too many blocks in cooperative launch"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {STREAM_CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED", "the capture was not initiated in this stream"},
};

bool is_sticky(int code) {
    return code == ECC_UNCORRECTABLE || code == ILLEGAL_ADDRESS || code == LAUNCH_TIMEOUT || (code >= 714 && code <= LAUNCH_FAILED);
}

// ---- what was asked for by the environment ----

struct Fault {
    std::string call;
    uint64_t first, last;
    int code;
};

struct Settings {
    uint64_t seed = 0;
    uint64_t memory = 3ull << 30;
    uint64_t pinned = ~0ull;
    int multiprocessors = 3;
    int driver = 13000;
    int major = 9, minor = 0;
    int devices = 1;
    bool delays = true;
    std::vector<Fault> faults;
    /// The device is lost when this launch is to run, counted from 1; 0: never.
    uint64_t lost_at = 0;
    int lost_code = LAUNCH_FAILED;
};

uint64_t size_of(const std::string &text) {
    char *end;
    uint64_t n = std::strtoull(text.c_str(), &end, 0);
    std::string unit(end);
    if (unit == "KiB") n <<= 10;
    if (unit == "MiB") n <<= 20;
    if (unit == "GiB") n <<= 30;
    return n;
}

std::vector<std::string> split(const std::string &text, char at) {
    std::vector<std::string> parts(1);
    for (char c : text) {
        if (c == at) {
            parts.emplace_back();
        } else {
            parts.back() += c;
        }
    }
    return parts;
}

/// False, with a word on stderr, if a setting is none.
bool parse(const char *text, Settings &s) {
    for (const std::string &setting : split(text, ';')) {
        if (setting.empty()) continue;
        size_t equals = setting.find('=');
        std::string key = setting.substr(0, equals), value = equals == std::string::npos ? "" : setting.substr(equals + 1);
        std::vector<std::string> parts = split(value, ':');
        if (value.empty()) {
            key = "";
        } else if (key == "seed") {
            s.seed = size_of(value);
        } else if (key == "memory") {
            s.memory = size_of(value);
        } else if (key == "pinned") {
            s.pinned = size_of(value);
        } else if (key == "multiprocessors") {
            s.multiprocessors = (int)size_of(value);
        } else if (key == "driver") {
            s.driver = (int)size_of(value);
        } else if (key == "capability") {
            s.major = std::atoi(value.c_str());
            size_t dot = value.find('.');
            s.minor = dot == std::string::npos ? 0 : std::atoi(value.c_str() + dot + 1);
        } else if (key == "devices") {
            s.devices = (int)size_of(value);
        } else if (key == "delays") {
            s.delays = size_of(value) != 0;
        } else if (key == "fail" && parts.size() == 3) {
            bool on = !parts[1].empty() && parts[1].back() == '+';
            uint64_t n = size_of(on ? parts[1].substr(0, parts[1].size() - 1) : parts[1]);
            s.faults.push_back({parts[0], n, on ? ~0ull : n, (int)size_of(parts[2])});
        } else if (key == "lost" && parts.size() <= 2) {
            s.lost_at = size_of(parts[0]);
            if (parts.size() == 2) s.lost_code = (int)size_of(parts[1]);
        } else {
            key = "";
        }
        if (key.empty()) {
            std::fprintf(stderr, "emulated device: `%s` is no setting\n", setting.c_str());
            return false;
        }
    }
    return true;
}

// ---- handles ----

typedef std::function<void()> Work;

struct Stream {
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Work> queue;
    uint64_t enqueued = 0, completed = 0;
    bool started = false, closing = false;
    unsigned ordinal = 0;
    uint64_t launches = 0;
    Random random{0};
    // Set while it records.
    bool capturing = false, spoiled = false;
    std::thread::id recorder;
    std::vector<Work> captured;
};

struct Event {
    std::mutex mutex;
    std::condition_variable changed;
    uint64_t recorded = 0, passed = 0;
    bool timed = true;
    std::chrono::steady_clock::time_point when;
};

struct Module {
    std::string image;
    bool is_ptx;
    std::vector<struct Function *> functions;
};

struct Function {
    Module *module;
    const Kernel *kernel;
    unsigned allowed_shared = SHARED_DEFAULT;
};

struct Graph {
    std::vector<Work> work;
};

template <class T> class Handles {
  public:
    T *add(std::shared_ptr<T> object) {
        std::lock_guard lock(mutex);
        T *raw = object.get();
        live[raw] = std::move(object);
        return raw;
    }
    std::shared_ptr<T> find(const void *handle) {
        std::lock_guard lock(mutex);
        auto found = live.find(static_cast<const T *>(handle));
        return found == live.end() ? nullptr : found->second;
    }
    std::shared_ptr<T> take(const void *handle) {
        std::lock_guard lock(mutex);
        auto found = live.find(static_cast<const T *>(handle));
        if (found == live.end()) return nullptr;
        auto object = std::move(found->second);
        live.erase(found);
        return object;
    }
    std::vector<std::shared_ptr<T>> all() {
        std::lock_guard lock(mutex);
        std::vector<std::shared_ptr<T>> objects;
        for (auto &[_, object] : live) objects.push_back(object);
        return objects;
    }
    size_t count() {
        std::lock_guard lock(mutex);
        return live.size();
    }
    void clear() {
        std::lock_guard lock(mutex);
        live.clear();
    }

  private:
    std::mutex mutex;
    std::map<const T *, std::shared_ptr<T>> live;
};

struct Pinned {
    size_t bytes;
    bool allocated;
    size_t mapped;
};

// ---- the device ----

struct Device {
    std::mutex mutex;
    Settings settings;
    bool initialised = false;
    int retained = 0;
    std::atomic<int> lost{0};
    std::string report;
    std::map<std::string, uint64_t> calls;
    std::atomic<uint64_t> launches{0};
    uint64_t leaked = 0;
    unsigned streams_made = 0;
    Memory memory;
    std::map<uintptr_t, Pinned> pinned;
    uint64_t pinned_bytes = 0;
    Handles<Stream> streams;
    // Destroyed, with work that is still to be done.
    std::vector<std::shared_ptr<Stream>> draining;
    Handles<Event> events;
    Handles<Module> modules;
    Handles<Function> functions;
    Handles<Graph> graphs, executables;

    /// What the context itself takes.
    static constexpr uint64_t CONTEXT_BYTES = 64 << 20;

    void lose(int code, const std::string &why) {
        std::lock_guard lock(mutex);
        int none = 0;
        if (!lost.compare_exchange_strong(none, code)) return;
        report = why;
        if (why.find("as asked") == std::string::npos) std::fprintf(stderr, "emulated device: %s\n", why.c_str());
    }
};

Device &device() {
    // Never destroyed: streams' threads run until the process ends.
    static Device *one = [] {
        Device *d = new Device;
        const char *text = std::getenv("HOIST_EMULATED_CUDA");
        if (text && !parse(text, d->settings)) std::exit(70);
        return d;
    }();
    return *one;
}

// An address that is nobody's.
char context_handle;

thread_local void *current_context;

enum Needs { Nothing, Driver, Context };

/// What every call begins with: counts it, and fails it if that was asked for.
int enter(const char *call, Needs needs) {
    Device &d = device();
    int planned = 0;
    {
        std::lock_guard lock(d.mutex);
        uint64_t n = ++d.calls[call];
        for (const Fault &f : d.settings.faults)
            if (f.call == call && n >= f.first && n <= f.last) planned = f.code;
        if (needs != Nothing && !d.initialised && !planned) return NOT_INITIALIZED;
        if (needs == Context && (!current_context || d.retained == 0)) return INVALID_CONTEXT;
    }
    if (planned && is_sticky(planned)) d.lose(planned, std::string(call) + " fails as asked");
    if (planned) return planned;
    return needs == Context ? d.lost.load() : 0;
}

#define ENTER(needs)                                                                                                   \
    do {                                                                                                               \
        if (int code = enter(__func__, needs)) return code;                                                            \
    } while (0)

#define CALL extern "C" __attribute__((visibility("default"))) int

// ---- streams ----

void serve(std::shared_ptr<Stream> s) {
    install_handler();
    std::unique_lock lock(s->mutex);
    for (;;) {
        s->changed.wait(lock, [&] { return !s->queue.empty() || s->closing; });
        if (s->queue.empty()) break;
        Work work = std::move(s->queue.front());
        s->queue.pop_front();
        uint32_t delay = device().settings.delays && s->random.below(16) == 0 ? s->random.below(150) : 0;
        lock.unlock();
        if (delay) std::this_thread::sleep_for(std::chrono::microseconds(delay));
        work();
        work = nullptr;
        lock.lock();
        s->completed++;
        s->changed.notify_all();
    }
    Device &d = device();
    lock.unlock();
    std::lock_guard all(d.mutex);
    d.draining.erase(std::remove(d.draining.begin(), d.draining.end(), s), d.draining.end());
}

/// Adds work to a stream, or to what it records.
int enqueue(const std::shared_ptr<Stream> &s, Work work) {
    std::lock_guard lock(s->mutex);
    if (s->capturing) {
        s->captured.push_back(std::move(work));
        return SUCCESS;
    }
    if (!s->started) {
        s->started = true;
        std::thread(serve, s).detach();
    }
    s->queue.push_back(std::move(work));
    s->enqueued++;
    s->changed.notify_all();
    return SUCCESS;
}

bool records(const std::shared_ptr<Stream> &s) {
    std::lock_guard lock(s->mutex);
    return s->capturing;
}

void drain(Stream &s) {
    std::unique_lock lock(s.mutex);
    uint64_t until = s.enqueued;
    s.changed.wait(lock, [&] { return s.completed >= until; });
}

std::shared_ptr<Stream> stream_of(void *handle) {
    static std::mutex mutex;
    static std::shared_ptr<Stream> default_stream;
    if (handle) return device().streams.find(handle);
    std::lock_guard lock(mutex);
    if (!default_stream) default_stream = std::make_shared<Stream>();
    return default_stream;
}

void drain_all() {
    Device &d = device();
    auto streams = d.streams.all();
    streams.push_back(stream_of(nullptr));
    {
        std::lock_guard lock(d.mutex);
        streams.insert(streams.end(), d.draining.begin(), d.draining.end());
    }
    for (auto &s : streams) drain(*s);
}

/// A call that may not be made while this thread records: it spoils the recording.
int refuse_while_recording() {
    bool any = false;
    for (auto &s : device().streams.all()) {
        std::lock_guard lock(s->mutex);
        if (s->capturing && s->recorder == std::this_thread::get_id()) s->spoiled = any = true;
    }
    return any ? STREAM_CAPTURE_UNSUPPORTED : SUCCESS;
}

#define NOT_WHILE_RECORDING()                                                                                          \
    do {                                                                                                               \
        if (int code = refuse_while_recording()) return code;                                                          \
    } while (0)

/// Whether page-locked memory holds a range, whole.
bool is_pinned(const void *p, size_t bytes) {
    Device &d = device();
    std::lock_guard lock(d.mutex);
    uintptr_t at = (uintptr_t)p;
    // Neighbouring registrations are as one.
    while (bytes > 0) {
        auto after = d.pinned.upper_bound(at);
        if (after == d.pinned.begin()) return false;
        auto &[start, region] = *--after;
        if (at - start >= region.bytes) return false;
        size_t here = std::min(bytes, region.bytes - (at - start));
        at += here, bytes -= here;
    }
    return true;
}

int outside(const char *call, uint64_t address, size_t bytes) {
    char text[200];
    std::snprintf(text, sizeof text, "%s: %zu bytes at %#llx are not all in one allocation", call, bytes, (unsigned long long)address);
    device().lose(ILLEGAL_ADDRESS, text);
    return ILLEGAL_ADDRESS;
}

/// Runs a launch where its turn has come.
void execute(const Launch &launch, unsigned ordinal, uint64_t number) {
    Device &d = device();
    if (d.lost) return;
    uint64_t n = ++d.launches;
    if (d.settings.lost_at != 0 && n >= d.settings.lost_at) {
        d.lose(d.settings.lost_code, "the device is lost, as asked");
        return;
    }
    uint64_t seed = d.settings.seed * 0x9e3779b97f4a7c15ull ^ (uint64_t)(ordinal + 1) << 40 ^ number;
    std::string report;
    switch (run(launch, seed, report)) {
    case Outcome::Done: return;
    case Outcome::BadAddress: return d.lose(ILLEGAL_ADDRESS, report);
    case Outcome::TookTooLong: return d.lose(LAUNCH_TIMEOUT, report);
    case Outcome::Failed: return d.lose(LAUNCH_FAILED, report);
    }
}

std::string text_report() {
    Device &d = device();
    std::string text;
    auto line = [&text](const char *key, uint64_t value) { text += std::string(key) + "=" + std::to_string(value) + "\n"; };
    line("allocations", d.memory.count());
    line("allocated_bytes", d.memory.used());
    line("streams", d.streams.count());
    line("events", d.events.count());
    line("modules", d.modules.count());
    line("graphs", d.graphs.count());
    line("executables", d.executables.count());
    std::lock_guard lock(d.mutex);
    uint64_t allocated = 0, registered = 0;
    for (auto &[_, p] : d.pinned) (p.allocated ? allocated : registered)++;
    line("page_locked", allocated);
    line("registered", registered);
    line("page_locked_bytes", d.pinned_bytes);
    line("contexts", (uint64_t)d.retained);
    line("leaked", d.leaked);
    line("launches", d.launches);
    line("lost", (uint64_t)d.lost);
    for (auto &[call, n] : d.calls) line(("calls." + call).c_str(), n);
    text += "report=" + d.report + "\n";
    return text;
}

struct AtExit {
    ~AtExit() {
        const char *path = std::getenv("HOIST_EMULATED_REPORT");
        if (!path) return;
        if (FILE *file = std::fopen(path, "w")) {
            std::fputs(text_report().c_str(), file);
            std::fclose(file);
        }
    }
} at_exit;

uint64_t word_at(const unsigned char *p, size_t n) {
    uint64_t x = 0;
    std::memcpy(&x, p, n);
    return x;
}

/// The length of an ELF image, from its header; 0 if it is none.
size_t elf_bytes(const unsigned char *image) {
    if (std::memcmp(image, "\x7f" "ELF", 4) != 0) return 0;
    uint64_t programs = word_at(image + 32, 8), sections = word_at(image + 40, 8);
    uint64_t program_end = programs + word_at(image + 54, 2) * word_at(image + 56, 2);
    uint64_t section_end = sections + word_at(image + 58, 2) * word_at(image + 60, 2);
    return std::max(program_end, section_end);
}

} // namespace
} // namespace emulator

using namespace emulator;

// ---- what tests ask beside the driver's calls ----

/// Replaces the settings; counts of calls and launches begin anew. 0 if they are settings.
CALL hoist_emulated_configure(const char *text) {
    Device &d = device();
    Settings fresh;
    if (!parse(text, fresh)) return INVALID_VALUE;
    std::lock_guard lock(d.mutex);
    d.settings = fresh;
    d.calls.clear();
    d.launches = 0;
    if (d.retained == 0) d.lost = 0, d.report.clear();
    return SUCCESS;
}

/// Forgets everything that is alive, and every fault: the device is new. No call may be under way.
CALL hoist_emulated_reset() {
    drain_all();
    Device &d = device();
    d.memory.clear();
    d.streams.clear(), d.events.clear(), d.modules.clear(), d.functions.clear(), d.graphs.clear(), d.executables.clear();
    std::lock_guard lock(d.mutex);
    d.pinned.clear();
    d.pinned_bytes = 0, d.retained = 0, d.leaked = 0, d.lost = 0;
    d.report.clear();
    return SUCCESS;
}

/// Writes what is alive now, what was called and what went wrong, as lines `key=value`; the bytes that all of it takes.
extern "C" __attribute__((visibility("default"))) size_t hoist_emulated_report(char *buffer, size_t bytes) {
    std::string text = text_report();
    if (bytes > 0) {
        size_t n = std::min(text.size(), bytes - 1);
        std::memcpy(buffer, text.data(), n);
        buffer[n] = 0;
    }
    return text.size() + 1;
}

// ---- the driver ----

CALL cuInit(unsigned flags) {
    ENTER(Nothing);
    if (flags != 0) return INVALID_VALUE;
    Device &d = device();
    std::lock_guard lock(d.mutex);
    if (d.settings.devices == 0) return NO_DEVICE;
    d.initialised = true;
    return SUCCESS;
}

CALL cuDriverGetVersion(int *version) {
    ENTER(Nothing);
    *version = device().settings.driver;
    return SUCCESS;
}

static const Name *name_of_code(int code) {
    for (const Name &n : NAMES)
        if (n.code == code) return &n;
    return nullptr;
}

CALL cuGetErrorName(int code, const char **text) {
    const Name *n = name_of_code(code);
    *text = n ? n->name : nullptr;
    return n ? SUCCESS : INVALID_VALUE;
}

CALL cuGetErrorString(int code, const char **text) {
    const Name *n = name_of_code(code);
    *text = n ? n->text : nullptr;
    return n ? SUCCESS : INVALID_VALUE;
}

CALL cuDeviceGetCount(int *count) {
    ENTER(Driver);
    *count = device().settings.devices;
    return SUCCESS;
}

CALL cuDeviceGet(int *handle, int ordinal) {
    ENTER(Driver);
    if (ordinal < 0 || ordinal >= device().settings.devices) return INVALID_DEVICE;
    *handle = ordinal;
    return SUCCESS;
}

CALL cuDeviceGetName(char *text, int bytes, int) {
    ENTER(Driver);
    if (bytes <= 0) return INVALID_VALUE;
    std::snprintf(text, (size_t)bytes, "emulated device");
    return SUCCESS;
}

CALL cuDeviceGetPCIBusId(char *text, int bytes, int handle) {
    ENTER(Driver);
    if (bytes <= 0) return INVALID_VALUE;
    std::snprintf(text, (size_t)bytes, "0000:00:%02x.0", handle);
    return SUCCESS;
}

CALL cuDeviceTotalMem_v2(size_t *bytes, int) {
    ENTER(Driver);
    *bytes = device().settings.memory;
    return SUCCESS;
}

CALL cuDeviceGetAttribute(int *value, int attribute, int) {
    ENTER(Driver);
    const Settings &s = device().settings;
    switch (attribute) {
    case 1: *value = MAX_THREADS; return SUCCESS;
    case 8: *value = SHARED_DEFAULT; return SUCCESS;
    case 10: *value = 32; return SUCCESS;
    case 16: *value = s.multiprocessors; return SUCCESS;
    case 39: *value = MULTIPROCESSOR_THREADS; return SUCCESS;
    case 75: *value = s.major; return SUCCESS;
    case 76: *value = s.minor; return SUCCESS;
    case 81: *value = SHARED_MULTIPROCESSOR; return SUCCESS;
    case 95: *value = 1; return SUCCESS;
    case 97: *value = SHARED_OPTIN; return SUCCESS;
    default:
        std::fprintf(stderr, "emulated device: attribute %d is not known here\n", attribute);
        return INVALID_VALUE;
    }
}

CALL cuDevicePrimaryCtxSetFlags_v2(int, unsigned) {
    ENTER(Driver);
    return SUCCESS;
}

CALL cuDevicePrimaryCtxRetain(void **context, int handle) {
    ENTER(Driver);
    Device &d = device();
    std::lock_guard lock(d.mutex);
    if (handle < 0 || handle >= d.settings.devices) return INVALID_DEVICE;
    if (d.settings.memory < Device::CONTEXT_BYTES) return OUT_OF_MEMORY;
    d.retained++;
    *context = &context_handle;
    return SUCCESS;
}

CALL cuDevicePrimaryCtxRelease_v2(int) {
    ENTER(Driver);
    Device &d = device();
    {
        std::lock_guard lock(d.mutex);
        if (d.retained == 0) return INVALID_CONTEXT;
        if (--d.retained > 0) return SUCCESS;
    }
    // The context goes, and all that was made in it.
    drain_all();
    size_t left = d.memory.count() + d.streams.count() + d.events.count() + d.modules.count() + d.executables.count() + d.graphs.count();
    d.memory.clear();
    for (auto &s : d.streams.all()) {
        std::lock_guard lock(s->mutex);
        s->closing = true;
        s->changed.notify_all();
    }
    d.streams.clear(), d.events.clear(), d.modules.clear(), d.functions.clear(), d.graphs.clear(), d.executables.clear();
    std::lock_guard lock(d.mutex);
    d.leaked += left + d.pinned.size();
    d.lost = 0;
    return SUCCESS;
}

CALL cuCtxSetCurrent(void *context) {
    ENTER(Driver);
    if (context && context != &context_handle) return INVALID_CONTEXT;
    current_context = context;
    return SUCCESS;
}

CALL cuCtxSynchronize() {
    ENTER(Context);
    // Whoever records on a stream of the context: waiting for all of it spoils the recording.
    bool any = false;
    for (auto &s : device().streams.all()) {
        std::lock_guard lock(s->mutex);
        if (s->capturing) s->spoiled = any = true;
    }
    if (any) return STREAM_CAPTURE_UNSUPPORTED;
    drain_all();
    return device().lost;
}

CALL cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    ENTER(Context);
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return SUCCESS;
}

// ---- memory ----

CALL cuMemGetInfo_v2(size_t *free, size_t *total) {
    ENTER(Context);
    Device &d = device();
    uint64_t used = Device::CONTEXT_BYTES + d.memory.used();
    *total = d.settings.memory;
    *free = d.settings.memory > used ? d.settings.memory - used : 0;
    return SUCCESS;
}

CALL cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    ENTER(Context);
    NOT_WHILE_RECORDING();
    if (bytes == 0) return INVALID_VALUE;
    Device &d = device();
    static std::mutex one_at_a_time;
    std::lock_guard lock(one_at_a_time);
    uint64_t used = Device::CONTEXT_BYTES + d.memory.used();
    if (used > d.settings.memory || bytes > d.settings.memory - used || Memory::rounded(bytes) > d.settings.memory - used) return OUT_OF_MEMORY;
    static const unsigned char patterns[] = {0xff, 0xa5, 0x7f, 0x01};
    Random random{d.settings.seed ^ d.memory.count()};
    *address = d.memory.allocate(bytes, patterns[random.below(4)]);
    return *address ? SUCCESS : OUT_OF_MEMORY;
}

CALL cuMemFree_v2(uint64_t address) {
    int code = enter(__func__, Context);
    if (code != SUCCESS && !device().lost) return code;
    NOT_WHILE_RECORDING();
    if (address == 0) return code;
    drain_all();
    if (!device().memory.free(address)) return INVALID_VALUE;
    return device().lost;
}

static int lock_pages(uintptr_t at, size_t bytes, bool allocated, size_t mapped) {
    Device &d = device();
    std::lock_guard lock(d.mutex);
    if (bytes > d.settings.pinned || d.pinned_bytes > d.settings.pinned - bytes) return OUT_OF_MEMORY;
    auto next = d.pinned.lower_bound(at);
    if (next != d.pinned.end() && next->first < at + bytes) return HOST_MEMORY_ALREADY_REGISTERED;
    if (next != d.pinned.begin() && std::prev(next)->first + std::prev(next)->second.bytes > at) return HOST_MEMORY_ALREADY_REGISTERED;
    d.pinned[at] = {bytes, allocated, mapped};
    d.pinned_bytes += bytes;
    return SUCCESS;
}

static int unlock_pages(uintptr_t at, bool allocated) {
    drain_all();
    Device &d = device();
    std::lock_guard lock(d.mutex);
    auto found = d.pinned.find(at);
    if (found == d.pinned.end() || found->second.allocated != allocated) return allocated ? INVALID_VALUE : HOST_MEMORY_NOT_REGISTERED;
    d.pinned_bytes -= found->second.bytes;
    if (allocated) munmap((void *)(at & ~(uintptr_t)4095), found->second.mapped);
    d.pinned.erase(found);
    return SUCCESS;
}

CALL cuMemHostAlloc(void **address, size_t bytes, unsigned) {
    ENTER(Context);
    NOT_WHILE_RECORDING();
    if (bytes == 0) return INVALID_VALUE;
    if (bytes > 1ull << 46) return OUT_OF_MEMORY;
    size_t pages = (bytes + 4095) / 4096 * 4096;
    void *map = mmap(nullptr, pages + 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return OUT_OF_MEMORY;
    mprotect(map, pages, PROT_READ | PROT_WRITE);
    if (int code = lock_pages((uintptr_t)map, bytes, true, pages + 4096)) {
        munmap(map, pages + 4096);
        return code;
    }
    std::memset(map, 0xa5, bytes);
    *address = map;
    return SUCCESS;
}

CALL cuMemFreeHost(void *address) {
    int code = enter(__func__, Context);
    if (code != SUCCESS && !device().lost) return code;
    if (int failed = unlock_pages((uintptr_t)address, true)) return failed;
    return device().lost;
}

CALL cuMemHostRegister_v2(void *address, size_t bytes, unsigned) {
    ENTER(Context);
    NOT_WHILE_RECORDING();
    if (bytes == 0) return INVALID_VALUE;
    return lock_pages((uintptr_t)address, bytes, false, 0);
}

CALL cuMemHostUnregister(void *address) {
    int code = enter(__func__, Context);
    if (code != SUCCESS && !device().lost) return code;
    if (int failed = unlock_pages((uintptr_t)address, false)) return failed;
    return device().lost;
}

CALL cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *handle) {
    ENTER(Context);
    auto s = stream_of(handle);
    if (!s) return INVALID_HANDLE;
    if (!device().memory.holds(to, bytes)) return outside("cuMemcpyHtoDAsync", to, bytes);
    auto copy = [to, bytes](const void *bytes_now) {
        if (device().lost) return;
        if (!device().memory.holds(to, bytes)) return (void)outside("cuMemcpyHtoDAsync", to, bytes);
        std::memcpy((void *)to, bytes_now, bytes);
    };
    // Pageable memory has been read when the call returns; page-locked memory is read when the copy's turn comes.
    if (!records(s) && !is_pinned(from, bytes)) {
        auto kept = std::make_shared<std::vector<unsigned char>>((const unsigned char *)from, (const unsigned char *)from + bytes);
        return enqueue(s, [copy, kept] { copy(kept->data()); });
    }
    return enqueue(s, [copy, from] { copy(from); });
}

CALL cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *handle) {
    ENTER(Context);
    auto s = stream_of(handle);
    if (!s) return INVALID_HANDLE;
    if (!device().memory.holds(from, bytes)) return outside("cuMemcpyDtoHAsync", from, bytes);
    bool recorded = records(s), pinned = is_pinned(to, bytes);
    int code = enqueue(s, [to, from, bytes] {
        if (device().lost) return;
        if (!device().memory.holds(from, bytes)) return (void)outside("cuMemcpyDtoHAsync", from, bytes);
        std::memcpy(to, (const void *)from, bytes);
    });
    if (code != SUCCESS || recorded || pinned) return code;
    // Pageable memory is written when the call returns.
    drain(*s);
    return device().lost;
}

CALL cuMemsetD8Async(uint64_t to, unsigned char byte, size_t bytes, void *handle) {
    ENTER(Context);
    auto s = stream_of(handle);
    if (!s) return INVALID_HANDLE;
    if (!device().memory.holds(to, bytes)) return outside("cuMemsetD8Async", to, bytes);
    return enqueue(s, [=] {
        if (device().lost) return;
        if (!device().memory.holds(to, bytes)) return (void)outside("cuMemsetD8Async", to, bytes);
        std::memset((void *)to, byte, bytes);
    });
}

CALL cuMemsetD32Async(uint64_t to, unsigned word, size_t count, void *handle) {
    ENTER(Context);
    auto s = stream_of(handle);
    if (!s) return INVALID_HANDLE;
    if (to % 4 != 0) return INVALID_VALUE;
    if (count > 1ull << 46 || !device().memory.holds(to, count * 4)) return outside("cuMemsetD32Async", to, count * 4);
    return enqueue(s, [=] {
        if (device().lost) return;
        if (!device().memory.holds(to, count * 4)) return (void)outside("cuMemsetD32Async", to, count * 4);
        std::fill_n((unsigned *)to, count, word);
    });
}

// ---- streams and events ----

CALL cuStreamCreateWithPriority(void **handle, unsigned, int) {
    ENTER(Context);
    Device &d = device();
    auto s = std::make_shared<Stream>();
    {
        std::lock_guard lock(d.mutex);
        s->ordinal = ++d.streams_made;
    }
    s->random = Random{d.settings.seed ^ (uint64_t)s->ordinal << 32};
    *handle = d.streams.add(s);
    return SUCCESS;
}

CALL cuStreamDestroy_v2(void *handle) {
    int code = enter(__func__, Context);
    if (code != SUCCESS && !device().lost) return code;
    Device &d = device();
    auto s = d.streams.take(handle);
    if (!s) return INVALID_HANDLE;
    std::lock_guard all(d.mutex);
    std::lock_guard lock(s->mutex);
    s->closing = true;
    if (s->started) d.draining.push_back(s);
    s->changed.notify_all();
    return d.lost;
}

CALL cuStreamSynchronize(void *handle) {
    ENTER(Context);
    auto s = stream_of(handle);
    if (!s) return INVALID_HANDLE;
    if (records(s)) return refuse_while_recording(), STREAM_CAPTURE_UNSUPPORTED;
    drain(*s);
    return device().lost;
}

CALL cuStreamQuery(void *handle) {
    ENTER(Context);
    auto s = stream_of(handle);
    if (!s) return INVALID_HANDLE;
    std::lock_guard lock(s->mutex);
    return s->completed == s->enqueued ? SUCCESS : NOT_READY;
}

CALL cuEventCreate(void **handle, unsigned flags) {
    ENTER(Context);
    auto e = std::make_shared<Event>();
    e->timed = (flags & 2) == 0;
    *handle = device().events.add(e);
    return SUCCESS;
}

CALL cuEventDestroy_v2(void *handle) {
    int code = enter(__func__, Context);
    if (code != SUCCESS && !device().lost) return code;
    return device().events.take(handle) ? device().lost.load() : INVALID_HANDLE;
}

CALL cuEventRecord(void *handle, void *stream) {
    ENTER(Context);
    auto e = device().events.find(handle);
    auto s = stream_of(stream);
    if (!e || !s) return INVALID_HANDLE;
    if (records(s)) return refuse_while_recording(), STREAM_CAPTURE_UNSUPPORTED;
    uint64_t number;
    {
        std::lock_guard lock(e->mutex);
        number = ++e->recorded;
    }
    return enqueue(s, [e, number] {
        std::lock_guard lock(e->mutex);
        e->passed = std::max(e->passed, number);
        e->when = std::chrono::steady_clock::now();
        e->changed.notify_all();
    });
}

CALL cuEventSynchronize(void *handle) {
    ENTER(Context);
    auto e = device().events.find(handle);
    if (!e) return INVALID_HANDLE;
    std::unique_lock lock(e->mutex);
    uint64_t until = e->recorded;
    e->changed.wait(lock, [&] { return e->passed >= until; });
    return device().lost;
}

CALL cuEventElapsedTime_v2(float *milliseconds, void *start, void *end) {
    ENTER(Context);
    auto a = device().events.find(start), b = device().events.find(end);
    if (!a || !b || !a->timed || !b->timed) return INVALID_HANDLE;
    std::scoped_lock lock(a->mutex, b->mutex);
    if (a->recorded == 0 || b->recorded == 0) return INVALID_HANDLE;
    if (a->passed < a->recorded || b->passed < b->recorded) return NOT_READY;
    *milliseconds = std::chrono::duration<float, std::milli>(b->when - a->when).count();
    return SUCCESS;
}

// ---- kernels ----

CALL cuModuleLoadData(void **handle, const void *image) {
    ENTER(Context);
    NOT_WHILE_RECORDING();
    const Settings &s = device().settings;
    auto m = std::make_shared<Module>();
    auto bytes = static_cast<const unsigned char *>(image);
    if (size_t n = elf_bytes(bytes)) {
        m->image.assign((const char *)bytes, n), m->is_ptx = false;
        // What is committed is for one capability only.
        if (s.major != 9 || s.minor != 0) return NO_BINARY_FOR_GPU;
    } else {
        m->image = (const char *)image, m->is_ptx = true;
        size_t target = m->image.find("\n.target sm_");
        if (target == std::string::npos) return INVALID_IMAGE;
        int needed = std::atoi(m->image.c_str() + target + 12);
        if (needed > s.major * 10 + s.minor) return NO_BINARY_FOR_GPU;
    }
    *handle = device().modules.add(m);
    return SUCCESS;
}

CALL cuModuleUnload(void *handle) {
    int code = enter(__func__, Context);
    if (code != SUCCESS && !device().lost) return code;
    auto m = device().modules.take(handle);
    if (!m) return INVALID_HANDLE;
    for (Function *f : m->functions) device().functions.take(f);
    return device().lost;
}

CALL cuModuleGetFunction(void **handle, void *module, const char *name) {
    ENTER(Context);
    auto m = device().modules.find(module);
    if (!m) return INVALID_HANDLE;
    // The image must have it too: what is committed may be older than the sources that were compiled here.
    std::string mark = m->is_ptx ? std::string(".entry ") + name + "(" : std::string(".text.") + name + '\0';
    if (m->image.find(mark) == std::string::npos) return NOT_FOUND;
    for (const Kernel &k : kernels()) {
        if (std::strcmp(k.name, name) != 0) continue;
        auto f = std::make_shared<Function>();
        f->module = m.get(), f->kernel = &k;
        m->functions.push_back(f.get());
        *handle = device().functions.add(f);
        return SUCCESS;
    }
    return NOT_FOUND;
}

CALL cuFuncSetAttribute(void *handle, int attribute, int value) {
    ENTER(Context);
    auto f = device().functions.find(handle);
    if (!f) return INVALID_HANDLE;
    // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    if (attribute != 8 || value < 0 || (unsigned)value > SHARED_OPTIN) return INVALID_VALUE;
    f->allowed_shared = std::max((unsigned)value, SHARED_DEFAULT);
    return SUCCESS;
}

CALL cuFuncGetAttribute(int *value, int attribute, void *handle) {
    ENTER(Context);
    auto f = device().functions.find(handle);
    if (!f) return INVALID_HANDLE;
    switch (attribute) {
    case 0: *value = (int)(f->kernel->max_threads ? f->kernel->max_threads : MAX_THREADS); return SUCCESS;
    case 8: *value = (int)f->allowed_shared; return SUCCESS;
    default: return INVALID_VALUE;
    }
}

static unsigned blocks_at_once(const Function &f, unsigned threads, size_t shared) {
    unsigned most = f.kernel->max_threads ? f.kernel->max_threads : MAX_THREADS;
    if (threads == 0 || threads > most || shared > f.allowed_shared) return 0;
    // A kilobyte of each block's shared memory is the system's.
    return (unsigned)std::min<size_t>({MULTIPROCESSOR_THREADS / ((threads + 31) / 32 * 32), SHARED_MULTIPROCESSOR / (shared + 1024), 32});
}

CALL cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *handle, int threads, size_t shared) {
    ENTER(Context);
    auto f = device().functions.find(handle);
    if (!f) return INVALID_HANDLE;
    if (threads <= 0) return INVALID_VALUE;
    *blocks = (int)blocks_at_once(*f, (unsigned)threads, shared);
    return SUCCESS;
}

struct Attribute {
    unsigned id;
    char pad[4];
    union {
        char value[64];
        int number;
        uint64_t word;
    };
};

struct Config {
    unsigned grid[3], block[3], shared;
    void *stream;
    const Attribute *attributes;
    unsigned count;
};

CALL cuLaunchKernelEx(const Config *config, void *handle, void **arguments, void **extra) {
    ENTER(Context);
    Device &d = device();
    auto f = d.functions.find(handle);
    auto s = stream_of(config->stream);
    if (!f || !s) return INVALID_HANDLE;
    auto launch = std::make_shared<Launch>();
    launch->kernel = f->kernel;
    launch->grid = {config->grid[0], config->grid[1], config->grid[2]};
    launch->block = {config->block[0], config->block[1], config->block[2]};
    launch->shared = config->shared;
    launch->cooperative = false;
    for (unsigned i = 0; i < config->count; i++) {
        const Attribute &a = config->attributes[i];
        if (a.id == 2) launch->cooperative = a.number != 0;
        // Programmatic serialisation only lets a kernel begin earlier.
        if (a.id != 2 && a.id != 6) return NOT_SUPPORTED;
    }
    uint64_t threads = (uint64_t)config->block[0] * config->block[1] * config->block[2];
    bool fits = config->grid[0] > 0 && config->grid[0] < 1u << 31 && config->grid[1] > 0 && config->grid[1] < 1u << 16 &&
                config->grid[2] > 0 && config->grid[2] < 1u << 16 && threads > 0 && threads <= MAX_THREADS;
    if (!fits || extra || !arguments || config->shared > f->allowed_shared) return INVALID_VALUE;
    if (f->kernel->max_threads && threads > f->kernel->max_threads) return LAUNCH_OUT_OF_RESOURCES;
    uint64_t blocks = (uint64_t)config->grid[0] * config->grid[1] * config->grid[2];
    if (launch->cooperative &&
        blocks > (uint64_t)blocks_at_once(*f, (unsigned)threads, config->shared) * (unsigned)d.settings.multiprocessors)
        return COOPERATIVE_LAUNCH_TOO_LARGE;
    for (size_t i = 0; i < f->kernel->arguments.size(); i++) {
        auto bytes = static_cast<const unsigned char *>(arguments[i]);
        launch->arguments.emplace_back(bytes, bytes + f->kernel->arguments[i]);
    }
    return enqueue(s, [launch, s = s.get()] { execute(*launch, s->ordinal, s->launches++); });
}

// ---- recordings ----

CALL cuStreamBeginCapture_v2(void *handle, int) {
    ENTER(Context);
    auto s = stream_of(handle);
    if (!s || !handle) return INVALID_HANDLE;
    std::lock_guard lock(s->mutex);
    if (s->capturing) return INVALID_VALUE;
    s->capturing = true, s->spoiled = false, s->recorder = std::this_thread::get_id();
    s->captured.clear();
    return SUCCESS;
}

CALL cuStreamEndCapture(void *handle, void **graph) {
    int code = enter(__func__, Context);
    *graph = nullptr;
    auto s = stream_of(handle);
    if (!s) return code ? code : INVALID_HANDLE;
    std::lock_guard lock(s->mutex);
    if (!s->capturing || s->recorder != std::this_thread::get_id()) return code ? code : STREAM_CAPTURE_UNMATCHED;
    // It ends even where it fails.
    s->capturing = false;
    if (code) return code;
    if (s->spoiled) return STREAM_CAPTURE_INVALIDATED;
    auto g = std::make_shared<Graph>();
    g->work = std::move(s->captured);
    s->captured.clear();
    *graph = device().graphs.add(g);
    return SUCCESS;
}

CALL cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long) {
    ENTER(Context);
    auto g = device().graphs.find(graph);
    if (!g) return INVALID_HANDLE;
    *executable = device().executables.add(std::make_shared<Graph>(*g));
    return SUCCESS;
}

CALL cuGraphUpload(void *executable, void *stream) {
    ENTER(Context);
    return device().executables.find(executable) && stream_of(stream) ? SUCCESS : INVALID_HANDLE;
}

CALL cuGraphLaunch(void *executable, void *stream) {
    ENTER(Context);
    auto g = device().executables.find(executable);
    auto s = stream_of(stream);
    if (!g || !s) return INVALID_HANDLE;
    return enqueue(s, [g] {
        for (const Work &work : g->work) work();
    });
}

CALL cuGraphDestroy(void *graph) {
    int code = enter(__func__, Context);
    if (code != SUCCESS && !device().lost) return code;
    return device().graphs.take(graph) ? device().lost.load() : INVALID_HANDLE;
}

CALL cuGraphExecDestroy(void *executable) {
    int code = enter(__func__, Context);
    if (code != SUCCESS && !device().lost) return code;
    return device().executables.take(executable) ? device().lost.load() : INVALID_HANDLE;
}
