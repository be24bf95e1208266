/* Storage that misbehaves, for LD_PRELOAD: faults in reads of files whose path contains FAULT_PATH.
   FAULT_FIRST=1       the first read at each offset fails with EIO, the second works
   FAULT_STALL=S       the FAULT_STALL_AT-th read (1 without it) takes S seconds longer
   FAULT_BAD=LOW-HIGH  reads that touch these bytes of the file fail with EIO, always
   FAULT_WHILE=FILE    all reads fail with EIO as long as this file is there */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct { unsigned long file; off_t offset; } seen[1 << 16];
static int count, reads;

static int concerns(int fd, unsigned long *file) {
    char link[64], path[4096];
    const char *wanted = getenv("FAULT_PATH");
    if (!wanted) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    *file = 5381;
    for (char *c = path; *c; c++) *file = *file * 33 + (unsigned char)*c;
    return strstr(path, wanted) != NULL;
}

static int fails(unsigned long file, off_t offset, size_t size) {
    const char *bad = getenv("FAULT_BAD"), *stall = getenv("FAULT_STALL"), *at = getenv("FAULT_STALL_AT");
    const char *away = getenv("FAULT_WHILE");
    long low, high;
    int failing = 0, slow = 0;
    pthread_mutex_lock(&lock);
    slow = stall && ++reads == (at ? atoi(at) : 1);
    if (getenv("FAULT_FIRST")) {
        failing = 1;
        for (int i = 0; i < count; i++) failing &= seen[i].file != file || seen[i].offset != offset;
        if (failing && count < 1 << 16) seen[count].file = file, seen[count++].offset = offset;
    }
    pthread_mutex_unlock(&lock);
    if (slow) usleep((useconds_t)(atof(stall) * 1e6));
    if (bad && sscanf(bad, "%ld-%ld", &low, &high) == 2 && offset < high && offset + (off_t)size > low) failing = 1;
    return failing || (away && !access(away, F_OK));
}

ssize_t pread64(int fd, void *buffer, size_t size, off_t offset) {
    static ssize_t (*real)(int, void *, size_t, off_t);
    unsigned long file;
    if (!real) real = dlsym(RTLD_NEXT, "pread64");
    if (concerns(fd, &file) && fails(file, offset, size)) {
        errno = EIO;
        return -1;
    }
    return real(fd, buffer, size, offset);
}

ssize_t pread(int fd, void *buffer, size_t size, off_t offset) { return pread64(fd, buffer, size, offset); }
