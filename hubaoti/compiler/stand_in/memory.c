/* Memory: addresses that the host cannot touch, and a second mapping of the same pages.
 *
 * Copies go through the second mapping; host code that reads a device's address dies here as it
 * does on a GPU. Pages that nobody writes cost nothing, so the weights of a large model are free.
 */
#include "stand_in.h"
#include "chips.h"
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

/* What was allocated, by its address; `host` is where this process may touch it. */
struct block {
    char *address, *host;
    size_t size;
    int device; /* -1: pinned memory of the host; -2: the caller's own, that is pinned for a while */
};
static struct block *blocks;
static size_t block_count, block_room;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
SURVIVES_FORK(lock)

/* CUDA cannot be used where a process was forked that used it; the memory would be its parent's. */
int is_lost;
static void lose_devices(void) {
    if (!block_count) return;
    is_lost = 1;
    device_count = 0;
}
__attribute__((constructor)) static void watch_forks(void) {
    pthread_atfork(NULL, NULL, lose_devices);
}

/* The place of the first block that begins behind an address. */
static size_t find_place(const char *address) {
    size_t low = 0, high = block_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (blocks[middle].address <= address) low = middle + 1;
        else high = middle;
    }
    return low;
}

static struct block find_block(const void *pointer) {
    struct block found = {0};
    pthread_mutex_lock(&lock);
    size_t place = find_place(pointer);
    if (place && (char *)pointer < blocks[place - 1].address + blocks[place - 1].size)
        found = blocks[place - 1];
    pthread_mutex_unlock(&lock);
    return found;
}

static int add_block(struct block block) {
    if (block_count == block_room) {
        size_t room = block_room ? 2 * block_room : 256;
        struct block *moved = realloc(blocks, room * sizeof *blocks);
        if (!moved) return 0;
        blocks = moved;
        block_room = room;
    }
    size_t place = find_place(block.address);
    memmove(blocks + place + 1, blocks + place, (block_count++ - place) * sizeof *blocks);
    blocks[place] = block;
    count_live(block.device < 0 ? PINNED : MEMORY, 1);
    return 1;
}

/* A device's blocks are of one kind, whichever's they are; memory of the host's is of two. */
static int is_same_kind(int device, int other) {
    return device < 0 ? device == other : other >= 0;
}

static struct block remove_block(size_t place) {
    struct block found = blocks[place];
    memmove(blocks + place, blocks + place + 1, (--block_count - place) * sizeof *blocks);
    count_live(found.device < 0 ? PINNED : MEMORY, -1);
    if (found.device >= 0) devices[found.device].used -= found.size;
    return found;
}

/* Take the block that begins at an address; one without a size if none does. */
static struct block take_block(const void *address, int device) {
    struct block found = {0};
    pthread_mutex_lock(&lock);
    size_t place = find_place(address);
    if (place && blocks[place - 1].address == address
        && is_same_kind(device, blocks[place - 1].device))
        found = remove_block(place - 1);
    pthread_mutex_unlock(&lock);
    return found;
}

int is_device(const void *pointer) {
    struct block found = find_block(pointer);
    return found.size && found.device >= 0;
}

/* Whether all of these bytes are of one piece of pinned memory. */
int is_pinned(const void *pointer, size_t size) {
    struct block found = find_block(pointer);
    size_t left = found.size ? found.address + found.size - (char *)pointer : 0;
    return found.size && found.device < 0 && size <= left;
}

int is_host(const void *pointer) { return pointer && !is_device(pointer); }

/* Where this process may touch what lies at an address of either kind. */
void *stand_in_host(const void *pointer) {
    struct block found = find_block(pointer);
    return found.size ? found.host + ((char *)pointer - found.address) : (void *)pointer;
}

/* Bytes from a device's address to the end of what was allocated there; 0 for any other address. */
size_t stand_in_left(const void *pointer) {
    struct block found = find_block(pointer);
    return found.size && found.device >= 0 ? found.address + found.size - (char *)pointer : 0;
}

