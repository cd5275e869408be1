/* Modules and launches: cubins that this device would take, and launches that it would begin.
 *
 * A kernel is not run. A process that computes launches itself (`stand_in_compute`) is given each one,
 * but those into a graph that is being captured.
 */
#include "stand_in.h"
#include "chips.h"
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define EM_CUDA_MACHINE 190
#define IMAGE_ALIGNMENT 64
/* Attributes of .nv.info, as cuobjdump names them. */
#define EIFMT_SVAL 0x04
#define EIATTR_REQNTID 0x10
#define EIATTR_FRAME_SIZE 0x11
#define EIATTR_REGCOUNT 0x2f

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

static void (*compute)(const char *name, unsigned x, unsigned y, unsigned z, void **parameters);

/* Who computes launches: called with a kernel's name, its grid and what its host code passes. */
OUTSIDE void stand_in_compute(void *callback) {
    compute = (void (*)(const char *, unsigned, unsigned, unsigned, void **))callback;
}

/* Cubins */

struct image {
    const char *start;
    const Elf64_Ehdr *head;
    const Elf64_Shdr *sections;
    const char *names;
};

static const char *name_section(const struct image *image, int i) {
    return image->names + image->sections[i].sh_name;
}

static CUresult read_image(struct image *image, const void *start) {
    const Elf64_Ehdr *head = start;
    Dl_info library;
    /* One that lies in a library may be read as it lies there; bytes of the host's are copied first. */
    if ((uintptr_t)start % IMAGE_ALIGNMENT && dladdr(start, &library))
        return (CUresult)explain(
            CUDA_ERROR_INVALID_IMAGE,
            "device kernel image is invalid: in %s it begins at no multiple of %d bytes",
            library.dli_fname, IMAGE_ALIGNMENT);
    if (memcmp(head->e_ident, ELFMAG, SELFMAG) || head->e_machine != EM_CUDA_MACHINE)
        return (CUresult)explain(CUDA_ERROR_INVALID_IMAGE,
                                 "device kernel image is invalid: it is no cubin");
    image->start = start;
    image->head = head;
    image->sections = (const Elf64_Shdr *)(image->start + head->e_shoff);
    image->names = image->start + image->sections[head->e_shstrndx].sh_offset;
    return CUDA_SUCCESS;
}

/* A cubin runs on its capability and the later ones of its major; of the `a` kind, on its own alone. */
static CUresult check_capability(const struct image *image, const struct chip *chip) {
    unsigned flags = image->head->e_flags;
    int newer = image->head->e_ident[EI_ABIVERSION] >= 8;
    int sm = newer ? flags >> 8 & 0xff : flags & 0xff, exact = flags & (newer ? 0x8 : 0x800);
    note("module sm%d%s", sm, exact ? "a" : "");
    if (exact ? sm == chip->sm : sm / 10 == chip->sm / 10 && sm <= chip->sm) return CUDA_SUCCESS;
    return (CUresult)explain(CUDA_ERROR_NO_BINARY_FOR_GPU,
                             "no kernel image is available for execution on the device: it is for "
                             "sm_%d%s, and this is sm_%d",
                             sm, exact ? "a" : "", chip->sm);
}

/* The function that a symbol of the cubin names; attributes of all functions say whose they are by it. */
static struct function *find_by_symbol(const struct image *image, struct module *module,
                                       unsigned symbol) {
    for (int i = 0; i < image->head->e_shnum; i++) {
        const Elf64_Shdr *table = &image->sections[i];
        if (table->sh_type != SHT_SYMTAB || symbol >= table->sh_size / sizeof(Elf64_Sym)) continue;
        const Elf64_Sym *found = (const Elf64_Sym *)(image->start + table->sh_offset) + symbol;
        const char *name =
            image->start + image->sections[table->sh_link].sh_offset + found->st_name;
        for (int j = 0; j < module->count; j++)
            if (!strcmp(module->functions[j].name, name)) return &module->functions[j];
    }
    return NULL;
}

static void take_attribute(const struct image *image, struct module *module,
                           struct function *function, int attribute, const uint32_t *value) {
    if (attribute == EIATTR_REQNTID && function)
        memcpy(function->required, value, sizeof function->required);
    if (attribute != EIATTR_REGCOUNT && attribute != EIATTR_FRAME_SIZE) return;
    struct function *found = find_by_symbol(image, module, value[0]);
    if (found && attribute == EIATTR_REGCOUNT) found->registers = (int)value[1];
    if (found && attribute == EIATTR_FRAME_SIZE) found->local = (int)value[1];
}

/* A section of attributes: a byte of format, one of name, and two bytes that are a value or its length. */
static void read_attributes(const struct image *image, struct module *module,
                            struct function *function, int section) {
    const char *at = image->start + image->sections[section].sh_offset,
               *end = at + image->sections[section].sh_size;
    while (at + 4 <= end) {
        unsigned char format = at[0], attribute = at[1];
        uint16_t length;
        memcpy(&length, at + 2, sizeof length);
        at += 4;
        if (format != EIFMT_SVAL) continue;
        if (length > end - at) return;
        uint32_t value[3] = {0};
        memcpy(value, at, length < sizeof value ? length : sizeof value);
        take_attribute(image, module, function, attribute, value);
        at += length;
    }
}

