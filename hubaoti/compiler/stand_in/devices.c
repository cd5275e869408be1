/* Devices: which there are, what they can, and which is current. */
#include "stand_in.h"
#include "chips.h"
#include <stdint.h>

struct device devices[MOST_DEVICES];
int device_count;
__thread int current_device;

/* A name in CUDA_VISIBLE_DEVICES: a number, or the beginning of a UUID. */
struct name {
    const char *text;
    size_t length;
    long number;
};

/* The installed device that is meant; -1 where none is, or where two may be. */
static int find_named(const struct name *name, int by_uuid, int installed) {
    int found = -1;
    if (!by_uuid) return name->number < installed ? (int)name->number : -1;
    for (int i = 0; i < installed; i++) {
        char uuid[48];
        write_uuid(uuid, sizeof uuid, i);
        if (strncmp(name->text, uuid, name->length)) continue;
        if (found >= 0) return -1;
        found = i;
    }
    return found;
}

/* Names up to the first that is none of its kind; 0 names where one of them is there twice. */
static int read_names(struct name names[], int room, const char *text, int by_uuid) {
    int count = 0;
    for (; count < room; text += names[count++].length + 1) {
        struct name *each = &names[count];
        char *end;
        *each = (struct name){text, strcspn(text, ","), strtol(text, &end, 10)};
        if (by_uuid ? strncmp(text, "GPU-", 4) : end == text || each->number < 0) break;
        for (int i = 0; i < count; i++)
            if (by_uuid ? names[i].length == each->length
                              && !strncmp(names[i].text, text, each->length)
                        : names[i].number == each->number)
                return 0;
        if (!text[each->length]) return count + 1;
    }
    return count;
}

/* Those that torch counts, all by number or all by UUID: which of CUDA_VISIBLE_DEVICES are shown is
 * said in hubaoti/host/visible_gpus.py. */
__attribute__((constructor)) static void find_devices(void) {
    const struct chip *chips[MOST_DEVICES];
    int installed = read_installed(chips), taken[MOST_DEVICES] = {0};
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    int by_uuid = visible && !strncmp(visible, "GPU-", 4);
    struct name names[4 * MOST_DEVICES];
    int count = visible ? read_names(names, 4 * MOST_DEVICES, visible, by_uuid) : installed;
    for (int i = 0; i < count; i++) {
        int place = visible ? find_named(&names[i], by_uuid, installed) : i;
        if (place < 0) break;
        if (taken[place]++) {
            device_count = 0;
            break;
        }
        size_t memory = read_memory(chips[place]);
        devices[device_count++] = (struct device){chips[place], memory, 0, place};
    }
}

static cudaError_t check_device(int device) {
    return device >= 0 && device < device_count ? cudaSuccess : fail(cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = device_count;
    return device_count ? cudaSuccess : fail(cudaErrorNoDevice);
}

cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return device_count ? cudaSuccess : fail(cudaErrorNoDevice);
}

cudaError_t cudaSetDevice(int device) {
    cudaError_t error = check_device(device);
    if (!error) current_device = device;
    return error;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    cudaError_t error = check_device(device);
    if (error) return error;
    const struct chip *chip = devices[device].chip;
    memset(p, 0, sizeof *p);
    write_name(p->name, sizeof p->name, chip);
    char uuid[48], *digit = uuid + 4;
    write_uuid(uuid, sizeof uuid, devices[device].installed);
    for (int i = 0; i < 16; i++, digit += 2) {
        digit += *digit == '-';
        char byte[] = {digit[0], digit[1], 0};
        p->uuid.bytes[i] = (char)strtol(byte, NULL, 16);
    }
    p->major = chip->sm / 10;
    p->minor = chip->sm % 10;
    p->totalGlobalMem = devices[device].memory;
    p->multiProcessorCount = chip->processors;
    p->l2CacheSize = chip->l2_mb << 20;
    p->persistingL2CacheMaxSize = chip->sm >= 80 ? p->l2CacheSize / 4 * 3 : 0;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = chip->shared;
    p->sharedMemPerMultiprocessor = chip->processor_shared;
    p->reservedSharedMemPerBlock = chip->sm >= 80 ? 1024 : 0;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerMultiProcessor = chip->threads;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = INT32_MAX;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxBlocksPerMultiProcessor = chip->threads / 64;
    p->memoryBusWidth = chip->bus;
    p->totalConstMem = 64 << 10;
    p->memPitch = INT32_MAX;
    p->textureAlignment = 512;
    p->texturePitchAlignment = 32;
    p->pciBusID = devices[device].installed + 1;
    p->unifiedAddressing = p->canMapHostMemory = p->concurrentKernels = p->cooperativeLaunch = 1;
    p->streamPrioritiesSupported = p->memoryPoolsSupported = 1;
    p->asyncEngineCount = 2;
    return cudaSuccess;
}

