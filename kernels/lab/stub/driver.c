/* A stand-in for NVIDIA's libcuda.so.1: it loads compiled kernels and records launches, and runs nothing.
 *
 * It has the functions that Triton's launch path calls (triton/backends/nvidia/driver.c and the launchers that driver.py
 * writes) and refuses what the true driver refuses: a cubin for another GPU, a kernel that the cubin does not hold, a grid
 * or block that is too large, more shared memory than was asked for, more registers than a multiprocessor has.
 *
 * How many parameters a kernel has, and of which sizes, is read from its cubin, as the true driver does. A launch is
 * recorded with the bytes of its parameters as they would lie in constant memory.
 *
 * `kernels/lab/stub/driver.py` describes the functions `stub_...` and mirrors the structs.
 */
#include "cuda.h"
#include <elf.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* cuda.h gives some names a version by macros, and has no prototypes for the others; Triton asks for those of 2.0. */
#define EXPORT __attribute__((visibility("default")))

enum { MAX_PARAMS = 64, PARAM_BYTES = 1024, MAX_ATTRIBUTES = 4, KEPT = 1024, NAME = 128 };

typedef struct {
  int ordinal, capability, shared_bytes, registers, multiprocessors;
} Device;

typedef struct Function {
  char name[NAME];
  int registers, local_bytes, required_threads, dynamic_limit, params;
  int offset[MAX_PARAMS], size[MAX_PARAMS];
  struct Function *next;
} Function;

typedef struct {
  const Function *function;
  unsigned grid[3], block[3], shared_bytes, attributes;
  unsigned attribute_id[MAX_ATTRIBUTES];
  uint64_t attribute_value[MAX_ATTRIBUTES];
  uint64_t stream;
  unsigned char bytes[PARAM_BYTES];
} Launch;

/* What is to fail, in a file that all processes of a test share. */
typedef struct {
  int32_t result;  /* 0: nothing fails; a CUresult; or HANG or ABORT */
  int32_t left;    /* launches that still fail; negative: all */
  int32_t pass;    /* matching launches that succeed before */
  int32_t failed;  /* launches that failed */
  char kernel[NAME]; /* empty: every kernel */
} Fault;

enum { HANG = -1, ABORT = -2 };

static Device device;
static Launch ring[KEPT];
static uint64_t launched;
static int context;
static CUresult lost;
static Fault none, *fault = &none;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

/* -- For Python -------------------------------------------------------------------------------------------------- */

EXPORT void stub_set_device(const Device *chosen) { device = *chosen; }

EXPORT uint64_t stub_count(void) { return __atomic_load_n(&launched, __ATOMIC_ACQUIRE); }

/* Copy the launch of an index, counted from the first of all; 0 if it is no longer kept. */
EXPORT int stub_launch(uint64_t index, Launch *into) {
  pthread_mutex_lock(&mutex);
  int kept = index < launched && index + KEPT >= launched;
  if (kept)
    *into = ring[index % KEPT];
  pthread_mutex_unlock(&mutex);
  return kept;
}

