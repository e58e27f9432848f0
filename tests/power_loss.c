/* Records how to undo what is written below a folder and not synced, so that a test can imitate a
 * power loss. Preloaded into a process; `power_start` begins to record. See tests/power_loss.py.
 *
 * For each file, `f<inode>` holds what its writes since the last fsync or fdatasync replaced.
 * `ops` holds changes of directories, one line each, and `S` lines for their fsyncs. Files that a
 * change removes are kept as `s<number>`.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sendfile.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX], undo[PATH_MAX];
static size_t root_length;
static int ops = -1;
static long counter;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread int inside;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define ENTER (ops >= 0 && !inside && (pthread_mutex_lock(&lock), inside = 1))
#define LEAVE (inside = 0, pthread_mutex_unlock(&lock))

void power_start(const char *folder, const char *undo_folder) {
    snprintf(root, sizeof root, "%s/", folder);
    root_length = strlen(root);
    snprintf(undo, sizeof undo, "%s", undo_folder);
    char path[PATH_MAX + 8];
    snprintf(path, sizeof path, "%s/ops", undo);
    ops = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (ops < 0) abort();
}

/* Absolute path of an entry; its folder is resolved. Returns whether it is below the root. */
static int resolve(int dir, const char *path, char *found) {
    char whole[PATH_MAX * 2], folder[PATH_MAX * 2], base[PATH_MAX];
    if (path[0] == '/') snprintf(whole, sizeof whole, "%s", path);
    else {
        char link[64], at[PATH_MAX] = "";
        if (dir == AT_FDCWD) { if (!getcwd(at, sizeof at)) return 0; }
        else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
            ssize_t n = readlink(link, at, sizeof at - 1);
            if (n < 0) return 0;
            at[n] = 0;
        }
        snprintf(whole, sizeof whole, "%s/%s", at, path);
    }
    char *slash = strrchr(whole, '/');
    snprintf(base, sizeof base, "%s", slash + 1);
    *slash = 0;
    if (!realpath(whole[0] ? whole : "/", folder)) return 0;
    snprintf(found, PATH_MAX, "%s/%s", folder, base);
    return strncmp(found, root, root_length) == 0;
}

static void say(const char *format, ...) {
    char line[PATH_MAX * 3];
    va_list arguments;
    va_start(arguments, format);
    int n = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (syscall(SYS_write, ops, line, n) != n) abort();
}

static unsigned long folder_of(const char *path) {
    char folder[PATH_MAX];
    struct stat found;
    snprintf(folder, sizeof folder, "%s", path);
    *strrchr(folder, '/') = 0;
    return stat(folder, &found) ? 0 : found.st_ino;
}

static long keep(const char *path) {
    char kept[PATH_MAX + 32];
    struct stat found;
    if (lstat(path, &found) || !S_ISREG(found.st_mode)) return 0;
    snprintf(kept, sizeof kept, "%s/s%ld-%d", undo, ++counter, getpid());
    return syscall(SYS_linkat, AT_FDCWD, path, AT_FDCWD, kept, 0) ? 0 : counter;
}

static int is_tracked(int file, struct stat *found) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return strncmp(path, root, root_length) == 0 && !fstat(file, found);
}

static void undo_file(unsigned long inode, char *path) {
    snprintf(path, PATH_MAX, "%s/f%lu", undo, inode);
}

/* Records what a write of `length` bytes at `offset` (-1: where the file is) replaces. */
static void before_write(int file, off_t offset, size_t length, off_t new_size) {
    struct stat found;
    if (!is_tracked(file, &found) || !S_ISREG(found.st_mode)) return;
    int flags = fcntl(file, F_GETFL);
    if (offset < 0) offset = flags & O_APPEND ? found.st_size : lseek(file, 0, SEEK_CUR);
    size_t old = offset >= found.st_size ? 0 : (size_t)(found.st_size - offset);
    if (old > length) old = length;
    char *data = malloc(old + 1), path[PATH_MAX];
    /* Closing another descriptor would release the locks of this process on a database. */
    int reading = file;
    if ((flags & O_ACCMODE) == O_WRONLY) {
        snprintf(path, sizeof path, "/proc/self/fd/%d", file);
        reading = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY);
    }
    if (old && syscall(SYS_pread64, reading, data, old, offset) != (ssize_t)old) abort();
    if (reading != file) syscall(SYS_close, reading);
    undo_file(found.st_ino, path);
    int log = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    uint64_t head[4] = {offset, old, found.st_size, new_size < 0 ? length : 0};
    struct iovec parts[2] = {{head, sizeof head}, {data, old}};
    if (syscall(SYS_writev, log, parts, 2) != (ssize_t)(sizeof head + old)) abort();
    syscall(SYS_close, log);
    free(data);
}

