/* What a package asks of ATen on the device, told to whoever computes answers.
 *
 * A package calls torch's C shims for a device (`aoti_torch_cuda_…`), and those call ATen's kernels
 * for it without asking torch's dispatcher, so this is the one place where such a call can be seen.
 * Below stands a function for each of them, made from torch's own header by aten.py: it tells
 * the name and the places of the arguments to the one that `stand_in_answer` named. Where nobody asks
 * for answers, torch's own function runs, whose kernels do nothing here.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* Computes a function: its name after `aoti_torch_cuda_`, and where each of its arguments lies.
 * It says 0, or 1 where it cannot. */
static int32_t (*answer)(const char *name, void **arguments);

void stand_in_answer(int32_t (*by)(const char *name, void **arguments)) { answer = by; }

/* Torch's own function, which ours stands before. */
static void *find_torchs(const char *name) {
    void *library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void *found = library ? dlsym(library, name) : 0;
    if (!found) {
        fprintf(stderr, "stand-in: torch has no %s\n", name);
        abort();
    }
    return found;
}
