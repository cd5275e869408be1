/* What the stand-in's files know of each other; nothing of it is seen outside.
 *
 * Preloaded as libcuda.so.1, the stand-in stands before libcudart, libcuda, cuBLAS, cuDNN and their
 * like: torch, inductor, triton and AOTInductor's packages find GPUs of the capabilities in
 * STAND_IN_SM, and their host code does all that it would do there. Kernels are loaded, checked and
 * not run, so what they would have written stays as it was.
 *
 *   STAND_IN_SM=90,80   a device each
 *   STAND_IN_MEMORY=N   bytes of each; by default what its data sheet says
 *   STAND_IN_LOG=FILE   a line for each call that a test may want to see
 *   STAND_IN_READS=no   nothing was computed, so whoever waits for a copy to the host gets an error
 */
#ifndef STAND_IN_H
#define STAND_IN_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stddef.h>

/* What torch imports by the name that it has here: CUDA 12's headers give these a number. */
#if CUDART_VERSION >= 13000
#undef cudaGetDeviceProperties
#endif
#undef cudaStreamGetCaptureInfo

#define OUTSIDE __attribute__((visibility("default")))
#pragma GCC visibility push(hidden)

struct device {
    const struct chip *chip;
    size_t memory, used;
    int installed; /* its place among all, where CUDA_VISIBLE_DEVICES hides some */
};
extern struct device devices[];
extern int device_count;
extern __thread int current_device;

/* A lock that a process has which was forked while another thread held it. */
#define SURVIVES_FORK(lock)                                                                        \
    static void take_lock(void) { pthread_mutex_lock(&lock); }                                     \
    static void leave_lock(void) { pthread_mutex_unlock(&lock); }                                  \
    __attribute__((constructor)) static void keep_lock(void) {                                     \
        pthread_atfork(take_lock, leave_lock, leave_lock);                                         \
    }

enum kind { MEMORY, PINNED, STREAM, EVENT, GRAPH, MODULE, FUNCTION, HANDLE, KINDS };
void count_live(enum kind kind, int change);
void *make(enum kind kind, size_t size); /* of zeros; NULL without memory */
int hold(enum kind kind, const void *made);
int is_held(enum kind kind, const void *handle);
int let_go(enum kind kind, const void *handle); /* 0 where nothing of the kind is there */
int make_handle(void *out, size_t size); /* 0 where `out` takes no handle */
void drop_handle(void *handle);

/* An error has CUDA's own words, or those that it is explained by: until this thread has another
 * error, so that each has to come from one of these four. */
int explain(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));
cudaError_t keep(int error);         /* the runtime's, explained or none: for cudaGetLastError */
cudaError_t fail(cudaError_t error); /* the runtime's, that is not explained */
CUresult refuse(CUresult error);     /* the driver's, that is not explained; the driver keeps none */
extern __thread cudaError_t last_error;
/* What a function of the runtime's says, as the driver's. */
#define AS_DRIVER(call)                                                                            \
    ({                                                                                             \
        cudaError_t before = last_error;                                                           \
        CUresult said = (CUresult)(call);                                                          \
        last_error = before;                                                                       \
        said;                                                                                      \
    })
/* That of a function which nobody wrote: it is named, also where only its status is seen. */
int refuse_unknown(const char *name, int status);
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Memory */
#define PAGE 4096
extern int is_lost; /* in a process that was forked from one which had memory of a device */
int is_device(const void *pointer);
int is_pinned(const void *pointer, size_t size);
int is_host(const void *pointer); /* neither NULL nor a device's */
/* Where nothing may be read back: an error where somebody waits for what was copied to the host;
 * bytes that nobody can wait for any more, how many of them nobody had waited for; that error. */
cudaError_t take_reads(void);
size_t forget_reads(const void *pointer, size_t size);
cudaError_t refuse_read(size_t size);

/* Streams */
int is_stream(cudaStream_t stream);
cudaError_t check_stream(cudaStream_t stream);
/* The capture that a stream is in, by its number, or 0; one that is over is joined by nobody. */
unsigned long long read_capture(cudaStream_t stream);
void join_capture(cudaStream_t stream, unsigned long long id);
cudaError_t wait_for(unsigned long long capture); /* and for what was copied to the host */
int is_capturing(cudaStream_t stream);
void add_node(cudaStream_t stream);
cudaError_t refuse_in_capture(void); /* what no thread may do while it captures a graph */

/* Modules */
struct function {
    char *name;
    int registers, local, shared;   /* as the cubin says; bytes of static shared memory */
    unsigned required[3];           /* the block's size, where the cubin fixes it */
    int dynamic;                    /* bytes of dynamic shared memory that it was allowed */
    const struct chip *chip;
};
struct module {
    struct function *functions;
    int count;
};
/* Read a cubin for a chip; a size of 0 is not known. */
CUresult read_cubin(struct module *module, const void *start, size_t size, const struct chip *chip);
void free_module(struct module *module);

/* Launches */
struct launch {
    dim3 grid, block;
    size_t shared;
};
CUresult check_sizes(const char *name, const struct launch *launch);
int count_blocks(const struct chip *chip, int threads, int registers, size_t shared);

#pragma GCC visibility pop

/* Where this process may touch what lies at an address, and the bytes from a device's address to
 * the end of what was allocated there: for who computes launches, and for our own copies. */
void *stand_in_host(const void *pointer);
size_t stand_in_left(const void *pointer);
#endif