/* Bytes that this process has of a device, counted as NVML counts. */
OUTSIDE size_t stand_in_used(int installed) {
    for (int i = 0; i < device_count; i++)
        if (devices[i].installed == installed) return devices[i].used;
    return 0;
}

static struct block map_block(size_t size, int device) {
    struct block block = {.size = size, .device = device};
    int file = memfd_create("stand-in", MFD_CLOEXEC);
    if (file < 0) return (struct block){0};
    size_t pages = (size + PAGE - 1) / PAGE * PAGE;
    void *address = MAP_FAILED, *host = MAP_FAILED;
    if (!ftruncate(file, pages)) {
        address = mmap(NULL, pages, PROT_NONE, MAP_SHARED, file, 0);
        host = mmap(NULL, pages, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    }
    close(file);
    if (address != MAP_FAILED && host != MAP_FAILED) {
        block.address = address;
        block.host = host;
        return block;
    }
    if (address != MAP_FAILED) munmap(address, pages);
    if (host != MAP_FAILED) munmap(host, pages);
    return (struct block){0};
}

static void unmap_block(struct block block) {
    size_t pages = (block.size + PAGE - 1) / PAGE * PAGE;
    munmap(block.address, pages);
    munmap(block.host, pages);
}

static cudaError_t allocate(void **pointer, size_t size) {
    if (!pointer) return fail(cudaErrorInvalidValue);
    *pointer = NULL;
    if (is_lost) return fail(cudaErrorInitializationError);
    if (!device_count) return fail(cudaErrorNoDevice);
    if (!size) return cudaSuccess;
    struct device *device = &devices[current_device];
    struct block block = {0};
    pthread_mutex_lock(&lock);
    if (size <= device->memory - device->used && size < PTRDIFF_MAX - PAGE)
        block = map_block(size, current_device);
    if (block.size && !add_block(block)) {
        unmap_block(block);
        block.size = 0;
    }
    if (block.size) device->used += size;
    pthread_mutex_unlock(&lock);
    note("malloc %zu", size);
    *pointer = block.address;
    return block.size ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}

static cudaError_t give_back(void *pointer) {
    if (!pointer) return cudaSuccess;
    if (is_lost) return fail(cudaErrorInitializationError);
    struct block block = take_block(pointer, 0);
    if (!block.size) return fail(cudaErrorInvalidValue);
    unmap_block(block);
    note("free %zu", block.size);
    return cudaSuccess;
}

cudaError_t cudaMalloc(void **pointer, size_t size) {
    cudaError_t error = refuse_in_capture();
    return error ? error : allocate(pointer, size);
}

cudaError_t cudaFree(void *pointer) {
    cudaError_t error = refuse_in_capture();
    return error ? error : give_back(pointer);
}

cudaError_t cudaMallocAsync(void **pointer, size_t size, cudaStream_t stream) {
    (void)stream;
    return allocate(pointer, size);
}

cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) {
    (void)stream;
    return give_back(pointer);
}

CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t size) {
    return size ? AS_DRIVER(cudaMalloc((void **)pointer, size)) : refuse(CUDA_ERROR_INVALID_VALUE);
}

CUresult cuMemFree_v2(CUdeviceptr pointer) { return AS_DRIVER(cudaFree((void *)pointer)); }

cudaError_t cudaMemGetInfo(size_t *left, size_t *all) {
    if (!device_count) return fail(cudaErrorNoDevice);
    const struct device *device = &devices[current_device];
    pthread_mutex_lock(&lock);
    if (all) *all = device->memory;
    if (left) *left = device->memory - device->used;
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

CUresult cuMemGetInfo_v2(size_t *left, size_t *all) { return AS_DRIVER(cudaMemGetInfo(left, all)); }

CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr pointer) {
    struct block found = find_block((void *)pointer);
    if (!found.size || found.device < 0) return refuse(CUDA_ERROR_NOT_FOUND);
    if (base) *base = (CUdeviceptr)found.address;
    if (size) *size = found.size;
    return CUDA_SUCCESS;
}

