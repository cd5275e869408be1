/* Copies between host and devices, and what is filled; all of it over the second mapping.
 *
 * Where nothing may be read back, a copy to pageable memory is an error at once, and one to pinned
 * memory when somebody waits for it: until then it may go back to the device unread, which is what
 * inductor's tuning does with arguments that a kernel changes. Whoever waits first is told, once: a
 * build ends by that. What went back and is then read all the same, by the host's own instructions,
 * is not seen here.
 */
#include "stand_in.h"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define WORTH_GIVING_BACK (64 << 10) /* bytes of zeros that are a hole and no pages */

/* What came from a device into pinned memory and did not go back, byte by byte, no byte twice:
 * of all threads, since any of them may be the one that waits. */
static struct range {
    const char *start, *end;
} *unread;
static size_t unread_count, unread_room;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
SURVIVES_FORK(lock)
static int is_forbidden;

/* Once: what a program does to its environment later changes nothing. */
__attribute__((constructor)) static void find_whether_to_read(void) {
    const char *text = getenv("STAND_IN_READS");
    is_forbidden = text && !strcmp(text, "no");
}

cudaError_t refuse_read(size_t size) {
    return keep(explain(cudaErrorNotPermitted,
                        "%zu bytes are read back from a device that computes nothing (stand-in)",
                        size));
}

cudaError_t take_reads(void) {
    size_t size = 0;
    pthread_mutex_lock(&lock);
    while (unread_count) {
        struct range *each = &unread[--unread_count];
        size += each->end - each->start;
    }
    pthread_mutex_unlock(&lock);
    return size ? refuse_read(size) : cudaSuccess;
}

static int make_room(void) {
    if (unread_count + 2 <= unread_room) return 1;
    struct range *moved = realloc(unread, (2 * unread_room + 64) * sizeof *unread);
    if (!moved) return 0;
    unread = moved;
    unread_room = 2 * unread_room + 64;
    return 1;
}

/* Take these bytes out of what is unread: how many of them were. */
static size_t cut_range(const char *start, const char *end) {
    size_t size = 0;
    for (size_t i = unread_count; i-- > 0;) {
        struct range each = unread[i];
        if (end <= each.start || start >= each.end || !make_room()) continue;
        unread[i] = unread[--unread_count];
        if (each.start < start) unread[unread_count++] = (struct range){each.start, start};
        if (end < each.end) unread[unread_count++] = (struct range){end, each.end};
        size += (end < each.end ? end : each.end) - (start > each.start ? start : each.start);
    }
    return size;
}

size_t forget_reads(const void *pointer, size_t size) {
    if (!is_forbidden) return 0;
    pthread_mutex_lock(&lock);
    size = cut_range(pointer, (const char *)pointer + size);
    pthread_mutex_unlock(&lock);
    return size;
}

static int is_unread(const char *start, size_t size) {
    int found = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < unread_count && !found; i++)
        found = start < unread[i].end && start + size > unread[i].start;
    pthread_mutex_unlock(&lock);
    return found;
}

static cudaError_t note_read(const char *target, size_t size, int waits) {
    int noted = 0;
    if (!waits && is_pinned(target, size)) {
        pthread_mutex_lock(&lock);
        cut_range(target, target + size);
        if ((noted = make_room()))
            unread[unread_count++] = (struct range){target, target + size};
        pthread_mutex_unlock(&lock);
    }
    return noted ? cudaSuccess : refuse_read(size);
}

static cudaError_t check_range(const void *pointer, size_t size) {
    if (is_lost) return fail(cudaErrorInitializationError);
    if (!pointer && size) return fail(cudaErrorInvalidValue);
    size_t left = stand_in_left(pointer);
    return !left || size <= left ? cudaSuccess : fail(cudaErrorInvalidValue);
}

static cudaError_t copy(void *target, const void *source, size_t size, int waits) {
    cudaError_t error = check_range(target, size);
    if (!error) error = check_range(source, size);
    int to_device = is_device(target), from_device = is_device(source);
    if (error || !size) return error;
    if (is_forbidden && !to_device) {
        if (from_device || is_unread(source, size)) error = note_read(target, size, waits);
        else forget_reads(target, size); /* other bytes lie there now */
    }
    if (error) return error;
    if (to_device && !from_device) forget_reads(source, size);
    note("copy %zu %s%s", size, from_device ? "device" : "host",
         to_device ? " to device" : " to host");
    memmove(stand_in_host(target), stand_in_host(source), size);
    return cudaSuccess;
}

static cudaError_t copy_on(cudaStream_t stream, void *target, const void *source, size_t size) {
    if (!is_capturing(stream)) return copy(target, source, size, 0);
    add_node(stream);
    return cudaSuccess;
}

/* What waits for its own copy waits for those before it. */
static cudaError_t copy_now(void *target, const void *source, size_t size) {
    cudaError_t error = refuse_in_capture();
    if (!error) error = copy(target, source, size, 1);
    return error ? error : take_reads();
}

cudaError_t cudaMemcpy(void *target, const void *source, size_t size, enum cudaMemcpyKind kind) {
    (void)kind;
    return copy_now(target, source, size);
}

cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    (void)kind;
    return copy_on(stream, target, source, size);
}

