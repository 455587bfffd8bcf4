// A CUDA driver and NVRTC for machines without a GPU: one library that exports both APIs, as far as gf_cuda uses them.
//
// NVRTC compiles CUDA C with g++ behind shim.hpp; the "cubin" is a shared library, and "PTX" is the source, which the
// driver compiles when it loads it. Launches run at once, in the calling thread, one after another. It is as strict as
// a GPU or stricter where that shows mistakes: fresh and shared memory hold NaN, threads take turns in changing order,
// and it is an error if not all threads of a block reach a barrier, if an address is none, is not a multiple of what is
// read from it, or lies outside the array that is indexed.
//
// The environment, read at each call:
//   GF_CUDA_EMULATED_DEVICES    number of GPUs; 1
//   GF_CUDA_EMULATED_ARCH       sm_53
//   GF_CUDA_EMULATED_REGISTERS  registers that each kernel claims to need; 32
//   GF_CUDA_EMULATED_NAME       name of the GPU
//   GF_CUDA_EMULATED_NVRTC      its version: 11 (11.8), or 10 (10.2; that one also lacks symbols, see __init__.py)
//   GF_CUDA_FAULT               as the argument of gf_cuda_fault, when the library is loaded
#include <dlfcn.h>
#include <elf.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
typedef int CUresult;
typedef unsigned long long CUdeviceptr;

namespace {

// ---- The GPU: a Jetson Nano's limits -----------------------------------------------------------------------------
const int kThreads = 1024, kRegisters = 32768, kSharedBytes = 49152, kWarp = 32, kLargestGridYZ = 65535;
const size_t kMemory = size_t(4) << 30;

int setting(const char* name, int otherwise) {
  const char* text = getenv(name);
  return text && *text ? atoi(text) : otherwise;
}
int arch() {
  const char* text = getenv("GF_CUDA_EMULATED_ARCH");
  return text && strncmp(text, "sm_", 3) == 0 ? atoi(text + 3) : 53;
}
int registers() { return setting("GF_CUDA_EMULATED_REGISTERS", 32); }
int threads_by_registers() { return std::min(kThreads, kRegisters / std::max(registers(), 1) / kWarp * kWarp); }

// ---- Errors, faults, the record of calls --------------------------------------------------------------------------
struct Error { int code; const char *name, *text; };
const Error kErrors[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {702, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {803, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "system has unsupported display driver / cuda driver combination"},
};
bool is_sticky(int code) { return code == 214 || code == 700 || code == 702 || (code >= 714 && code <= 719) || code == 710; }

std::recursive_mutex lock;
typedef std::lock_guard<std::recursive_mutex> Guard;

struct Fault { std::string call; int number, code; };
std::vector<Fault> faults;
int lost = 0;  // the sticky error of the context
bool initialised = false;
std::vector<const char*> record;
const size_t kLongestRecord = 100000;

void set_faults(const char* text) {
  faults.clear();
  lost = 0;
  std::stringstream list(text ? text : "");
  for (std::string item; std::getline(list, item, ',');) {
    std::stringstream fields(item);
    std::string call, number, code;
    std::getline(fields, call, ':');
    std::getline(fields, number, ':');
    std::getline(fields, code, ':');
    faults.push_back({call, std::max(atoi(number.c_str()), 1), atoi(code.c_str())});
  }
}

// Records the call and returns what it must fail with.
CUresult entered(const char* call) {
  static bool first = true;
  if (first) set_faults(getenv("GF_CUDA_FAULT"));
  first = false;
  if (record.size() < kLongestRecord) record.push_back(call);
  int code = 0;
  for (Fault& fault : faults)
    if (fault.call == call && --fault.number == 0) code = fault.code;
  if (is_sticky(code)) lost = code;
  return code ? code : lost;
}
int fail(int code) {
  if (is_sticky(code)) lost = code;
  return code;
}

// ---- Handles ------------------------------------------------------------------------------------------------------
struct Context { int device; };
Context contexts[8];
thread_local Context* current = nullptr;

struct Event { bool recorded; timespec when; };
struct Kernel {
  const char* name;
  void (*call)(void**);
  int bound;
};
struct Module;
struct Function { Module* module; Kernel kernel; int shared_bytes; };
struct Index {
  unsigned x, y, z;
};
struct Module {
  void* library;
  std::map<std::string, std::unique_ptr<Function>> functions;
  char *shared = nullptr, *shared_end = nullptr;
  // Variables of shim.hpp.
  Index *thread_index, *block_index, *block_size, *grid_size;
  void** dynamic_shared;
};
std::set<void*> streams, events, modules;
std::map<char*, size_t> memory;
size_t memory_used = 0;

bool is_stream(void* stream) { return (size_t)stream <= 2 || streams.count(stream); }

#define ENTER(call)                                     \
  Guard guard(lock);                                    \
  if (CUresult code = entered(call)) return code;
#define ENTER_INITIALISED(call)                         \
  ENTER(call)                                           \
  if (!initialised) return 3;
#define ENTER_CONTEXT(call)                             \
  ENTER_INITIALISED(call)                               \
  if (!current) return 201;

// ---- Compiling ----------------------------------------------------------------------------------------------------
std::string own_folder() {
  Dl_info info;
  dladdr((void*)&own_folder, &info);
  std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/'));
}

std::string read_file(const std::string& path) {
  std::string text;
  if (FILE* file = fopen(path.c_str(), "rb")) {
    char buffer[65536];
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, file)) > 0;) text.append(buffer, n);
    fclose(file);
  }
  return text;
}