/* The driver's attributes and the runtime's have the same numbers; an ability that is not here is none. */
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp p;
    cudaError_t error = cudaGetDeviceProperties(&p, device);
    if (error) return error;
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: *value = p.maxThreadsDim[0]; break;
    case cudaDevAttrMaxBlockDimY: *value = p.maxThreadsDim[1]; break;
    case cudaDevAttrMaxBlockDimZ: *value = p.maxThreadsDim[2]; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[2]; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        *value = (int)p.sharedMemPerMultiprocessor;
        break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = (int)p.reservedSharedMemPerBlock; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerBlock; break;
    case cudaDevAttrTotalConstantMemory: *value = (int)p.totalConstMem; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrMaxPersistingL2CacheSize: *value = p.persistingL2CacheMaxSize; break;
    case cudaDevAttrClockRate: *value = devices[device].chip->clock * 1000; break;
    case cudaDevAttrMemoryClockRate: *value = devices[device].chip->memory_clock * 1000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = p.memoryBusWidth; break;
    case cudaDevAttrMaxPitch: *value = (int)p.memPitch; break;
    case cudaDevAttrTextureAlignment: *value = (int)p.textureAlignment; break;
    case cudaDevAttrPciBusId: *value = p.pciBusID; break;
    case cudaDevAttrAsyncEngineCount: *value = p.asyncEngineCount; break;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrCanMapHostMemory:
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrGlobalL1CacheSupported:
    case cudaDevAttrLocalL1CacheSupported: *value = 1; break;
    default: *value = 0; note("attribute %d of a device is 0", attribute);
    }
    if ((CUdevice_attribute)attribute == CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH) *value = p.major >= 9;
    return cudaSuccess;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return AS_DRIVER(cudaDeviceGetAttribute(value, (enum cudaDeviceAttr)attribute, device));
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
    cudaError_t error = id && size > 0 ? check_device(device) : fail(cudaErrorInvalidValue);
    if (!error) write_bus_id(id, size, devices[device].installed);
    return error;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    cudaError_t error = check_device(device);
    if (!error) error = check_device(peer);
    *can = 0;
    return error;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    cudaError_t error = check_device(device);
    if (!error) *pool = (cudaMemPool_t)&devices[device];
    return error;
}

cudaError_t cudaDeviceGetLimit(size_t *value, enum cudaLimit limit) {
    return (void)limit, *value = 1 << 20, cudaSuccess;
}

cudaError_t cudaDeviceGetP2PAttribute(int *value, enum cudaDeviceP2PAttr attribute, int device,
                                      int peer) {
    return (void)attribute, (void)device, (void)peer, *value = 0, cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDA_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

/* The driver's: a context is the primary one of a device, and its number plus one. */
CUresult cuInit(unsigned flags) {
    return refuse(flags          ? CUDA_ERROR_INVALID_VALUE
                  : device_count ? CUDA_SUCCESS
                                 : CUDA_ERROR_NO_DEVICE);
}
CUresult cuDriverGetVersion(int *version) { return AS_DRIVER(cudaDriverGetVersion(version)); }
CUresult cuDeviceGetCount(int *count) { return *count = device_count, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    return *device = ordinal, AS_DRIVER(check_device(ordinal));
}

CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    if (!name || size < 1) return refuse(CUDA_ERROR_INVALID_VALUE);
    CUresult error = AS_DRIVER(check_device(device));
    if (!error) write_name(name, size, devices[device].chip);
    return error;
}

CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) {
    struct cudaDeviceProp p;
    CUresult error = AS_DRIVER(cudaGetDeviceProperties(&p, device));
    if (!error) memcpy(uuid, &p.uuid, sizeof *uuid);
    return error;
}

#if CUDA_VERSION < 13000
CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) { return cuDeviceGetUuid_v2(uuid, device); }
#endif

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    CUresult error = AS_DRIVER(check_device(device));
    if (!error) *bytes = devices[device].memory;
    return error;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)(uintptr_t)(device + 1);
    return AS_DRIVER(check_device(device));
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return AS_DRIVER(check_device(device));
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = (CUcontext)(uintptr_t)(device_count ? current_device + 1 : 0);
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    return context ? AS_DRIVER(cudaSetDevice((int)(uintptr_t)context - 1)) : CUDA_SUCCESS;
}

static __thread int pushed[64], pushed_count;

CUresult cuCtxPushCurrent_v2(CUcontext context) {
    if (pushed_count == sizeof pushed / sizeof *pushed) return refuse(CUDA_ERROR_OUT_OF_MEMORY);
    pushed[pushed_count++] = current_device;
    return cuCtxSetCurrent(context);
}

CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    if (!pushed_count) return refuse(CUDA_ERROR_INVALID_CONTEXT);
    if (context) cuCtxGetCurrent(context);
    current_device = pushed[--pushed_count];
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) { return *device = current_device, CUDA_SUCCESS; }
CUresult cuCtxGetApiVersion(CUcontext context, unsigned *version) {
    return (void)context, *version = CUDA_VERSION, CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
    return (void)limit, *value = 1 << 20, CUDA_SUCCESS;
}

/* Nothing is ever logged by a driver that is not there, and it has no tables of inner functions. */
#if CUDA_VERSION >= 12090
CUresult cuLogsRegisterCallback(CUlogsCallback function, void *argument,
                                CUlogsCallbackHandle *made) {
    return (void)function, (void)argument, *made = NULL, CUDA_SUCCESS;
}
#endif
CUresult cuGetExportTable(const void **table, const CUuuid *id) {
    return (void)id, *table = NULL, refuse(CUDA_ERROR_NOT_FOUND);
}
