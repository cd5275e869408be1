/* libnvidia-ml.so.1: what is asked of it without a context. It sees all devices, hidden or not. */
#include "chips.h"
#include <dlfcn.h>

#ifndef CUDA_VERSION
#error "CUDA_VERSION is the toolkit's, as cuda.h has it"
#endif

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
struct memory {
    unsigned long long total, free, used;
};
struct memory_v2 {
    unsigned version;
    unsigned long long total, reserved, free, used;
};
struct pci {
    char legacy_id[16];
    unsigned domain, bus, device, ids, subsystem;
    char id[32];
};

static const struct chip *chips[MOST_DEVICES];
static int count;

/* A handle is the place of its chip among the installed ones. */
typedef const struct chip **handle;

static int find_index(handle device) {
    return device >= chips && device < chips + count ? (int)(device - chips) : -1;
}

static int copy_text(char *target, unsigned size, const char *text) {
    if (size <= strlen(text)) return INSUFFICIENT_SIZE;
    strcpy(target, text);
    return SUCCESS;
}

int nvmlInit_v2(void) {
    count = read_installed(chips);
    return SUCCESS;
}
int nvmlInit(void) { return nvmlInit_v2(); }
int nvmlInitWithFlags(unsigned flags) { return (void)flags, nvmlInit_v2(); }
int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int error) {
    switch (error) {
    case SUCCESS: return "Success";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    default: return "Unknown Error";
    }
}

int nvmlSystemGetDriverVersion(char *version, unsigned size) {
    return copy_text(version, size, STAND_IN_DRIVER);
}
int nvmlSystemGetNVMLVersion(char *version, unsigned size) {
    return copy_text(version, size, STAND_IN_DRIVER);
}
int nvmlSystemGetCudaDriverVersion(int *version) { return *version = CUDA_VERSION, SUCCESS; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = CUDA_VERSION, SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *found) { return *found = (unsigned)count, SUCCESS; }
int nvmlDeviceGetCount(unsigned *found) { return nvmlDeviceGetCount_v2(found); }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, handle *device) {
    if (index >= (unsigned)count) return INVALID_ARGUMENT;
    *device = chips + index;
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex(unsigned index, handle *device) {
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

int nvmlDeviceGetHandleByUUID(const char *wanted, handle *device) {
    char uuid[48];
    for (int i = 0; i < count; i++) {
        write_uuid(uuid, sizeof uuid, i);
        if (!strcmp(uuid, wanted)) return *device = chips + i, SUCCESS;
    }
    return NOT_FOUND;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *wanted, handle *device) {
    char id[32];
    for (int i = 0; i < count; i++) {
        write_bus_id(id, sizeof id, i);
        size_t longer = strlen(wanted) > strlen(id) ? strlen(wanted) - strlen(id)
                                                    : 0; /* a domain of 8 digits */
        if (!strcasecmp(id, wanted + longer)) return *device = chips + i, SUCCESS;
    }
    return NOT_FOUND;
}
int nvmlDeviceGetHandleByPciBusId(const char *wanted, handle *device) {
    return nvmlDeviceGetHandleByPciBusId_v2(wanted, device);
}

int nvmlDeviceGetIndex(handle device, unsigned *index) {
    int found = find_index(device);
    return found < 0 ? INVALID_ARGUMENT : (*index = (unsigned)found, SUCCESS);
}
int nvmlDeviceGetMinorNumber(handle device, unsigned *number) {
    return nvmlDeviceGetIndex(device, number);
}

int nvmlDeviceGetName(handle device, char *name, unsigned size) {
    if (find_index(device) < 0) return INVALID_ARGUMENT;
    write_name(name, size, *device);
    return SUCCESS;
}

int nvmlDeviceGetUUID(handle device, char *uuid, unsigned size) {
    if (find_index(device) < 0) return INVALID_ARGUMENT;
    write_uuid(uuid, size, find_index(device));
    return SUCCESS;
}

int nvmlDeviceGetPciInfo_v3(handle device, struct pci *pci) {
    int index = find_index(device);
    if (index < 0) return INVALID_ARGUMENT;
    memset(pci, 0, sizeof *pci);
    pci->bus = (unsigned)index + 1;
    write_bus_id(pci->legacy_id, sizeof pci->legacy_id, index);
    write_bus_id(pci->id, sizeof pci->id, index);
    return SUCCESS;
}
int nvmlDeviceGetPciInfo_v2(handle device, struct pci *pci) {
    return nvmlDeviceGetPciInfo_v3(device, pci);
}

int nvmlDeviceGetCudaComputeCapability(handle device, int *major, int *minor) {
    if (find_index(device) < 0) return INVALID_ARGUMENT;
    *major = (*device)->sm / 10;
    *minor = (*device)->sm % 10;
    return SUCCESS;
}

/* Used is what this very process has: nobody else has any of a device that is not there. */
int nvmlDeviceGetMemoryInfo(handle device, struct memory *memory) {
    int index = find_index(device);
    if (index < 0) return INVALID_ARGUMENT;
    size_t (*ask)(int) = (size_t (*)(int))dlsym(RTLD_DEFAULT, "stand_in_used");
    memory->total = read_memory(*device);
    memory->used = ask ? ask(index) : 0;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(handle device, struct memory_v2 *memory) {
    struct memory plain;
    int error = nvmlDeviceGetMemoryInfo(device, &plain);
    if (error) return error;
    memory->total = plain.total;
    memory->reserved = 0;
    memory->free = plain.free;
    memory->used = plain.used;
    return SUCCESS;
}

/* No other process is on it. */
int nvmlDeviceGetComputeRunningProcesses_v3(handle device, unsigned *number, void *processes) {
    return (void)device, (void)processes, *number = 0, SUCCESS;
}
int nvmlDeviceGetComputeRunningProcesses_v2(handle d, unsigned *n, void *p) {
    return nvmlDeviceGetComputeRunningProcesses_v3(d, n, p);
}
int nvmlDeviceGetComputeRunningProcesses(handle d, unsigned *n, void *p) {
    return nvmlDeviceGetComputeRunningProcesses_v3(d, n, p);
}

/* What torch looks up by name when it is first asked for another process's memory or links. */
int nvmlDeviceGetNvLinkRemoteDeviceType(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkRemotePciInfo_v2(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetGpuFabricInfoV(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetUtilizationRates(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetTemperature(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetPowerUsage(void) { return NOT_SUPPORTED; }
int nvmlDeviceGetClockInfo(void) { return NOT_SUPPORTED; }