void write_file(const std::string& path, const std::string& text) {
  if (FILE* file = fopen(path.c_str(), "wb")) {
    fwrite(text.data(), 1, text.size(), file);
    fclose(file);
  }
}

bool is_word(char c) { return isalnum((unsigned char)c) || c == '_'; }

// "extern __shared__ type name[];" as a pointer to what the launch brings.
std::string with_dynamic_shared(std::string source) {
  for (size_t at; (at = source.find("extern __shared__")) != std::string::npos;) {
    size_t begin = at + strlen("extern __shared__"), end = source.find(';', at), bracket = source.rfind('[', end);
    if (end == std::string::npos || bracket == std::string::npos || bracket < begin) break;
    std::string declared = source.substr(begin, bracket - begin);
    size_t align = declared.find("align");
    if (align != std::string::npos) {
      size_t from = declared.find_last_of(" ", align), to = declared.find(')', align);
      declared.erase(from + 1, to - from);
    }
    while (isspace((unsigned char)declared.back())) declared.pop_back();
    size_t name = declared.size();
    while (name > 0 && is_word(declared[name - 1])) --name;
    std::string type = declared.substr(0, name);
    source.replace(at, end - at, type + "* " + declared.substr(name) + " = (" + type + "*)gf_cuda_dynamic_shared");
  }
  return source;
}

// The names of the kernels and their launch bounds, found in the text: "__global__ ... name(".
std::map<std::string, int> kernels_of(const std::string& source) {
  std::map<std::string, int> found;
  const std::string mark = "__global__", bounds = "__launch_bounds__";
  for (size_t at = 0; (at = source.find(mark, at)) != std::string::npos;) {
    at += mark.size();
    int bound = kThreads;
    for (size_t open = at; (open = source.find('(', open)) != std::string::npos; ++open) {
      size_t end = open;
      while (end > at && isspace((unsigned char)source[end - 1])) --end;
      size_t begin = end;
      while (begin > at && is_word(source[begin - 1])) --begin;
      std::string word = source.substr(begin, end - begin);
      if (word == bounds) {
        bound = atoi(source.c_str() + open + 1);
      } else {
        found[word] = bound;
        break;
      }
    }
  }
  return found;
}

