/* Events: two of them are always 1 ms apart, so that tuning takes its first choice, everywhere. */
#include "stand_in.h"
#include <stdlib.h>

struct event {
    int recorded;
    unsigned flags;
    unsigned long long capture;
};

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    if (!event) return fail(cudaErrorInvalidValue);
    struct event *made = make(EVENT, sizeof *made);
    if (!made) return fail(cudaErrorMemoryAllocation);
    made->flags = flags;
    *event = (cudaEvent_t)made;
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    if (!let_go(EVENT, event)) return fail(cudaErrorInvalidResourceHandle);
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    struct event *recorded = (struct event *)event;
    cudaError_t error = check_stream(stream);
    (void)flags;
    if (!is_held(EVENT, event)) error = fail(cudaErrorInvalidResourceHandle);
    if (error) return error;
    note("event recorded");
    recorded->recorded = 1;
    recorded->capture = read_capture(stream);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return cudaEventRecordWithFlags(event, stream, 0);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    cudaError_t error = check_stream(stream);
    (void)flags;
    if (!is_held(EVENT, event)) error = fail(cudaErrorInvalidResourceHandle);
    if (error) return error;
    join_capture(stream, ((struct event *)event)->capture);
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (!is_held(EVENT, event)) return fail(cudaErrorInvalidResourceHandle);
    note("event asked");
    cudaError_t error = refuse_in_capture();
    return error ? error : wait_for(((struct event *)event)->capture);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaEventQuery(event); }

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    struct event *first = (struct event *)start, *second = (struct event *)end;
    if (!ms) return fail(cudaErrorInvalidValue);
    if (!is_held(EVENT, start) || !is_held(EVENT, end) || !first->recorded || !second->recorded)
        return fail(cudaErrorInvalidResourceHandle);
    *ms = 1;
    return cudaSuccess;
}
