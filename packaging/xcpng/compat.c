/*
 * What glibc 2.17 lacks and something in the program calls: thin names for system calls that Linux 4.19 has. Came with glibc 2.25, 2.27
 * and 2.30.
 */
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

ssize_t getrandom(void *buffer, size_t length, unsigned int flags)
{
    return syscall(SYS_getrandom, buffer, length, flags);
}

int memfd_create(const char *name, unsigned int flags)
{
    return (int)syscall(SYS_memfd_create, name, flags);
}

pid_t gettid(void)
{
    return (pid_t)syscall(SYS_gettid);
}