// The image of CUDA C; "" if it does not compile. The log is g++'s.
std::string compile(const std::string& source, const std::string& name, int number, std::string* log) {
  unsigned long long hash[2] = {14695981039346656037ull, 1099511628211ull};
  for (char c : name + '\0' + std::to_string(number) + '\0' + source)
    for (int i = 0; i < 2; ++i) hash[i] = (hash[i] ^ (unsigned char)(c + i)) * 1099511628211ull;
  char key[40];
  snprintf(key, sizeof key, "%016llx%016llx", hash[0], hash[1]);
  std::string folder = own_folder(), kept = folder + "/" + key + ".image", image = read_file(kept);
  if (!image.empty()) return image;

  std::ostringstream text;
  text << "#include \"" << folder << "/shim.hpp\"\n#define __CUDA_ARCH__ " << number * 10
       << "\n#line 1 \"" << name << "\"\n" << with_dynamic_shared(source)
       << "\n#line 1 \"emulated.cpp\"\nextern \"C\" const int gf_cuda_arch = " << number
       << ";\nextern \"C\" const gf_cuda_kernel gf_cuda_kernels[] = {\n";
  for (auto& kernel : kernels_of(source))
    text << "{\"" << kernel.first << "\", [](void** p) { gf_cuda_call(&" << kernel.first << ", p); }, " << kernel.second
         << "},\n";
  text << "{nullptr, nullptr, 0}};\n";

  std::string work = folder + "/work_XXXXXX";
  if (!mkdtemp(&work[0])) {
    *log = "error: cannot write to " + folder;
    return "";
  }
  write_file(work + "/kernel.cpp", text.str());
  // Kernels read float as float4. The checks end in an illegal instruction, which the launch catches.
  std::string command = "g++ -std=c++14 -O1 -fPIC -shared -fno-strict-aliasing -w -fmax-errors=20 "
                        "-fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error -o '" + work +
                        "/kernel.so' '" + work + "/kernel.cpp' > '" + work + "/log' 2>&1 < /dev/null";
  int status = system(command.c_str());
  *log = read_file(work + "/log");
  if (status == 0) {
    image = read_file(work + "/kernel.so");
    rename((work + "/kernel.so").c_str(), kept.c_str());
  } else if (log->empty()) {
    *log = "error: g++ failed";
  }
  for (const char* file : {"/kernel.cpp", "/kernel.so", "/log"}) unlink((work + file).c_str());
  rmdir(work.c_str());
  return image;
}

const char kPtx[] = "//\n// Emulated PTX: the source\n//\n.version 6.5\n.target sm_";

// ---- Running a block: threads are fibers ---------------------------------------------------------------------------
const size_t kStack = 256 * 1024;
struct Fiber {
  ucontext_t start;
  jmp_buf at;
  int line = 0;  // of the barrier at which it waits; 0: it has finished
  Fiber();
};

jmp_buf scheduler;
Fiber* running = nullptr;
void (*entry)(void**) = nullptr;
void** entry_parameters = nullptr;
std::vector<Fiber*> idle;

void fiber_main() {
  for (;;) {
    entry(entry_parameters);
    running->line = 0;
    if (!_setjmp(running->at)) _longjmp(scheduler, 1);
  }
}

// Starts suspended: the first switch to it enters the loop above.
Fiber::Fiber() {
  char* stack = (char*)mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
  mprotect(stack, 4096, PROT_NONE);
  getcontext(&start);
  start.uc_stack.ss_sp = stack;
  start.uc_stack.ss_size = kStack;
  start.uc_link = nullptr;
  makecontext(&start, fiber_main, 0);
}

void barrier(int line) {
  running->line = line;
  if (!_setjmp(running->at)) _longjmp(scheduler, 1);
}

void resume(Fiber* fiber, bool fresh) {
  running = fiber;
  if (_setjmp(scheduler)) return;
  if (fresh) setcontext(&fiber->start);
  _longjmp(fiber->at, 1);
}

// A kernel's bad address ends its thread, and with it the launch.
const int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
thread_local bool launching = false;
int trapped = 0;
struct sigaction handlers_before[4];

void trap(int number) {
  if (launching) {
    trapped = number;
    _longjmp(scheduler, 1);
  }
  // Another thread's own mistake.
  for (int i = 0; i < 4; ++i)
    if (kSignals[i] == number) sigaction(number, &handlers_before[i], nullptr);
  raise(number);
}

struct Traps {
  Traps() {
    struct sigaction action = {};
    action.sa_handler = trap;
    action.sa_flags = SA_NODEFER;  // it is left by a jump
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &handlers_before[i]);
    trapped = 0;
    launching = true;
  }
  ~Traps() {
    launching = false;
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &handlers_before[i], nullptr);
  }
};