static void after_sync(int file) {
    struct stat found;
    if (!is_tracked(file, &found)) {
        /* The root itself has no slash at its end. */
        char link[64], path[PATH_MAX];
        snprintf(link, sizeof link, "/proc/self/fd/%d", file);
        ssize_t n = readlink(link, path, sizeof path - 1);
        if (n != (ssize_t)root_length - 1 || strncmp(path, root, n) || fstat(file, &found)) return;
    }
    if (S_ISDIR(found.st_mode)) say("S\t%lu\n", found.st_ino);
    else {
        char path[PATH_MAX];
        undo_file(found.st_ino, path);
        syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    }
}

static int opened(int dir, const char *path, int flags, mode_t mode) {
    char whole[PATH_MAX];
    struct stat found;
    int tracked = ENTER;
    int is_new = 0;
    if (tracked && (flags & (O_CREAT | O_TRUNC)) && resolve(dir, path, whole)) {
        is_new = lstat(whole, &found) != 0;
        if (!is_new && (flags & O_TRUNC) && found.st_size) {
            int file = syscall(SYS_openat, dir, path, O_RDWR);
            if (file >= 0) { before_write(file, 0, found.st_size, 0); syscall(SYS_close, file); }
        }
    }
    int file = syscall(SYS_openat, dir, path, flags, mode);
    int error = errno;
    if (is_new && file >= 0 && !fstat(file, &found)) {
        char old[PATH_MAX];
        undo_file(found.st_ino, old);
        syscall(SYS_unlinkat, AT_FDCWD, old, 0);
        say("C\t%lu\t%s\t%lu\n", folder_of(whole), whole, found.st_ino);
    }
    if (tracked) LEAVE;
    errno = error;
    return file;
}

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { \
        va_list arguments; va_start(arguments, flags); mode = va_arg(arguments, mode_t); va_end(arguments); \
    }

