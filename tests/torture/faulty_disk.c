// A disk that fails on demand, under walferry's queue alone: preloaded into the process, it stands before the calls of the C
// library that write to files, and does to those under $FAULTY_DISK_DIRECTORY what the first word in the file
// $FAULTY_DISK_CONTROL says at that moment. Each fault that was caused is a byte in $FAULTY_DISK_CONTROL.hits.
//
//   none   as it is
//   slow   every write and sync takes 60 ms
//   full   half of a write, and then no room
//   short  half of every write
//   write  writes fail with EIO
//   sync   syncs fail with EIO; what was written to the file since its last good sync is gone from the cache too, then or before,
//          as with file systems that drop what they could not write

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum fault { NONE, SLOW, FULL, SHORT, WRITE, SYNC };
enum { FILES_MAX = 4096 };

// Bytes of an open file that are written and not synced; [0, 0) for none.
static off_t dirty_from[FILES_MAX], dirty_to[FILES_MAX];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(result, name, ...) ((result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

static ssize_t real_pwrite(int fd, const void *bytes, size_t count, off_t at) {
    return REAL(ssize_t, "pwrite", int, const void *, size_t, off_t)(fd, bytes, count, at);
}

static int is_below(const char *path) {
    const char *directory = getenv("FAULTY_DISK_DIRECTORY");
    size_t length = directory ? strlen(directory) : 0;
    // The queue of a later slot has a name of its own, which begins like that of the first.
    return length && strncmp(path, directory, length) == 0 && strchr("/-", path[length]);
}

static int is_ours(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_below(path);
}

static enum fault active(void) {
    char word[16] = "";
    const char *control = getenv("FAULTY_DISK_CONTROL");
    int fd = control ? REAL(int, "open", const char *, int, ...)(control, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return NONE;
    ssize_t length = read(fd, word, sizeof word - 1);
    close(fd);
    if (length <= 0) return NONE;
    const char *words[] = {"none", "slow", "full", "short", "write", "sync"};
    for (int i = 0; i < 6; i++)
        if (strncmp(word, words[i], strlen(words[i])) == 0) return i;
    return NONE;
}

static void hit(void) {
    char path[4096];
    snprintf(path, sizeof path, "%s.hits", getenv("FAULTY_DISK_CONTROL"));
    int fd = REAL(int, "open", const char *, int, ...)(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) return;
    (void)!REAL(ssize_t, "write", int, const void *, size_t)(fd, "x", 1);
    close(fd);
}

static int fail(int error) {
    hit();
    errno = error;
    return -1;
}

static ssize_t faulty_pwrite(int fd, const void *bytes, size_t count, off_t at) {
    static __thread int half_was_written;
    static int writes;
    int is_lost = 0;
    if (!is_ours(fd)) return real_pwrite(fd, bytes, count, at);
    switch (active()) {
    case SLOW: hit(); usleep(60000); break;
    case WRITE: return fail(EIO);
    case SHORT:
        if (count > 1) { hit(); count = (count + 1) / 2; }
        break;
    case FULL:
        half_was_written = !half_was_written && count > 1;
        if (!half_was_written) return fail(ENOSPC);
        count /= 2;
        break;
    // The system may have tried to write it back before anybody syncs.
    case SYNC: is_lost = __atomic_fetch_add(&writes, 1, __ATOMIC_RELAXED) % 2 == 0; break;
    default: break;
    }
    char *zeros = is_lost ? calloc(1, count) : NULL;
    ssize_t written = real_pwrite(fd, zeros ? zeros : bytes, count, at);
    free(zeros);
    if (written > 0 && fd < FILES_MAX) {
        pthread_mutex_lock(&lock);
        if (dirty_to[fd] == 0 || at < dirty_from[fd]) dirty_from[fd] = at;
        if (at + written > dirty_to[fd]) dirty_to[fd] = at + written;
        pthread_mutex_unlock(&lock);
    }
    return written;
}

static int faulty_sync(int fd, const char *name) {
    int (*real)(int) = REAL(int, name, int);
    if (!is_ours(fd)) return real(fd);
    enum fault fault = active();
    if (fault == SLOW) { hit(); usleep(60000); }
    pthread_mutex_lock(&lock);
    off_t from = fd < FILES_MAX ? dirty_from[fd] : 0, to = fd < FILES_MAX ? dirty_to[fd] : 0;
    if (fd < FILES_MAX) dirty_from[fd] = dirty_to[fd] = 0;
    pthread_mutex_unlock(&lock);
    if (fault != SYNC) return real(fd);
    char zeros[4096] = {0};
    for (; from < to; from += sizeof zeros)
        real_pwrite(fd, zeros, to - from < (off_t)sizeof zeros ? to - from : (off_t)sizeof zeros, from);
    // Time for a reader to meet it before the writer hears of it.
    usleep(20000);
    return fail(EIO);
}

static int faulty_truncate(int fd, off_t length) {
    if (is_ours(fd) && fd < FILES_MAX) {
        pthread_mutex_lock(&lock);
        if (dirty_to[fd] > length) dirty_to[fd] = length;
        if (dirty_from[fd] >= dirty_to[fd]) dirty_from[fd] = dirty_to[fd] = 0;
        pthread_mutex_unlock(&lock);
    }
    return REAL(int, "ftruncate", int, off_t)(fd, length);
}

static int faulty_open(const char *path, int flags, mode_t mode) {
    int is_new = (flags & O_CREAT) && is_below(path);
    if (is_new && active() == FULL) return fail(ENOSPC);
    int fd = REAL(int, "open", const char *, int, ...)(path, flags, mode);
    if (fd >= 0 && fd < FILES_MAX) {
        pthread_mutex_lock(&lock);
        dirty_from[fd] = dirty_to[fd] = 0;
        pthread_mutex_unlock(&lock);
    }
    return fd;
}

static mode_t mode_of(int flags, va_list rest) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; }

int open(const char *path, int flags, ...) {
    va_list rest; va_start(rest, flags); mode_t mode = mode_of(flags, rest); va_end(rest);
    return faulty_open(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    va_list rest; va_start(rest, flags); mode_t mode = mode_of(flags, rest); va_end(rest);
    return faulty_open(path, flags | O_LARGEFILE, mode);
}
ssize_t pwrite(int fd, const void *bytes, size_t count, off_t at) { return faulty_pwrite(fd, bytes, count, at); }
ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t at) { return faulty_pwrite(fd, bytes, count, at); }
int fsync(int fd) { return faulty_sync(fd, "fsync"); }
int fdatasync(int fd) { return faulty_sync(fd, "fdatasync"); }
int ftruncate(int fd, off_t length) { return faulty_truncate(fd, length); }
int ftruncate64(int fd, off64_t length) { return faulty_truncate(fd, length); }

// The queue writes at offsets. Should that ever change, this disk must learn of it: these say so, and fail.
static ssize_t unknown(int fd, const char *name) {
    fprintf(stderr, "faulty disk: %s to the queue's file %d is not known to the test\n", name, fd);
    return fail(EIO);
}
ssize_t write(int fd, const void *bytes, size_t count) {
    if (is_ours(fd)) return unknown(fd, "write");
    return REAL(ssize_t, "write", int, const void *, size_t)(fd, bytes, count);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (is_ours(fd)) return unknown(fd, "writev");
    return REAL(ssize_t, "writev", int, const struct iovec *, int)(fd, parts, count);
}

// Says that it is there: a program that is linked statically would run without it and nobody would notice.
__attribute__((constructor)) static void say_loaded(void) {
    const char *control = getenv("FAULTY_DISK_CONTROL");
    char path[4096];
    snprintf(path, sizeof path, "%s.loaded", control ? control : "");
    int fd = control ? REAL(int, "open", const char *, int, ...)(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (fd >= 0) close(fd);
}
