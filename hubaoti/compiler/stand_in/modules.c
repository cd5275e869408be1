/* Modules and launches: cubins that this device would take, and launches that it would begin.
 *
 * A kernel is not run. A process that computes launches itself (`stand_in_compute`) is given each one,
 * but those into a graph that is being captured.
 */
#include "stand_in.h"
#include "chips.h"
#include <fcntl.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static void (*compute)(const char *name, unsigned x, unsigned y, unsigned z, void **parameters);

/* Who computes launches: called with a kernel's name, its grid and what its host code passes. */
OUTSIDE void stand_in_compute(void *callback) {
    compute = (void (*)(const char *, unsigned, unsigned, unsigned, void **))callback;
}

static void drop_module(struct module *module) {
    let_go(MODULE, module);
    for (int i = 0; i < module->count; i++) let_go(FUNCTION, &module->functions[i]);
    free_module(module);
}

/* Load a cubin; the length of one that is no file is 0, as nobody says it. */
static CUresult load(CUmodule *made, const void *start, size_t size) {
    if (!device_count) return refuse(CUDA_ERROR_NO_DEVICE);
    if (!made || !start) return refuse(CUDA_ERROR_INVALID_VALUE);
    CUresult refused = AS_DRIVER(refuse_in_capture());
    if (refused) return refused;
    struct module *module = make(MODULE, sizeof *module);
    if (!module) return refuse(CUDA_ERROR_OUT_OF_MEMORY);
    CUresult error = read_cubin(module, start, size, devices[current_device].chip);
    for (int i = 0; i < module->count && !error; i++)
        if (!hold(FUNCTION, &module->functions[i])) error = refuse(CUDA_ERROR_OUT_OF_MEMORY);
    if (error) return drop_module(module), error;
    *made = (CUmodule)module;
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *made, const void *start) { return load(made, start, 0); }

CUresult cuModuleLoadDataEx(CUmodule *made, const void *start, unsigned count,
                            CUjit_option *options, void **values) {
    (void)count, (void)options, (void)values;
    return cuModuleLoadData(made, start);
}

CUresult cuModuleLoad(CUmodule *made, const char *path) {
    struct stat status = {0};
    if (!path) return refuse(CUDA_ERROR_INVALID_VALUE);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    void *start = MAP_FAILED;
    if (file >= 0 && !fstat(file, &status) && S_ISREG(status.st_mode) && status.st_size)
        start = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (file >= 0) close(file);
    if (start == MAP_FAILED)
        return (CUresult)explain(CUDA_ERROR_FILE_NOT_FOUND, "file not found, or no cubin: %s",
                                 path);
    CUresult error = load(made, start, status.st_size);
    munmap(start, status.st_size);
    return error;
}

CUresult cuModuleUnload(CUmodule module) {
    if (!is_held(MODULE, module)) return refuse(CUDA_ERROR_INVALID_HANDLE);
    drop_module((struct module *)module);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *found, CUmodule given, const char *name) {
    struct module *module = (struct module *)given;
    if (!is_held(MODULE, module)) return refuse(CUDA_ERROR_INVALID_HANDLE);
    if (!found || !name) return refuse(CUDA_ERROR_INVALID_VALUE);
    for (int i = 0; i < module->count; i++)
        if (!strcmp(module->functions[i].name, name)) {
            *found = (CUfunction)&module->functions[i];
            return CUDA_SUCCESS;
        }
    return (CUresult)explain(CUDA_ERROR_NOT_FOUND, "named symbol not found: %s", name);
}

/* Threads of a block, where the cubin fixes them. */
static size_t count_required(const struct function *function) {
    const unsigned *required = function->required;
    return (size_t)required[0] * required[1] * required[2];
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction given) {
    struct function *function = (struct function *)given;
    if (!is_held(FUNCTION, function)) return refuse(CUDA_ERROR_INVALID_HANDLE);
    if (!value) return refuse(CUDA_ERROR_INVALID_VALUE);
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        *value = function->required[0] ? (int)count_required(function) : 1024;
        break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = function->shared; break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = function->local; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = function->registers; break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = function->dynamic; break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = function->chip->sm; break;
    default: *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction given, CUfunction_attribute attribute, int value) {
    struct function *function = (struct function *)given;
    if (!is_held(FUNCTION, function)) return refuse(CUDA_ERROR_INVALID_HANDLE);
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
    long long all = (long long)value + function->shared;
    if (value < 0 || all > function->chip->shared)
        return (CUresult)explain(
            CUDA_ERROR_INVALID_VALUE,
            "invalid argument: %s wants %lld bytes of shared memory, and a block of sm_%d has %d",
            function->name, all, function->chip->sm, function->chip->shared);
    function->dynamic = value;
    return CUDA_SUCCESS;
}

/* Launches */