cudaError_t cudaMemcpyPeer(void *target, int to, const void *source, int from, size_t size) {
    (void)to, (void)from;
    return copy_now(target, source, size);
}

cudaError_t cudaMemcpyPeerAsync(void *target, int to, const void *source, int from, size_t size,
                                cudaStream_t stream) {
    (void)to, (void)from;
    return copy_on(stream, target, source, size);
}

cudaError_t cudaMemcpy2DAsync(void *target, size_t target_pitch, const void *source,
                              size_t source_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)kind;
    if (width > target_pitch || width > source_pitch) return fail(cudaErrorInvalidPitchValue);
    cudaError_t error = cudaSuccess;
    for (size_t row = 0; row < height && !error; row++)
        error = copy_on(stream, (char *)target + row * target_pitch,
                        (const char *)source + row * source_pitch, width);
    return error;
}

cudaError_t cudaMemcpy2D(void *target, size_t target_pitch, const void *source, size_t source_pitch,
                         size_t width, size_t height, enum cudaMemcpyKind kind) {
    cudaError_t error = refuse_in_capture();
    if (!error)
        error = cudaMemcpy2DAsync(target, target_pitch, source, source_pitch, width, height, kind, 0);
    return error ? error : take_reads();
}

/* A variable of a kernel that is not run: what is written there, nobody reads. */
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *source, size_t size, size_t offset,
                               enum cudaMemcpyKind kind) {
    (void)symbol, (void)source, (void)size, (void)offset, (void)kind;
    return cudaSuccess;
}

CUresult cuMemcpy(CUdeviceptr target, CUdeviceptr source, size_t size) {
    return AS_DRIVER(copy_now((void *)target, (void *)source, size));
}
CUresult cuMemcpyAsync(CUdeviceptr target, CUdeviceptr source, size_t size, CUstream stream) {
    return AS_DRIVER(copy_on(stream, (void *)target, (void *)source, size));
}
CUresult cuMemcpyHtoD_v2(CUdeviceptr target, const void *source, size_t size) {
    return AS_DRIVER(copy_now((void *)target, source, size));
}
CUresult cuMemcpyDtoH_v2(void *target, CUdeviceptr source, size_t size) {
    return AS_DRIVER(copy_now(target, (void *)source, size));
}
CUresult cuMemcpyDtoD_v2(CUdeviceptr target, CUdeviceptr source, size_t size) {
    return AS_DRIVER(copy_now((void *)target, (void *)source, size));
}
CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr target, const void *source, size_t size,
                              CUstream stream) {
    return AS_DRIVER(copy_on(stream, (void *)target, source, size));
}
CUresult cuMemcpyDtoHAsync_v2(void *target, CUdeviceptr source, size_t size, CUstream stream) {
    return AS_DRIVER(copy_on(stream, target, (void *)source, size));
}
CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr target, CUdeviceptr source, size_t size,
                              CUstream stream) {
    return AS_DRIVER(copy_on(stream, (void *)target, (void *)source, size));
}

/* Values of 1, 2 or 4 bytes, `count` times; pages of zeros are given back. */
static cudaError_t fill(void *pointer, unsigned value, int width, size_t count) {
    if (count > SIZE_MAX / width) return fail(cudaErrorInvalidValue);
    cudaError_t error = check_range(pointer, width * count);
    if (error) return error;
    char *start = stand_in_host(pointer), *end = start + width * count;
    if (!value && is_device(pointer) && width * count >= WORTH_GIVING_BACK) {
        char *first = start + (-(uintptr_t)start & (PAGE - 1)),
             *behind = end - ((uintptr_t)end & (PAGE - 1));
        memset(start, 0, first - start);
        memset(behind, 0, end - behind);
        if (madvise(first, behind - first, MADV_REMOVE)) memset(first, 0, behind - first);
        return cudaSuccess;
    }
    if (width == 1) memset(start, (int)value, count);
    for (char *at = start; width > 1 && at < end; at += width) memcpy(at, &value, width);
    return cudaSuccess;
}

static cudaError_t fill_on(cudaStream_t stream, void *pointer, unsigned value, int width,
                           size_t count) {
    if (!is_capturing(stream)) return fill(pointer, value, width, count);
    add_node(stream);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *pointer, int value, size_t size) {
    return fill(pointer, value & 0xff, 1, size);
}
cudaError_t cudaMemsetAsync(void *pointer, int value, size_t size, cudaStream_t stream) {
    return fill_on(stream, pointer, value & 0xff, 1, size);
}
CUresult cuMemsetD8_v2(CUdeviceptr pointer, unsigned char value, size_t count) {
    return AS_DRIVER(fill((void *)pointer, value, 1, count));
}
CUresult cuMemsetD32_v2(CUdeviceptr pointer, unsigned value, size_t count) {
    return AS_DRIVER(fill((void *)pointer, value, 4, count));
}
CUresult cuMemsetD8Async(CUdeviceptr pointer, unsigned char value, size_t count, CUstream stream) {
    return AS_DRIVER(fill_on(stream, (void *)pointer, value, 1, count));
}
CUresult cuMemsetD32Async(CUdeviceptr pointer, unsigned value, size_t count, CUstream stream) {
    return AS_DRIVER(fill_on(stream, (void *)pointer, value, 4, count));
}
