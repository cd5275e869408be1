/* The GPUs that the stand-in knows, one for each capability: what a program may ask of them.
 *
 * Processors, shared memory, L2 and memory are those of NVIDIA's data sheets and of the CUDA C++
 * Programming Guide; clocks (MHz) and the memory's bus are there for estimates of bandwidth.
 */
#ifndef STAND_IN_CHIPS_H
#define STAND_IN_CHIPS_H
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STAND_IN_MARK "(stand-in)" /* how the name of a device ends that computes nothing */
#define STAND_IN_DRIVER "999.0" /* of no release, so newer than any that is asked for */
#define MOST_DEVICES 16

struct chip {
    int sm, processors, threads; /* threads: the most that one processor holds */
    int shared, processor_shared; /* bytes that a block may have, and that a processor has */
    int l2_mb, memory_gb, clock, memory_clock, bus;
    const char *name;
};

static const struct chip CHIPS[] = {
    {75, 40, 1024, 64 << 10, 64 << 10, 4, 16, 1590, 5001, 256, "Tesla T4"},
    {80, 108, 2048, 163 << 10, 164 << 10, 40, 80, 1410, 1593, 5120, "A100 80GB"},
    {86, 72, 1536, 99 << 10, 100 << 10, 6, 24, 1695, 6251, 384, "A10"},
    {89, 142, 1536, 99 << 10, 100 << 10, 96, 48, 2520, 9001, 384, "L40S"},
    {90, 132, 2048, 227 << 10, 228 << 10, 50, 80, 1980, 2619, 5120, "H100 80GB"},
    {100, 148, 2048, 227 << 10, 228 << 10, 126, 180, 1965, 3996, 8192, "B200"},
    {103, 148, 2048, 227 << 10, 228 << 10, 126, 270, 1920, 3996, 8192, "B300"},
    {120, 188, 1536, 99 << 10, 100 << 10, 128, 96, 2617, 14001, 512, "RTX PRO 6000"},
};

/* The devices of STAND_IN_SM ("90" or "90,80"), in that order; what is no known one is left out. */
static inline int read_installed(const struct chip *installed[MOST_DEVICES]) {
    const char *text = getenv("STAND_IN_SM");
    int count = 0;
    while (text && *text && count < MOST_DEVICES) {
        int sm = (int)strtol(text, NULL, 10);
        for (size_t i = 0; i < sizeof CHIPS / sizeof *CHIPS; i++)
            if (CHIPS[i].sm == sm) installed[count++] = &CHIPS[i];
        text += strcspn(text, ",");
        text += *text == ',';
    }
    return count;
}

/* Bytes of a device: STAND_IN_MEMORY for each, else what its data sheet says. */
static inline size_t read_memory(const struct chip *chip) {
    const char *text = getenv("STAND_IN_MEMORY");
    return text && *text ? strtoull(text, NULL, 10) : (size_t)chip->memory_gb << 30;
}

static inline void write_name(char *name, size_t size, const struct chip *chip) {
    snprintf(name, size, "NVIDIA %s " STAND_IN_MARK, chip->name);
}

static inline void write_uuid(char *uuid, size_t size, int index) {
    snprintf(uuid, size, "GPU-57a4d110-0000-4000-8000-%012x", index);
}

static inline void write_bus_id(char *id, size_t size, int index) {
    snprintf(id, size, "0000:%02x:00.0", index + 1);
}
#endif