/* Pinned memory */

/* Behind the last block that has some of these bytes; 0 where none has. */
static size_t find_overlap(const char *start, size_t size) {
    size_t place = find_place(start + size - 1);
    return place && blocks[place - 1].address + blocks[place - 1].size > start ? place : 0;
}

static cudaError_t pin(void *pointer, size_t size, int device) {
    char *start = pointer;
    pthread_mutex_lock(&lock);
    size_t taken;
    /* Memory is new only where a caller's was freed before it was let go. */
    while ((taken = find_overlap(start, size)) && device == -1) remove_block(taken - 1);
    int is_added = !taken && add_block((struct block){start, start, size, device});
    pthread_mutex_unlock(&lock);
    if (is_added) return cudaSuccess;
    return fail(taken ? cudaErrorHostMemoryAlreadyRegistered : cudaErrorMemoryAllocation);
}

cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    (void)flags;
    if (!pointer) return fail(cudaErrorInvalidValue);
    *pointer = NULL;
    if (!size) return cudaSuccess;
    if (posix_memalign(pointer, PAGE, size)) return fail(cudaErrorMemoryAllocation);
    cudaError_t error = pin(*pointer, size, -1);
    if (error) {
        free(*pointer);
        *pointer = NULL;
    }
    return error;
}

cudaError_t cudaMallocHost(void **pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }

cudaError_t cudaFreeHost(void *pointer) {
    if (!pointer) return cudaSuccess;
    struct block block = take_block(pointer, -1);
    if (!block.size) return fail(cudaErrorInvalidValue);
    forget_reads(pointer, block.size);
    free(pointer);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *pointer, size_t size, unsigned flags) {
    (void)flags;
    if (!pointer || !size || size > UINTPTR_MAX - (uintptr_t)pointer)
        return fail(cudaErrorInvalidValue);
    return pin(pointer, size, -2);
}

cudaError_t cudaHostUnregister(void *pointer) {
    struct block block = take_block(pointer, -2);
    if (!block.size) return fail(cudaErrorHostMemoryNotRegistered);
    /* It stays, as memory that may be read without a call. */
    size_t unread = forget_reads(pointer, block.size);
    return unread ? refuse_read(unread) : cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags) {
    (void)flags;
    if (!device) return fail(cudaErrorInvalidValue);
    *device = host;
    return cudaSuccess;
}

/* What a pointer is */

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes,
                                     const void *pointer) {
    struct block found = find_block(pointer);
    if (!attributes) return fail(cudaErrorInvalidValue);
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = current_device;
    if (!found.size) return cudaSuccess;
    attributes->type = found.device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    attributes->devicePointer = (void *)pointer;
    if (found.device < 0) attributes->hostPointer = (void *)pointer;
    else attributes->device = found.device;
    return cudaSuccess;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    struct block found = find_block((void *)pointer);
    if (!found.size || !value) return refuse(CUDA_ERROR_INVALID_VALUE);
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)value = pointer; break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
        *(unsigned *)value = found.device < 0 ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
        break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
        *(int *)value = found.device < 0 ? current_device : found.device;
        break;
    case CU_POINTER_ATTRIBUTE_CONTEXT:
        *(CUcontext *)value = (CUcontext)(uintptr_t)(found.device < 0 ? 0 : found.device + 1);
        break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(unsigned *)value = 0; break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
        *(CUdeviceptr *)value = (CUdeviceptr)found.address;
        break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t *)value = found.size; break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
        *(unsigned long long *)value = (uintptr_t)found.address;
        break;
    case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS: *(unsigned *)value = 0; break;
    default:
        return (CUresult)explain(CUDA_ERROR_NOT_SUPPORTED, "cuPointerGetAttribute: attribute %d",
                                 attribute);
    }
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *names, void **values,
                                CUdeviceptr pointer) {
    CUresult error = CUDA_SUCCESS;
    for (unsigned i = 0; i < count && !error; i++)
        error = cuPointerGetAttribute(values[i], names[i], pointer);
    return error;
}
