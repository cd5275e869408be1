/* Kernels of torch and of extensions of it, launched by the runtime: known by the address of their
 * stub, not run, and not looked into.
 */
#include "stand_in.h"
#include "chips.h"

static cudaError_t launch_stub(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    struct launch launch = {grid, block, shared};
    CUresult error = check_sizes("a kernel of the runtime", &launch);
    if (error) return keep(error);
    if (!device_count) return fail(cudaErrorNoDevice);
    if (shared > (size_t)devices[current_device].chip->shared) return fail(cudaErrorInvalidValue);
    note("launch of the runtime");
    add_node(stream);
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **parameters,
                             size_t shared, cudaStream_t stream) {
    (void)kernel, (void)parameters;
    return launch_stub(grid, block, shared, stream);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **parameters,
                               size_t shared, cudaStream_t stream) {
    (void)kernel, (void)parameters;
    return launch_stub(grid, block, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel,
                                void **parameters) {
    (void)kernel, (void)parameters;
    if (!config) return fail(cudaErrorInvalidValue);
    return launch_stub(config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void *kernel, dim3 grid, dim3 block,
                                        void **parameters, size_t shared, cudaStream_t stream) {
    (void)kernel, (void)parameters;
    return launch_stub(grid, block, shared, stream);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
    (void)kernel;
    if (!device_count) return fail(cudaErrorNoDevice);
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = devices[current_device].chip->sm;
    attributes->maxDynamicSharedSizeBytes = devices[current_device].chip->shared;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *kernel,
                                                                   int threads, size_t shared,
                                                                   unsigned flags) {
    (void)kernel, (void)flags;
    if (!device_count) return fail(cudaErrorNoDevice);
    *blocks = count_blocks(devices[current_device].chip, threads, 32, shared);
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *kernel,
                                                          int threads, size_t shared) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, kernel, threads, shared,
                                                                  0);
}

cudaError_t cudaOccupancyMaxActiveClusters(int *clusters, const void *kernel,
                                           const cudaLaunchConfig_t *config) {
    (void)kernel, (void)config;
    if (!device_count) return fail(cudaErrorNoDevice);
    *clusters =
        devices[current_device].chip->sm >= 90 ? devices[current_device].chip->processors / 2 : 0;
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    return *address = (void *)symbol, cudaSuccess;
}

/* What nvcc's code calls when a library is loaded (crt/host_runtime.h declares it). */
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *stub) {
    return *kernel = (cudaKernel_t)stub, cudaSuccess;
}
void **__cudaRegisterFatBinary(void *binary) {
    static void *registered;
    (void)binary;
    return &registered;
}
void __cudaRegisterFatBinaryEnd(void **registered) { (void)registered; }
void __cudaUnregisterFatBinary(void **registered) { (void)registered; }
char __cudaInitModule(void **registered) { return (void)registered, 1; }
void __cudaRegisterFunction(void) {}
void __cudaRegisterVar(void) {}
void __cudaRegisterManagedVar(void) {}

static __thread struct {
    struct launch launch;
    cudaStream_t stream;
} configured[16];
static __thread int configured_count;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    if (configured_count == 16) return 1;
    configured[configured_count].launch = (struct launch){grid, block, shared};
    configured[configured_count++].stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    if (!configured_count) return fail(cudaErrorMissingConfiguration);
    configured_count--;
    *grid = configured[configured_count].launch.grid;
    *block = configured[configured_count].launch.block;
    *shared = configured[configured_count].launch.shared;
    *(cudaStream_t *)stream = configured[configured_count].stream;
    return cudaSuccess;
}
