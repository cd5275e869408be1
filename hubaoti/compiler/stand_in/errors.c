/* Errors in the words of CUDA, or of our own; the log; what is alive; functions by name. */
#include "stand_in.h"
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

__thread cudaError_t last_error;
static __thread int explained;
static __thread char explanation[512];

cudaError_t keep(int error) {
    if (error) last_error = (cudaError_t)error;
    return (cudaError_t)error;
}

cudaError_t fail(cudaError_t error) { return keep(refuse((CUresult)error)); }

CUresult refuse(CUresult error) {
    if (error) explained = 0;
    return error;
}

int explain(int error, const char *format, ...) {
    va_list rest;
    va_start(rest, format);
    vsnprintf(explanation, sizeof explanation, format, rest);
    va_end(rest);
    explained = error;
    note("refused: %s", explanation);
    return error;
}

int refuse_unknown(const char *name, int status) {
    char words[sizeof explanation];
    snprintf(words, sizeof words, "%s would give a value, and the stand-in has none", name);
    fprintf(stderr, "stand-in: %s\n", words);
    /* The numbers of other libraries are no errors of CUDA's. */
    if (status == cudaErrorNotSupported) explain(status, "%s", words);
    else note("refused: %s", words);
    return status;
}

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void) { return last_error; }

/* The runtime's own words; it has them without a driver, and the driver's numbers are the same. */
static const char *ask_runtime(const char *function, cudaError_t error) {
    char soname[32];
    snprintf(soname, sizeof soname, "libcudart.so.%d", CUDART_VERSION / 1000);
    void *runtime = dlopen(soname, RTLD_LAZY | RTLD_NOLOAD);
    const char *(*ask)(cudaError_t) = NULL;
    if (runtime) {
        ask = (const char *(*)(cudaError_t))dlsym(runtime, function);
        dlclose(runtime);
    }
    return ask ? ask(error) : "an error of CUDA";
}

const char *cudaGetErrorString(cudaError_t error) {
    return error && (int)error == explained ? explanation
                                            : ask_runtime("cudaGetErrorString", error);
}

const char *cudaGetErrorName(cudaError_t error) { return ask_runtime("cudaGetErrorName", error); }

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = cudaGetErrorString((cudaError_t)error);
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = cudaGetErrorName((cudaError_t)error);
    return CUDA_SUCCESS;
}

static int log_file = -1;

__attribute__((constructor)) static void open_log(void) {
    const char *path = getenv("STAND_IN_LOG");
    if (path && *path) log_file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

void note(const char *format, ...) {
    if (log_file < 0) return;
    char line[1024];
    va_list rest;
    va_start(rest, format);
    int length = vsnprintf(line, sizeof line - 1, format, rest);
    va_end(rest);
    if (length < 0) return;
    if (length > (int)sizeof line - 2) length = sizeof line - 2;
    line[length++] = '\n';
    if (write(log_file, line, length) < 0) return; /* a log that cannot be written is no log */
}

/* What is alive, for tests that see whether all is given back: "memory", "stream", … */
static const char *KIND_NAMES[KINDS] = {"memory", "pinned", "stream",   "event",
                                        "graph",  "module", "function", "handle"};
static long live[KINDS];

void count_live(enum kind kind, int change) {
    __atomic_add_fetch(&live[kind], change, __ATOMIC_RELAXED);
}

OUTSIDE long stand_in_live(const char *kind) {
    for (int i = 0; i < KINDS; i++)
        if (!strcmp(kind, KIND_NAMES[i])) return __atomic_load_n(&live[i], __ATOMIC_RELAXED);
    return -1;
}

/* The driver's functions by name; those whose interface changed are `name_v2` and on. */
static void *find_function(const char *name) {
    void *found = dlsym(RTLD_DEFAULT, name);
    for (int version = 4; !found && version > 1; version--) {
        char other[128];
        snprintf(other, sizeof other, "%s_v%d", name, version);
        found = dlsym(RTLD_DEFAULT, other);
    }
    if (!found) note("no function %s", name);
    return found;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    (void)version, (void)flags;
    *found = find_function(name);
    if (result) *result = *found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

#if CUDART_VERSION < 13000
cudaError_t cudaGetDriverEntryPoint(const char *name, void **found, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult *result) {
    return cudaGetDriverEntryPointByVersion(name, found, CUDART_VERSION, flags, result);
}
#endif

CUresult cuGetProcAddress_v2(const char *name, void **found, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *result) {
    (void)version, (void)flags;
    *found = find_function(name);
    if (result)
        *result = *found ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return refuse(*found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND);
}