CUresult check_sizes(const char *name, const struct launch *launch) {
    dim3 grid = launch->grid, block = launch->block;
    int empty = !grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z;
    int large = grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 || block.x > 1024
                || block.y > 1024 || block.z > 64 || (size_t)block.x * block.y * block.z > 1024;
    if (!empty && !large) return CUDA_SUCCESS;
    return (CUresult)explain(
        CUDA_ERROR_INVALID_VALUE,
        "invalid argument: %s with a grid of (%u, %u, %u) and (%u, %u, %u) threads", name, grid.x,
        grid.y, grid.z, block.x, block.y, block.z);
}

static CUresult check_launch(const struct function *function, const struct launch *launch) {
    CUresult error = check_sizes(function->name, launch);
    if (error) return error;
    size_t threads = (size_t)launch->block.x * launch->block.y * launch->block.z;
    if (function->required[0] && threads != count_required(function))
        return (CUresult)explain(CUDA_ERROR_INVALID_VALUE,
                                 "invalid argument: %s with %zu threads, and it was made for %zu",
                                 function->name, threads, count_required(function));
    if (launch->shared > (size_t)function->dynamic)
        return (CUresult)explain(
            CUDA_ERROR_INVALID_VALUE,
            "invalid argument: %s with %zu bytes of shared memory, and it may have %d",
            function->name, launch->shared, function->dynamic);
    if (threads * function->registers > 65536)
        return (CUresult)explain(
            CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
            "too many resources requested for launch: %s with %zu threads of %d registers",
            function->name, threads, function->registers);
    return CUDA_SUCCESS;
}

static CUresult launch_function(struct function *function, const struct launch *launch,
                                CUstream stream, void **parameters) {
    if (!is_held(FUNCTION, function) || !is_stream(stream))
        return refuse(CUDA_ERROR_INVALID_HANDLE);
    CUresult error = check_launch(function, launch);
    if (error) return error;
    note("launch %s %u %u %u", function->name, launch->grid.x, launch->grid.y, launch->grid.z);
    if (is_capturing(stream)) add_node(stream);
    else if (compute)
        compute(function->name, launch->grid.x, launch->grid.y, launch->grid.z, parameters);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream,
                        void **parameters, void **extra) {
    struct launch launch = {{x, y, z}, {block_x, block_y, block_z}, shared};
    (void)extra;
    return launch_function((struct function *)function, &launch, stream, parameters);
}

CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned x, unsigned y, unsigned z,
                                   unsigned block_x, unsigned block_y, unsigned block_z,
                                   unsigned shared, CUstream stream, void **parameters) {
    return cuLaunchKernel(function, x, y, z, block_x, block_y, block_z, shared, stream, parameters,
                          NULL);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **parameters,
                          void **extra) {
    if (!c) return refuse(CUDA_ERROR_INVALID_VALUE);
    return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX,
                          c->blockDimY, c->blockDimZ, c->sharedMemBytes, c->hStream, parameters,
                          extra);
}

/* How many blocks a processor holds, by threads, registers and shared memory. */
int count_blocks(const struct chip *chip, int threads, int registers, size_t shared) {
    size_t each = threads < 1 ? 1 : threads, blocks = chip->threads / each;
    if (registers > 0 && 65536 / (registers * each) < blocks) blocks = 65536 / (registers * each);
    if (shared > (size_t)chip->processor_shared) return 0;
    if (shared && chip->processor_shared / (shared + 1024) < blocks)
        blocks = chip->processor_shared / (shared + 1024);
    return blocks < 32 ? (int)blocks : 32;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction given, int threads,
                                                     size_t shared) {
    struct function *function = (struct function *)given;
    if (!is_held(FUNCTION, function)) return refuse(CUDA_ERROR_INVALID_HANDLE);
    if (!blocks || shared > INT32_MAX) return refuse(CUDA_ERROR_INVALID_VALUE);
    *blocks = count_blocks(function->chip, threads, function->registers, shared + function->shared);
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction given,
                                      const CUlaunchConfig *config) {
    struct function *function = (struct function *)given;
    (void)config;
    if (!is_held(FUNCTION, function)) return refuse(CUDA_ERROR_INVALID_HANDLE);
    if (!clusters) return refuse(CUDA_ERROR_INVALID_VALUE);
    *clusters = function->chip->sm >= 90 ? function->chip->processors / 2 : 0;
    return CUDA_SUCCESS;
}

/* How a kernel that is not run would find a tensor; nobody here reads it. */

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *sizes, const cuuint64_t *strides,
                                const cuuint32_t *box, const cuuint32_t *steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    (void)type, (void)sizes, (void)strides, (void)box, (void)steps, (void)interleave;
    (void)swizzle, (void)promotion, (void)fill;
    if (!map || !rank || rank > 5 || (uintptr_t)address % 16) return refuse(CUDA_ERROR_INVALID_VALUE);
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}