static void read_functions(const struct image *image, struct module *module,
                           const struct chip *chip) {
    int sections = image->head->e_shnum;
    module->functions = calloc(sections, sizeof *module->functions);
    if (!module->functions) return;
    for (int i = 0; i < sections; i++)
        if (!strncmp(name_section(image, i), ".text.", 6)) {
            struct function *made = &module->functions[module->count++];
            made->name = strdup(name_section(image, i) + 6);
            made->chip = chip;
            made->dynamic = 48 << 10;
        }
    for (int i = 0; i < sections; i++) {
        const char *name = name_section(image, i);
        for (int j = 0; j < module->count; j++) {
            struct function *each = &module->functions[j];
            if (!strncmp(name, ".nv.shared.", 11) && !strcmp(name + 11, each->name))
                each->shared = (int)image->sections[i].sh_size;
            if (!strncmp(name, ".nv.info.", 9) && !strcmp(name + 9, each->name))
                read_attributes(image, module, each, i);
        }
        if (!strcmp(name, ".nv.info")) read_attributes(image, module, NULL, i);
    }
}

CUresult cuModuleLoadData(CUmodule *made, const void *start) {
    struct image image;
    if (!device_count) return refuse(CUDA_ERROR_NO_DEVICE);
    const struct chip *chip = devices[current_device].chip;
    CUresult error = read_image(&image, start);
    if (!error) error = check_capability(&image, chip);
    if (error) return error;
    struct module *module = calloc(1, sizeof *module);
    if (!module) return refuse(CUDA_ERROR_OUT_OF_MEMORY);
    read_functions(&image, module, chip);
    *made = (CUmodule)module;
    count_live(MODULE, 1);
    return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule *made, const void *start, unsigned count,
                            CUjit_option *options, void **values) {
    (void)count, (void)options, (void)values;
    return cuModuleLoadData(made, start);
}

CUresult cuModuleLoad(CUmodule *made, const char *path) {
    struct stat status;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0 || fstat(file, &status) || status.st_size < (off_t)sizeof(Elf64_Ehdr)) {
        if (file >= 0) close(file);
        return (CUresult)explain(CUDA_ERROR_FILE_NOT_FOUND, "file not found, or no cubin: %s",
                                 path);
    }
    void *start = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    CUresult error = start == MAP_FAILED ? refuse(CUDA_ERROR_OUT_OF_MEMORY) : cuModuleLoadData(made, start);
    if (start != MAP_FAILED) munmap(start, status.st_size);
    return error;
}

CUresult cuModuleUnload(CUmodule given) {
    struct module *module = (struct module *)given;
    for (int i = 0; i < module->count; i++) free(module->functions[i].name);
    free(module->functions);
    free(module);
    count_live(MODULE, -1);
    return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *found, CUmodule given, const char *name) {
    struct module *module = (struct module *)given;
    for (int i = 0; i < module->count; i++)
        if (!strcmp(module->functions[i].name, name)) {
            *found = (CUfunction)&module->functions[i];
            return CUDA_SUCCESS;
        }
    return (CUresult)explain(CUDA_ERROR_NOT_FOUND, "named symbol not found: %s", name);
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction given) {
    struct function *function = (struct function *)given;
    switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
        *value = function->required[0] ? (int)function->required[0] : 1024;
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
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
    if (value < 0 || value + function->shared > function->chip->shared)
        return (CUresult)explain(
            CUDA_ERROR_INVALID_VALUE,
            "invalid argument: %s wants %d bytes of shared memory, and a block of sm_%d has %d",
            function->name, value + function->shared, function->chip->sm, function->chip->shared);
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
    const unsigned *required = function->required;
    size_t threads = (size_t)launch->block.x * launch->block.y * launch->block.z;
    if (required[0] && threads != (size_t)required[0] * required[1] * required[2])
        return (CUresult)explain(CUDA_ERROR_INVALID_VALUE,
                                 "invalid argument: %s with %zu threads, and it was made for %u",
                                 function->name, threads, required[0] * required[1] * required[2]);
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
    return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX,
                          c->blockDimY, c->blockDimZ, c->sharedMemBytes, c->hStream, parameters,
                          extra);
}

/* How many blocks a processor holds, by threads, registers and shared memory. */
int count_blocks(const struct chip *chip, int threads, int registers, size_t shared) {
    if (threads < 1) threads = 1;
    int blocks = chip->threads / threads;
    if (registers > 0 && 65536 / (registers * threads) < blocks)
        blocks = 65536 / (registers * threads);
    if (shared && (int)(chip->processor_shared / (shared + 1024)) < blocks)
        blocks = (int)(chip->processor_shared / (shared + 1024));
    return blocks < 32 ? blocks : 32;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, CUfunction given, int threads,
                                                     size_t shared) {
    struct function *function = (struct function *)given;
    *blocks = count_blocks(function->chip, threads, function->registers, shared + function->shared);
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction given,
                                      const CUlaunchConfig *config) {
    struct function *function = (struct function *)given;
    (void)config;
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
    if (!rank || rank > 5 || (uintptr_t)address % 16) return refuse(CUDA_ERROR_INVALID_VALUE);
    memset(map, 0, sizeof *map);
    return CUDA_SUCCESS;
}