// All threads of one block. The error code if they do not all reach the same barriers, or one fails.
CUresult run_block(const Index& block, Index* thread_index) {
  int count = block.x * block.y * block.z;
  std::vector<Fiber*> fibers(count, nullptr);
  bool agree = true;
  for (int round = 0;; ++round) {
    int waiting = 0, line = 0;
    for (int i = 0; i < count; ++i) {
      // A thread that reads what it should first wait for finds it only in one of the two orders.
      int thread = round % 2 ? count - 1 - i : i;
      Fiber* fiber = fibers[thread];
      bool fresh = false;
      if (round == 0) {
        fresh = idle.empty();
        fiber = fresh ? new Fiber : idle.back();
        if (!fresh) idle.pop_back();
        fibers[thread] = fiber;
      }
      if (!fiber) continue;
      *thread_index = {thread % block.x, thread / block.x % block.y, thread / (block.x * block.y)};
      resume(fiber, fresh);
      if (trapped) {
        fprintf(stderr, "emulated CUDA: thread (%u, %u, %u) fails by %s\n", thread_index->x, thread_index->y,
                thread_index->z, strsignal(trapped));
        return trapped == SIGILL ? 716 : 700;
      }
      if (fiber->line == 0) {
        idle.push_back(fiber);
        fibers[thread] = nullptr;
      } else {
        agree = agree && (line == 0 || line == fiber->line);
        line = fiber->line;
        ++waiting;
      }
    }
    // The fibers of a block that fails are lost; so is the context.
    if ((waiting != 0 && waiting != count) || !agree) {
      fprintf(stderr, "emulated CUDA: the threads do not meet at the same barriers\n");
      return 719;
    }
    if (waiting == 0) return 0;
  }
}

template <class T> T* variable(Module* module, const char* name) { return (T*)dlsym(module->library, name); }

// Sizes of a kernel's shared arrays, from the symbols of the image: "_ZZ6kernelE4name" in the section gf_shared.
void find_shared(Module* module, const std::string& image) {
  auto header = (const Elf64_Ehdr*)image.data();
  auto sections = (const Elf64_Shdr*)(image.data() + header->e_shoff);
  const char* names = image.data() + sections[header->e_shstrndx].sh_offset;
  Dl_info info;
  dladdr(variable<void>(module, "gf_cuda_kernels"), &info);
  for (int shared = 0; shared < header->e_shnum; ++shared) {
    if (strcmp(names + sections[shared].sh_name, "gf_shared") != 0) continue;
    module->shared = (char*)info.dli_fbase + sections[shared].sh_addr;
    module->shared_end = module->shared + sections[shared].sh_size;
    for (int table = 0; table < header->e_shnum; ++table) {
      if (sections[table].sh_type != SHT_SYMTAB) continue;
      auto symbols = (const Elf64_Sym*)(image.data() + sections[table].sh_offset);
      const char* texts = image.data() + sections[sections[table].sh_link].sh_offset;
      for (size_t i = 0; i < sections[table].sh_size / sizeof(Elf64_Sym); ++i) {
        if (symbols[i].st_shndx != shared) continue;
        for (auto& item : module->functions) {
          std::string prefix = "_ZZ" + std::to_string(item.first.size()) + item.first + "E";
          if (strncmp(texts + symbols[i].st_name, prefix.c_str(), prefix.size()) == 0)
            item.second->shared_bytes += (int)symbols[i].st_size;
        }
      }
    }
  }
}

CUresult load(const std::string& image, void** handle, std::string* log) {
  std::string library = image;
  if (image.compare(0, 4, "\x7f" "ELF") != 0) {
    if (image.compare(0, strlen(kPtx), kPtx) != 0) {
      *log = "ptxas application ptx input, line 1; fatal   : Missing .version directive at start of file\n";
      return 218;
    }
    int number = atoi(image.c_str() + strlen(kPtx));
    if (number > arch()) return 209;
    size_t source = image.find('\n', strlen(kPtx)) + 1;
    library = compile(image.substr(source), "kernels.ptx", arch(), log);
    if (library.empty()) return 218;
  }
  auto header = (const Elf64_Ehdr*)library.data();
  if (header->e_machine == 190) return 209;  // a real cubin
  std::string path = own_folder() + "/module_XXXXXX";
  int file = mkstemp(&path[0]);
  if (file < 0) return 200;
  close(file);
  write_file(path, library);
  void* opened = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  unlink(path.c_str());
  if (!opened) return 200;
  std::unique_ptr<Module> module(new Module{});
  module->library = opened;
  auto number = variable<const int>(module.get(), "gf_cuda_arch");
  if (!number || *number / 10 != arch() / 10 || *number > arch()) {
    dlclose(opened);
    return number ? 209 : 200;
  }
  for (auto kernel = variable<const Kernel>(module.get(), "gf_cuda_kernels"); kernel->name; ++kernel)
    module->functions[kernel->name].reset(new Function{module.get(), *kernel, 0});
  find_shared(module.get(), library);
  module->thread_index = variable<Index>(module.get(), "threadIdx");
  module->block_index = variable<Index>(module.get(), "blockIdx");
  module->block_size = variable<Index>(module.get(), "blockDim");
  module->grid_size = variable<Index>(module.get(), "gridDim");
  module->dynamic_shared = variable<void*>(module.get(), "gf_cuda_dynamic_shared");
  *variable<void (*)(int)>(module.get(), "gf_cuda_barrier") = barrier;
  *handle = module.get();
  modules.insert(module.release());
  return 0;
}

}  // namespace

