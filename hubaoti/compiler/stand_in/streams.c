/* Streams and graphs: work is over when it is asked for, and a captured graph only counts it.
 *
 * What a GPU refuses while a graph is captured is refused here, so that host code which would fail
 * there fails here.
 */
#include "stand_in.h"
#include <stdlib.h>

/* A capture is a number; the stream that began it, and those that wait for its events, are in it. */
struct stream {
    unsigned flags;
    int priority, device;
    unsigned long long capture;
};
struct graph {
    size_t nodes;
};
static struct capture {
    unsigned long long id;
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    struct stream *origin;
    struct graph *graph;
    int invalid;
} captures[64];
static unsigned long long next_capture = 1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
SURVIVES_FORK(lock)
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

/* NULL, the legacy stream (1) and the one of each thread (2) are no objects, and are never captured. */
static struct stream *find_stream(cudaStream_t stream) {
    return is_held(STREAM, stream) ? (struct stream *)stream : NULL;
}

int is_stream(cudaStream_t stream) { return (size_t)stream <= 2 || is_held(STREAM, stream); }

cudaError_t check_stream(cudaStream_t stream) {
    return is_stream(stream) ? cudaSuccess : fail(cudaErrorInvalidResourceHandle);
}

static struct capture *find_capture(unsigned long long id) {
    for (size_t i = 0; id && i < sizeof captures / sizeof *captures; i++)
        if (captures[i].id == id) return &captures[i];
    return NULL;
}

/* Under the lock; the stream is found before it is taken, so that no two locks are. */
static struct capture *find_capture_of(const struct stream *stream) {
    return stream ? find_capture(stream->capture) : NULL;
}

int is_capturing(cudaStream_t stream) { return read_capture(stream) != 0; }

void add_node(cudaStream_t stream) {
    struct stream *asked = find_stream(stream);
    pthread_mutex_lock(&lock);
    struct capture *found = find_capture_of(asked);
    if (found) found->graph->nodes++;
    pthread_mutex_unlock(&lock);
}

static cudaError_t invalidate(struct capture *capture) {
    capture->invalid = 1;
    return fail(cudaErrorStreamCaptureUnsupported);
}

cudaError_t refuse_in_capture(void) {
    cudaError_t error = cudaSuccess;
    if (thread_mode == cudaStreamCaptureModeRelaxed) return error;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < sizeof captures / sizeof *captures; i++) {
        struct capture *each = &captures[i];
        int ours = each->id && pthread_equal(each->thread, pthread_self());
        int other =
            each->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
        if (each->id && each->mode != cudaStreamCaptureModeRelaxed && (ours || other))
            error = invalidate(each);
    }
    pthread_mutex_unlock(&lock);
    return error;
}

unsigned long long read_capture(cudaStream_t stream) {
    struct stream *asked = find_stream(stream);
    pthread_mutex_lock(&lock);
    struct capture *found = find_capture_of(asked);
    unsigned long long id = found ? found->id : 0;
    pthread_mutex_unlock(&lock);
    return id;
}

void join_capture(cudaStream_t stream, unsigned long long id) {
    struct stream *asked = find_stream(stream);
    pthread_mutex_lock(&lock);
    if (asked && find_capture(id)) asked->capture = id;
    pthread_mutex_unlock(&lock);
}

/* Waiting for what a capturing stream does has no end: a GPU refuses it, in every mode. */
static cudaError_t refuse_waiting(unsigned long long id) {
    pthread_mutex_lock(&lock);
    struct capture *found = find_capture(id);
    cudaError_t error = found ? invalidate(found) : cudaSuccess;
    pthread_mutex_unlock(&lock);
    return error;
}

cudaError_t wait_for(unsigned long long capture) {
    cudaError_t error = refuse_waiting(capture);
    return error ? error : take_reads();
}

/* Streams */

static cudaError_t make_stream(cudaStream_t *stream, unsigned flags, int priority) {
    if (!stream) return fail(cudaErrorInvalidValue);
    struct stream *made = make(STREAM, sizeof *made);
    if (!made) return fail(cudaErrorMemoryAllocation);
    made->flags = flags;
    made->priority = priority;
    made->device = current_device;
    *stream = (cudaStream_t)made;
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return make_stream(stream, 0, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return make_stream(stream, flags, 0);
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return make_stream(stream, flags, priority);
}
CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    return AS_DRIVER(make_stream(stream, flags, 0));
}

static void drop_graph(struct graph *graph) {
    if (let_go(GRAPH, graph)) free(graph);
}

/* A capture ends with the stream that began it. */
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    struct graph *graph = NULL;
    if (!let_go(STREAM, stream)) return fail(cudaErrorInvalidResourceHandle);
    pthread_mutex_lock(&lock);
    struct capture *found = find_capture_of((struct stream *)stream);
    if (found && found->origin == (struct stream *)stream) {
        graph = found->graph;
        found->id = 0;
    }
    pthread_mutex_unlock(&lock);
    if (graph) drop_graph(graph);
    free(stream);
    return cudaSuccess;
}
CUresult cuStreamDestroy_v2(CUstream stream) { return AS_DRIVER(cudaStreamDestroy(stream)); }

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    struct stream *found = find_stream(stream);
    *priority = found ? found->priority : 0;
    return cudaSuccess;
}

cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned *flags) {
    struct stream *found = find_stream(stream);
    *flags = found ? found->flags : 0;
    return cudaSuccess;
}

cudaError_t cudaStreamGetDevice(cudaStream_t stream, int *device) {
    struct stream *found = find_stream(stream);
    *device = found ? found->device : current_device;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    cudaError_t error = check_stream(stream);
    return error ? error : wait_for(read_capture(stream));
}
CUresult cuStreamSynchronize(CUstream stream) { return AS_DRIVER(cudaStreamSynchronize(stream)); }
cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }

