/* A library to preload: makes a chosen write to files below a folder fail, or come short.

   Counted are write, writev, pwrite, pwrite64, ftruncate, ftruncate64, fsync and fdatasync on files whose path begins
   with the folder. `faulty_arm` begins to count; `faulty_count` says how many there were. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, FULL, BROKEN, SHORT };

static char folder[PATH_MAX];
static long at = -1, count;
static int kind = NONE;

void faulty_arm(const char *below, long number, int fault) {
  strncpy(folder, below, sizeof folder - 1);
  at = number;
  kind = fault;
  count = 0;
}

long faulty_count(void) { return count; }

/* 0: as ever; 1: fail with errno set; 2: write half. */
static int fault(int fd, int data) {
  char link[64], path[PATH_MAX];
  ssize_t length;
  int saved = errno;
  if (!folder[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  length = readlink(link, path, sizeof path - 1);
  errno = saved;
  if (length < 0) return 0;
  path[length] = 0;
  if (strncmp(path, folder, strlen(folder))) return 0;
  long number = count++;
  if (kind == FULL && number >= at) { errno = ENOSPC; return 1; }
  if (kind == BROKEN && number == at) { errno = EIO; return 1; }
  if (kind == SHORT && number == at && data) return 2;
  return 0;
}

#define NEXT(type, name, ...) ((type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name))

ssize_t write(int fd, const void *data, size_t size) {
  int found = fault(fd, 1);
  if (found == 1) return -1;
  return NEXT(ssize_t, "write", int, const void *, size_t)(fd, data, found == 2 && size > 1 ? size / 2 : size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t place) {
  int found = fault(fd, 1);
  if (found == 1) return -1;
  return NEXT(ssize_t, "pwrite64", int, const void *, size_t, off64_t)(
      fd, data, found == 2 && size > 1 ? size / 2 : size, place);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t place) { return pwrite64(fd, data, size, place); }

ssize_t writev(int fd, const struct iovec *parts, int number) {
  if (fault(fd, 0) == 1) return -1;
  return NEXT(ssize_t, "writev", int, const struct iovec *, int)(fd, parts, number);
}

int ftruncate64(int fd, off64_t size) {
  return fault(fd, 0) == 1 ? -1 : NEXT(int, "ftruncate64", int, off64_t)(fd, size);
}

int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

int fsync(int fd) { return fault(fd, 0) == 1 ? -1 : NEXT(int, "fsync", int)(fd); }

int fdatasync(int fd) { return fault(fd, 0) == 1 ? -1 : NEXT(int, "fdatasync", int)(fd); }