// ---- Exports for the tests ----------------------------------------------------------------------------------------
EXPORT int gf_cuda_emulated() { return 1; }

// "call:n:code", comma-separated: the n-th call from now on of that function fails with that code. Other faults, and
// the error of a lost context, are forgotten.
EXPORT void gf_cuda_fault(const char* text) {
  Guard guard(lock);
  entered("");
  record.pop_back();
  set_faults(text);
}

// The names of the functions called since gf_cuda_forget_calls, one a line.
EXPORT const char* gf_cuda_calls() {
  Guard guard(lock);
  static thread_local std::string text;
  text.clear();
  for (auto& call : record) (text += call) += "\n";
  return text.c_str();
}
EXPORT void gf_cuda_forget_calls() {
  Guard guard(lock);
  record.clear();
}
// Bytes, modules, streams and events that were not given back.
EXPORT size_t gf_cuda_memory_used() { return memory_used; }
EXPORT size_t gf_cuda_handles() { return modules.size() + streams.size() + events.size(); }

// ---- The driver API -----------------------------------------------------------------------------------------------
EXPORT CUresult cuGetErrorName(int code, const char** text) {
  for (auto& error : kErrors)
    if (error.code == code) return *text = error.name, 0;
  return *text = nullptr, 1;
}
EXPORT CUresult cuGetErrorString(int code, const char** text) {
  for (auto& error : kErrors)
    if (error.code == code) return *text = error.text, 0;
  return *text = nullptr, 1;
}
EXPORT CUresult cuInit(unsigned) {
  ENTER("cuInit")
  initialised = true;
  return 0;
}
EXPORT CUresult cuDriverGetVersion(int* version) {
  ENTER("cuDriverGetVersion")
  *version = 10020;
  return 0;
}
EXPORT CUresult cuDeviceGetCount(int* count) {
  ENTER_INITIALISED("cuDeviceGetCount")
  *count = std::min(setting("GF_CUDA_EMULATED_DEVICES", 1), 8);
  return 0;
}
EXPORT CUresult cuDeviceGet(int* device, int ordinal) {
  ENTER_INITIALISED("cuDeviceGet")
  if (ordinal < 0 || ordinal >= setting("GF_CUDA_EMULATED_DEVICES", 1)) return 101;
  *device = ordinal;
  return 0;
}
EXPORT CUresult cuDeviceGetName(char* name, int size, int) {
  ENTER_INITIALISED("cuDeviceGetName")
  const char* chosen = getenv("GF_CUDA_EMULATED_NAME");
  snprintf(name, size, "%s", chosen && *chosen ? chosen : "Emulated Maxwell");
  return 0;
}
EXPORT CUresult cuDeviceGetAttribute(int* value, int attribute, int) {
  ENTER_INITIALISED("cuDeviceGetAttribute")
  switch (attribute) {
    case 1: *value = kThreads; break;
    case 2: case 3: *value = 1024; break;
    case 4: *value = 64; break;
    case 5: *value = 2147483647; break;
    case 6: case 7: *value = kLargestGridYZ; break;
    case 8: *value = kSharedBytes; break;
    case 10: *value = kWarp; break;
    case 12: *value = kRegisters; break;
    case 13: *value = 921600; break;
    case 16: *value = 1; break;
    case 33: *value = 0; break;  // PCI bus
    case 34: *value = 0; break;  // PCI device
    case 38: *value = 262144; break;
    case 50: *value = 0; break;  // PCI domain
    case 75: *value = arch() / 10; break;
    case 76: *value = arch() % 10; break;
    default: return 1;
  }
  return 0;
}
EXPORT CUresult cuDeviceTotalMem_v2(size_t* bytes, int) {
  ENTER_INITIALISED("cuDeviceTotalMem_v2")
  *bytes = kMemory;
  return 0;
}
EXPORT CUresult cuDeviceGetPCIBusId(char* text, int size, int device) {
  ENTER_INITIALISED("cuDeviceGetPCIBusId")
  snprintf(text, size, "0000:%02x:00.0", device);
  return 0;
}
EXPORT CUresult cuDevicePrimaryCtxRetain(void** context, int device) {
  ENTER_INITIALISED("cuDevicePrimaryCtxRetain")
  contexts[device].device = device;
  *context = &contexts[device];
  return 0;
}
EXPORT CUresult cuCtxGetCurrent(void** context) {
  ENTER_INITIALISED("cuCtxGetCurrent")
  *context = current;
  return 0;
}
EXPORT CUresult cuCtxSetCurrent(void* context) {
  ENTER_INITIALISED("cuCtxSetCurrent")
  current = (Context*)context;
  return 0;
}
EXPORT CUresult cuCtxSynchronize() {
  ENTER_CONTEXT("cuCtxSynchronize")
  return 0;
}
EXPORT CUresult cuMemGetInfo_v2(size_t* free_bytes, size_t* total) {
  ENTER_CONTEXT("cuMemGetInfo_v2")
  *total = kMemory;
  *free_bytes = kMemory - memory_used;
  return 0;
}
EXPORT CUresult cuMemAlloc_v2(CUdeviceptr* pointer, size_t bytes) {
  ENTER_CONTEXT("cuMemAlloc_v2")
  if (bytes == 0) return 1;
  if (bytes > kMemory - memory_used) return 2;
  char* address = (char*)aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (!address) return 2;
  memset(address, 0xff, bytes);  // NaN, or -1
  memory[address] = bytes;
  memory_used += bytes;
  *pointer = (CUdeviceptr)address;
  return 0;
}
EXPORT CUresult cuMemFree_v2(CUdeviceptr pointer) {
  ENTER_CONTEXT("cuMemFree_v2")
  auto found = memory.find((char*)pointer);
  if (found == memory.end()) return 1;
  memory_used -= found->second;
  free(found->first);
  memory.erase(found);
  return 0;
}
EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr target, const void* source, size_t bytes) {
  ENTER_CONTEXT("cuMemcpyHtoD_v2")
  if (!target || !source) return 1;
  memcpy((void*)target, source, bytes);
  return 0;
}
EXPORT CUresult cuMemcpyDtoH_v2(void* target, CUdeviceptr source, size_t bytes) {
  ENTER_CONTEXT("cuMemcpyDtoH_v2")
  if (!target || !source) return 1;
  memcpy(target, (void*)source, bytes);
  return 0;
}
EXPORT CUresult cuMemsetD8Async(CUdeviceptr target, unsigned char value, size_t bytes, void* stream) {
  ENTER_CONTEXT("cuMemsetD8Async")
  if (!target) return 1;
  if (!is_stream(stream)) return 400;
  memset((void*)target, value, bytes);
  return 0;
}
EXPORT CUresult cuModuleLoadDataEx(void** module, const char* image, unsigned count, int* options, void** values) {
  ENTER_CONTEXT("cuModuleLoadDataEx")
  std::string bytes, log;
  if (memcmp(image, "\x7f" "ELF", 4) == 0) {
    // As a driver must, the end is read from the header: the section table comes last.
    auto header = (const Elf64_Ehdr*)image;
    if (header->e_shnum == 0 || header->e_shentsize != sizeof(Elf64_Shdr)) return 200;
    bytes.assign(image, header->e_shoff + size_t(header->e_shnum) * header->e_shentsize);
  } else {
    bytes = image;
  }
  CUresult code = load(bytes, module, &log);
  for (unsigned i = 0; i < count; ++i)
    for (unsigned j = 0; j < count; ++j)
      if (options[i] == 5 && options[j] == 6) snprintf((char*)values[i], (size_t)values[j], "%s", log.c_str());
  return code;
}
EXPORT CUresult cuModuleUnload(void* module) {
  ENTER_CONTEXT("cuModuleUnload")
  if (!modules.erase(module)) return 400;
  dlclose(((Module*)module)->library);
  delete (Module*)module;
  return 0;
}
EXPORT CUresult cuModuleGetFunction(void** function, void* module, const char* name) {
  ENTER_CONTEXT("cuModuleGetFunction")
  if (!modules.count(module)) return 400;
  auto found = ((Module*)module)->functions.find(name);
  if (found == ((Module*)module)->functions.end()) return 500;
  *function = found->second.get();
  return 0;
}
EXPORT CUresult cuFuncGetAttribute(int* value, int attribute, void* function) {
  ENTER_CONTEXT("cuFuncGetAttribute")
  auto which = (Function*)function;
  switch (attribute) {
    case 0: *value = std::min(which->kernel.bound, threads_by_registers()); break;
    case 1: *value = which->shared_bytes; break;
    case 3: *value = 0; break;
    case 4: *value = registers(); break;
    default: return 1;
  }
  return 0;
}
EXPORT CUresult cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                               unsigned bz, unsigned shared, void* stream, void** parameters, void**) {
  ENTER_CONTEXT("cuLaunchKernel")
  auto function = (Function*)handle;
  Module* module = function->module;
  if (!is_stream(stream)) return 400;
  size_t threads = size_t(bx) * by * bz, blocks = size_t(gx) * gy * gz;
  if (!threads || !blocks || threads > kThreads || bz > 64 || gy > kLargestGridYZ || gz > kLargestGridYZ ||
      gx > 2147483647u || shared + size_t(function->shared_bytes) > kSharedBytes)
    return 1;
  if (threads > (size_t)std::min(function->kernel.bound, threads_by_registers())) return 701;
  static char dynamic[kSharedBytes] __attribute__((aligned(256)));
  *module->dynamic_shared = dynamic;
  *module->grid_size = {gx, gy, gz};
  *module->block_size = {bx, by, bz};
  entry = function->kernel.call;
  entry_parameters = parameters;
  Traps traps;
  for (size_t block = 0; block < blocks; ++block) {
    *module->block_index = {unsigned(block % gx), unsigned(block / gx % gy), unsigned(block / gx / gy)};
    memset(dynamic, 0xff, shared);
    if (module->shared) memset(module->shared, 0xff, module->shared_end - module->shared);
    if (CUresult code = run_block(*module->block_size, module->thread_index)) {
      fprintf(stderr, "emulated CUDA: %s, block (%u, %u, %u)\n", function->kernel.name, module->block_index->x,
              module->block_index->y, module->block_index->z);
      return fail(code);
    }
  }
  return 0;
}
EXPORT CUresult cuStreamCreate(void** stream, unsigned) {
  ENTER_CONTEXT("cuStreamCreate")
  *stream = malloc(16);
  streams.insert(*stream);
  return 0;
}
EXPORT CUresult cuStreamSynchronize(void* stream) {
  ENTER_CONTEXT("cuStreamSynchronize")
  return is_stream(stream) ? 0 : 400;
}
EXPORT CUresult cuStreamDestroy_v2(void* stream) {
  ENTER_CONTEXT("cuStreamDestroy_v2")
  if (!streams.erase(stream)) return 400;
  free(stream);
  return 0;
}
EXPORT CUresult cuEventCreate(void** event, unsigned) {
  ENTER_CONTEXT("cuEventCreate")
  *event = new Event{false, {}};
  events.insert(*event);
  return 0;
}
EXPORT CUresult cuEventRecord(void* event, void* stream) {
  ENTER_CONTEXT("cuEventRecord")
  if (!events.count(event) || !is_stream(stream)) return 400;
  ((Event*)event)->recorded = true;
  clock_gettime(CLOCK_MONOTONIC, &((Event*)event)->when);
  return 0;
}
EXPORT CUresult cuEventSynchronize(void* event) {
  ENTER_CONTEXT("cuEventSynchronize")
  return events.count(event) ? 0 : 400;
}
EXPORT CUresult cuEventElapsedTime(float* milliseconds, void* begin, void* end) {
  ENTER_CONTEXT("cuEventElapsedTime")
  if (!events.count(begin) || !events.count(end)) return 400;
  auto a = (Event*)begin, b = (Event*)end;
  if (!a->recorded || !b->recorded) return 400;
  *milliseconds = (b->when.tv_sec - a->when.tv_sec) * 1e3 + (b->when.tv_nsec - a->when.tv_nsec) * 1e-6;
  return 0;
}
EXPORT CUresult cuEventDestroy_v2(void* event) {
  ENTER_CONTEXT("cuEventDestroy_v2")
  if (!events.erase(event)) return 400;
  delete (Event*)event;
  return 0;
}

