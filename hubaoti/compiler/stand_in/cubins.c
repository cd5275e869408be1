/* Cubins: ELF files with kernels, whose every place, size and number is looked at before it is used.
 *
 * CUDA's functions are given where an image begins and not where it ends. So its length is what it
 * says itself, to the end of its last section; the system copies that much, and says where memory
 * ends that this process may read. An image that was cut off is refused for that, or for what
 * stands there instead: whether what follows it in memory was ever part of it, nobody can know.
 */
#include "stand_in.h"
#include "chips.h"
#include <dlfcn.h>
#include <elf.h>
#include <limits.h>
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

#define EM_CUDA_MACHINE 190
#define IMAGE_ALIGNMENT 64
#define MOST_BYTES ((size_t)1 << 30) /* of an image, and of a section of it */
/* Attributes of .nv.info, as cuobjdump names them. */
#define EIFMT_SVAL 0x04
#define EIATTR_REQNTID 0x10
#define EIATTR_FRAME_SIZE 0x11
#define EIATTR_REGCOUNT 0x2f

struct image {
    char *start;
    size_t size;
    Elf64_Ehdr head;
    Elf64_Shdr *sections;
};

static CUresult refuse_image(const char *why) {
    return (CUresult)explain(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid: %s", why);
}

/* Copy bytes that this process may perhaps not read: 0 where it may not. */
static int copy_bytes(void *target, const char *source, size_t size) {
    int file = memfd_create("stand-in", MFD_CLOEXEC);
    size_t done = 0;
    for (ssize_t more = 1; file >= 0 && more > 0 && done < size; done += more > 0 ? more : 0)
        more = write(file, source + done, size - done);
    int whole = done == size && pread(file, target, size, 0) == (ssize_t)size;
    if (file >= 0) close(file);
    return whole;
}

/* The same, into memory of its own; NULL also where there is none. */
static void *take_bytes(const char *source, size_t size) {
    void *made = malloc(size);
    if (made && copy_bytes(made, source, size)) return made;
    free(made);
    return NULL;
}

static CUresult check_place(const void *start) {
    Dl_info library;
    /* One that lies in a library may be read as it lies there; bytes of the host's are copied first. */
    if ((uintptr_t)start % IMAGE_ALIGNMENT && dladdr(start, &library))
        return (CUresult)explain(
            CUDA_ERROR_INVALID_IMAGE,
            "device kernel image is invalid: in %s it begins at no multiple of %d bytes",
            library.dli_fname, IMAGE_ALIGNMENT);
    return CUDA_SUCCESS;
}

static CUresult check_head(const Elf64_Ehdr *head) {
    if (memcmp(head->e_ident, ELFMAG, SELFMAG) || head->e_ident[EI_CLASS] != ELFCLASS64
        || head->e_ident[EI_DATA] != ELFDATA2LSB || head->e_machine != EM_CUDA_MACHINE)
        return refuse_image("it is no cubin");
    if (!head->e_shnum || head->e_shentsize != sizeof(Elf64_Shdr) || head->e_shoff > MOST_BYTES
        || head->e_shstrndx >= head->e_shnum)
        return refuse_image("it has no table of sections");
    return CUDA_SUCCESS;
}

static int has_bytes(const Elf64_Shdr *section) {
    return section->sh_type != SHT_NULL && section->sh_type != SHT_NOBITS;
}

/* Where the last of an image ends; 0 where a section is too large for one. */
static size_t find_end(const struct image *image) {
    size_t end = image->head.e_shoff + image->head.e_shnum * sizeof(Elf64_Shdr);
    for (int i = 0; i < image->head.e_shnum; i++) {
        const Elf64_Shdr *each = &image->sections[i];
        if (!has_bytes(each)) continue;
        if (each->sh_offset > MOST_BYTES || each->sh_size > MOST_BYTES) return 0;
        if (each->sh_offset + each->sh_size > end) end = each->sh_offset + each->sh_size;
    }
    return end;
}

/* A text in a table of texts; NULL where the section is none, or ends before the text does. */
static const char *find_text(const struct image *image, unsigned section, size_t offset) {
    if (section >= image->head.e_shnum) return NULL;
    const Elf64_Shdr *table = &image->sections[section];
    if (table->sh_type != SHT_STRTAB || offset >= table->sh_size) return NULL;
    const char *texts = image->start + table->sh_offset;
    return texts[table->sh_size - 1] ? NULL : texts + offset;
}

static const char *name_section(const struct image *image, int i) {
    return find_text(image, image->head.e_shstrndx, image->sections[i].sh_name);
}

static void free_image(struct image *image) {
    free(image->sections);
    free(image->start);
}

/* Read an image as far as its sections and their names; `known` is its length, or 0. */
static CUresult read_image(struct image *image, const char *start, size_t known) {
    CUresult error = check_place(start);
    if (error) return error;
    if ((known && known < sizeof image->head)
        || !copy_bytes(&image->head, start, sizeof image->head))
        return refuse_image("it is no cubin");
    if ((error = check_head(&image->head))) return error;
    size_t table = image->head.e_shnum * sizeof(Elf64_Shdr);
    if (!known || image->head.e_shoff + table <= known)
        image->sections = take_bytes(start + image->head.e_shoff, table);
    image->size = image->sections ? find_end(image) : 0;
    if (image->size && (!known || image->size <= known))
        image->start = take_bytes(start, image->size);
    if (!image->start) return refuse_image("it ends before its sections do");
    for (int i = 0; i < image->head.e_shnum; i++)
        if (!name_section(image, i)) return refuse_image("a section has no name");
    return CUDA_SUCCESS;
}

/* A cubin runs on its capability and the later ones of its major; of the `a` kind, on its own alone. */
static CUresult check_capability(const struct image *image, const struct chip *chip) {
    unsigned flags = image->head.e_flags;
    int newer = image->head.e_ident[EI_ABIVERSION] >= 8;
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
    for (int i = 0; i < image->head.e_shnum; i++) {
        const Elf64_Shdr *table = &image->sections[i];
        Elf64_Sym found;
        if (table->sh_type != SHT_SYMTAB || symbol >= table->sh_size / sizeof found) continue;
        memcpy(&found, image->start + table->sh_offset + symbol * sizeof found, sizeof found);
        const char *name = find_text(image, table->sh_link, found.st_name);
        for (int j = 0; name && j < module->count; j++)
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
    if (!has_bytes(&image->sections[section])) return;
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

/* The functions of a cubin, by the sections of their code; 0 where there is no memory for them. */
static int name_functions(const struct image *image, struct module *module,
                          const struct chip *chip) {
    module->functions = calloc(image->head.e_shnum, sizeof *module->functions);
    for (int i = 0; module->functions && i < image->head.e_shnum; i++) {
        if (strncmp(name_section(image, i), ".text.", 6)) continue;
        struct function *made = &module->functions[module->count];
        if (!(made->name = strdup(name_section(image, i) + 6))) return 0;
        made->chip = chip;
        made->dynamic = 48 << 10;
        module->count++;
    }
    return module->functions != NULL;
}

static CUresult describe_functions(const struct image *image, struct module *module) {
    for (int i = 0; i < image->head.e_shnum; i++) {
        const char *name = name_section(image, i);
        for (int j = 0; j < module->count; j++) {
            struct function *each = &module->functions[j];
            if (!strncmp(name, ".nv.shared.", 11) && !strcmp(name + 11, each->name)) {
                if (image->sections[i].sh_size > INT_MAX / 2)
                    return refuse_image("no block has that much shared memory");
                each->shared = (int)image->sections[i].sh_size;
            }
            if (!strncmp(name, ".nv.info.", 9) && !strcmp(name + 9, each->name))
                read_attributes(image, module, each, i);
        }
        if (!strcmp(name, ".nv.info")) read_attributes(image, module, NULL, i);
    }
    return CUDA_SUCCESS;
}

CUresult read_cubin(struct module *module, const void *start, size_t size,
                    const struct chip *chip) {
    struct image image = {0};
    CUresult error = read_image(&image, start, size);
    if (!error) error = check_capability(&image, chip);
    if (!error && !name_functions(&image, module, chip)) error = refuse(CUDA_ERROR_OUT_OF_MEMORY);
    if (!error) error = describe_functions(&image, module);
    free_image(&image);
    return error;
}

void free_module(struct module *module) {
    for (int i = 0; i < module->count; i++) free(module->functions[i].name);
    free(module->functions);
    free(module);
}