EXPORT int stub_share_faults(const char *path) {
  int file = open(path, O_RDWR);
  if (file < 0)
    return 0;
  void *shared = mmap(NULL, sizeof(Fault), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (shared == MAP_FAILED)
    return 0;
  fault = shared;
  return 1;
}

EXPORT void stub_recover(void) { lost = CUDA_SUCCESS; }

/* -- The cubin --------------------------------------------------------------------------------------------------- */

/* Of attributes of all kernels; a kernel's own are in a section with its name behind. */
#define INFO ".nv.info"

/* Formats and attributes in these sections, as cuobjdump names them. */
enum { EIFMT_SVAL = 4, EIATTR_REQNTID = 0x10, EIATTR_FRAME_SIZE = 0x11, EIATTR_KPARAM_INFO = 0x17, EIATTR_REGCOUNT = 0x2f };

static void read_info(const unsigned char *image, const Elf64_Shdr *info, Function *function) {
  const unsigned char *at = image + info->sh_offset, *end = at + info->sh_size;
  while (at + 4 <= end) {
    int format = at[0], attribute = at[1], size = format == EIFMT_SVAL ? at[2] | at[3] << 8 : 0;
    const unsigned char *value = at + 4;
    uint32_t words[3] = {0, 0, 0};
    memcpy(words, value, size < 12 ? size : 12);
    if (attribute == EIATTR_REGCOUNT)
      function->registers = words[1];
    if (attribute == EIATTR_FRAME_SIZE)
      function->local_bytes = words[1];
    if (attribute == EIATTR_REQNTID)
      function->required_threads = words[0] * words[1] * words[2];
    if (attribute == EIATTR_KPARAM_INFO) {
      /* Words: an index, ordinal and offset of 16 bits each, and flags that end with the size. */
      int ordinal = words[1] & 0xffff;
      if (ordinal < MAX_PARAMS) {
        function->offset[ordinal] = words[1] >> 16;
        function->size[ordinal] = words[2] >> 18;
      }
      if (ordinal >= function->params)
        function->params = ordinal + 1;
    }
    at = value + size;
  }
}

/* -- The driver -------------------------------------------------------------------------------------------------- */

EXPORT CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

static const struct { CUresult code; const char *name, *text; } ERRORS[] = {
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {CUDA_ERROR_INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {CUDA_ERROR_NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {CUDA_ERROR_LAUNCH_TIMEOUT, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {CUDA_ERROR_MISALIGNED_ADDRESS, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

static CUresult describe(CUresult error, const char **text, int name) {
  *text = error == CUDA_SUCCESS ? (name ? "CUDA_SUCCESS" : "no error") : NULL;
  for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
    if (ERRORS[i].code == error)
      *text = name ? ERRORS[i].name : ERRORS[i].text;
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **text) { return describe(error, text, 0); }
EXPORT CUresult cuGetErrorName(CUresult error, const char **text) { return describe(error, text, 1); }

EXPORT CUresult cuDeviceGet(CUdevice *into, int ordinal) {
  *into = ordinal;
  return ordinal == device.ordinal ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice of) {
  if (of != device.ordinal)
    return CUDA_ERROR_INVALID_DEVICE;
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = device.shared_bytes; break;
  /* The system keeps 1 KiB for each block. */
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = device.shared_bytes + 1024; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = device.registers; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = device.multiprocessors; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = device.capability / 10; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = device.capability % 10; break;
  /* Of no use to a launch: clocks and the width of the bus. */
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 1; break;
  default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *current) {
  *current = (CUcontext)&context;
  return lost;
}
EXPORT CUresult cuCtxSetCurrent(CUcontext current) { return lost; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *current, CUdevice of) { return cuCtxGetCurrent(current); }

/* A module is the list of its kernels: the rest of a cubin is only for a GPU. */
EXPORT CUresult cuModuleLoadData(CUmodule *into, const void *data) {
  if (lost)
    return lost;
  const unsigned char *image = data;
  const Elf64_Ehdr *header = data;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0)
    return CUDA_ERROR_INVALID_IMAGE;
  int compiled_for = header->e_flags & 0xff;
  if (compiled_for / 10 != device.capability / 10 || compiled_for > device.capability)
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff), *common = NULL;
  const char *names = (const char *)image + sections[header->e_shstrndx].sh_offset;
  for (int i = 0; i < header->e_shnum; i++)
    if (strcmp(names + sections[i].sh_name, INFO) == 0)
      common = &sections[i];
  Function *first = NULL;
  for (int i = 0; i < header->e_shnum; i++) {
    const char *name = names + sections[i].sh_name;
    if (strncmp(name, INFO ".", sizeof INFO) != 0 || strlen(name + sizeof INFO) >= NAME)
      continue;
    /* It lives as long as the process: recorded launches refer to it. */
    Function *function = calloc(1, sizeof *function);
    strcpy(function->name, name + sizeof INFO);
    function->dynamic_limit = 48 * 1024;
    function->next = first;
    first = function;
    if (common)
      read_info(image, common, function);
    read_info(image, &sections[i], function);
    if (function->params > MAX_PARAMS)
      return CUDA_ERROR_NOT_SUPPORTED;
  }
  *into = (CUmodule)first;
  return first ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}

EXPORT CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

EXPORT CUresult cuModuleGetFunction(CUfunction *into, CUmodule module, const char *name) {
  for (Function *function = (Function *)module; function; function = function->next)
    if (strcmp(function->name, name) == 0) {
      *into = (CUfunction)function;
      return CUDA_SUCCESS;
    }
  return CUDA_ERROR_NOT_FOUND;
}

EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction of) {
  const Function *function = (const Function *)of;
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->registers; break;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = function->local_bytes; break;
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    *value = function->required_threads ? function->required_threads : 1024;
    break;
  /* Triton's kernels have no static shared memory. */
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = 0; break;
  default: return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction of, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value < 0 || value > device.shared_bytes)
      return CUDA_ERROR_INVALID_VALUE;
    ((Function *)of)->dynamic_limit = value;
  }
  return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetCacheConfig(CUfunction of, CUfunc_cache config) { return CUDA_SUCCESS; }

EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

/* After these the true driver gives nothing but the same error, until the process ends. */
static int ends_context(CUresult error) {
  return error == CUDA_ERROR_ILLEGAL_ADDRESS || error == CUDA_ERROR_LAUNCH_TIMEOUT ||
         error == CUDA_ERROR_MISALIGNED_ADDRESS || error == CUDA_ERROR_LAUNCH_FAILED;
}

static CUresult injected(const Function *function) {
  int32_t result = __atomic_load_n(&fault->result, __ATOMIC_ACQUIRE);
  if (!result || (fault->kernel[0] && strcmp(fault->kernel, function->name) != 0))
    return CUDA_SUCCESS;
  if (__atomic_load_n(&fault->pass, __ATOMIC_RELAXED) > 0 && __atomic_fetch_sub(&fault->pass, 1, __ATOMIC_RELAXED) > 0)
    return CUDA_SUCCESS;
  if (__atomic_load_n(&fault->left, __ATOMIC_RELAXED) >= 0 && __atomic_fetch_sub(&fault->left, 1, __ATOMIC_RELAXED) <= 0) {
    __atomic_store_n(&fault->left, 0, __ATOMIC_RELAXED);
    return CUDA_SUCCESS;
  }
  __atomic_fetch_add(&fault->failed, 1, __ATOMIC_RELAXED);
  if (result == HANG)
    for (;;)
      pause();
  if (result == ABORT)
    abort();
  if (ends_context(result))
    lost = result;
  return result;
}

static CUresult refused(const CUlaunchConfig *config, const Function *function) {
  uint64_t threads = (uint64_t)config->blockDimX * config->blockDimY * config->blockDimZ;
  uint64_t blocks = (uint64_t)config->gridDimX * config->gridDimY * config->gridDimZ;
  if (!threads || !blocks || config->gridDimX > 0x7fffffff || config->gridDimY > 65535 || config->gridDimZ > 65535)
    return CUDA_ERROR_INVALID_VALUE;
  if (threads > 1024 || (function->required_threads && threads != (uint64_t)function->required_threads))
    return CUDA_ERROR_INVALID_VALUE;
  if (config->sharedMemBytes > (unsigned)function->dynamic_limit || config->numAttrs > MAX_ATTRIBUTES)
    return CUDA_ERROR_INVALID_VALUE;
  if (threads * function->registers > (uint64_t)device.registers)
    return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  return CUDA_SUCCESS;
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction of, void **params, void **extra) {
  const Function *function = (const Function *)of;
  CUresult error = lost ? lost : refused(config, function);
  if (!error)
    error = injected(function);
  if (error)
    return error;
  pthread_mutex_lock(&mutex);
  Launch *launch = &ring[launched % KEPT];
  launch->function = function;
  memcpy(launch->grid, (unsigned[]){config->gridDimX, config->gridDimY, config->gridDimZ}, sizeof launch->grid);
  memcpy(launch->block, (unsigned[]){config->blockDimX, config->blockDimY, config->blockDimZ}, sizeof launch->block);
  launch->shared_bytes = config->sharedMemBytes;
  launch->stream = (uint64_t)config->hStream;
  launch->attributes = config->numAttrs;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    launch->attribute_id[i] = config->attrs[i].id;
    memcpy(&launch->attribute_value[i], &config->attrs[i].value, sizeof *launch->attribute_value);
  }
  for (int i = 0; i < function->params; i++)
    if (function->offset[i] + function->size[i] <= PARAM_BYTES)
      memcpy(launch->bytes + function->offset[i], params[i], function->size[i]);
  __atomic_store_n(&launched, launched + 1, __ATOMIC_RELEASE);
  pthread_mutex_unlock(&mutex);
  return CUDA_SUCCESS;
}

/* Triton looks these up, for kernels of other kinds than ours. */
EXPORT CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction of, const CUlaunchConfig *config) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
EXPORT CUresult cuTensorMapEncodeTiled(
    CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *sizes,
    const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