// ---- NVRTC --------------------------------------------------------------------------------------------------------
namespace {
struct Source { std::string text, name, log, image, ptx; };
const int kKnown[] = {35, 50, 52, 53, 60, 70, 80, 90};
// NVRTC 10.2 makes no cubins, and knows no sm_80.
bool is_old() { return setting("GF_CUDA_EMULATED_NVRTC", 11) < 11; }
bool knows(int number) {
  return std::find(std::begin(kKnown), std::end(kKnown), number) != std::end(kKnown) && !(is_old() && number >= 80);
}
int copied(const std::string& text, bool with_end, size_t* size, char* target) {
  if (size) *size = text.size() + with_end;
  if (target) memcpy(target, text.c_str(), text.size() + with_end);
  return 0;
}
}  // namespace

EXPORT const char* nvrtcGetErrorString(int code) {
  return code == 0 ? "NVRTC_SUCCESS" : code == 5 ? "NVRTC_ERROR_INVALID_OPTION" : code == 6 ? "NVRTC_ERROR_COMPILATION"
         : code == 1 ? "NVRTC_ERROR_OUT_OF_MEMORY" : "NVRTC_ERROR unknown";
}
EXPORT int nvrtcVersion(int* major, int* minor) {
  ENTER("nvrtcVersion")
  *major = is_old() ? 10 : 11, *minor = is_old() ? 2 : 8;
  return 0;
}
EXPORT int nvrtcCreateProgram(Source** program, const char* text, const char* name, int, void*, void*) {
  ENTER("nvrtcCreateProgram")
  *program = new Source{text, name, "", "", ""};
  return 0;
}
EXPORT int nvrtcDestroyProgram(Source** program) {
  ENTER("nvrtcDestroyProgram")
  delete *program;
  *program = nullptr;
  return 0;
}
EXPORT int nvrtcCompileProgram(Source* program, int count, const char** options) {
  ENTER("nvrtcCompileProgram")
  int number = 0;
  bool cubin = false, standard = false;
  for (int i = 0; i < count; ++i) {
    std::string option = options[i];
    if (option.compare(0, 22, "--gpu-architecture=sm_") == 0) {
      number = atoi(option.c_str() + 22);
      cubin = true;
    } else if (option.compare(0, 27, "--gpu-architecture=compute_") == 0) {
      number = atoi(option.c_str() + 27);
    } else if (option == "--std=c++14") {
      standard = true;
    } else {
      return program->log = "nvrtc: error: unrecognized option " + option + "\n", 5;
    }
  }
  if (!standard || !knows(number) || (cubin && is_old()))
    return program->log = "nvrtc: error: invalid value for --gpu-architecture (-arch)\n", 5;
  // An empty program is how the architectures are found out; it needs no compiler.
  if (!program->text.empty()) {
    std::string image = compile(program->text, program->name, number, &program->log);
    if (image.empty()) return 6;
    if (cubin) program->image = image;
  }
  program->ptx = kPtx + std::to_string(number) + "\n" + program->text;
  return 0;
}
EXPORT int nvrtcGetProgramLogSize(Source* program, size_t* size) { return copied(program->log, true, size, nullptr); }
EXPORT int nvrtcGetProgramLog(Source* program, char* text) { return copied(program->log, true, nullptr, text); }
EXPORT int nvrtcGetPTXSize(Source* program, size_t* size) { return copied(program->ptx, true, size, nullptr); }
EXPORT int nvrtcGetPTX(Source* program, char* text) { return copied(program->ptx, true, nullptr, text); }
EXPORT int nvrtcGetCUBINSize(Source* program, size_t* size) { return copied(program->image, false, size, nullptr); }
EXPORT int nvrtcGetCUBIN(Source* program, char* text) { return copied(program->image, false, nullptr, text); }
EXPORT int nvrtcGetNumSupportedArchs(int* count) {
  ENTER("nvrtcGetNumSupportedArchs")
  *count = sizeof kKnown / sizeof *kKnown;
  return 0;
}
EXPORT int nvrtcGetSupportedArchs(int* numbers) {
  ENTER("nvrtcGetSupportedArchs")
  memcpy(numbers, kKnown, sizeof kKnown);
  return 0;
}