cudaError_t cudaDeviceSynchronize(void) {
    cudaError_t error = refuse_in_capture();
    return error ? error : take_reads();
}
CUresult cuCtxSynchronize(void) { return AS_DRIVER(cudaDeviceSynchronize()); }

/* What the host does in a stream is done at once, as by one who waited for what is before it; in a
 * graph, at its launch, which does nothing. */
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *argument) {
    if (is_capturing(stream)) return add_node(stream), cudaSuccess;
    cudaError_t error = take_reads();
    if (!error) function(argument);
    return error;
}

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function,
                                  void *argument, unsigned flags) {
    (void)flags;
    if (is_capturing(stream)) return fail(cudaErrorStreamCaptureUnsupported);
    cudaError_t error = take_reads();
    if (!error) function(stream, cudaSuccess, argument);
    return error;
}

/* Captures */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    struct stream *found = find_stream(stream);
    if (!found) return fail(cudaErrorStreamCaptureUnsupported);
    struct graph *graph = make(GRAPH, sizeof *graph);
    cudaError_t error = graph ? cudaErrorStreamCaptureUnsupported : cudaErrorMemoryAllocation;
    pthread_mutex_lock(&lock);
    for (size_t i = 0;
         graph && i < sizeof captures / sizeof *captures && !find_capture(found->capture); i++) {
        if (captures[i].id) continue;
        captures[i] = (struct capture){next_capture++, mode, pthread_self(), found, graph, 0};
        found->capture = captures[i].id;
        error = cudaSuccess;
        break;
    }
    pthread_mutex_unlock(&lock);
    note("capture begins");
    if (error) drop_graph(graph);
    return fail(error);
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    struct capture ended = {0};
    struct stream *asked = find_stream(stream);
    if (!graph) return fail(cudaErrorInvalidValue);
    *graph = NULL;
    pthread_mutex_lock(&lock);
    struct capture *found = find_capture_of(asked);
    int foreign = found && found->mode != cudaStreamCaptureModeRelaxed &&
                  !pthread_equal(found->thread, pthread_self());
    if (found && found->origin == asked && !foreign) {
        ended = *found;
        found->id = 0;
    }
    pthread_mutex_unlock(&lock);
    if (foreign) return fail(cudaErrorStreamCaptureWrongThread);
    if (!ended.id) return fail(found ? cudaErrorStreamCaptureUnmatched : cudaErrorIllegalState);
    note("capture of %zu nodes", ended.graph->nodes);
    if (ended.invalid) {
        drop_graph(ended.graph);
        return fail(cudaErrorStreamCaptureInvalidated);
    }
    *graph = (cudaGraph_t)ended.graph;
    return cudaSuccess;
}

static enum cudaStreamCaptureStatus read_status(cudaStream_t stream, unsigned long long *id,
                                                cudaGraph_t *graph) {
    enum cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    struct stream *asked = find_stream(stream);
    pthread_mutex_lock(&lock);
    struct capture *found = find_capture_of(asked);
    if (found)
        status =
            found->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    if (found && id) *id = found->id;
    if (found && graph) *graph = (cudaGraph_t)found->graph;
    pthread_mutex_unlock(&lock);
    return status;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = read_status(stream, NULL, NULL);
    return cudaSuccess;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    *status = (CUstreamCaptureStatus)read_status(stream, NULL, NULL);
    return CUDA_SUCCESS;
}

static cudaError_t describe_capture(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                    unsigned long long *id, cudaGraph_t *graph,
                                    const cudaGraphNode_t **dependencies, size_t *count) {
    if (dependencies) *dependencies = NULL;
    if (count) *count = 0;
    *status = read_status(stream, id, graph);
    return cudaSuccess;
}

#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count) {
    if (edges) *edges = NULL;
    return describe_capture(stream, status, id, graph, dependencies, count);
}
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                        unsigned long long *id, cudaGraph_t *graph,
                                        const cudaGraphNode_t **dependencies, size_t *count) {
    return describe_capture(stream, status, id, graph, dependencies, count);
}
#endif

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

/* Graphs */

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    if (!is_held(GRAPH, graph) || !count) return fail(cudaErrorInvalidValue);
    if (nodes) return keep(refuse_unknown("cudaGraphGetNodes", cudaErrorNotSupported));
    *count = ((struct graph *)graph)->nodes;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph,
                                          unsigned long long flags) {
    (void)flags;
    if (!is_held(GRAPH, graph) || !made) return fail(cudaErrorInvalidValue);
    struct graph *copied = make(GRAPH, sizeof *copied);
    if (!copied) return fail(cudaErrorMemoryAllocation);
    *copied = *(struct graph *)graph;
    *made = (cudaGraphExec_t)copied;
    return cudaSuccess;
}

#if CUDART_VERSION >= 12000
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph,
                                 unsigned long long flags) {
    return cudaGraphInstantiateWithFlags(made, graph, flags);
}
#endif

/* One that a stream still captures into is not given back. */
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    int is_used = !is_held(GRAPH, graph);
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < sizeof captures / sizeof *captures; i++)
        is_used |= captures[i].id && captures[i].graph == (struct graph *)graph;
    pthread_mutex_unlock(&lock);
    if (is_used) return fail(cudaErrorInvalidValue);
    return drop_graph((struct graph *)graph), cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
    return cudaGraphDestroy((cudaGraph_t)graph);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    if (!is_held(GRAPH, graph)) return fail(cudaErrorInvalidValue);
    if (is_capturing(stream)) add_node(stream);
    note("replay of %zu nodes", ((struct graph *)graph)->nodes);
    return cudaSuccess;
}
