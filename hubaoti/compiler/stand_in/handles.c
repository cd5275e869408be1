/* What was made and not taken back: nothing else that a caller gives for a handle is looked into.
 *
 * As with CUDA's own, a handle that was destroyed is not told from one that was made later at the
 * same address.
 */
#include "stand_in.h"
#include <stdlib.h>
#include <string.h>

static struct made {
    const char *address;
    enum kind kind;
} *all;
static size_t count, room;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
SURVIVES_FORK(lock)

/* The place of the first that does not lie before an address. */
static size_t find_place(const char *address) {
    size_t low = 0, high = count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (all[middle].address < address) low = middle + 1;
        else high = middle;
    }
    return low;
}

int hold(enum kind kind, const void *made) {
    pthread_mutex_lock(&lock);
    if (count == room) {
        struct made *moved = realloc(all, (2 * room + 64) * sizeof *all);
        if (moved) all = moved, room = 2 * room + 64;
    }
    int is_held = made && count < room;
    if (is_held) {
        size_t place = find_place(made);
        memmove(all + place + 1, all + place, (count++ - place) * sizeof *all);
        all[place] = (struct made){made, kind};
        count_live(kind, 1);
    }
    pthread_mutex_unlock(&lock);
    return is_held;
}

void *make(enum kind kind, size_t size) {
    void *made = calloc(1, size);
    if (hold(kind, made)) return made;
    free(made);
    return NULL;
}

static int find(enum kind kind, const void *handle, int take) {
    pthread_mutex_lock(&lock);
    size_t place = find_place(handle);
    int found = place < count && all[place].address == handle && all[place].kind == kind;
    if (found && take) {
        memmove(all + place, all + place + 1, (--count - place) * sizeof *all);
        count_live(kind, -1);
    }
    pthread_mutex_unlock(&lock);
    return found;
}

int is_held(enum kind kind, const void *handle) { return find(kind, handle, 0); }
int let_go(enum kind kind, const void *handle) { return find(kind, handle, 1); }

/* A handle of cuBLAS, cuDNN and their like: a thing of its own that nobody looks into. */
int make_handle(void *out, size_t size) {
    void *made = size == sizeof made && out ? make(HANDLE, 1) : NULL;
    if (made) memcpy(out, &made, sizeof made);
    return made != NULL;
}

void drop_handle(void *handle) {
    if (let_go(HANDLE, handle)) free(handle);
}