int open(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return opened(AT_FDCWD, path, flags | O_LARGEFILE, mode); }
int openat(int dir, const char *path, int flags, ...) { MODE(flags) return opened(dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { MODE(flags) return opened(dir, path, flags | O_LARGEFILE, mode); }

#define WRITES(type, signature, call, offset, length, new_size) \
    type signature { \
        struct stat found; \
        int tracked = ops >= 0 && !inside && is_tracked(file, &found) && ENTER; \
        if (tracked) before_write(file, offset, length, new_size); \
        type done = call; \
        int error = errno; \
        if (tracked) LEAVE; \
        errno = error; \
        return done; \
    }

static size_t total(const struct iovec *parts, int count) {
    size_t sum = 0;
    for (int i = 0; i < count; i++) sum += parts[i].iov_len;
    return sum;
}

static size_t rest(int file, off_t length) {
    struct stat found;
    return fstat(file, &found) || found.st_size <= length ? 0 : (size_t)(found.st_size - length);
}

WRITES(ssize_t, write(int file, const void *data, size_t n), REAL(write)(file, data, n), -1, n, -1)
WRITES(ssize_t, pwrite(int file, const void *data, size_t n, off_t at), REAL(pwrite)(file, data, n, at), at, n, -1)
WRITES(ssize_t, pwrite64(int file, const void *data, size_t n, off64_t at), REAL(pwrite64)(file, data, n, at), at, n, -1)
WRITES(ssize_t, writev(int file, const struct iovec *parts, int n), REAL(writev)(file, parts, n), -1, total(parts, n), -1)
WRITES(ssize_t, pwritev(int file, const struct iovec *parts, int n, off_t at), REAL(pwritev)(file, parts, n, at), at, total(parts, n), -1)
WRITES(int, ftruncate(int file, off_t length), REAL(ftruncate)(file, length), length, rest(file, length), length)
WRITES(int, ftruncate64(int file, off64_t length), REAL(ftruncate64)(file, length), length, rest(file, length), length)
WRITES(ssize_t, sendfile(int file, int from, off_t *at, size_t n), REAL(sendfile)(file, from, at, n), -1, n, -1)
WRITES(ssize_t, sendfile64(int file, int from, off64_t *at, size_t n), REAL(sendfile64)(file, from, at, n), -1, n, -1)
WRITES(ssize_t, copy_file_range(int from, off64_t *in, int file, off64_t *out, size_t n, unsigned flags),
       REAL(copy_file_range)(from, in, file, out, n, flags), out ? *out : -1, n, -1)

#define SYNCS(name) \
    int name(int file) { \
        int tracked = ENTER, done = REAL(name)(file), error = errno; \
        if (tracked && !done) after_sync(file); \
        if (tracked) LEAVE; \
        errno = error; \
        return done; \
    }
SYNCS(fsync)
SYNCS(fdatasync)

static int removed(int dir, const char *path, int flags) {
    char whole[PATH_MAX];
    int tracked = ENTER, is_ours = tracked && resolve(dir, path, whole);
    long kept = is_ours && !(flags & AT_REMOVEDIR) ? keep(whole) : 0;
    int done = syscall(SYS_unlinkat, dir, path, flags), error = errno;
    if (is_ours && !done) {
        if (flags & AT_REMOVEDIR) say("K\t%lu\t%s\n", folder_of(whole), whole);
        else say("D\t%lu\t%s\ts%ld-%d\n", folder_of(whole), whole, kept, getpid());
    }
    if (tracked) LEAVE;
    errno = error;
    return done;
}
int unlink(const char *path) { return removed(AT_FDCWD, path, 0); }
int unlinkat(int dir, const char *path, int flags) { return removed(dir, path, flags); }
int rmdir(const char *path) { return removed(AT_FDCWD, path, AT_REMOVEDIR); }

static int renamed(int from, const char *old, int to, const char *new, unsigned flags) {
    char whole_old[PATH_MAX], whole_new[PATH_MAX];
    int tracked = ENTER;
    int is_ours = tracked && resolve(from, old, whole_old) && resolve(to, new, whole_new);
    long kept = is_ours ? keep(whole_new) : 0;
    int done = syscall(SYS_renameat2, from, old, to, new, flags), error = errno;
    if (is_ours && !done)
        say("R\t%lu\t%s\t%s\ts%ld-%d\n", folder_of(whole_new), whole_new, whole_old, kept, getpid());
    if (tracked) LEAVE;
    errno = error;
    return done;
}
int rename(const char *old, const char *new) { return renamed(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) { return renamed(from, old, to, new, 0); }
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) { return renamed(from, old, to, new, flags); }

static int linked(int from, const char *old, int to, const char *new, int flags) {
    char whole[PATH_MAX];
    int tracked = ENTER, is_ours = tracked && resolve(to, new, whole);
    int done = syscall(SYS_linkat, from, old, to, new, flags), error = errno;
    if (is_ours && !done) say("C\t%lu\t%s\n", folder_of(whole), whole);
    if (tracked) LEAVE;
    errno = error;
    return done;
}
int link(const char *old, const char *new) { return linked(AT_FDCWD, old, AT_FDCWD, new, 0); }
int linkat(int from, const char *old, int to, const char *new, int flags) { return linked(from, old, to, new, flags); }

static int made(int dir, const char *path, mode_t mode) {
    char whole[PATH_MAX];
    int tracked = ENTER, is_ours = tracked && resolve(dir, path, whole);
    int done = syscall(SYS_mkdirat, dir, path, mode), error = errno;
    if (is_ours && !done) say("M\t%lu\t%s\n", folder_of(whole), whole);
    if (tracked) LEAVE;
    errno = error;
    return done;
}
int mkdir(const char *path, mode_t mode) { return made(AT_FDCWD, path, mode); }
int mkdirat(int dir, const char *path, mode_t mode) { return made(dir, path, mode); }
